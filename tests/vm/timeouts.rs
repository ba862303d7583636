// SPDX-License-Identifier: GPL-2.0-only
//! `umcg_wait` with a timeout ends with -ETIMEDOUT, not before its time, and changes nobody but the server that waits.
//!
//! The failures this guards against: a timer of an earlier wait ends a later one; a server whose wait timed out forgets
//! that it serves, and runs a second worker beside the first.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::thread::sleep;
use std::time::{Duration, Instant};

use umcg::raw::UMCG_WAIT_ENQUEUE;

use crate::api::{self, BLOCKED, NONE, RUNNABLE, RUNNING};
use crate::cast::{
    List, Task, Worker, become_server, open, retire, scaled, spawn, spawn_server, spawn_worker, spin_until,
    wait_until,
};
use crate::harness::Test;
use crate::scene::{STEPS, assert_only, assert_state};

pub const TESTS: &[Test] = &[
    Test::new("the_wait_of_an_idle_server_times_out", idle),
    Test::new("a_server_whose_wait_times_out_serves_on", serving),
    Test::new("what_happens_after_a_timeout_is_not_missed", afterwards),
    Test::new("a_worker_that_waits_after_a_timeout_is_queued", worker_waits),
    Test::new("an_event_comes_before_the_timeout", event_first),
    Test::new("an_old_timer_does_not_end_a_later_wait", old_timer),
    Test::new("an_event_and_a_timeout_at_the_same_time", both).limit_s(300),
    Test::new("a_worker_cannot_have_a_timeout", of_worker),
    Test::new("a_worker_that_became_a_server_has_timeouts", of_former_worker),
    Test::new("a_timeout_may_be_as_long_as_the_type_allows", huge),
];

const SHORT: Duration = Duration::from_millis(20);

/// Marks the server, names `next`, and waits; the answer.
fn wait(me: &Task, next: u32, timeout: Duration) -> i32 {
    me.next_tid.store(next, SeqCst);
    me.status.store(RUNNABLE, SeqCst);
    let answer = api::wait(timeout.as_nanos().try_into().expect("it is short"), 0);
    assert_state(me, RUNNING);
    answer
}

/// The wait ends by its timeout; only the lower bound is promised.
fn times_out(me: &Task, next: u32, timeout: Duration) {
    let start = Instant::now();
    assert_eq!(wait(me, next, timeout), -libc::ETIMEDOUT);
    let took = start.elapsed();
    assert!(took >= timeout, "timed out after {took:?} of {timeout:?}");
}

fn idle() {
    open(1);
    let server = become_server();
    for us in [1, 50, 1000, 20_000, 200_000] {
        times_out(server, 0, Duration::from_micros(us));
    }
    times_out(server, server.tid(), SHORT);
    times_out(server, 0, Duration::from_nanos(1));
    // Every single one ends, whatever the clocks of two CPUs think of each other.
    for _ in 0..scaled(2000) {
        times_out(server, 0, Duration::from_micros(30));
    }
    retire(server);
}

fn of_former_worker() {
    open(2);
    let server = become_server();
    let worker = spawn_worker(server.tid(), |task| {
        task.server_tid.store(task.tid(), SeqCst);
        for _ in 0..scaled(100) {
            times_out(task, 0, SHORT);
        }
    });
    server.await_runnable(worker.task);
    server.run(worker.task);
    worker.thread.join().unwrap();
    retire(server);
}

/// Counts until the test gives the cue; then blocks.
struct Counter {
    worker: Worker,
    wake: UnixStream,
}

static CUE: AtomicBool = AtomicBool::new(false);
static REFUSED: AtomicU32 = AtomicU32::new(0);

impl Counter {
    fn spawn(server: &Task) -> Self {
        let (wake, mut theirs) = UnixStream::pair().unwrap();
        let worker = spawn_worker(server.tid(), move |_| {
            while !CUE.load(SeqCst) {
                STEPS.fetch_add(1, SeqCst);
            }
            theirs.read_exact(&mut [0]).unwrap();
        });
        server.await_runnable(worker.task);
        Self { worker, wake }
    }

    fn assert_goes_on(&self) {
        assert_state(self.worker.task, RUNNING);
        let before = STEPS.load(SeqCst);
        wait_until("the worker goes on", || STEPS.load(SeqCst) > before);
    }

    /// From its block on.
    fn end(mut self, server: &Task) {
        self.wake.write_all(&[0]).unwrap();
        server.await_runnable(self.worker.task);
        server.run(self.worker.task);
        assert_state(self.worker.task, NONE);
        self.worker.thread.join().unwrap();
    }
}

fn serving() {
    open(4);
    let server = become_server();
    let counter = Counter::spawn(server);
    let other = spawn_worker(server.tid(), |_| ());
    server.await_runnable(other.task);
    let (tid, other_tid) = (counter.worker.task.tid(), other.task.tid());

    times_out(server, tid, SHORT);
    assert_eq!(server.next_tid.load(SeqCst), 0, "the worker was run");
    counter.assert_goes_on();
    assert_eq!(wait(server, other_tid, SHORT), -libc::EBUSY, "it serves");
    assert_eq!(server.next_tid.load(SeqCst), other_tid);
    assert_state(other.task, RUNNABLE);
    assert_eq!(api::unregister(server.as_ptr()), -libc::EBUSY);
    // Nor can it be run as a server, or become somebody's worker: its own would be in user code beside it.
    let third = spawn_server(|task| {
        for named in [server.tid(), task.tid()] {
            let is_ready = || (server.state(), server.server_tid.load(SeqCst)) == (RUNNABLE, named);
            wait_until("the server names its server, and marks itself", is_ready);
            assert_eq!(task.switch_to(server.tid()), -libc::EBUSY, "it serves");
            REFUSED.fetch_add(1, SeqCst);
        }
        assert_eq!(task.switch_to(0), 0);
    });
    server.status.store(RUNNABLE, SeqCst);
    wait_until("the third is refused", || REFUSED.load(SeqCst) == 1);
    server.server_tid.store(third.task.tid(), SeqCst);
    wait_until("the third is refused again", || REFUSED.load(SeqCst) == 2);
    assert_state(server, RUNNABLE);
    assert_eq!(wait(server, 0, Duration::ZERO), -libc::EBUSY, "it serves");
    server.server_tid.store(server.tid(), SeqCst);
    wait_until("the third idles", || third.task.state() == RUNNABLE);
    assert_eq!(api::kick(third.task.tid(), 0), 0);
    third.thread.join().unwrap();
    for next in [0, server.tid(), tid] {
        times_out(server, next, SHORT);
        counter.assert_goes_on();
    }
    assert!(server.take(List::Blocked).is_empty() && server.take(List::Runnable).is_empty());

    let cue = spawn(|| {
        wait_until("the server waits", || server.state() == RUNNABLE);
        CUE.store(true, SeqCst);
    });
    assert_eq!(server.switch_to(0), 0, "until its worker blocks");
    assert_only(counter.worker.task, &server.take(List::Blocked));
    cue.join().unwrap();
    server.run(other.task);
    other.thread.join().unwrap();
    counter.end(server);
    retire(server);
}

fn afterwards() {
    open(8);
    let server = become_server();
    for marked in [false, true] {
        CUE.store(false, SeqCst);
        let counter = Counter::spawn(server);
        let worker = counter.worker.task;
        times_out(server, worker.tid(), SHORT);
        if marked {
            server.next_tid.store(0, SeqCst);
            server.status.store(RUNNABLE, SeqCst);
        }
        CUE.store(true, SeqCst);
        wait_until("the worker blocks", || worker.state() == BLOCKED);
        wait_until("the server is told", || server.state() == RUNNING);
        assert_eq!(api::wait(0, 0), 0, "it is RUNNING");
        assert_only(worker, &server.take(List::Blocked));
        // It serves nobody now.
        let other = spawn_worker(server.tid(), |_| ());
        server.await_runnable(other.task);
        server.run(other.task);
        other.thread.join().unwrap();
        counter.end(server);
    }
    retire(server);
}

/// Its host is not waiting, so nobody would know of a worker that waits for its host.
fn worker_waits() {
    open(2);
    let server = become_server();
    let worker = spawn_worker(server.tid(), |task| {
        for flags in [0, 0, UMCG_WAIT_ENQUEUE, UMCG_WAIT_ENQUEUE] {
            let cue = task.user_data.load(SeqCst);
            spin_until("the cue", || task.user_data.load(SeqCst) > cue);
            task.status.store(RUNNABLE, SeqCst);
            assert_eq!(api::wait(0, flags), 0);
        }
    });
    server.await_runnable(worker.task);
    for marked in [false, true, false, true] {
        times_out(server, worker.task.tid(), SHORT);
        if marked {
            server.status.store(RUNNABLE, SeqCst);
        }
        worker.task.user_data.fetch_add(1, SeqCst);
        wait_until("the worker waits", || worker.task.state() == RUNNABLE);
        wait_until("it is on the list", || server.runnable_ptr.load(SeqCst) != 0);
        wait_until("the server is told", || server.state() == RUNNING);
        assert_only(worker.task, &server.take(List::Runnable));
    }
    server.run(worker.task);
    worker.thread.join().unwrap();
    retire(server);
}

/// Ends the next wait of the server, once it has begun, after a moment.
fn kick_after(server: &'static Task, moment: Duration) -> std::thread::JoinHandle<()> {
    spawn(move || {
        wait_until("the server waits", || server.state() == RUNNABLE);
        sleep(moment);
        KICKED.store(true, SeqCst);
        assert_eq!(api::kick(server.tid(), 0), 0);
    })
}

static KICKED: AtomicBool = AtomicBool::new(false);

fn event_first() {
    const LONG: Duration = Duration::from_secs(3600);

    open(3);
    let server = become_server();
    let kick = kick_after(server, Duration::ZERO);
    assert_eq!(wait(server, 0, LONG), 0);
    kick.join().unwrap();
    let worker = spawn_worker(server.tid(), |_| ());
    wait_until("it registers", || server.runnable_ptr.load(SeqCst) != 0);
    assert_only(worker.task, &server.take(List::Runnable));
    assert_eq!(wait(server, worker.task.tid(), LONG), 0, "the worker ends");
    assert_state(worker.task, NONE);
    worker.thread.join().unwrap();
    retire(server);
}

fn old_timer() {
    let mut is_proof = false;
    open(2);
    let server = become_server();
    for later in [Duration::ZERO, 10 * SHORT] {
        let kick = kick_after(server, Duration::ZERO);
        let first = wait(server, 0, SHORT);
        kick.join().unwrap();
        if first == 0 {
            is_proof = true; // the first timer was still to come
        }
        if later.is_zero() {
            KICKED.store(false, SeqCst);
            let kick = kick_after(server, 5 * SHORT);
            assert_eq!(wait(server, 0, later), 0);
            assert!(KICKED.load(SeqCst), "the old timer ended a wait that has none");
            kick.join().unwrap();
        } else {
            times_out(server, 0, later);
        }
    }
    assert!(is_proof, "no timer was left over; is this machine that slow?");
    // A timer that outlives the wait by the shortest of times.
    for _ in 0..scaled(300) {
        wait(server, 0, Duration::from_micros(50));
        times_out(server, 0, Duration::from_millis(1));
    }
    retire(server);
}

fn both() {
    static ENDED: AtomicBool = AtomicBool::new(false);

    open(1);
    let server = become_server();
    let kicker = spawn(|| {
        let mut us = 0;
        while !ENDED.load(SeqCst) {
            us = (us + 37) % 200;
            sleep(Duration::from_micros(us));
            assert_eq!(api::kick(server.tid(), 0), 0);
        }
    });
    let (mut events, mut timeouts) = (0, 0);
    for _ in 0..scaled(2000) {
        match wait(server, 0, Duration::from_micros(200)) {
            0 => events += 1,
            answer => {
                assert_eq!(answer, -libc::ETIMEDOUT);
                timeouts += 1;
            }
        }
    }
    println!("{events} events, {timeouts} timeouts");
    ENDED.store(true, SeqCst);
    kicker.join().unwrap();
    retire(server);
}

fn of_worker() {
    open(2);
    let server = become_server();
    let worker = spawn_worker(server.tid(), |task| {
        for timeout_ns in [1, u64::MAX] {
            for flags in [0, UMCG_WAIT_ENQUEUE] {
                task.status.store(RUNNABLE, SeqCst);
                assert_eq!(api::wait(timeout_ns, flags), -libc::ERANGE);
                assert_state(task, RUNNING);
            }
        }
    });
    server.await_runnable(worker.task);
    server.run(worker.task);
    assert_state(worker.task, NONE);
    assert!(server.take(List::Runnable).is_empty());
    worker.thread.join().unwrap();
    retire(server);
}

fn huge() {
    open(1);
    let server = become_server();
    for timeout_ns in [u64::MAX, u64::MAX - 1, 1 << 63, (1 << 63) - 1, 1 << 62] {
        KICKED.store(false, SeqCst);
        let kick = kick_after(server, SHORT);
        server.next_tid.store(0, SeqCst);
        server.status.store(RUNNABLE, SeqCst);
        assert_eq!(api::wait(timeout_ns, 0), 0, "{timeout_ns} ns");
        assert!(KICKED.load(SeqCst), "{timeout_ns} ns went by");
        kick.join().unwrap();
    }
    times_out(server, 0, SHORT); // and a huge one does not keep the next from firing
    retire(server);
}

// SPDX-License-Identifier: GPL-2.0-only
//! `umcg_wait` runs exactly the task that it names, or fails and changes nothing; `umcg_kick` ends a wait.
//!
//! The failures this guards against: a worker that is run twice, or by a server that was told no; a wait that nobody
//! ends, because the event came between the mark and the call; an error that has half happened.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::sync::mpsc;

use crate::api::{self, BLOCKED, NONE, RUNNABLE, RUNNING};
use crate::cast::{
    List, Task, Worker, become_server, nap, nr_cpus, open, retire, spawn_server, spawn_worker, spin_until,
    wait_until,
};
use crate::harness::{Counters, Test};

pub const TESTS: &[Test] = &[
    Test::new("waiting_in_state_running_returns_at_once", running),
    Test::new("a_worker_that_waits_gives_its_host_back", to_host),
    Test::new("a_worker_that_waits_may_ask_to_be_queued", enqueue),
    Test::new("a_worker_switches_to_another_of_its_host", direct),
    Test::new("a_server_switches_to_a_waiting_server", to_server),
    Test::new("a_server_that_names_itself_idles", own_tid),
    Test::new("an_event_after_the_mark_makes_the_wait_return", event_after_mark),
    Test::new("the_programs_own_status_bits_survive_a_switch", own_bits),
    Test::new("a_wait_of_a_server_that_fails_changes_nothing", server_errors),
    Test::new("a_blocked_worker_that_is_called_runnable_cannot_be_run", scribbled),
    Test::new("a_wait_of_a_worker_that_fails_changes_nothing", worker_errors),
    Test::new("of_several_errors_a_server_is_told_one_that_applies", server_combinations),
    Test::new("of_several_errors_a_worker_is_told_one_that_applies", worker_combinations),
    Test::new("a_thread_that_is_no_task_cannot_wait", unregistered),
    Test::new("of_two_servers_one_gets_the_worker", two_servers).limit_s(300),
    Test::new("a_worker_that_marked_itself_can_be_picked", marked),
    Test::new("kick_ends_the_wait_of_a_server", kick_server),
    Test::new("a_kicked_server_waits_for_no_sweep", kick_without_sweep),
    Test::new("kick_queues_a_waiting_worker", kick_worker),
    Test::new("kick_leaves_others_alone", kick_others),
];

/// No thread has it: above the kernel's PID_MAX_LIMIT.
const NO_TID: u32 = 1 << 30;

/// All that the kernel side may write, for "nothing changed".
#[derive(Debug, PartialEq)]
struct Words {
    status: u32,
    tids: [u32; 3],
    others: [u64; 6],
}

impl Words {
    fn of(task: &Task) -> Self {
        Self {
            status: task.status.load(SeqCst),
            tids: [&task.server_tid, &task.next_tid, &task.tid].map(|word| word.load(SeqCst)),
            others: [
                &task.blocked_ptr,
                &task.runnable_ptr,
                &task.blocked_ts,
                &task.runnable_ts,
                &task.user_data,
                &task.reserved,
            ]
            .map(|word| word.load(SeqCst)),
        }
    }
}

/// Waits with `status` and `next`: it must fail with `errno`, show RUNNING, and change nothing of the `cast`.
fn fails(me: &Task, status: u32, next: u32, flags: u32, errno: i32, cast: &[&Task]) {
    Wrong { next, status, flags, timeout_ns: 0 }.assert_fails(me, &[errno], cast);
}

/// What a wait is called with.
#[derive(Debug)]
struct Wrong {
    next: u32,
    status: u32,
    flags: u32,
    timeout_ns: u64,
}

impl Wrong {
    fn assert_fails(&self, me: &Task, errors: &[i32], cast: &[&Task]) {
        me.next_tid.store(self.next, SeqCst);
        me.status.store(self.status, SeqCst);
        let others = || cast.iter().map(|task| Words::of(task)).collect::<Vec<_>>();
        let before = (Words { status: RUNNING, ..Words::of(me) }, others());
        let answer = api::wait(self.timeout_ns, self.flags);
        let me = (Words::of(me), others());
        assert!(errors.contains(&-answer), "{answer}, and not one of {errors:?}, with {self:?}");
        assert_eq!(me, before, "a wait that failed changed something, with {self:?}");
    }
}

/// All combinations of what is wrong, or not, with flags, status and next, and with more than that if so told: each with
/// the errors that apply. Fewer than two are other tests' business.
fn combinations(nexts: &[(u32, Option<i32>)], timeouts: &[(u64, Option<i32>)]) -> Vec<(Wrong, Vec<i32>)> {
    const FLAGS: [(u32, Option<i32>); 3] =
        [(0, None), (2, Some(libc::EINVAL)), (1 << 31 | 1, Some(libc::EINVAL))];
    const STATES: [(u32, Option<i32>); 3] =
        [(RUNNABLE, None), (BLOCKED, Some(libc::EINVAL)), (NONE, Some(libc::EINVAL))];

    let mut all = Vec::new();
    for &(next, of_next) in nexts {
        for &(timeout_ns, of_timeout) in timeouts {
            for (flags, of_flags) in FLAGS {
                for (status, of_status) in STATES {
                    let errors: Vec<_> =
                        [of_next, of_timeout, of_flags, of_status].into_iter().flatten().collect();
                    all.push((Wrong { next, status, flags, timeout_ns }, errors));
                }
            }
        }
    }
    all.retain(|(_, errors)| errors.len() > 1);
    assert!(all.len() > 20);
    all
}

fn lists_are_empty(server: &Task) -> bool {
    server.take(List::Blocked).is_empty() && server.take(List::Runnable).is_empty()
}

fn running() {
    open(2);
    let server = become_server();
    server.next_tid.store(NO_TID, SeqCst);
    assert_eq!(api::wait(0, 0), 0);
    assert_eq!(server.next_tid.load(SeqCst), NO_TID);

    let worker = spawn_worker(server.tid(), |task| {
        task.next_tid.store(NO_TID, SeqCst);
        assert_eq!(api::wait(0, 0), 0);
        assert_eq!((task.state(), task.next_tid.load(SeqCst)), (RUNNING, NO_TID));
    });
    server.await_runnable(worker.task);
    server.run(worker.task);
    assert_eq!(worker.task.state(), NONE, "the worker stopped in its wait");
    worker.thread.join().unwrap();
    retire(server);
}

fn to_host() {
    static ROUNDS: AtomicU32 = AtomicU32::new(0);

    open(2);
    let server = become_server();
    let host = server.tid();
    let worker = spawn_worker(host, move |task| {
        for round in 1..=20 {
            ROUNDS.store(round, SeqCst);
            // Its host's tid and 0 mean the same.
            assert_eq!(task.switch_to([0, host][round as usize % 2]), 0);
            assert_eq!((task.state(), task.next_tid.load(SeqCst)), (RUNNING, 0));
        }
    });
    server.await_runnable(worker.task);
    for round in 1..=20 {
        server.run(worker.task);
        assert_eq!(ROUNDS.load(SeqCst), round);
        assert_eq!((server.state(), worker.task.state()), (RUNNING, RUNNABLE));
        assert!(lists_are_empty(server), "a worker that waits is on no list");
    }
    server.run(worker.task);
    worker.thread.join().unwrap();
    retire(server);
}

fn enqueue() {
    open(2);
    let server = become_server();
    let worker = spawn_worker(server.tid(), |task| {
        for _ in 0..20 {
            task.status.store(RUNNABLE, SeqCst);
            assert_eq!(api::wait(0, umcg::raw::UMCG_WAIT_ENQUEUE), 0);
        }
    });
    for _ in 0..20 {
        server.await_runnable(worker.task);
        server.run(worker.task);
    }
    server.await_runnable(worker.task);
    server.run(worker.task);
    worker.thread.join().unwrap();
    retire(server);
}

fn direct() {
    open(3);
    let server = become_server();
    let host = server.tid();
    let second = spawn_worker(host, move |task| {
        for _ in 0..20 {
            assert_eq!(server.state(), RUNNABLE, "the host runs beside its worker");
            assert_eq!(task.switch_to(0), 0);
        }
    });
    server.await_runnable(second.task);
    let second_task = second.task;
    let first = spawn_worker(host, move |task| {
        for _ in 0..20 {
            assert_eq!(task.switch_to(second_task.tid()), 0);
            assert_eq!(task.next_tid.load(SeqCst), 0, "not run");
        }
    });
    server.await_runnable(first.task);
    for _ in 0..20 {
        server.run(first.task);
        let states = [first.task.state(), second.task.state()];
        assert_eq!(states, [RUNNABLE, RUNNABLE], "the host came back before the second had its turn");
        assert!(lists_are_empty(server));
    }
    for worker in [first, second] {
        server.run(worker.task);
        worker.thread.join().unwrap();
    }
    retire(server);
}

fn to_server() {
    open(2);
    let me = become_server();
    let my_tid = me.tid();
    let other = spawn_server(move |task| {
        assert_eq!(task.switch_to(0), 0);
        for _ in 0..20 {
            assert_eq!(task.switch_to(my_tid), 0);
            assert_eq!(task.next_tid.load(SeqCst), 0);
        }
    });
    wait_until("the other server waits", || other.task.state() == RUNNABLE);
    for _ in 0..20 {
        run_server(me, other.task);
        assert_eq!(me.state(), RUNNING);
    }
    wait_until("the other server waits again", || other.task.state() == RUNNABLE);
    assert_eq!(api::kick(other.task.tid(), 0), 0);
    other.thread.join().unwrap();
    retire(me);
}

/// Switches to a server that has marked itself and is about to wait, or waits.
fn run_server(me: &Task, other: &Task) {
    wait_until("the other server waits", || other.state() == RUNNABLE);
    assert_eq!(me.switch_to(other.tid()), 0);
    assert_eq!(me.next_tid.load(SeqCst), 0);
}

fn own_tid() {
    static ENDED: AtomicBool = AtomicBool::new(false);

    open(1);
    let server = spawn_server(|task| {
        assert_eq!(task.switch_to(task.tid()), 0);
        assert_eq!(task.state(), RUNNING);
        ENDED.store(true, SeqCst);
    });
    wait_until("the server waits", || server.task.state() == RUNNABLE);
    std::thread::sleep(std::time::Duration::from_millis(100));
    assert!(!ENDED.load(SeqCst), "the wait ended without an event");
    assert_eq!(server.task.state(), RUNNABLE);
    assert_eq!(api::kick(server.task.tid(), 0), 0);
    server.thread.join().unwrap();
}

fn event_after_mark() {
    open(3);
    let server = become_server();
    let host = server.tid();
    let worker = spawn_worker(host, |_| {});
    server.await_runnable(worker.task);

    server.next_tid.store(worker.task.tid(), SeqCst);
    server.status.store(RUNNABLE, SeqCst);
    let late = spawn_worker(host, |_| {});
    wait_until("the event makes the server RUNNING", || server.state() == RUNNING);
    assert_eq!(api::wait(0, 0), 0);
    assert_eq!(server.next_tid.load(SeqCst), worker.task.tid(), "not run, and not said so");
    assert_eq!(worker.task.state(), RUNNABLE);

    server.await_runnable(late.task);
    for worker in [worker, late] {
        server.run(worker.task);
        worker.thread.join().unwrap();
    }
    retire(server);
}

fn own_bits() {
    const SERVER: u32 = 0xbeef_0000;
    const WORKER: u32 = 0xcafe_0000;

    fn switch(task: &Task, next: u32, bits: u32) {
        task.next_tid.store(next, SeqCst);
        task.status.store(bits | RUNNABLE, SeqCst);
        assert_eq!(api::wait(0, 0), 0);
        assert_eq!(task.status.load(SeqCst), bits | RUNNING);
    }
    open(2);
    let server = become_server();
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    let worker = spawn_worker(server.tid(), move |task| {
        switch(task, 0, WORKER);
        theirs.read_exact(&mut [0]).unwrap();
        assert_eq!(task.status.load(SeqCst), WORKER | RUNNING);
    });
    server.await_runnable(worker.task);
    switch(server, worker.task.tid(), SERVER);
    assert_eq!(worker.task.status.load(SeqCst) >> 16, WORKER >> 16);
    switch(server, worker.task.tid(), SERVER);
    assert_eq!(worker.task.status.load(SeqCst), WORKER | BLOCKED);
    ours.write_all(&[0]).unwrap();
    server.await_runnable(worker.task);
    assert_eq!(worker.task.status.load(SeqCst), WORKER | RUNNABLE);
    switch(server, worker.task.tid(), SERVER);
    worker.thread.join().unwrap();
    retire(server);
}

/// Another server, which serves `busy` until `quit`; `idle` is its, too, and waits for its first run.
struct OtherServer {
    server: Worker,
    busy: &'static Task,
    idle: &'static Task,
    quit: &'static AtomicBool,
}

impl OtherServer {
    fn start() -> Self {
        let quit: &AtomicBool = Box::leak(Box::new(AtomicBool::new(false)));
        let (sender, receiver) = mpsc::channel();
        let server = spawn_server(move |task| {
            let busy = spawn_worker(task.tid(), |_| spin_until("quit", || quit.load(SeqCst)));
            task.await_runnable(busy.task);
            let idle = spawn_worker(task.tid(), |_| {});
            task.await_runnable(idle.task);
            sender.send([busy.task, idle.task]).unwrap();
            for worker in [busy, idle] {
                task.run(worker.task);
                worker.thread.join().unwrap();
            }
        });
        let [busy, idle] = receiver.recv().unwrap();
        wait_until("the other server serves", || (server.task.state(), busy.state()) == (RUNNABLE, RUNNING));
        Self { server, busy, idle, quit }
    }

    fn end(self) {
        self.quit.store(true, SeqCst);
        self.server.thread.join().unwrap();
    }
}

/// Runs `worker` until it is BLOCKED.
fn run_into_block(server: &Task, worker: &Task) {
    server.run(worker);
    assert_eq!(server.take(List::Blocked).len(), 1);
    assert_eq!(worker.state(), BLOCKED);
}

fn server_errors() {
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    open(8);
    let me = become_server();
    let sleeper = spawn_worker(me.tid(), move |_| theirs.read_exact(&mut [0]).unwrap());
    me.await_runnable(sleeper.task);
    run_into_block(me, sleeper.task);
    let other = OtherServer::start();
    let cast = [sleeper.task, other.server.task, other.busy, other.idle];

    let (tid, my_tid) = (Task::tid, me.tid());
    fails(me, RUNNABLE, NO_TID, 0, libc::ESRCH, &cast);
    fails(me, RUNNABLE, 1, 0, libc::ESRCH, &cast);
    fails(me, RUNNABLE, tid(sleeper.task), 0, libc::EBUSY, &cast);
    fails(me, RUNNABLE, tid(other.server.task), 0, libc::EBUSY, &cast);
    fails(me, RUNNABLE, tid(other.idle), 0, libc::EINVAL, &cast);
    other.busy.server_tid.store(my_tid, SeqCst);
    fails(me, RUNNABLE, tid(other.busy), 0, libc::EBUSY, &cast);
    other.busy.server_tid.store(tid(other.server.task), SeqCst);
    fails(me, RUNNABLE, tid(sleeper.task), 2, libc::EINVAL, &cast);
    fails(me, BLOCKED, tid(sleeper.task), 0, libc::EINVAL, &cast);
    fails(me, NONE, tid(sleeper.task), 0, libc::EINVAL, &cast);

    let awake = spawn_server(|task| spin_until("quit", || task.user_data.load(SeqCst) == 1));
    fails(me, RUNNABLE, tid(awake.task), 0, libc::EBUSY, &[awake.task]);
    awake.task.user_data.store(1, SeqCst);
    awake.thread.join().unwrap();

    other.end();
    ours.write_all(&[0]).unwrap();
    me.await_runnable(sleeper.task);
    me.run(sleeper.task);
    sleeper.thread.join().unwrap();
    retire(me);
}

/// The status word is the program's to write; what the worker does is not in it.
fn scribbled() {
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    open(2);
    let me = become_server();
    let sleeper = spawn_worker(me.tid(), move |_| theirs.read_exact(&mut [0]).unwrap());
    me.await_runnable(sleeper.task);
    run_into_block(me, sleeper.task);
    sleeper.task.status.store(RUNNABLE, SeqCst);
    me.next_tid.store(sleeper.task.tid(), SeqCst);
    me.status.store(RUNNABLE, SeqCst);
    assert_eq!(api::wait(0, 0), -libc::EBUSY);
    ours.write_all(&[0]).unwrap();
    me.await_runnable(sleeper.task);
    me.run(sleeper.task);
    sleeper.thread.join().unwrap();
    retire(me);
}

fn worker_errors() {
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    open(8);
    let me = become_server();
    let sleeper = spawn_worker(me.tid(), move |_| theirs.read_exact(&mut [0]).unwrap());
    me.await_runnable(sleeper.task);
    run_into_block(me, sleeper.task);
    let other = OtherServer::start();
    let cast = [me, sleeper.task, other.server.task, other.busy, other.idle];

    let my_tid = me.tid();
    let idle_tid = other.idle.tid();
    let worker = spawn_worker(my_tid, move |task| {
        fails(task, RUNNABLE, NO_TID, 0, libc::ESRCH, &cast);
        fails(task, RUNNABLE, task.tid(), 0, libc::EINVAL, &cast);
        fails(task, RUNNABLE, idle_tid, 0, libc::EINVAL, &cast);
        fails(task, RUNNABLE, cast[1].tid(), 0, libc::EBUSY, &cast);
        fails(task, RUNNABLE, 0, 2, libc::EINVAL, &cast);
        fails(task, BLOCKED, 0, 0, libc::EINVAL, &cast);
        fails(task, NONE, 0, 0, libc::EINVAL, &cast);
        task.server_tid.store(NO_TID, SeqCst);
        fails(task, RUNNABLE, 0, umcg::raw::UMCG_WAIT_ENQUEUE, libc::ESRCH, &cast);
        task.server_tid.store(my_tid, SeqCst);
        task.status.store(RUNNABLE, SeqCst);
        assert_eq!(api::wait(1, 0), -libc::ERANGE);
        assert_eq!(task.state(), RUNNING);
    });
    me.await_runnable(worker.task);
    me.run(worker.task);
    assert_eq!(worker.task.state(), NONE);
    worker.thread.join().unwrap();

    other.end();
    ours.write_all(&[0]).unwrap();
    me.await_runnable(sleeper.task);
    me.run(sleeper.task);
    sleeper.thread.join().unwrap();
    retire(me);
}

/// A worker that is BLOCKED, and another server, for all of whom it is an error to be named.
fn with_the_wrong_ones(test: impl FnOnce(&'static Task, &'static Task, [&'static Task; 4])) {
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    open(8);
    let me = become_server();
    let sleeper = spawn_worker(me.tid(), move |_| theirs.read_exact(&mut [0]).unwrap());
    me.await_runnable(sleeper.task);
    run_into_block(me, sleeper.task);
    let other = OtherServer::start();
    test(me, sleeper.task, [sleeper.task, other.server.task, other.busy, other.idle]);
    assert!(lists_are_empty(me));
    other.end();
    ours.write_all(&[0]).unwrap();
    me.await_runnable(sleeper.task);
    me.run(sleeper.task);
    sleeper.thread.join().unwrap();
    retire(me);
}

fn server_combinations() {
    with_the_wrong_ones(|me, sleeper, cast| {
        let [_, other, busy, idle] = cast.map(Task::tid);
        let nexts = [
            (0, None),
            (NO_TID, Some(libc::ESRCH)),
            (sleeper.tid(), Some(libc::EBUSY)),
            (other, Some(libc::EBUSY)),
            (idle, Some(libc::EINVAL)),
        ];
        let mut all = combinations(&nexts, &[(0, None), (1, None)]);
        // Neither RUNNABLE nor the caller's.
        for timeout_ns in [0, 1] {
            let wrong = Wrong { next: busy, status: RUNNABLE, flags: 0, timeout_ns };
            all.push((wrong, vec![libc::EBUSY, libc::EINVAL]));
        }
        for (wrong, errors) in all {
            wrong.assert_fails(me, &errors, &cast);
        }
    });
}

fn worker_combinations() {
    with_the_wrong_ones(|me, sleeper, [_, other, busy, idle]| {
        let host = me.tid();
        let worker = spawn_worker(host, move |task| {
            let cast = [me, sleeper, other, busy, idle];
            let nexts = [
                (0, None),
                (host, None),
                (NO_TID, Some(libc::ESRCH)),
                (task.tid(), Some(libc::EINVAL)),
                (sleeper.tid(), Some(libc::EBUSY)),
                (idle.tid(), Some(libc::EINVAL)),
            ];
            for (wrong, errors) in combinations(&nexts, &[(0, None), (1, Some(libc::ERANGE))]) {
                wrong.assert_fails(task, &errors, &cast);
            }
            // Its server is gone, too.
            task.server_tid.store(NO_TID, SeqCst);
            for (next, of_next) in nexts {
                let wrong =
                    Wrong { next, status: RUNNABLE, flags: umcg::raw::UMCG_WAIT_ENQUEUE, timeout_ns: 0 };
                let errors: Vec<_> = of_next.into_iter().chain([libc::ESRCH]).collect();
                wrong.assert_fails(task, &errors, &cast);
            }
            task.server_tid.store(host, SeqCst);
        });
        me.await_runnable(worker.task);
        me.run(worker.task);
        assert_eq!(worker.task.state(), NONE);
        worker.thread.join().unwrap();
    });
}

fn unregistered() {
    assert_eq!(api::wait(0, 0), -libc::EINVAL, "before umcg_open");
    assert_eq!(api::kick(1, 0), -libc::ESRCH, "before umcg_open");
    open(1);
    assert_eq!(api::wait(0, 0), -libc::EINVAL);
    let server = become_server();
    retire(server);
    assert_eq!(api::wait(0, 0), -libc::EINVAL, "after umcg_unregister");
}

/// Two servers that meet at each round, spinning, so that both start at the same time.
struct Meeting {
    arrived: AtomicU32,
    /// The round that somebody has lost.
    lost: AtomicU32,
    runs: AtomicU32,
    /// Losers who were told EBUSY.
    busy: AtomicU32,
}

static MEETING: Meeting = Meeting {
    arrived: AtomicU32::new(0),
    lost: AtomicU32::new(0),
    runs: AtomicU32::new(0),
    busy: AtomicU32::new(0),
};

impl Meeting {
    fn meet(&self, round: u32) {
        self.arrived.fetch_add(1, SeqCst);
        spin_until("the other server comes", || self.arrived.load(SeqCst) >= 2 * round);
    }

    /// One attempt at the worker, in the `round`th round; whether it was run.
    fn try_to_run(&self, me: &Task, worker: &Task, round: u32) -> bool {
        self.meet(round);
        worker.server_tid.store(me.tid(), SeqCst);
        match (me.switch_to(worker.tid()), me.next_tid.load(SeqCst)) {
            (0, 0) => true,
            // EINVAL: the other has written its own tid last.
            (error, next) if [-libc::EBUSY, -libc::EINVAL].contains(&error) => {
                assert_eq!((next, me.state()), (worker.tid(), RUNNING));
                self.busy.fetch_add(u32::from(error == -libc::EBUSY), SeqCst);
                self.lost.store(round, SeqCst);
                false
            }
            other => panic!("wait and umcg_next_tid: {other:?}"),
        }
    }
}

/// Of two threads that wait for each other in user code: on one CPU a round takes them a slice each.
fn rounds_of_two() -> u32 {
    if nr_cpus() == 1 { 200 } else { 2000 }
}

fn two_servers() {
    open(3);
    let rounds = rounds_of_two();
    let me = become_server();
    // Runs until the round has a loser: so there can only be one winner.
    let worker = spawn_worker(me.tid(), move |task| {
        for round in 1..=rounds {
            MEETING.runs.fetch_add(1, SeqCst);
            spin_until("the other server lost", || MEETING.lost.load(SeqCst) == round);
            assert_eq!(task.switch_to(0), 0);
        }
    });
    me.await_runnable(worker.task);
    let worker_task = worker.task;
    let other = spawn_server(move |task| {
        let won = (1..=rounds).filter(|&round| MEETING.try_to_run(task, worker_task, round));
        task.user_data.store(won.count() as u64, SeqCst);
    });
    let mut won = 0;
    for round in 1..=rounds {
        won += u32::from(MEETING.try_to_run(me, worker.task, round));
    }
    wait_until("the other server is done", || other.task.state() == NONE);
    let others = other.task.user_data.load(SeqCst) as u32;
    let busy = MEETING.busy.load(SeqCst);
    println!("won {won} rounds, the other server {others}, on {} CPUs; {busy} times EBUSY", nr_cpus());
    assert!(busy > 0, "no loser was told EBUSY");
    assert_eq!((won + others, MEETING.runs.load(SeqCst)), (rounds, rounds));

    worker.task.server_tid.store(me.tid(), SeqCst);
    me.run(worker.task);
    worker.thread.join().unwrap();
    other.thread.join().unwrap();
    retire(me);
}

fn marked() {
    static PICKED: AtomicBool = AtomicBool::new(false);
    static MARKED: AtomicBool = AtomicBool::new(false);

    open(3);
    let me = become_server();
    let worker = spawn_worker(me.tid(), |task| {
        task.status.store(RUNNABLE, SeqCst);
        MARKED.store(true, SeqCst);
        spin_until("somebody picks it", || task.state() == RUNNING);
        PICKED.store(true, SeqCst);
        assert_eq!(api::wait(0, 0), 0, "it is RUNNING already");
        assert_eq!(task.switch_to(0), 0);
    });
    me.await_runnable(worker.task);
    let worker_task = worker.task;
    let other = spawn_server(move |task| {
        wait_until("the worker marks itself", || MARKED.load(SeqCst));
        worker_task.server_tid.store(task.tid(), SeqCst);
        task.run(worker_task);
        assert!(PICKED.load(SeqCst), "its new host does not serve it");
        assert_eq!(worker_task.state(), RUNNABLE);
        assert!(lists_are_empty(task));
        task.run(worker_task);
        assert_eq!(worker_task.state(), NONE);
    });
    me.run(worker.task); // until the other server takes it away
    assert_eq!(me.state(), RUNNING);
    assert!(lists_are_empty(me));
    other.thread.join().unwrap();
    worker.thread.join().unwrap();
    retire(me);
}

fn kick_server() {
    static ROUND: AtomicU32 = AtomicU32::new(0);

    open(1);
    let rounds = rounds_of_two();
    let server = spawn_server(move |task| {
        for round in 1..=rounds {
            task.status.store(RUNNABLE, SeqCst);
            ROUND.store(round, SeqCst);
            assert_eq!(api::wait(0, 0), 0);
            assert_eq!(task.state(), RUNNING);
        }
    });
    // One kick for each mark: it comes before, in the middle of, or after the call, and must do in all three.
    let tid = server.task.tid();
    for round in 1..=rounds {
        spin_until("the server's next round", || ROUND.load(SeqCst) == round);
        assert_eq!(api::kick(tid, 0), 0);
    }
    server.thread.join().unwrap();
    assert_eq!(api::kick(tid, 0), -libc::ESRCH);
    assert_eq!(api::kick(NO_TID, 0), -libc::ESRCH);
    assert_eq!(api::kick(tid, 1), -libc::EINVAL);
}

/// Whoever is released gets a CPU at once; the sweep would find it after 60 ms, and no other test could tell.
fn kick_without_sweep() {
    const ROUNDS: u32 = 20;
    static ROUND: AtomicU32 = AtomicU32::new(0);

    open(1);
    let server = spawn_server(|task| {
        for round in 1..=ROUNDS {
            assert_eq!(task.switch_to(0), 0);
            ROUND.store(round, SeqCst);
        }
    });
    let counters = Counters::now();
    for round in 1..=ROUNDS {
        wait_until("the server waits", || server.task.state() == RUNNABLE);
        nap(); // it is held by now
        assert_eq!(api::kick(server.task.tid(), 0), 0);
        wait_until("the server goes on", || ROUND.load(SeqCst) == round);
    }
    server.thread.join().unwrap();
    let rescues = counters.added("rescues");
    println!("{rescues} rescues in {ROUNDS} kicks");
    assert!(rescues < u64::from(ROUNDS) / 2, "it was the sweep that ran them");
}

fn kick_worker() {
    open(2);
    let server = become_server();
    let worker = spawn_worker(server.tid(), |task| {
        assert_eq!(task.switch_to(0), 0);
    });
    server.await_runnable(worker.task);
    server.run(worker.task);
    assert!(lists_are_empty(server));
    let tid = worker.task.tid();
    let kicker = std::thread::spawn(move || {
        wait_until("the server waits", || server.state() == RUNNABLE);
        assert_eq!(api::kick(tid, 0), 0);
    });
    server.await_runnable(worker.task);
    assert_eq!(worker.task.state(), RUNNABLE);
    kicker.join().unwrap();
    server.run(worker.task);
    worker.thread.join().unwrap();
    retire(server);
}

fn kick_others() {
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    open(8);
    let me = become_server();
    let sleeper = spawn_worker(me.tid(), move |_| theirs.read_exact(&mut [0]).unwrap());
    me.await_runnable(sleeper.task);
    run_into_block(me, sleeper.task);
    let other = OtherServer::start();
    // RUNNING without the flag, BLOCKED, serving, and the caller.
    let cast = [other.busy, sleeper.task, other.server.task, me];
    let words = || cast.iter().map(|task| Words::of(task)).collect::<Vec<_>>();
    let before = words();
    for task in cast {
        assert_eq!(api::kick(task.tid(), 0), 0);
        assert_eq!(words(), before, "a kick changed something");
    }
    other.end();
    ours.write_all(&[0]).unwrap();
    me.await_runnable(sleeper.task);
    me.run(sleeper.task);
    sleeper.thread.join().unwrap();
    retire(me);
}

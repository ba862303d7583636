// SPDX-License-Identifier: GPL-2.0-only
//! A task that is RUNNABLE for all to see sleeps in the kernel, and is picked there: a worker is BLOCKED at once, and
//! a server is nobody's business.
//!
//! The failures this guards against: a server serves a worker that sleeps, and nobody runs; the block is reported to
//! nobody, or twice; user code runs after the sleep without having been run.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use nix::unistd::Pid;

use crate::api::{self, BLOCKED, RUNNABLE, RUNNING};
use crate::cast::{
    List, Task, Worker, become_server, in_child, open, retire, spawn, spawn_server, spawn_worker, wait_until,
};
use crate::harness::Test;
use crate::scene::{
    assert_only, assert_state, assert_was_captured, lists_are_empty, run_to_end, stand_still,
};
use crate::stopping::{await_ptrace_stop, ptrace, state};

pub const TESTS: &[Test] = &[
    Test::new("a_worker_picked_in_its_sleep_is_blocked", by_another_server),
    Test::new("a_worker_picked_in_its_sleep_by_its_own_host_is_blocked", by_its_host),
    Test::new("a_worker_picked_in_its_sleep_by_another_worker_is_blocked", by_a_worker),
    Test::new("a_held_worker_picked_while_a_debugger_stops_it_is_blocked", while_traced),
    Test::new("a_server_picked_in_its_sleep_is_running", server),
];

/// Those who have gone on after their sleep.
static AWAKE: AtomicU32 = AtomicU32::new(0);

/// Longer than any test lasts: for waits that end by an event, and otherwise with an error rather than never.
const LONG: Duration = Duration::from_secs(30);

fn thread_of(task: &Task) -> Pid {
    Pid::from_raw(task.tid().cast_signed())
}

fn thread_state(task: &Task) -> char {
    state(thread_of(task))
}

fn await_marked_and_asleep(task: &Task) {
    wait_until("it marks itself, and sleeps", || task.state() == RUNNABLE && thread_state(task) == 'S');
}

/// A worker that marks itself RUNNABLE and then sleeps until something is written.
fn spawn_sleeper(server: &Task) -> (Worker, UnixStream) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let sleeper = spawn_worker(server.tid(), move |task| {
        task.status.store(RUNNABLE, SeqCst);
        theirs.read_exact(&mut [0]).unwrap();
        assert_state(task, RUNNING);
        AWAKE.fetch_add(1, SeqCst);
        assert_eq!(api::wait(0, 0), 0, "it is RUNNING already");
    });
    server.await_runnable(sleeper.task);
    (sleeper, ours)
}

/// Waits until `next` has been run; for what must not take for ever.
fn run_in_time(me: &Task, next: &Task) {
    me.next_tid.store(next.tid(), SeqCst);
    me.status.store(RUNNABLE, SeqCst);
    assert_eq!(api::wait(LONG.as_nanos() as u64, 0), 0);
    assert_eq!((me.state(), me.next_tid.load(SeqCst)), (RUNNING, 0));
}

/// It is BLOCKED, as any other is, and comes back as any other does.
fn assert_blocked_until(server: &Task, sleeper: &Task, wake: impl FnOnce()) {
    assert_only(sleeper, &server.take(List::Blocked));
    assert_state(sleeper, BLOCKED);
    assert!(server.take(List::Runnable).is_empty(), "RUNNABLE before its sleep ended");
    wake();
    server.await_runnable(sleeper);
    assert_was_captured(sleeper);
    assert!(stand_still());
    assert_eq!(AWAKE.load(SeqCst), 0, "user code ran before the worker was run again");
    assert!(lists_are_empty(server), "one block was reported twice");
}

fn by_another_server() {
    open(3);
    let me = become_server();
    let (sleeper, mut ours) = spawn_sleeper(me);
    let task = sleeper.task;
    let other = spawn_server(move |other| {
        await_marked_and_asleep(task);
        task.server_tid.store(other.tid(), SeqCst);
        run_in_time(other, task);
        assert_blocked_until(other, task, || ours.write_all(&[0]).unwrap());
        run_to_end(other, sleeper);
        assert_eq!(AWAKE.load(SeqCst), 1);
    });
    run_in_time(me, task); // until the other server takes it away
    assert!(lists_are_empty(me));
    other.thread.join().unwrap();
    retire(me);
}

/// It serves the worker while that sleeps, for nobody saw it block, until its own wait times out.
fn by_its_host() {
    open(2);
    let me = become_server();
    let (sleeper, mut ours) = spawn_sleeper(me);
    let task = sleeper.task;
    me.next_tid.store(task.tid(), SeqCst);
    loop {
        me.status.store(RUNNABLE, SeqCst);
        assert_eq!(api::wait(20_000_000, 0), -libc::ETIMEDOUT);
        if task.state() == RUNNABLE && thread_state(task) == 'S' {
            break;
        }
    }
    assert!(lists_are_empty(me), "only RUNNING becomes BLOCKED");
    run_in_time(me, task);
    assert_blocked_until(me, task, || ours.write_all(&[0]).unwrap());
    run_to_end(me, sleeper);
    assert_eq!(AWAKE.load(SeqCst), 1);
    retire(me);
}

fn by_a_worker() {
    open(4);
    let me = become_server();
    let (sleeper, mut ours) = spawn_sleeper(me);
    let task = sleeper.task;
    let other = spawn_server(move |other| {
        let colleague = spawn_worker(other.tid(), move |colleague| {
            task.server_tid.store(colleague.server_tid.load(SeqCst), SeqCst);
            assert_eq!(colleague.switch_to(task.tid()), 0);
            assert_eq!(colleague.next_tid.load(SeqCst), 0);
        });
        other.await_runnable(colleague.task);
        await_marked_and_asleep(task);
        run_in_time(other, colleague.task);
        assert_state(colleague.task, RUNNABLE);
        assert_blocked_until(other, task, || ours.write_all(&[0]).unwrap());
        for worker in [colleague, sleeper] {
            run_to_end(other, worker);
        }
        assert_eq!(AWAKE.load(SeqCst), 1);
    });
    run_in_time(me, task); // until it is taken away
    assert!(lists_are_empty(me));
    other.thread.join().unwrap();
    retire(me);
}

/// A process that stops threads of this one as a debugger does, each from one word of the test to the next.
struct Debugger {
    thread: std::thread::JoinHandle<()>,
    cue: UnixStream,
}

impl Debugger {
    fn start(tasks: &[&'static Task]) -> Self {
        let (mut cue, mut theirs) = UnixStream::pair().unwrap();
        let tids: Vec<_> = tasks.iter().map(|task| thread_of(task)).collect();
        let thread = spawn(move || {
            in_child(|| {
                theirs.write_all(&[0]).unwrap();
                for tid in tids {
                    theirs.read_exact(&mut [0]).unwrap();
                    ptrace(libc::PTRACE_SEIZE, tid);
                    ptrace(libc::PTRACE_INTERRUPT, tid);
                    await_ptrace_stop(tid);
                    theirs.read_exact(&mut [0]).unwrap();
                    ptrace(libc::PTRACE_DETACH, tid);
                }
            });
        });
        cue.read_exact(&mut [0]).unwrap();
        Self { thread, cue }
    }

    fn next(&mut self) {
        self.cue.write_all(&[0]).unwrap();
    }
}

/// The first is picked by its server, the second by another worker.
fn while_traced() {
    open(4);
    let me = become_server();
    let workers = [(); 2].map(|()| {
        let worker = spawn_worker(me.tid(), |task| {
            assert_eq!(task.switch_to(0), 0);
            AWAKE.fetch_add(1, SeqCst);
        });
        me.await_runnable(worker.task);
        me.run(worker.task);
        worker
    });
    let mut debugger = Debugger::start(&[workers[0].task, workers[1].task]);
    let [first, second] = workers;

    debugger.next();
    wait_until("the debugger has it", || thread_state(first.task) == 't');
    assert_state(first.task, RUNNABLE);
    run_in_time(me, first.task);
    assert_blocked_until(me, first.task, || debugger.next());

    debugger.next();
    wait_until("the debugger has it", || thread_state(second.task) == 't');
    let task = second.task;
    let colleague = spawn_worker(me.tid(), |colleague| assert_eq!(colleague.switch_to(task.tid()), 0));
    me.await_runnable(colleague.task);
    run_in_time(me, colleague.task);
    assert_state(colleague.task, RUNNABLE);
    assert_blocked_until(me, task, || debugger.next());
    for worker in [first, second, colleague] {
        run_to_end(me, worker);
    }
    assert_eq!(AWAKE.load(SeqCst), 2);
    debugger.thread.join().unwrap();
    retire(me);
}

/// Its sleep is seen by nobody, and its own wait returns at once afterwards.
fn server() {
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    open(2);
    let me = become_server();
    let sleeper = spawn_server(move |task| {
        task.status.store(RUNNABLE, SeqCst);
        theirs.read_exact(&mut [0]).unwrap();
        assert_state(task, RUNNING);
        assert_eq!(api::wait(0, 0), 0);
        assert!(lists_are_empty(task));
        AWAKE.fetch_add(1, SeqCst);
    });
    let task = sleeper.task;
    await_marked_and_asleep(task);
    let watcher = spawn(move || {
        wait_until("it is picked", || task.state() == RUNNING && me.next_tid.load(SeqCst) == 0);
        assert_state(me, RUNNABLE);
        assert_eq!((thread_state(task), task.blocked_ts.load(SeqCst)), ('S', 0));
        assert_eq!(AWAKE.load(SeqCst), 0);
        ours.write_all(&[0]).unwrap();
        wait_until("it goes on", || AWAKE.load(SeqCst) == 1);
        assert_eq!(api::kick(me.tid(), 0), 0);
    });
    run_in_time(me, task); // and waits itself, for the picked one serves nobody
    assert!(lists_are_empty(me));
    watcher.join().unwrap();
    sleeper.thread.join().unwrap();
    retire(me);
}

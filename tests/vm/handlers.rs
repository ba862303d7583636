// SPDX-License-Identifier: GPL-2.0-only
//! What a task's signal handler may call beside `umcg_wait`, wherever its signal finds the task.
//!
//! The failures this guards against: a handler ends the registration of a thread that is in the middle of a call; or it
//! waits for a call that it has interrupted itself.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU32};

use nix::sys::signal::SaFlags;
use umcg::raw;

use crate::api::{self, NONE, RUNNABLE, umcg_task};
use crate::cast::{
    List, Task, Worker, become_server, open, retire, spawn, spawn_server, spawn_worker, spin_until,
    wait_until,
};
use crate::harness::Test;
use crate::scene::{Other, STEPS, assert_only, assert_state, lists_are_empty};
use crate::signals::{HANDLED, await_handled, count, handle, held_workers, send};

pub const TESTS: &[Test] = &[
    Test::new("a_handler_of_a_waiting_server_may_call_all_but_unregister", servers),
    Test::new("a_handler_of_a_worker_may_unregister_but_inside_a_call", workers),
];

/// Whom the handler kicks.
static KICKED: AtomicU32 = AtomicU32::new(0);

/// What the handler was answered.
static SELF: AtomicPtr<umcg_task> = AtomicPtr::new(std::ptr::null_mut());
static IS_SCHEDULED: AtomicBool = AtomicBool::new(false);
static KICK: AtomicI32 = AtomicI32::new(1);
static REGISTER: AtomicI32 = AtomicI32::new(1);
static UNREGISTER: AtomicI32 = AtomicI32::new(1);

extern "C" fn call_all(signal: i32) {
    let me = api::current();
    SELF.store(me, SeqCst);
    IS_SCHEDULED.store(raw::backend() == c"sched_ext", SeqCst);
    KICK.store(api::kick(KICKED.load(SeqCst), 0), SeqCst);
    REGISTER.store(api::register(me, 0), SeqCst);
    UNREGISTER.store(api::unregister(me), SeqCst);
    count(signal);
}

fn assert_answers(task: &Task, unregister: i32) {
    assert_eq!(SELF.swap(std::ptr::null_mut(), SeqCst), task.as_ptr());
    assert!(IS_SCHEDULED.swap(false, SeqCst), "another back end");
    let answers = [&KICK, &REGISTER, &UNREGISTER].map(|answer| answer.swap(1, SeqCst));
    assert_eq!(answers, [0, -libc::EEXIST, unregister]);
}

fn servers() {
    static ENDED: AtomicBool = AtomicBool::new(false);

    handle(call_all, SaFlags::empty());
    open(4);
    let other = Other::start();
    let idle = spawn_server(|task| {
        assert_eq!(task.switch_to(0), 0);
        ENDED.store(true, SeqCst);
    });
    let (serving, stop) = spawn_serving();
    KICKED.store(other.tid(), SeqCst);
    let mut times = 0;
    for _ in 0..10 {
        for task in [idle.task, serving.task] {
            for waiting in [task, other.0.task] {
                wait_until("it waits", || waiting.state() == RUNNABLE);
            }
            times += 1;
            send(task);
            await_handled(times);
            assert_answers(task, -libc::EBUSY);
            wait_until("the kick is an event", || other.events() == u64::from(times));
            assert_state(task, RUNNABLE);
        }
    }
    assert!(!ENDED.load(SeqCst), "the interrupted wait ended");
    // Itself: that ends the wait of a server that serves nobody, once the handler returns.
    for (task, times) in [(serving.task, times + 1), (idle.task, times + 2)] {
        KICKED.store(task.tid(), SeqCst);
        send(task);
        await_handled(times);
        assert_answers(task, -libc::EBUSY);
    }
    idle.thread.join().unwrap();
    let steps = STEPS.load(SeqCst);
    wait_until("the worker goes on", || STEPS.load(SeqCst) > steps);
    assert_state(serving.task, RUNNABLE);
    stop.store(true, SeqCst);
    serving.thread.join().unwrap();
    other.end();
}

/// A server that serves a worker that counts, until told to stop.
fn spawn_serving() -> (Worker, &'static AtomicBool) {
    static STOP: AtomicBool = AtomicBool::new(false);

    let server = spawn_server(|task| {
        let worker = spawn_worker(task.tid(), |_| {
            while !STOP.load(SeqCst) {
                STEPS.fetch_add(1, SeqCst);
            }
        });
        task.await_runnable(worker.task);
        task.run(worker.task);
        worker.thread.join().unwrap();
    });
    wait_until("it serves", || STEPS.load(SeqCst) > 0);
    (server, &STOP)
}

/// Runs `worker`, whose handler comes first, until its thread has ended.
fn run_with_handler(server: &Task, worker: Worker, queued: &Task, unregister: i32) {
    let times = HANDLED.load(SeqCst);
    server.run(worker.task);
    assert_state(worker.task, NONE);
    assert_only(queued, &server.take(List::Runnable));
    worker.thread.join().unwrap();
    assert_eq!(HANDLED.load(SeqCst), times + 1);
    assert_answers(worker.task, unregister);
}

fn workers() {
    handle(call_all, SaFlags::empty());
    open(9);
    let server = become_server();
    let queued = spawn_worker(server.tid(), |_| ());
    server.await_runnable(queued.task);
    KICKED.store(queued.task.tid(), SeqCst);

    // The first two are inside `umcg_register` and `umcg_wait`, the others were stopped in their own code.
    let answers = [-libc::EBUSY, -libc::EBUSY, 0, 0];
    for (steps, (worker, answer)) in (1..).zip(held_workers(server).into_iter().zip(answers)) {
        send(worker.task);
        run_with_handler(server, worker, queued.task, answer);
        assert_eq!(STEPS.load(SeqCst), steps);
    }
    blocked(server, queued.task);
    running(server, queued.task);
    server.run(queued.task);
    queued.thread.join().unwrap();
    assert!(lists_are_empty(server));
    retire(server);
}

/// The handler interrupts a system call, and what comes after that is not a task's any more.
fn blocked(server: &'static Task, queued: &Task) {
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    let worker = spawn_worker(server.tid(), move |task| {
        assert_eq!(theirs.read(&mut [0]).unwrap_err().kind(), ErrorKind::Interrupted);
        assert_state(task, NONE);
        theirs.read_exact(&mut [0]).unwrap();
    });
    server.await_runnable(worker.task);
    server.run(worker.task);
    assert_only(worker.task, &server.take(List::Blocked));
    send(worker.task);
    server.await_runnable(worker.task);
    ours.write_all(&[0]).unwrap();
    run_with_handler(server, worker, queued, 0);
    assert!(server.take(List::Blocked).is_empty(), "a block of who is no task was reported");
}

/// The handler interrupts user code: RUNNING it is also on its way out of `umcg_register`.
fn running(server: &'static Task, queued: &Task) {
    static COMPUTES: AtomicBool = AtomicBool::new(false);

    let times = HANDLED.load(SeqCst);
    let worker = spawn_worker(server.tid(), move |task| {
        COMPUTES.store(true, SeqCst);
        spin_until("the handler runs", || HANDLED.load(SeqCst) > times);
        assert_state(task, NONE);
    });
    server.await_runnable(worker.task);
    let task = worker.task;
    let sender = spawn(move || {
        wait_until("it computes", || COMPUTES.load(SeqCst));
        send(task);
    });
    run_with_handler(server, worker, queued, 0);
    sender.join().unwrap();
}

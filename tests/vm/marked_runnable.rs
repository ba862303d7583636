// SPDX-License-Identifier: GPL-2.0-only
//! A task that marks itself RUNNABLE and works on is not held: only `umcg_wait`, capture and preemption hold.
//!
//! The failure this guards against: a server takes its lists after the mark, is switched out for its neighbour on the
//! CPU, and is held there for good, for its status says RUNNABLE.

use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::api::{NONE, RUNNABLE, RUNNING};
use crate::cast::{Task, become_server, open, pin, retire, spawn_worker_in};
use crate::harness::Test;

pub const TESTS: &[Test] = &[
    Test::new("a_server_that_marks_itself_and_works_on_is_not_held", server),
    Test::new("a_worker_that_marks_itself_and_works_on_is_not_held", worker),
];

/// CPU time that a marked task works for; many slices, so its neighbour takes the CPU from it several times.
const WORK: Duration = Duration::from_millis(300);

static DONE: AtomicBool = AtomicBool::new(false);
/// The neighbour's turns: it counts when it finds that the marked task has gone on.
static TURNS: AtomicU32 = AtomicU32::new(0);
static STEPS: AtomicU32 = AtomicU32::new(0);

/// CPU time of the calling thread.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap().into()
}

fn work_marked(task: &Task) {
    task.status.store(RUNNABLE, SeqCst);
    let start = cpu_time();
    while cpu_time() - start < WORK {
        STEPS.fetch_add(1, SeqCst);
    }
    assert_eq!(task.state(), RUNNABLE);
    task.status.store(RUNNING, SeqCst);
}

/// No task; wants the whole of CPU 0.
fn hog() {
    pin(0);
    let mut seen = 0;
    while !DONE.load(SeqCst) {
        let steps = STEPS.load(SeqCst);
        if steps != seen {
            seen = steps;
            TURNS.fetch_add(1, SeqCst);
        }
    }
}

/// `act` beside a hog on one CPU.
fn beside_hog(act: impl FnOnce()) {
    pin(0);
    let hog = std::thread::spawn(hog);
    act();
    DONE.store(true, SeqCst);
    hog.join().unwrap();
    let turns = TURNS.load(SeqCst);
    println!("the hog took the CPU {turns} times");
    assert!(turns > 1, "nobody took the CPU from the marked task, so nothing was tested");
}

fn server() {
    open(1);
    let server = become_server();
    beside_hog(|| work_marked(server));
    retire(server);
}

fn worker() {
    open(2);
    let server = become_server();
    let worker = spawn_worker_in(server.tid(), || pin(0), work_marked);
    server.await_runnable(worker.task);
    beside_hog(|| server.run(worker.task));
    assert_eq!(worker.task.state(), NONE);
    worker.thread.join().unwrap();
    retire(server);
}

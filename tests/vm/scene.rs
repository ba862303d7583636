// SPDX-License-Identifier: GPL-2.0-only
//! A server, a worker and one block: what every test of a way to block has in common.
//!
//! ```text
//! Scene::until_blocked()  the server runs the worker; it sleeps, and the server goes on
//! assert_lasts()          nothing happens until the test ends the sleep
//! assert_captured()       the worker stops before user code, and goes on when it is run
//! ```

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;
use std::thread::sleep;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::api::{self, BLOCKED, NONE, RUNNABLE};
use crate::cast::{
    List, Task, Worker, become_server, open, retire, spawn_server, spawn_worker, state_name, wait_until,
};

/// The kernel side's clock may lag behind the program's by as much as one adjustment of the clock.
pub const CLOCK_ERROR_NS: u64 = 1_000_000;

/// Worker's user code counts here; it stands still while the worker is not RUNNING.
pub static STEPS: AtomicU64 = AtomicU64::new(0);

/// A server and a worker that has been run until it blocked.
pub struct Scene {
    server: &'static Task,
    worker: Worker,
}

impl Scene {
    /// Opens the domain, and runs a worker until `block` has put it to sleep.
    pub fn until_blocked(block: impl FnOnce() + Send + 'static) -> Self {
        open(4);
        let server = become_server();
        let worker = spawn_worker(server.tid(), move |_| {
            STEPS.fetch_add(1, SeqCst);
            block();
            STEPS.fetch_add(1, SeqCst);
        });
        server.await_runnable(worker.task);
        assert_eq!(STEPS.load(SeqCst), 0, "a worker ran before it was run");

        let before_ns = monotonic_ns();
        server.run(worker.task);
        assert_only(worker.task, &server.take(List::Blocked));
        assert_eq!(STEPS.load(SeqCst), 1, "user code ran after the block");
        let blocked_ns = worker.task.blocked_ts.load(SeqCst);
        assert!(blocked_ns + CLOCK_ERROR_NS >= before_ns, "blocked before it was run");
        assert!(blocked_ns <= monotonic_ns() + CLOCK_ERROR_NS, "blocked in the future");
        Self { server, worker }
    }

    /// For blocks that the test ends: nothing happens before it does.
    pub fn assert_lasts(&self) {
        assert!(stand_still(), "user code of a BLOCKED worker ran");
        assert_state(self.worker.task, BLOCKED);
        assert!(self.server.take(List::Runnable).is_empty(), "RUNNABLE before the block ended");
    }

    /// The block ends, or is about to: the worker is captured, and runs on only when it is run.
    pub fn assert_captured(self) {
        let Self { server, worker } = self;
        assert!(stand_still(), "user code ran between the block and the capture");
        server.await_runnable(worker.task);
        assert_was_captured(worker.task);
        assert!(stand_still(), "user code of a captured worker ran");
        assert_eq!(STEPS.load(SeqCst), 1, "user code ran before the worker was run");
        assert!(server.take(List::Blocked).is_empty(), "one block was reported twice");

        server.run(worker.task);
        assert_eq!(STEPS.load(SeqCst), 2, "the worker was run and did not go on");
        assert_state(worker.task, NONE);
        worker.thread.join().unwrap();
        retire(server);
    }
}

/// In the domain that is open: a worker blocks, and its server hears of it.
pub fn assert_blocks_are_seen() {
    let (mut wake, mut theirs) = UnixStream::pair().unwrap();
    let server = become_server();
    let worker = spawn_worker(server.tid(), move |_| theirs.read_exact(&mut [0]).unwrap());
    server.await_runnable(worker.task);
    server.run(worker.task);
    assert_only(worker.task, &server.take(List::Blocked));
    wake.write_all(&[0]).unwrap();
    server.await_runnable(worker.task);
    server.run(worker.task);
    assert_state(worker.task, NONE);
    worker.thread.join().unwrap();
    retire(server);
}

/// The worker is RUNNABLE by a capture.
pub fn assert_was_captured(worker: &Task) {
    assert_state(worker, RUNNABLE);
    let (blocked_ns, runnable_ns) = (worker.blocked_ts.load(SeqCst), worker.runnable_ts.load(SeqCst));
    assert!(blocked_ns <= runnable_ns, "runnable at {runnable_ns}, before it blocked at {blocked_ns}");
}

pub fn lists_are_empty(server: &Task) -> bool {
    server.take(List::Blocked).is_empty() && server.take(List::Runnable).is_empty()
}

/// Runs a worker that ends.
pub fn run_to_end(server: &Task, worker: Worker) {
    server.run(worker.task);
    assert_state(worker.task, NONE);
    worker.thread.join().unwrap();
}

/// A server that idles until an event that it counts in `umcg_user_data`, and then for a word of the test.
pub struct Other(pub Worker);

impl Other {
    pub fn start() -> Self {
        let server = spawn_server(|task| {
            while task.user_data.load(SeqCst) < u64::from(u32::MAX) {
                assert_eq!(task.switch_to(0), 0);
                task.user_data.fetch_add(1, SeqCst);
            }
        });
        wait_until("the other server idles", || server.task.state() == RUNNABLE);
        Self(server)
    }

    pub fn tid(&self) -> u32 {
        self.0.task.tid()
    }

    pub fn events(&self) -> u64 {
        self.0.task.user_data.load(SeqCst)
    }

    pub fn assert_only_told_of(&self, worker: &Task, event: u64) {
        wait_until("the other server is told", || self.events() == event);
        assert_only(worker, &self.0.task.take(List::Runnable));
    }

    pub fn end(self) {
        self.0.task.user_data.store(u64::from(u32::MAX), SeqCst);
        assert_eq!(api::kick(self.tid(), 0), 0);
        self.0.thread.join().unwrap();
        assert!(lists_are_empty(self.0.task));
    }
}

pub fn assert_only(worker: &Task, tasks: &[&Task]) {
    assert!(
        tasks.len() == 1 && std::ptr::eq(tasks[0], worker),
        "a list has {} tasks instead of the one worker",
        tasks.len()
    );
}

pub fn assert_state(task: &Task, state: u32) {
    assert_eq!(state_name(task.state()), state_name(state));
}

/// True if no worker counts while the server looks: it spins, so that others need another CPU, and it sleeps,
/// so that they have this one.
pub fn stand_still() -> bool {
    let before = STEPS.load(SeqCst);
    let stood = (0..100_000).all(|_| STEPS.load(SeqCst) == before);
    sleep(Duration::from_millis(20));
    stood && STEPS.load(SeqCst) == before
}

pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("every kernel has this clock");
    Duration::from(now).as_nanos().try_into().expect("584 years fit")
}

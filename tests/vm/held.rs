// SPDX-License-Identifier: GPL-2.0-only
//! A held task stays held, whatever else is done to it, and runs fine when it is released.
//!
//! The failures this guards against: the core takes a held task back to change its affinity, nice value or policy, and
//! hands it on to a CPU; the watchdog of sched_ext finds a runnable task that has not run, and ejects the scheduler.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;
use std::thread::sleep;
use std::time::Duration;

use nix::sched::{CpuSet, sched_getcpu, sched_setaffinity};
use nix::unistd::Pid;

use crate::api::{self, NONE, RUNNABLE};
use crate::cast::{
    List, Task, Worker, become_server, nr_cpus, open, pin, retire, scaled, serve_fifo, spawn_server,
    spawn_worker, spawn_worker_in, wait_until,
};
use crate::harness::{Loader, Test};

pub const TESTS: &[Test] = &[
    Test::new("held_tasks_survive_a_change_of_affinity_nice_and_policy", changed),
    Test::new("held_tasks_survive_the_watchdog", watchdog).own_loader().limit_s(300),
    Test::new("workers_may_be_pinned_away_from_their_server", pinned),
];

/// User code of held tasks; it stands still.
static STEPS: AtomicU32 = AtomicU32::new(0);

fn step() {
    STEPS.fetch_add(1, SeqCst);
}

/// One task for each way to be held, and the server that could release the workers.
struct Held {
    server: &'static Task,
    fresh: Worker,
    waiting: Worker,
    captured: Worker,
    idle: Worker,
}

impl Held {
    fn start() -> Self {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        let server = become_server();
        let fresh = spawn_worker(server.tid(), |_| step());
        server.await_runnable(fresh.task);
        let waiting = spawn_worker(server.tid(), |task| {
            assert_eq!(task.switch_to(0), 0);
            step();
        });
        server.await_runnable(waiting.task);
        server.run(waiting.task);
        let captured = spawn_worker(server.tid(), move |_| {
            theirs.read_exact(&mut [0]).unwrap();
            step();
        });
        server.await_runnable(captured.task);
        server.run(captured.task);
        ours.write_all(&[0]).unwrap();
        server.await_runnable(captured.task);
        assert_eq!(server.take(List::Blocked).len(), 1);
        let idle = spawn_server(|task| {
            assert_eq!(task.switch_to(0), 0);
            step();
        });
        let held = Self { server, fresh, waiting, captured, idle };
        wait_until("all are held", || held.tasks().iter().all(|task| task.state() == RUNNABLE));
        held
    }

    fn workers(&self) -> [&Worker; 3] {
        [&self.fresh, &self.waiting, &self.captured]
    }

    fn tasks(&self) -> [&Task; 4] {
        [self.fresh.task, self.waiting.task, self.captured.task, self.idle.task]
    }

    fn assert_held(&self) {
        assert_eq!(STEPS.load(SeqCst), 0, "user code of a held task ran");
        for task in self.tasks() {
            assert_eq!(task.state(), RUNNABLE);
        }
        assert!(self.server.take(List::Runnable).is_empty());
        assert!(self.server.take(List::Blocked).is_empty());
    }

    fn release(self) {
        for (steps, worker) in (1..).zip(self.workers()) {
            self.server.run(worker.task);
            assert_eq!((STEPS.load(SeqCst), worker.task.state()), (steps, NONE));
        }
        assert_eq!(api::kick(self.idle.task.tid(), 0), 0);
        for worker in [self.fresh, self.waiting, self.captured, self.idle] {
            worker.thread.join().unwrap();
        }
        assert_eq!(STEPS.load(SeqCst), 4);
        retire(self.server);
    }
}

fn set_affinity(tid: u32, cpus: impl IntoIterator<Item = usize>) {
    let mut set = CpuSet::new();
    for cpu in cpus {
        set.set(cpu).unwrap();
    }
    sched_setaffinity(Pid::from_raw(tid.cast_signed()), &set).unwrap();
}

fn set_nice(tid: u32, nice: i32) {
    // SAFETY: takes no pointers.
    assert_eq!(unsafe { libc::setpriority(libc::PRIO_PROCESS, tid, nice) }, 0);
}

fn set_policy(tid: u32, policy: i32) {
    // SAFETY: a structure of zeroes is a valid sched_param, and outlives the call.
    let answer = unsafe { libc::sched_setscheduler(tid.cast_signed(), policy, &std::mem::zeroed()) };
    assert_eq!(answer, 0);
}

fn changed() {
    open(8);
    let held = Held::start();
    for round in 0..30 {
        for task in held.tasks() {
            let tid = task.tid();
            set_affinity(tid, [round % nr_cpus()]);
            set_nice(tid, round as i32 % 5);
            set_policy(tid, [libc::SCHED_BATCH, libc::SCHED_OTHER][round % 2]);
        }
        sleep(Duration::from_millis(2));
        held.assert_held();
    }
    for task in held.tasks() {
        set_affinity(task.tid(), 0..nr_cpus());
    }
    held.release();
}

fn watchdog() {
    // Below 5 s newer kernels say that their own rescue of stalled tasks takes longer.
    let loader = Loader::start(&["--watchdog", "5"]);
    // SAFETY: this is the only thread.
    unsafe { std::env::set_var("UMCG_SOCKET", &loader.socket) };
    open(8);
    let held = Held::start();
    for _ in 0..scaled(90).max(13) {
        sleep(Duration::from_secs(1));
        held.assert_held();
    }
    let refreshes = loader.stat("refreshes");
    println!("{refreshes} refreshes");
    assert!(refreshes > 0, "no held task was let go for the watchdog");
    assert_eq!(api::backend(), "sched_ext");
    held.release();
    assert!(loader.serves());
}

fn pinned() {
    const ROUNDS: u32 = 50;

    open(16);
    pin(0);
    let server = become_server();
    let workers: Vec<_> = (0..2 * nr_cpus())
        .map(|i| {
            let cpu = i % nr_cpus();
            spawn_worker_in(
                server.tid(),
                move || pin(cpu),
                move |task| {
                    for _ in 0..ROUNDS {
                        sleep(Duration::from_millis(1));
                        assert_eq!(sched_getcpu().unwrap(), cpu);
                        task.status.store(RUNNABLE, SeqCst);
                        assert_eq!(api::wait(0, umcg::raw::UMCG_WAIT_ENQUEUE), 0);
                        assert_eq!(sched_getcpu().unwrap(), cpu);
                        step();
                    }
                },
            )
        })
        .collect();
    let tasks: Vec<_> = workers.iter().map(|worker| worker.task).collect();
    serve_fifo(server, &tasks);
    assert_eq!(STEPS.load(SeqCst), ROUNDS * tasks.len() as u32);
    for worker in workers {
        worker.thread.join().unwrap();
    }
    retire(server);
}

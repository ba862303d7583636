// SPDX-License-Identifier: GPL-2.0-only
//! A RUNNING worker is stopped from outside: by UMCG_TF_PREEMPT, or by a sched_yield(2) that some library of its makes.
//!
//! The failures this guards against: a worker that computes for ever has its server for ever; a worker stopped inside
//! the kernel keeps a lock there that its server needs; a request that was made of one state stops the task in another.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use umcg::raw::{UMCG_TF_PREEMPT as PREEMPT, UMCG_WAIT_ENQUEUE};

use crate::api::{self, BLOCKED, NONE, RUNNABLE, RUNNING};
use crate::cast::{
    List, Task, Worker, become_server, open, retire, sched_yield, serve_fifo, spawn, spawn_server,
    spawn_worker, spin_until, wait_until,
};
use crate::harness::{Counters, Test};
use crate::scene::{STEPS, assert_only, assert_state, stand_still};

pub const TESTS: &[Test] = &[
    Test::new("a_worker_that_computes_is_preempted_by_the_flag", || computing(|_| ())),
    Test::new("a_worker_that_computes_is_preempted_by_flag_and_kick", || {
        computing(|worker| assert_eq!(api::kick(worker.tid(), 0), 0))
    }),
    Test::new("a_worker_may_ask_for_its_own_preemption", of_itself),
    Test::new("the_flag_is_ignored_but_on_running_workers", on_others),
    Test::new("preemption_never_stops_inside_the_kernel", inside_the_kernel),
    Test::new("a_plain_yield_of_a_worker_gives_its_host_the_cpu", yielding),
    Test::new("a_stopped_worker_comes_back_to_its_host", to_host),
    Test::new("a_plain_yield_of_a_server_is_a_plain_yield", server_yields),
    Test::new("preemption_beside_all_else_that_a_worker_does", beside_all).limit_s(300),
];

static STOP: AtomicBool = AtomicBool::new(false);

/// Counts, without a system call, until the test stops it.
fn count_steps() {
    while !STOP.load(SeqCst) {
        STEPS.fetch_add(1, SeqCst);
    }
}

/// Runs the worker until it is preempted; it is on the list, and stands still.
fn run_until_preempted(server: &Task, worker: &Task) {
    let previous_ns = worker.runnable_ts.load(SeqCst);
    server.run(worker);
    assert_state(server, RUNNING);
    assert_state(worker, RUNNABLE);
    assert_eq!(worker.status.load(SeqCst) & PREEMPT, 0, "the flag is still there");
    assert_only(worker, &server.take(List::Runnable));
    assert!(server.take(List::Blocked).is_empty(), "preemption is no block");
    assert!(worker.runnable_ts.load(SeqCst) > previous_ns, "its time was not noted");
    assert!(stand_still(), "user code of a preempted worker ran");
}

fn run_to_end(server: &Task, worker: Worker) {
    server.run(worker.task);
    assert_state(worker.task, NONE);
    worker.thread.join().unwrap();
}

fn computing(kick: fn(&Task)) {
    const BITS: u32 = 0xcafe_0000;

    open(2);
    let server = become_server();
    let worker = spawn_worker(server.tid(), |task| {
        task.status.fetch_or(BITS, SeqCst);
        count_steps();
    });
    server.await_runnable(worker.task);
    let task = worker.task;
    for _ in 0..20 {
        let before = STEPS.load(SeqCst);
        let asker = spawn(move || {
            wait_until("the worker goes on", || STEPS.load(SeqCst) > before);
            task.status.fetch_or(PREEMPT, SeqCst);
            kick(task);
        });
        run_until_preempted(server, task);
        assert_eq!(task.status.load(SeqCst), BITS | RUNNABLE, "the program's bits are lost");
        asker.join().unwrap();
    }
    STOP.store(true, SeqCst);
    run_to_end(server, worker);
    retire(server);
}

/// Nobody else wants its CPU, so it is the timer tick that finds it.
fn of_itself() {
    open(2);
    let server = become_server();
    let worker = spawn_worker(server.tid(), |task| {
        let mut ran: Vec<_> = (0..20)
            .map(|_| {
                let start = cpu_time();
                task.status.fetch_or(PREEMPT, SeqCst);
                let before = STEPS.fetch_add(1, SeqCst);
                spin_until("it is preempted", || task.status.load(SeqCst) == RUNNING);
                assert_eq!(STEPS.load(SeqCst), before + 1);
                cpu_time() - start
            })
            .collect();
        ran.sort();
        println!("preempted after {:?} of CPU time (median)", ran[10]);
        assert!(ran[10] < MANY_TICKS / 2, "it was something else that interrupted it, not the tick");
    });
    server.await_runnable(worker.task);
    for steps in 1..=20 {
        run_until_preempted(server, worker.task);
        assert_eq!(STEPS.load(SeqCst), steps);
    }
    run_to_end(server, worker);
    retire(server);
}

/// Long enough for many ticks; CPU time of the calling thread.
const MANY_TICKS: Duration = Duration::from_millis(60);

fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap().into()
}

pub fn compute() {
    let start = cpu_time();
    while cpu_time() - start < MANY_TICKS {
        (0..1000).for_each(|_| std::hint::spin_loop());
    }
}

fn on_others() {
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    open(3);
    let counters = Counters::now();
    let server = become_server();
    let worker = spawn_worker(server.tid(), move |task| {
        theirs.read_exact(&mut [0]).unwrap();
        compute();
        assert_eq!(task.switch_to(0), 0);
        compute();
        task.status.store(RUNNABLE | PREEMPT, SeqCst);
        compute();
        assert_state(task, RUNNABLE);
        task.status.store(RUNNING, SeqCst);
    });
    server.await_runnable(worker.task);
    server.status.store(RUNNING | PREEMPT, SeqCst);
    assert_eq!(api::kick(server.tid(), 0), 0);
    compute(); // nobody holds a server that computes
    server.status.store(RUNNING, SeqCst);

    server.run(worker.task);
    assert_only(worker.task, &server.take(List::Blocked));
    worker.task.status.fetch_or(PREEMPT, SeqCst);
    assert_eq!(api::kick(worker.task.tid(), 0), 0);
    assert_state(worker.task, BLOCKED);
    ours.write_all(&[0]).unwrap();
    server.await_runnable(worker.task);

    server.run(worker.task);
    assert_state(worker.task, RUNNABLE);
    assert!(server.take(List::Runnable).is_empty(), "preempted for a flag on a BLOCKED worker");
    worker.task.status.fetch_or(PREEMPT, SeqCst);
    run_to_end(server, worker);
    assert!(server.take(List::Runnable).is_empty());
    assert_eq!(counters.added("preemptions"), 0);
    retire(server);
}

/// What one read(2) of /dev/urandom fills: long enough for many ticks inside the kernel.
struct Noise(&'static [AtomicU64]);

impl Noise {
    const BYTES: usize = 4 << 20;

    fn new() -> Self {
        Self((0..Self::BYTES / 8).map(|_| AtomicU64::new(0)).collect::<Vec<_>>().leak())
    }

    fn clear(&self) {
        self.0.iter().for_each(|word| word.store(0, SeqCst));
    }

    fn has_begun(&self) -> bool {
        self.0[0].load(SeqCst) != 0
    }

    fn is_complete(&self) -> bool {
        self.0[self.0.len() - 1].load(SeqCst) != 0
    }

    fn read(&self, urandom: &File) {
        let start = self.0.as_ptr().cast_mut().cast();
        // SAFETY: read(2) writes inside the bounds of the words, which are atomics.
        let length = unsafe { libc::read(urandom.as_raw_fd(), start, Self::BYTES) };
        assert_eq!(length, Self::BYTES as isize);
    }
}

fn inside_the_kernel() {
    static ROUND: AtomicU32 = AtomicU32::new(0);
    static ASKED_INSIDE: AtomicBool = AtomicBool::new(false);
    const ROUNDS: u32 = 10;

    let noise: &Noise = Box::leak(Box::new(Noise::new()));
    open(2);
    let urandom = File::open("/dev/urandom").unwrap();
    let server = become_server();
    let worker = spawn_worker(server.tid(), move |_| {
        for round in 1..=ROUNDS {
            noise.read(&urandom);
            spin_until("the next round", || ROUND.load(SeqCst) > round);
        }
    });
    server.await_runnable(worker.task);
    let task = worker.task;
    let mut inside = 0;
    for round in 1..=ROUNDS {
        noise.clear();
        let asker = spawn(move || {
            spin_until("the system call", || noise.has_begun());
            task.status.fetch_or(PREEMPT, SeqCst);
            ASKED_INSIDE.store(!noise.is_complete(), SeqCst);
        });
        ROUND.store(round, SeqCst);
        run_until_preempted(server, task);
        asker.join().unwrap();
        inside += u32::from(ASKED_INSIDE.load(SeqCst));
        assert!(noise.is_complete(), "the worker was stopped inside its system call");
    }
    println!("asked {inside} times inside the system call");
    assert!(inside > 0, "nothing was tested");
    ROUND.store(ROUNDS + 1, SeqCst);
    run_to_end(server, worker);
    retire(server);
}

fn yielding() {
    open(2);
    let server = become_server();
    let worker = spawn_worker(server.tid(), |task| {
        for _ in 0..20 {
            sched_yield();
            assert_state(task, RUNNING);
            STEPS.fetch_add(1, SeqCst);
        }
    });
    server.await_runnable(worker.task);
    for steps in 0..20 {
        run_until_preempted(server, worker.task);
        assert_eq!(STEPS.load(SeqCst), steps);
    }
    run_to_end(server, worker);
    retire(server);
}

/// Whatever server it names by then: a change counts from its next stop on.
fn to_host() {
    open(3);
    let server = become_server();
    let (host, other) = (server.tid(), spawn_server(|task| _ = task.switch_to(0)));
    let named = other.task;
    wait_until("the other server idles", || named.state() == RUNNABLE);
    let worker = spawn_worker(host, move |task| {
        task.server_tid.store(named.tid(), SeqCst);
        sched_yield();
        task.server_tid.store(named.tid(), SeqCst);
        task.status.fetch_or(PREEMPT, SeqCst);
        spin_until("it is preempted", || task.status.load(SeqCst) == RUNNING);
    });
    server.await_runnable(worker.task);
    for _ in 0..2 {
        run_until_preempted(server, worker.task);
        assert_eq!(worker.task.server_tid.load(SeqCst), named.tid());
        worker.task.server_tid.store(host, SeqCst);
    }
    assert_state(named, RUNNABLE);
    assert!(named.take(List::Runnable).is_empty());
    run_to_end(server, worker);
    assert_eq!(api::kick(named.tid(), 0), 0);
    other.thread.join().unwrap();
    retire(server);
}

fn server_yields() {
    open(2);
    let server = become_server();
    for status in [RUNNING, RUNNABLE] {
        server.status.store(status, SeqCst);
        for _ in 0..100 {
            sched_yield();
            assert_state(server, status);
        }
    }
    server.status.store(RUNNING, SeqCst);
    let worker = spawn_worker(server.tid(), |task| {
        task.status.store(RUNNABLE, SeqCst);
        sched_yield(); // marked: it is about to wait, and nobody holds it before
        assert_state(task, RUNNABLE);
        STEPS.fetch_add(1, SeqCst);
        assert_eq!(api::wait(0, 0), 0);
    });
    server.await_runnable(worker.task);
    server.run(worker.task);
    assert_eq!(STEPS.load(SeqCst), 1);
    assert!(server.take(List::Runnable).is_empty());
    run_to_end(server, worker);
    retire(server);
}

static COLLEAGUES: OnceLock<Vec<&Task>> = OnceLock::new();

/// No other worker of the host is RUNNING while this one is. A worker that was stopped in the middle has another time.
fn assert_alone(me: &Task) {
    let stopped_ns = me.runnable_ts.load(SeqCst);
    let colleagues = COLLEAGUES.get().expect("set before the first run");
    let running = colleagues.iter().filter(|task| task.state() == RUNNING).count();
    let is_running = me.state() == RUNNING;
    if me.runnable_ts.load(SeqCst) == stopped_ns {
        assert!(is_running, "a worker in user code is not RUNNING");
        assert_eq!(running, 1, "workers of one host are RUNNING");
    }
}

/// Long enough for ticks, and for whoever asks for preemption to have had the CPU, if there is only one.
fn compute_alone(me: &Task) {
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(40) {
        (0..1000).for_each(|_| assert_alone(me));
    }
}

fn beside_all() {
    const ROUNDS: u32 = 80;

    open(4);
    let counters = Counters::now();
    let server = become_server();
    let workers: Vec<_> = (0..3)
        .map(|_| {
            spawn_worker(server.tid(), |task| {
                for round in 0..ROUNDS {
                    match round % 4 {
                        0 => sleep(Duration::from_micros(100)),
                        1 => sched_yield(),
                        2 => compute_alone(task),
                        _ => {
                            task.status.store(RUNNABLE, SeqCst);
                            assert_eq!(api::wait(0, UMCG_WAIT_ENQUEUE), 0);
                        }
                    }
                    assert_eq!(task.state(), RUNNING);
                    STEPS.fetch_add(1, SeqCst);
                }
            })
        })
        .collect();
    let tasks: Vec<_> = workers.iter().map(|worker| worker.task).collect();
    let tasks = COLLEAGUES.get_or_init(|| tasks);
    let asker = spawn(move || {
        while !STOP.load(SeqCst) {
            for task in tasks {
                task.status.fetch_or(PREEMPT, SeqCst);
            }
            sleep(Duration::from_micros(300));
        }
    });
    serve_fifo(server, tasks);
    STOP.store(true, SeqCst);
    assert_eq!(STEPS.load(SeqCst), u64::from(3 * ROUNDS));
    let preempted = counters.added("preemptions");
    println!("{preempted} preemptions, plain yields among them");
    let yields = 3 * (0..ROUNDS).filter(|round| round % 4 == 1).count() as u64;
    assert!(preempted > yields * 3 / 2, "nothing was tested");
    asker.join().unwrap();
    for worker in workers {
        worker.thread.join().unwrap();
    }
    retire(server);
}

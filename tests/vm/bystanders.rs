// SPDX-License-Identifier: GPL-2.0-only
//! Threads that have nothing to do with UMCG: all scheduled, and fairly, or left alone.
//!
//! The failures this guards against: tasks that hand a CPU to each other for ever never give it to a neighbour, or never
//! get it from one; in partial mode, threads that did not ask are scheduled by us.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::thread::{JoinHandle, sleep};
use std::time::Duration;

use nix::sched::sched_yield;
use nix::time::{ClockId, clock_gettime};

use crate::api::NONE;
use crate::cast::{List, become_server, nr_cpus, open, pin, retire, serve_fifo, spawn_worker, wait_until};
use crate::client::{Client, ask_for_domain};
use crate::harness::{Loader, Test};
use crate::users::ids;

pub const TESTS: &[Test] = &[
    Test::new("cpu_hogs_share_the_machine", hogs),
    Test::new("who_sleeps_pays_for_what_it_had", napper),
    Test::new("who_sleeps_waits_for_the_end_of_nobodys_slice", sleeper),
    Test::new("who_yields_pays_for_what_it_had", yielder),
    Test::new("a_worker_that_is_captured_pays_for_what_it_had", captured),
    Test::new("a_server_with_many_workers_gets_the_share_of_one_thread", crowd),
    Test::new("a_pair_that_switches_for_ever_shares_its_cpu", pair),
    Test::new("tracepoints_are_left_alone_until_there_is_a_domain", tracepoints).own_loader(),
    Test::new("in_partial_mode_only_tasks_are_ours", partial).own_loader(),
];

const DURATION: Duration = Duration::from_secs(3);
/// Of the CPU time that two equal threads get while both want all, the larger may be so many times the smaller.
const FAIR: u32 = 4;

static STOP: AtomicBool = AtomicBool::new(false);

/// CPU time of the calling thread.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap().into()
}

/// Computes until STOP; its CPU time.
fn hog() -> Duration {
    while !STOP.load(SeqCst) {
        std::hint::spin_loop();
    }
    cpu_time()
}

fn assert_fair(times: &[Duration]) {
    println!("CPU time of hogs: {times:.2?}");
    let (least, most) = (times.iter().min().unwrap(), times.iter().max().unwrap());
    assert!(*most < *least * FAIR, "not fair: {times:?}");
}

fn hogs() {
    assert!(switches_all(), "not everybody is ours");
    open(1); // so that the sweep is at work as well
    let server = become_server();
    let hogs: Vec<_> = (0..2 * nr_cpus() + 1).map(|_| std::thread::spawn(hog)).collect();
    sleep(DURATION);
    STOP.store(true, SeqCst);
    let times: Vec<_> = hogs.into_iter().map(|hog| hog.join().unwrap()).collect();
    assert_fair(&times);
    retire(server);
}

/// Computes for so much CPU time.
fn compute(time: Duration) {
    let begin = cpu_time();
    while cpu_time() - begin < time {
        std::hint::spin_loop();
    }
}

/// A thread on CPU 0, where all of a test compete.
fn on_one_cpu<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    std::thread::spawn(move || {
        pin(0);
        body()
    })
}

/// CPU time of `body` until STOP beside `nr_hogs` hogs on its CPU, and the hogs' mean.
fn beside_hogs(nr_hogs: u32, body: fn() -> Duration) -> (Duration, Duration) {
    let hogs: Vec<_> = (0..nr_hogs).map(|_| on_one_cpu(hog)).collect();
    let body = on_one_cpu(body);
    sleep(DURATION);
    STOP.store(true, SeqCst);
    let hogs: Duration = hogs.into_iter().map(|hog| hog.join().unwrap()).sum();
    let times = (body.join().unwrap(), hogs / nr_hogs);
    println!("CPU time of who is looked at, and of a hog: {times:.2?}");
    times
}

/// As much as a hog, give or take a third: the machine that this one is part of may be busy. `scripts/bench` is exact.
fn assert_its_share((time, of_a_hog): (Duration, Duration)) {
    assert!(2 * time < 3 * of_a_hog, "it gets more than its share");
    assert!(3 * time > 2 * of_a_hog, "it gets less than its share");
}

/// Computes for most of a slice, and sleeps as short as can be.
fn nap_for_ever() -> Duration {
    while !STOP.load(SeqCst) {
        compute(Duration::from_millis(4));
        sleep(Duration::from_micros(1));
    }
    cpu_time()
}

fn napper() {
    assert_its_share(beside_hogs(6, nap_for_ever));
}

/// Naps on a CPU where four compute. All CPU time that the process takes during a nap is theirs.
fn sleeper() {
    const NAPS: usize = 301;
    const NAP: Duration = Duration::from_millis(1);

    pin(0);
    let hogs: Vec<_> = (0..4).map(|_| on_one_cpu(hog)).collect();
    let process_time = || Duration::from(clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).unwrap());
    let mut waits: Vec<_> = (0..NAPS)
        .map(|_| {
            let before = process_time();
            sleep(NAP);
            (process_time() - before).saturating_sub(NAP)
        })
        .collect();
    STOP.store(true, SeqCst);
    for hog in hogs {
        hog.join().unwrap();
    }
    waits.sort_unstable();
    let (half, most) = (waits[NAPS / 2], waits[NAPS * 9 / 10]);
    println!("who computes has had {half:.2?} after a nap is over, in one of ten cases more than {most:.2?}");
    assert!(half < Duration::from_millis(2), "it waits for the end of a slice");
}

/// Leaves most of each slice.
fn yield_for_ever() -> Duration {
    while !STOP.load(SeqCst) {
        compute(Duration::from_millis(1));
        sched_yield().unwrap();
    }
    cpu_time()
}

fn yielder() {
    assert_its_share(beside_hogs(8, yield_for_ever));
}

/// Serves a worker that computes for most of a slice, and sleeps as short as can be, so that it stops where it wakes.
fn serve_a_napper() -> Duration {
    let server = become_server();
    let worker = spawn_worker(server.tid(), |task| {
        task.user_data.store(nap_for_ever().as_nanos() as u64, SeqCst);
    });
    let task = worker.task;
    serve_fifo(server, &[task]);
    worker.thread.join().unwrap();
    retire(server);
    cpu_time() + Duration::from_nanos(task.user_data.load(SeqCst))
}

fn captured() {
    open(2);
    assert_its_share(beside_hogs(6, serve_a_napper));
}

/// Serves workers that compute for a while, and give the CPU to the next one.
fn serve_a_crowd() -> Duration {
    const WORKERS: usize = 20;

    let server = become_server();
    let workers: Vec<_> = (0..WORKERS)
        .map(|_| {
            spawn_worker(server.tid(), |task| {
                while !STOP.load(SeqCst) {
                    compute(Duration::from_micros(500));
                    sched_yield().unwrap();
                }
                task.user_data.store(cpu_time().as_nanos() as u64, SeqCst);
            })
        })
        .collect();
    let tasks: Vec<_> = workers.iter().map(|worker| worker.task).collect();
    serve_fifo(server, &tasks);
    for worker in workers {
        worker.thread.join().unwrap();
    }
    retire(server);
    tasks.iter().map(|task| Duration::from_nanos(task.user_data.load(SeqCst))).sum::<Duration>() + cpu_time()
}

fn crowd() {
    open(32);
    assert_its_share(beside_hogs(2, serve_a_crowd));
}

/// A server on CPU 0 that does nothing but switch to its worker and back, until STOP; the CPU time of both.
fn switch_for_ever() -> Duration {
    pin(0);
    let server = become_server();
    // New threads inherit the affinity.
    let worker = spawn_worker(server.tid(), |task| {
        while !STOP.load(SeqCst) {
            assert_eq!(task.switch_to(0), 0);
        }
        task.user_data.store(cpu_time().as_nanos() as u64, SeqCst);
    });
    server.await_runnable(worker.task);
    while worker.task.state() != NONE {
        server.run(worker.task);
    }
    worker.thread.join().unwrap();
    retire(server);
    cpu_time() + Duration::from_nanos(worker.task.user_data.load(SeqCst))
}

fn pair() {
    open(2);
    let hog = std::thread::spawn(|| {
        pin(0);
        hog()
    });
    let pair = std::thread::spawn(switch_for_ever);
    sleep(DURATION);
    STOP.store(true, SeqCst);
    let times = (pair.join().unwrap(), hog.join().unwrap());
    println!("CPU time of a pair and a hog: {times:.2?}");
    assert_its_share(times);
}

/// Links of BPF programs in the machine.
fn nr_links() -> usize {
    const BPF_LINK_GET_NEXT_ID: u32 = 31;
    ids(BPF_LINK_GET_NEXT_ID).len()
}

fn tracepoints() {
    let loader = Loader::start(&[]);
    let alone = nr_links();
    assert!(alone > 0, "the scheduler itself is not seen");
    for _ in 0..2 {
        let client = Client::open(&loader.socket, 1);
        assert!(nr_links() > alone, "nothing sees a task die");
        drop(client);
        wait_until("the tracepoints are given back", || nr_links() == alone);
    }
    drop(ask_for_domain(&loader.socket, 1));
    wait_until("a domain is opened", || nr_links() > alone);
    wait_until("and closed", || loader.stat("nr_domains") == 0);
    assert!(nr_links() > alone, "who hangs up takes the tracepoints along");
    wait_until("the tracepoints are given back", || nr_links() == alone);
}

const SCHED_EXT: i32 = 7;

fn policy() -> i32 {
    // SAFETY: takes no pointers.
    unsafe { libc::sched_getscheduler(0) }
}

/// Whether the kernel gives the scheduler all tasks, or SCHED_EXT ones only.
fn switches_all() -> bool {
    std::fs::read_to_string("/sys/kernel/sched_ext/switch_all").unwrap().trim() == "1"
}

fn partial() {
    let loader = Loader::start(&["--partial"]);
    // SAFETY: this is the only thread.
    unsafe { std::env::set_var("UMCG_SOCKET", &loader.socket) };
    assert!(!switches_all(), "a partial scheduler took all tasks");
    assert_eq!(policy(), libc::SCHED_OTHER);
    open(4);
    let server = become_server();
    assert_eq!(policy(), SCHED_EXT);

    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    let worker = spawn_worker(server.tid(), move |_| {
        assert_eq!(policy(), SCHED_EXT);
        theirs.read_exact(&mut [0]).unwrap();
        STOP.store(true, SeqCst);
    });
    server.await_runnable(worker.task);
    server.run(worker.task);
    assert_eq!(server.take(List::Blocked).len(), 1);
    ours.write_all(&[0]).unwrap();
    server.await_runnable(worker.task);
    assert!(!STOP.load(SeqCst), "user code ran between the block and the capture");
    server.run(worker.task);
    worker.thread.join().unwrap();

    retire(server);
    assert_eq!(policy(), libc::SCHED_OTHER, "not given back");
    assert_eq!(std::thread::spawn(policy).join().unwrap(), libc::SCHED_OTHER);
}

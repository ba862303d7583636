// SPDX-License-Identifier: GPL-2.0-only
//! Threads that have nothing to do with UMCG: all scheduled, and fairly, or left alone.
//!
//! The failures this guards against: tasks that hand a CPU to each other for ever never give it to a neighbour, or never
//! get it from one; in partial mode, threads that did not ask are scheduled by us.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::thread::sleep;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::api::NONE;
use crate::cast::{List, become_server, nr_cpus, open, pin, retire, spawn_worker, wait_until};
use crate::client::{Client, ask_for_domain};
use crate::harness::{Loader, Test};
use crate::users::ids;

pub const TESTS: &[Test] = &[
    Test::new("cpu_hogs_share_the_machine", hogs),
    Test::new("who_sleeps_pays_for_what_it_had", napper),
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

fn assert_fair(what: &str, times: &[Duration]) {
    println!("CPU time of {what}: {times:.2?}");
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
    assert_fair("hogs", &times);
    retire(server);
}

/// Computes for most of a slice, and sleeps as short as can be, until STOP; its CPU time.
fn nap_for_ever() -> Duration {
    while !STOP.load(SeqCst) {
        let awake = cpu_time();
        while cpu_time() - awake < Duration::from_millis(4) {
            std::hint::spin_loop();
        }
        sleep(Duration::from_micros(1));
    }
    cpu_time()
}

fn napper() {
    let on_one_cpu = |body: fn() -> Duration| {
        std::thread::spawn(move || {
            pin(0);
            body()
        })
    };
    let hogs: Vec<_> = (0..6).map(|_| on_one_cpu(hog)).collect();
    let napper = on_one_cpu(nap_for_ever);
    sleep(DURATION);
    STOP.store(true, SeqCst);
    let least = hogs.into_iter().map(|hog| hog.join().unwrap()).min().unwrap();
    let napper = napper.join().unwrap();
    println!("CPU time of a hog and a napper: {least:.2?}, {napper:.2?}");
    assert!(2 * napper < 3 * least, "a sleep pays");
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
    assert_fair("a pair and a hog", &[pair.join().unwrap(), hog.join().unwrap()]);
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

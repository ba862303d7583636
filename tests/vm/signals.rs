// SPDX-License-Identifier: GPL-2.0-only
//! Signal handlers: those of a server that waits run at once, those of a worker when it is next RUNNING.
//!
//! The failures this guards against: a held task is runnable, so a signal does not wake it, and its handler never runs; or
//! the signal lets go of a held worker, which then runs its handler, and more, beside the worker that is RUNNING.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{
    SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, kill, pthread_sigmask, sigaction, signal,
};
use nix::unistd::{Pid, getpid};
use umcg::raw::UMCG_TF_PREEMPT;

use crate::api::{self, BLOCKED, NONE, RUNNABLE, RUNNING};
use crate::cast::{
    List, Task, Worker, become_server, gettid, nr_cpus, open, retire, sched_yield, spawn, spawn_server,
    spawn_worker, spawn_worker_in, spin_until, wait_until,
};
use crate::harness::{Counters, Test};
use crate::scene::{STEPS, assert_only, assert_state, run_to_end, stand_still};

pub const TESTS: &[Test] = &[
    Test::new("handlers_of_an_idle_server_run_and_it_waits_on", idle_server),
    Test::new("a_handler_that_yields_in_an_idle_server_goes_on", yielding_handler),
    Test::new("handlers_of_a_serving_server_run_and_it_waits_on", serving_server),
    Test::new("umcg_wait_in_a_handler_that_interrupted_it_fails", wait_in_handler),
    Test::new("umcg_wait_in_a_handler_of_a_held_worker_fails", wait_in_handler_of_worker),
    Test::new("a_timeout_does_not_start_again_after_a_handler", timeout),
    Test::new("handlers_of_a_running_worker_run_at_once", running),
    Test::new("handlers_of_a_held_worker_run_when_it_is_run", held),
    Test::new("handlers_of_a_blocked_worker_run_when_it_is_run", blocked),
    Test::new("a_system_call_that_a_handler_interrupts_is_restarted", restarted),
    Test::new("a_signal_for_the_process_finds_the_held_worker_that_takes_it", process_worker),
    Test::new("a_signal_for_the_process_finds_the_idle_server_that_takes_it", process_server),
    Test::new("a_storm_of_signals_lets_no_held_worker_go", storm).limit_s(300),
    Test::new("a_flood_of_signals_is_no_flood_of_sweeps", flood),
];

const SIGNAL: Signal = Signal::SIGUSR1;

/// Handlers that have run, and the thread of the last one.
pub static HANDLED: AtomicU32 = AtomicU32::new(0);
static HANDLED_BY: AtomicU32 = AtomicU32::new(0);

pub extern "C" fn count(_signal: i32) {
    HANDLED_BY.store(gettid(), SeqCst);
    HANDLED.fetch_add(1, SeqCst);
}

pub fn handle(handler: extern "C" fn(i32), flags: SaFlags) {
    let action = SigAction::new(SigHandler::Handler(handler), flags, SigSet::empty());
    // SAFETY: the handlers of this file touch atomics, or call what is async-signal-safe.
    unsafe { sigaction(SIGNAL, &action) }.unwrap();
}

/// For the thread of `task`, and nobody else.
pub fn send(task: &Task) {
    let (process, thread) = (getpid().as_raw(), task.tid());
    // SAFETY: takes no pointers.
    let answer = unsafe { libc::syscall(libc::SYS_tgkill, process, thread, SIGNAL as i32) };
    assert_eq!(answer, 0);
}

pub fn await_handled(times: u32) {
    wait_until(&format!("the handler runs for the {times}th time"), || HANDLED.load(SeqCst) == times);
}

/// Time enough for a handler that is not to run, and for the sweep that finds what no tracepoint tells.
fn assert_not_handled_beyond(times: u32) {
    for _ in 0..5 {
        assert!(stand_still(), "user code of a held worker ran");
    }
    assert_eq!(HANDLED.load(SeqCst), times, "the handler of a held worker ran");
}

fn set_mask(how: SigmaskHow) {
    let mut set = SigSet::empty();
    set.add(SIGNAL);
    pthread_sigmask(how, Some(&set), None).unwrap();
}

fn idle_server() {
    interrupt_idle_server(count);
}

/// A yield of the handler's own is not the wait that it interrupted.
fn yielding_handler() {
    extern "C" fn yield_and_count(signal: i32) {
        for _ in 0..3 {
            sched_yield();
        }
        count(signal);
    }
    interrupt_idle_server(yield_and_count);
}

fn interrupt_idle_server(handler: extern "C" fn(i32)) {
    static ENDED: AtomicBool = AtomicBool::new(false);

    handle(handler, SaFlags::empty());
    open(1);
    let server = spawn_server(|task| {
        assert_eq!(task.switch_to(0), 0);
        ENDED.store(true, SeqCst);
    });
    wait_until("it idles", || server.task.state() == RUNNABLE);
    for times in 1..=50 {
        send(server.task);
        await_handled(times);
        assert_eq!(HANDLED_BY.load(SeqCst), server.task.tid());
        sleep(Duration::from_millis(2));
        assert_state(server.task, RUNNABLE);
        assert!(!ENDED.load(SeqCst), "the wait was interrupted");
    }
    let before = cpu_ticks(server.task);
    sleep(Duration::from_millis(500));
    let ticks = cpu_ticks(server.task) - before;
    assert!(ticks < 20, "it does not sleep: {ticks} of 50 ticks");
    assert_eq!(api::kick(server.task.tid(), 0), 0);
    server.thread.join().unwrap();
}

/// CPU time of a task's thread, in hundredths of a second.
fn cpu_ticks(task: &Task) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/self/task/{}/stat", task.tid())).unwrap();
    // utime and stime, 14 and 15; the second field, in parentheses, may have spaces.
    let fields = stat.rsplit(')').next().unwrap().split_whitespace();
    fields.skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum()
}

fn serving_server() {
    static STOP: AtomicBool = AtomicBool::new(false);

    handle(count, SaFlags::empty());
    open(2);
    let server = spawn_server(|task| {
        let worker = spawn_worker(task.tid(), |_| {
            while !STOP.load(SeqCst) {
                STEPS.fetch_add(1, SeqCst);
            }
        });
        task.await_runnable(worker.task);
        task.run(worker.task);
        assert!(STOP.load(SeqCst), "the wait was interrupted");
        worker.thread.join().unwrap();
    });
    wait_until("it serves", || STEPS.load(SeqCst) > 0);
    for times in 1..=50 {
        send(server.task);
        await_handled(times);
        assert_eq!(HANDLED_BY.load(SeqCst), server.task.tid());
        let before = STEPS.load(SeqCst);
        wait_until("the worker goes on", || STEPS.load(SeqCst) > before);
        assert_state(server.task, RUNNABLE);
    }
    STOP.store(true, SeqCst);
    server.thread.join().unwrap();
}

fn wait_in_handler() {
    static ANSWER: AtomicI32 = AtomicI32::new(0);

    extern "C" fn wait(signal: i32) {
        ANSWER.store(api::wait(0, 0), SeqCst);
        count(signal);
    }
    handle(wait, SaFlags::empty());
    open(1);
    let server = spawn_server(|task| {
        assert_eq!(task.switch_to(0), 0);
        STEPS.fetch_add(1, SeqCst);
    });
    wait_until("it idles", || server.task.state() == RUNNABLE);
    sleep(Duration::from_millis(20)); // and is held
    for times in 1..=20 {
        send(server.task);
        await_handled(times);
        assert_eq!(ANSWER.swap(0, SeqCst), -libc::EDEADLK);
    }
    assert!(stand_still());
    assert_eq!(STEPS.load(SeqCst), 0, "the interrupted wait ended");
    assert_eq!(api::kick(server.task.tid(), 0), 0);
    server.thread.join().unwrap();
}

fn wait_in_handler_of_worker() {
    static ANSWER: AtomicI32 = AtomicI32::new(0);

    extern "C" fn wait(signal: i32) {
        ANSWER.store(api::wait(0, 0), SeqCst);
        count(signal);
    }
    handle(wait, SaFlags::empty());
    open(2);
    let server = become_server();
    let worker = spawn_worker(server.tid(), |task| assert_eq!(task.switch_to(0), 0));
    server.await_runnable(worker.task);
    server.run(worker.task);
    send(worker.task);
    assert_not_handled_beyond(0);
    run_to_end(server, worker);
    assert_eq!((HANDLED.load(SeqCst), ANSWER.load(SeqCst)), (1, -libc::EDEADLK));
    retire(server);
}

/// Signals come faster than the timeout for as long as the wait lasts: if they delayed it, it would never end.
fn timeout() {
    const TIMEOUT: Duration = Duration::from_millis(300);
    static STOP: AtomicBool = AtomicBool::new(false);

    handle(count, SaFlags::empty());
    open(1);
    let server = become_server();
    let sender = spawn(|| {
        while !STOP.load(SeqCst) {
            sleep(TIMEOUT / 20);
            send(server);
        }
    });
    let start = Instant::now();
    server.status.store(RUNNABLE, SeqCst);
    assert_eq!(api::wait(TIMEOUT.as_nanos() as u64, 0), -libc::ETIMEDOUT);
    assert!(start.elapsed() >= TIMEOUT);
    let handled = HANDLED.load(SeqCst);
    STOP.store(true, SeqCst);
    sender.join().unwrap();
    println!("{handled} handlers during the wait");
    assert!(handled > 0, "no handler interrupted the wait");
    retire(server);
}

fn running() {
    handle(count, SaFlags::empty());
    open(2);
    let server = become_server();
    let worker = spawn_worker(server.tid(), |task| {
        spin_until("the handler runs", || HANDLED.load(SeqCst) == 1);
        assert_state(task, RUNNING);
        assert_eq!(HANDLED_BY.load(SeqCst), task.tid());
    });
    server.await_runnable(worker.task);
    let task = worker.task;
    let sender = spawn(move || {
        wait_until("it runs", || task.state() == RUNNING);
        send(task);
    });
    server.run(task);
    sender.join().unwrap();
    assert_state(task, NONE);
    assert!(server.take(List::Runnable).is_empty());
    worker.thread.join().unwrap();
    retire(server);
}

/// A worker of each kind that waits, taken from all lists; each counts one step when it is run.
pub fn held_workers(server: &Task) -> Vec<Worker> {
    let step = || _ = STEPS.fetch_add(1, SeqCst);
    let fresh = spawn_worker(server.tid(), move |_| step());
    server.await_runnable(fresh.task);
    let waiting = spawn_worker(server.tid(), move |task| {
        assert_eq!(task.switch_to(0), 0);
        step();
    });
    server.await_runnable(waiting.task);
    server.run(waiting.task);
    let (mut wake, mut theirs) = UnixStream::pair().unwrap();
    let captured = spawn_worker(server.tid(), move |_| {
        theirs.read_exact(&mut [0]).unwrap();
        step();
    });
    server.await_runnable(captured.task);
    server.run(captured.task);
    assert_only(captured.task, &server.take(List::Blocked));
    wake.write_all(&[0]).unwrap();
    server.await_runnable(captured.task);
    let preempted = spawn_worker(server.tid(), move |task| {
        task.status.fetch_or(UMCG_TF_PREEMPT, SeqCst);
        spin_until("preempted", || task.status.load(SeqCst) & UMCG_TF_PREEMPT == 0);
        step();
    });
    server.await_runnable(preempted.task);
    server.run(preempted.task);
    assert_only(preempted.task, &server.take(List::Runnable));
    vec![fresh, waiting, captured, preempted]
}

fn lists_are_empty(server: &Task) -> bool {
    server.take(List::Blocked).is_empty() && server.take(List::Runnable).is_empty()
}

fn held() {
    handle(count, SaFlags::empty());
    open(8);
    let server = become_server();
    let workers = held_workers(server);
    for worker in &workers {
        send(worker.task);
        assert_not_handled_beyond(0);
        assert_state(worker.task, RUNNABLE);
    }
    assert!(lists_are_empty(server), "a signal is no event");
    for (times, worker) in (1..).zip(workers) {
        server.run(worker.task);
        assert_state(worker.task, NONE);
        assert_eq!((HANDLED.load(SeqCst), STEPS.load(SeqCst)), (times, times.into()));
        assert_eq!(HANDLED_BY.load(SeqCst), worker.task.tid());
        worker.thread.join().unwrap();
    }
    retire(server);
}

fn blocked() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    handle(count, SaFlags::empty());
    open(2);
    let server = become_server();
    let worker = spawn_worker(server.tid(), move |_| {
        let error = theirs.read(&mut [0]).unwrap_err();
        assert_eq!(HANDLED.load(SeqCst), 1, "the code behind the system call ran first");
        assert_eq!(error.kind(), ErrorKind::Interrupted);
        STEPS.fetch_add(1, SeqCst);
    });
    server.await_runnable(worker.task);
    server.run(worker.task);
    assert_only(worker.task, &server.take(List::Blocked));
    send(worker.task);
    server.await_runnable(worker.task);
    assert_not_handled_beyond(0);
    assert_state(worker.task, RUNNABLE);
    server.run(worker.task);
    assert_eq!((HANDLED.load(SeqCst), STEPS.load(SeqCst)), (1, 1));
    worker.thread.join().unwrap();
    drop(ours);
    retire(server);
}

fn restarted() {
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    handle(count, SaFlags::SA_RESTART);
    open(2);
    let server = become_server();
    let worker = spawn_worker(server.tid(), move |_| {
        theirs.read_exact(&mut [0]).unwrap();
        STEPS.fetch_add(1, SeqCst);
    });
    server.await_runnable(worker.task);
    server.run(worker.task);
    for times in 1..=20 {
        assert_only(worker.task, &server.take(List::Blocked));
        assert_state(worker.task, BLOCKED);
        send(worker.task);
        server.await_runnable(worker.task);
        assert_eq!(HANDLED.load(SeqCst), times - 1);
        server.run(worker.task); // the handler, then the system call again
        assert_eq!((HANDLED.load(SeqCst), STEPS.load(SeqCst)), (times, 0));
    }
    assert_only(worker.task, &server.take(List::Blocked));
    ours.write_all(&[0]).unwrap();
    server.await_runnable(worker.task);
    server.run(worker.task);
    assert_eq!(STEPS.load(SeqCst), 1);
    worker.thread.join().unwrap();
    retire(server);
}

fn send_to_process() {
    kill(Pid::this(), SIGNAL).unwrap();
}

fn process_worker() {
    handle(count, SaFlags::empty());
    set_mask(SigmaskHow::SIG_BLOCK);
    open(8);
    let server = become_server();
    let others = held_workers(server);
    let worker = spawn_worker_in(
        server.tid(),
        || set_mask(SigmaskHow::SIG_UNBLOCK),
        |_| _ = STEPS.fetch_add(1, SeqCst),
    );
    server.await_runnable(worker.task);
    send_to_process();
    assert_not_handled_beyond(0);
    assert!(lists_are_empty(server));
    server.run(worker.task);
    assert_eq!((HANDLED.load(SeqCst), STEPS.load(SeqCst)), (1, 1));
    assert_eq!(HANDLED_BY.load(SeqCst), worker.task.tid());
    worker.thread.join().unwrap();
    for worker in others {
        server.run(worker.task);
        worker.thread.join().unwrap();
    }
    retire(server);
}

fn process_server() {
    handle(count, SaFlags::empty());
    set_mask(SigmaskHow::SIG_BLOCK);
    open(8);
    let server = become_server();
    let others = held_workers(server);
    let idle = spawn_server(|task| {
        set_mask(SigmaskHow::SIG_UNBLOCK);
        assert_eq!(task.switch_to(0), 0);
        STEPS.fetch_add(1, SeqCst);
    });
    wait_until("it idles", || idle.task.state() == RUNNABLE);
    for times in 1..=20 {
        send_to_process();
        await_handled(times);
        assert_eq!(HANDLED_BY.load(SeqCst), idle.task.tid());
        assert!(stand_still());
    }
    // The next one before anybody can have seen that the last one was taken.
    for times in 21..=500 {
        send_to_process();
        await_handled(times);
    }
    assert_eq!(STEPS.load(SeqCst), 0);
    assert_eq!(api::kick(idle.task.tid(), 0), 0);
    idle.thread.join().unwrap();
    for worker in others {
        server.run(worker.task);
        worker.thread.join().unwrap();
    }
    retire(server);
}

/// A worker reads its status in its handler and in its code: not RUNNING is a miss. So it is not for a handler that comes
/// after the worker's own mark and before the system call: that runs at once, as the rest of the worker does.
fn storm() {
    static MISSES: AtomicU64 = AtomicU64::new(0);
    static STOP: AtomicBool = AtomicBool::new(false);
    static MARKS_ITSELF: AtomicBool = AtomicBool::new(false);
    static EARLY: AtomicU64 = AtomicU64::new(0);
    const ROUNDS: u64 = 300;

    fn look(task: &Task) {
        if task.state() != RUNNING {
            MISSES.fetch_add(1, SeqCst);
        }
    }
    extern "C" fn look_and_count(signal: i32) {
        // SAFETY: structs of the domain live as long as the process; the library gives the caller's, or null.
        if let Some(me) = unsafe { api::current().cast::<Task>().as_ref() } {
            if MARKS_ITSELF.load(SeqCst) {
                EARLY.fetch_add(u64::from(me.state() != RUNNING), SeqCst);
            } else {
                look(me);
            }
        }
        count(signal);
    }
    handle(look_and_count, SaFlags::SA_RESTART);
    open(4);
    let counters = Counters::now();
    let server = become_server();
    let worker = spawn_worker(server.tid(), |task| {
        while !STOP.load(SeqCst) {
            STEPS.fetch_add(1, SeqCst);
            match STEPS.load(SeqCst) % 3 {
                0 => sleep(Duration::from_micros(300)),
                1 => {
                    MARKS_ITSELF.store(true, SeqCst);
                    assert_eq!(task.switch_to(0), 0);
                    MARKS_ITSELF.store(false, SeqCst);
                }
                _ => (0..1000).for_each(|_| look(task)),
            }
            look(task);
        }
    });
    server.await_runnable(worker.task);
    let task = worker.task;
    let sender = spawn(move || {
        while !STOP.load(SeqCst) {
            send(task);
            sleep(Duration::from_micros(200));
        }
    });
    for _ in 0..ROUNDS {
        server.run(task);
        if !server.take(List::Blocked).is_empty() {
            server.await_runnable(task);
        }
        assert_state(task, RUNNABLE);
        assert!(stood_still(), "user code of a held worker ran");
    }
    // The worker is held, so its thread is there for all that is sent.
    STOP.store(true, SeqCst);
    sender.join().unwrap();
    while task.state() != NONE {
        server.run(task);
        if !server.take(List::Blocked).is_empty() {
            server.await_runnable(task);
        }
    }
    println!(
        "{} handlers, {} of them just before a wait, {} steps",
        HANDLED.load(SeqCst),
        EARLY.load(SeqCst),
        STEPS.load(SeqCst)
    );
    assert_eq!(MISSES.load(SeqCst), 0, "user code ran when it was not RUNNING");
    println!("{} held tasks let go for a signal", counters.added("signal_releases"));
    worker.thread.join().unwrap();
    retire(server);
}

/// Each signal asks for a sweep of all slots; there is one a millisecond at most.
/// From all CPUs at once. Nor do the sweeps end, on which everybody's held tasks depend.
fn flood() {
    const SIGNALS: u32 = 10_000;

    open(1);
    let server = become_server();
    // SAFETY: changes the disposition of a signal that nothing here uses.
    unsafe { signal(Signal::SIGUSR2, SigHandler::SigIgn) }.unwrap();
    let started = Instant::now();
    let counters = Counters::now();
    let flooders: Vec<_> = (0..2 * nr_cpus())
        .map(|_| spawn(|| (0..SIGNALS).for_each(|_| kill(getpid(), Signal::SIGUSR2).unwrap())))
        .collect();
    flooders.into_iter().for_each(|flooder| flooder.join().unwrap());
    let sweeps = counters.added("sweeps");
    let ms = started.elapsed().as_millis() as u64;
    println!("{} times {SIGNALS} signals, {ms} ms, {sweeps} sweeps", 2 * nr_cpus());
    assert!(sweeps <= ms + 1, "more than one sweep a millisecond");
    assert!(sweeps >= ms / 100, "hardly a sweep"); // in peace there is one every 20 ms
    retire(server);
}

/// A short look: `stand_still` takes 20 ms.
fn stood_still() -> bool {
    let now = || (STEPS.load(SeqCst), HANDLED.load(SeqCst));
    let before = now();
    sleep(Duration::from_micros(700));
    now() == before
}

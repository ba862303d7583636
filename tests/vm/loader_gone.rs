// SPDX-License-Identifier: GPL-2.0-only
//! The loader ends while a program runs: every wait of a server ends, the program knows, and goes on with futexes.
//!
//! The failure this guards against: threads that wait for a scheduler that is not there any more.

use std::collections::VecDeque;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::thread::{JoinHandle, sleep};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use umcg::raw::{UMCG_TF_PREEMPT, UMCG_WAIT_ENQUEUE};

use crate::api::{self, BLOCKED, NONE, RUNNABLE, RUNNING};
use crate::cast::{
    List, Task, Worker, become_server, become_worker, retire, scaled, sched_yield, spawn, spawn_server,
    spawn_worker, spin_until, wait_until,
};
use crate::harness::{Loader, Test};
use crate::loader::EJECTED;
use crate::scene::{assert_blocks_are_seen, assert_only, assert_state};
use crate::stall::{STALLED, stall};
use crate::stress::Dice;

pub const TESTS: &[Test] = &[
    Test::new("a_program_survives_sigkill_of_its_loader", || everything(&[], sigkill)).own_loader(),
    Test::new("a_program_survives_sigterm_of_its_loader", || everything(&[], sigterm)).own_loader(),
    Test::new("a_program_survives_the_ejection_of_the_scheduler", || everything(&[], eject))
        .own_loader()
        .expects_in_log(EJECTED),
    Test::new("a_program_survives_a_stall_that_ejects_the_scheduler", || {
        everything(&["--watchdog", "5"], stall)
    })
    .own_loader()
    .expects_in_log(STALLED),
    Test::new("a_program_may_open_again_while_it_has_tasks_of_before", open_again).own_loader(),
    Test::new("who_ends_after_the_ejection_is_on_no_list", ended_after).own_loader().expects_in_log(EJECTED),
    Test::new("nobody_hangs_after_sigkill_of_the_loader_under_load", || under_load(sigkill, 100))
        .own_loader()
        .limit_s(3000),
    Test::new("nobody_hangs_after_the_ejection_under_load", || under_load(eject, 20))
        .own_loader()
        .limit_s(1200)
        .expects_in_log(EJECTED),
];

fn sigkill(mut loader: Loader) {
    kill(Pid::from_raw(loader.pid()), Signal::SIGKILL).unwrap();
    assert_eq!(loader.wait().code(), None);
}

fn sigterm(mut loader: Loader) {
    kill(Pid::from_raw(loader.pid()), Signal::SIGTERM).unwrap();
    assert_eq!(loader.wait().code(), Some(0));
}

fn eject(mut loader: Loader) {
    fs::write("/proc/sysrq-trigger", "S").unwrap();
    assert_eq!(loader.wait().code(), Some(2));
}

fn open_at(loader: &Loader, max_tasks: u32) {
    assert_eq!(api::open(Some(&loader.socket), max_tasks, 0), 0);
    assert_eq!(api::backend(), "sched_ext");
}

/// The kernel takes a scheduler away in its own time.
fn await_futex() {
    wait_until("the program knows", || api::backend() == "futex");
}

/// Steps of workers that go on.
static STEPS: AtomicU32 = AtomicU32::new(0);
static STOP: AtomicBool = AtomicBool::new(false);

fn step() {
    STEPS.fetch_add(1, SeqCst);
}

/// The tasks of a program, in every state, but for its RUNNING server.
struct Program {
    fresh: Worker,
    waiting: Worker,
    captured: Worker,
    /// By the flag, and by its own plain yield.
    stopped: [Worker; 2],
    blocked: Worker,
    wake: UnixStream,
    /// Without a timeout, and with one.
    idle: [Worker; 2],
    serving: Worker,
}

impl Program {
    fn start(server: &'static Task) -> Self {
        let (wake, mut theirs) = UnixStream::pair().unwrap();
        let fresh = spawn_worker(server.tid(), |_| step());
        server.await_runnable(fresh.task);
        let waiting = spawn_worker(server.tid(), |task| {
            for _ in 0..10 {
                assert_eq!(task.switch_to(0), 0);
                assert_state(task, RUNNING);
                step();
            }
        });
        server.await_runnable(waiting.task);
        server.run(waiting.task);
        let (mut end, mut sleep) = UnixStream::pair().unwrap();
        let captured = spawn_worker(server.tid(), move |_| {
            sleep.read_exact(&mut [0]).unwrap();
            step();
        });
        server.await_runnable(captured.task);
        server.run(captured.task);
        assert_only(captured.task, &server.take(List::Blocked));
        end.write_all(&[0]).unwrap();
        server.await_runnable(captured.task);
        let stopped = [preempt_myself, sched_yield].map(|stop| {
            let worker = spawn_worker(server.tid(), move |_| {
                stop();
                step();
            });
            server.await_runnable(worker.task);
            server.run(worker.task);
            assert_only(worker.task, &server.take(List::Runnable));
            worker
        });
        let blocked = spawn_worker(server.tid(), move |_| {
            theirs.read_exact(&mut [0]).unwrap();
            step();
        });
        server.await_runnable(blocked.task);
        server.run(blocked.task);
        assert_state(blocked.task, BLOCKED);
        let (idle, serving) = ([0, AN_HOUR_NS].map(spawn_idle), spawn_serving());
        for task in [idle[0].task, idle[1].task, serving.task] {
            wait_until("the servers wait", || task.state() == RUNNABLE);
        }
        assert_eq!(STEPS.load(SeqCst), 0);
        Self { fresh, waiting, captured, stopped, blocked, wake, idle, serving }
    }
}

const AN_HOUR_NS: u64 = 3_600_000_000_000;

fn preempt_myself() {
    // SAFETY: structs of the domain live as long as the process; the caller is a task.
    let me = unsafe { &*api::current().cast::<Task>() };
    me.status.fetch_or(UMCG_TF_PREEMPT, SeqCst);
    spin_until("it is preempted", || me.status.load(SeqCst) & UMCG_TF_PREEMPT == 0);
}

fn spawn_idle(timeout_ns: u64) -> Worker {
    spawn_server(move |task| {
        task.status.store(RUNNABLE, SeqCst);
        assert_eq!(api::wait(timeout_ns, 0), 0);
        assert_state(task, RUNNING);
        assert_eq!(api::backend(), "futex");
    })
}

fn spawn_serving() -> Worker {
    spawn_server(|task| {
        let worker = spawn_worker(task.tid(), |_| {
            while !STOP.load(SeqCst) {
                std::hint::spin_loop();
            }
        });
        task.await_runnable(worker.task);
        task.run(worker.task);
        assert_state(task, RUNNING);
        assert_eq!(api::backend(), "futex");
        STOP.store(true, SeqCst);
        worker.thread.join().unwrap();
    })
}

fn everything(args: &[&str], end: fn(Loader)) {
    let loader = Loader::start(args);
    open_at(&loader, 17);
    let server = become_server();
    let mut program = Program::start(server);
    sleep(Duration::from_millis(50));
    assert_eq!(STEPS.load(SeqCst), 0);
    end(loader);

    await_futex();
    for server in program.idle.into_iter().chain([program.serving]) {
        server.thread.join().unwrap();
    }
    // The kernel let go of them, and then their threads ended: exclusivity is lost, but not the threads.
    for worker in program.stopped.into_iter().chain([program.captured]) {
        worker.thread.join().unwrap();
    }
    assert_eq!(STEPS.load(SeqCst), 3);
    program.wake.write_all(&[0]).unwrap();
    program.blocked.thread.join().unwrap();
    assert_eq!(STEPS.load(SeqCst), 4);
    assert_blocks_are_not_seen(server);
    // Those that wait are still waiting, and their server can still run them.
    server.take(List::Runnable);
    for steps in 5..=14 {
        assert_state(program.waiting.task, RUNNABLE);
        server.run(program.waiting.task);
        assert_eq!(STEPS.load(SeqCst), steps);
    }
    program.waiting.thread.join().unwrap();
    server.run(program.fresh.task);
    program.fresh.thread.join().unwrap();
    assert_eq!(STEPS.load(SeqCst), 15);
    // A newcomer is served as well.
    let late = spawn_worker(server.tid(), |task| assert_eq!(task.switch_to(0), 0));
    server.await_runnable(late.task);
    for _ in 0..2 {
        server.run(late.task);
    }
    late.thread.join().unwrap();
    retire(server);
    assert_eq!(api::close(), 0);
    assert_eq!(api::backend(), "none");

    let loader = Loader::start(&[]);
    open_at(&loader, 4);
    assert_blocks_are_seen();
    assert_eq!(api::close(), 0);
}

/// A worker that sleeps stays RUNNING, and its server waits until it is back.
fn assert_blocks_are_not_seen(server: &'static Task) {
    let (mut wake, mut sleep) = UnixStream::pair().unwrap();
    let worker = spawn_worker(server.tid(), move |_| sleep.read_exact(&mut [0]).unwrap());
    let task = worker.task;
    wait_until("it is announced", || server.runnable_ptr.load(SeqCst) == task.as_ptr().addr() as u64);
    server.take(List::Runnable);
    server.take(List::Blocked); // those of before
    let waker = spawn(move || {
        let stat = format!("/proc/self/task/{}/stat", task.tid());
        let sleeps = || fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") S "));
        wait_until("it runs", || task.state() == RUNNING);
        wait_until("it sleeps", sleeps);
        assert_eq!((task.state(), server.state()), (RUNNING, RUNNABLE));
        wake.write_all(&[0]).unwrap();
    });
    server.run(task);
    assert_state(task, NONE);
    assert!(server.take(List::Blocked).is_empty(), "a block was reported");
    for thread in [waker, worker.thread] {
        thread.join().unwrap();
    }
}

fn open_again() {
    let loader = Loader::start(&[]);
    open_at(&loader, 4);
    let server = become_server();
    let worker = spawn_worker(server.tid(), |task| {
        for _ in 0..2 {
            assert_eq!(task.switch_to(0), 0);
            step();
        }
    });
    server.await_runnable(worker.task);
    server.run(worker.task);
    assert_eq!(api::open(Some(&loader.socket), 4, 0), -libc::EALREADY);
    sigkill(loader);

    let loader = Loader::start(&[]);
    let newcomer = || {
        open_at(&loader, 4);
        assert_blocks_are_seen();
    };
    std::thread::scope(|scope| scope.spawn(newcomer).join().unwrap());
    await_futex(); // for a task of before
    // The tasks of before go on as they were left.
    for steps in 1..=2 {
        server.run(worker.task);
        assert_eq!(STEPS.load(SeqCst), steps);
    }
    worker.thread.join().unwrap();
    retire(server);
    assert_eq!(api::close(), 0);
}

/// The loader is stopped, so that its programs stay attached: they must leave to the library what is the library's now.
fn ended_after() {
    let loader = Loader::start(&[]);
    open_at(&loader, 4);
    let server = become_server();
    let worker = spawn_worker(server.tid(), |task| assert_eq!(task.switch_to(0), 0));
    server.await_runnable(worker.task);
    server.run(worker.task);
    kill(Pid::from_raw(loader.pid()), Signal::SIGSTOP).unwrap();
    fs::write("/proc/sysrq-trigger", "S").unwrap();
    await_futex();

    let thread = format!("/proc/self/task/{}", worker.task.tid());
    server.run(worker.task);
    worker.thread.join().unwrap();
    wait_until("its thread is gone", || !Path::new(&thread).exists());
    sleep(Duration::from_millis(100)); // some rounds of the sweep
    assert!(server.take(List::Runnable).is_empty(), "reported by two");
    kill(Pid::from_raw(loader.pid()), Signal::SIGCONT).unwrap();
    retire(server);
}

pub const SERVERS: usize = 2;
const WORKERS: usize = 10;
/// Of each worker.
const ROUNDS: u32 = 300;

/// Workers sleep, so that no event of theirs wakes a server that nothing else has woken.
static PAUSE: AtomicBool = AtomicBool::new(false);

/// The scheduler goes at any moment, from before the first task has registered. Every server hears of it by itself, and all
/// of the work is done.
fn under_load(end: fn(Loader), times: u32) {
    let mut dice = Dice(u64::from(times));
    for _ in 0..scaled(times) {
        let loader = Loader::start(&[]);
        open_at(&loader, 32);
        let groups: Vec<_> = (0..SERVERS).map(|_| Group::start()).collect();
        sleep(Duration::from_micros(dice.below(200_000)));
        end(loader);
        PAUSE.store(true, SeqCst);
        await_futex();
        for group in &groups {
            let knows = || group.server.user_data.load(SeqCst) == KNOWS;
            wait_until("every server knows", || knows() || group.server.state() == NONE);
        }
        PAUSE.store(false, SeqCst);
        groups.into_iter().for_each(Group::join);
        all_work_is_done();
        assert_eq!(api::close(), 0);
    }
}

/// Of all groups together.
pub fn all_work_is_done() {
    assert_eq!(STEPS.swap(0, SeqCst), (SERVERS * WORKERS) as u32 * ROUNDS, "work was lost");
}

/// A server and its workers.
pub struct Group {
    server: &'static Task,
    threads: Vec<JoinHandle<()>>,
}

impl Group {
    pub fn start() -> Self {
        let tasks: Vec<_> = (0..WORKERS).map(|_| Task::alloc()).collect();
        let theirs = tasks.clone();
        let server = spawn_server(move |task| serve(task, &theirs));
        let host = server.task.tid();
        let work = |(nr, task): (usize, &'static Task)| spawn(move || work(nr, task, host));
        let threads = tasks.into_iter().enumerate().map(work).chain([server.thread]).collect();
        Self { server: server.task, threads }
    }

    pub fn join(self) {
        for thread in self.threads {
            thread.join().unwrap();
        }
    }
}

/// A worker's user data once it has registered and ended; before it registers its status is NONE, too.
const ENDED: u64 = 1;
/// A server's, once it has been in its loop with the futex back end.
const KNOWS: u64 = 1;

/// Sleeps, computes, yields and waits by turns. A worker that was let go ends without being run, so each says that it has ended.
fn work(nr: usize, task: &'static Task, host: u32) {
    become_worker(task, host);
    for round in 0..ROUNDS {
        while PAUSE.load(SeqCst) {
            sleep(Duration::from_millis(1));
        }
        match (nr as u32 + round) % 4 {
            0 => sleep(Duration::from_micros(200)),
            1 => (0..2000).for_each(|_| std::hint::spin_loop()),
            2 => std::thread::yield_now(),
            _ => {
                task.status.store(RUNNABLE, SeqCst);
                let answer = api::wait(0, UMCG_WAIT_ENQUEUE);
                assert_eq!(answer, 0, "back end {}, in round {round}", api::backend());
            }
        }
        step();
    }
    retire(task);
    task.user_data.store(ENDED, SeqCst);
    let answer = api::kick(host, 0);
    assert!([0, -libc::ESRCH].contains(&answer), "{answer}"); // the server may have seen it, and be gone
}

/// First in, first out, until all workers have ended. Once exclusivity is lost, one that is let go may be in the queue and
/// on the list, or RUNNING, or gone: then its turn fails, and is forgotten.
fn serve(me: &'static Task, workers: &[&'static Task]) {
    let mut queue = VecDeque::new();
    loop {
        if api::backend() == "futex" {
            me.user_data.store(KNOWS, SeqCst);
        }
        me.status.store(RUNNABLE, SeqCst);
        me.take(List::Blocked);
        queue.extend(me.take(List::Runnable));
        if workers.iter().all(|worker| worker.user_data.load(SeqCst) == ENDED) {
            me.status.store(RUNNING, SeqCst);
            return;
        }
        let next = queue.pop_front();
        me.next_tid.store(next.map_or(0, |task: &Task| task.tid()), SeqCst);
        let answer = api::wait(0, 0);
        if answer != 0 {
            assert!([-libc::EBUSY, -libc::ESRCH].contains(&answer), "{answer}");
            await_futex(); // exclusivity is lost a moment before the program can know
        } else if me.next_tid.load(SeqCst) != 0 {
            queue.extend(next);
        }
    }
}

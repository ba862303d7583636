// SPDX-License-Identifier: GPL-2.0-only
//! A process that dies leaves nothing behind, in whatever states its tasks are.
//!
//! The failure this guards against: a held task is runnable, so a fatal signal does not wake it; nobody runs it, and the
//! process is a zombie for ever, with its domain.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering::SeqCst;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, execv, fork};

use crate::api::{BLOCKED, RUNNABLE, RUNNING};
use crate::cast::{List, Task, become_server, open, scaled, spawn_server, spawn_worker, wait_until};
use crate::harness::{Test, stat, where_it_hangs};

pub const TESTS: &[Test] = &[
    Test::new("sigkill_of_100_tasks_in_every_state_leaves_nothing", sigkill).limit_s(1200),
    Test::new("exit_group_of_100_tasks_in_every_state_leaves_nothing", exit_group).limit_s(300),
    Test::new("exec_beside_100_tasks_in_every_state_leaves_nothing", exec).limit_s(300),
    Test::new("sigsegv_of_100_tasks_in_every_state_leaves_nothing", sigsegv).limit_s(300),
    Test::new("a_core_dump_of_100_tasks_in_every_state_leaves_nothing", core_dump).limit_s(300),
];

/// How the child of a round ends, by itself.
#[derive(Clone, Copy)]
enum End {
    /// Not at all.
    Never,
    ExitGroup,
    Exec,
    Segv,
    CoreDump,
}

fn sigkill() {
    rounds(scaled(500), End::Never);
}

fn exit_group() {
    rounds(5, End::ExitGroup);
}

fn exec() {
    rounds(5, End::Exec);
}

fn sigsegv() {
    rounds(5, End::Segv);
}

fn core_dump() {
    setrlimit(Resource::RLIMIT_CORE, RLIM_INFINITY, RLIM_INFINITY).unwrap();
    rounds(5, End::CoreDump);
}

fn rounds(rounds: u32, end: End) {
    let mut worst = Duration::ZERO;
    for round in 0..rounds {
        worst = worst.max(one_round(end, jitter(round)));
    }
    println!("{rounds} rounds; the longest end of a process took {} ms", worst.as_millis());
}

/// Up to 20 ms, different each time.
fn jitter(round: u32) -> Duration {
    Duration::from_micros(u64::from(round.wrapping_mul(7919) % 20_000))
}

/// A child with 100 tasks, ended after a moment; how long its end took.
fn one_round(end: End, moment: Duration) -> Duration {
    let (mut ready, tell) = UnixStream::pair().unwrap();
    // SAFETY: this process has one thread, so the child may do what it likes.
    let child = match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            drop(ready);
            become_hundred_tasks(tell, end)
        }
        ForkResult::Parent { child } => child,
    };
    drop(tell);
    ready.read_exact(&mut [0]).expect("the child failed");
    sleep(moment);
    let start = Instant::now();
    let expected = match end {
        End::Never => {
            kill(child, Signal::SIGKILL).unwrap();
            WaitStatus::Signaled(child, Signal::SIGKILL, false)
        }
        End::ExitGroup | End::Exec => WaitStatus::Exited(child, 0),
        End::Segv => WaitStatus::Signaled(child, Signal::SIGSEGV, false),
        End::CoreDump => WaitStatus::Signaled(child, Signal::SIGSEGV, true),
    };
    drop(ready); // the child's own end waits for this
    assert_eq!(reap(child), expected);
    let took = start.elapsed();
    wait_until("the loader has nothing left of it", || stat("nr_tasks") == 0 && stat("nr_domains") == 0);
    took
}

fn reap(child: Pid) -> WaitStatus {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match waitpid(child, Some(WaitPidFlag::WNOHANG)).unwrap() {
            WaitStatus::StillAlive => sleep(Duration::from_millis(1)),
            status => return status,
        }
        let threads = || where_it_hangs(child.as_raw().cast_unsigned());
        assert!(Instant::now() < deadline, "the process does not end:\n{}", threads());
    }
}

/// In the child: becomes a process with 100 tasks in all states, says so, and waits for the end.
fn become_hundred_tasks(mut tell: UnixStream, end: End) -> ! {
    let mut end_cue = tell.try_clone().unwrap();
    open(100);
    let server = become_server();
    let idle: Vec<_> = (0..10).map(|_| idle_server()).collect();
    spawn_workers(server, 20, BLOCKED, read_nothing);
    spawn_workers(server, 20, BLOCKED, sleep_long);
    for _ in 0..15 {
        captured_worker(server);
    }
    spawn_workers(server, 14, RUNNABLE, wait);
    for _ in 0..10 {
        let fresh = spawn_worker(server.tid(), |_| unreachable!("nobody runs it"));
        server.await_runnable(fresh.task);
    }
    wait_until("servers wait", || idle.iter().all(|task| task.state() == RUNNABLE));
    let busy: Vec<_> = (0..5).map(|_| serving_server()).collect();
    wait_until("servers serve", || busy.iter().all(|task| task.state() == RUNNABLE));

    std::thread::spawn(move || {
        let _ = end_cue.read(&mut [0]);
        match end {
            End::Never => (),
            // SAFETY: ends the process.
            End::ExitGroup => unsafe { libc::_exit(0) },
            End::Exec => _ = execv(c"/bin/true", &[c"true"]),
            // SAFETY: so does this, once the handler is gone that Rust has for stack overflows.
            End::Segv | End::CoreDump => unsafe {
                libc::signal(libc::SIGSEGV, libc::SIG_DFL);
                libc::raise(libc::SIGSEGV);
            },
        }
    });
    tell.write_all(&[0]).unwrap();
    server.switch_to(0);
    unreachable!("nothing happens to a server whose workers are all blocked, held, or known");
}

/// `count` workers that each go into `state` in `body`, and stay there.
fn spawn_workers(server: &Task, count: usize, state: u32, body: fn(&Task)) {
    for _ in 0..count {
        let worker = spawn_worker(server.tid(), move |task| {
            body(task);
            unreachable!("nobody runs it again");
        });
        server.await_runnable(worker.task);
        run_into(server, worker.task, state);
    }
}

/// A worker says that the place where it is to stay comes next; it may block before, for the C library's locks.
fn here(task: &Task) {
    task.user_data.store(1, SeqCst);
}

/// Runs `worker` until it is `here`.
fn run_into(server: &Task, worker: &Task, state: u32) {
    loop {
        server.run(worker);
        server.take(List::Blocked);
        if worker.user_data.load(SeqCst) == 1 {
            break;
        }
        server.await_runnable(worker);
    }
    assert_eq!(worker.state(), state);
}

fn read_nothing(task: &Task) {
    let (_ours, mut theirs) = UnixStream::pair().unwrap();
    here(task);
    let _ = theirs.read(&mut [0]);
}

fn sleep_long(task: &Task) {
    here(task);
    sleep(Duration::from_secs(1000));
}

fn wait(task: &Task) {
    here(task);
    task.switch_to(0);
}

fn captured_worker(server: &Task) {
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    let worker = spawn_worker(server.tid(), move |task| {
        here(task);
        let _ = theirs.read(&mut [0]);
        unreachable!("nobody runs it again");
    });
    server.await_runnable(worker.task);
    run_into(server, worker.task, BLOCKED);
    ours.write_all(&[0]).unwrap();
    server.await_runnable(worker.task);
}

fn idle_server() -> &'static Task {
    spawn_server(|task| _ = task.switch_to(0)).task
}

/// Serves a worker that computes for ever.
fn serving_server() -> &'static Task {
    let server = spawn_server(|task| {
        let worker = spawn_worker(task.tid(), |task| {
            here(task);
            loop {
                std::hint::spin_loop();
            }
        });
        task.await_runnable(worker.task);
        run_into(task, worker.task, RUNNING);
    });
    server.task
}

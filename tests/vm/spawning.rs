// SPDX-License-Identifier: GPL-2.0-only
//! A task starts a program by vfork(2) or posix_spawn(3): it sleeps in the kernel until its child has let go of the
//! address space that they share.
//!
//! The failures this guards against: the child is taken for the task whose memory and thread-local storage it has; its
//! exec or exit ends its parent's registration; the parent that waits is not seen to be blocked.

use std::ffi::c_void;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicI32};

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::api::{self, RUNNABLE, RUNNING};
use crate::cast::{List, become_server, open, retire, serve_fifo, spawn, spawn_worker, wait_until};
use crate::harness::{Counters, Test, stat};
use crate::scene::{Scene, assert_only, assert_state, lists_are_empty, run_to_end, stand_still};

pub const TESTS: &[Test] = &[
    Test::new("a_worker_in_vfork_is_blocked_until_its_child_lets_go", worker_in_vfork),
    Test::new("a_server_in_vfork_stays_running_and_serves_on", server_in_vfork),
    Test::new("workers_and_servers_spawn_programs", programs),
];

/// The child of the last vfork; 0 before.
static CHILD: AtomicI32 = AtomicI32::new(0);
/// The descriptor that the child reads from before it ends.
static CUE: AtomicI32 = AtomicI32::new(-1);
static CHILD_RUNS: AtomicBool = AtomicBool::new(false);

/// In the child: memory and thread-local storage are its parent's, so nothing but system calls and atomics.
extern "C" fn child(_: *mut c_void) -> i32 {
    let mut byte = 0_u8;
    CHILD_RUNS.store(true, SeqCst);
    // SAFETY: reads one byte into a local.
    let length = unsafe { libc::read(CUE.load(SeqCst), (&raw mut byte).cast(), 1) };
    i32::from(length != 1)
}

/// Returns once the child, which has a stack of its own, has ended.
fn vfork() {
    const STACK: usize = 64 << 10;

    let mut stack = vec![1_u8; STACK];
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: the stack is the child's alone until it has ended, and that is when this returns.
    let child = unsafe {
        let top = stack.as_mut_ptr().add(STACK).cast();
        libc::clone(child, top, flags, std::ptr::null_mut())
    };
    assert!(child > 0, "{}", std::io::Error::last_os_error());
    CHILD.store(child, SeqCst);
}

fn assert_child_was_well() {
    let child = Pid::from_raw(CHILD.load(SeqCst));
    assert_eq!(waitpid(child, None), Ok(WaitStatus::Exited(child, 0)));
}

fn worker_in_vfork() {
    let (mut cue, theirs) = UnixStream::pair().unwrap();
    CUE.store(theirs.as_raw_fd(), SeqCst);
    let scene = Scene::until_blocked(vfork);
    wait_until("the child runs", || CHILD_RUNS.load(SeqCst));
    assert_eq!(stat("nr_tasks"), 2, "the child is a task");
    scene.assert_lasts();
    cue.write_all(&[0]).unwrap();
    scene.assert_captured();
    assert_child_was_well();
}

fn server_in_vfork() {
    let (mut cue, theirs) = UnixStream::pair().unwrap();
    CUE.store(theirs.as_raw_fd(), SeqCst);
    open(3);
    let server = become_server();
    let worker = spawn_worker(server.tid(), |_| ());
    server.await_runnable(worker.task);
    let task = worker.task;
    let watcher = spawn(move || {
        wait_until("the child runs", || CHILD_RUNS.load(SeqCst));
        assert!(stand_still());
        assert_eq!((server.state(), task.state(), stat("nr_tasks")), (RUNNING, RUNNABLE, 2));
        // An event comes while it sleeps there.
        assert_eq!(api::kick(task.tid(), 0), 0);
        cue.write_all(&[0]).unwrap();
    });
    vfork();
    assert_state(server, RUNNING);
    assert_eq!(server.blocked_ts.load(SeqCst), 0);
    assert_only(task, &server.take(List::Runnable));
    watcher.join().unwrap();
    run_to_end(server, worker);
    assert!(lists_are_empty(server));
    assert_child_was_well();
    retire(server);
}

/// Rust's `Command` is posix_spawn(3), which is a vfork and an exec, and waitpid(2).
fn programs() {
    const PROGRAMS: u64 = 10;

    fn run_some() {
        let me = api::current();
        for _ in 0..PROGRAMS {
            assert!(Command::new("/bin/true").status().unwrap().success());
            assert_eq!(api::current(), me);
        }
    }
    open(4);
    let server = become_server();
    let counters = Counters::now();
    run_some();
    assert_eq!(counters.added("blocks"), 0, "a server's block was reported");
    let workers = [(); 3].map(|()| spawn_worker(server.tid(), |_| run_some()));
    serve_fifo(server, &[workers[0].task, workers[1].task, workers[2].task]);
    for worker in workers {
        worker.thread.join().unwrap();
    }
    let (blocks, captures) = (counters.added("blocks"), counters.added("captures"));
    println!("{blocks} blocks of workers that ran {} programs", 3 * PROGRAMS);
    assert!(blocks >= 3 * PROGRAMS, "nobody saw them wait for their children");
    assert_eq!(blocks, captures);
    assert_eq!(stat("nr_tasks"), 1);
    retire(server);
}

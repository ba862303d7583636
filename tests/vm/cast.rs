// SPDX-License-Identifier: GPL-2.0-only
//! The cast of every test: servers, workers, and the struct that they share with the kernel side.
//!
//! A test's own main thread usually plays the server; workers are threads that it spawns.

use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::{Once, mpsc};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

use crate::api::{self, BLOCKED, NONE, RUNNABLE, RUNNING, STATE_MASK};

/// Events at the same moment that a test has at most; see `Task::run`.
const LATE_MARKS: usize = 8;

/// `struct umcg_task`, field by field as in include/umcg.h.
#[repr(C, align(64))]
pub struct Task {
    pub status: AtomicU32,
    pub server_tid: AtomicU32,
    pub next_tid: AtomicU32,
    pub tid: AtomicU32,
    pub blocked_ptr: AtomicU64,
    pub runnable_ptr: AtomicU64,
    pub blocked_ts: AtomicU64,
    pub runnable_ts: AtomicU64,
    pub user_data: AtomicU64,
    pub reserved: AtomicU64,
}

/// Which of the two lists.
#[derive(Clone, Copy)]
pub enum List {
    Blocked,
    Runnable,
}

impl Task {
    /// A struct of the domain; the tests never free one, so it lives as long as the process.
    pub fn alloc() -> &'static Self {
        let task = api::task_alloc();
        assert!(!task.is_null(), "no task left in the domain");
        // SAFETY: the library gives out an aligned, initialised cell that stays mapped while the domain is open,
        // and every access goes through atomics.
        unsafe { &*task.cast::<Self>() }
    }

    pub fn state(&self) -> u32 {
        self.status.load(SeqCst) & STATE_MASK
    }

    pub fn tid(&self) -> u32 {
        self.tid.load(SeqCst)
    }

    pub fn as_ptr(&self) -> *mut api::umcg_task {
        std::ptr::from_ref(self).cast_mut().cast()
    }

    fn link(&self, list: List) -> &AtomicU64 {
        match list {
            List::Blocked => &self.blocked_ptr,
            List::Runnable => &self.runnable_ptr,
        }
    }

    /// Takes a whole list, first pushed first.
    pub fn take(&self, list: List) -> Vec<&'static Self> {
        let mut tasks = Vec::new();
        let mut next = self.link(list).swap(0, SeqCst);
        while next != 0 {
            // SAFETY: the kernel side pushes addresses of registered structs only, which live for ever here.
            let task = unsafe { &*(next as *const Self) };
            next = task.link(list).load(SeqCst);
            tasks.push(task);
        }
        tasks.reverse();
        tasks
    }

    /// What the program does to give up its CPU: mark itself, name whom to run, wait.
    pub fn switch_to(&self, next: u32) -> i32 {
        self.next_tid.store(next, SeqCst);
        self.status.store(RUNNABLE, SeqCst);
        api::wait(0, 0)
    }

    /// Runs `worker` until this server is RUNNING again; it must have been run.
    ///
    /// The kernel side pushes on a list, then marks the server RUNNING. Between the two the server may take the
    /// entry and go on to its next wait: the late mark ends that at once, and nobody was run. Once for each
    /// entry, no more.
    pub fn run(&self, worker: &Self) {
        for _ in 0..=LATE_MARKS {
            assert_eq!(self.switch_to(worker.tid()), 0, "umcg_wait");
            if self.next_tid.load(SeqCst) == 0 {
                return;
            }
        }
        panic!("the worker was not run");
    }

    /// Idles, as the seed's loop does, until `list` has entries, and takes them.
    pub fn await_list(&self, list: List) -> Vec<&'static Self> {
        loop {
            self.next_tid.store(0, SeqCst);
            self.status.store(RUNNABLE, SeqCst);
            let tasks = self.take(list);
            if !tasks.is_empty() {
                self.status.store(RUNNING, SeqCst);
                return tasks;
            }
            assert_eq!(api::wait(0, 0), 0, "umcg_wait");
        }
    }

    /// Waits until exactly `worker` has come back on the runnable list.
    pub fn await_runnable(&self, worker: &Self) {
        let tasks = self.await_list(List::Runnable);
        assert!(tasks.len() == 1 && std::ptr::eq(tasks[0], worker), "another task became runnable");
    }
}

/// Faults in the whole program, which lies on a file system of the host's: a worker is to block where its test
/// says, and nowhere else. Only the first call does: a later one would touch pages that are there to sleep at.
pub fn load_program() {
    static LOADED: Once = Once::new();
    LOADED.call_once(lock_memory);
}

fn lock_memory() {
    mlockall(MlockAllFlags::MCL_CURRENT).expect("cannot lock the test's memory");
}

/// Has the stack of the calling thread in memory as far down as any test goes, handlers included: a fault there may
/// sleep, if another thread changes the address space at that time.
#[inline(never)]
pub fn load_stack() {
    let mut stack = [0_u8; 128 << 10];
    stack.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
    std::hint::black_box(&mut stack);
}

/// Opens this process's domain at the loader that the runner named.
pub fn open(max_tasks: u32) {
    load_program();
    assert_eq!(api::open(None, max_tasks, 0), 0, "umcg_open");
    assert_eq!(api::backend(), "sched_ext");
}

/// Makes the calling thread a server.
pub fn become_server() -> &'static Task {
    let task = Task::alloc();
    task.server_tid.store(gettid(), SeqCst);
    task.status.store(RUNNING, SeqCst);
    assert_eq!(api::register(task.as_ptr(), 0), 0, "umcg_register of a server");
    task
}

/// Makes the calling thread a worker of `server`; returns once it is run.
pub fn become_worker(task: &'static Task, server: u32) {
    task.server_tid.store(server, SeqCst);
    task.status.store(RUNNABLE, SeqCst);
    assert_eq!(api::register(task.as_ptr(), 0), 0, "umcg_register of a worker");
}

/// The calling thread is no task any more.
pub fn retire(task: &Task) {
    assert_eq!(api::unregister(task.as_ptr()), 0, "umcg_unregister");
    assert_eq!(task.state(), NONE);
}

/// A worker thread.
pub struct Worker {
    pub task: &'static Task,
    pub thread: JoinHandle<()>,
}

/// Spawns a worker of `server` that runs `body` as a task and unregisters, unless that is done. It runs nothing before
/// it is run.
pub fn spawn_worker(server: u32, body: impl FnOnce(&'static Task) + Send + 'static) -> Worker {
    spawn_worker_in(server, || (), body)
}

/// The same; `before` runs in the thread first, as no task yet.
pub fn spawn_worker_in(
    server: u32,
    before: impl FnOnce() + Send + 'static,
    body: impl FnOnce(&'static Task) + Send + 'static,
) -> Worker {
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        load_stack();
        before();
        let task = Task::alloc();
        task.status.store(RUNNABLE, SeqCst); // by NONE a server knows that a worker is gone
        sender.send(task).unwrap();
        become_worker(task, server);
        body(task);
        if !api::current().is_null() {
            retire(task);
        }
    });
    Worker { task: receiver.recv().unwrap(), thread }
}

/// Spawns a thread that is a server, runs `body` as one, and unregisters.
pub fn spawn_server(body: impl FnOnce(&'static Task) + Send + 'static) -> Worker {
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let task = become_server();
        sender.send(task).unwrap();
        body(task);
        retire(task);
    });
    Worker { task: receiver.recv().unwrap(), thread }
}

/// The policy that most tests need: first in, first out, until every one of `workers` has unregistered or exited.
pub fn serve_fifo(server: &'static Task, workers: &[&'static Task]) {
    let mut queue = std::collections::VecDeque::new();
    loop {
        server.status.store(RUNNABLE, SeqCst);
        server.take(List::Blocked);
        queue.extend(server.take(List::Runnable));
        queue.retain(|task: &&Task| task.state() != NONE);
        if workers.iter().all(|worker| worker.state() == NONE) {
            server.status.store(RUNNING, SeqCst);
            return;
        }
        server.next_tid.store(queue.front().map_or(0, |task: &&Task| task.tid()), SeqCst);
        assert_eq!(api::wait(0, 0), 0, "umcg_wait");
        if !queue.is_empty() && server.next_tid.load(SeqCst) == 0 {
            queue.pop_front();
        }
    }
}

/// Runs `act` in a forked child, which must succeed.
pub fn in_child(act: impl FnOnce()) {
    // SAFETY: the child only calls what this project promises to work there, and the C library's allocator, which does.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            lock_memory(); // a child inherits no locks, and copies what it touches
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
            // SAFETY: ends the child without the parent's destructors.
            unsafe { libc::_exit(i32::from(outcome.is_err())) }
        }
        ForkResult::Parent { child } => {
            assert_eq!(waitpid(child, None).unwrap(), WaitStatus::Exited(child, 0));
        }
    }
}

/// A thread that is no task, and that runs already: to start one changes the address space, and a worker that faults
/// at that moment sleeps where no test expects it.
pub fn spawn<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        load_stack();
        sender.send(Box::new(0)).unwrap(); // the allocator has made its arena for this thread
        body()
    });
    receiver.recv().unwrap();
    thread
}

pub fn gettid() -> u32 {
    // SAFETY: no arguments, cannot fail.
    unsafe { libc::gettid() }.cast_unsigned()
}

/// A sleep that is one: a timer of a millisecond may have expired before its task sleeps, if others take the CPU in between.
pub fn nap() {
    sleep(Duration::from_millis(50));
}

/// Polls for an end state; hangs are the runner's business, this only says what was waited for.
pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit(90);
    while !is_so() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        sleep(Duration::from_millis(1));
    }
}

/// The same without a system call, for workers: they would block in one.
pub fn spin_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit(90);
    while !is_so() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        std::hint::spin_loop();
    }
}

/// A plain one, not by way of the library.
pub fn sched_yield() {
    // SAFETY: takes no pointers.
    assert_eq!(unsafe { libc::sched_yield() }, 0);
}

/// Pins the calling thread to one CPU.
pub fn pin(cpu: usize) {
    let mut set = nix::sched::CpuSet::new();
    set.set(cpu).unwrap();
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set).unwrap();
}

/// CPUs on line.
pub fn nr_cpus() -> usize {
    // SAFETY: reads a number; not the affinity, which the tests change.
    unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) }.try_into().unwrap()
}

/// A worker's state as a word, for messages.
pub fn state_name(state: u32) -> &'static str {
    match state {
        RUNNING => "RUNNING",
        RUNNABLE => "RUNNABLE",
        BLOCKED => "BLOCKED",
        NONE => "NONE",
        _ => "?",
    }
}

/// Rounds, or seconds, of a long test: `UMCG_VM_SCALE` in the environment, a factor, makes it longer or shorter.
pub fn scaled(n: u32) -> u32 {
    ((f64::from(n) * factor("UMCG_VM_SCALE")) as u32).max(1)
}

/// How long something may take before it counts as hung: `UMCG_VM_LIMIT`, a factor, is for those who expect it to hang.
pub fn limit(seconds: u64) -> Duration {
    Duration::from_secs(seconds).mul_f64(factor("UMCG_VM_LIMIT"))
}

fn factor(name: &str) -> f64 {
    std::env::var(name).map_or(1.0, |factor| factor.parse().expect(name))
}

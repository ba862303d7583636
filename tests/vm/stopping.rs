// SPDX-License-Identifier: GPL-2.0-only
//! SIGSTOP, ptrace and the freezer stop a process at once in whatever states its tasks are, and held tasks are still held
//! when it goes on.
//!
//! The failure this guards against: all three ask a thread to stop at its way to user mode, and a held task is nowhere on
//! the way. Then Ctrl-Z, a debugger, and whoever freezes a cgroup wait for ever.

use std::fs;
use std::io::{Read, Write};
use std::num::NonZeroUsize;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::thread::{sleep, spawn};
use std::time::Duration;

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use umcg::raw::UMCG_TF_PREEMPT;

use crate::api::{self, BLOCKED, RUNNABLE};
use crate::cast::{
    List, Task, Worker, become_server, open, serve_fifo, spawn_server, spawn_worker, spin_until, wait_until,
};
use crate::harness::{Test, stat};
use crate::scene::assert_only;

pub const TESTS: &[Test] = &[
    Test::new("sigstop_stops_tasks_in_every_state_and_they_go_on", job_control),
    Test::new("ptrace_interrupts_tasks_in_every_state_and_they_go_on", interrupt),
    Test::new("ptrace_attaches_to_tasks_in_every_state_and_they_go_on", attach),
    Test::new("the_freezer_freezes_tasks_in_every_state_and_they_go_on", freezer),
    Test::new("sigkill_ends_a_stopped_process_with_held_tasks", kill_stopped),
    Test::new("sigkill_ends_a_frozen_process_with_held_tasks", kill_frozen),
];

/// What the process under test shows to the test: memory that both map.
struct Show {
    /// Steps of tasks that are to stand still: any is a failure.
    steps: AtomicU32,
    /// The worker that is RUNNING counts here.
    turns: AtomicU64,
}

impl Show {
    fn new() -> &'static Self {
        const BYTES: NonZeroUsize = NonZeroUsize::new(size_of::<Show>()).unwrap();
        let (protection, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED);
        // SAFETY: a new mapping, of zeroes, large enough and aligned to a page; it stays until the process ends.
        unsafe { mmap_anonymous(None, BYTES, protection, flags).unwrap().cast().as_ref() }
    }

    fn assert_goes_on(&self) {
        let before = self.turns.load(SeqCst);
        wait_until("the running worker goes on", || self.turns.load(SeqCst) > before);
        sleep(Duration::from_millis(50)); // the sweep, too, has looked at the held ones
        assert_eq!(self.steps.load(SeqCst), 0, "user code of a held task ran");
    }

    fn assert_stands_still(&self) {
        let before = self.turns.load(SeqCst);
        sleep(Duration::from_millis(50));
        assert_eq!(self.turns.load(SeqCst), before, "a stopped process runs");
        assert_eq!(self.steps.load(SeqCst), 0, "user code of a held task ran");
    }
}

/// A process that has a task in every state.
struct Process {
    pid: Pid,
    show: &'static Show,
    cue: UnixStream,
}

impl Process {
    fn start() -> Self {
        let show = Show::new();
        let (mut cue, theirs) = UnixStream::pair().unwrap();
        // SAFETY: this process has one thread, so the child may do what it likes.
        let pid = match unsafe { fork() }.unwrap() {
            ForkResult::Child => be_the_process(show, theirs),
            ForkResult::Parent { child } => child,
        };
        drop(theirs);
        cue.read_exact(&mut [0]).expect("the process failed");
        Self { pid, show, cue }
    }

    fn threads(&self) -> Vec<Pid> {
        let threads = fs::read_dir(format!("/proc/{}/task", self.pid)).unwrap();
        threads
            .map(|thread| thread.unwrap().file_name().to_str().unwrap().parse().unwrap())
            .map(Pid::from_raw)
            .collect()
    }

    fn states(&self) -> String {
        self.threads().iter().map(|&thread| state(thread)).collect()
    }

    /// The process releases all its tasks and ends by itself.
    fn assert_ends_well(mut self) {
        self.cue.write_all(&[0]).unwrap();
        assert_eq!(reap(self.pid), WaitStatus::Exited(self.pid, 0));
    }

    fn assert_dies(self) {
        kill(self.pid, Signal::SIGKILL).unwrap();
        assert_eq!(reap(self.pid), WaitStatus::Signaled(self.pid, Signal::SIGKILL, false));
        wait_until("the loader has nothing left of it", || stat("nr_tasks") == 0 && stat("nr_domains") == 0);
    }

    fn stop(&self) {
        kill(self.pid, Signal::SIGSTOP).unwrap();
        wait_until("all threads stop", || self.states().chars().all(|state| state == 'T'));
        let stopped = waitpid(self.pid, Some(WaitPidFlag::WUNTRACED | WaitPidFlag::WNOHANG));
        assert_eq!(stopped, Ok(WaitStatus::Stopped(self.pid, Signal::SIGSTOP)));
        self.show.assert_stands_still();
    }
}

/// One letter, as ps shows it.
pub fn state(thread: Pid) -> char {
    let stat = fs::read_to_string(format!("/proc/{thread}/stat")).unwrap();
    let (_, rest) = stat.rsplit_once(") ").unwrap();
    rest.chars().next().unwrap()
}

fn reap(pid: Pid) -> WaitStatus {
    let mut status = WaitStatus::StillAlive;
    wait_until("the process ends", || {
        status = waitpid(pid, Some(WaitPidFlag::WNOHANG)).unwrap();
        status != WaitStatus::StillAlive
    });
    status
}

/// The process under test: its tasks, to be released on a cue.
fn be_the_process(show: &'static Show, mut cue: UnixStream) -> ! {
    static IS_OVER: AtomicBool = AtomicBool::new(false);

    open(16);
    let server = become_server();
    let (wake, workers) = spawn_stopped_workers(server, show);
    let idle = spawn_server(|task| {
        assert_eq!(task.switch_to(0), 0);
        show.steps.fetch_add(1, SeqCst);
    });
    let serving = spawn_server(|task| {
        let worker = spawn_worker(task.tid(), |_| {
            while !IS_OVER.load(SeqCst) {
                show.turns.fetch_add(1, SeqCst);
            }
        });
        serve_fifo(task, &[worker.task]); // a stop is a block of the worker that was RUNNING
        worker.thread.join().unwrap();
    });
    let director = spawn(move || {
        for task in [server, idle.task, serving.task] {
            wait_until("all servers wait", || task.state() == RUNNABLE);
        }
        wait_until("a worker runs", || show.turns.load(SeqCst) > 0);
        cue.write_all(&[0]).unwrap();
        cue.read_exact(&mut [0]).unwrap();
        IS_OVER.store(true, SeqCst);
        for task in [server, idle.task] {
            assert_eq!(api::kick(task.tid(), 0), 0);
        }
        for server in [idle, serving] {
            server.thread.join().unwrap();
        }
    });
    // What blocks is interrupted by some stops, and captured: an event. It stays on the list until the end.
    while !IS_OVER.load(SeqCst) {
        assert_eq!(server.switch_to(0), 0);
    }
    release(server, wake, workers);
    director.join().unwrap();
    assert_eq!(show.steps.load(SeqCst), 6, "a task did not go on");
    // SAFETY: ends the process without the runner's doings at exit, which are its parent's.
    unsafe { libc::_exit(0) }
}

/// A worker of each kind that is stopped; the last one is BLOCKED until something is written.
fn spawn_stopped_workers(server: &'static Task, show: &'static Show) -> (UnixStream, Vec<Worker>) {
    let step = || _ = show.steps.fetch_add(1, SeqCst);
    let (wake, mut theirs) = UnixStream::pair().unwrap();
    let spawn = |body: Box<dyn FnOnce(&'static Task) + Send>| {
        let worker = spawn_worker(server.tid(), body);
        server.await_runnable(worker.task);
        worker
    };
    let fresh = spawn(Box::new(move |_| step()));
    let waiting = spawn(Box::new(move |task| {
        assert_eq!(task.switch_to(0), 0);
        step();
    }));
    server.run(waiting.task);
    let (mut end, mut sleep) = UnixStream::pair().unwrap();
    let captured = spawn(Box::new(move |_| {
        sleep.read_exact(&mut [0]).unwrap();
        step();
    }));
    server.run(captured.task);
    assert_only(captured.task, &server.take(List::Blocked));
    end.write_all(&[0]).unwrap();
    server.await_runnable(captured.task);
    let preempted = spawn(Box::new(move |task| {
        task.status.fetch_or(UMCG_TF_PREEMPT, SeqCst);
        spin_until("preempted", || task.status.load(SeqCst) == 0);
        step();
    }));
    server.run(preempted.task);
    assert_only(preempted.task, &server.take(List::Runnable));
    let blocked = spawn(Box::new(move |_| {
        theirs.read_exact(&mut [0]).unwrap();
        step();
    }));
    server.run(blocked.task);
    assert_eq!(blocked.task.state(), BLOCKED);
    (wake, vec![fresh, waiting, captured, preempted, blocked])
}

fn release(server: &'static Task, mut wake: UnixStream, workers: Vec<Worker>) {
    let tasks: Vec<_> = workers.iter().map(|worker| worker.task).collect();
    wake.write_all(&[0]).unwrap();
    for task in &tasks[..tasks.len() - 1] {
        server.run(task);
    }
    serve_fifo(server, &tasks);
    for worker in workers {
        worker.thread.join().unwrap();
    }
}

fn job_control() {
    let process = Process::start();
    for _ in 0..5 {
        process.stop();
        kill(process.pid, Signal::SIGCONT).unwrap();
        wait_until("all threads go on", || !process.states().contains('T'));
        process.show.assert_goes_on();
    }
    process.assert_ends_well();
}

pub fn ptrace(request: u32, thread: Pid) {
    // SAFETY: none of the requests that are made here takes a pointer.
    let answer = unsafe { libc::ptrace(request, thread.as_raw(), 0_usize, 0_usize) };
    assert_eq!(answer, 0, "ptrace request {request:#x}: {}", std::io::Error::last_os_error());
}

pub fn await_ptrace_stop(thread: Pid) {
    wait_until("the thread stops for its tracer", || {
        let status = waitpid(thread, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG)).unwrap();
        match status {
            WaitStatus::StillAlive => false,
            WaitStatus::Stopped(..) | WaitStatus::PtraceEvent(..) => true,
            status => panic!("{status:?}"),
        }
    });
    assert_eq!(state(thread), 't');
}

fn interrupt() {
    let process = Process::start();
    for thread in process.threads() {
        ptrace(libc::PTRACE_SEIZE, thread);
        for _ in 0..3 {
            ptrace(libc::PTRACE_INTERRUPT, thread);
            await_ptrace_stop(thread);
            ptrace(libc::PTRACE_CONT, thread);
        }
        ptrace(libc::PTRACE_INTERRUPT, thread);
        await_ptrace_stop(thread);
        assert_eq!(process.show.steps.load(SeqCst), 0, "user code of a held task ran");
        ptrace(libc::PTRACE_DETACH, thread);
        process.show.assert_goes_on();
    }
    process.assert_ends_well();
}

/// As a debugger does it: all threads are stopped before any goes on.
fn attach() {
    let process = Process::start();
    for _ in 0..3 {
        let threads = process.threads();
        for &thread in &threads {
            ptrace(libc::PTRACE_ATTACH, thread);
            await_ptrace_stop(thread);
        }
        process.show.assert_stands_still();
        for &thread in &threads {
            ptrace(libc::PTRACE_DETACH, thread);
        }
        process.show.assert_goes_on();
    }
    process.assert_ends_well();
}

/// A cgroup of a process's own; it leaves it and removes it in the end.
struct Cgroup(PathBuf);

impl Cgroup {
    const ROOT: &str = "/sys/fs/cgroup";

    fn of(process: &Process) -> Self {
        let path = Path::new(Self::ROOT).join(format!("umcg-test-{}", process.pid));
        fs::create_dir(&path).unwrap();
        fs::write(path.join("cgroup.procs"), process.pid.to_string()).unwrap();
        Self(path)
    }

    fn freeze(&self, freeze: bool) {
        let bit = u8::from(freeze);
        fs::write(self.0.join("cgroup.freeze"), bit.to_string()).unwrap();
        wait_until("cgroup.events says so", || {
            let events = fs::read_to_string(self.0.join("cgroup.events")).unwrap();
            events.lines().any(|line| line == format!("frozen {bit}"))
        });
    }

    fn remove(self, process: Option<&Process>) {
        if let Some(process) = process {
            fs::write(format!("{}/cgroup.procs", Self::ROOT), process.pid.to_string()).unwrap();
        }
        wait_until("the cgroup is empty", || fs::remove_dir(&self.0).is_ok());
    }
}

fn freezer() {
    let process = Process::start();
    let cgroup = Cgroup::of(&process);
    process.show.assert_goes_on();
    for _ in 0..5 {
        cgroup.freeze(true);
        process.show.assert_stands_still();
        cgroup.freeze(false);
        process.show.assert_goes_on();
    }
    cgroup.remove(Some(&process));
    process.show.assert_goes_on();
    process.assert_ends_well();
}

fn kill_stopped() {
    let process = Process::start();
    process.stop();
    process.assert_dies();
}

fn kill_frozen() {
    let process = Process::start();
    let cgroup = Cgroup::of(&process);
    cgroup.freeze(true);
    process.assert_dies();
    cgroup.remove(None);
}

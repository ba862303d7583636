// SPDX-License-Identifier: GPL-2.0-only
//! A task ends, by `umcg_unregister` or by surprise, in every state in which its thread can do so.
//!
//! The failures this guards against: a host waits for a worker that is gone; a struct that nobody gives back; a domain
//! that the loader keeps because of a thread that never said goodbye.

use std::ffi::c_void;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::sync::mpsc;

use nix::sys::signal::SaFlags;

use crate::api::{self, NONE, RUNNABLE, RUNNING};
use crate::cast::{
    List, Task, Worker, become_server, become_worker, load_stack, nap, open, retire, sched_yield,
    spawn_worker, wait_until,
};
use crate::harness::{Test, stat};
use crate::scene::{Other, assert_only, assert_state, lists_are_empty};
use crate::signals::{handle, held_workers, send};

pub const TESTS: &[Test] = &[
    Test::new("a_worker_may_end_in_every_state_and_leaves_nothing", workers),
    Test::new("a_worker_that_its_handler_ends_in_every_state_is_reported", workers_in_handlers),
    Test::new("a_server_may_end_in_every_state_and_leaves_nothing", servers),
];

/// How a task ends.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Unregister,
    Return,
    PthreadExit,
    /// exit(2), of this thread only: no destructor runs.
    Exit,
}

const ENDS: [End; 4] = [End::Unregister, End::Return, End::PthreadExit, End::Exit];

unsafe extern "C-unwind" {
    fn pthread_exit(value: *mut c_void) -> !;
}

fn exit_thread() -> ! {
    // SAFETY: ends this thread; nobody waits for what it leaves undone.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
    unreachable!();
}

type Body = Box<dyn FnOnce() -> End + Send>;

type Start = extern "C" fn(*mut c_void) -> *mut c_void;
type Unwinding = extern "C-unwind" fn(*mut c_void) -> *mut c_void;

/// A thread without Rust's frame around it, which pthread_exit(3) could not unwind.
struct Thread(libc::pthread_t);

impl Thread {
    fn spawn(body: impl FnOnce() -> End + Send + 'static) -> Self {
        let body: Box<Body> = Box::new(Box::new(body));
        let mut thread = 0;
        // SAFETY: the ABIs differ by what may unwind only. The new thread owns the closure.
        let answer = unsafe {
            let start = std::mem::transmute::<Unwinding, Start>(Self::start);
            libc::pthread_create(&raw mut thread, std::ptr::null(), start, Box::into_raw(body).cast())
        };
        assert_eq!(answer, 0);
        Self(thread)
    }

    extern "C-unwind" fn start(body: *mut c_void) -> *mut c_void {
        load_stack();
        // SAFETY: `spawn` has made it of a Box, for this thread.
        let body = unsafe { Box::from_raw(body.cast::<Body>()) };
        match body() {
            End::Unregister | End::Return => {}
            // SAFETY: no frame below has a destructor.
            End::PthreadExit => unsafe { pthread_exit(std::ptr::null_mut()) },
            End::Exit => exit_thread(),
        }
        std::ptr::null_mut()
    }

    fn join(self) {
        // SAFETY: nobody else joins it; the kernel tells of its end, however it ends.
        assert_eq!(unsafe { libc::pthread_join(self.0, std::ptr::null_mut()) }, 0);
    }
}

/// What the worker does before it ends.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Stage {
    FirstRun,
    Waited,
    Captured,
    Yielded,
    /// RUNNABLE by its own mark.
    Marked,
    /// It names another server than its host.
    Moved,
}

const STAGES: [Stage; 6] =
    [Stage::FirstRun, Stage::Waited, Stage::Captured, Stage::Yielded, Stage::Marked, Stage::Moved];

impl Stage {
    fn reach(self, task: &Task, other: u32) {
        match self {
            Self::FirstRun => {}
            Self::Waited => assert_eq!(task.switch_to(0), 0),
            Self::Captured => nap(),
            Self::Yielded => sched_yield(),
            Self::Marked => task.status.store(RUNNABLE, SeqCst),
            Self::Moved => task.server_tid.store(other, SeqCst),
        }
    }

    /// The server's part.
    fn see(self, server: &Task, task: &Task) {
        server.run(task);
        match self {
            Self::Captured => {
                assert_only(task, &server.take(List::Blocked));
                server.await_runnable(task);
                server.run(task);
            }
            Self::Waited => server.run(task),
            Self::Yielded => {
                assert_only(task, &server.take(List::Runnable));
                server.run(task);
            }
            Self::FirstRun | Self::Marked | Self::Moved => {}
        }
    }
}

/// A thread may block on its way out, for a lock of the C library; then it is run again.
fn run_until_gone(server: &Task, task: &'static Task) {
    while task.state() != NONE {
        server.take(List::Blocked);
        server.await_runnable(task);
        if task.state() != NONE {
            server.run(task);
        }
    }
    assert_state(server, RUNNING);
}

fn assert_told(server: &Task, task: &'static Task, surprise: bool) {
    let told = server.take(List::Runnable);
    if surprise {
        assert_only(task, &told)
    } else {
        assert!(told.is_empty(), "it unregistered")
    }
    assert_state(task, NONE);
}

/// It is the only one that the domain has room for.
fn assert_can_be_freed(task: &'static Task) {
    assert!(api::task_alloc().is_null());
    api::task_free(task.as_ptr());
    assert_eq!(api::task_alloc(), task.as_ptr(), "it was not freed");
}

fn one_worker(server: &'static Task, other: &Other, stage: Stage, end: End) {
    let (host, heir) = (server.tid(), other.tid());
    let (sender, receiver) = mpsc::channel();
    let thread = Thread::spawn(move || {
        let task = Task::alloc();
        task.status.store(RUNNABLE, SeqCst);
        sender.send(task).unwrap();
        drop(sender);
        become_worker(task, host);
        stage.reach(task, heir);
        if end == End::Unregister {
            retire(task);
        }
        end
    });
    let task = receiver.recv().unwrap();
    server.await_runnable(task);
    let events = other.events();
    stage.see(server, task);
    let surprise = end != End::Unregister;
    if stage == Stage::Moved && surprise {
        wait_until("the server that it names is told", || other.events() > events);
        wait_until("it is gone", || task.state() == NONE);
        assert!(!other.0.task.take(List::Runnable).is_empty());
    } else if server.take(List::Blocked).is_empty() {
        assert_told(server, task, surprise);
    } else {
        run_until_gone(server, task);
    }
    assert_state(server, RUNNING);
    assert!(lists_are_empty(server), "it was told of twice");
    thread.join();
    assert_can_be_freed(task);
    api::task_free(task.as_ptr());
}

fn assert_closes() {
    assert_eq!(stat("nr_tasks"), 0);
    assert_eq!(api::close(), 0);
    wait_until("the loader has nothing left of us", || stat("nr_domains") == 0);
}

fn workers() {
    open(3);
    let server = become_server();
    let other = Other::start();
    for stage in STAGES {
        for end in ENDS {
            println!("{stage:?}, {end:?}");
            one_worker(server, &other, stage, end);
        }
    }
    other.end();
    retire(server);
    assert_closes();
}

extern "C" fn exit_in_handler(_signal: i32) {
    exit_thread();
}

/// Those that are held, and one that is BLOCKED: they end before their next instruction of user code.
fn workers_in_handlers() {
    handle(exit_in_handler, SaFlags::empty());
    open(6);
    let server = become_server();
    let mut workers = held_workers(server);
    let (_ours, mut theirs) = UnixStream::pair().unwrap();
    let blocked = spawn_worker(server.tid(), move |_| theirs.read_exact(&mut [0]).unwrap());
    server.await_runnable(blocked.task);
    server.run(blocked.task);
    assert_only(blocked.task, &server.take(List::Blocked));
    send(blocked.task);
    server.await_runnable(blocked.task);
    for worker in &workers {
        send(worker.task);
    }
    workers.push(blocked);
    for Worker { task, thread } in workers {
        server.run(task);
        assert_told(server, task, true);
        assert!(lists_are_empty(server));
        assert_state(server, RUNNING);
        std::mem::forget(thread);
        assert_can_be_freed(task);
    }
    retire(server);
    assert_closes();
}

/// What a server does when it ends.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Role {
    Running,
    Marked,
    /// In `umcg_wait`: a handler ends it.
    Idle,
    /// The same.
    Serving,
    /// Its wait has timed out.
    RunningAndServing,
}

const ROLES: [Role; 5] = [Role::Running, Role::Marked, Role::Idle, Role::Serving, Role::RunningAndServing];

impl Role {
    fn waits(self) -> bool {
        matches!(self, Self::Idle | Self::Serving)
    }

    fn serves(self) -> bool {
        matches!(self, Self::Serving | Self::RunningAndServing)
    }

    fn play(self, task: &Task, worker: u32) {
        if self.serves() {
            task.next_tid.store(worker, SeqCst);
        }
        match self {
            Self::Running => {}
            Self::Marked => task.status.store(RUNNABLE, SeqCst),
            Self::Idle | Self::Serving => {
                task.status.store(RUNNABLE, SeqCst);
                panic!("the wait ended: {}", api::wait(0, 0));
            }
            Self::RunningAndServing => {
                task.status.store(RUNNABLE, SeqCst);
                assert_eq!(api::wait(1_000_000, 0), -libc::ETIMEDOUT);
                assert_eq!(api::unregister(task.as_ptr()), -libc::EBUSY);
            }
        }
    }
}

/// Its worker's steps in user code.
static TURNS: AtomicU32 = AtomicU32::new(0);

fn one_server(me: &'static Task, role: Role, end: End) {
    static IS_OVER: AtomicBool = AtomicBool::new(false);

    IS_OVER.store(false, SeqCst);
    let (sender, receiver) = mpsc::channel();
    let (tell, told) = mpsc::channel::<u32>();
    let thread = Thread::spawn(move || {
        let task = become_server();
        sender.send(task).unwrap();
        drop(sender);
        let worker = told.recv().unwrap();
        task.take(List::Runnable);
        drop(told);
        role.play(task, worker);
        if end == End::Unregister {
            retire(task);
        }
        end
    });
    let server = receiver.recv().unwrap();
    let heir = me.tid();
    let worker = spawn_worker(server.tid(), move |task| {
        while !IS_OVER.load(SeqCst) {
            TURNS.fetch_add(1, SeqCst);
        }
        if role.serves() {
            assert_eq!(task.switch_to(0), -libc::ESRCH);
            task.server_tid.store(heir, SeqCst);
            assert_eq!(task.switch_to(0), 0);
        }
    });
    wait_until("it is announced", || server.runnable_ptr.load(SeqCst) != 0);
    tell.send(worker.task.tid()).unwrap();
    drop(tell);
    if role.waits() {
        wait_until("it waits", || server.state() == RUNNABLE && server.next_tid.load(SeqCst) == 0);
        let serves = || worker.task.state() == RUNNING;
        wait_until("it serves, or idles", || serves() == role.serves());
        send(server);
    }
    thread.join();
    assert_state(server, NONE);
    assert!(lists_are_empty(server), "an entry that nobody takes");
    take_over(me, server, &worker, role);
    IS_OVER.store(true, SeqCst);
    if role.serves() {
        me.await_runnable(worker.task);
    }
    me.run(worker.task);
    assert_state(worker.task, NONE);
    worker.thread.join().unwrap();
    assert!(lists_are_empty(me));
    for task in [server, worker.task] {
        api::task_free(task.as_ptr());
    }
}

/// The worker of a server that has ended runs on, or is held on, until it comes to `me`.
fn take_over(me: &Task, server: &Task, worker: &Worker, role: Role) {
    let turns = TURNS.load(SeqCst);
    assert_eq!(api::kick(server.tid(), 0), -libc::ESRCH);
    if role.serves() {
        wait_until("it runs on", || TURNS.load(SeqCst) > turns);
        assert_state(worker.task, RUNNING);
    } else {
        assert_eq!(api::kick(worker.task.tid(), 0), 0);
        assert_state(worker.task, RUNNABLE);
        assert_eq!(TURNS.load(SeqCst), turns, "nobody ran it");
        worker.task.server_tid.store(me.tid(), SeqCst);
        assert_eq!(api::kick(worker.task.tid(), 0), 0);
        assert_only(worker.task, &me.take(List::Runnable));
    }
}

fn servers() {
    handle(exit_in_handler, SaFlags::empty());
    open(3);
    let me = become_server();
    for role in ROLES {
        for end in ENDS {
            let is_possible = match role {
                Role::Running | Role::Marked => true,
                Role::Idle | Role::Serving => end == End::Exit, // its handler's
                Role::RunningAndServing => end != End::Unregister,
            };
            if is_possible {
                println!("{role:?}, {end:?}");
                one_server(me, role, end);
            }
        }
    }
    retire(me);
    assert_closes();
}

// SPDX-License-Identifier: GPL-2.0-only
//! How threads become tasks and cease to be: what is refused, and who hears of it.
//!
//! The failures this guards against: a struct that is not the domain's own gets into the kernel side's tables; a worker
//! that ends by surprise leaves its host waiting for ever; a fork or exec inherits what is its parent's.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::mpsc;
use std::thread::{JoinHandle, sleep};
use std::time::Duration;

use nix::unistd::{dup2_stdin, dup2_stdout, execv};

use crate::api::{self, BLOCKED, NONE, RUNNABLE, RUNNING, umcg_task};
use crate::cast::{
    List, Task, become_server, become_worker, gettid, in_child, open, retire, serve_fifo, spawn,
    spawn_server, spawn_worker, wait_until,
};
use crate::harness::{Test, stat};
use crate::scene::{assert_only, run_to_end};

pub const TESTS: &[Test] = &[
    Test::new("open_and_close_say_what_is_wrong", opening),
    Test::new("task_alloc_answers_null_when_the_domain_is_full", allocating),
    Test::new("register_refuses_what_is_no_struct_of_the_domain", foreign_structs),
    Test::new("register_refuses_a_wrong_state_or_server", wrong_contents),
    Test::new("a_thread_and_a_struct_register_once", once),
    Test::new("unregister_refuses_what_is_not_the_threads_own", unregistering),
    Test::new("a_worker_is_announced_and_returns_once_it_is_run", announced),
    Test::new("a_task_is_found_although_another_has_nearly_its_tid", near_tids),
    Test::new("a_worker_whose_thread_returns_is_reported", returns),
    Test::new("a_worker_that_exits_is_reported", exits),
    Test::new("a_forked_child_starts_unregistered", forked_server),
    Test::new("a_child_of_a_worker_starts_unregistered", forked_worker),
    Test::new("an_execed_image_starts_unregistered", execed),
];

fn opening() {
    let file = Path::new("/run/umcg-test-no-socket");
    std::fs::write(file, "").unwrap();
    let stale = Path::new("/run/umcg-test-stale");
    drop(UnixListener::bind(stale).unwrap());

    assert_eq!(api::close(), -libc::ENOENT);
    assert_eq!(api::backend(), "none");
    assert!(api::task_alloc().is_null());
    assert_eq!(api::open(None, 0, 0), -libc::EINVAL);
    assert_eq!(api::open(None, 1, 2), -libc::EINVAL);
    assert_eq!(api::open(Some(Path::new("/nonexistent/umcg.sock")), 1, 0), -libc::ENOENT);
    assert_eq!(api::open(Some(file), 1, 0), -libc::ECONNREFUSED);
    assert_eq!(api::open(Some(stale), 1, 0), -libc::ECONNREFUSED);
    assert_eq!(api::open(None, 1 << 20, 0), -libc::ENOSPC, "more than the loader has");
    for _ in 0..3 {
        open(1);
        assert_eq!(api::open(None, 1, 0), -libc::EALREADY);
        let server = become_server();
        assert_eq!(api::close(), -libc::EBUSY);
        retire(server);
        assert_eq!(api::close(), 0);
        assert_eq!(api::backend(), "none");
    }
    wait_until("the loader has nothing left of us", || stat("nr_domains") == 0);
}

fn allocating() {
    open(4);
    let tasks: Vec<_> = (0..4).map(|_| Task::alloc()).collect();
    assert!(api::task_alloc().is_null(), "a fifth task of four");
    for task in &tasks {
        assert_eq!(task.state(), NONE);
    }
    tasks[2].user_data.store(7, SeqCst);
    api::task_free(tasks[2].as_ptr());
    let task = Task::alloc();
    assert!(std::ptr::eq(task, tasks[2]));
    assert_eq!((task.state(), task.user_data.load(SeqCst)), (NONE, 0), "not zeroed");
    assert!(api::task_alloc().is_null());
    api::task_free(std::ptr::null_mut());
    api::task_free(tasks[0].as_ptr().wrapping_byte_add(8));
    assert!(api::task_alloc().is_null(), "what is no task was freed");
}

fn foreign_structs() {
    #[repr(align(128))]
    struct Foreign(#[allow(dead_code)] [u8; 256]);

    let mut foreign = Box::new(Foreign([0; 256]));
    let foreign: *mut umcg_task = (&raw mut *foreign).cast();
    assert_eq!(api::register(foreign, 0), -libc::EFAULT, "before umcg_open");
    open(4);
    let task = Task::alloc();
    task.server_tid.store(gettid(), SeqCst);
    task.status.store(RUNNING, SeqCst);
    for offset in [1, 4, 8, 32] {
        let misaligned = task.as_ptr().wrapping_byte_add(offset);
        assert_eq!(api::register(misaligned, 0), -libc::EINVAL, "misaligned by {offset}");
    }
    let before = task.as_ptr().wrapping_byte_sub(128);
    let after = task.as_ptr().wrapping_byte_add(1 << 20);
    for (what, task) in [
        ("null", std::ptr::null_mut()),
        ("foreign", foreign),
        ("the header", before),
        ("behind the end", after),
    ] {
        assert_eq!(api::register(task, 0), -libc::EFAULT, "{what}");
    }
    assert_eq!(api::register(task.as_ptr(), 1), -libc::EINVAL, "flags");
    assert!(api::current().is_null());
    assert_eq!(api::register(task.as_ptr(), 0), 0);
    assert_eq!(api::current(), task.as_ptr());
    retire(task);
    assert!(api::current().is_null());
}

fn wrong_contents() {
    open(4);
    let server = spawn_server(|task| {
        wait_until("quit", || task.user_data.load(SeqCst) == 1);
        let worker = task.take(List::Runnable)[0];
        task.run(worker);
    });
    let worker = spawn_worker(server.task.tid(), |_| ());
    wait_until("it is announced", || server.task.runnable_ptr.load(SeqCst) != 0);
    let task = Task::alloc();
    let refused = |server_tid, status, reserved, errno: i32| {
        task.server_tid.store(server_tid, SeqCst);
        task.status.store(status, SeqCst);
        task.reserved.store(reserved, SeqCst);
        let what = format!("server {server_tid}, status {status:#x}, reserved {reserved}");
        assert_eq!(api::register(task.as_ptr(), 0), -errno, "{what}");
        assert!(api::current().is_null());
    };
    let (me, living) = (gettid(), server.task.tid());
    for status in [RUNNABLE, BLOCKED, NONE, 0x7f] {
        refused(me, status, 0, libc::EINVAL);
    }
    for status in [RUNNING, BLOCKED, NONE] {
        refused(living, status, 0, libc::EINVAL);
    }
    refused(me, RUNNING, 1, libc::EINVAL);
    refused(living, RUNNABLE, 1, libc::EINVAL);
    for nobody in [0, 1, 1 << 30, worker.task.tid()] {
        refused(nobody, RUNNABLE, 0, libc::ESRCH);
    }
    let announced = server.task.runnable_ptr.load(SeqCst);
    assert_eq!(announced, worker.task.as_ptr().addr() as u64, "a refused worker was announced");
    server.task.user_data.store(1, SeqCst);
    for thread in [server.thread, worker.thread] {
        thread.join().unwrap();
    }
    refused(living, RUNNABLE, 0, libc::ESRCH);
}

fn once() {
    open(4);
    let server = become_server();
    assert_eq!(api::register(server.as_ptr(), 0), -libc::EEXIST);
    let second = Task::alloc();
    second.server_tid.store(gettid(), SeqCst);
    second.status.store(RUNNING, SeqCst);
    assert_eq!(api::register(second.as_ptr(), 0), -libc::EEXIST);

    let host = server.tid();
    let stolen = std::thread::spawn(move || {
        assert!(api::register(server.as_ptr(), 0) < 0, "a registered struct, by another thread");
        (server.tid(), server.server_tid.load(SeqCst))
    });
    assert_eq!(stolen.join().unwrap(), (host, host));
    assert_eq!(server.state(), RUNNING);
    retire(server);
    for _ in 0..10 {
        server.status.store(RUNNING, SeqCst);
        assert_eq!(api::register(server.as_ptr(), 0), 0, "again");
        retire(server);
    }
}

fn unregistering() {
    open(4);
    let spare = Task::alloc();
    assert_eq!(api::unregister(spare.as_ptr()), -libc::EINVAL, "not registered");
    let server = become_server();
    assert_eq!(api::unregister(spare.as_ptr()), -libc::EINVAL, "another struct");
    assert_eq!(api::unregister(std::ptr::null_mut()), -libc::EINVAL);
    let of_another = std::thread::spawn(move || assert_eq!(api::unregister(server.as_ptr()), -libc::EINVAL));
    of_another.join().unwrap();
    assert_eq!(server.state(), RUNNING);
    retire(server);
    assert_eq!(api::unregister(server.as_ptr()), -libc::EINVAL, "again");
}

fn announced() {
    static RETURNED: AtomicU32 = AtomicU32::new(0);

    open(2);
    let server = become_server();
    let worker = spawn_worker(server.tid(), |task| {
        RETURNED.store(task.tid(), SeqCst);
        assert_eq!((task.state(), task.tid()), (RUNNING, gettid()));
    });
    server.await_runnable(worker.task);
    assert_eq!(worker.task.state(), RUNNABLE);
    assert!(worker.task.runnable_ts.load(SeqCst) > 0);
    std::thread::sleep(std::time::Duration::from_millis(100));
    assert_eq!(RETURNED.load(SeqCst), 0, "umcg_register returned before the worker was run");
    server.run(worker.task);
    assert_eq!(RETURNED.load(SeqCst), worker.task.tid());
    assert_eq!(worker.task.state(), NONE);
    assert!(server.take(List::Runnable).is_empty(), "a worker that unregisters is no surprise");
    worker.thread.join().unwrap();
    retire(server);
}

/// Runs a worker whose thread comes to its `end` without a word.
fn ends_by_surprise(end: fn()) -> JoinHandle<()> {
    open(2);
    let server = become_server();
    let host = server.tid();
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let task = Task::alloc();
        sender.send(task).unwrap();
        become_worker(task, host);
        end();
    });
    let task = receiver.recv().unwrap();
    server.await_runnable(task);
    // It may block on its way out, for locks of the C library; then it is run again.
    while task.state() == RUNNABLE {
        server.run(task);
        server.take(List::Blocked);
        server.await_runnable(task);
    }
    assert_eq!(task.state(), NONE);
    assert_eq!(server.state(), RUNNING);
    retire(server);
    thread
}

fn returns() {
    ends_by_surprise(|| ()).join().unwrap();
}

fn exits() {
    // SAFETY: ends this thread; nothing waits for what it leaves undone, for its handle is forgotten.
    let thread = ends_by_surprise(|| _ = unsafe { libc::syscall(libc::SYS_exit, 0) });
    std::mem::forget(thread);
}

/// What a child finds: nothing; and what it may do: open a domain of its own.
fn start_afresh(parents: *mut umcg_task) {
    assert!(api::current().is_null());
    assert_eq!(api::backend(), "none");
    assert!(api::task_alloc().is_null());
    assert_eq!(api::wait(0, 0), -libc::EINVAL);
    assert_eq!(api::unregister(parents), -libc::EINVAL);
    assert_eq!(api::close(), -libc::ENOENT);

    open(2);
    let server = become_server();
    let worker = spawn_worker(server.tid(), |_| sleep(Duration::from_millis(1)));
    serve_fifo(server, &[worker.task]);
    worker.thread.join().unwrap();
    retire(server);
    assert_eq!(api::close(), 0);
}

/// The next thread gets that tid, unless somebody else is faster.
fn make_next(tid: u32) {
    let before = tid - 1;
    if std::fs::write("/proc/sys/kernel/ns_last_pid", before.to_string()).is_err() {
        while std::thread::spawn(gettid).join().unwrap() % TIDS_APART != before % TIDS_APART {}
    }
}

/// Tids that differ by a multiple of this share a place in a table of the kernel side.
const TIDS_APART: u32 = 4096;

fn near_tids() {
    open(3);
    let server = become_server();
    let first = spawn_worker(server.tid(), |_| {});
    server.await_runnable(first.task);
    for times in 1.. {
        make_next(first.task.tid() + times * TIDS_APART);
        let second = spawn_worker(server.tid(), |_| {});
        server.await_runnable(second.task);
        let is_near = second.task.tid() % TIDS_APART == first.task.tid() % TIDS_APART;
        if is_near {
            assert_eq!(api::kick(first.task.tid(), 0), 0);
            assert_only(first.task, &server.take(List::Runnable));
            assert_eq!(api::kick(second.task.tid(), 0), 0);
            assert_only(second.task, &server.take(List::Runnable));
        }
        run_to_end(server, second);
        if is_near {
            break;
        }
    }
    run_to_end(server, first);
    retire(server);
}

fn forked_server() {
    open(2);
    let server = become_server();
    let me = server.as_ptr();
    in_child(move || start_afresh(me));
    assert_eq!(api::current(), me);
    let worker = spawn_worker(server.tid(), |_| {});
    server.await_runnable(worker.task);
    server.run(worker.task);
    worker.thread.join().unwrap();
    retire(server);
}

fn forked_worker() {
    open(2);
    let server = become_server();
    let worker = spawn_worker(server.tid(), |task| {
        let me = task.as_ptr();
        in_child(move || start_afresh(me));
        assert_eq!(api::current(), me);
    });
    serve_fifo(server, &[worker.task]);
    worker.thread.join().unwrap();
    retire(server);
}

fn execed() {
    for from_a_worker in [false, true] {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let child = spawn(move || in_child(|| exec_beside_tasks(from_a_worker, theirs)));
        let mut answers = || {
            ours.write_all(b"x").unwrap();
            ours.read_exact(&mut [0]).unwrap();
        };
        answers(); // the new image
        wait_until("nothing is left of the image that is gone", || {
            stat("nr_tasks") == 0 && stat("nr_domains") == 0
        });
        answers();
        drop(ours);
        child.join().unwrap();
    }
}

fn exec_beside_tasks(from_a_worker: bool, stream: UnixStream) {
    open(4);
    let server = become_server();
    let waiting = spawn_worker(server.tid(), |_| {});
    server.await_runnable(waiting.task);
    if !from_a_worker {
        exec_cat(&stream);
    }
    let worker = spawn_worker(server.tid(), move |_| exec_cat(&stream));
    serve_fifo(server, &[waiting.task, worker.task]);
}

/// An image that blocks, and would be captured were it a worker still.
fn exec_cat(stream: &UnixStream) -> ! {
    dup2_stdin(stream).unwrap();
    dup2_stdout(stream).unwrap();
    match execv(c"/bin/cat", &[c"cat"]) {
        Err(errno) => panic!("cannot execute cat: {errno}"),
        Ok(never) => match never {},
    }
}

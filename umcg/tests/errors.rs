// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every call that cannot do what it is asked says why, and leaves the task RUNNING and everything else as it was.

mod common;

use std::path::Path;
use std::ptr;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use common::{NO_SOCKET, RawDomain, alone, eventually, open, prepared, raw_server};
use umcg::raw::{self, umcg_task};
use umcg::{Domain, Error, State, Tid};

fn errno(result: Result<(), raw::Errno>) -> i32 {
    result.err().map_or(0, raw::Errno::raw)
}

fn status(task: *mut umcg_task) -> u32 {
    // SAFETY: of an open domain, in all tests here.
    unsafe { (&raw const (*task).umcg_status).read_volatile() }
}

fn wait_with(task: *mut umcg_task, state: u32, next_tid: u32, timeout_ns: u64, flags: u32) -> i32 {
    // SAFETY: the calling thread's own task, registered, and nobody else writes these meanwhile.
    unsafe {
        (&raw mut (*task).umcg_next_tid).write_volatile(next_tid);
        (&raw mut (*task).umcg_status).write_volatile(state);
    }
    let errno = errno(raw::wait(timeout_ns, flags));
    assert_eq!(status(task), raw::UMCG_STATE_RUNNING, "on errors too");
    errno
}

#[test]
fn open_says_what_is_missing() {
    let _alone = alone();
    let nowhere = Some(Path::new(NO_SOCKET));
    assert_eq!(errno(raw::open(nowhere, 1, 0)), libc::ENOENT);
    assert_eq!(errno(raw::open(nowhere, 0, raw::UMCG_OPEN_FALLBACK)), libc::EINVAL);
    assert_eq!(errno(raw::open(nowhere, 1, 2)), libc::EINVAL);
    assert_eq!(errno(raw::open(nowhere, u32::MAX, raw::UMCG_OPEN_FALLBACK)), libc::ENOSPC);
    assert_eq!(raw::backend(), c"none");
    assert_eq!(errno(raw::close()), libc::ENOENT);

    let _domain = RawDomain::open(1);
    assert_eq!(errno(raw::open(nowhere, 1, raw::UMCG_OPEN_FALLBACK)), libc::EALREADY);
    assert_eq!(raw::backend(), c"futex");
}

#[test]
fn only_one_of_many_opens_wins() {
    let _alone = alone();
    let nowhere = Some(Path::new(NO_SOCKET));
    let wins = thread::scope(|scope| {
        let opens: Vec<_> =
            (0..8).map(|_| scope.spawn(move || raw::open(nowhere, 1, raw::UMCG_OPEN_FALLBACK))).collect();
        let results = opens.into_iter().map(|open| errno(open.join().unwrap()));
        results.filter(|&errno| errno != libc::EALREADY).collect::<Vec<_>>()
    });
    assert_eq!(wins, [0]);
    raw::close().unwrap();
}

#[test]
fn tasks_run_out_and_come_back() {
    let _alone = alone();
    assert!(raw::task_alloc().is_null(), "not open");
    let _domain = RawDomain::open(2);
    let (first, second) = (raw::task_alloc(), raw::task_alloc());
    assert!(!first.is_null() && !second.is_null());
    assert_eq!(status(first), raw::UMCG_STATE_NONE);
    assert!(raw::task_alloc().is_null(), "full");

    raw::task_free(ptr::null_mut());
    raw::task_free(first.wrapping_byte_add(64));
    raw::task_free((&raw mut *Box::new(umcg_task::default())).cast());
    assert!(raw::task_alloc().is_null(), "those were nobody's");
    raw::task_free(first);
    assert_eq!(raw::task_alloc(), first);
}

#[test]
fn a_registered_task_cannot_be_freed_and_keeps_the_domain_open() {
    let _alone = alone();
    let _domain = RawDomain::open(1);
    let task = raw_server();
    assert_eq!(raw::current(), task);
    raw::task_free(task);
    assert!(raw::task_alloc().is_null(), "still taken");
    assert_eq!(errno(raw::close()), libc::EBUSY);
    raw::unregister(task).unwrap();
    assert_eq!(status(task), raw::UMCG_STATE_NONE);
    assert!(raw::current().is_null());
}

#[test]
fn register_refuses_what_is_not_a_task_to_register() {
    let _alone = alone();
    let me = Tid::current().get();
    assert_eq!(errno(raw::register(ptr::dangling_mut(), 0)), libc::EFAULT, "not open");
    let _domain = RawDomain::open(3);
    let task = prepared(me, raw::UMCG_STATE_RUNNING);
    let elsewhere = &raw mut *Box::new(umcg_task::default());

    assert_eq!(errno(raw::register(task, 1)), libc::EINVAL, "flags");
    assert_eq!(errno(raw::register(task.wrapping_byte_add(8), 0)), libc::EINVAL, "misaligned");
    assert_eq!(errno(raw::register(elsewhere, 0)), libc::EFAULT, "not of this domain");
    assert_eq!(errno(raw::register(ptr::null_mut(), 0)), libc::EFAULT);
    assert_eq!(errno(raw::register(task.wrapping_byte_add(64), 0)), libc::EFAULT, "half a cell");
    assert_eq!(errno(raw::register(task.wrapping_byte_add(128), 0)), libc::EINVAL, "not allocated");

    // SAFETY: ours, and not registered.
    unsafe { (*task).umcg_reserved = 1 };
    assert_eq!(errno(raw::register(task, 0)), libc::EINVAL, "reserved");
    // SAFETY: as above.
    unsafe { (*task).umcg_reserved = 0 };
    let wrong = prepared(me, raw::UMCG_STATE_RUNNABLE);
    assert_eq!(errno(raw::register(wrong, 0)), libc::EINVAL, "a server comes RUNNING");
    let orphan = prepared(me + 1, raw::UMCG_STATE_RUNNABLE);
    assert_eq!(errno(raw::register(orphan, 0)), libc::ESRCH, "no such server");
    assert!(raw::current().is_null());

    raw::register(task, 0).unwrap();
    assert_eq!(errno(raw::register(orphan, 0)), libc::EEXIST);
    assert_eq!(errno(raw::unregister(orphan)), libc::EINVAL, "not this thread's");
    raw::unregister(task).unwrap();
    assert_eq!(errno(raw::unregister(task)), libc::EINVAL);
}

#[test]
fn wait_checks_its_arguments_first() {
    let _alone = alone();
    assert_eq!(errno(raw::wait(0, 0)), libc::EINVAL, "not registered");
    let _domain = RawDomain::open(2);
    let task = raw_server();
    let me = Tid::current().get();
    let (running, runnable) = (raw::UMCG_STATE_RUNNING, raw::UMCG_STATE_RUNNABLE);

    assert_eq!(wait_with(task, running, 0, 0, 0), 0, "at once");
    assert_eq!(wait_with(task, running, 0, 0, 2), libc::EINVAL);
    assert_eq!(wait_with(task, runnable, 0, 0, 2), libc::EINVAL);
    assert_eq!(wait_with(task, raw::UMCG_STATE_BLOCKED, 0, 0, 0), libc::EINVAL);
    assert_eq!(wait_with(task, raw::UMCG_STATE_NONE, 0, 0, 0), libc::EINVAL);
    assert_eq!(wait_with(task, runnable, me + 1, 0, 0), libc::ESRCH);
    assert_eq!(wait_with(task, runnable, 0, 1_000_000, 0), libc::ETIMEDOUT);
    assert_eq!(wait_with(task, runnable, me, 1_000_000, 0), libc::ETIMEDOUT, "idles");
    raw::unregister(task).unwrap();
}

#[test]
fn the_programs_bits_survive() {
    let _alone = alone();
    let _domain = RawDomain::open(1);
    let task = raw_server();
    let bits = 0xabcd_0000;
    // SAFETY: our own task.
    unsafe { (&raw mut (*task).umcg_status).write_volatile(bits | raw::UMCG_STATE_RUNNABLE) };
    assert_eq!(errno(raw::wait(1, 0)), libc::ETIMEDOUT);
    assert_eq!(status(task), bits | raw::UMCG_STATE_RUNNING);
    raw::unregister(task).unwrap();
}

#[test]
fn kick_finds_its_task() {
    let _alone = alone();
    let me = Tid::current().get() as libc::pid_t;
    assert_eq!(errno(raw::kick(me, 0)), libc::ESRCH, "not open");
    let _domain = RawDomain::open(1);
    assert_eq!(errno(raw::kick(me, 0)), libc::ESRCH, "not registered");
    assert_eq!(errno(raw::kick(-1, 0)), libc::ESRCH);
    let task = raw_server();
    assert_eq!(errno(raw::kick(me, 1)), libc::EINVAL);
    assert_eq!(errno(raw::kick(me, 0)), 0);
    raw::unregister(task).unwrap();
}

#[test]
fn a_kick_that_comes_before_the_wait_is_not_lost() {
    let _alone = alone();
    let _domain = RawDomain::open(1);
    let task = raw_server();
    // SAFETY: our own task.
    unsafe { (&raw mut (*task).umcg_status).write_volatile(raw::UMCG_STATE_RUNNABLE) };
    raw::kick(Tid::current().get() as libc::pid_t, 0).unwrap();
    raw::wait(0, 0).unwrap();
    raw::unregister(task).unwrap();
}

/// Runs `work` in a worker of the calling thread's server, and the server until the worker is gone.
fn with_worker<R: Send>(
    domain: &Domain,
    work: impl FnOnce(&umcg::Worker<'_>) -> R + Send,
    serve: impl FnOnce(&umcg::Server<'_>, umcg::Task<'_>),
) -> R {
    let server = domain.register_server().unwrap();
    let tid = Tid::current();
    thread::scope(|scope| {
        let worker = scope.spawn(move || work(&domain.register_worker(tid).unwrap()));
        let task = loop {
            server.mark_runnable();
            if let Some(task) = server.take_runnable().next() {
                break task;
            }
            server.run(None).unwrap();
        };
        serve(&server, task);
        worker.join().unwrap()
    })
}

fn run_out(server: &umcg::Server<'_>, worker: umcg::Task<'_>) {
    while worker.state() == State::Runnable {
        server.mark_runnable();
        server.take_runnable().for_each(drop);
        server.run(worker.tid()).unwrap();
    }
}

fn code<T: std::fmt::Debug>(result: Result<T, Error>) -> i32 {
    result.unwrap_err().errno()
}

#[test]
fn a_worker_may_not_do_everything() {
    let _alone = alone();
    let domain = open(4);
    let (other_tid, other) = mpsc::channel();
    let (stop, stopped) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let domain = &domain;
        scope.spawn(move || {
            let _other = domain.register_server().unwrap();
            other_tid.send(Tid::current()).unwrap();
            stopped.recv().unwrap();
        });
        let other = other.recv().unwrap();
        let work = |worker: &umcg::Worker<'_>| {
            let me = Tid::current();
            let nobody = Tid::new(u32::MAX - 1).unwrap();
            assert_eq!(code(worker.switch_to(me)), libc::EINVAL, "itself");
            assert_eq!(code(worker.switch_to(other)), libc::EINVAL, "another server");
            assert_eq!(code(worker.switch_to(nobody)), libc::ESRCH);
            assert_eq!(code(umcg::wait(Some(Duration::from_secs(1)))), libc::ERANGE);
            worker.set_server(nobody);
            assert_eq!(code(worker.yield_now()), libc::ESRCH, "its server is gone");
            assert_eq!(worker.state(), State::Running);
        };
        with_worker(domain, work, run_out);
        stop.send(()).unwrap();
    });
}

#[test]
fn a_serving_server_is_busy() {
    let _alone = alone();
    let domain = open(3);
    let (go, gone) = mpsc::channel::<()>();
    let work = move |_: &umcg::Worker<'_>| gone.recv().unwrap();
    with_worker(&domain, work, |server, worker| {
        let timed_out = loop {
            server.mark_runnable();
            match server.run_for(worker.tid(), Duration::from_millis(20)) {
                Ok(false) => {} // an event came first
                result => break result,
            }
        };
        assert_eq!(code(timed_out), libc::ETIMEDOUT);
        assert_eq!(worker.state(), State::Running, "a serving one stays serving");

        let me = server.task();
        assert_eq!(errno(raw::unregister(me.as_ptr())), libc::EBUSY);
        let third = domain.task(Tid::current()).and_then(|task| task.tid());
        server.mark_runnable();
        assert_eq!(code(server.run_for(third, Duration::from_millis(1))), libc::ETIMEDOUT, "itself");

        server.mark_runnable(); // before it can unregister
        go.send(()).unwrap();
        server.run(None).unwrap(); // goes on waiting for its worker
        assert_eq!(worker.state(), State::None);
    });
}

#[test]
fn only_its_server_may_start_a_worker() {
    let _alone = alone();
    let domain = open(3);
    let (ask, asked) = mpsc::channel::<Tid>();
    let (tell, told) = mpsc::channel();
    thread::scope(|scope| {
        let domain = &domain;
        scope.spawn(move || {
            let other = domain.register_server().unwrap();
            let worker = asked.recv().unwrap();
            other.mark_runnable();
            tell.send(code(other.run(Some(worker)))).unwrap();
        });
        with_worker(
            domain,
            |_| (),
            |server, worker| {
                ask.send(worker.tid().unwrap()).unwrap();
                assert_eq!(told.recv().unwrap(), libc::EINVAL);
                run_out(server, worker);
                server.mark_runnable();
                assert_eq!(code(server.run(worker.tid())), libc::ESRCH, "it has unregistered");
            },
        );
    });
}

#[test]
fn servers_switch_to_servers() {
    let _alone = alone();
    let domain = open(2);
    let (tell, told) = mpsc::channel();
    thread::scope(|scope| {
        let domain = &domain;
        scope.spawn(move || {
            let second = domain.register_server().unwrap();
            tell.send(Tid::current()).unwrap();
            second.mark_runnable();
            second.run(None).unwrap();
        });
        let second = told.recv().unwrap();
        let server = domain.register_server().unwrap();
        eventually("it waits", || domain.task(second).unwrap().state() == State::Runnable);
        server.mark_runnable();
        // Nobody comes back to us by this: that is what the timeout is for.
        assert_eq!(code(server.run_for(Some(second), Duration::from_millis(1))), libc::ETIMEDOUT);
    });
}

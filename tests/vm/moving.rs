// SPDX-License-Identifier: GPL-2.0-only
//! Workers that change their server, and tasks that change from worker to server and back, at any moment.
//!
//! The failures this guards against: an event goes to the server of before, which forgets the worker; a worker whose server is
//! gone takes the program with it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;
use std::thread::sleep;
use std::time::Duration;

use umcg::raw::UMCG_WAIT_ENQUEUE;

use crate::api::{self, BLOCKED, NONE, RUNNABLE, RUNNING};
use crate::cast::{
    List, become_server, open, retire, spawn, spawn_server, spawn_worker, spin_until, wait_until,
};
use crate::harness::Test;
use crate::scene::{Other, assert_only, assert_state, lists_are_empty, run_to_end};

pub const TESTS: &[Test] = &[
    Test::new("a_worker_that_moves_before_it_blocks_comes_back_to_its_new_server", || moved(true)),
    Test::new("a_worker_that_is_moved_while_it_is_blocked_comes_back_to_its_new_server", || moved(false)),
    Test::new("a_serving_server_finds_what_was_captured_later", not_disturbed),
    Test::new("a_worker_becomes_a_server_and_a_worker_again", roles),
    Test::new("a_worker_that_becomes_a_server_and_blocks_goes_on", role_at_capture),
    Test::new("a_worker_whose_server_ended_goes_to_another", orphan),
    Test::new("what_a_server_that_ended_had_captured_goes_to_another", heritage),
];

/// The block goes to the host, whatever the worker says by then; the capture to the server that it names then.
fn moved(by_itself: bool) {
    open(3);
    let server = become_server();
    let other = Other::start();
    let (mut wake, mut sleep) = UnixStream::pair().unwrap();
    let named = other.tid();
    let worker = spawn_worker(server.tid(), move |task| {
        if by_itself {
            task.server_tid.store(named, SeqCst);
        }
        sleep.read_exact(&mut [0]).unwrap();
    });
    server.await_runnable(worker.task);
    server.run(worker.task);
    assert_only(worker.task, &server.take(List::Blocked));
    assert_state(worker.task, BLOCKED);
    worker.task.server_tid.store(named, SeqCst);
    assert_eq!(other.events(), 0, "the other server was told of the block");

    wake.write_all(&[0]).unwrap();
    other.assert_only_told_of(worker.task, 1);
    assert!(lists_are_empty(server));
    worker.task.server_tid.store(server.tid(), SeqCst);
    run_to_end(server, worker);
    other.end();
    retire(server);
}

fn not_disturbed() {
    static STEPS: AtomicU32 = AtomicU32::new(0);

    open(3);
    let server = become_server();
    let (mut wake, mut sleep) = UnixStream::pair().unwrap();
    let sleeper = spawn_worker(server.tid(), move |_| sleep.read_exact(&mut [0]).unwrap());
    server.await_runnable(sleeper.task);
    server.run(sleeper.task);
    assert_only(sleeper.task, &server.take(List::Blocked));

    let captured = sleeper.task;
    let busy = spawn_worker(server.tid(), move |_| {
        STEPS.store(1, SeqCst);
        spin_until("the sleeper is captured", || captured.state() == RUNNABLE);
        for _ in 0..1_000_000 {
            assert_state(server, RUNNABLE);
        }
        STEPS.store(2, SeqCst);
    });
    server.await_runnable(busy.task);
    let waker = spawn(move || {
        wait_until("the other worker runs", || STEPS.load(SeqCst) == 1);
        wake.write_all(&[0]).unwrap();
    });
    server.run(busy.task);
    assert_eq!(STEPS.load(SeqCst), 2, "the server did not serve to the end");
    assert_state(busy.task, NONE);
    assert_only(captured, &server.take(List::Runnable));
    run_to_end(server, sleeper);
    for thread in [busy.thread, waker] {
        thread.join().unwrap();
    }
    retire(server);
}

/// Nothing but the tid that it names tells a server from a worker, from its next stop on.
fn roles() {
    open(3);
    let server = become_server();
    let task = spawn_worker(server.tid(), move |task| {
        task.server_tid.store(task.tid(), SeqCst);
        assert_eq!(task.switch_to(0), 0, "idles as a server until it is kicked");
        let worker = spawn_worker(task.tid(), |_| ());
        task.await_runnable(worker.task);
        run_to_end(task, worker);

        task.server_tid.store(server.tid(), SeqCst);
        task.status.store(RUNNABLE, SeqCst);
        assert_eq!(api::wait(0, UMCG_WAIT_ENQUEUE), 0, "waits as a worker");
    });
    server.await_runnable(task.task);
    server.run(task.task);
    assert_state(task.task, RUNNABLE);
    assert!(lists_are_empty(server), "a server is on no list");
    assert_eq!(api::kick(task.task.tid(), 0), 0);
    server.await_runnable(task.task);
    run_to_end(server, task);
    retire(server);
}

/// Coming back from the kernel is a stop, too: nobody is to run a server, so it goes on, and is on nobody's list.
fn role_at_capture() {
    open(2);
    let server = become_server();
    let (mut wake, mut sleep) = UnixStream::pair().unwrap();
    let task = spawn_worker(server.tid(), move |task| {
        task.server_tid.store(task.tid(), SeqCst);
        sleep.read_exact(&mut [0]).unwrap();
        assert_state(task, RUNNING);
        assert!(lists_are_empty(task), "it is on its own list");
        assert_eq!(task.switch_to(0), 0, "idles as a server until it is kicked");
        assert!(lists_are_empty(task));
    });
    server.await_runnable(task.task);
    server.run(task.task);
    assert_only(task.task, &server.take(List::Blocked));
    assert_state(task.task, BLOCKED);
    wake.write_all(&[0]).unwrap();
    wait_until("it idles", || task.task.state() == RUNNABLE);
    assert_eq!(api::kick(task.task.tid(), 0), 0);
    wait_until("it ends", || task.task.state() == NONE);
    task.thread.join().unwrap();
    assert!(lists_are_empty(server), "a server is on no list");
    retire(server);
}

/// Ends the calling thread, and unregisters nobody.
fn end_by_surprise() -> ! {
    // SAFETY: nothing waits for what the thread leaves undone; nobody joins it.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
    unreachable!("the thread has ended")
}

/// Its host ends while it runs: it runs on, and nobody hears of its blocks. The plain way back is gone, and it says so; with
/// an heir it goes there.
fn orphan() {
    open(3);
    let heir = become_server();
    let host = spawn_server(|task| {
        wait_until("there is a worker", || task.runnable_ptr.load(SeqCst) != 0);
        let worker = task.take(List::Runnable)[0];
        task.next_tid.store(worker.tid(), SeqCst);
        task.status.store(RUNNABLE, SeqCst);
        assert_eq!(api::wait(1_000_000, 0), -libc::ETIMEDOUT);
        end_by_surprise();
    });
    let gone = host.task;
    let heir_tid = heir.tid();
    let worker = spawn_worker(gone.tid(), move |task| {
        spin_until("its host has ended", || gone.state() == NONE);
        sleep(Duration::from_millis(1));
        assert_state(task, RUNNING);
        assert!(lists_are_empty(gone) && lists_are_empty(heir), "somebody was told of the block");
        assert_eq!(task.switch_to(0), -libc::ESRCH);
        assert_state(task, RUNNING);
        task.server_tid.store(heir_tid, SeqCst);
        assert_eq!(task.switch_to(0), 0, "it goes to its heir");
    });
    heir.await_runnable(worker.task);
    run_to_end(heir, worker);
    std::mem::forget(host.thread);
    retire(heir);
}

/// A captured worker whose server ends stays held, until it names another and is kicked.
fn heritage() {
    open(3);
    let heir = become_server();
    let (mut wake, mut sleep) = UnixStream::pair().unwrap();
    let host = spawn_server(|task| {
        wait_until("there is a worker", || task.runnable_ptr.load(SeqCst) != 0);
        task.run(task.take(List::Runnable)[0]);
        assert_eq!(task.take(List::Blocked).len(), 1);
        task.user_data.store(1, SeqCst);
        assert_eq!(task.await_list(List::Runnable).len(), 1);
        end_by_surprise();
    });
    let worker = spawn_worker(host.task.tid(), move |_| sleep.read_exact(&mut [0]).unwrap());
    wait_until("it is blocked", || host.task.user_data.load(SeqCst) == 1);
    wake.write_all(&[0]).unwrap();
    wait_until("its server has ended", || host.task.state() == NONE);
    assert_state(worker.task, RUNNABLE);

    worker.task.server_tid.store(heir.tid(), SeqCst);
    assert_eq!(api::kick(worker.task.tid(), 0), 0);
    heir.await_runnable(worker.task);
    run_to_end(heir, worker);
    std::mem::forget(host.thread);
    retire(heir);
}

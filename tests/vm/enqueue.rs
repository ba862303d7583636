// SPDX-License-Identifier: GPL-2.0-only
//! Who is put on which list by `UMCG_WAIT_ENQUEUE` and by `umcg_kick`, and who is told.
//!
//! The failures this guards against: a worker that waits and that no server knows of, which waits for ever; a worker that
//! is on a list twice, which makes the list a circle.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering::SeqCst;

use umcg::raw::{UMCG_TF_PREEMPT, UMCG_WAIT_ENQUEUE};

use crate::api::{self, BLOCKED, RUNNABLE, RUNNING};
use crate::cast::{
    List, Task, Worker, become_server, nap, open, retire, sched_yield, spawn_server, spawn_worker,
    spin_until, wait_until,
};
use crate::harness::Test;
use crate::scene::{Other, STEPS, assert_only, assert_state, lists_are_empty, run_to_end, stand_still};

pub const TESTS: &[Test] = &[
    Test::new("enqueue_with_a_next_queues_one_and_runs_the_other", with_next),
    Test::new("enqueue_goes_to_the_server_that_the_worker_names", to_named),
    Test::new("enqueue_with_a_next_goes_to_the_server_that_the_worker_names", to_named_with_next),
    Test::new("without_enqueue_a_move_is_the_programs_to_tell", without),
    Test::new("enqueue_of_who_does_not_wait_queues_nobody", nobody),
    Test::new("kick_queues_a_worker_however_it_came_to_wait", kick_held),
    Test::new("kick_queues_a_worker_at_the_server_that_it_names", kick_moved),
    Test::new("a_captured_worker_without_a_server_waits_for_one", orphan),
    Test::new("kick_leaves_who_does_not_wait_alone", kick_others),
    Test::new("a_worker_that_is_run_from_an_untaken_list_stays_on_it_once", untaken),
];

fn wait_enqueued(task: &Task, next: u32) -> i32 {
    task.next_tid.store(next, SeqCst);
    task.status.store(RUNNABLE, SeqCst);
    api::wait(0, UMCG_WAIT_ENQUEUE)
}

fn with_next() {
    open(3);
    let server = become_server();
    let second = spawn_worker(server.tid(), |task| {
        for _ in 0..20 {
            assert_eq!(task.switch_to(0), 0);
        }
    });
    server.await_runnable(second.task);
    let next = second.task;
    let first = spawn_worker(server.tid(), move |task| {
        for _ in 0..20 {
            assert_eq!(wait_enqueued(task, next.tid()), 0);
            assert_eq!(task.next_tid.load(SeqCst), 0, "not run");
        }
    });
    server.await_runnable(first.task);
    for _ in 0..20 {
        server.run(first.task);
        assert_state(second.task, RUNNABLE);
        assert_only(first.task, &server.take(List::Runnable));
    }
    run_to_end(server, first);
    run_to_end(server, second);
    assert!(lists_are_empty(server));
    retire(server);
}

fn to_named() {
    open(3);
    let server = become_server();
    let (host, other) = (server.tid(), Other::start());
    let named = other.tid();
    let worker = spawn_worker(host, move |task| {
        for _ in 0..20 {
            task.server_tid.store(named, SeqCst);
            assert_eq!(wait_enqueued(task, 0), 0);
        }
    });
    server.await_runnable(worker.task);
    for event in 1..=20 {
        server.run(worker.task);
        assert!(lists_are_empty(server), "the worker is not its host's any more");
        other.assert_only_told_of(worker.task, event);
        assert_eq!(server.switch_to(worker.task.tid()), -libc::EINVAL, "not its worker");
        worker.task.server_tid.store(host, SeqCst);
    }
    run_to_end(server, worker);
    other.end();
    retire(server);
}

fn to_named_with_next() {
    open(4);
    let server = become_server();
    let other = Other::start();
    let named = other.tid();
    let second = spawn_worker(server.tid(), |task| {
        assert_eq!(task.switch_to(0), 0);
    });
    server.await_runnable(second.task);
    let next = second.task;
    let first = spawn_worker(server.tid(), move |task| {
        task.server_tid.store(named, SeqCst);
        assert_eq!(wait_enqueued(task, next.tid()), 0);
    });
    server.await_runnable(first.task);
    server.run(first.task); // until the second waits
    assert_state(second.task, RUNNABLE);
    assert!(lists_are_empty(server));
    other.assert_only_told_of(first.task, 1);
    first.task.server_tid.store(server.tid(), SeqCst);
    run_to_end(server, first);
    run_to_end(server, second);
    other.end();
    retire(server);
}

fn without() {
    open(3);
    let server = become_server();
    let other = Other::start();
    let named = other.tid();
    let worker = spawn_worker(server.tid(), move |task| {
        task.server_tid.store(named, SeqCst);
        assert_eq!(task.switch_to(0), 0);
    });
    server.await_runnable(worker.task);
    server.run(worker.task); // 0 is its host, whatever server it names
    assert_state(worker.task, RUNNABLE);
    assert!(lists_are_empty(server) && lists_are_empty(other.0.task));
    assert_eq!(other.events(), 0);
    worker.task.server_tid.store(server.tid(), SeqCst);
    run_to_end(server, worker);
    other.end();
    retire(server);
}

fn nobody() {
    open(2);
    let server = become_server();
    let host = server.tid();
    let worker = spawn_worker(host, move |task| {
        assert_eq!(api::wait(0, UMCG_WAIT_ENQUEUE), 0, "it is RUNNING");
        assert_eq!(wait_enqueued(task, task.tid()), -libc::EINVAL);
        assert_eq!(wait_enqueued(task, 1 << 30), -libc::ESRCH);
        task.server_tid.store(1 << 30, SeqCst);
        assert_eq!(wait_enqueued(task, 0), -libc::ESRCH, "its server is gone");
        assert_state(task, RUNNING);
        task.server_tid.store(host, SeqCst);
        assert_eq!(task.switch_to(0), 0);
    });
    server.await_runnable(worker.task);
    server.next_tid.store(worker.task.tid(), SeqCst);
    server.status.store(RUNNABLE, SeqCst);
    assert_eq!(api::wait(0, UMCG_WAIT_ENQUEUE), 0, "the flag is nothing to a server");
    assert_state(worker.task, RUNNABLE);
    assert!(lists_are_empty(server));
    run_to_end(server, worker);
    retire(server);
}

/// A worker of each kind that waits, taken from all lists.
fn held_workers(server: &'static Task) -> Vec<Worker> {
    let fresh = spawn_worker(server.tid(), |_| _ = STEPS.fetch_add(1, SeqCst));
    server.await_runnable(fresh.task);
    let waiting = spawn_worker(server.tid(), |task| {
        assert_eq!(task.switch_to(0), 0);
        STEPS.fetch_add(1, SeqCst);
    });
    server.await_runnable(waiting.task);
    server.run(waiting.task);
    let (mut wake, mut theirs) = UnixStream::pair().unwrap();
    let captured = spawn_worker(server.tid(), move |_| {
        theirs.read_exact(&mut [0]).unwrap();
        STEPS.fetch_add(1, SeqCst);
    });
    server.await_runnable(captured.task);
    server.run(captured.task);
    assert_only(captured.task, &server.take(List::Blocked));
    wake.write_all(&[0]).unwrap();
    server.await_runnable(captured.task);
    let preempted = spawn_worker(server.tid(), |task| {
        task.status.fetch_or(UMCG_TF_PREEMPT, SeqCst);
        spin_until("preempted", || task.status.load(SeqCst) == RUNNING);
        STEPS.fetch_add(1, SeqCst);
    });
    server.await_runnable(preempted.task);
    server.run(preempted.task);
    assert_only(preempted.task, &server.take(List::Runnable));
    vec![fresh, waiting, captured, preempted]
}

fn kick_held() {
    open(8);
    let server = become_server();
    let workers = held_workers(server);
    for worker in &workers {
        let task = worker.task;
        assert_eq!(api::kick(task.tid(), 0), 0);
        assert_only(task, &server.take(List::Runnable));
        // The same for a server that idles, or is about to.
        let kicker = std::thread::spawn(move || {
            wait_until("the server waits", || server.state() == RUNNABLE);
            assert_eq!(api::kick(task.tid(), 0), 0);
        });
        server.await_runnable(task);
        kicker.join().unwrap();
        assert_state(task, RUNNABLE);
    }
    assert!(stand_still());
    assert_eq!(STEPS.load(SeqCst), 0, "a kick ran a worker");
    for worker in workers {
        run_to_end(server, worker);
    }
    assert_eq!(STEPS.load(SeqCst), 4);
    retire(server);
}

fn kick_moved() {
    open(8);
    let server = become_server();
    let other = Other::start();
    let workers = held_workers(server);
    for (event, worker) in (1..).zip(&workers) {
        worker.task.server_tid.store(other.tid(), SeqCst);
        assert_eq!(api::kick(worker.task.tid(), 0), 0);
        other.assert_only_told_of(worker.task, event);
        worker.task.server_tid.store(server.tid(), SeqCst);
    }
    assert!(lists_are_empty(server));
    for worker in workers {
        run_to_end(server, worker);
    }
    other.end();
    retire(server);
}

fn orphan() {
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    open(4);
    let server = become_server();
    let worker = spawn_worker(server.tid(), move |_| {
        theirs.read_exact(&mut [0]).unwrap();
        STEPS.fetch_add(1, SeqCst);
    });
    server.await_runnable(worker.task);
    server.run(worker.task);
    assert_only(worker.task, &server.take(List::Blocked));
    retire(server);

    ours.write_all(&[0]).unwrap();
    wait_until("it is captured", || worker.task.state() == RUNNABLE);
    assert!(stand_still());
    assert_eq!(api::kick(worker.task.tid(), 0), 0, "and does nothing: it names nobody");
    assert_eq!(STEPS.load(SeqCst), 0, "a captured worker ran when it had no server");

    let task = worker.task;
    let heir = spawn_server(move |heir| {
        task.server_tid.store(heir.tid(), SeqCst);
        assert_eq!(api::kick(task.tid(), 0), 0);
        heir.await_runnable(task);
        assert!(stand_still());
        assert_eq!(STEPS.load(SeqCst), 0);
        heir.run(task);
    });
    heir.thread.join().unwrap();
    worker.thread.join().unwrap();
    assert_eq!(STEPS.load(SeqCst), 1);
}

fn kick_others() {
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    open(6);
    let server = become_server();
    let sleeper = spawn_worker(server.tid(), move |_| theirs.read_exact(&mut [0]).unwrap());
    server.await_runnable(sleeper.task);
    server.run(sleeper.task);
    assert_only(sleeper.task, &server.take(List::Blocked));
    let host = server.tid();
    let asleep = sleeper.task;
    let worker = spawn_worker(host, move |task| {
        for tid in [task.tid(), host, asleep.tid()] {
            assert_eq!(api::kick(tid, 0), 0);
        }
        assert_eq!((task.state(), asleep.state()), (RUNNING, BLOCKED));
        assert_eq!(server.state(), RUNNABLE, "its host is not to be disturbed");
        task.status.store(RUNNABLE, SeqCst); // marked, and not waiting yet
        assert_eq!(api::kick(task.tid(), 0), 0);
        assert_eq!(task.state(), RUNNABLE);
        task.status.store(RUNNING, SeqCst);
    });
    server.await_runnable(worker.task);
    assert_eq!(api::kick(host, 0), 0);
    assert_state(server, RUNNING);
    run_to_end(server, worker);
    assert!(lists_are_empty(server));
    ours.write_all(&[0]).unwrap();
    server.await_runnable(sleeper.task);
    let tid = sleeper.task.tid();
    run_to_end(server, sleeper);
    assert_eq!(api::kick(tid, 0), -libc::ESRCH);
    retire(server);
}

/// A second push of an entry would tie the list to itself, and whoever takes it would walk for ever.
fn untaken() {
    open(3);
    let server = become_server();
    let spawn = || {
        let worker = spawn_worker(server.tid(), |task| {
            assert_eq!(wait_enqueued(task, 0), 0);
            nap();
            sched_yield();
        });
        let addr = worker.task.as_ptr().addr() as u64;
        wait_until("it is announced", || server.runnable_ptr.load(SeqCst) == addr);
        worker
    };
    let (first, second) = (spawn(), spawn());
    for worker in [&first, &second] {
        server.run(worker.task); // waits
        server.run(worker.task); // blocks
        assert_only(worker.task, &server.take(List::Blocked));
        wait_until("it is captured", || worker.task.state() == RUNNABLE);
        server.run(worker.task); // yields
    }
    let tasks = server.take(List::Runnable);
    assert!(tasks.len() == 2 && std::ptr::eq(tasks[0], first.task) && std::ptr::eq(tasks[1], second.task));
    run_to_end(server, first);
    run_to_end(server, second);
    assert!(lists_are_empty(server));
    retire(server);
}

// SPDX-License-Identifier: MIT OR Apache-2.0
//! Cooperative switching: whom a server names is who runs, and nobody else does.

mod common;

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use common::{alone, eventually, open};
use umcg::{Domain, Server, State, Task, Tid};

/// Runs workers first in, first out, until `left` is 0.
fn serve(server: &Server<'_>, left: &AtomicUsize) {
    let mut ready: VecDeque<Task<'_>> = VecDeque::new();
    loop {
        server.mark_runnable();
        if left.load(Ordering::SeqCst) == 0 {
            return;
        }
        assert_eq!(server.take_blocked().count(), 0, "the futex back end sees nobody block");
        ready.extend(server.take_runnable());
        let next = ready.pop_front();
        if !server.run(next.and_then(|worker| worker.tid())).expect("it is RUNNABLE") {
            next.into_iter().for_each(|worker| ready.push_front(worker));
        }
    }
}

/// Runs one worker, whatever events come first.
fn run(server: &Server<'_>, worker: Task<'_>) {
    loop {
        server.mark_runnable();
        if server.run(worker.tid()).unwrap() {
            return;
        }
    }
}

/// A worker's life: registers, works, unregisters.
fn live(domain: &Domain, server: Tid, left: &AtomicUsize, work: impl FnOnce(&umcg::Worker<'_>)) {
    let worker = domain.register_worker(server).expect("the server is there");
    work(&worker);
    drop(worker);
    left.fetch_sub(1, Ordering::SeqCst);
    domain.kick(server).expect("the server is there");
}

#[test]
fn one_worker_of_a_server_runs_at_a_time() {
    let _alone = alone();
    let domain = open(9);
    let server = domain.register_server().unwrap();
    let (tid, left) = (Tid::current(), AtomicUsize::new(8));
    let (inside, rounds) = (AtomicUsize::new(0), AtomicUsize::new(0));

    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                live(&domain, tid, &left, |worker| {
                    for _ in 0..200 {
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "exclusive");
                        rounds.fetch_add(1, Ordering::SeqCst);
                        thread::yield_now(); // room for another, if there is one
                        inside.fetch_sub(1, Ordering::SeqCst);
                        worker.yield_now().unwrap();
                    }
                });
            });
        }
        serve(&server, &left);
    });
    assert_eq!(rounds.into_inner(), 8 * 200);
}

#[test]
fn workers_take_turns_in_the_order_that_the_server_chooses() {
    let _alone = alone();
    let domain = open(4);
    let server = domain.register_server().unwrap();
    let (tid, left) = (Tid::current(), AtomicUsize::new(3));
    let turns = Mutex::new(Vec::new());

    thread::scope(|scope| {
        for name in 0..3 {
            let (domain, left, turns) = (&domain, &left, &turns);
            scope.spawn(move || {
                live(domain, tid, left, |worker| {
                    for _ in 0..5 {
                        turns.lock().unwrap().push(name);
                        worker.yield_now().unwrap();
                    }
                });
            });
        }
        // Nobody has run: all three are on the list. From here on the queue decides.
        eventually("three workers wait", || listed(&server) == 3);
        serve(&server, &left);
    });

    let turns = turns.into_inner().unwrap();
    assert_eq!(turns.len(), 15);
    for round in turns.chunks(3).skip(1) {
        assert_eq!(round, &turns[..3], "first in, first out: {turns:?}");
    }
}

/// How many workers are on the server's runnable list; it is not taken.
fn listed(server: &Server<'_>) -> usize {
    // SAFETY: only this thread takes the list, and what is on it stays registered until it is run.
    unsafe {
        let mut count = 0;
        let mut next = (&raw const (*server.as_ptr()).umcg_runnable_ptr).read_volatile();
        while let Some(worker) = (next as *const umcg::raw::umcg_task).as_ref() {
            count += 1;
            next = worker.umcg_runnable_ptr;
        }
        count
    }
}

#[test]
fn a_worker_passes_the_serving_on() {
    let _alone = alone();
    let domain = open(3);
    let server = domain.register_server().unwrap();
    let (tid, left) = (Tid::current(), AtomicUsize::new(2));
    let second: Mutex<Option<Tid>> = Mutex::new(None);
    let story = Mutex::new(Vec::new());
    let tell = |what| story.lock().unwrap().push(what);

    thread::scope(|scope| {
        scope.spawn(|| {
            *second.lock().unwrap() = Some(Tid::current());
            live(&domain, tid, &left, |_| tell("second runs"));
        });
        eventually("the second registers", || {
            let tid = *second.lock().unwrap();
            tid.and_then(|tid| domain.task(tid)).is_some()
        });
        server.mark_runnable();
        assert_eq!(server.take_runnable().count(), 1, "known, but not to be run by us");

        scope.spawn(|| {
            live(&domain, tid, &left, |first| {
                tell("first runs");
                let second = second.lock().unwrap().unwrap();
                assert!(first.switch_to(second).unwrap());
                tell("first runs again");
            });
        });
        eventually("the first registers", || listed(&server) == 1);
        server.mark_runnable();
        let first = server.take_runnable().next().unwrap();
        run(&server, first);
        tell("the second is done, and its host goes on");

        // The first switched away, so it is on no list: we know it.
        assert_eq!(first.state(), State::Runnable);
        run(&server, first);
        serve(&server, &left);
    });
    assert_eq!(
        story.into_inner().unwrap(),
        ["first runs", "second runs", "the second is done, and its host goes on", "first runs again"]
    );
}

#[test]
fn a_worker_that_exits_by_surprise_is_found_with_none() {
    let _alone = alone();
    let domain = open(2);
    let server = domain.register_server().unwrap();
    let tid = Tid::current();

    thread::scope(|scope| {
        scope.spawn(|| std::mem::forget(domain.register_worker(tid).unwrap()));
        let worker = loop {
            server.mark_runnable();
            if let Some(worker) = server.take_runnable().next() {
                break worker;
            }
            server.run(None).unwrap();
        };
        run(&server, worker);
        loop {
            server.mark_runnable();
            if let Some(exited) = server.take_runnable().next() {
                assert_eq!((exited, exited.state()), (worker, State::None));
                return;
            }
            server.run(None).unwrap();
        }
    });
}

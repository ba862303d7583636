// SPDX-License-Identifier: GPL-2.0-only
//! A held task is neither lost, nor inserted twice, nor let go unasked, in whatever order the CPUs meet.

mod core;

use loom::sync::Arc;
use loom::thread;
use umcg_rooms::{Atomics, check_three, custody_fetch, custody_hold, custody_is_held};

use core::Core;

/// What one CPU does to the task.
type Cpu = fn(&Core);

/// Runs each CPU in a thread of its own, until all are done.
fn race<const N: usize>(task: Core, cpus: [Cpu; N]) -> Arc<Core> {
    let task = Arc::new(task);
    let threads = cpus.map(|cpu| {
        let task = task.clone();
        thread::spawn(move || cpu(&task))
    });
    for thread in threads {
        thread.join().expect("a panic of a thread is the model's");
    }
    task
}

/// What is to hold when all CPUs are done; if it ran, no CPU is left with the duty to insert it again.
fn assert_runs(task: &Core, expected: u32) {
    task.settle();
    let runs = task.runs();
    assert!(runs == expected, "the task went on to user code {runs} times");
    assert!(!custody_fetch(task.custody().at()), "the task runs, and is still to be fetched");
}

const SWITCH_OUT: Cpu = Core::enqueue;
const RELEASE: Cpu = Core::release;
const TAKE_BACK: Cpu = Core::take_back;
const LET_GO: Cpu = Core::let_go;
const LET_GO_AND_RUN: Cpu = |task| {
    task.let_go();
    task.run();
};

/// The race that lost tasks before there was a custody word: CPU 0 is about to switch the task out when CPU 1
/// releases it. Were ops.enqueue to park it after the release looked, nobody would ever insert it.
fn release_during_switch_out(atomics: Atomics) {
    let task = race(Core::held(atomics), [SWITCH_OUT, RELEASE]);
    assert_runs(&task, 1);
}

#[test]
fn a_release_during_the_switch_out_is_not_lost() {
    loom::model(|| release_during_switch_out(Atomics::Kernel));
}

#[test]
#[should_panic(expected = "went on to user code 0 times")]
fn torn_a_release_during_the_switch_out_is_lost() {
    loom::model(|| release_during_switch_out(Atomics::Torn));
}

/// A kick and an event release the same task at once; each then looks for it in ops.dispatch.
fn two_releases(atomics: Atomics) {
    let task = race(Core::held(atomics), [SWITCH_OUT, RELEASE, RELEASE]);
    assert_runs(&task, 1);
}

#[test]
fn two_releases_run_the_task_once() {
    check_three(|| two_releases(Atomics::Kernel));
}

#[test]
#[should_panic(expected = "went on to user code 0 times")]
fn torn_two_releases_lose_the_task() {
    check_three(|| two_releases(Atomics::Torn));
}

/// The sweep lets a parked task go, which takes it through a run queue and back, while another CPU releases it.
fn release_during_let_go(atomics: Atomics) {
    let task = race(Core::parked(atomics), [LET_GO_AND_RUN, RELEASE]);
    assert_runs(&task, 1);
}

#[test]
fn a_release_of_a_task_that_is_let_go_is_not_lost() {
    loom::model(|| release_during_let_go(Atomics::Kernel));
}

#[test]
#[should_panic(expected = "went on to user code 0 times")]
fn torn_a_release_of_a_task_that_is_let_go_is_lost() {
    loom::model(|| release_during_let_go(Atomics::Torn));
}

/// sched_setaffinity() makes the core take the parked task and hand it to ops.enqueue again. A CPU that
/// fetched it in between notes a sequence number; if that is the old one, the core drops the insertion. So
/// ops.enqueue, which sets the new number, must see by then that the task was released: its failed exchange
/// has to be a barrier.
fn release_during_change(atomics: Atomics) {
    let task = race(Core::parked(atomics), [TAKE_BACK, RELEASE]);
    assert_runs(&task, 1);
}

#[test]
fn a_release_while_the_core_takes_the_task_back_is_not_lost() {
    loom::model(|| release_during_change(Atomics::Kernel));
}

#[test]
#[should_panic(expected = "went on to user code 0 times")]
fn without_barriers_a_release_while_the_core_takes_the_task_back_is_lost() {
    loom::model(|| release_during_change(Atomics::AcquireRelease));
}

#[test]
fn a_task_that_is_let_go_and_taken_back_stays_held() {
    loom::model(|| {
        let task = race(Core::parked(Atomics::Kernel), [TAKE_BACK, LET_GO_AND_RUN]);
        assert_runs(&task, 0);
        // Held, and not lost: a release still finds it.
        task.release();
        assert_runs(&task, 1);
    });
}

/// All three at once.
fn release_during_let_go_and_change(atomics: Atomics) {
    let task = race(Core::parked(atomics), [TAKE_BACK, LET_GO_AND_RUN, RELEASE]);
    assert_runs(&task, 1);
}

#[test]
fn a_release_of_a_let_go_task_that_is_taken_back_is_not_lost() {
    check_three(|| release_during_let_go_and_change(Atomics::Kernel));
}

#[test]
#[should_panic(expected = "went on to user code 0 times")]
fn torn_a_release_of_a_let_go_task_that_is_taken_back_is_lost() {
    check_three(|| release_during_let_go_and_change(Atomics::Torn));
}

/// A CPU that fetches a task may be slow to note the sequence number: then it inserts a task that was
/// taken back and parked anew. If that one is released meanwhile, it runs while some CPU is still to fetch it.
/// It must be possible to hold it again at once, or a preempted worker would stay in user code.
#[test]
fn a_task_that_runs_can_be_held_whatever_became_of_its_release() {
    check_three(|| {
        let start: Cpu = |task| {
            task.start();
        };
        let task = race(Core::parked(Atomics::Kernel), [TAKE_BACK, LET_GO, start]);
        task.settle();
        if task.runs() == 0 {
            task.dispatch(); // by the hint that the release left
        }
        task.settle();
        assert_eq!(task.runs(), 1);
        custody_hold(task.custody().at());
        assert!(custody_is_held(task.custody().at()), "the task cannot be held");
    });
}

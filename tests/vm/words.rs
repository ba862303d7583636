// SPDX-License-Identifier: GPL-2.0-only
//! The words of `struct umcg_task` through all changes of a worker's state: what the kernel side writes, and when, and
//! what it leaves alone.
//!
//! The failures this guards against: a change that nobody tests with a word of the program in it loses that; a request to
//! preempt outlives the run that it was made for, and ends the next one; a time that is not that of the change.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering::SeqCst;
use std::thread::sleep;
use std::time::Duration;

use umcg::raw::{UMCG_TF_PREEMPT as PREEMPT, UMCG_WAIT_ENQUEUE};

use crate::api::{self, BLOCKED, NONE, RUNNABLE, RUNNING, STATE_MASK};
use crate::cast::{List, Task, become_server, nap, open, retire, sched_yield, spawn_worker, spin_until};
use crate::harness::Test;
use crate::preempting::compute;
use crate::scene::{CLOCK_ERROR_NS, assert_only, assert_state, lists_are_empty, monotonic_ns, run_to_end};

pub const TESTS: &[Test] = &[
    Test::new("every_change_leaves_the_programs_own_words_alone", own_words),
    Test::new("the_flag_ends_however_a_worker_leaves_running", flag_ends),
    Test::new("a_time_is_that_of_the_change_and_of_no_other", times),
];

/// What a program keeps in a task; each has another.
struct Own {
    task: &'static Task,
    bits: u32,
    data: u64,
}

impl Own {
    fn of(task: &'static Task, number: u32) -> Self {
        let own =
            Self { task, bits: 0xa5c0_0000 | number << 16, data: 0xfeed_0bad_cafe_0000 | u64::from(number) };
        task.user_data.store(own.data, SeqCst);
        task.status.fetch_or(own.bits, SeqCst);
        own
    }

    fn assert_kept(&self, after: &str) {
        let status = self.task.status.load(SeqCst);
        assert_eq!(status & 0xffff_0000, self.bits, "after {after}");
        assert_eq!(self.task.user_data.load(SeqCst), self.data, "after {after}");
        assert_eq!(self.task.reserved.load(SeqCst), 0, "after {after}");
    }
}

/// From RUNNING to RUNNABLE, with all other bits as they are.
fn mark(task: &Task) {
    assert_eq!(task.status.fetch_add(RUNNABLE - RUNNING, SeqCst) & STATE_MASK, RUNNING);
}

/// The same before a wait for `next`; for who has words of its own to keep.
fn switch(task: &Task, next: u32, flags: u32) {
    task.next_tid.store(next, SeqCst);
    mark(task);
    assert_eq!(api::wait(0, flags), 0);
    assert_state(task, RUNNING);
}

/// Idles until the list has an entry, as `Task::await_list` does.
fn await_entry(server: &Task, list: List) -> &'static Task {
    loop {
        mark(server);
        server.next_tid.store(0, SeqCst);
        if let [task] = server.take(list)[..] {
            server.status.fetch_and(!STATE_MASK, SeqCst); // RUNNING is 0; an event may have been first
            return task;
        }
        assert_eq!(api::wait(0, 0), 0);
    }
}

/// Runs it once; the mark of an event that came before may end a wait.
fn run(server: &Task, worker: &Task) {
    switch(server, worker.tid(), 0);
    while server.next_tid.load(SeqCst) != 0 {
        switch(server, worker.tid(), 0);
    }
}

fn own_words() {
    open(3);
    let server = become_server();
    let second = spawn_worker(server.tid(), |task| {
        switch(task, 0, 0);
    });
    server.await_runnable(second.task);
    let next = second.task.tid();
    let first = spawn_worker(server.tid(), move |task| {
        nap();
        task.status.fetch_or(PREEMPT, SeqCst);
        spin_until("it is preempted", || task.status.load(SeqCst) & PREEMPT == 0);
        sched_yield();
        switch(task, 0, 0);
        switch(task, 0, UMCG_WAIT_ENQUEUE);
        switch(task, next, 0);
        // SAFETY: ends this thread, for which nobody waits.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
    });
    server.await_runnable(first.task);
    let all = [Own::of(server, 1), Own::of(first.task, 2), Own::of(second.task, 3)];
    let kept = |after: &str| all.iter().for_each(|own| own.assert_kept(after));
    let task = first.task;

    run(server, task);
    kept("a block");
    assert_state(task, BLOCKED);
    assert_only(task, &server.take(List::Blocked));
    assert!(std::ptr::eq(await_entry(server, List::Runnable), task));
    kept("a capture");
    for after in ["preemption", "a plain yield"] {
        run(server, task);
        kept(after);
        assert_only(task, &server.take(List::Runnable));
    }
    run(server, task);
    kept("a wait");
    assert_eq!(api::kick(task.tid(), 0), 0);
    kept("a kick");
    assert_only(task, &server.take(List::Runnable));
    run(server, task);
    kept("a wait that queues");
    assert_only(task, &server.take(List::Runnable));
    run(server, task);
    kept("a direct switch");
    assert_state(task, RUNNABLE);
    assert!(lists_are_empty(server));
    run(server, task);
    assert_state(task, NONE);
    kept("an exit by surprise");
    assert_only(task, &server.take(List::Runnable));
    run(server, second.task);
    assert_state(second.task, NONE);
    kept("an unregistration");
    second.thread.join().unwrap();
    std::mem::forget(first.thread);
    assert_eq!(api::unregister(server.as_ptr()), 0);
    kept("its own unregistration");
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Block,
    Yield,
    Wait,
    Enqueue,
    Direct,
    Unregister,
}

/// A tick may be first, and preempt it; then it is run again, and leaves as it wanted to.
fn flag_ends() {
    use Way::{Block, Direct, Enqueue, Unregister, Wait, Yield};

    open(3);
    let server = become_server();
    let second = spawn_worker(server.tid(), |task| {
        while task.user_data.load(SeqCst) == 0 {
            assert_eq!(task.switch_to(0), 0);
        }
    });
    server.await_runnable(second.task);
    for way in [Block, Yield, Wait, Enqueue, Direct, Unregister] {
        for _ in 0..5 {
            leaves(server, second.task, way);
        }
    }
    second.task.user_data.store(1, SeqCst);
    run_to_end(server, second);
    retire(server);
}

fn leaves(server: &'static Task, second: &'static Task, way: Way) {
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    let worker = spawn_worker(server.tid(), move |task| {
        task.status.fetch_or(PREEMPT, SeqCst);
        match way {
            Way::Block => theirs.read_exact(&mut [0]).unwrap(),
            Way::Yield => sched_yield(),
            Way::Wait => switch(task, 0, 0),
            Way::Enqueue => switch(task, 0, UMCG_WAIT_ENQUEUE),
            Way::Direct => switch(task, second.tid(), 0),
            Way::Unregister => return retire(task),
        }
        let stopped_ns = task.runnable_ts.load(SeqCst);
        assert_eq!(task.status.load(SeqCst), RUNNING, "{way:?}");
        compute();
        assert_eq!(task.runnable_ts.load(SeqCst), stopped_ns, "{way:?}: preempted in a later run");
    });
    let task = worker.task;
    server.await_runnable(task);
    // After its own mark it has the flag until it is RUNNING again.
    let is_own = [Way::Wait, Way::Enqueue, Way::Direct].contains(&way);
    while task.state() != NONE {
        server.run(task);
        let status = task.status.load(SeqCst);
        assert!(is_own || status & PREEMPT == 0, "{way:?}: {status:#x}");
        server.take(List::Runnable);
        if !server.take(List::Blocked).is_empty() {
            ours.write_all(&[0]).unwrap();
            server.await_runnable(task);
        }
    }
    assert_eq!(task.status.load(SeqCst), NONE, "{way:?}");
    worker.thread.join().unwrap();
    api::task_free(task.as_ptr());
}

/// The two times of a task.
fn times_of(task: &Task) -> (u64, u64) {
    (task.blocked_ts.load(SeqCst), task.runnable_ts.load(SeqCst))
}

/// Does `act`, and answers whether `ts` is of that moment.
fn is_of(act: impl FnOnce(), ts: impl FnOnce() -> u64) -> bool {
    let before_ns = monotonic_ns();
    act();
    (before_ns - CLOCK_ERROR_NS..=monotonic_ns() + CLOCK_ERROR_NS).contains(&ts())
}

fn times() {
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    open(3);
    let server = become_server();
    let second = spawn_worker(server.tid(), |task| assert_eq!(task.switch_to(0), 0));
    server.await_runnable(second.task);
    let next = second.task.tid();
    let worker = spawn_worker(server.tid(), move |task| {
        theirs.read_exact(&mut [0]).unwrap();
        task.status.fetch_or(PREEMPT, SeqCst);
        spin_until("it is preempted", || task.status.load(SeqCst) == RUNNING);
        sched_yield();
        for (next, flags) in [(0, 0), (0, UMCG_WAIT_ENQUEUE), (next, 0)] {
            switch(task, next, flags);
        }
    });
    let task = worker.task;
    let (blocked, runnable) = (|| task.blocked_ts.load(SeqCst), || task.runnable_ts.load(SeqCst));
    server.await_runnable(task);
    assert!(is_of(|| server.run(task), blocked), "of the block");
    assert_only(task, &server.take(List::Blocked));
    let old = times_of(task);
    sleep(Duration::from_millis(20));
    assert_eq!(times_of(task), old);
    let wake = || {
        ours.write_all(&[0]).unwrap();
        server.await_runnable(task);
    };
    assert!(is_of(wake, runnable), "of the capture");
    for by in ["preemption", "a plain yield"] {
        sleep(Duration::from_millis(5));
        assert!(is_of(|| server.run(task), runnable), "of {by}");
        assert_only(task, &server.take(List::Runnable));
    }
    assert_eq!(blocked(), old.0, "that was no block");
    // What the program does itself has no time.
    let old = times_of(task);
    for _ in 0..3 {
        sleep(Duration::from_millis(5));
        server.run(task);
        assert_state(task, RUNNABLE);
        server.take(List::Runnable);
        assert_eq!(api::kick(task.tid(), 0), 0);
        assert_only(task, &server.take(List::Runnable));
        assert_eq!(times_of(task), old);
    }
    run_to_end(server, worker);
    assert_eq!(times_of(task), old, "it was run, and has unregistered");
    run_to_end(server, second);
    retire(server);
}

// SPDX-License-Identifier: GPL-2.0-only
//! A worker is on its server's list before its `umcg_register` has come to wait, and may be run from then on.
//!
//! The failure this guards against: the library has seen that it must wait, and calls the kernel; meanwhile
//! the worker is made RUNNING, and the call is taken for a `sched_yield` of the worker's own, that is for a
//! wish to be preempted.

use std::hint::spin_loop;
use std::thread::spawn;

use crate::api::NONE;
use crate::cast::{List, Task, become_server, become_worker, open, retire};
use crate::harness::{Counters, Test};
use crate::scene::{assert_only, assert_state};

pub const TESTS: &[Test] = &[Test::new("a_worker_that_is_run_before_it_waits_goes_on", run_at_once)];

const TIMES: u32 = 500;

fn run_at_once() {
    open(2);
    let server = become_server();
    let task = Task::alloc();
    let server_tid = server.tid();
    let counters = Counters::now();
    for _ in 0..TIMES {
        let thread = spawn(move || {
            become_worker(task, server_tid);
            retire(task);
        });
        assert_only(task, &poll(server));
        server.run(task);
        assert_state(task, NONE);
        thread.join().unwrap();
    }
    retire(server);
    assert_eq!(counters.added("preemptions"), 0);
}

/// Takes the runnable list as soon as there is one, without the switch that waiting would be.
fn poll(server: &Task) -> Vec<&'static Task> {
    loop {
        let tasks = server.take(List::Runnable);
        if !tasks.is_empty() {
            return tasks;
        }
        spin_loop();
    }
}

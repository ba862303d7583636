// SPDX-License-Identifier: GPL-2.0-only
//! A worker that blocks is reported BLOCKED to its host, and stops before user code when it is done.
//!
//! The failure this guards against: a worker that returns from the kernel runs on beside the worker that its
//! server has started meanwhile.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;

use crate::api::{BLOCKED, NONE, RUNNABLE};
use crate::cast::{List, become_server, open, retire, spawn_worker};
use crate::harness::Test;

pub const TESTS: &[Test] = &[Test::new("blocking_in_a_socket_read_is_reported_and_captured", socket)];

/// User code of the worker; it stands still while the worker is not RUNNING.
static STEPS: AtomicU64 = AtomicU64::new(0);

fn socket() {
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    open(8);
    let server = become_server();
    let worker = spawn_worker(server.tid(), move |_| {
        STEPS.fetch_add(1, SeqCst);
        theirs.read_exact(&mut [0]).unwrap();
        STEPS.fetch_add(1, SeqCst);
    });
    server.await_runnable(worker.task);
    assert_eq!(STEPS.load(SeqCst), 0, "a worker ran before it was run");

    server.run(worker.task);
    assert_eq!(server.take(List::Blocked).len(), 1);
    assert_eq!(worker.task.state(), BLOCKED);

    ours.write_all(&[0]).unwrap();
    server.await_runnable(worker.task);
    assert_eq!(worker.task.state(), RUNNABLE);
    assert_eq!(STEPS.load(SeqCst), 1, "user code ran between the block and the capture");

    server.run(worker.task);
    assert_eq!(STEPS.load(SeqCst), 2);
    assert_eq!(worker.task.state(), NONE);
    worker.thread.join().unwrap();
    retire(server);
}

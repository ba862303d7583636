// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the tests share: one domain a process, so one test at a time; and a socket that is nobody's, so that every
//! domain has the futex back end.

#![allow(dead_code)] // each test file uses its part

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use umcg::raw::{self, umcg_task};
use umcg::{Domain, OpenOptions, State, Task, Tid};

pub const NO_SOCKET: &str = "/nonexistent/umcg.sock";

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

pub fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

pub fn open(max_tasks: u32) -> Domain {
    let options = OpenOptions::new(max_tasks).socket(NO_SOCKET).fallback(true);
    Domain::open(&options).expect("the fallback needs no loader")
}

/// Opens with the raw interface, and closes again when dropped.
pub struct RawDomain;

impl RawDomain {
    pub fn open(max_tasks: u32) -> Self {
        let socket = Some(Path::new(NO_SOCKET));
        raw::open(socket, max_tasks, raw::UMCG_OPEN_FALLBACK).expect("the fallback needs no loader");
        Self
    }
}

impl Drop for RawDomain {
    fn drop(&mut self) {
        if !thread::panicking() {
            raw::close().expect("the test has unregistered its tasks");
        }
    }
}

/// A struct as a program prepares it for registration.
pub fn prepared(server_tid: u32, state: u32) -> *mut umcg_task {
    let task = raw::task_alloc();
    assert!(!task.is_null(), "the domain has room");
    // SAFETY: just allocated, so nobody else knows it.
    unsafe {
        (*task).umcg_server_tid = server_tid;
        (*task).umcg_status = state;
    }
    task
}

/// The calling thread as a server, in the raw interface.
pub fn raw_server() -> *mut umcg_task {
    let task = prepared(Tid::current().get(), raw::UMCG_STATE_RUNNING);
    raw::register(task, 0).expect("a server that was prepared like this registers");
    task
}

/// Waits, not as a server but as a test, until `condition` holds.
pub fn eventually(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(60), "never happened: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Waits until a task waits: its status says so before its thread sleeps, and that is what the others go by.
pub fn until_runnable(task: Task<'_>) {
    eventually("the task becomes RUNNABLE", || task.state() == State::Runnable);
}

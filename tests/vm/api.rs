// SPDX-License-Identifier: GPL-2.0-only
//! The C API's calls as the tests use them: 0 or a negative errno, raw structs.
//!
//! Tests speak to the contract, so they stay below the safe Rust API, which checks some of it itself.

use std::path::Path;

use umcg::raw::{self, Errno};
pub use umcg::raw::{
    UMCG_STATE_BLOCKED as BLOCKED, UMCG_STATE_MASK as STATE_MASK, UMCG_STATE_NONE as NONE,
    UMCG_STATE_RUNNABLE as RUNNABLE, UMCG_STATE_RUNNING as RUNNING, current, task_alloc, task_free,
    umcg_task,
};

fn as_c(result: Result<(), Errno>) -> i32 {
    result.map_or_else(|errno| -errno.raw(), |()| 0)
}

pub fn open(socket: Option<&Path>, max_tasks: u32, flags: u32) -> i32 {
    as_c(raw::open(socket, max_tasks, flags))
}

pub fn close() -> i32 {
    as_c(raw::close())
}

pub fn register(task: *mut umcg_task, flags: u32) -> i32 {
    as_c(raw::register(task, flags))
}

pub fn unregister(task: *mut umcg_task) -> i32 {
    as_c(raw::unregister(task))
}

pub fn wait(timeout_ns: u64, flags: u32) -> i32 {
    as_c(raw::wait(timeout_ns, flags))
}

pub fn kick(tid: u32, flags: u32) -> i32 {
    as_c(raw::kick(tid.cast_signed(), flags))
}

pub fn backend() -> String {
    raw::backend().to_string_lossy().into_owned()
}

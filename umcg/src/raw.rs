// SPDX-License-Identifier: MIT OR Apache-2.0
//! The ten calls as `include/umcg.h` has them, with an [`Errno`] for the negative return value, and the layout.
//!
//! This is what `libumcg` exports, and what a program needs that follows the C header word by word: it prepares the
//! `umcg_task` itself, through the pointer, and walks the lists itself. All of it is safe to *call*: pointers are
//! compared with the domain's addresses, never followed. Following them is the caller's `unsafe`, and so is the
//! promise not to do it after [`close`].
//!
//! `docs/abi.md` has the contract; errors are listed with each call in the header.

use std::ffi::CStr;
use std::path::Path;

pub use crate::errno::Errno;
pub use crate::shared_abi::{
    UMCG_ABI_VERSION, UMCG_OPEN_FALLBACK, UMCG_STATE_BLOCKED, UMCG_STATE_MASK, UMCG_STATE_NONE,
    UMCG_STATE_RUNNABLE, UMCG_STATE_RUNNING, UMCG_TF_PREEMPT, UMCG_WAIT_ENQUEUE, umcg_task,
};

use crate::layout::Cell;
use crate::process;
use crate::thread::{self, Thread};

/// `umcg_open`: opens this process's domain at the loader that listens on `socket`.
///
/// `None` means `$UMCG_SOCKET`, else `/run/scx_umcg/umcg.sock`.
pub fn open(socket: Option<&Path>, max_tasks: u32, flags: u32) -> Result<(), Errno> {
    process::open(socket, max_tasks, flags).map(drop)
}

/// `umcg_close`: closes the domain. Its memory is gone afterwards, unless a [`Domain`](crate::Domain) keeps it.
pub fn close() -> Result<(), Errno> {
    process::close()
}

/// `umcg_task_alloc`: a struct that is zeroed but for status NONE; null if the domain is full or not open.
#[must_use]
pub fn task_alloc() -> *mut umcg_task {
    process::current()
        .map_or(std::ptr::null_mut(), |inner| inner.memory.alloc().map_or(std::ptr::null_mut(), task_of))
}

/// `umcg_task_free`: gives it back. Ignores null, what is not of this domain, and registered tasks.
pub fn task_free(task: *mut umcg_task) {
    let Some(inner) = process::current() else {
        return;
    };
    if let Some(index) = inner.memory.index_of(task.addr() as u64) {
        inner.free(index);
    }
}

/// `umcg_register`: registers the calling thread; a worker's call returns once it is run.
pub fn register(task: *mut umcg_task, flags: u32) -> Result<(), Errno> {
    if flags != 0 {
        return Err(Errno::EINVAL);
    }
    let inner = process::current().ok_or(Errno::EFAULT)?;
    crate::register::register(inner, task.addr() as u64)
}

/// `umcg_unregister`: ends the calling thread's registration.
///
/// `EBUSY`: the server serves a worker; or in a signal handler that interrupted one of these calls of this thread.
pub fn unregister(task: *mut umcg_task) -> Result<(), Errno> {
    crate::register::unregister(task.addr() as u64)
}

/// `umcg_wait`: with status RUNNING returns at once, otherwise gives up the CPU to `umcg_next_tid`.
///
/// `timeout_ns` is relative, nanoseconds; 0 for none.
#[inline]
pub fn wait(timeout_ns: u64, flags: u32) -> Result<(), Errno> {
    crate::wait::wait(timeout_ns, flags)
}

/// `umcg_kick`: has a task look around, or leave the CPU.
pub fn kick(tid: libc::pid_t, flags: u32) -> Result<(), Errno> {
    if flags != 0 {
        return Err(Errno::EINVAL);
    }
    let tid = u32::try_from(tid).map_err(|_| Errno::ESRCH)?;
    crate::register::kick(tid)
}

/// `umcg_self`: the calling thread's struct; null if it is not registered. Async-signal-safe.
#[must_use]
pub fn current() -> *mut umcg_task {
    thread::with(|thread| thread.registration().map_or(std::ptr::null_mut(), |me| task_of(me.task)))
}

/// `umcg_backend`: "sched_ext", "futex" or "none".
#[must_use]
pub fn backend() -> &'static CStr {
    match thread::with(Thread::domain).or_else(process::current) {
        None => c"none",
        Some(inner) if inner.is_scheduled() => c"sched_ext",
        Some(_) => c"futex",
    }
}

/// The public half of a cell, for callers that follow the header. Its memory is atomics to us, and may be written to through
/// the pointer: every word of a cell allows both.
pub(crate) fn task_of(cell: &Cell) -> *mut umcg_task {
    std::ptr::from_ref(cell).cast::<umcg_task>().cast_mut()
}

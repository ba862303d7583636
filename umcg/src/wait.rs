// SPDX-License-Identifier: MIT OR Apache-2.0
//! `umcg_wait`: the hot path.
//!
//! With the sched_ext back end the call is: leave the arguments in the cell, mark the status, `sched_yield(2)`. The kernel side
//! switches to the next task inside that system call and returns from it when this task is RUNNING again; it
//! may also return early, for instance to run a signal handler, so the call loops.

use std::sync::atomic::Ordering;

use crate::errno::Errno;
use crate::futex::Entry;
use crate::shared_abi::{
    UMCG_CALL_AGAIN, UMCG_CALL_NEW, UMCG_STATE_NONE, UMCG_STATE_RUNNABLE, UMCG_STATE_RUNNING,
    UMCG_WAIT_ENQUEUE,
};
use crate::sys;
use crate::thread::{self, Registration};

/// `umcg_wait`.
#[inline]
pub(crate) fn wait(timeout_ns: u64, flags: u32) -> Result<(), Errno> {
    thread::with(|thread| {
        let me = thread.registration().ok_or(Errno::EINVAL)?;
        let Some(_inside) = thread.enter() else {
            return Err(in_handler(me, flags));
        };
        match check(me, timeout_ns, flags) {
            Ok(UMCG_STATE_RUNNING) => Ok(()),
            Ok(_) => switch(me, timeout_ns, flags | UMCG_CALL_NEW),
            Err(errno) => {
                me.task.status.show(UMCG_STATE_RUNNING);
                Err(errno)
            }
        }
    })
}

/// What a system call would check before it does anything; answers the state, RUNNING or RUNNABLE.
#[inline]
fn check(me: Registration<'_>, timeout_ns: u64, flags: u32) -> Result<u32, Errno> {
    if flags & !UMCG_WAIT_ENQUEUE != 0 {
        return Err(Errno::EINVAL);
    }
    if timeout_ns != 0 && !me.task.is_server(me.tid) {
        return Err(Errno::ERANGE);
    }
    match me.task.status.state() {
        state @ (UMCG_STATE_RUNNING | UMCG_STATE_RUNNABLE) => Ok(state),
        _ => Err(Errno::EINVAL),
    }
}

/// A handler that interrupted `umcg_wait` calls it. If the status still has the interrupted call's mark, that
/// call is going on: leave it alone. Else the handler has stored RUNNABLE over a state that may have been RUNNING,
/// which waiting on would never see again.
#[cold]
fn in_handler(me: Registration<'_>, flags: u32) -> Errno {
    if !me.task.status.is_waiting() {
        me.task.status.show(UMCG_STATE_RUNNING);
    }
    if flags & !UMCG_WAIT_ENQUEUE != 0 { Errno::EINVAL } else { Errno::EDEADLK }
}

/// Gives up the CPU until the status is RUNNING. `flags` are those of `umcg_call`.
#[inline]
pub(crate) fn switch(me: Registration<'_>, timeout_ns: u64, flags: u32) -> Result<(), Errno> {
    let Registration { task, inner, .. } = me;
    // The kernel side reads and writes these inside the system call, in this thread: no ordering is needed.
    task.call_timeout_ns.store(timeout_ns, Ordering::Relaxed);
    task.call_flags.store(flags, Ordering::Relaxed);
    task.call_result.store(0, Ordering::Relaxed);
    if task.status.mark_waiting() == UMCG_STATE_RUNNABLE {
        if !inner.is_scheduled() {
            return inner.futex.wait(me, timeout_ns, flags, Entry::Called);
        }
        sys::sched_yield();
        while !is_over(task.status.mark_waiting()) {
            if !inner.is_scheduled() {
                return inner.futex.wait(me, timeout_ns, flags, Entry::LetGo);
            }
            task.call_flags.fetch_or(UMCG_CALL_AGAIN, Ordering::Relaxed);
            sys::sched_yield();
        }
    }
    task.status.end_wait();
    Errno::check(task.call_result.load(Ordering::Relaxed))
}

/// NONE is no state of a registered task; a program that scribbles it must not make us loop.
#[inline]
fn is_over(state: u32) -> bool {
    matches!(state, UMCG_STATE_RUNNING | UMCG_STATE_NONE)
}

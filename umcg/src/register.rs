// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a thread becomes a task and ceases to be one, and `umcg_kick`.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::errno::Errno;
use crate::inner::Inner;
use crate::layout::Cell;
use crate::memory::Index;
use crate::process;
use crate::rseq;
use crate::shared_abi::{
    UMCG_CALL_AGAIN, UMCG_CTL_KICK, UMCG_CTL_REGISTER, UMCG_CTL_RSEQ, UMCG_CTL_UNREGISTER,
    UMCG_STATE_RUNNABLE, UMCG_STATE_RUNNING, umcg_ctl_args,
};
use crate::sys;
use crate::thread::{self, Loan, Registration, Thread};
use crate::wait;

/// `umcg_register` of the cell at `addr` in `inner`.
pub(crate) fn register(inner: Arc<Inner>, addr: u64) -> Result<(), Errno> {
    if addr % align_of::<Cell>() as u64 != 0 {
        return Err(Errno::EINVAL);
    }
    let index = inner.memory.index_of(addr).ok_or(Errno::EFAULT)?;
    thread::with(|thread| {
        let _inside = thread.enter().ok_or(Errno::EEXIST)?;
        if thread.registration().is_some() {
            return Err(Errno::EEXIST);
        }
        let tid = sys::gettid();
        let is_server = check_task(&inner, index, tid)?;
        claim(thread, inner, index, tid)?;
        if let Some(me) = thread.registration().filter(|_| !is_server) {
            // For its first run. Its server has been told, so this is no new call; and its result is none of the program's.
            let _ = wait::switch(me, 0, UMCG_CALL_AGAIN);
        }
        Ok(())
    })
}

/// What the contract asks of the struct; answers whether it is a server's.
fn check_task(inner: &Inner, index: Index, tid: u32) -> Result<bool, Errno> {
    let task = inner.memory.cell(index).ok_or(Errno::EFAULT)?;
    let is_server = task.is_server(tid);
    let state = if is_server { UMCG_STATE_RUNNING } else { UMCG_STATE_RUNNABLE };
    if task.status.state() != state || task.reserved.load(Ordering::Relaxed) != 0 {
        return Err(Errno::EINVAL);
    }
    Ok(is_server)
}

/// Registers with the back end and in the thread; both or neither.
fn claim(thread: &Thread, inner: Arc<Inner>, index: Index, tid: u32) -> Result<(), Errno> {
    let task = inner.memory.cell(index).ok_or(Errno::EFAULT)?;
    if !inner.memory.take(index, tid) {
        return Err(Errno::EINVAL);
    }
    task.tid.store(tid, Ordering::Relaxed);
    let registered = if inner.is_scheduled() {
        claim_in_kernel(thread, &inner, index, task.addr())
    } else {
        inner.futex.register(&inner, index)
    };
    match registered {
        Ok(()) => thread.register(inner, index, tid),
        Err(_) => inner.memory.untake(index, tid),
    }
    registered
}

fn claim_in_kernel(thread: &Thread, inner: &Inner, slot: u32, addr: u64) -> Result<(), Errno> {
    let answer = inner.control(umcg_ctl_args { op: UMCG_CTL_RSEQ, ..umcg_ctl_args::default() })?;
    let loan = Loan::take(rseq::Area::reported(&answer), inner.is_partial())?;
    inner
        .control(umcg_ctl_args { op: UMCG_CTL_REGISTER, slot, addr, ..umcg_ctl_args::default() })
        .inspect_err(|_| loan.give_back())?;
    thread.set_loan(loan);
    Ok(())
}

/// `umcg_unregister` of the task at `addr`.
pub(crate) fn unregister(addr: u64) -> Result<(), Errno> {
    thread::with(|thread| {
        let _inside = thread.enter().ok_or(Errno::EBUSY)?;
        let me = thread.registration().filter(|me| me.task.addr() == addr).ok_or(Errno::EINVAL)?;
        let (index, tid) = (me.index, me.tid);
        // Whoever sees NONE may free the cell at once, and is not to take our count for one that was left.
        me.inner.memory.note_count(index, tid, false);
        retire(me).inspect_err(|_| me.inner.memory.note_count(index, tid, true))?;
        let (inner, loan) = thread.unregister();
        if let Some(loan) = loan {
            loan.give_back();
        }
        if let Some(inner) = inner {
            inner.memory.untake(index, tid);
        }
        Ok(())
    })
}

fn retire(me: Registration<'_>) -> Result<(), Errno> {
    if !me.inner.is_scheduled() {
        return me.inner.futex.unregister(me.inner, me.index);
    }
    let args = umcg_ctl_args { op: UMCG_CTL_UNREGISTER, ..umcg_ctl_args::default() };
    me.inner.control(args).map(drop)
}

/// `umcg_kick` of a task of the calling thread's domain, or of the open one.
pub(crate) fn kick(tid: u32) -> Result<(), Errno> {
    let inner = thread::with(Thread::domain).or_else(process::current).ok_or(Errno::ESRCH)?;
    kick_in(&inner, tid)
}

pub(crate) fn kick_in(inner: &Inner, tid: u32) -> Result<(), Errno> {
    if !inner.is_scheduled() {
        return inner.futex.kick(inner, tid);
    }
    let args = umcg_ctl_args { op: UMCG_CTL_KICK, tid, ..umcg_ctl_args::default() };
    inner.control(args).map(drop)
}

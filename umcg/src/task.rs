// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tasks as the safe API shows them.

use std::fmt;
use std::num::NonZeroU32;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::layout::{Cell, state_of};
use crate::raw;
use crate::shared_abi::{
    UMCG_STATE_BLOCKED, UMCG_STATE_RUNNABLE, UMCG_STATE_RUNNING, UMCG_TF_PREEMPT, umcg_task,
};
use crate::sys;

/// A thread's id in the process's own pid namespace, as `gettid(2)` answers it. Never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tid(NonZeroU32);

impl Tid {
    /// The calling thread's.
    #[must_use]
    pub fn current() -> Self {
        // gettid(2) does not answer 0.
        Self::new(sys::gettid()).unwrap_or(Self(NonZeroU32::MIN))
    }

    /// None for 0, which stands for nobody.
    #[must_use]
    pub const fn new(tid: u32) -> Option<Self> {
        match NonZeroU32::new(tid) {
            Some(tid) => Some(Self(tid)),
            None => None,
        }
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0.get()
    }
}

impl fmt::Display for Tid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a task is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// It may run user code.
    Running,
    /// It is stopped at the boundary to user code, or about to wait.
    Runnable,
    /// A worker that sleeps in the kernel, or finishes there.
    Blocked,
    /// Not registered: not yet, or not any more. A worker that exits by surprise is found with this state on its
    /// server's runnable list.
    None,
}

/// A task of the domain: its part of the memory that all of the process's tasks and the kernel side share.
///
/// It is a view and can be copied. The task may exit at any time; then the view shows [`State::None`], and once the memory is
/// used again, another task. So keep it no longer than your own lists say that the task is there.
#[derive(Clone, Copy)]
pub struct Task<'d> {
    cell: &'d Cell,
}

impl<'d> Task<'d> {
    pub(crate) fn new(cell: &'d Cell) -> Self {
        Self { cell }
    }

    pub(crate) fn cell(&self) -> &'d Cell {
        self.cell
    }

    /// The thread that registered it; none if it never was registered.
    #[must_use]
    pub fn tid(&self) -> Option<Tid> {
        Tid::new(self.cell.tid.load(Ordering::Relaxed))
    }

    /// The server that it names.
    #[must_use]
    pub fn server(&self) -> Option<Tid> {
        Tid::new(self.cell.server_tid.load(Ordering::Relaxed))
    }

    /// Gives a worker to another server. It counts from the worker's next stop or event on.
    pub fn set_server(&self, server: Tid) {
        self.cell.server_tid.store(server.get(), Ordering::Relaxed);
    }

    /// What it is doing.
    #[must_use]
    pub fn state(&self) -> State {
        match self.cell.status.state() {
            UMCG_STATE_RUNNING => State::Running,
            UMCG_STATE_RUNNABLE => State::Runnable,
            UMCG_STATE_BLOCKED => State::Blocked,
            _ => State::None,
        }
    }

    /// Asks that it be preempted, if it is RUNNING; its next timer tick does it, at the latest.
    pub fn request_preemption(&self) {
        self.cell.status.set_bits(UMCG_TF_PREEMPT, UMCG_TF_PREEMPT);
    }

    /// The upper 16 bits of the status word, which are the program's own.
    #[must_use]
    pub fn program_bits(&self) -> u16 {
        (self.cell.status.load() >> 16) as u16
    }

    /// Sets the upper 16 bits of the status word.
    pub fn set_program_bits(&self, bits: u16) {
        self.cell.status.set_bits(0xffff_0000, u32::from(bits) << 16);
    }

    /// `umcg_user_data`, the program's own word.
    #[must_use]
    pub fn user_data(&self) -> u64 {
        self.cell.user_data.load(Ordering::Acquire)
    }

    /// Sets the program's own word.
    pub fn set_user_data(&self, data: u64) {
        self.cell.user_data.store(data, Ordering::Release);
    }

    /// When it last blocked, since the origin of CLOCK_MONOTONIC; 0 for never.
    #[must_use]
    pub fn blocked_at(&self) -> Duration {
        Duration::from_nanos(self.cell.blocked_ts.load(Ordering::Relaxed))
    }

    /// When the kernel side last made it RUNNABLE, since the origin of CLOCK_MONOTONIC; 0 for never.
    #[must_use]
    pub fn runnable_at(&self) -> Duration {
        Duration::from_nanos(self.cell.runnable_ts.load(Ordering::Relaxed))
    }

    /// How long it last was in the kernel, from blocking until it could run again. None while it is there, and before
    /// it first was.
    #[must_use]
    pub fn last_blocked_for(&self) -> Option<Duration> {
        let (blocked, runnable) = (self.blocked_at(), self.runnable_at());
        runnable.checked_sub(blocked).filter(|_| !blocked.is_zero())
    }

    /// How long it has been waiting to be run, since the kernel side made it RUNNABLE. None if it is not RUNNABLE.
    #[must_use]
    pub fn runnable_for(&self) -> Option<Duration> {
        let now = Duration::from_nanos(sys::now_ns());
        (self.state() == State::Runnable).then(|| now.saturating_sub(self.runnable_at()))
    }

    /// The struct itself, for C code. It is valid as long as the domain's memory is, that is for `'d`.
    #[must_use]
    pub fn as_ptr(&self) -> *mut umcg_task {
        raw::task_of(self.cell)
    }
}

impl PartialEq for Task<'_> {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self.cell, other.cell)
    }
}

impl Eq for Task<'_> {}

impl fmt::Debug for Task<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status = self.cell.status.load();
        f.debug_struct("Task")
            .field("tid", &self.tid())
            .field("server", &self.server())
            .field("state", &self.state())
            .field("flags", &format_args!("{:#x}", status & !state_of(status)))
            .finish()
    }
}

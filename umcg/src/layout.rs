// SPDX-License-Identifier: MIT OR Apache-2.0
//! The shared layout as this crate touches it: atomics only, for other threads and the kernel write the
//! same words at any time. The fields are those of `umcg_task`, `umcg_call` and `umcg_header`, whose
//! writers `include/umcg.h` and `src/bpf/intf.h` name.

use std::mem::{align_of, offset_of, size_of};
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};

use crate::shared_abi::{
    UMCG_STATE_MASK, UMCG_STATE_NONE, UMCG_STATE_RUNNABLE, UMCG_STATE_RUNNING, UMCG_TF_PREEMPT, UMCG_TF_WAIT,
    umcg_call, umcg_cell, umcg_header, umcg_task,
};

/// One element of a domain: a `umcg_task` and the `umcg_call` behind it.
#[repr(C, align(64))]
pub(crate) struct Cell {
    pub(crate) status: Status,
    pub(crate) server_tid: AtomicU32,
    pub(crate) next_tid: AtomicU32,
    pub(crate) tid: AtomicU32,
    pub(crate) blocked_ptr: AtomicU64,
    pub(crate) runnable_ptr: AtomicU64,
    pub(crate) blocked_ts: AtomicU64,
    pub(crate) runnable_ts: AtomicU64,
    pub(crate) user_data: AtomicU64,
    pub(crate) reserved: AtomicU64,
    pub(crate) call_timeout_ns: AtomicU64,
    pub(crate) call_flags: AtomicU32,
    pub(crate) call_result: AtomicI32,
    call_reserved: [AtomicU64; 6],
}

/// Cell 0.
#[repr(C, align(64))]
pub(crate) struct Header {
    pub(crate) magic: AtomicU32,
    pub(crate) abi_version: AtomicU32,
    pub(crate) nr_slots: AtomicU32,
    pub(crate) flags: AtomicU32,
    pub(crate) epoch: AtomicU32,
    reserved: [AtomicU32; 27],
}

impl Header {
    /// Of a domain that is not there: nobody schedules it.
    pub(crate) const fn dead() -> Self {
        Self {
            magic: AtomicU32::new(0),
            abi_version: AtomicU32::new(0),
            nr_slots: AtomicU32::new(0),
            flags: AtomicU32::new(0),
            epoch: AtomicU32::new(1),
            reserved: [const { AtomicU32::new(0) }; 27],
        }
    }
}

const _: () = {
    assert!(size_of::<Cell>() == size_of::<umcg_cell>());
    assert!(align_of::<Cell>() == align_of::<umcg_task>());
    assert!(offset_of!(Cell, status) == offset_of!(umcg_task, umcg_status));
    assert!(offset_of!(Cell, server_tid) == offset_of!(umcg_task, umcg_server_tid));
    assert!(offset_of!(Cell, next_tid) == offset_of!(umcg_task, umcg_next_tid));
    assert!(offset_of!(Cell, tid) == offset_of!(umcg_task, umcg_tid));
    assert!(offset_of!(Cell, blocked_ptr) == offset_of!(umcg_task, umcg_blocked_ptr));
    assert!(offset_of!(Cell, runnable_ptr) == offset_of!(umcg_task, umcg_runnable_ptr));
    assert!(offset_of!(Cell, blocked_ts) == offset_of!(umcg_task, umcg_blocked_ts));
    assert!(offset_of!(Cell, runnable_ts) == offset_of!(umcg_task, umcg_runnable_ts));
    assert!(offset_of!(Cell, user_data) == offset_of!(umcg_task, umcg_user_data));
    assert!(offset_of!(Cell, reserved) == offset_of!(umcg_task, umcg_reserved));
    let call = offset_of!(umcg_cell, call);
    assert!(offset_of!(Cell, call_timeout_ns) == call + offset_of!(umcg_call, timeout_ns));
    assert!(offset_of!(Cell, call_flags) == call + offset_of!(umcg_call, flags));
    assert!(offset_of!(Cell, call_result) == call + offset_of!(umcg_call, result));
    assert!(size_of::<Header>() == size_of::<umcg_header>());
    assert!(offset_of!(Header, nr_slots) == offset_of!(umcg_header, nr_slots));
    assert!(offset_of!(Header, flags) == offset_of!(umcg_header, flags));
    assert!(offset_of!(Header, epoch) == offset_of!(umcg_header, epoch));
};

impl Cell {
    /// As `umcg_task_alloc` promises it: zeroed but for status NONE.
    pub(crate) fn clear(&self) {
        self.status.0.store(UMCG_STATE_NONE, Ordering::SeqCst);
        for word in [&self.server_tid, &self.next_tid, &self.tid] {
            word.store(0, Ordering::Relaxed);
        }
        for word in [
            &self.blocked_ptr,
            &self.runnable_ptr,
            &self.blocked_ts,
            &self.runnable_ts,
            &self.user_data,
            &self.reserved,
        ] {
            word.store(0, Ordering::Relaxed);
        }
    }

    /// The address that list links name this task by.
    pub(crate) fn addr(&self) -> u64 {
        std::ptr::from_ref(self).addr() as u64
    }

    /// As in the seed: a server names itself as its server, and nothing else tells it from a worker.
    pub(crate) fn is_server(&self, tid: u32) -> bool {
        self.server_tid.load(Ordering::Relaxed) == tid
    }
}

/// The status word. All of its changes are compare-and-exchange, so that nobody's bits are lost, and
/// sequentially consistent: a server marks itself RUNNABLE and then takes its lists, while an event pushes on
/// a list and then looks for that mark. One of the two must see the other.
#[repr(transparent)]
pub(crate) struct Status(AtomicU32);

/// The state bits of a status word.
pub(crate) const fn state_of(status: u32) -> u32 {
    status & UMCG_STATE_MASK
}

impl Status {
    #[inline]
    pub(crate) fn load(&self) -> u32 {
        self.0.load(Ordering::SeqCst)
    }

    #[inline]
    pub(crate) fn state(&self) -> u32 {
        state_of(self.load())
    }

    /// The word as a futex.
    pub(crate) fn word(&self) -> &AtomicU32 {
        &self.0
    }

    /// From one state to another; false if it was in a third one. As the kernel side does it: leaving
    /// RUNNING ends a request to preempt, becoming RUNNING ends the library's wait.
    pub(crate) fn shift(&self, from: u32, to: u32) -> bool {
        self.update(|old| (state_of(old) == from).then(|| moved(old, to)))
    }

    /// Whatever the state was.
    pub(crate) fn show(&self, to: u32) {
        self.update(|old| Some(moved(old, to)));
    }

    pub(crate) fn set_bits(&self, mask: u32, bits: u32) {
        self.update(|old| Some(old & !mask | bits & mask));
    }

    /// Marks the thread as inside `umcg_wait` while it is RUNNABLE: the kernel side tells the wait from a
    /// plain `sched_yield` by that. Answers the state.
    #[inline]
    pub(crate) fn mark_waiting(&self) -> u32 {
        let mut old = self.load();
        while state_of(old) == UMCG_STATE_RUNNABLE && old & UMCG_TF_WAIT == 0 {
            match self.exchange(old, old | UMCG_TF_WAIT) {
                Ok(_) => return UMCG_STATE_RUNNABLE,
                Err(now) => old = now,
            }
        }
        state_of(old)
    }

    /// Clears the mark, which the kernel side leaves on a thread that it made RUNNING before it had waited.
    #[inline]
    pub(crate) fn end_wait(&self) {
        if self.load() & UMCG_TF_WAIT != 0 {
            self.0.fetch_and(!UMCG_TF_WAIT, Ordering::SeqCst);
        }
    }

    /// True if it is inside `umcg_wait` and nobody has made it RUNNING since.
    pub(crate) fn is_waiting(&self) -> bool {
        let status = self.load();
        state_of(status) == UMCG_STATE_RUNNABLE && status & UMCG_TF_WAIT != 0
    }

    #[inline]
    fn exchange(&self, old: u32, new: u32) -> Result<u32, u32> {
        self.0.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst)
    }

    fn update(&self, change: impl FnMut(u32) -> Option<u32>) -> bool {
        self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, change).is_ok()
    }
}

const fn moved(old: u32, to: u32) -> u32 {
    let ends = if to == UMCG_STATE_RUNNING { UMCG_TF_PREEMPT | UMCG_TF_WAIT } else { UMCG_TF_PREEMPT };
    old & !(UMCG_STATE_MASK | ends) | to
}

// SPDX-License-Identifier: MIT OR Apache-2.0
//! Restartable sequences, as the scheduler needs them: each registered thread must have an rseq area of 32
//! bytes, the size of the original ABI.
//!
//! A worker that blocked in the kernel is captured on its way back to user code, and the one notification
//! that the kernel has for that moment is the tracepoint `rseq_update`. Since Linux 6.19 the kernel keeps
//! the old behaviour (an update at each return to user mode after a switch) only for areas that were registered
//! with the original 32 bytes; for longer ones it saves the update when nothing changed, and the worker
//! would slip into user code uncaptured. glibc 2.35 to 2.40 register 32 bytes; newer ones register more, and
//! musl none at all.
//!
//! So a thread that registers with UMCG lends us its area: we register the same memory with length 32, and give
//! it back with the old length when the thread unregisters. What the old length covered beyond the 32 bytes is not
//! updated meanwhile; up to Linux 7.3 that is nothing that a C library reads. Between the two calls cpu_id
//! reads "uninitialised", for which every user of rseq has a fallback.

use std::cell::UnsafeCell;

use crate::errno::Errno;
use crate::shared_abi::umcg_ctl_args;

/// Length of the original ABI's area, bytes.
const ORIGINAL_LEN: u32 = 32;
const RSEQ_FLAG_UNREGISTER: u32 = 1;
/// What librseq and glibc put before abort handlers on x86-64. We have none, so any would do.
const SIGNATURE: u32 = 0x5305_3053;

/// A thread's registered area, as the kernel side reports it.
#[derive(Clone, Copy)]
pub(crate) struct Area {
    addr: u64,
    len: u32,
    sig: u32,
}

impl Area {
    /// From the answer to UMCG_CTL_RSEQ; none if the thread has no area.
    pub(crate) fn reported(args: &umcg_ctl_args) -> Option<Self> {
        (args.addr != 0).then_some(Self { addr: args.addr, len: args.rseq_len, sig: args.rseq_sig })
    }

    fn register(self, len: u32) -> Result<(), Errno> {
        self.call(len, 0)
    }

    fn unregister(self, len: u32) -> Result<(), Errno> {
        self.call(len, RSEQ_FLAG_UNREGISTER)
    }

    fn call(self, len: u32, flags: u32) -> Result<(), Errno> {
        // SAFETY: rseq(2) takes what is or was this thread's registered area, or OWN, which lives as long as the
        // thread; the kernel writes the first `len` bytes of it, and both have those.
        let ret = unsafe { libc::syscall(libc::SYS_rseq, self.addr, len, flags, self.sig) };
        if ret < 0 { Err(Errno::last()) } else { Ok(()) }
    }
}

/// What was done to the calling thread's area, and is to be undone.
#[derive(Clone, Copy)]
pub(crate) enum Lent {
    /// It had 32 bytes.
    Nothing,
    /// It had another length.
    Resized(Area),
    /// There was none, so `OWN` is registered.
    Own,
}

/// An area for threads that have none, like those of musl.
#[repr(C, align(32))]
struct OwnArea(UnsafeCell<[u32; 8]>);

thread_local! {
    static OWN: OwnArea = const { OwnArea(UnsafeCell::new([0; 8])) };
}

/// Sees to it that the calling thread has an area of the original length.
pub(crate) fn lend(area: Option<Area>) -> Result<Lent, Errno> {
    match area {
        None => {
            own_area().register(ORIGINAL_LEN)?;
            Ok(Lent::Own)
        }
        Some(area) if area.len == ORIGINAL_LEN => Ok(Lent::Nothing),
        Some(area) => {
            area.unregister(area.len)?;
            area.register(ORIGINAL_LEN).inspect_err(|_| {
                // It was registered like this a moment ago. If that fails too, the thread goes on without rseq,
                // as it would on a kernel that has none.
                let _ = area.register(area.len);
            })?;
            Ok(Lent::Resized(area))
        }
    }
}

/// Undoes what `lend` did. Whatever fails here leaves the thread with the short area, or with none, and both are
/// states that every user of rseq copes with.
pub(crate) fn give_back(lent: Lent) {
    match lent {
        Lent::Nothing => {}
        Lent::Own => {
            let _ = own_area().unregister(ORIGINAL_LEN);
        }
        Lent::Resized(area) => {
            let _ = area.unregister(ORIGINAL_LEN).and_then(|()| area.register(area.len));
        }
    }
}

/// `OWN` must be given back before its thread's storage is freed: the kernel writes to it until then.
fn own_area() -> Area {
    Area { addr: OWN.with(|own| own.0.get().expose_provenance()) as u64, len: ORIGINAL_LEN, sig: SIGNATURE }
}

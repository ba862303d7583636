// SPDX-License-Identifier: MIT OR Apache-2.0
//! The scheduling policy of registered threads: the BPF scheduler must be asked about them.
//!
//! With the loader in partial mode those are the threads of policy SCHED_EXT. In full mode they are also all
//! those of SCHED_OTHER, SCHED_BATCH and SCHED_IDLE, while realtime threads pass every BPF scheduler by.

use crate::errno::Errno;

const SCHED_EXT: u32 = 7;

/// `struct sched_attr` of `sched_setattr(2)`, its first version.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

impl SchedAttr {
    fn of_this_thread() -> Result<Self, Errno> {
        let mut attr = Self::default();
        // SAFETY: the kernel writes at most the size given, which is that of `attr`.
        let ret = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attr, size_of::<Self>(), 0) };
        if ret < 0 { Err(Errno::last()) } else { Ok(attr) }
    }

    fn set(&self) -> Result<(), Errno> {
        // SAFETY: the kernel reads `size` bytes, as sched_getattr filled them in.
        let ret = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const *self, 0) };
        if ret < 0 { Err(Errno::last()) } else { Ok(()) }
    }

    fn is_served(&self, partial: bool) -> bool {
        match self.policy as i32 {
            libc::SCHED_OTHER | libc::SCHED_BATCH | libc::SCHED_IDLE => !partial,
            _ => self.policy == SCHED_EXT,
        }
    }
}

/// Makes the calling thread SCHED_EXT if it must be; answers what it was before.
pub(crate) fn lend(partial: bool) -> Result<Option<SchedAttr>, Errno> {
    let former = SchedAttr::of_this_thread()?;
    if former.is_served(partial) {
        return Ok(None);
    }
    // The nice value stays. So do the flags, of which reset-on-fork alone is ever reported.
    let ext = SchedAttr { policy: SCHED_EXT, priority: 0, runtime: 0, deadline: 0, period: 0, ..former };
    ext.set()?;
    Ok(Some(former))
}

/// Gives the calling thread its former policy. A thread that was realtime and has lost the right to be (RLIMIT_RTPRIO,
/// CAP_SYS_NICE) stays SCHED_EXT, which without a scheduler means SCHED_OTHER.
pub(crate) fn give_back(former: Option<SchedAttr>) {
    if let Some(former) = former {
        let _ = former.set();
    }
}

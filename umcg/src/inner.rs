// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a domain is made of, and which of the two back ends answers for it.
//!
//! | back end | while | a switch is | sees tasks block |
//! |---|---|---|---|
//! | sched_ext | the loader's scheduler serves the domain | one `sched_yield(2)` | yes |
//! | futex | it is gone, or there never was one | a futex wake and a futex wait | no |
//!
//! A domain starts with one of them and can change from the first to the second, once. The header's epoch word says which:
//! 0 means sched_ext.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::connect;
use crate::ctl;
use crate::errno::Errno;
use crate::futex::Futex;
use crate::memory::{Index, Memory};
use crate::register;
use crate::shared_abi::{UMCG_CTL_ATTACH, UMCG_DOMAIN_PARTIAL, umcg_ctl_args};
use crate::sys;

/// The futex back end needs no more than memory; who asks for more than this has made a mistake.
const FALLBACK_MAX_TASKS: u32 = 1 << 20;

pub(crate) struct Inner {
    pub(crate) memory: Memory,
    pub(crate) futex: Futex,
    kernel: Option<Kernel>,
}

/// The way to the kernel side.
struct Kernel {
    /// Tells the loader that we still use the domain.
    connection: OwnedFd,
    control: OwnedFd,
    domain: u32,
}

impl Inner {
    /// A domain of the loader that listens at `socket`.
    pub(crate) fn of_loader(socket: &Path, max_tasks: u32) -> Result<Self, Errno> {
        let handover = connect::ask(socket, max_tasks)?;
        let memory = Memory::of_loader(&handover.map, handover.welcome.nr_slots)?;
        let kernel = Kernel {
            connection: handover.connection,
            control: handover.control,
            domain: handover.welcome.domain,
        };
        kernel.run(umcg_ctl_args {
            op: UMCG_CTL_ATTACH,
            nonce: handover.welcome.nonce,
            ..umcg_ctl_args::default()
        })?;
        Self::new(memory, Some(kernel))
    }

    /// A domain without a loader.
    pub(crate) fn of_our_own(max_tasks: u32) -> Result<Self, Errno> {
        if max_tasks > FALLBACK_MAX_TASKS {
            return Err(Errno::ENOSPC);
        }
        Self::new(Memory::of_our_own(max_tasks)?, None)
    }

    fn new(memory: Memory, kernel: Option<Kernel>) -> Result<Self, Errno> {
        let futex = Futex::new(memory.capacity())?;
        Ok(Self { memory, futex, kernel })
    }

    /// True while the kernel side schedules the domain's tasks. It clears the epoch's zero itself, as its last deed: from then
    /// on it touches no status any more, and nobody but us wakes our tasks.
    #[inline]
    pub(crate) fn is_scheduled(&self) -> bool {
        self.memory.header().epoch.load(Ordering::Acquire) == 0
    }

    /// True if there was a loader and its scheduler is gone.
    pub(crate) fn is_orphan(&self) -> bool {
        self.kernel.is_some() && !self.is_scheduled()
    }

    /// True if the loader schedules SCHED_EXT threads only.
    pub(crate) fn is_partial(&self) -> bool {
        self.memory.header().flags.load(Ordering::Relaxed) & UMCG_DOMAIN_PARTIAL != 0
    }

    /// Asks the kernel side, about this domain.
    pub(crate) fn control(&self, args: umcg_ctl_args) -> Result<umcg_ctl_args, Errno> {
        let kernel = self.kernel.as_ref().ok_or(Errno::EIO)?;
        let answer = kernel.run(args);
        if !self.is_scheduled() {
            // The scheduler went away in the middle: what the control program made RUNNING may sleep on its futex already.
            self.futex.wake_all(self);
        }
        answer
    }

    /// Gives a cell back that nobody has registered.
    pub(crate) fn free(self: &Arc<Self>, index: Index) {
        let left = self.memory.free(index);
        self.drop_count_of(left);
    }

    /// Drops what threads have left that ended without their destructors, by exit(2).
    pub(crate) fn drop_left_counts(self: &Arc<Self>) {
        for index in self.memory.all_used() {
            let left = self.memory.disown(index);
            self.drop_count_of(left);
        }
    }

    fn drop_count_of(self: &Arc<Self>, tid: Option<u32>) {
        if tid.is_some_and(|tid| self.has_ended(tid)) {
            // SAFETY: a count that `Thread::register` turned into a pointer. Its thread does not run any more, and nobody else is
            // told of it, for the cell has another owner now. There is ours, too, so this is not the last.
            unsafe { Arc::decrement_strong_count(Arc::as_ptr(self)) };
        }
    }

    /// Whether a thread that was a task has ended. Status NONE alone is the program's to scribble.
    fn has_ended(&self, tid: u32) -> bool {
        if self.is_scheduled() {
            register::kick_in(self, tid) == Err(Errno::ESRCH)
        } else {
            !sys::thread_exists(tid)
        }
    }

    /// In a forked child: the descriptors are copies, and while they are open the loader takes the parent for alive. Only
    /// async-signal-safe calls are allowed here.
    pub(crate) fn close_copied_fds(&self) {
        let Some(kernel) = &self.kernel else { return };
        for fd in [&kernel.connection, &kernel.control] {
            // SAFETY: the child's copy of this value is never dropped (see process.rs), so nobody closes them again.
            unsafe { libc::close(fd.as_raw_fd()) };
        }
    }
}

impl Kernel {
    fn run(&self, args: umcg_ctl_args) -> Result<umcg_ctl_args, Errno> {
        let domain = self.domain;
        ctl::run(self.control.as_fd(), umcg_ctl_args { domain, ..args })
    }
}

// SPDX-License-Identifier: GPL-2.0-only
//! What the loader changes about its own process, and how a child gets it back.

use std::io;
use std::mem::MaybeUninit;

use anyhow::{Context, Result};
use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Signal mask and limit of open files, as they were at start-up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Inherited {
    mask: SigSet,
    open_files: (rlim_t, rlim_t),
}

impl Inherited {
    /// Takes everything back, in a child between fork and exec: two system calls and no allocation.
    pub(crate) fn restore(&self) -> io::Result<()> {
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(&self.mask), None)?;
        setrlimit(Resource::RLIMIT_NOFILE, self.open_files.0, self.open_files.1)?;
        Ok(())
    }
}

/// Makes room for `open_files` descriptors, and turns `signals` into a descriptor to poll. A signal that
/// the process was started to ignore, as nohup(1) does with SIGHUP, stays ignored.
pub(crate) fn prepare(open_files: rlim_t, signals: &[Signal]) -> Result<(Inherited, SignalFd)> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("cannot read the limit of open files")?;
    if soft < open_files {
        setrlimit(Resource::RLIMIT_NOFILE, open_files, hard.max(open_files)).with_context(|| {
            format!("cannot open {open_files} files; raise the limit, or lower --max-domains")
        })?;
    }
    let wanted: SigSet = signals.iter().copied().filter(|&signal| !is_ignored(signal)).collect();
    let mask = wanted.thread_swap_mask(SigmaskHow::SIG_BLOCK).context("cannot block signals")?;
    let fd = SignalFd::with_flags(&wanted, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .context("cannot create a signalfd; raise the limit of open files")?;
    Ok((Inherited { mask, open_files: (soft, hard) }, fd))
}

fn is_ignored(signal: Signal) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: with a null new action the call only writes the present one, into memory of its size.
    let done = unsafe { libc::sigaction(signal as i32, std::ptr::null(), action.as_mut_ptr()) } == 0;
    // SAFETY: a call that succeeded has filled it in.
    done && unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
}

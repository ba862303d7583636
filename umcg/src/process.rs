// SPDX-License-Identifier: MIT OR Apache-2.0
//! The process's one domain: opening, closing, and what a forked child makes of it.
//!
//! `CURRENT` owns one count of an `Arc`; so does every registered thread, and so does the safe API's `Domain`. Memory goes
//! when the last of them goes. There is no lock, because a thread may be stopped anywhere (see memory.rs); who reads
//! `CURRENT` announces itself in `READERS`, and who has replaced it waits until those few instructions are over. A *stopped*
//! reader is a registered task of the domain, and then the domain is not closed.

use std::path::Path;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Ordering};

use crate::connect;
use crate::errno::Errno;
use crate::inner::Inner;
use crate::shared_abi::UMCG_OPEN_FALLBACK;
use crate::sys;
use crate::thread;

static CURRENT: AtomicPtr<Inner> = AtomicPtr::new(ptr::null_mut());
static READERS: AtomicUsize = AtomicUsize::new(0);
static OPENING: AtomicBool = AtomicBool::new(false);
static FORKS: AtomicU32 = AtomicU32::new(0);

/// Tells a value of this process from one that a forked child has inherited.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Generation(u32);

impl Generation {
    pub(crate) fn current() -> Self {
        Self(FORKS.load(Ordering::Relaxed))
    }

    pub(crate) fn is_current(self) -> bool {
        self == Self::current()
    }
}

/// The open domain.
pub(crate) fn current() -> Option<Arc<Inner>> {
    READERS.fetch_add(1, Ordering::SeqCst);
    let inner = CURRENT.load(Ordering::SeqCst);
    let inner = (!inner.is_null()).then(|| {
        // SAFETY: CURRENT's own count cannot go before READERS is 0 again (see `retire`), so the value is alive while we
        // take a count for ourselves.
        unsafe {
            Arc::increment_strong_count(inner);
            Arc::from_raw(inner)
        }
    });
    // A handler that interrupted us may have forked, and then the child's READERS is 0 already.
    let _ = READERS.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
    inner
}

/// Opens the process's domain at `socket`, or where `$UMCG_SOCKET` says.
pub(crate) fn open(socket: Option<&Path>, max_tasks: u32, flags: u32) -> Result<Arc<Inner>, Errno> {
    if flags & !UMCG_OPEN_FALLBACK != 0 || max_tasks == 0 {
        return Err(Errno::EINVAL);
    }
    let _opening = Opening::start()?;
    if current().is_some_and(|inner| !inner.is_orphan()) {
        return Err(Errno::EALREADY);
    }
    watch_forks()?;
    let opened = match socket {
        Some(socket) => Inner::of_loader(socket, max_tasks),
        None => Inner::of_loader(&connect::default_socket(), max_tasks),
    };
    let inner = match opened {
        Err(Errno::ENOENT | Errno::ECONNREFUSED) if flags & UMCG_OPEN_FALLBACK != 0 => {
            Inner::of_our_own(max_tasks)
        }
        opened => opened,
    };
    let inner = Arc::new(inner?);
    replace(&inner);
    Ok(inner)
}

/// Makes `inner` the current domain. The count of what it replaces is leaked on purpose: that is a domain that has lost its
/// scheduler; the program knows the addresses of its tasks, and those that are registered go on with the futex back end.
fn replace(inner: &Arc<Inner>) {
    let new = Arc::into_raw(Arc::clone(inner)).cast_mut();
    CURRENT.swap(new, Ordering::SeqCst);
}

/// Closes the current domain.
pub(crate) fn close() -> Result<(), Errno> {
    let inner = current().ok_or(Errno::ENOENT)?;
    close_this(&inner)
}

/// Closes `inner` if it is the current domain.
pub(crate) fn close_this(inner: &Arc<Inner>) -> Result<(), Errno> {
    if inner.memory.all_registered().next().is_some() {
        return Err(Errno::EBUSY);
    }
    let this = Arc::as_ptr(inner).cast_mut();
    CURRENT
        .compare_exchange(this, ptr::null_mut(), Ordering::SeqCst, Ordering::SeqCst)
        .map_err(|_| Errno::ENOENT)?;
    inner.drop_left_counts();
    retire(this);
    Ok(())
}

/// Drops the count that CURRENT had.
fn retire(inner: *const Inner) {
    while READERS.load(Ordering::SeqCst) != 0 {
        sys::sched_yield();
    }
    // SAFETY: it came from Arc::into_raw in `replace`. It is no longer in CURRENT, and every reader that may have seen it there
    // has a count of its own now.
    drop(unsafe { Arc::from_raw(inner) });
}

/// One at a time. Not a lock: who comes second has nothing to wait for.
struct Opening;

impl Opening {
    fn start() -> Result<Self, Errno> {
        if OPENING.swap(true, Ordering::Acquire) {
            return Err(Errno::EALREADY);
        }
        Ok(Self)
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        OPENING.store(false, Ordering::Release);
    }
}

/// From the first `open` on. Called under `Opening`.
fn watch_forks() -> Result<(), Errno> {
    static WATCHED: AtomicBool = AtomicBool::new(false);

    if WATCHED.load(Ordering::Relaxed) {
        return Ok(());
    }
    // SAFETY: the handler calls nothing but what is async-signal-safe.
    let ret = unsafe { libc::pthread_atfork(None, None, Some(in_forked_child)) };
    Errno::check(-ret)?;
    WATCHED.store(true, Ordering::Relaxed);
    Ok(())
}

/// The child has no mapping of the domain (MADV_DONTFORK), and the kernel side does not know its thread: it starts afresh. The
/// copy of the domain's value is leaked, for a drop would unmap whatever is at those addresses by then.
extern "C" fn in_forked_child() {
    FORKS.fetch_add(1, Ordering::Relaxed);
    thread::forget_registration();
    let inner = CURRENT.swap(ptr::null_mut(), Ordering::SeqCst);
    // SAFETY: either null or a value of this process's heap, of which nobody dropped the count that was CURRENT's.
    if let Some(inner) = unsafe { inner.as_ref() } {
        inner.close_copied_fds();
    }
    READERS.store(0, Ordering::SeqCst);
    OPENING.store(false, Ordering::Release);
}

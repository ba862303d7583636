// SPDX-License-Identifier: MIT OR Apache-2.0
//! What this thread is to UMCG. Constant-initialised cells only: signal handlers read them, and a first access
//! must neither allocate nor lock.

use std::cell::Cell;
use std::mem;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{Ordering, compiler_fence};

use crate::errno::Errno;
use crate::inner::Inner;
use crate::layout;
use crate::memory::Index;
use crate::policy::{self, SchedAttr};
use crate::rseq::{self, Lent};

thread_local! {
    static THREAD: Thread = const {
        Thread {
            task: Cell::new(ptr::null()),
            inner: Cell::new(ptr::null()),
            index: Cell::new(0),
            tid: Cell::new(0),
            is_inside: Cell::new(false),
            loan: Cell::new(None),
        }
    };
    /// Its destructor tells us that the thread exits. Apart from THREAD, which must stay accessible until the very end.
    static EXIT: Exit = const { Exit };
}

pub(crate) struct Thread {
    /// Null while not registered. The domain below keeps it mapped.
    task: Cell<*const layout::Cell>,
    /// A count of the domain's Arc, while registered.
    inner: Cell<*const Inner>,
    index: Cell<Index>,
    tid: Cell<u32>,
    /// Inside `umcg_wait`, `umcg_register` or `umcg_unregister`: who asks and finds it set is a signal handler.
    is_inside: Cell<bool>,
    loan: Cell<Option<Loan>>,
}

/// The registration of the calling thread.
#[derive(Clone, Copy)]
pub(crate) struct Registration<'a> {
    pub(crate) task: &'a layout::Cell,
    pub(crate) inner: &'a Inner,
    pub(crate) index: Index,
    pub(crate) tid: u32,
}

/// What the thread has lent to the scheduler, and gets back when it unregisters.
#[derive(Clone, Copy)]
pub(crate) struct Loan {
    rseq: Lent,
    policy: Option<SchedAttr>,
}

impl Loan {
    pub(crate) fn take(area: Option<rseq::Area>, partial: bool) -> Result<Self, Errno> {
        let rseq = rseq::lend(area)?;
        let policy = policy::lend(partial).inspect_err(|_| rseq::give_back(rseq))?;
        Ok(Self { rseq, policy })
    }

    pub(crate) fn give_back(self) {
        policy::give_back(self.policy);
        rseq::give_back(self.rseq);
    }

    /// The thread exits: it stays with the scheduler until the end, but its storage must not stay with the kernel.
    fn at_exit(self) {
        if matches!(self.rseq, Lent::Own) {
            rseq::give_back(self.rseq);
        }
    }
}

/// Runs `f` with the calling thread's state.
#[inline]
pub(crate) fn with<R>(f: impl FnOnce(&Thread) -> R) -> R {
    THREAD.with(f)
}

impl Thread {
    #[inline]
    pub(crate) fn registration(&self) -> Option<Registration<'_>> {
        let task = self.task.get();
        if task.is_null() {
            return None;
        }
        // SAFETY: set by `register` together with the domain, of which we hold a count until `unregister`. That does not happen
        // while the result is in use: `Inside` keeps handlers from it, and this thread does it by value.
        let (task, inner) = unsafe { (&*task, &*self.inner.get()) };
        Some(Registration { task, inner, index: self.index.get(), tid: self.tid.get() })
    }

    /// A count of the domain that the thread is registered in.
    pub(crate) fn domain(&self) -> Option<Arc<Inner>> {
        let inner = self.inner.get();
        if inner.is_null() {
            return None;
        }
        // SAFETY: we hold a count, so there is a value to count.
        unsafe {
            Arc::increment_strong_count(inner);
            Some(Arc::from_raw(inner))
        }
    }

    /// Marks the thread as inside one of our calls; none if it is already.
    #[inline]
    pub(crate) fn enter(&self) -> Option<Inside<'_>> {
        if self.is_inside.replace(true) {
            return None;
        }
        // A handler runs in this thread: it is the compiler only that could move the call's accesses past the mark.
        compiler_fence(Ordering::SeqCst);
        Some(Inside(self))
    }

    pub(crate) fn register(&self, inner: Arc<Inner>, index: Index, tid: u32) {
        let Some(task) = inner.memory.cell(index) else {
            return;
        };
        // From here on its destructor runs, unless that is over: other destructors may register, too.
        let _ = EXIT.try_with(|_| {});
        self.index.set(index);
        self.tid.set(tid);
        let task = ptr::from_ref(task);
        inner.memory.note_count(index, tid, true);
        self.inner.set(Arc::into_raw(inner));
        self.task.set(task);
    }

    pub(crate) fn set_loan(&self, loan: Loan) {
        self.loan.set(Some(loan));
    }

    /// Ends what `register` began. What the thread has lent is the caller's to give back.
    pub(crate) fn unregister(&self) -> (Option<Arc<Inner>>, Option<Loan>) {
        self.task.set(ptr::null());
        let inner = self.inner.replace(ptr::null());
        // SAFETY: the count that `register` turned into a pointer, which nobody else turns back: the cell is null now, and this
        // thread lives.
        let inner = (!inner.is_null()).then(|| unsafe { Arc::from_raw(inner) });
        if let Some(inner) = &inner {
            inner.memory.note_count(self.index.get(), self.tid.get(), false);
        }
        (inner, self.loan.take())
    }
}

/// While it lives, signal handlers of this thread are told that they interrupted one of our calls.
pub(crate) struct Inside<'a>(&'a Thread);

impl Drop for Inside<'_> {
    #[inline]
    fn drop(&mut self) {
        compiler_fence(Ordering::SeqCst);
        self.0.is_inside.set(false);
    }
}

/// In a forked child: its only thread is not registered. Async-signal-safe.
pub(crate) fn forget_registration() {
    with(|thread| {
        let (inner, loan) = thread.unregister();
        // Dropping it here could free memory, which is not allowed after a fork.
        mem::forget(inner);
        if let Some(loan) = loan {
            loan.give_back();
        }
        thread.is_inside.set(false);
    });
}

struct Exit;

impl Drop for Exit {
    /// The thread exits and has not unregistered. The kernel side sees that for itself, a moment later; the futex back end must be
    /// told.
    fn drop(&mut self) {
        with(|thread| {
            if let Some(me) = thread.registration().filter(|me| !me.inner.is_scheduled()) {
                me.inner.futex.exit(me.inner, me.index);
            }
            let (_inner, loan) = thread.unregister();
            if let Some(loan) = loan {
                loan.at_exit();
            }
        });
    }
}

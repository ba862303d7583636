// SPDX-License-Identifier: MIT OR Apache-2.0
//! The process's domain in the safe API, and how threads register in it.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::errno::{Call, During, Errno, Error};
use crate::inner::Inner;
use crate::layout::Cell;
use crate::list::Links;
use crate::process;
use crate::register;
use crate::shared_abi::{
    UMCG_OPEN_FALLBACK, UMCG_STATE_NONE, UMCG_STATE_RUNNABLE, UMCG_STATE_RUNNING, UMCG_WAIT_ENQUEUE,
};
use crate::task::{Task, Tid};
use crate::wait;

/// How to open a [`Domain`].
#[derive(Clone, Debug)]
pub struct OpenOptions {
    socket: Option<PathBuf>,
    max_tasks: u32,
    flags: u32,
}

impl OpenOptions {
    /// A domain that holds `max_tasks` tasks at once, of the loader at `$UMCG_SOCKET`, else at `/run/scx_umcg/umcg.sock`.
    #[must_use]
    pub fn new(max_tasks: u32) -> Self {
        Self { socket: None, max_tasks, flags: 0 }
    }

    /// Of the loader that listens on this socket.
    #[must_use]
    pub fn socket(mut self, path: impl AsRef<Path>) -> Self {
        self.socket = Some(path.as_ref().to_owned());
        self
    }

    /// Without a loader, go on with [`Backend::Futex`] instead of failing.
    #[must_use]
    pub fn fallback(mut self, fallback: bool) -> Self {
        self.flags = if fallback { UMCG_OPEN_FALLBACK } else { 0 };
        self
    }
}

/// Who switches between the tasks of a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Backend {
    /// The loader's BPF scheduler: tasks that block are seen, captured and preempted.
    SchedExt,
    /// Futexes: tasks switch when they call [`wait`](crate::wait), and blocking is not seen. From the start with
    /// [`OpenOptions::fallback`], and from the moment on when the scheduler goes away.
    Futex,
}

/// This process's domain: its tasks, and the memory that they share with the kernel side.
///
/// There is one at most. Dropping it closes it, unless tasks are still registered.
pub struct Domain {
    inner: Arc<Inner>,
}

impl Domain {
    /// Opens the process's domain.
    ///
    /// # Errors
    ///
    /// `ENOENT`, `ECONNREFUSED`: no loader; `EACCES`: this user may not; `ENOSPC`: the loader's limits; `EPROTO`: another
    /// ABI version; `EALREADY`: it is open; `EINVAL`: no tasks at all.
    pub fn open(options: &OpenOptions) -> Result<Self, Error> {
        let inner =
            process::open(options.socket.as_deref(), options.max_tasks, options.flags).during(Call::Open)?;
        Ok(Self { inner })
    }

    /// Closes it. The memory stays until the last thread that is registered is not.
    ///
    /// # Errors
    ///
    /// `EBUSY`: tasks are registered; `ENOENT`: it is closed already.
    pub fn close(self) -> Result<(), Error> {
        process::close_this(&self.inner).during(Call::Close)
    }

    /// Who switches between its tasks now.
    #[must_use]
    pub fn backend(&self) -> Backend {
        if self.inner.is_scheduled() { Backend::SchedExt } else { Backend::Futex }
    }

    /// How many tasks it can hold at once.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.inner.memory.capacity()
    }

    /// The registered task of that thread.
    #[must_use]
    pub fn task(&self, tid: Tid) -> Option<Task<'_>> {
        let task = self.inner.memory.find(tid.get())?;
        Some(Task::new(task.cell))
    }

    /// Registers the calling thread as a server.
    ///
    /// # Errors
    ///
    /// `ENOSPC`: the domain is full; `EEXIST`: the thread is registered.
    pub fn register_server(&self) -> Result<Server<'_>, Error> {
        let registration = self.register(Tid::current(), UMCG_STATE_RUNNING)?;
        Ok(Server { registration })
    }

    /// Registers the calling thread as a worker of `server`. Returns once it is run.
    ///
    /// # Errors
    ///
    /// `ENOSPC`: the domain is full; `EEXIST`: the thread is registered; `ESRCH`: no such server.
    pub fn register_worker(&self, server: Tid) -> Result<Worker<'_>, Error> {
        let registration = self.register(server, UMCG_STATE_RUNNABLE)?;
        Ok(Worker { registration })
    }

    /// [`kick`](crate::kick) of a task of this domain, from any thread.
    ///
    /// # Errors
    ///
    /// `ESRCH`: no such task.
    pub fn kick(&self, tid: Tid) -> Result<(), Error> {
        register::kick_in(&self.inner, tid.get()).during(Call::Kick)
    }

    fn register(&self, server: Tid, state: u32) -> Result<Registration<'_>, Error> {
        let cell = self.inner.memory.alloc();
        let cell = cell.ok_or(Errno::ENOSPC).during(Call::Register)?;
        cell.server_tid.store(server.get(), Ordering::Relaxed);
        cell.status.show(state);
        let registered = register::register(Arc::clone(&self.inner), cell.addr());
        if registered.is_err() {
            cell.status.show(UMCG_STATE_NONE);
            self.free(cell);
        }
        registered.during(Call::Register)?;
        Ok(Registration { domain: self, task: Task::new(cell), thread: PhantomData })
    }

    fn free(&self, cell: &Cell) {
        if let Some(index) = self.inner.memory.index_of(cell.addr()) {
            self.inner.free(index);
        }
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // EBUSY: a registration was leaked, and goes on. ENOENT: `close` was called.
        let _ = process::close_this(&self.inner);
    }
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Domain")
            .field("backend", &self.backend())
            .field("capacity", &self.capacity())
            .finish()
    }
}

/// The calling thread's registration, which ends when this is dropped. It stays in its thread.
struct Registration<'d> {
    domain: &'d Domain,
    task: Task<'d>,
    thread: PhantomData<*mut ()>,
}

impl Registration<'_> {
    fn finish(self) -> Result<(), (Self, Error)> {
        match self.end() {
            Ok(()) => {
                std::mem::forget(self);
                Ok(())
            }
            Err(error) => Err((self, error)),
        }
    }

    fn end(&self) -> Result<(), Error> {
        let cell = self.task.cell();
        register::unregister(cell.addr()).during(Call::Unregister)?;
        self.domain.free(cell);
        Ok(())
    }

    /// Marks the task RUNNABLE with `next`, and waits. True if `next` was run.
    fn switch(&self, next: Option<Tid>, flags: u32) -> Result<bool, Error> {
        let cell = self.task.cell();
        cell.next_tid.store(next.map_or(0, Tid::get), Ordering::Relaxed);
        cell.status.show(UMCG_STATE_RUNNABLE);
        wait::wait(0, flags).during(Call::Wait)?;
        Ok(self.was_run(next))
    }

    fn was_run(&self, next: Option<Tid>) -> bool {
        next.is_some() && self.task.cell().next_tid.load(Ordering::Relaxed) == 0
    }
}

impl Drop for Registration<'_> {
    fn drop(&mut self) {
        // EBUSY: a server that dropped this while it serves, after a timeout. It stays registered, and so does the memory.
        // EINVAL: a forked child, which never was.
        let _ = self.end();
    }
}

/// The calling thread, registered as a server: it decides which of its workers runs next. Dropping it unregisters.
///
/// Each round goes through the same steps, in this order; see the example of the [crate].
/// 1. [`mark_runnable`](Self::mark_runnable), so that what happens from here on makes step 4 return at once;
/// 2. [`take_blocked`](Self::take_blocked): workers that cannot run;
/// 3. [`take_runnable`](Self::take_runnable): workers that can;
/// 4. [`run`](Self::run) one of them, or wait with `None` for an event.
///
/// Pick only workers that were taken from both lists.
pub struct Server<'d> {
    registration: Registration<'d>,
}

impl<'d> Server<'d> {
    /// Marks the server RUNNABLE. Comes first in each round, for an event that arrives in the middle makes it RUNNING again.
    pub fn mark_runnable(&self) {
        self.task().cell().status.show(UMCG_STATE_RUNNABLE);
    }

    /// Takes the list of workers that blocked.
    pub fn take_blocked(&self) -> impl Iterator<Item = Task<'d>> + use<'d> {
        self.take(|cell| &cell.blocked_ptr)
    }

    /// Takes the list of workers that became RUNNABLE, or exited, the last one first.
    pub fn take_runnable(&self) -> impl Iterator<Item = Task<'d>> + use<'d> {
        self.take(|cell| &cell.runnable_ptr)
    }

    /// Runs `next` until there is something to decide: it blocked, waits, was preempted or is gone. With `None` waits for an
    /// event, or for the worker that it serves. Returns at once if the server is not RUNNABLE.
    ///
    /// Answers whether `next` was run. If not, queue it again.
    ///
    /// # Errors
    ///
    /// `next` was not run: `ESRCH`: no such task; `EBUSY`: not RUNNABLE, or serves, or the caller serves another; `EINVAL`: not a
    /// worker of this server.
    pub fn run(&self, next: Option<Tid>) -> Result<bool, Error> {
        self.run_or_time_out(next, None)
    }

    /// The same, for `timeout` at most; its resolution is 1 ns.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run), and `ETIMEDOUT`. A server whose worker runs still serves it then: do not run another.
    pub fn run_for(&self, next: Option<Tid>, timeout: Duration) -> Result<bool, Error> {
        self.run_or_time_out(next, Some(timeout))
    }

    fn run_or_time_out(&self, next: Option<Tid>, timeout: Option<Duration>) -> Result<bool, Error> {
        let next_tid = &self.task().cell().next_tid;
        next_tid.store(next.map_or(0, Tid::get), Ordering::Relaxed);
        crate::wait(timeout)?;
        Ok(self.registration.was_run(next))
    }

    /// Unregisters, and says whether it worked.
    ///
    /// # Errors
    ///
    /// `EBUSY`: it serves a worker. It stays registered, and the server comes back.
    pub fn unregister(self) -> Result<(), (Self, Error)> {
        let Self { registration } = self;
        registration.finish().map_err(|(registration, error)| (Self { registration }, error))
    }

    /// This server's task.
    #[must_use]
    pub fn task(&self) -> Task<'d> {
        self.registration.task
    }

    fn take(&self, list: fn(&Cell) -> &AtomicU64) -> impl Iterator<Item = Task<'d>> + use<'d> {
        let Registration { domain, task, .. } = self.registration;
        Links::take(&domain.inner.memory, list(task.cell()), list).map(Task::new)
    }
}

/// The calling thread, registered as a worker: it runs user code while its server, or another worker, lets it. Dropping it
/// unregisters, and its server goes on.
pub struct Worker<'d> {
    registration: Registration<'d>,
}

impl<'d> Worker<'d> {
    /// Lets its server choose whom to run next; this worker is on the server's runnable list meanwhile.
    ///
    /// # Errors
    ///
    /// `ESRCH`: its server is gone.
    pub fn yield_now(&self) -> Result<(), Error> {
        self.registration.switch(None, UMCG_WAIT_ENQUEUE).map(drop)
    }

    /// Stops and is on no list: until somebody who knows it runs it, or kicks it.
    ///
    /// # Errors
    ///
    /// `ESRCH`: its server is gone.
    pub fn park(&self) -> Result<(), Error> {
        self.registration.switch(None, 0).map(drop)
    }

    /// Switches directly to another worker of the same server, which is served in its place; stops as [`park`](Self::park)
    /// does. Answers whether `next` was run.
    ///
    /// # Errors
    ///
    /// `ESRCH`: no such task, or the server is gone; `EBUSY`: not RUNNABLE; `EINVAL`: not a worker of the same server.
    pub fn switch_to(&self, next: Tid) -> Result<bool, Error> {
        self.registration.switch(Some(next), 0)
    }

    /// Unregisters, and says whether it worked.
    ///
    /// # Errors
    ///
    /// `EBUSY`: in a signal handler that interrupted a wait of this worker. It stays registered, and comes back.
    pub fn unregister(self) -> Result<(), (Self, Error)> {
        let Self { registration } = self;
        registration.finish().map_err(|(registration, error)| (Self { registration }, error))
    }
}

impl<'d> Deref for Worker<'d> {
    type Target = Task<'d>;

    fn deref(&self) -> &Task<'d> {
        &self.registration.task
    }
}

impl<'d> Deref for Server<'d> {
    type Target = Task<'d>;

    fn deref(&self) -> &Task<'d> {
        &self.registration.task
    }
}

impl fmt::Debug for Server<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Server").field(&self.registration.task).finish()
    }
}

impl fmt::Debug for Worker<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Worker").field(&self.registration.task).finish()
    }
}

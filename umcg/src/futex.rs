// SPDX-License-Identifier: MIT OR Apache-2.0
//! The futex back end: UMCG as far as user space can do it alone.
//!
//! It switches cooperatively between tasks that call `umcg_wait`: the next task's status goes from RUNNABLE to RUNNING
//! by compare-and-exchange, its thread is woken, and the caller sleeps on its own status word. It does not see
//! tasks block, captures nobody and preempts nobody. Its steps and errors are those of the kernel side
//! (`src/bpf/wait.bpf.h`, `serve.bpf.h`, `register.bpf.h`, `retire.bpf.h`); where they differ, this file is wrong.
//!
//! Who serves whom is kept here, under a lock. A lock will do: no kernel side stops a worker that has it. Signals are
//! blocked meanwhile, or a handler that waits or kicks could deadlock with the thread that it interrupted.
//!
//! A domain whose scheduler goes away comes here with its tasks as they stand, and with no hosts. Servers that
//! were waiting then return; a worker without a host counts on the server that it names.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use nix::sys::signal::{SigSet, SigmaskHow};

use crate::errno::Errno;
use crate::inner::Inner;
use crate::layout::{Cell, state_of};
use crate::list::Links;
use crate::memory::{Index, Memory, Registered};
use crate::shared_abi::{
    UMCG_CALL_NEW, UMCG_STATE_BLOCKED, UMCG_STATE_NONE, UMCG_STATE_RUNNABLE, UMCG_STATE_RUNNING,
    UMCG_WAIT_ENQUEUE,
};
use crate::sys;
use crate::thread::Registration;

/// How a thread comes to wait here.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entry {
    /// Straight from the program.
    Called,
    /// It waited in the kernel, until the scheduler went away.
    LetGo,
}

pub(crate) struct Futex {
    links: Mutex<Box<[Link]>>,
    /// Those whose end the scheduler has not seen any more have been looked for.
    buried: Once,
}

/// Who serves whom, by index; 0 for nobody.
#[derive(Clone, Copy, Default)]
struct Link {
    /// The server that serves this worker.
    host: Index,
    /// The worker that this server serves.
    serving: Index,
}

impl Futex {
    pub(crate) fn new(nr_slots: u32) -> Result<Self, Errno> {
        // Index 0 is nobody's, so that indices need no translation.
        let len = nr_slots as usize + 1;
        let mut links = Vec::new();
        links.try_reserve_exact(len).map_err(|_| Errno::ENOMEM)?;
        links.resize(len, Link::default());
        Ok(Self { links: Mutex::new(links.into_boxed_slice()), buried: Once::new() })
    }

    /// `umcg_wait`, from the mark UMCG_TF_WAIT on.
    pub(crate) fn wait(
        &self,
        me: Registration<'_>,
        timeout_ns: u64,
        flags: u32,
        entry: Entry,
    ) -> Result<(), Errno> {
        let deadline_ns = (timeout_ns != 0).then(|| sys::now_ns().saturating_add(timeout_ns));
        self.locked(me.inner, |tasks| tasks.begin_wait(me.index, flags, entry))?;
        let Err(timed_out) = sleep(me.task, deadline_ns) else {
            return Ok(());
        };
        self.locked(me.inner, |_| {
            let status = &me.task.status;
            // An event that came first has won. A server that serves stays serving.
            let expired = status.shift(UMCG_STATE_RUNNABLE, UMCG_STATE_RUNNING);
            if expired { Err(timed_out) } else { Ok(()) }
        })
    }

    /// `umcg_register`, of a task that has been checked; a worker is to wait next.
    pub(crate) fn register(&self, inner: &Inner, index: Index) -> Result<(), Errno> {
        self.locked(inner, |tasks| {
            let me = tasks.at(index)?;
            if me.is_server() {
                return Ok(());
            }
            let server = tasks.server_of(me)?;
            me.cell.runnable_ts.store(sys::now_ns(), Ordering::Relaxed);
            tasks.enqueue(server, me);
            Ok(())
        })
    }

    /// `umcg_unregister`.
    pub(crate) fn unregister(&self, inner: &Inner, index: Index) -> Result<(), Errno> {
        self.locked(inner, |tasks| {
            let me = tasks.at(index)?;
            if tasks.link(me).serving != 0 {
                return Err(Errno::EBUSY);
            }
            tasks.retire(me, None);
            Ok(())
        })
    }

    /// The thread of a registered task exits.
    pub(crate) fn exit(&self, inner: &Inner, index: Index) {
        self.locked(inner, |tasks| {
            let Ok(me) = tasks.at(index) else { return };
            let server = tasks.server_of(me).ok().filter(|_| !me.is_server());
            me.cell.runnable_ts.store(sys::now_ns(), Ordering::Relaxed);
            tasks.retire(me, server);
        });
    }

    /// `umcg_kick`.
    pub(crate) fn kick(&self, inner: &Inner, tid: u32) -> Result<(), Errno> {
        self.locked(inner, |tasks| {
            let task = tasks.find(tid)?;
            if task.is_server() {
                tasks.tell(task);
            } else if task.cell.status.is_waiting() {
                if let Ok(server) = tasks.server_of(task) {
                    tasks.enqueue(server, task);
                }
            }
            Ok(())
        })
    }

    /// Has every task look at its status again.
    pub(crate) fn wake_all(&self, inner: &Inner) {
        for task in inner.memory.all_registered() {
            sys::futex_wake(task.cell.status.word());
        }
    }

    fn locked<R>(&self, inner: &Inner, f: impl FnOnce(&mut Tasks<'_>) -> R) -> R {
        let _signals = SignalsBlocked::new();
        // A thread that panicked in here has left whole links behind: each is one store.
        let links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        let mut tasks = Tasks { memory: &inner.memory, links };
        self.buried.call_once(|| tasks.bury());
        f(&mut tasks)
    }
}

/// Sleeps until the task is not RUNNABLE any more.
fn sleep(task: &Cell, deadline_ns: Option<u64>) -> Result<(), Errno> {
    loop {
        let status = task.status.load();
        if state_of(status) != UMCG_STATE_RUNNABLE {
            return Ok(());
        }
        sys::futex_wait(task.status.word(), status, deadline_ns)?;
    }
}

/// The tasks of a domain, while the lock is held.
struct Tasks<'a> {
    memory: &'a Memory,
    links: MutexGuard<'a, Box<[Link]>>,
}

impl<'a> Tasks<'a> {
    /// Does the first step of a wait, unless it is done: by the kernel side, or by the registration of a worker.
    fn begin_wait(&mut self, me: Index, flags: u32, entry: Entry) -> Result<(), Errno> {
        let me = self.at(me)?;
        let is_done = me.cell.call_flags.load(Ordering::Relaxed) & UMCG_CALL_NEW == 0;
        if me.is_server() && entry == Entry::LetGo {
            me.cell.status.show(UMCG_STATE_RUNNING); // what it waits for may never be told
            Ok(())
        } else if is_done {
            self.announce_captured(me);
            Ok(())
        } else {
            self.start_waiting(me, flags)
        }
    }

    /// A worker that was to be captured when the scheduler went away: as if it had been.
    fn announce_captured(&self, me: Registered<'a>) {
        if me.cell.status.shift(UMCG_STATE_BLOCKED, UMCG_STATE_RUNNABLE) {
            me.cell.runnable_ts.store(sys::now_ns(), Ordering::Relaxed);
            if let Ok(server) = self.server_of(me) {
                self.enqueue(server, me);
            }
        }
    }

    /// Starts whom it is to start, or tells who is to be told.
    fn start_waiting(&mut self, me: Registered<'a>, flags: u32) -> Result<(), Errno> {
        if me.cell.status.state() != UMCG_STATE_RUNNABLE {
            return Ok(()); // an event made it RUNNING: nothing to wait for
        }
        let started = if me.is_server() { self.server_waits(me) } else { self.worker_waits(me, flags) };
        started.inspect_err(|_| me.cell.status.show(UMCG_STATE_RUNNING))
    }

    fn server_waits(&mut self, me: Registered<'a>) -> Result<(), Errno> {
        let next_tid = me.cell.next_tid.load(Ordering::Relaxed);
        if next_tid == 0 || next_tid == me.tid {
            return Ok(());
        }
        let next = self.find(next_tid)?;
        let serving = self.link(me).serving;
        if serving == next.index {
            // Its wait had timed out: it goes on waiting for its worker.
        } else if serving != 0 {
            return Err(Errno::EBUSY);
        } else if next.is_server() {
            self.start_server(next)?;
        } else {
            self.start_worker(next, me, Some(me))?;
        }
        me.cell.next_tid.store(0, Ordering::Relaxed);
        Ok(())
    }

    fn worker_waits(&mut self, me: Registered<'a>, flags: u32) -> Result<(), Errno> {
        let next_tid = me.cell.next_tid.load(Ordering::Relaxed);
        let next = (next_tid != 0).then(|| self.find(next_tid)).transpose()?;
        let hosted_by = self.host_of(me);
        let host = match hosted_by {
            Some(host) => host,
            None => self.server_of(me)?,
        };
        let named = (flags & UMCG_WAIT_ENQUEUE != 0).then(|| self.server_of(me)).transpose()?;
        let other = next.filter(|next| next.index != host.index);
        // Before its status changes: a host that only marked itself RUNNABLE will look at its list.
        let host_waits = hosted_by.is_some() && host.cell.status.is_waiting();

        if let Some(next) = other {
            if next.is_server() || next.index == me.index {
                return Err(Errno::EINVAL);
            }
            self.start_worker(next, host, hosted_by)?;
            self.link_mut(me).host = 0; // the serving is passed on
        }
        me.cell.next_tid.store(0, Ordering::Relaxed);
        let told = match named {
            None if other.is_none() && !host_waits => Some(host),
            named => named,
        };
        self.stop(me, told);
        Ok(())
    }

    /// `me` stops: it is pushed on the list of `told`, if that is somebody, and its host is free. Whoever is woken by this finds
    /// all of it done.
    fn stop(&mut self, me: Registered<'a>, told: Option<Registered<'a>>) {
        if let Some(server) = told {
            self.push_runnable(server, me);
        }
        self.end_serving(me);
        if let Some(server) = told {
            self.tell(server);
        }
    }

    /// Makes `next` RUNNING, a worker that `host` may start; `served_by` is `host`, if it serves.
    fn start_worker(
        &mut self,
        next: Registered<'a>,
        host: Registered<'a>,
        served_by: Option<Registered<'a>>,
    ) -> Result<(), Errno> {
        if !next.cell.is_server(host.tid) {
            return Err(Errno::EINVAL);
        }
        if !next.cell.status.shift(UMCG_STATE_RUNNABLE, UMCG_STATE_RUNNING) {
            return Err(Errno::EBUSY);
        }
        // It may have marked itself RUNNABLE and not have waited yet.
        self.end_serving(next);
        if let Some(host) = served_by {
            self.link_mut(next).host = host.index;
            self.link_mut(host).serving = next.index;
        }
        sys::futex_wake(next.cell.status.word());
        Ok(())
    }

    fn start_server(&mut self, next: Registered<'a>) -> Result<(), Errno> {
        if self.link(next).serving != 0 || !next.cell.status.shift(UMCG_STATE_RUNNABLE, UMCG_STATE_RUNNING) {
            return Err(Errno::EBUSY);
        }
        sys::futex_wake(next.cell.status.word());
        Ok(())
    }

    /// A worker stopped: its host, if it has one, is free.
    fn end_serving(&mut self, worker: Registered<'a>) {
        if let Some(host) = self.host_of(worker) {
            self.link_mut(host).serving = 0;
            self.tell(host);
        }
        self.link_mut(worker).host = 0;
    }

    /// An event for a server: it becomes RUNNING if it serves nobody.
    fn tell(&self, server: Registered<'a>) {
        let is_free = self.link(server).serving == 0;
        if is_free && server.cell.status.shift(UMCG_STATE_RUNNABLE, UMCG_STATE_RUNNING) {
            sys::futex_wake(server.cell.status.word());
        }
    }

    /// Pushes the worker on the server's runnable list. A worker that is on that list already is left there: one that the
    /// scheduler let go when it went away may be, and a second push would close a circle.
    fn push_runnable(&self, server: Registered<'a>, worker: Registered<'a>) {
        let (head, link) = (&server.cell.runnable_ptr, &worker.cell.runnable_ptr);
        if self.is_listed(head, worker) {
            return;
        }
        let push = |first| {
            link.store(first, Ordering::Relaxed);
            Some(worker.cell.addr())
        };
        // Pairs with the server's xchg: who sees the entry sees its link, status and time.
        let _ = head.fetch_update(Ordering::SeqCst, Ordering::SeqCst, push);
    }

    fn enqueue(&self, server: Registered<'a>, worker: Registered<'a>) {
        self.push_runnable(server, worker);
        self.tell(server);
    }

    fn is_listed(&self, head: &AtomicU64, worker: Registered<'a>) -> bool {
        Links::new(self.memory, head.load(Ordering::Acquire), |cell| &cell.runnable_ptr)
            .any(|cell| cell.addr() == worker.cell.addr())
    }

    /// Gives up a registration, and tells `told` of it by its list.
    fn retire(&mut self, me: Registered<'a>, told: Option<Registered<'a>>) {
        me.cell.status.show(UMCG_STATE_NONE);
        self.stop(me, told);
        let served = std::mem::take(self.link_mut(me)).serving;
        if let Ok(worker) = self.at(served) {
            self.link_mut(worker).host = 0;
        }
    }

    /// Retires who left the report of its end to a scheduler that went away before it.
    fn bury(&mut self) {
        for task in self.memory.all_registered().filter(|task| !sys::thread_exists(task.tid)) {
            let server = self.server_of(task).ok().filter(|_| !task.is_server());
            self.retire(task, server);
        }
    }

    fn host_of(&self, worker: Registered<'a>) -> Option<Registered<'a>> {
        self.at(self.link(worker).host).ok()
    }

    /// The server that a task names.
    fn server_of(&self, task: Registered<'a>) -> Result<Registered<'a>, Errno> {
        let server = self.find(task.cell.server_tid.load(Ordering::Relaxed))?;
        server.is_server().then_some(server).ok_or(Errno::ESRCH)
    }

    fn at(&self, index: Index) -> Result<Registered<'a>, Errno> {
        self.memory.registered(index).ok_or(Errno::ESRCH)
    }

    fn find(&self, tid: u32) -> Result<Registered<'a>, Errno> {
        self.memory.find(tid).ok_or(Errno::ESRCH)
    }

    fn link(&self, task: Registered<'a>) -> Link {
        self.links[task.index as usize]
    }

    fn link_mut(&mut self, task: Registered<'a>) -> &mut Link {
        &mut self.links[task.index as usize]
    }
}

/// The calling thread's signals, blocked while this lives.
struct SignalsBlocked(Option<SigSet>);

impl SignalsBlocked {
    fn new() -> Self {
        // Fails for an unknown `how` only.
        Self(SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK).ok())
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        if let Some(mask) = self.0 {
            let _ = mask.thread_set_mask();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_ended_while_the_scheduler_did_is_retired_by_the_first_operation() {
        const NOBODYS: u32 = 1 << 22; // tids end below
        let inner = Inner::of_our_own(2).unwrap();
        let cells = [NOBODYS, sys::gettid()].map(|tid| {
            let cell = inner.memory.alloc().unwrap();
            assert!(inner.memory.take(inner.memory.index_of(cell.addr()).unwrap(), tid));
            cell.status.show(UMCG_STATE_RUNNING);
            cell
        });
        inner.futex.locked(&inner, |_| ());
        assert_eq!(cells.map(|cell| cell.status.state()), [UMCG_STATE_NONE, UMCG_STATE_RUNNING]);
    }
}

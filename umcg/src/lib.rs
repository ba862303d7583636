// SPDX-License-Identifier: MIT OR Apache-2.0
//! UMCG, user-managed concurrency groups, on a stock Linux kernel.
//!
//! Many *worker* threads are multiplexed over a few *server* threads. Which worker runs next is decided here, in user
//! space, by the servers. What user space cannot see alone, the kernel tells it: a worker blocked in the kernel; a blocked
//! worker can run again. At no time is more than one worker of a server in user code.
//!
//! The loader `scx_umcg` must be running (or the program is started by `scx_umcg run`), for its BPF scheduler is
//! the kernel side. With [`OpenOptions::fallback`] a program runs without it as well; then tasks switch when they
//! ask to, and blocking is not seen.
//!
//! # Example
//!
//! Workers that sleep and compute, and a server that runs them first in, first out:
//!
//! ```no_run
//! use std::collections::VecDeque;
//! use std::sync::atomic::{AtomicUsize, Ordering};
//! use std::thread;
//! use std::time::Duration;
//!
//! use umcg::{Domain, Error, OpenOptions, Server, State, Tid};
//!
//! fn work(domain: &Domain, server: Tid, left: &AtomicUsize) -> Result<(), Error> {
//!     let worker = domain.register_worker(server)?; // returns once the server runs it
//!     thread::sleep(Duration::from_millis(1)); // blocks: the server runs somebody else
//!     worker.yield_now()?; // does so, too
//!     drop(worker); // unregisters
//!     left.fetch_sub(1, Ordering::SeqCst);
//!     domain.kick(server) // have it look at `left`
//! }
//!
//! fn serve(server: &Server<'_>, left: &AtomicUsize) -> Result<(), Error> {
//!     let mut ready = VecDeque::new();
//!     loop {
//!         server.mark_runnable(); // first: what happens from here on makes run() return at once
//!         if left.load(Ordering::SeqCst) == 0 {
//!             return Ok(());
//!         }
//!         // Whom we ran is in `ready` no more; if it blocked, it comes back by the other list.
//!         server.take_blocked().for_each(drop);
//!         ready.extend(server.take_runnable().filter(|worker| worker.state() == State::Runnable));
//!         let next = ready.pop_front();
//!         if !server.run(next.and_then(|worker| worker.tid()))? {
//!             next.into_iter().for_each(|worker| ready.push_front(worker)); // an event came first
//!         }
//!     }
//! }
//!
//! fn main() -> Result<(), Error> {
//!     let domain = Domain::open(&OpenOptions::new(5).fallback(true))?;
//!     let server = domain.register_server()?;
//!     let tid = Tid::current();
//!     let left = AtomicUsize::new(4);
//!     thread::scope(|scope| {
//!         for _ in 0..4 {
//!             scope.spawn(|| work(&domain, tid, &left));
//!         }
//!         serve(&server, &left)
//!     })
//! }
//! ```
//!
//! # Rules
//!
//! - Registration is per thread: [`Server`] and [`Worker`] stay in the thread that made them, and end with it.
//! - A worker can be stopped between any two instructions until its server runs it again, with whatever locks it has. So a
//!   server must not wait for a lock that its workers take; atomics and the domain's own lists are fine.
//! - A forked child starts without a domain and may open one; its copy of the parent's [`Domain`] is dead.
//! - When the loader goes away, waiting servers return, and the domain goes on as [`Backend::Futex`].
//!
//! # How it is safe
//!
//! A domain's memory is written by every thread of the process and by the kernel at any time. This crate touches it as atomics
//! only; it bounds and looks up every index, tid and address that it reads there, and follows none. What a wild
//! store can break is the program's scheduling, not memory safety. [`raw`] has the C interface for programs that walk the
//! lists themselves.

mod connect;
mod ctl;
mod domain;
mod errno;
mod futex;
mod inner;
mod layout;
mod list;
mod memory;
mod policy;
mod process;
pub mod raw;
mod register;
mod rseq;
// One file for this crate and the loader, which has uses for more of it; its names are those of C.
#[path = "../../src/shared_abi.rs"]
#[allow(dead_code, non_camel_case_types)]
mod shared_abi;
mod sys;
mod task;
mod thread;
mod wait;

use std::time::Duration;

pub use domain::{Backend, Domain, OpenOptions, Server, Worker};
pub use errno::{Call, Errno, Error};
pub use task::{State, Task, Tid};

use errno::During;

/// `umcg_wait` of the calling thread, exactly: with status RUNNING returns at once, otherwise switches to whom its task names
/// as next. [`Server::run`] and the methods of [`Worker`] set that up first.
///
/// # Errors
///
/// `ESRCH`: no such task, or a worker's server is gone; `EBUSY`: that task is not RUNNABLE, or serves, or the caller serves
/// another; `EINVAL`: not registered, or not the caller's worker to start; `ETIMEDOUT`; `ERANGE`: a worker with a timeout;
/// `EDEADLK`: in a signal handler that interrupted a wait of this thread.
pub fn wait(timeout: Option<Duration>) -> Result<(), Error> {
    // 0 stands for no timeout. More than u64 nanoseconds are 584 years.
    let timeout_ns =
        timeout.map_or(0, |timeout| u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX).max(1));
    wait::wait(timeout_ns, 0).during(Call::Wait)
}

/// Has a waiting server look around; preempts a RUNNING worker of which [`Task::request_preemption`] asked that; puts a waiting worker
/// on its server's runnable list. Otherwise nothing happens.
///
/// The task is one of the calling thread's domain, or else of the process's.
///
/// # Errors
///
/// `ESRCH`: no such task.
pub fn kick(tid: Tid) -> Result<(), Error> {
    register::kick(tid.get()).during(Call::Kick)
}

// SPDX-License-Identifier: MIT OR Apache-2.0
//! Signal handlers that interrupt a wait: the wait goes on, and what the handler does to the status does not lose it.

mod common;

use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;

use common::{alone, eventually, open, until_runnable};
use umcg::{State, Tid, raw};

static ANSWER: AtomicI32 = AtomicI32::new(0);
static STATUS: AtomicU32 = AtomicU32::new(0);

/// What a handler that knows nothing of UMCG's rules might do: run a server's loop.
extern "C" fn handler(_: libc::c_int) {
    let me = raw::current();
    // SAFETY: the handler runs in a registered thread; the word is written by atomics and plain stores alike.
    let status = unsafe { AtomicU32::from_ptr(&raw mut (*me).umcg_status) };
    if STATUS.load(Ordering::SeqCst) != 0 {
        status.store(raw::UMCG_STATE_RUNNABLE, Ordering::SeqCst);
    }
    let answer = raw::wait(0, 0).err().map_or(0, raw::Errno::raw);
    STATUS.store(status.load(Ordering::SeqCst), Ordering::SeqCst);
    ANSWER.store(answer, Ordering::SeqCst);
}

fn install() {
    // SAFETY: an all-zero sigaction is one without flags and mask; the handler calls what may be called in one.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as libc::sighandler_t;
        assert_eq!(libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()), 0);
    }
}

/// Signals a server that waits for an event, and answers how its `run` ended.
fn signal_a_waiting_server(stores: bool, then: impl FnOnce(&umcg::Domain, Tid)) {
    let domain = open(1);
    install();
    ANSWER.store(0, Ordering::SeqCst);
    STATUS.store(u32::from(stores), Ordering::SeqCst);
    let (tell, told) = mpsc::channel();
    thread::scope(|scope| {
        let domain = &domain;
        let server = scope.spawn(move || {
            let server = domain.register_server().unwrap();
            // SAFETY: gives this thread's handle to the thread that outlives it.
            tell.send((Tid::current(), unsafe { libc::pthread_self() })).unwrap();
            server.mark_runnable();
            server.run(None).unwrap();
            assert_eq!(server.state(), State::Running);
        });
        let (tid, handle) = told.recv().unwrap();
        until_runnable(domain.task(tid).unwrap());
        // The mark comes a few instructions before it sleeps; either way its wait has begun or begins now.
        eventually("it is inside umcg_wait", || in_wait(domain, tid));
        // SAFETY: the thread is in its wait, and joined below.
        assert_eq!(unsafe { libc::pthread_kill(handle, libc::SIGUSR1) }, 0);
        eventually("the handler has run", || ANSWER.load(Ordering::SeqCst) != 0);
        then(domain, tid);
        server.join().unwrap();
    });
    assert_eq!(ANSWER.load(Ordering::SeqCst), libc::EDEADLK);
}

fn in_wait(domain: &umcg::Domain, tid: Tid) -> bool {
    let task = domain.task(tid).unwrap();
    // SAFETY: a word of the open domain.
    let status = unsafe { AtomicU32::from_ptr(&raw mut (*task.as_ptr()).umcg_status) };
    status.load(Ordering::SeqCst) & 0x200 != 0
}

#[test]
fn a_wait_goes_on_after_a_handler() {
    let _alone = alone();
    signal_a_waiting_server(false, |domain, tid| {
        assert_eq!(domain.task(tid).unwrap().state(), State::Runnable, "undisturbed");
        domain.kick(tid).unwrap();
    });
}

#[test]
fn a_handler_that_stores_runnable_ends_the_wait_rather_than_lose_an_event() {
    let _alone = alone();
    signal_a_waiting_server(true, |_, _| {
        assert_eq!(STATUS.load(Ordering::SeqCst), raw::UMCG_STATE_RUNNING);
    });
}

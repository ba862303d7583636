// SPDX-License-Identifier: GPL-2.0-only
//! A server finds every entry that was pushed on its list, once, and is told of it.

use loom::sync::Arc;
use loom::thread;
use umcg_rooms::{Atomics, Word32, Word64, list_push, status_move};

const RUNNING: u32 = 0;
const RUNNABLE: u32 = 1;

/// A server's list and status, and the link words of two workers.
struct Server {
    head: Word64,
    links: [Word64; 2],
    status: Word32,
}

impl Server {
    fn new(atomics: Atomics) -> Arc<Self> {
        Arc::new(Self {
            head: Word64::new(0, atomics),
            links: [Word64::new(0, atomics), Word64::new(0, atomics)],
            status: Word32::new(RUNNING, atomics),
        })
    }

    /// Worker N has the address N + 1.
    fn push(&self, worker: usize) {
        let pushed = list_push(self.head.at(), self.links[worker].at(), worker as u64 + 1);
        assert!(pushed, "the kernel side gave up");
    }

    /// As the seed's loop does: takes the whole list, and reads each link before the worker is used.
    fn take(&self) -> Vec<u64> {
        let first = self.head.xchg(0);
        let next = |&addr: &u64| Some(self.links[addr as usize - 1].load()).filter(|&a| a != 0);
        std::iter::successors(Some(first).filter(|&a| a != 0), next)
            .take(self.links.len() + 1) // a broken list may be a ring
            .collect()
    }
}

/// The kernel side pushes two workers while the server takes its list. All pushes of a domain happen under its
/// lock, so one thread stands for all of them.
fn push_while_taking(atomics: Atomics) {
    let server = Server::new(atomics);
    let kernel = {
        let server = server.clone();
        thread::spawn(move || {
            server.push(0);
            server.push(1);
        })
    };
    let mut taken = server.take();
    kernel.join().expect("a panic of a thread is the model's");
    taken.extend(server.take());
    taken.sort_unstable();
    assert!(taken == [1, 2], "taken: {taken:?}");
}

#[test]
fn every_entry_is_taken_once() {
    loom::model(|| push_while_taking(Atomics::Kernel));
}

#[test]
#[should_panic(expected = "taken: ")]
fn torn_an_entry_is_lost_or_taken_twice() {
    loom::model(|| push_while_taking(Atomics::Torn));
}

/// The server marks itself RUNNABLE, then takes its list; the kernel side pushes, then takes the mark back. If
/// neither saw the other, the server would wait for an event that is already in its list. Both exchanges are on
/// the list's head, so one reads from the other: acquire and release would do here.
fn event_while_about_to_wait(atomics: Atomics) {
    let server = Server::new(atomics);
    let kernel = {
        let server = server.clone();
        thread::spawn(move || {
            server.push(0);
            status_move(server.status.at(), RUNNABLE, RUNNING)
        })
    };
    server.status.store(RUNNABLE);
    let taken = server.take();
    let told = kernel.join().expect("a panic of a thread is the model's");
    assert!(told == (server.status.load() == RUNNING));
    assert!(told || taken == [1], "the server waits, and its list is not empty");
}

#[test]
fn a_server_about_to_wait_misses_no_event() {
    loom::model(|| event_while_about_to_wait(Atomics::Kernel));
}

#[test]
#[should_panic(expected = "the server waits, and its list is not empty")]
fn unordered_a_server_about_to_wait_misses_an_event() {
    loom::model(|| event_while_about_to_wait(Atomics::Relaxed));
}

// SPDX-License-Identifier: MIT OR Apache-2.0
//! A forked child starts without a domain, unregistered, and may open one of its own; the parent does not notice.

mod common;

use std::path::Path;

use common::{NO_SOCKET, RawDomain, alone, open, prepared, raw_server};
use umcg::raw;
use umcg::{Backend, Tid};

/// Runs `child` in a forked child and answers its exit status.
fn in_child(child: impl FnOnce() -> Result<(), i32>) -> i32 {
    // SAFETY: the child runs the closure, which allocates; glibc allows that after a fork.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        let status = child().map_or_else(|line| line, |()| 0);
        // SAFETY: ends the child without the test harness's destructors.
        unsafe { libc::_exit(status) };
    }
    let mut status = 0;
    // SAFETY: waits for the child that was just made.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    assert!(libc::WIFEXITED(status), "the child was killed: {status:#x}");
    libc::WEXITSTATUS(status)
}

/// The line number, as far as an exit status holds it, of a condition that does not hold.
fn check(condition: bool, line: u32) -> Result<(), i32> {
    condition.then_some(()).ok_or((line & 0xff) as i32)
}

#[test]
fn a_child_starts_afresh_and_may_open() {
    let _alone = alone();
    let _domain = RawDomain::open(4);
    let task = raw_server();

    let status = in_child(|| {
        check(raw::current().is_null(), line!())?;
        check(raw::backend() == c"none", line!())?;
        check(raw::unregister(task).is_err(), line!())?;
        check(raw::close().is_err(), line!())?;
        let socket = Some(Path::new(NO_SOCKET));
        check(raw::open(socket, 1, raw::UMCG_OPEN_FALLBACK).is_ok(), line!())?;
        let own = raw_server();
        check(raw::kick(Tid::current().get() as i32, 0).is_ok(), line!())?;
        check(raw::unregister(own).is_ok() && raw::close().is_ok(), line!())
    });
    assert_eq!(status, 0, "line (mod 256) of the check that failed in the child");

    assert_eq!(raw::current(), task, "the parent is registered as before");
    raw::unregister(task).unwrap();
    assert!(!prepared(0, raw::UMCG_STATE_NONE).is_null());
}

#[test]
fn a_child_does_not_see_the_parents_memory() {
    let _alone = alone();
    let _domain = RawDomain::open(1);
    let task = raw::task_alloc();
    let status = in_child(|| {
        let mut seen = 0u8;
        let page = (task.addr() & !0xfff) as *mut libc::c_void;
        // SAFETY: mincore reads page tables only.
        let mapped = unsafe { libc::mincore(page, 1, &raw mut seen) } == 0;
        check(!mapped, line!())
    });
    assert_eq!(status, 0, "the domain is not mapped in the child");
}

#[test]
fn a_childs_copy_of_the_domain_is_dead() {
    let _alone = alone();
    let domain = open(4);
    let server = domain.register_server().unwrap();
    let tid = Tid::current();
    let status = in_child(|| {
        check(domain.backend() == Backend::Futex, line!())?;
        check(domain.kick(tid).is_err() && domain.task(tid).is_none(), line!())?;
        check(domain.register_server().is_err(), line!())?;
        // SAFETY: the child does not use it again, and ends without destructors.
        drop(unsafe { std::ptr::read(&domain) });
        Ok(())
    });
    assert_eq!(status, 0, "line (mod 256) of the check that failed in the child");
    assert!(domain.task(tid).is_some(), "the parent is registered as before");
    server.unregister().map_err(|(_, error)| error).unwrap();
}

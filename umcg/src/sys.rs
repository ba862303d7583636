// SPDX-License-Identifier: MIT OR Apache-2.0
//! The system calls that no crate wraps, or that must cost nothing on top.

use std::sync::atomic::AtomicU32;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::errno::Errno;

/// `sched_yield(2)` without the way through libc: this is the switch, and it is what is measured.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(crate) fn sched_yield() {
    // SAFETY: the call takes no argument and touches no memory of ours but what the kernel side of UMCG
    // writes to atomics; `syscall` itself changes rax, rcx and r11 only.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") libc::SYS_sched_yield => _,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
}

/// `sched_yield(2)`.
#[cfg(not(target_arch = "x86_64"))]
#[inline]
pub(crate) fn sched_yield() {
    // SAFETY: the call takes no argument.
    unsafe { libc::syscall(libc::SYS_sched_yield) };
}

/// The calling thread's id in its own pid namespace.
pub(crate) fn gettid() -> u32 {
    nix::unistd::gettid().as_raw() as u32
}

/// CLOCK_MONOTONIC, the clock of the timestamps in `umcg_task`.
pub(crate) fn now_ns() -> u64 {
    // Fails for unknown clocks only.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |now| Duration::from(now).as_nanos() as u64)
}

/// Sleeps while `word` is `expected`, until `deadline_ns` of CLOCK_MONOTONIC. Returns early for any reason; only
/// ETIMEDOUT is told apart.
///
/// The futex is private: the word may lie in a BPF map, whose pages the kernel could not look up as a shared one.
pub(crate) fn futex_wait(word: &AtomicU32, expected: u32, deadline_ns: Option<u64>) -> Result<(), Errno> {
    let deadline = deadline_ns.map(|ns| libc::timespec {
        tv_sec: (ns / 1_000_000_000) as libc::time_t,
        tv_nsec: (ns % 1_000_000_000) as libc::c_long,
    });
    let deadline: *const libc::timespec = deadline.as_ref().map_or(std::ptr::null(), |d| d);
    // SAFETY: the word is borrowed and the deadline a local (or null, for none), both for the whole call.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT_BITSET | libc::FUTEX_PRIVATE_FLAG,
            expected,
            deadline,
            std::ptr::null::<u32>(),
            libc::FUTEX_BITSET_MATCH_ANY,
        )
    };
    if ret < 0 && Errno::last() == Errno::ETIMEDOUT {
        return Err(Errno::ETIMEDOUT);
    }
    Ok(())
}

/// Wakes the thread that sleeps on `word`: there is one at most.
pub(crate) fn futex_wake(word: &AtomicU32) {
    // SAFETY: FUTEX_WAKE uses the address as a key only.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, 1);
    }
}

/// Whether a thread of this process has that tid.
pub(crate) fn thread_exists(tid: u32) -> bool {
    // SAFETY: takes no pointers; signal 0 is none, and only asks.
    let answer = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, 0) };
    answer == 0 || Errno::last() != Errno::ESRCH
}

// SPDX-License-Identifier: GPL-2.0-only
//! Capture needs an rseq area of 32 bytes (docs/design.md); the library lends itself what a thread has.
//!
//! The failures this guards against: a C library that registers more, or nothing, and workers that slip
//! through; and a thread that is left with another area than it came with.

use std::cell::UnsafeCell;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::errno::Errno;

use crate::cast::{become_server, open, retire};
use crate::harness::Test;

pub const TESTS: &[Test] = &[
    Test::new("rseq_area_of_32_bytes_is_left_alone", || is_given_back(Some(32))),
    Test::new("rseq_area_of_33_bytes_is_given_back", || is_given_back(Some(33))),
    Test::new("rseq_area_that_never_was_is_taken_away_again", || is_given_back(None)),
];

const TUNABLES: &str = "GLIBC_TUNABLES";
const NO_RSEQ: &str = "glibc.pthread.rseq=0";
const UNREGISTER: i32 = 1;
const SIGNATURE: u32 = 0x5305_3053;

/// An rseq area as some C library would have it; `len` bytes are registered.
#[repr(C, align(64))]
pub struct Area {
    bytes: UnsafeCell<[u32; 15]>,
    len: u32,
}

impl Area {
    /// Registers a new one for the calling thread, which must have none. It is never freed: the kernel writes
    /// to it.
    pub fn register(len: u32) -> &'static Self {
        let area = Box::leak(Box::new(Self { bytes: UnsafeCell::new([0; 15]), len }));
        area.call(len, 0).expect("this thread has an rseq area");
        area
    }

    /// Unregisters it, which the kernel refuses unless it is the area that is registered, with this very
    /// length.
    pub fn unregister(&self) -> Result<(), Errno> {
        self.call(self.len, UNREGISTER)
    }

    fn call(&self, len: u32, flags: i32) -> Result<(), Errno> {
        // SAFETY: the kernel writes to the first `len` bytes, 60 at most, of an area that lives for ever.
        let result = unsafe { libc::syscall(libc::SYS_rseq, self.bytes.get(), len, flags, SIGNATURE) };
        Errno::result(result).map(drop)
    }
}

/// Starts this test's process over, without the rseq areas of the C library.
pub fn restart_without_rseq() {
    if std::env::var_os(TUNABLES).is_some_and(|tunables| tunables == NO_RSEQ) {
        return;
    }
    let error = Command::new("/proc/self/exe").env(TUNABLES, NO_RSEQ).exec();
    panic!("cannot start over: {error}");
}

fn is_given_back(len: Option<u32>) {
    restart_without_rseq();
    open(1);
    let area = len.map(Area::register);
    let server = become_server();
    if len.is_some_and(|len| len != 32) {
        assert_eq!(area.map(Area::unregister), Some(Err(Errno::EINVAL)), "the long area is still registered");
    }
    retire(server);
    assert_has_only(area);
}

/// The calling thread has `area`, or none, and has none afterwards.
pub fn assert_has_only(area: Option<&Area>) {
    if let Some(area) = area {
        assert_eq!(area.unregister(), Ok(()), "the thread has another area than it came with");
    }
    assert_eq!(Area::register(32).unregister(), Ok(()));
}

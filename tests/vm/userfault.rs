// SPDX-License-Identifier: GPL-2.0-only
//! A page whose first access sleeps until the test says so: userfaultfd(2), which no crate here wraps.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use crate::cast::load_program;

const PAGE: usize = 4096;

/// `_IOWR(0xaa, nr, size)` of linux/userfaultfd.h.
const fn iowr(nr: u64, size: usize) -> u64 {
    3 << 30 | (size as u64) << 16 | 0xaa << 8 | nr
}

/// `struct uffdio_api`: version and features asked for, ioctls answered.
type Api = [u64; 3];
/// `struct uffdio_register`: start, length, mode; ioctls answered.
type Register = [u64; 4];
/// `struct uffdio_zeropage`: start, length, mode; length answered.
type Zeropage = [u64; 4];

const UFFDIO_API: u64 = iowr(0x3f, size_of::<Api>());
const UFFDIO_REGISTER: u64 = iowr(0x00, size_of::<Register>());
const UFFDIO_ZEROPAGE: u64 = iowr(0x04, size_of::<Zeropage>());
const UFFD_API: u64 = 0xaa;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
/// `struct uffd_msg`.
const MESSAGE: usize = 32;

/// The page; it stays mapped for ever.
pub struct Userfault {
    fd: File,
    page: usize,
}

impl Userfault {
    pub fn new() -> Self {
        load_program();
        // SAFETY: no pointers; the kernel gives out a descriptor that is nobody else's.
        let fd = unsafe {
            let fd =
                Errno::result(libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC)).expect("userfaultfd");
            File::from(OwnedFd::from_raw_fd(fd.try_into().expect("a descriptor is an int")))
        };
        // SAFETY: a new mapping that the kernel places; it replaces nothing.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(page, libc::MAP_FAILED, "mmap: {}", Errno::last());
        let this = Self { fd, page: page.expose_provenance() };
        this.ioctl(UFFDIO_API, [UFFD_API, 0, 0]);
        this.ioctl(UFFDIO_REGISTER, [this.page as u64, PAGE as u64, UFFDIO_REGISTER_MODE_MISSING, 0]);
        this
    }

    /// Of the page; reading there sleeps until `resolve`.
    pub fn address(&self) -> *const u8 {
        std::ptr::with_exposed_provenance(self.page)
    }

    /// Sleeps until somebody sleeps at the page.
    pub fn await_fault(&self) {
        (&self.fd).read_exact(&mut [0; MESSAGE]).expect("read of the userfaultfd");
    }

    /// Puts a page of zeroes there, and wakes whoever waits for it.
    pub fn resolve(&self) {
        self.ioctl(UFFDIO_ZEROPAGE, [self.page as u64, PAGE as u64, 0, 0]);
    }

    fn ioctl<const N: usize>(&self, request: u64, mut argument: [u64; N]) {
        // SAFETY: the request's number has the size of its argument, which lives until the call is over. What
        // it does to memory it does to the one page, which nobody but the tests' deliberate faults accesses.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), request, argument.as_mut_ptr()) };
        Errno::result(result).expect("ioctl of the userfaultfd");
    }
}

// SPDX-License-Identifier: GPL-2.0-only
//! A client without the library: what a program gets from the loader, and may do with it as it likes.

use std::io::IoSliceMut;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::atomic::AtomicU32;

use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect, recvmsg, send,
    socket,
};

use shared_abi::{
    UMCG_ABI_VERSION, UMCG_CTL_ATTACH, UMCG_MAGIC, umcg_cell, umcg_ctl_args, umcg_hello, umcg_welcome,
};

#[path = "../../src/shared_abi.rs"]
#[allow(dead_code, non_camel_case_types)]
pub mod shared_abi;

/// Words of a cell, the unit in which its fields are written here.
pub const CELL_WORDS: usize = size_of::<umcg_cell>() / size_of::<u32>();

const BPF_PROG_RUN: u32 = 10;

/// `union bpf_attr`: words, for each command has its own layout. Zeroes where nothing is set.
#[derive(Clone, Default)]
pub struct Attr([u32; 32]);

impl Attr {
    /// Sets the word at byte `offset`.
    pub fn word(mut self, offset: usize, value: u32) -> Self {
        self.0[offset / 4] = value;
        self
    }

    /// Sets the two words at byte `offset`.
    pub fn pointer(self, offset: usize, value: u64) -> Self {
        self.word(offset, value as u32).word(offset + 4, (value >> 32) as u32)
    }

    pub fn descriptor(self, offset: usize, fd: &impl AsRawFd) -> Self {
        self.word(offset, fd.as_raw_fd().cast_unsigned())
    }

    /// What a command has left at byte `offset`.
    pub fn answer(&self, offset: usize) -> u32 {
        self.0[offset / 4]
    }
}

/// bpf(2): what it returns, or a negative errno.
pub fn bpf(command: u32, attr: &mut Attr) -> i32 {
    // SAFETY: the attributes are as long as said; what they point to, callers keep, writable and long enough.
    let ret = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut attr.0, size_of::<Attr>()) };
    if ret < 0 { -std::io::Error::last_os_error().raw_os_error().unwrap_or(0) } else { ret as i32 }
}

/// Says hello to the loader at `socket`; its answer is on its way.
pub fn ask_for_domain(socket_path: &Path, max_tasks: u32) -> OwnedFd {
    let connection = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    connect(connection.as_raw_fd(), &UnixAddr::new(socket_path).unwrap()).unwrap();
    let hello = umcg_hello { magic: UMCG_MAGIC, abi_version: UMCG_ABI_VERSION, max_tasks, reserved: 0 };
    // SAFETY: four words without padding; the slice lives no longer than they do.
    let bytes =
        unsafe { std::slice::from_raw_parts((&raw const hello).cast::<u8>(), size_of::<umcg_hello>()) };
    send(connection.as_raw_fd(), bytes, MsgFlags::empty()).unwrap();
    connection
}

/// What the loader hands over, and the connection that keeps it.
pub struct Client {
    pub welcome: umcg_welcome,
    pub map: OwnedFd,
    pub control: OwnedFd,
    _connection: OwnedFd,
}

impl Client {
    /// Gets a domain from the loader at `socket`; it is nobody's yet.
    pub fn open(socket_path: &Path, max_tasks: u32) -> Self {
        let connection = ask_for_domain(socket_path, max_tasks);
        let (welcome, [map, control]) = receive(&connection);
        Self { welcome, map, control, _connection: connection }
    }

    /// Makes the domain this process's.
    pub fn attach(&self) {
        let args = umcg_ctl_args { op: UMCG_CTL_ATTACH, nonce: self.welcome.nonce, ..self.args() };
        assert_eq!(self.run(args).map(|answer| answer.result), Ok(0), "cannot attach");
    }

    /// No operation yet, on this domain.
    pub fn args(&self) -> umcg_ctl_args {
        umcg_ctl_args { domain: self.welcome.domain, ..umcg_ctl_args::default() }
    }

    /// Runs the control program; what it left in its arguments, or bpf(2)'s own negative errno.
    pub fn run(&self, mut args: umcg_ctl_args) -> Result<umcg_ctl_args, i32> {
        let attr = Attr::default()
            .descriptor(0, &self.control)
            .word(40, size_of::<umcg_ctl_args>() as u32)
            .pointer(48, (&raw mut args).expose_provenance() as u64);
        match bpf(BPF_PROG_RUN, &mut attr.clone()) {
            0 => Ok(args),
            errno => Err(errno),
        }
    }

    /// The error in the answer of the control program.
    pub fn error(&self, args: umcg_ctl_args) -> i32 {
        self.run(args).expect("the program runs").result
    }

    /// Maps the domain: its cells, header first, as words. They are never unmapped.
    pub fn words(&self) -> &'static [AtomicU32] {
        let len = (self.welcome.nr_slots as usize + 1) * CELL_WORDS;
        let bytes = NonZeroUsize::new(len * size_of::<u32>()).unwrap();
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping, of that many bytes, which stays; everybody uses atomics.
        unsafe {
            let base = mmap(None, bytes, protection, MapFlags::MAP_SHARED, &self.map, 0).unwrap();
            std::slice::from_raw_parts(base.as_ptr().cast(), len)
        }
    }
}

fn receive(connection: &OwnedFd) -> (umcg_welcome, [OwnedFd; 2]) {
    let mut welcome = umcg_welcome::default();
    // SAFETY: words without padding, of any value; the slice is their only user while it lives.
    let bytes =
        unsafe { std::slice::from_raw_parts_mut((&raw mut welcome).cast::<u8>(), size_of::<umcg_welcome>()) };
    let mut space = nix::cmsg_space!([RawFd; 2]);
    let mut iov = [IoSliceMut::new(bytes)];
    let fds = recvmsg::<()>(connection.as_raw_fd(), &mut iov, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)
        .unwrap()
        .cmsgs()
        .unwrap()
        .flat_map(owned_fds)
        .collect::<Vec<_>>();
    assert_eq!(welcome.error, 0, "the loader refused");
    (welcome, fds.try_into().expect("a map and a program"))
}

fn owned_fds(message: ControlMessageOwned) -> Vec<OwnedFd> {
    let ControlMessageOwned::ScmRights(fds) = message else { return Vec::new() };
    // SAFETY: the kernel has just made them for us, and each appears once.
    fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect()
}

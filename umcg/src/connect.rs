// SPDX-License-Identifier: MIT OR Apache-2.0
//! The way to the loader: one message there, one back, with the descriptors of the domain.

use std::io::{IoSlice, IoSliceMut};
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use nix::cmsg_space;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect, recvmsg, sendmsg,
    socket,
};

use crate::errno::Errno;
use crate::shared_abi::{UMCG_ABI_VERSION, UMCG_MAGIC, umcg_hello, umcg_welcome};

const DEFAULT_SOCKET: &str = "/run/scx_umcg/umcg.sock";

/// What the loader hands over.
pub(crate) struct Handover {
    pub(crate) welcome: umcg_welcome,
    pub(crate) connection: OwnedFd,
    pub(crate) map: OwnedFd,
    pub(crate) control: OwnedFd,
}

/// Where the loader listens, unless the program says so: `$UMCG_SOCKET`, which programs that run with more rights than
/// their caller do not believe, or the default.
pub(crate) fn default_socket() -> PathBuf {
    // SAFETY: reads the auxiliary vector.
    let secure = unsafe { libc::getauxval(libc::AT_SECURE) } != 0;
    std::env::var_os("UMCG_SOCKET")
        .filter(|path| !secure && !path.is_empty())
        .map_or_else(|| PathBuf::from(DEFAULT_SOCKET), PathBuf::from)
}

/// Asks the loader at `path` for a domain.
pub(crate) fn ask(path: &Path, max_tasks: u32) -> Result<Handover, Errno> {
    let connection = connected(path)?;
    say_hello(&connection, max_tasks)?;
    let (welcome, fds) = receive_welcome(&connection)?;
    if welcome.abi_version != UMCG_ABI_VERSION {
        return Err(Errno::EPROTO);
    }
    Errno::check(welcome.error)?;
    let [map, control] = <[OwnedFd; 2]>::try_from(fds).map_err(|_| Errno::EPROTO)?;
    Ok(Handover { welcome, connection, map, control })
}

fn connected(path: &Path) -> Result<OwnedFd, Errno> {
    let connection = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    let address = UnixAddr::new(path)?;
    retry(|| connect(connection.as_raw_fd(), &address))?;
    Ok(connection)
}

fn say_hello(connection: &OwnedFd, max_tasks: u32) -> Result<(), Errno> {
    let hello = umcg_hello { magic: UMCG_MAGIC, abi_version: UMCG_ABI_VERSION, max_tasks, reserved: 0 };
    let mut bytes = [0; size_of::<umcg_hello>()];
    let words = [hello.magic, hello.abi_version, hello.max_tasks, hello.reserved];
    for (bytes, word) in bytes.chunks_exact_mut(4).zip(words) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    retry(|| {
        sendmsg::<()>(connection.as_raw_fd(), &[IoSlice::new(&bytes)], &[], MsgFlags::MSG_NOSIGNAL, None)
    })?;
    Ok(())
}

fn receive_welcome(connection: &OwnedFd) -> Result<(umcg_welcome, Vec<OwnedFd>), Errno> {
    let mut bytes = [0; size_of::<umcg_welcome>()];
    let mut control = cmsg_space!([RawFd; 2]);
    let mut iov = [IoSliceMut::new(&mut bytes)];
    let (len, fds) = loop {
        match recvmsg::<()>(connection.as_raw_fd(), &mut iov, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)
        {
            Err(nix::errno::Errno::EINTR) => {}
            // It went away between our connecting and its answer.
            Err(nix::errno::Errno::ECONNRESET) => return Err(Errno::ECONNREFUSED),
            Err(errno) => return Err(errno.into()),
            Ok(message) => {
                let fds = message.cmsgs()?.flat_map(owned_fds).collect::<Vec<_>>();
                break (message.bytes, fds);
            }
        }
    };
    match len {
        0 => Err(Errno::ECONNREFUSED),
        len if len == bytes.len() => Ok((parse_welcome(&bytes), fds)),
        _ => Err(Errno::EPROTO),
    }
}

fn owned_fds(message: ControlMessageOwned) -> Vec<OwnedFd> {
    let ControlMessageOwned::ScmRights(fds) = message else {
        return Vec::new();
    };
    fds.into_iter()
        // SAFETY: the kernel has just made these descriptors for us, and each appears once.
        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
        .collect()
}

fn parse_welcome(bytes: &[u8; size_of::<umcg_welcome>()]) -> umcg_welcome {
    let word = |at: usize| {
        let mut word = [0; 4];
        word.copy_from_slice(&bytes[at..at + 4]);
        u32::from_ne_bytes(word)
    };
    let mut nonce = [0; 8];
    nonce.copy_from_slice(&bytes[16..24]);
    umcg_welcome {
        error: word(0) as i32,
        abi_version: word(4),
        domain: word(8),
        nr_slots: word(12),
        nonce: u64::from_ne_bytes(nonce),
    }
}

/// A handler of the program's must not make it fail.
fn retry<T>(mut call: impl FnMut() -> nix::Result<T>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(nix::errno::Errno::EINTR) => {}
            // The loader closed the connection already.
            Err(nix::errno::Errno::EPIPE) => return Err(Errno::ECONNREFUSED),
            result => return Ok(result?),
        }
    }
}

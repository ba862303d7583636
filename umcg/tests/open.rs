// SPDX-License-Identifier: MIT OR Apache-2.0
//! What `umcg_open` makes of a loader's answer, or of none; the loader is the test's own.

mod common;

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;

use common::alone;
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, Shutdown, SockFlag, SockType, UnixAddr, accept, bind, listen, recv,
    send, shutdown, socket,
};
use umcg::raw;

/// `struct umcg_welcome`: error, version, domain, number of slots, nonce.
type Welcome = [i32; 6];

const VERSION: i32 = raw::UMCG_ABI_VERSION as i32;

/// A socket that is bound; nobody listens yet.
struct Socket {
    fd: OwnedFd,
    path: PathBuf,
}

impl Socket {
    fn bind() -> Self {
        let path = std::env::temp_dir().join(format!("umcg-test-{}.sock", std::process::id()));
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(fd.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        Self { fd, path }
    }

    /// Takes one hello, if one comes, and says `welcome`, or nothing.
    fn serve(&self, welcome: Option<Welcome>) {
        let Ok(client) = accept(self.fd.as_raw_fd()) else { return };
        // SAFETY: the kernel has just made the descriptor for us.
        let client = unsafe { OwnedFd::from_raw_fd(client) };
        assert_eq!(recv(client.as_raw_fd(), &mut [0; 64], MsgFlags::empty()), Ok(16));
        if let Some(words) = welcome {
            let bytes: Vec<u8> = words.into_iter().flat_map(i32::to_ne_bytes).collect();
            send(client.as_raw_fd(), &bytes, MsgFlags::empty()).unwrap();
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn open(path: &Path, flags: u32) -> i32 {
    raw::open(Some(path), 1, flags).err().map_or(0, raw::Errno::raw)
}

/// Opens at a loader that says `welcome`, or closes the connection.
fn open_at(welcome: Option<Welcome>, flags: u32) -> i32 {
    let socket = Socket::bind();
    listen(&socket.fd, Backlog::new(1).unwrap()).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| socket.serve(welcome));
        let errno = open(&socket.path, flags);
        // A client that never came is waited for no more.
        shutdown(socket.fd.as_raw_fd(), Shutdown::Both).unwrap();
        errno
    })
}

#[test]
fn what_the_loader_answers_is_the_result_with_the_fallback_and_without() {
    let _alone = alone();
    for flags in [0, raw::UMCG_OPEN_FALLBACK] {
        for errno in [libc::EACCES, libc::ENOSPC, libc::EPROTO, libc::EINVAL, libc::EMFILE] {
            assert_eq!(open_at(Some([-errno, VERSION, 0, 0, 0, 0]), flags), errno);
            assert_eq!(raw::backend(), c"none");
        }
    }
}

#[test]
fn a_loader_of_another_version_is_refused() {
    let _alone = alone();
    for flags in [0, raw::UMCG_OPEN_FALLBACK] {
        for version in [0, VERSION + 1, -1] {
            // Of what it says, only the version means the same to both.
            assert_eq!(open_at(Some([-libc::EACCES, version, 0, 0, 0, 0]), flags), libc::EPROTO, "{version}");
        }
    }
}

fn assert_falls_back(open: impl Fn(u32) -> i32) {
    assert_eq!(open(0), libc::ECONNREFUSED);
    assert_eq!(raw::backend(), c"none");
    assert_eq!(open(raw::UMCG_OPEN_FALLBACK), 0);
    assert_eq!(raw::backend(), c"futex");
    raw::close().unwrap();
}

#[test]
fn the_fallback_goes_on_where_nobody_listens_or_answers() {
    let _alone = alone();
    let stale = Socket::bind();
    assert_falls_back(|flags| open(&stale.path, flags));
    drop(stale);
    assert_falls_back(|flags| open_at(None, flags));
}

// SPDX-License-Identifier: GPL-2.0-only
//! The loader's Unix sockets: bound with their final mode and group, and what is said over them.

use std::fs::{self, DirBuilder, Permissions};
use std::io::IoSlice;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt, lchown};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, bind, connect, listen,
    recv, sendmsg, socket,
};
use nix::unistd::{Gid, Group};

use crate::bytes::Bytes;
use crate::shared_abi::{umcg_hello, umcg_welcome};

/// A listening socket. Dropping it removes it from the file system, unless somebody else has replaced it.
#[derive(Debug)]
pub(crate) struct Socket {
    /// Of any type: std's listener and stream do not care, and `accept` gives descriptors that close on exec.
    pub(crate) listener: UnixListener,
    path: PathBuf,
    /// Device and inode of what we bound.
    identity: (u64, u64),
}

impl Socket {
    /// Binds `path`, for root and the members of `group` only, and listens, without blocking.
    pub(crate) fn bind(path: &Path, socket_type: SockType, group: Gid) -> Result<Self> {
        let failed = || format!("cannot listen on {}; choose another place with --socket", path.display());
        let fd = new_socket(socket_type)?;
        let address = address(path)?;
        if check_free(path, socket_type)? {
            fs::remove_file(path).with_context(failed)?;
        }

        // Nobody can connect before listen(), and then mode and group are right. No umask: that is the whole process's.
        bind(fd.as_raw_fd(), &address).with_context(failed)?;
        let metadata = fs::symlink_metadata(path).with_context(failed)?;
        let listener = UnixListener::from(fd);
        let socket = Self { listener, path: path.to_owned(), identity: identity(&metadata) };
        fs::set_permissions(path, Permissions::from_mode(0o660)).with_context(failed)?;
        if metadata.gid() != group.as_raw() {
            lchown(path, None, Some(group.as_raw())).with_context(failed)?;
        }
        listen(&socket.listener, Backlog::MAXCONN).with_context(failed)?;
        Ok(socket)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|metadata| identity(&metadata) == self.identity) {
            // Nothing to be done about a failure: a stale socket is replaced by the next loader.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(metadata: &fs::Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

fn new_socket(socket_type: SockType) -> Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket(AddressFamily::Unix, socket_type, flags, None)
        .context("cannot create a socket; raise the limit of open files")
}

fn address(path: &Path) -> Result<UnixAddr> {
    UnixAddr::new(path).with_context(|| {
        format!("cannot use {} as a socket; choose a shorter path with --socket", path.display())
    })
}

/// Fails if `path` is taken, or cannot be a socket's; whether a stale socket, which nobody listens on, is there.
pub(crate) fn check_free(path: &Path, socket_type: SockType) -> Result<bool> {
    const ADVICE: &str = "choose another place with --socket";
    match connect(new_socket(socket_type)?.as_raw_fd(), &address(path)?) {
        Err(Errno::ENOENT) => Ok(false),
        // Also the answer of anything that is no socket.
        Err(Errno::ECONNREFUSED) => {
            let stale = fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
            ensure!(stale, "{} is not a socket; {ADVICE}", path.display());
            Ok(true)
        }
        // EPROTOTYPE: a listener of another type. EAGAIN: its backlog is full.
        Ok(()) | Err(Errno::EPROTOTYPE | Errno::EAGAIN) => {
            bail!("socket {} is taken; stop who listens there, or {ADVICE}", path.display())
        }
        Err(error) => bail!("cannot use {}: {error}; {ADVICE}", path.display()),
    }
}

/// Creates the directory of a socket, open to everybody: the socket itself says who may.
pub(crate) fn create_parent(path: &Path) -> Result<()> {
    let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty() && !dir.exists()) else {
        return Ok(());
    };
    let mode = 0o755;
    DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(dir)
        .and_then(|()| fs::set_permissions(dir, Permissions::from_mode(mode))) // whatever the umask
        .with_context(|| format!("cannot create {}; choose another place with --socket", dir.display()))
}

/// The group called `name`, or with that number; root's by default.
pub(crate) fn find_group(name: Option<&str>) -> Result<Gid> {
    let Some(name) = name else {
        return Ok(Gid::from_raw(0));
    };
    if let Ok(number) = name.parse() {
        return Ok(Gid::from_raw(number));
    }
    match Group::from_name(name).with_context(|| format!("cannot look up group {name}; name it by number"))? {
        Some(group) => Ok(group.gid),
        None => {
            bail!("there is no group {name}; create it with `groupadd {name}`, or name another with --group")
        }
    }
}

/// What has come over a connection that has not said hello.
pub(crate) enum Greeting {
    /// Nothing yet.
    Silence,
    /// A message of the right length.
    Hello(umcg_hello),
    /// A message of another length.
    Garbage,
    /// The end of the connection.
    End,
}

/// Reads a client's first message, without blocking. Descriptors that came with it are dropped by the kernel.
pub(crate) fn receive_hello(connection: BorrowedFd) -> Greeting {
    let mut buffer = [0; size_of::<umcg_hello>() + 1]; // one more tells too long a message
    match recv(connection.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
        Ok(0) => Greeting::End,
        Ok(n) => umcg_hello::from_bytes(&buffer[..n]).map_or(Greeting::Garbage, Greeting::Hello),
        Err(Errno::EAGAIN | Errno::EINTR) => Greeting::Silence,
        Err(_) => Greeting::End,
    }
}

/// Answers a hello, without blocking: this is the first message on the connection, so there is room.
pub(crate) fn send_welcome(
    connection: BorrowedFd,
    welcome: &umcg_welcome,
    fds: &[BorrowedFd],
) -> nix::Result<()> {
    let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[] } else { &rights[..] };
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    sendmsg::<UnixAddr>(connection.as_raw_fd(), &[IoSlice::new(welcome.as_bytes())], control, flags, None)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{send, socketpair};
    use nix::unistd::getgid;
    use std::os::fd::AsFd;

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("scx_umcg-{}-{name}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    fn bind_packet(path: &Path) -> Result<Socket> {
        Socket::bind(path, SockType::SeqPacket, getgid())
    }

    #[test]
    fn a_live_socket_is_taken_and_a_stale_one_is_replaced() {
        let dir = scratch("taken");
        let path = dir.join("s");
        let live = bind_packet(&path).unwrap();
        let message = format!("{:#}", bind_packet(&path).unwrap_err());
        assert!(message.contains("is taken; "), "{message}");
        let message = format!("{:#}", Socket::bind(&path, SockType::Stream, getgid()).unwrap_err());
        assert!(message.contains("is taken; "), "{message}");

        drop(live);
        assert!(!path.exists(), "an orderly exit removes it");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "a killed loader leaves it");
        let socket = bind_packet(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().mode();
        assert_eq!(mode & 0o777, 0o660);
        drop(socket);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_file_in_the_way_is_not_removed() {
        let dir = scratch("file");
        let path = dir.join("s");
        fs::write(&path, "precious").unwrap();
        assert!(bind_packet(&path).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_socket_that_somebody_replaced_is_left_alone() {
        let dir = scratch("replaced");
        let path = dir.join("s");
        let old = bind_packet(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let new = bind_packet(&path).unwrap();
        drop(old);
        assert!(path.exists());
        drop(new);
        assert!(!path.exists());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn groups_are_found_by_name_and_number() {
        assert_eq!(find_group(None).unwrap(), Gid::from_raw(0));
        assert_eq!(find_group(Some("root")).unwrap(), Gid::from_raw(0));
        assert_eq!(find_group(Some("4711")).unwrap(), Gid::from_raw(4711));
        let message = find_group(Some("no-such-group")).unwrap_err().to_string();
        assert!(message.starts_with("there is no group no-such-group; "), "{message}");
    }

    #[test]
    fn only_a_message_of_the_right_length_is_a_hello() {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (client, server) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        assert!(matches!(receive_hello(server.as_fd()), Greeting::Silence));
        for length in [1, 15, 17, 4000] {
            send(client.as_raw_fd(), &vec![1; length], MsgFlags::empty()).unwrap();
            assert!(matches!(receive_hello(server.as_fd()), Greeting::Garbage), "{length}");
        }
        send(client.as_raw_fd(), &[1; 16], MsgFlags::empty()).unwrap();
        assert!(
            matches!(receive_hello(server.as_fd()), Greeting::Hello(hello) if hello.max_tasks == 0x0101_0101)
        );
        drop(client);
        assert!(matches!(receive_hello(server.as_fd()), Greeting::End));
    }
}

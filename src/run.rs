// SPDX-License-Identifier: GPL-2.0-only
//! `scx_umcg run`: a loader for the life of one command.

use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigHandler, Signal, kill, signal};
use nix::sys::signalfd::{SignalFd, siginfo};
use nix::unistd::{Pid, mkdtemp};

use crate::args::{DEFAULT_SOCKET, RunArgs, SOCKET_ENV};
use crate::process::{self, Inherited};
use crate::serve::{Service, Stop, open_files};
use crate::socket;

/// What is passed on to the command, and what tells its end.
const SIGNALS: [Signal; 5] =
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGCHLD];

// As a shell does.
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;

/// Loads, runs the command, unloads; the exit status of the command.
pub(crate) fn run(args: &RunArgs) -> Result<u8> {
    // A parent that ignores SIGCHLD hands that down, and the command's status would be lost.
    // SAFETY: sets no handler of ours.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigDfl) }.context("cannot wait for a command")?;
    let (inherited, signals) = process::prepare(open_files(&args.load), &SIGNALS)?;

    // Declared before the service, whose socket must be gone when the directory goes.
    let private;
    let path = match &args.load.socket {
        Some(path) => std::path::absolute(path)
            .context("cannot tell the current directory; name it in full with --socket")?,
        None => {
            private = PrivateDir::create()?;
            private.0.join("umcg.sock")
        }
    };
    let mut object = MaybeUninit::uninit();
    let mut service = Service::start(&args.load, &path, &mut object)?;

    let mut child = match spawn(&args.command, &path, inherited) {
        Ok(child) => child,
        Err(error) => return not_run(&args.command, error),
    };
    let status = match service.serve_until(&signals, |signal| attend(&mut child, signal))? {
        Stop::Signal(status) => status,
        Stop::Ejected => {
            // The command goes on with the futex back end; its status is still ours.
            crate::complain(&service.ejection());
            wait(&mut child, &signals)?
        }
    };
    Ok(exit_status(status))
}

fn spawn(command: &[OsString], socket: &Path, inherited: Inherited) -> io::Result<Child> {
    let (program, arguments) = command.split_first().ok_or(io::ErrorKind::NotFound)?;
    let mut command = Command::new(program);
    command.args(arguments).env(SOCKET_ENV, socket);
    // SAFETY: between fork and exec, restore() makes two system calls; it neither allocates nor locks.
    unsafe { command.pre_exec(move || inherited.restore()) };
    command.spawn()
}

/// Says why the command cannot be run; a shell's exit status for that.
fn not_run(command: &[OsString], error: io::Error) -> Result<u8> {
    let status = match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT) | None => NOT_FOUND,
        Some(Errno::EAGAIN | Errno::ENOMEM) => {
            return Err(error).context("cannot start a process; try again");
        }
        Some(_) => NOT_EXECUTABLE,
    };
    let name = command.first().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    crate::complain(
        &anyhow::Error::new(error).context(format!("cannot run {name}; check its name and PATH")),
    );
    Ok(status)
}

/// Passes a signal on to the command, or tells how the command has ended.
fn attend(child: &mut Child, signal: &siginfo) -> Result<Option<ExitStatus>> {
    if signal.ssi_signo == Signal::SIGCHLD as u32 {
        return child.try_wait().context("cannot wait for the command");
    }
    // What the kernel sends comes from the terminal, and reaches the command's process group anyway.
    if signal.ssi_code != libc::SI_KERNEL
        && let Ok(signal) = Signal::try_from(signal.ssi_signo as i32)
    {
        // A failure means that the command has ended, and SIGCHLD is on its way.
        let _ = kill(Pid::from_raw(child.id() as i32), signal);
    }
    Ok(None)
}

/// Waits for the command without serving it.
fn wait(child: &mut Child, signals: &SignalFd) -> Result<ExitStatus> {
    loop {
        if let Some(signal) = signals.read_signal().context("cannot read signals")?
            && let Some(status) = attend(child, &signal)?
        {
            return Ok(status);
        }
        let mut fds = [PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("cannot wait for the command"),
        }
    }
}

/// A shell's `$?`.
fn exit_status(status: ExitStatus) -> u8 {
    let number = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    number as u8 // wait(2) gives 8 bits of status, or a signal below 65
}

/// A directory of our own for the socket.
struct PrivateDir(PathBuf);

impl PrivateDir {
    fn create() -> Result<Self> {
        let socket = Path::new(DEFAULT_SOCKET);
        let usual = socket::create_parent(socket).ok().and(socket.parent());
        let made = usual
            .and_then(|dir| mkdtemp(&dir.join("run.XXXXXX")).ok())
            .map_or_else(|| mkdtemp(&std::env::temp_dir().join("scx_umcg.XXXXXX")), Ok)
            .context("cannot create a directory for the socket; name one with --socket")?;
        let dir = Self(made);
        // The command may change its user; who may connect is the socket's affair.
        fs::set_permissions(&dir.0, Permissions::from_mode(0o755)).with_context(|| {
            format!("cannot open {} to others; name a place with --socket", dir.0.display())
        })?;
        Ok(dir)
    }
}

impl Drop for PrivateDir {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.0) {
            log::warn!("cannot remove {}: {error}", self.0.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_status_is_a_shells() {
        let status = |raw| exit_status(ExitStatus::from_raw(raw));
        assert_eq!(status(0), 0);
        assert_eq!(status(3 << 8), 3);
        assert_eq!(status(255 << 8), 255);
        assert_eq!(status(Signal::SIGTERM as i32), 143);
        assert_eq!(status(Signal::SIGSEGV as i32 | 0x80), 139, "with a core dump");
    }

    #[test]
    fn a_command_that_cannot_be_run_has_a_shells_exit_status() {
        let command = [OsString::from("x")];
        let status = |errno: Errno| not_run(&command, io::Error::from_raw_os_error(errno as i32));
        assert_eq!(status(Errno::ENOENT).unwrap(), NOT_FOUND);
        assert_eq!(status(Errno::EACCES).unwrap(), NOT_EXECUTABLE);
        assert_eq!(status(Errno::ENOEXEC).unwrap(), NOT_EXECUTABLE);
        assert!(status(Errno::EAGAIN).is_err());
    }
}

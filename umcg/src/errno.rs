// SPDX-License-Identifier: MIT OR Apache-2.0
//! What goes wrong: the errno of a call, and the same with the words that the call gives it.

use std::fmt;
use std::io;
use std::num::NonZeroI32;

/// An error number of the kernel's, positive, as in `errno(3)`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(NonZeroI32);

impl Errno {
    pub(crate) const EACCES: Self = Self::known(libc::EACCES);
    pub(crate) const EALREADY: Self = Self::known(libc::EALREADY);
    pub(crate) const EBUSY: Self = Self::known(libc::EBUSY);
    pub(crate) const ECONNREFUSED: Self = Self::known(libc::ECONNREFUSED);
    pub(crate) const EDEADLK: Self = Self::known(libc::EDEADLK);
    pub(crate) const EEXIST: Self = Self::known(libc::EEXIST);
    pub(crate) const EFAULT: Self = Self::known(libc::EFAULT);
    pub(crate) const EINVAL: Self = Self::known(libc::EINVAL);
    pub(crate) const EIO: Self = Self::known(libc::EIO);
    pub(crate) const ENOENT: Self = Self::known(libc::ENOENT);
    pub(crate) const ENOMEM: Self = Self::known(libc::ENOMEM);
    pub(crate) const ENOSPC: Self = Self::known(libc::ENOSPC);
    pub(crate) const EPROTO: Self = Self::known(libc::EPROTO);
    pub(crate) const ERANGE: Self = Self::known(libc::ERANGE);
    pub(crate) const ESRCH: Self = Self::known(libc::ESRCH);
    pub(crate) const ETIMEDOUT: Self = Self::known(libc::ETIMEDOUT);

    const fn known(raw: i32) -> Self {
        match NonZeroI32::new(raw) {
            Some(raw) => Self(raw),
            None => panic!("an errno is not 0"),
        }
    }

    /// The number, as in `<errno.h>`.
    #[must_use]
    pub const fn raw(self) -> i32 {
        self.0.get()
    }

    /// Of the system call that just failed in this thread.
    pub(crate) fn last() -> Self {
        Self::from(nix::errno::Errno::last())
    }

    /// From an answer in the kernel's convention: 0, or an errno with the sign changed. It may come from memory that
    /// the program writes, and callers change the sign again: what can be no errno is EIO.
    #[inline]
    pub(crate) fn check(answer: i32) -> Result<(), Self> {
        const LAST: i32 = -4095;
        match answer {
            0.. => Ok(()),
            LAST..0 => Err(Self::known(-answer)),
            _ => Err(Self::EIO),
        }
    }
}

impl From<nix::errno::Errno> for Errno {
    fn from(errno: nix::errno::Errno) -> Self {
        NonZeroI32::new(errno as i32).map_or(Self::EIO, Self)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        io::Error::from_raw_os_error(self.raw()).fmt(f)
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", nix::errno::Errno::from_raw(self.raw()))
    }
}

/// Which call failed: the same errno means something else in each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Call {
    /// [`Domain::open`](crate::Domain::open)
    Open,
    /// [`Domain::close`](crate::Domain::close)
    Close,
    /// Registration of the calling thread.
    Register,
    /// End of a registration.
    Unregister,
    /// [`wait`](crate::wait) and everything that waits.
    Wait,
    /// [`kick`](crate::kick)
    Kick,
}

/// A call that failed, and why: each call's documentation lists its errnos and what they mean there. Others come from system calls
/// that the call needs, as `ENOMEM` does.
///
/// Its text says what is wrong and what to do about it. It becomes an [`io::Error`] of the errno's kind by `?`.
///
/// ```
/// use umcg::{Call, Domain, OpenOptions};
///
/// let error = Domain::open(&OpenOptions::new(8).socket("/nonexistent")).unwrap_err();
/// assert_eq!((error.call(), error.errno()), (Call::Open, 2)); // ENOENT
/// assert!(error.to_string().starts_with("umcg open: no loader listens at the socket; start scx_umcg"));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Error {
    call: Call,
    errno: Errno,
}

impl Error {
    /// The call that failed.
    #[must_use]
    pub const fn call(&self) -> Call {
        self.call
    }

    /// The errno that it failed with, positive, as in `<errno.h>`.
    #[must_use]
    pub const fn errno(&self) -> i32 {
        self.errno.raw()
    }

    /// What is wrong and what to do, where there is more to say than `strerror(3)` does.
    fn advice(&self) -> Option<&'static str> {
        use Call::{Close, Kick, Open, Register, Unregister, Wait};
        Some(match (self.call, self.errno) {
            (Open, Errno::ENOENT | Errno::ECONNREFUSED) => {
                "no loader listens at the socket; start scx_umcg, set UMCG_SOCKET, or allow the fallback"
            }
            (Open, Errno::EACCES) => "this user may not use the loader; join the group of its socket",
            (Open, Errno::ENOSPC) => {
                "more tasks than the loader has room for; ask for fewer, or raise its limits"
            }
            (Open, Errno::EPROTO) => {
                "the loader speaks another ABI version; install the library and the loader of one release"
            }
            (Open, Errno::EALREADY) => "this process has a domain, or is opening one; share that one",
            (Open, Errno::EINVAL) => "the domain must hold one task at least; ask for more than 0",
            (Close, Errno::EBUSY) => "tasks are registered; unregister them first",
            (Close, Errno::ENOENT) => "no domain is open; nothing to close",
            (Register, Errno::ENOSPC) => {
                "the domain is full; open it with more tasks, or let some unregister"
            }
            (Register, Errno::EEXIST) => "this thread is registered; unregister it first",
            (Register, Errno::ESRCH) => "no server has that tid; register the server first",
            (Register, Errno::EFAULT) => "not a task of the open domain; allocate it there",
            (Unregister, Errno::EBUSY) => {
                "the server serves a worker, or the thread waits; wait until that is over"
            }
            (Unregister, Errno::EINVAL) => "another thread's task; unregister in the thread that registered",
            (Wait, Errno::ESRCH) => "the next task, or the worker's server, is gone; name one that lives",
            (Wait, Errno::EBUSY) => {
                "the next task is not RUNNABLE or serves, or the caller serves another; pick again later"
            }
            (Wait, Errno::EINVAL) => {
                "not registered, not RUNNABLE, or not the caller's worker to start; set its server first"
            }
            (Wait, Errno::ETIMEDOUT) => "nothing happened in time; wait again",
            (Wait, Errno::ERANGE) => "a worker cannot wait with a timeout; leave it to its server",
            (Wait, Errno::EDEADLK) => {
                "a signal handler interrupted a wait of this thread; return from it first"
            }
            (Kick, Errno::ESRCH) => "no task has that tid; it may have exited",
            _ => return None,
        })
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let call = match self.call {
            Call::Open => "open",
            Call::Close => "close",
            Call::Register => "register",
            Call::Unregister => "unregister",
            Call::Wait => "wait",
            Call::Kick => "kick",
        };
        match self.advice() {
            Some(advice) => write!(f, "umcg {call}: {advice} ({:?})", self.errno),
            None => write!(f, "umcg {call}: {}", self.errno),
        }
    }
}

impl std::error::Error for Error {}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        Self::new(Self::from_raw_os_error(error.errno()).kind(), error)
    }
}

/// Gives an errno the call that it came from.
pub(crate) trait During<T> {
    fn during(self, call: Call) -> Result<T, Error>;
}

impl<T> During<T> for Result<T, Errno> {
    #[inline]
    fn during(self, call: Call) -> Result<T, Error> {
        self.map_err(|errno| Error { call, errno })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_answers_become_results() {
        assert_eq!(Errno::check(0), Ok(()));
        assert_eq!(Errno::check(-libc::ESRCH), Err(Errno::ESRCH));
        // Shared memory: the program may have scribbled on it.
        assert_eq!(Errno::check(7), Ok(()));
        assert_eq!(Errno::check(i32::MIN), Err(Errno::EIO));
    }

    #[test]
    fn an_error_says_what_to_do() {
        let error = Err::<(), _>(Errno::ENOENT).during(Call::Open).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("start scx_umcg") && text.contains("ENOENT"), "{text}");
    }
}

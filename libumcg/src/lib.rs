// SPDX-License-Identifier: MIT OR Apache-2.0
//! The C library: `include/umcg.h` on top of the crate `umcg`. Each call returns 0 or a negative errno, and no panic
//! crosses into C.

use std::ffi::{CStr, OsStr, c_char, c_int, c_uint};
use std::os::unix::ffi::OsStrExt;
use std::panic::{UnwindSafe, catch_unwind};
use std::path::Path;
use std::ptr;

#[cfg(test)]
use tests::raw;
#[cfg(not(test))]
use umcg::raw;
use umcg::raw::{Errno, umcg_task};

/// Every call is made in here. A panic is a bug of ours, about which the caller can do nothing: it is told `otherwise`, and
/// standard error has the message of the panic hook, which belongs to the program if the program is Rust. Where this is
/// forgotten, Rust ends the process: `extern "C"` functions do not unwind.
fn guarded<T>(otherwise: T, call: impl FnOnce() -> T + UnwindSafe) -> T {
    catch_unwind(call).unwrap_or(otherwise)
}

/// The answer of a call in the kernel's convention; -EIO, which no call answers otherwise, for a panic.
fn answer(call: impl FnOnce() -> Result<(), Errno> + UnwindSafe) -> c_int {
    guarded(-libc::EIO, || call().map_or_else(|errno| -errno.raw(), |()| 0))
}

/// Opens this process's domain.
///
/// # Safety
///
/// `socket` is null or a string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umcg_open(socket: *const c_char, max_tasks: c_uint, flags: c_uint) -> c_int {
    answer(|| {
        // SAFETY: not null, so the caller's promise is that it is a string, until we return.
        let socket = (!socket.is_null()).then(|| unsafe { CStr::from_ptr(socket) });
        let socket = socket.map(|path| Path::new(OsStr::from_bytes(path.to_bytes())));
        raw::open(socket, max_tasks, flags)
    })
}

/// Closes the domain.
#[unsafe(no_mangle)]
pub extern "C" fn umcg_close() -> c_int {
    answer(raw::close)
}

/// A zeroed struct with status NONE inside the domain; null if it is full, or not open.
#[unsafe(no_mangle)]
pub extern "C" fn umcg_task_alloc() -> *mut umcg_task {
    guarded(ptr::null_mut(), raw::task_alloc)
}

/// Gives back what `umcg_task_alloc` returned.
#[unsafe(no_mangle)]
pub extern "C" fn umcg_task_free(task: *mut umcg_task) {
    guarded((), || raw::task_free(task));
}

/// Registers the calling thread.
#[unsafe(no_mangle)]
pub extern "C" fn umcg_register(task: *mut umcg_task, flags: c_uint) -> c_int {
    answer(|| raw::register(task, flags))
}

/// Ends the calling thread's registration.
#[unsafe(no_mangle)]
pub extern "C" fn umcg_unregister(task: *mut umcg_task) -> c_int {
    answer(|| raw::unregister(task))
}

/// Gives up the CPU until the task is RUNNING.
#[unsafe(no_mangle)]
pub extern "C" fn umcg_wait(timeout_ns: u64, flags: c_uint) -> c_int {
    answer(|| raw::wait(timeout_ns, flags))
}

/// Has a task look around, or leave the CPU.
#[unsafe(no_mangle)]
pub extern "C" fn umcg_kick(tid: libc::pid_t, flags: c_uint) -> c_int {
    answer(|| raw::kick(tid, flags))
}

/// The calling thread's struct, or null.
#[unsafe(no_mangle)]
pub extern "C" fn umcg_self() -> *mut umcg_task {
    guarded(ptr::null_mut(), raw::current)
}

/// "sched_ext", "futex" or "none".
#[unsafe(no_mangle)]
pub extern "C" fn umcg_backend() -> *const c_char {
    guarded(c"none", raw::backend).as_ptr()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In tests the calls stand on this: a library in which everything panics.
    pub(super) mod raw {
        use super::{CStr, Errno, Path, c_int, c_uint, umcg_task};

        pub(crate) fn open(_: Option<&Path>, _: c_uint, _: c_uint) -> Result<(), Errno> {
            panic!("open")
        }

        pub(crate) fn close() -> Result<(), Errno> {
            panic!("close")
        }

        pub(crate) fn task_alloc() -> *mut umcg_task {
            panic!("task_alloc")
        }

        pub(crate) fn task_free(_: *mut umcg_task) {
            panic!("task_free")
        }

        pub(crate) fn register(_: *mut umcg_task, _: c_uint) -> Result<(), Errno> {
            panic!("register")
        }

        pub(crate) fn unregister(_: *mut umcg_task) -> Result<(), Errno> {
            panic!("unregister")
        }

        pub(crate) fn wait(_: u64, _: c_uint) -> Result<(), Errno> {
            panic!("wait")
        }

        pub(crate) fn kick(_: c_int, _: c_uint) -> Result<(), Errno> {
            panic!("kick")
        }

        pub(crate) fn current() -> *mut umcg_task {
            panic!("current")
        }

        pub(crate) fn backend() -> &'static CStr {
            panic!("backend")
        }
    }

    #[test]
    fn a_panic_in_any_call_is_an_answer_to_its_caller() {
        // SAFETY: strings, or null.
        let opens = unsafe { [umcg_open(ptr::null(), 1, 0), umcg_open(c"/".as_ptr(), 1, 0)] };
        assert_eq!(opens, [-libc::EIO; 2]);
        assert_eq!(umcg_close(), -libc::EIO);
        assert!(umcg_task_alloc().is_null());
        umcg_task_free(ptr::null_mut());
        assert_eq!(umcg_register(ptr::null_mut(), 0), -libc::EIO);
        assert_eq!(umcg_unregister(ptr::null_mut()), -libc::EIO);
        assert_eq!(umcg_wait(0, 0), -libc::EIO);
        assert_eq!(umcg_kick(1, 0), -libc::EIO);
        assert!(umcg_self().is_null());
        // SAFETY: a literal.
        assert_eq!(unsafe { CStr::from_ptr(umcg_backend()) }, c"none");
    }
}

// SPDX-License-Identifier: MIT OR Apache-2.0
//! The C library: `include/umcg.h` on top of the crate `umcg`. Each call returns 0 or a negative errno, and no panic
//! crosses into C.

use std::ffi::{CStr, OsStr, c_char, c_int, c_uint};
use std::os::unix::ffi::OsStrExt;
use std::panic::catch_unwind;
use std::path::Path;
use std::ptr;

use umcg::raw::{self, Errno, umcg_task};

/// The answer of a call in the kernel's convention. A panic is a bug of ours; the caller is told -EIO, for there is nothing
/// that it could do about it.
fn answer(call: impl FnOnce() -> Result<(), Errno> + std::panic::UnwindSafe) -> c_int {
    match catch_unwind(call) {
        Ok(Ok(())) => 0,
        Ok(Err(errno)) => -errno.raw(),
        Err(_) => -libc::EIO,
    }
}

/// Opens this process's domain.
///
/// # Safety
///
/// `socket` is null or a string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn umcg_open(socket: *const c_char, max_tasks: c_uint, flags: c_uint) -> c_int {
    // SAFETY: not null, so the caller's promise is that it is a string, until we return.
    let socket = (!socket.is_null()).then(|| unsafe { CStr::from_ptr(socket) });
    let socket = socket.map(|path| Path::new(OsStr::from_bytes(path.to_bytes())));
    answer(|| raw::open(socket, max_tasks, flags))
}

/// Closes the domain.
#[unsafe(no_mangle)]
pub extern "C" fn umcg_close() -> c_int {
    answer(raw::close)
}

/// A zeroed struct with status NONE inside the domain; null if it is full, or not open.
#[unsafe(no_mangle)]
pub extern "C" fn umcg_task_alloc() -> *mut umcg_task {
    catch_unwind(raw::task_alloc).unwrap_or(ptr::null_mut())
}

/// Gives back what `umcg_task_alloc` returned.
#[unsafe(no_mangle)]
pub extern "C" fn umcg_task_free(task: *mut umcg_task) {
    answer(|| {
        raw::task_free(task);
        Ok(())
    });
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
    catch_unwind(raw::current).unwrap_or(ptr::null_mut())
}

/// "sched_ext", "futex" or "none".
#[unsafe(no_mangle)]
pub extern "C" fn umcg_backend() -> *const c_char {
    catch_unwind(raw::backend).unwrap_or(c"none").as_ptr()
}

// SPDX-License-Identifier: MIT OR Apache-2.0
//! The control program: how a thread asks the kernel side for something, with `BPF_PROG_RUN` of the
//! descriptor that the loader gave us. The program runs in the calling thread, which is who it is about.

use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::errno::Errno;
use crate::shared_abi::umcg_ctl_args;

const BPF_PROG_RUN: libc::c_long = 10;

/// `union bpf_attr`, the member `test`, up to the last field that any kernel with sched_ext has. What is
/// named here and stays 0 must be 0 for a program of type SYSCALL.
#[repr(C)]
#[derive(Default)]
struct ProgRunAttr {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    padding: u32,
}

/// Runs the control program and answers what it left in the arguments; its own verdict is the error.
pub(crate) fn run(program: BorrowedFd<'_>, mut args: umcg_ctl_args) -> Result<umcg_ctl_args, Errno> {
    let mut attr = ProgRunAttr {
        prog_fd: program.as_raw_fd() as u32,
        ctx_size_in: size_of::<umcg_ctl_args>() as u32,
        // Exposed: the kernel writes through this integer.
        ctx_in: (&raw mut args).expose_provenance() as u64,
        ..ProgRunAttr::default()
    };
    // SAFETY: `attr` is the union's member for this command, of the size given. The kernel reads and writes
    // back ctx_size_in bytes at ctx_in, which is `args`, live and ours alone for the whole call.
    let ret = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_RUN, &raw mut attr, size_of::<ProgRunAttr>()) };
    if ret < 0 {
        return Err(Errno::last());
    }
    Errno::check(args.result)?;
    Ok(args)
}

// SPDX-License-Identifier: MIT OR Apache-2.0
//! The layout that program, loader and BPF side share, in Rust.
//!
//! The truth is `include/umcg.h` (public) and `src/bpf/intf.h` (below the API), where every field says
//! who writes it. This mirror is one file for the loader and for the client crate, which includes it by
//! path; `tests/layout.rs` compares it with both headers and with the BTF of the compiled BPF object.

use std::mem::{align_of, offset_of, size_of};

/// Version of everything that programs and the kernel side must agree on.
pub const UMCG_ABI_VERSION: u32 = 1;

/// Bits of `umcg_status` that hold the state.
pub const UMCG_STATE_MASK: u32 = 0xff;
/// May run user code.
pub const UMCG_STATE_RUNNING: u32 = 0;
/// Stopped at the boundary to user code, or about to wait.
pub const UMCG_STATE_RUNNABLE: u32 = 1;
/// A worker that sleeps, or finishes, inside the kernel.
pub const UMCG_STATE_BLOCKED: u32 = 2;
/// Not registered.
pub const UMCG_STATE_NONE: u32 = 0xff;
/// Set by the program on a RUNNING worker: preempt it.
pub const UMCG_TF_PREEMPT: u32 = 0x100;
/// The library's own: the thread is inside `umcg_wait`.
pub const UMCG_TF_WAIT: u32 = 0x200;
/// `umcg_open`: without a loader, go on with the futex back end.
pub const UMCG_OPEN_FALLBACK: u32 = 1;
/// `umcg_wait`: a worker is pushed on its server's runnable list as it waits.
pub const UMCG_WAIT_ENQUEUE: u32 = 1;

/// First word of a domain's header and of a client's hello: "UMCG".
pub const UMCG_MAGIC: u32 = 0x4743_4d55;
/// Tasks must be SCHED_EXT to be served: the loader runs in partial mode.
pub const UMCG_DOMAIN_PARTIAL: u32 = 1;

/// In `umcg_call.flags`: the kernel side has not seen this wait yet.
pub const UMCG_CALL_NEW: u32 = 0x8000_0000;
/// In `umcg_call.flags`: the library yields again for a wait that the kernel side has seen.
pub const UMCG_CALL_AGAIN: u32 = 0x4000_0000;

/// Binds a domain to the calling process.
pub const UMCG_CTL_ATTACH: u32 = 1;
/// Registers the calling thread.
pub const UMCG_CTL_REGISTER: u32 = 2;
/// Ends the calling thread's registration.
pub const UMCG_CTL_UNREGISTER: u32 = 3;
/// `umcg_kick`.
pub const UMCG_CTL_KICK: u32 = 4;
/// Reports the calling thread's rseq area.
pub const UMCG_CTL_RSEQ: u32 = 5;

/// `struct umcg_task` of `include/umcg.h`.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)] // the header documents the fields
pub struct umcg_task {
    pub umcg_status: u32,
    pub umcg_server_tid: u32,
    pub umcg_next_tid: u32,
    pub umcg_tid: u32,
    pub umcg_blocked_ptr: u64,
    pub umcg_runnable_ptr: u64,
    pub umcg_blocked_ts: u64,
    pub umcg_runnable_ts: u64,
    pub umcg_user_data: u64,
    pub umcg_reserved: u64,
}

/// `struct umcg_call` of `src/bpf/intf.h`: arguments and result of the wait in progress.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct umcg_call {
    pub timeout_ns: u64,
    pub flags: u32,
    pub result: i32,
    pub reserved: [u64; 6],
}

/// One element of a domain's map.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct umcg_cell {
    pub task: umcg_task,
    pub call: umcg_call,
}

/// Cell 0 of a domain.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct umcg_header {
    pub magic: u32,
    pub abi_version: u32,
    pub nr_slots: u32,
    pub flags: u32,
    pub epoch: u32,
    pub reserved: [u32; 27],
}

/// The client's first and only message to the loader.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct umcg_hello {
    pub magic: u32,
    pub abi_version: u32,
    pub max_tasks: u32,
    pub reserved: u32,
}

/// The loader's answer.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct umcg_welcome {
    pub error: i32,
    pub abi_version: u32,
    pub domain: u32,
    pub nr_slots: u32,
    pub nonce: u64,
}

/// Argument and answer of the control program.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct umcg_ctl_args {
    pub op: u32,
    pub result: i32,
    pub domain: u32,
    pub slot: u32,
    pub tid: u32,
    pub flags: u32,
    pub addr: u64,
    pub nonce: u64,
    pub rseq_len: u32,
    pub rseq_sig: u32,
}

/// Makes a domain ready for `UMCG_CTL_ATTACH`.
pub const UMCG_ADMIN_OPEN: u32 = 1;
/// Frees a domain that has no tasks.
pub const UMCG_ADMIN_CLOSE: u32 = 2;

/// Argument and answer of the loader's program.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct umcg_admin_args {
    pub op: u32,
    pub result: i32,
    pub domain: u32,
    pub first_slot: u32,
    pub nr_slots: u32,
    pub reserved: u32,
    pub nonce: u64,
}

/// Counters since load, one struct per CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct umcg_stats {
    pub registrations: u64,
    pub waits: u64,
    pub switches: u64,
    pub blocks: u64,
    pub captures: u64,
    pub preemptions: u64,
    pub kicks: u64,
    pub blocked_ns: u64,
    pub runnable_ns: u64,
    pub refreshes: u64,
    pub signal_releases: u64,
    pub rescues: u64,
    pub sweeps: u64,
}

const _: () = {
    assert!(size_of::<umcg_task>() == 64 && align_of::<umcg_task>() == 64);
    assert!(offset_of!(umcg_task, umcg_blocked_ptr) == 16);
    assert!(offset_of!(umcg_task, umcg_reserved) == 56);
    assert!(size_of::<umcg_cell>() == 128 && offset_of!(umcg_cell, call) == 64);
    assert!(size_of::<umcg_header>() == size_of::<umcg_cell>());
    assert!(size_of::<umcg_hello>() == 16 && size_of::<umcg_welcome>() == 24);
    assert!(size_of::<umcg_ctl_args>() == 48 && size_of::<umcg_admin_args>() == 32);
    assert!(size_of::<umcg_stats>() == 104);
};

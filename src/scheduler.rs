// SPDX-License-Identifier: GPL-2.0-only
//! The BPF side as the loader sees it: open, load, attach, ask, exit report.

use std::ffi::{OsStr, c_ulong};
use std::mem::{MaybeUninit, offset_of, size_of};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use anyhow::{Context, Result};
use libbpf_rs::skel::{OpenSkel as _, Skel as _};
use libbpf_rs::{
    Link, MapCore, MapFlags, MapHandle, MapType, OpenObject, PrintLevel, ProgramInput, num_possible_cpus,
};
use nix::errno::Errno;
use scx_utils::{compat, scx_ops_attach, scx_ops_load, scx_ops_open, uei_exited, uei_report};

use crate::args::LoadArgs;
use crate::bytes::Bytes;
use crate::shared_abi::{UMCG_ADMIN_CLOSE, UMCG_ADMIN_OPEN, umcg_admin_args, umcg_cell, umcg_stats};
use crate::skeleton::{BpfSkel, BpfSkelBuilder, types};

/// The details are in libbpf's own messages.
const LOAD_FAILED: &str = "cannot load the BPF scheduler; run with -v to see the kernel's reasons";

/// A loaded scheduler. Dropping it detaches it from the kernel.
pub(crate) struct Scheduler<'obj> {
    /// Before `skel`, which it must not outlive.
    ops: Option<Link>,
    /// The programs on tracepoints, while there are domains: until then they have no work, and are not to cost others any.
    tracing: Vec<Link>,
    skel: BpfSkel<'obj>,
}

impl<'obj> Scheduler<'obj> {
    /// Loads the scheduler and makes it the kernel's; `object` only lends the memory.
    pub(crate) fn load(args: &LoadArgs, object: &'obj mut MaybeUninit<OpenObject>) -> Result<Self> {
        libbpf_rs::set_print((args.verbose > 0).then_some((PrintLevel::Debug, log_libbpf)));
        let mut skel = scx_ops_open!(BpfSkelBuilder::default(), object, umcg_ops, None)
            .context("cannot open the BPF scheduler; this kernel may be too old")?;

        let ops = skel.struct_ops.umcg_ops_mut();
        ops.timeout_ms = args.watchdog * 1000;
        ops.exit_dump_len = args.exit_dump_len;
        if args.partial {
            ops.flags |= *compat::SCX_OPS_SWITCH_PARTIAL;
        }

        let rodata = skel.maps.rodata_data.as_mut().context("BPF object has no .rodata; rebuild scx_umcg")?;
        rodata.partial_mode = args.partial;
        rodata.max_domains = args.max_domains;
        rodata.max_slots = args.max_tasks;
        rodata.slice_ns = u64::from(args.slice_us) * 1000;

        skel.maps.domains.set_max_entries(args.max_domains)?;
        skel.maps.domain_states.set_max_entries(args.max_domains)?;
        skel.maps.slots.set_max_entries(args.max_tasks + 1)?; // slot 0 is nobody's
        // A free element may be on the list of a CPU that the kernel has looked at a moment ago.
        let max_elements = args.max_tasks + num_possible_cpus()? as u32;
        skel.maps.tids.set_max_entries(max_elements)?;
        skel.maps.pids.set_max_entries(max_elements)?;
        skel.maps.ready.set_max_entries(args.max_tasks)?;

        for mut program in skel.open_object_mut().progs_mut().filter(|program| is_tracing(program.section()))
        {
            program.set_autoattach(false);
        }

        let mut skel = scx_ops_load!(skel, umcg_ops, uei).context(LOAD_FAILED)?;
        let ops = Some(scx_ops_attach!(skel, umcg_ops).context(LOAD_FAILED)?);
        Ok(Self { ops, tracing: Vec::new(), skel })
    }

    /// Whether the kernel has ejected the scheduler.
    pub(crate) fn ejected(&self) -> bool {
        uei_exited!(&self.skel, uei)
    }

    /// Detaches the scheduler, if the kernel has not; returns once no thread is in its hands any more.
    pub(crate) fn detach(&mut self) {
        self.ops = None;
        self.tracing.clear();
    }

    /// Prints why the scheduler has exited; an error if it was the scheduler's or an operator's doing.
    pub(crate) fn report_exit(&self) -> Result<()> {
        uei_report!(&self.skel, uei).map(|_| ())
    }

    /// From here on tasks may register.
    pub(crate) fn start_tracing(&mut self) -> Result<(), Errno> {
        if self.tracing.is_empty() {
            let programs = self.skel.object_mut().progs_mut().filter(|program| is_tracing(program.section()));
            let links: Result<_, _> = programs.map(|program| program.attach_trace()).collect();
            self.tracing = links.map_err(out_of_room)?;
        }
        Ok(())
    }

    /// No task is registered, and none can be.
    pub(crate) fn stop_tracing(&mut self) {
        self.tracing.clear();
    }

    /// The program that clients run to register.
    pub(crate) fn control_program(&self) -> BorrowedFd<'_> {
        self.skel.progs.umcg_ctl.as_fd()
    }

    /// Makes `map` the memory of domain number `domain`, and the domain ready to be attached to by
    /// whoever knows `nonce`.
    pub(crate) fn open_domain(
        &self,
        domain: u32,
        first_slot: u32,
        nr_slots: u32,
        nonce: u64,
        map: &MapHandle,
    ) -> Result<(), Errno> {
        let fd = map.as_fd().as_raw_fd();
        self.skel
            .maps
            .domains
            .update(&domain.to_ne_bytes(), &fd.to_ne_bytes(), MapFlags::ANY)
            .map_err(out_of_room)?;
        self.admin(umcg_admin_args {
            op: UMCG_ADMIN_OPEN,
            domain,
            first_slot,
            nr_slots,
            nonce,
            ..Default::default()
        })
        .inspect_err(|_| self.forget_map(domain))
    }

    /// Ends domain number `domain`; `EBUSY` while it has tasks, or somebody else its memory.
    pub(crate) fn close_domain(&self, domain: u32) -> Result<(), Errno> {
        self.admin(umcg_admin_args { op: UMCG_ADMIN_CLOSE, domain, ..Default::default() })?;
        self.forget_map(domain);
        Ok(())
    }

    fn forget_map(&self, domain: u32) {
        if let Err(error) = self.skel.maps.domains.delete(&domain.to_ne_bytes()) {
            log::warn!("domain {domain}: its map stays until the number is used again: {error}");
        }
    }

    fn admin(&self, mut args: umcg_admin_args) -> Result<(), Errno> {
        // The kernel copies the arguments back to where they came from; it refuses an output context.
        let input = ProgramInput { context_in: Some(args.as_bytes_mut()), ..Default::default() };
        self.skel.progs.umcg_admin.test_run(input).map_err(out_of_room)?;
        match args.result {
            0 => Ok(()),
            error => Err(Errno::from_raw(-error)),
        }
    }

    /// The counters, summed over all CPUs: the first member of each CPU's `struct umcg_cpu_ctx`.
    pub(crate) fn counters(&self) -> Result<umcg_stats> {
        let per_cpu = self
            .skel
            .maps
            .cpu_ctxs
            .lookup_percpu(&0u32.to_ne_bytes(), MapFlags::ANY)?
            .context("the BPF side has no counters; rebuild scx_umcg")?;
        let first = |cpu_ctx: &Vec<u8>| umcg_stats::from_bytes(cpu_ctx.get(..size_of::<umcg_stats>())?);
        Ok(per_cpu.iter().filter_map(first).fold(umcg_stats::default(), add))
    }

    /// How many tasks are registered in domain number `domain`.
    pub(crate) fn nr_tasks(&self, domain: u32) -> Result<u32> {
        const AT: usize = offset_of!(types::umcg_domain, nr_tasks);
        let state = self.skel.maps.domain_states.lookup(&domain.to_ne_bytes(), MapFlags::ANY)?;
        let field = state.as_deref().and_then(|bytes| bytes[AT..].first_chunk());
        Ok(u32::from_ne_bytes(*field.context("the BPF side does not know that domain; rebuild scx_umcg")?))
    }
}

fn is_tracing(section: &OsStr) -> bool {
    section.as_encoded_bytes().starts_with(b"tp_btf/")
}

/// A new map for the cells of a domain: one for the header and `nr_slots` for tasks.
pub(crate) fn create_domain_map(nr_slots: u32) -> Result<MapHandle, Errno> {
    let options = libbpf_rs::libbpf_sys::bpf_map_create_opts {
        sz: size_of::<libbpf_rs::libbpf_sys::bpf_map_create_opts>() as c_ulong,
        map_flags: libbpf_rs::libbpf_sys::BPF_F_MMAPABLE | libbpf_rs::libbpf_sys::BPF_F_INNER_MAP,
        ..Default::default()
    };
    MapHandle::create(
        MapType::Array,
        Some("umcg_domain"),
        size_of::<u32>() as u32,
        size_of::<umcg_cell>() as u32,
        nr_slots + 1,
        &options,
    )
    .map_err(out_of_room)
}

/// libbpf's own messages. Its warnings are ours to turn into errors, if they matter.
fn log_libbpf(level: PrintLevel, message: String) {
    let level = match level {
        PrintLevel::Debug => log::Level::Debug,
        PrintLevel::Info | PrintLevel::Warn => log::Level::Info,
    };
    log::log!(level, "{}", message.trim_end());
}

/// What a client hears of a failure of bpf(2): the loader could not make room. The log says more.
fn out_of_room(error: libbpf_rs::Error) -> Errno {
    log::warn!("cannot set up a domain: {error:#}");
    Errno::ENOMEM
}

fn add(a: umcg_stats, b: umcg_stats) -> umcg_stats {
    umcg_stats {
        registrations: a.registrations + b.registrations,
        waits: a.waits + b.waits,
        switches: a.switches + b.switches,
        blocks: a.blocks + b.blocks,
        captures: a.captures + b.captures,
        preemptions: a.preemptions + b.preemptions,
        kicks: a.kicks + b.kicks,
        blocked_ns: a.blocked_ns + b.blocked_ns,
        runnable_ns: a.runnable_ns + b.runnable_ns,
        refreshes: a.refreshes + b.refreshes,
        signal_releases: a.signal_releases + b.signal_releases,
        rescues: a.rescues + b.rescues,
        sweeps: a.sweeps + b.sweeps,
    }
}

// SPDX-License-Identifier: GPL-2.0-only
//! Who schedules while something is measured: one of the peers, or our own loader.

use std::collections::BTreeMap;
use std::fs;
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use libbpf_rs::skel::OpenSkel;
use libbpf_rs::{Link, OpenObject, ProgramInput};
use scx_utils::{compat, scx_ops_attach, scx_ops_load, scx_ops_open};

use crate::skeleton::{BpfSkel, BpfSkelBuilder};

/// Why this machine cannot run any of them.
pub(crate) fn check_kernel() -> Result<()> {
    ensure!(
        Path::new("/sys/kernel/sched_ext").exists(),
        "this kernel has no sched_ext (CONFIG_SCHED_CLASS_EXT=y, Linux 6.12 or later); run scripts/bench without --native"
    );
    Ok(())
}

/// How much of the machine a scheduler gets.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Only threads that ask for SCHED_EXT.
    Partial,
    /// All normal threads.
    Full,
}

/// A scheduler of bpf/peers.bpf.c. Dropping it detaches it.
pub(crate) struct Peer<'obj> {
    /// Before `skel`, which it must not outlive.
    _ops: Link,
    skel: BpfSkel<'obj>,
}

/// Loads one of the peers, and nothing of the others.
macro_rules! load {
    ($object:expr, $ops:ident, $ops_mut:ident, $mode:expr) => {{
        let mut skel = scx_ops_open!(BpfSkelBuilder::default(), $object, $ops, None)?;
        if $mode == Mode::Partial {
            skel.struct_ops.$ops_mut().flags |= *compat::SCX_OPS_SWITCH_PARTIAL;
        }
        for mut map in skel.open_object_mut().maps_mut() {
            let name = map.name().to_string_lossy().into_owned();
            if name.ends_with("_ops") && name != stringify!($ops) {
                map.set_autocreate(false)?;
            }
        }
        let mut skel = scx_ops_load!(skel, $ops, uei)?;
        let ops = scx_ops_attach!(skel, $ops)?;
        Ok(Peer { _ops: ops, skel })
    }};
}

impl<'obj> Peer<'obj> {
    pub(crate) fn floor(object: &'obj mut MaybeUninit<OpenObject>) -> Result<Floor<'obj>> {
        let peer: Result<Self> = load!(object, floor_ops, floor_ops_mut, Mode::Partial);
        Ok(Floor(peer.context("the floor")?))
    }

    pub(crate) fn empty(object: &'obj mut MaybeUninit<OpenObject>, mode: Mode) -> Result<Self> {
        load!(object, empty_ops, empty_ops_mut, mode)
    }

    pub(crate) fn simple(object: &'obj mut MaybeUninit<OpenObject>) -> Result<Self> {
        load!(object, simple_ops, simple_ops_mut, Mode::Full)
    }
}

/// The floor, and how its two tasks come and go.
pub(crate) struct Floor<'obj>(Peer<'obj>);

impl Floor<'_> {
    /// Makes the calling thread one of the two.
    pub(crate) fn join(&self, index: u32) -> Result<()> {
        // SAFETY: a valid policy and a parameter that lives as long as the call.
        let set = unsafe { libc::sched_setscheduler(0, SCHED_EXT, &libc::sched_param { sched_priority: 0 }) };
        ensure!(set == 0, "cannot become SCHED_EXT: {}", std::io::Error::last_os_error());
        let mut index = index.to_ne_bytes();
        let input = ProgramInput { context_in: Some(&mut index), ..ProgramInput::default() };
        let output = self.0.skel.progs.floor_join.test_run(input)?;
        ensure!(output.return_value == 0, "the floor refuses: {}", output.return_value.cast_signed());
        Ok(())
    }

    /// From now on the two alternate.
    pub(crate) fn begin(&self) {
        self.set_mode(1);
    }

    /// By the one that runs: hands over for the last time, and both are like all others.
    pub(crate) fn end(&self) {
        self.set_mode(2);
        std::thread::yield_now();
    }

    fn set_mode(&self, mode: u32) {
        let bss = self.0.skel.maps.bss_data.as_deref().expect("it has variables");
        // SAFETY: a word of a mapping that the kernel reads, and that lives as long as `self`; only atomics write it.
        unsafe { AtomicU32::from_ptr((&raw const bss.floor_mode).cast_mut()) }.store(mode, SeqCst);
    }
}

const SCHED_EXT: i32 = 7;

/// Our own loader. Dropping it stops it.
pub(crate) struct Loader {
    child: Child,
    pub(crate) socket: PathBuf,
}

impl Loader {
    /// Starts `program`, and waits until it serves.
    pub(crate) fn start(program: &Path, mode: Mode, max_tasks: u32, max_domains: u32) -> Result<Self> {
        let socket = PathBuf::from(format!("/run/umcg-bench-{}.sock", std::process::id()));
        let mut command = Command::new(program);
        command.arg("--socket").arg(&socket);
        command.arg(format!("--max-tasks={max_tasks}")).arg(format!("--max-domains={max_domains}"));
        if mode == Mode::Partial {
            command.arg("--partial");
        }
        let child = command.stdin(Stdio::null()).spawn();
        let child = child.with_context(|| format!("cannot start {}", program.display()))?;
        let mut loader = Self { child, socket };
        while !loader.serves(program) {
            if let Some(status) = loader.child.try_wait()? {
                bail!("{} ended before it served: {status}", program.display());
            }
            sleep(Duration::from_millis(50));
        }
        Ok(loader)
    }

    fn serves(&self, program: &Path) -> bool {
        let mut status = Command::new(program);
        status.arg("status").arg("--socket").arg(&self.socket);
        status.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
    }

    /// Bytes that its maps hold locked.
    pub(crate) fn map_bytes(&self) -> Result<u64> {
        let maps = self.descriptors()?.into_iter().filter(|info| field(info, "map_type").is_some());
        Ok(maps.filter_map(|info| field(&info, "memlock")).sum())
    }

    /// By id of each BPF program: how often it ran since `kernel.bpf_stats_enabled` was set, and ns in all.
    pub(crate) fn program_runs(&self) -> Result<BTreeMap<u64, (u64, u64)>> {
        let programs = self.descriptors()?;
        Ok(programs
            .iter()
            .filter_map(|info| {
                Some((field(info, "prog_id")?, (field(info, "run_cnt")?, field(info, "run_time_ns")?)))
            })
            .collect())
    }

    /// What the kernel says of its open files.
    fn descriptors(&self) -> Result<Vec<String>> {
        let entries = fs::read_dir(format!("/proc/{}/fdinfo", self.child.id()))?;
        Ok(entries.flatten().filter_map(|entry| fs::read_to_string(entry.path()).ok()).collect())
    }
}

/// The name of a BPF program.
pub(crate) fn program_name(id: u64) -> String {
    let program = u32::try_from(id)
        .ok()
        .and_then(|id| libbpf_rs::query::ProgInfoIter::default().find(|info| info.id == id));
    program.map_or_else(|| id.to_string(), |info| info.name.to_string_lossy().into_owned())
}

/// A number of a file whose lines are "name: number".
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')?.trim().parse().ok())
}

impl Drop for Loader {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.child.wait();
    }
}

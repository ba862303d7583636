// SPDX-License-Identifier: GPL-2.0-only
//! Which figures there are, and how each is taken.

use std::collections::BTreeMap;
use std::fs;
use std::mem::MaybeUninit;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use umcg::Domain;

use crate::clock::Samples;
use crate::crowd::Crowd;
use crate::peers::Gate;
use crate::schedulers::{Loader, Mode, Peer, check_kernel, program_name};
use crate::{bystanders, ours, peers};

#[derive(Args)]
pub(crate) struct Options {
    /// Where to write the figures
    #[arg(long, value_name = "FILE")]
    out: PathBuf,

    /// The loader to measure
    #[arg(long, value_name = "FILE")]
    loader: PathBuf,

    /// The clock counts instructions
    #[arg(long)]
    counted: bool,

    /// Times that each operation is done
    #[arg(long, value_name = "N", default_value_t = 2000)]
    rounds: u32,

    /// Also beside so many registered tasks that do nothing
    #[arg(long, value_name = "N", value_delimiter = ',')]
    tasks: Vec<u32>,

    /// Only say on standard error what each BPF program takes; the clock must count instructions
    #[arg(long)]
    profile: bool,
}

/// One line of the table; docs/abi.md names the fields.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Figure {
    /// What was done.
    pub(crate) op: String,
    /// Its release.
    pub(crate) kernel: String,
    /// On line.
    pub(crate) cpus: usize,
    /// Registered while it was done.
    pub(crate) tasks: u32,
    /// Of `ours` and of each peer.
    pub(crate) unit: String,
    /// What it took.
    pub(crate) ours: f64,
    /// What the same takes by other means.
    pub(crate) peers: Peers,
}

type Peers = BTreeMap<String, f64>;

type Operation = fn(&Domain, u32) -> Result<()>;

/// Domains that a large crowd is also spread over.
const MANY_DOMAINS: u32 = 100;

/// In a crowd, what is done once a second for each task belongs to the figures, so they take more than a second.
const CROWD_ROUNDS: u32 = 60;

pub(crate) fn run(options: &Options) -> Result<()> {
    check_kernel()?;
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned();
    let cpus = std::thread::available_parallelism()?.get();
    pin()?;
    let mut bench = Bench { options, kernel, cpus, figures: Vec::new() };
    if options.profile {
        return bench.profile();
    }
    bench.all()?;
    fs::write(&options.out, serde_json::to_vec_pretty(&bench.figures)?)
        .with_context(|| format!("cannot write {}", options.out.display()))
}

/// Threads and processes that come later inherit it.
fn pin() -> Result<()> {
    let mut cpu = CpuSet::new();
    cpu.set(0)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &cpu)?)
}

struct Bench<'a> {
    options: &'a Options,
    kernel: String,
    cpus: usize,
    figures: Vec<Figure>,
}

/// What things cost without us.
#[derive(Default)]
struct Known {
    /// There and back, by means.
    pairs: Peers,
    block: Peers,
    wake: Peers,
    wake_futex: Peers,
    /// By who schedules: a bystander's system call, and there and back over two pipes.
    calls: Peers,
    pipes: Peers,
    /// By who schedules: the longest wait but 1% of who sleeps beside threads that compute; and how far from fair that is in percent.
    waits: Peers,
    unfair: Peers,
}

/// What our operations cost between a server and its workers.
struct Switches {
    serve: Samples,
    switch: Samples,
    block: Samples,
    wake: Samples,
    wake_futex: Samples,
}

impl Switches {
    fn measure(domain: &Domain, rounds: u32) -> Result<Self> {
        let serve = ours::serve(domain, rounds)?;
        let switch = ours::switch(domain, rounds)?;
        let ours::Blocking { block, wake } = ours::blocking(domain, rounds, &Gate::pipe()?)?;
        let wake_futex = ours::blocking(domain, rounds, &Gate::futex()?)?.wake;
        Ok(Self { serve, switch, block, wake, wake_futex })
    }
}

impl Bench<'_> {
    fn all(&mut self) -> Result<()> {
        let known = self.without_us()?;
        self.with_us(&known, Mode::Partial)?;
        self.with_us(&known, Mode::Full)?;
        self.memory()?;
        let alone: BTreeMap<_, _> =
            self.figures.iter().map(|figure| (figure.op.clone(), figure.ours)).collect();
        for &tasks in &self.options.tasks {
            self.in_a_crowd(&alone, tasks, 1)?;
            if tasks >= 10 * MANY_DOMAINS {
                self.in_a_crowd(&alone, tasks, MANY_DOMAINS)?;
            }
        }
        Ok(())
    }

    fn without_us(&self) -> Result<Known> {
        let rounds = self.options.rounds;
        let mut known = Known::default();
        self.note(&mut known.pairs, "yield", &peers::yield_pair(rounds)?);
        self.note(&mut known.pairs, "futex", &peers::futex_pair(rounds)?);
        self.note(&mut known.pairs, "eventfd", &peers::eventfd_pair(rounds)?);
        self.note(&mut known.pairs, "pipe", &peers::pipe_pair(rounds)?);
        self.note(&mut known.block, "switch", &peers::block_to_other_thread(rounds)?);
        self.note(&mut known.wake, "wake-up", &peers::wake_up(rounds, Gate::pipe)?);
        self.note(&mut known.wake_futex, "wake-up", &peers::wake_up(rounds, Gate::futex)?);
        self.bystander(&mut known, "none")?;
        self.beside("empty-partial", &mut known, |object| Peer::empty(object, Mode::Partial))?;
        self.beside("empty", &mut known, |object| Peer::empty(object, Mode::Full))?;
        self.beside("simple", &mut known, |object| Peer::simple(object))?;

        let mut object = MaybeUninit::uninit();
        let floor = Peer::floor(&mut object)?;
        // In a thread of its own, for it becomes SCHED_EXT.
        let samples = std::thread::scope(|scope| {
            scope.spawn(|| peers::floor_pair(&floor, rounds)).join().expect("it does not panic")
        })?;
        self.note(&mut known.pairs, "floor", &samples);
        Ok(known)
    }

    /// What a bystander does while that peer schedules.
    fn beside(
        &self,
        name: &str,
        known: &mut Known,
        load: impl for<'o> FnOnce(&'o mut MaybeUninit<libbpf_rs::OpenObject>) -> Result<Peer<'o>>,
    ) -> Result<()> {
        let mut object = MaybeUninit::uninit();
        let _peer = load(&mut object).with_context(|| name.to_owned())?;
        self.bystander(known, name)
    }

    fn bystander(&self, known: &mut Known, name: &str) -> Result<()> {
        self.note(&mut known.calls, name, &peers::system_call(self.options.rounds));
        self.note(&mut known.pipes, name, &peers::batch_pipe_pair(self.options.rounds)?);
        if name == "none" || name == "simple" {
            let (wait, unfair) = self.sharing()?;
            known.waits.insert(name.into(), wait);
            known.unfair.insert(name.into(), unfair);
        }
        Ok(())
    }

    /// The wait below which 99% are of who sleeps beside threads that compute, and how unfair those are to each other.
    fn sharing(&self) -> Result<(f64, f64)> {
        let waits = bystanders::sleeper(self.options.rounds.div_ceil(4));
        eprintln!("waits of a sleeper: 50% {}, 99% {}", waits.percentile(50), waits.percentile(99));
        Ok((waits.percentile(99), (bystanders::unfairness()? * 10.0).round() / 10.0))
    }

    /// Everything, with no more tasks than each operation needs.
    fn with_us(&mut self, known: &Known, mode: Mode) -> Result<()> {
        let rounds = self.options.rounds;
        let loader = Loader::start(&self.options.loader, mode, 16384, 64)?;
        let (suffix, beside): (_, &[_]) = match mode {
            Mode::Partial => ("-partial", &["none", "empty-partial"]),
            Mode::Full => ("", &["none", "empty", "simple"]),
        };
        let only = |all: &Peers| {
            let named = all.iter().filter(|(name, _)| beside.contains(&name.as_str()));
            named.map(|(name, figure)| (name.clone(), *figure)).collect::<Peers>()
        };
        self.add(&format!("bystander-call{suffix}"), 0, &peers::system_call(rounds), only(&known.calls));
        self.add(&format!("bystander-pipe{suffix}"), 0, &peers::batch_pipe_pair(rounds)?, only(&known.pipes));

        let domain = ours::open(&loader.socket, 16)?;
        let switches = Switches::measure(&domain, rounds)?;
        self.add(&format!("serve{suffix}"), 2, &switches.serve, known.pairs.clone());
        self.add(&format!("switch{suffix}"), 3, &switches.switch, known.pairs.clone());
        self.add(&format!("block{suffix}"), 2, &switches.block, known.block.clone());
        self.add(&format!("wake{suffix}"), 2, &switches.wake, known.wake.clone());
        self.add(&format!("wake-futex{suffix}"), 2, &switches.wake_futex, known.wake_futex.clone());
        if mode == Mode::Partial {
            return Ok(()); // the rest does not depend on it
        }
        let (wait, unfair) = self.sharing()?;
        self.push("bystander-wait".into(), 0, wait, known.waits.clone());
        self.set_unit("ns");
        self.push("bystander-unfairness".into(), 0, unfair, known.unfair.clone());
        self.set_unit("percent");
        let (register, unregister) = ours::register(&domain, rounds.div_ceil(10))?;
        self.add("register", 1, &register, Peers::new());
        self.add("unregister", 0, &unregister, Peers::new());
        drop(domain);
        let opening = ours::opening(&loader.socket, rounds.div_ceil(40))?;
        self.add("open", 0, &opening, Peers::new());
        self.set_unit("ns"); // it sleeps: the loader's answer, and RCU on some kernels
        Ok(())
    }

    /// Beside registered tasks that do nothing. `alone` has the figures without them, which become the peers.
    fn in_a_crowd(&mut self, alone: &BTreeMap<String, f64>, tasks: u32, domains: u32) -> Result<()> {
        let loader = Loader::start(&self.options.loader, Mode::Full, tasks + 64, domains + 1)?;
        let mut crowds = Vec::new();
        for _ in 0..domains {
            let mut crowd = Crowd::gather(&loader.socket, tasks / domains)?;
            crowd.register()?;
            crowds.push(crowd);
        }
        let domain = ours::open(&loader.socket, 16)?;
        let switches = Switches::measure(&domain, self.options.rounds * CROWD_ROUNDS)?;
        for (op, samples) in [
            ("serve", switches.serve),
            ("switch", switches.switch),
            ("block", switches.block),
            ("wake", switches.wake),
            ("wake-futex", switches.wake_futex),
        ] {
            let spread = if domains > 1 { format!("-{domains}-domains") } else { String::new() };
            let peers = alone.get(op).map(|&figure| ("alone".to_owned(), figure)).into_iter().collect();
            let ours = if self.options.counted { samples.mean().round() } else { self.figure(&samples) };
            self.push(format!("{op}-crowd{spread}"), tasks, ours, peers);
        }
        Ok(())
    }

    /// Memory that a task takes: its part of the maps, which are there from the start, and what registering it allocates.
    fn memory(&mut self) -> Result<()> {
        const FEW: u32 = 1000;
        const MANY: u32 = 5000;
        const CELL: f64 = 128.0; // of the domain's map, which the loader has closed by now
        let few = Loader::start(&self.options.loader, Mode::Full, FEW, 4)?.map_bytes()?;
        let loader = Loader::start(&self.options.loader, Mode::Full, MANY, 4)?;
        let of_maps = (loader.map_bytes()? - few) as f64 / f64::from(MANY - FEW);
        let mut crowd = Crowd::gather(&loader.socket, MANY)?;
        let before = slab_bytes()?;
        crowd.register()?;
        let allocated = slab_bytes()?.saturating_sub(before) as f64 / f64::from(MANY);
        eprintln!("memory: {of_maps:.0} bytes in maps, {CELL} in the domain, {allocated:.0} allocated");
        self.push("memory".into(), MANY, (of_maps + CELL + allocated).round(), Peers::new());
        self.set_unit("bytes");
        Ok(())
    }

    /// Where the instructions go: those of each BPF program, in runs a round and instructions a run.
    fn profile(&self) -> Result<()> {
        let rounds = self.options.rounds;
        fs::write("/proc/sys/kernel/bpf_stats_enabled", "1")?;
        let loader = Loader::start(&self.options.loader, Mode::Full, 16384, 64)?;
        let domain = ours::open(&loader.socket, 16)?;
        let kinds: [(&str, Operation); 4] = [
            ("serve", |domain, rounds| ours::serve(domain, rounds).map(drop)),
            ("switch", |domain, rounds| ours::switch(domain, rounds).map(drop)),
            ("block in a pipe and wake", |domain, rounds| {
                ours::blocking(domain, rounds, &Gate::pipe()?).map(drop)
            }),
            ("block in a futex and wake", |domain, rounds| {
                ours::blocking(domain, rounds, &Gate::futex()?).map(drop)
            }),
        ];
        for (name, operation) in kinds {
            let before = loader.program_runs()?;
            operation(&domain, rounds)?;
            eprintln!("{name}, of {rounds} rounds:");
            for (id, (runs, ns)) in loader.program_runs()? {
                let (runs_then, ns_then) = before.get(&id).copied().unwrap_or_default();
                let (runs, ns) = (runs - runs_then, ns - ns_then);
                if runs >= u64::from(rounds) / 2 {
                    let a_round = runs as f64 / f64::from(rounds);
                    eprintln!("  {:<16} {a_round:>6.2} runs, {:>6} each", program_name(id), ns / runs);
                }
            }
        }
        Ok(())
    }

    /// The one figure of a kind. On real hardware the median, which strangers disturb less.
    fn figure(&self, samples: &Samples) -> f64 {
        if self.options.counted { samples.undisturbed_mean().round() } else { samples.percentile(50) }
    }

    fn note(&self, peers: &mut Peers, name: &str, samples: &Samples) {
        let figure = self.figure(samples);
        eprintln!("{name}: {figure}; 99% {}", samples.percentile(99));
        peers.insert(name.to_owned(), figure);
    }

    fn add(&mut self, op: &str, tasks: u32, samples: &Samples, peers: Peers) {
        let ours = self.figure(samples);
        eprintln!("{op}: {ours}; 99% {}", samples.percentile(99));
        self.push(op.to_owned(), tasks, ours, peers);
    }

    /// Of the last figure.
    fn set_unit(&mut self, unit: &str) {
        self.figures.last_mut().expect("there is one").unit = unit.into();
    }

    fn push(&mut self, op: String, tasks: u32, ours: f64, peers: Peers) {
        let unit = if self.options.counted { "instructions" } else { "ns" };
        let (kernel, cpus) = (self.kernel.clone(), self.cpus);
        self.figures.push(Figure { op, kernel, cpus, tasks, unit: unit.into(), ours, peers });
    }
}

/// Of the kernel's small allocations.
fn slab_bytes() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line =
        text.lines().find_map(|line| line.strip_prefix("Slab:")).context("/proc/meminfo has no Slab")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib * 1024)
}

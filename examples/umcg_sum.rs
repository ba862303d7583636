// SPDX-License-Identifier: MIT OR Apache-2.0
//! `sha256sum` for directory trees, many files at a time: N worker threads over M servers.
//!
//! Workers read with plain blocking `read(2)`. When one sleeps in there, its server runs the next; when it has what it
//! slept for, it is stopped at the boundary to user code until it is its turn again. So M CPUs compute, one worker per
//! server at a time, however many reads are under way:
//!
//! ```text
//!   server 0                        server 1
//!   ready: worker 4, worker 0       ready: worker 5
//!   runs:  worker 2                 runs:  worker 1
//!   blocked in read(2): worker 6    blocked in read(2): worker 3, worker 7
//! ```
//!
//! Each server has workers of its own and one policy, first in, first out; a worker lets the next have its turn after each
//! file. `--stats` tells what happened, and whether the promise was kept that no two workers of a server are in user
//! code at once. Without a loader the program works too, but then nobody sees that a worker blocks.
//!
//! Try it: `scx_umcg run -- umcg_sum --stats src`

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::OnceLock;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::SeqCst;
use std::thread::{self, Scope};
use std::time::Duration;

use clap::Parser;
use nix::time::{ClockId, clock_gettime};
use sha2::{Digest, Sha256};
use umcg::{Backend, Domain, Error, OpenOptions, Server, State, Task, Tid};

/// What a worker reads at a time, bytes.
const BUFFER_LEN: usize = 64 << 10;

/// Prints SHA-256 sums as sha256sum(1) does, sorted by path. Of a directory, all regular files below it; symbolic links
/// are followed where they are given, and skipped in a directory.
#[derive(Parser)]
struct Options {
    /// Threads that read and compute [default: 4 for each server]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    workers: Option<u16>,

    /// Threads that decide which worker runs, and so workers that run at once [default: one for each CPU]
    #[arg(long, value_name = "M", value_parser = clap::value_parser!(u16).range(1..=4096))]
    servers: Option<u16>,

    /// Print on standard error what the servers saw
    #[arg(long)]
    stats: bool,

    /// Files and directories
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
}

impl Options {
    /// Numbers of servers and workers. A server without workers would have nothing to do.
    fn threads(&self) -> (usize, usize) {
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        let servers = self.servers.map_or(cpus, usize::from);
        let workers = self.workers.map_or(4 * servers, usize::from);
        (servers.min(workers), workers)
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    let (files, mut failed) = find_files(&options.paths);
    let job = Job::new(files);
    let (servers, workers) = options.threads();
    let hosts: Vec<Host> = (0..servers).map(|i| Host::new((workers - i).div_ceil(servers))).collect();

    let run = match run(&job, &hosts) {
        Ok(run) => run,
        Err(error) => return fail(&error),
    };
    match job.print() {
        Ok(all) => failed |= !all,
        Err(error) => return fail(&format_args!("cannot write the sums: {error}")),
    }
    if options.stats {
        job.report(&hosts, &run);
    }
    ExitCode::from(u8::from(failed))
}

fn fail(error: &dyn fmt::Display) -> ExitCode {
    eprintln!("umcg_sum: {error}");
    ExitCode::FAILURE
}

/// What is known when all threads have ended.
struct Run {
    backend: Backend,
    stats: Stats,
}

fn run(job: &Job, hosts: &[Host]) -> Result<Run, Error> {
    let workers: usize = hosts.iter().map(|host| host.workers).sum();
    let tasks = u32::try_from(hosts.len() + workers).unwrap_or(u32::MAX);
    let domain = Domain::open(&OpenOptions::new(tasks).fallback(true))?;
    let stats = thread::scope(|scope| {
        let domain = &domain;
        let spawn = |host| scope.spawn(move || or_exit(serve(scope, domain, job, host)));
        let servers: Vec<_> = hosts.iter().map(spawn).collect();
        let mut stats = Stats::default();
        for server in servers {
            stats.add(&server.join().expect("a server does not panic"));
        }
        stats
    });
    Ok(Run { backend: domain.backend(), stats })
}

/// A thread that fails would leave the others waiting for it, so it ends the program.
fn or_exit<T>(result: Result<T, Error>) -> T {
    result.unwrap_or_else(|error| {
        fail(&error);
        std::process::exit(1)
    })
}

/// What a server and its workers share.
struct Host {
    workers: usize,
    /// Workers whose threads are tasks, or will be.
    left: AtomicUsize,
    /// Workers inside [`compute`](Self::compute): now, and at most ever.
    computing: AtomicUsize,
    most_computing: AtomicUsize,
}

impl Host {
    fn new(workers: usize) -> Self {
        Self {
            workers,
            left: AtomicUsize::new(workers),
            computing: AtomicUsize::new(0),
            most_computing: AtomicUsize::new(0),
        }
    }

    /// Never enters the kernel: no system call, and no memory that [`touch`] or read(2) has not brought in. A worker
    /// cannot block in here, so two at once would both be in user code.
    #[inline(never)]
    fn compute(&self, hasher: &mut Sha256, data: &[u8]) {
        let computing = self.computing.fetch_add(1, SeqCst) + 1;
        self.most_computing.fetch_max(computing, SeqCst);
        hasher.update(data);
        self.computing.fetch_sub(1, SeqCst);
    }
}

/// Brings into memory what [`Host::compute`] will need: its code, and the stack below us.
fn touch() {
    let mut hasher = Sha256::new();
    Host::new(0).compute(&mut hasher, &[0; 4001]);
    std::hint::black_box(hasher);
}

/// A server's thread.
fn serve<'s, 'e: 's>(
    scope: &'s Scope<'s, 'e>,
    domain: &'s Domain,
    job: &'s Job,
    host: &'s Host,
) -> Result<Stats, Error> {
    let server = domain.register_server()?;
    let tid = Tid::current();
    for _ in 0..host.workers {
        scope.spawn(move || or_exit(work(domain, job, host, tid)));
    }
    let mut policy = Fifo::new(host.workers);
    loop {
        server.mark_runnable(); // first: what happens from here on makes run() return at once
        if host.left.load(SeqCst) == 0 {
            return Ok(policy.stats);
        }
        policy.look_around(&server);
        policy.run_next(domain, &server)?;
    }
}

/// Who runs next: whoever could run first.
///
/// It never allocates. A worker may be stopped with a lock of the allocator's in its hand, and only this server could let it
/// go on.
struct Fifo<'d> {
    /// Workers that can run, and since when.
    ready: VecDeque<(Task<'d>, Duration)>,
    /// Workers that sleep or finish in the kernel.
    blocked: Vec<Task<'d>>,
    stats: Stats,
}

impl<'d> Fifo<'d> {
    fn new(workers: usize) -> Self {
        Self {
            ready: VecDeque::with_capacity(workers),
            blocked: Vec::with_capacity(workers),
            stats: Stats::default(),
        }
    }

    /// Takes the two lists, the blocked one first: a worker may be on both.
    fn look_around(&mut self, server: &Server<'d>) {
        for worker in server.take_blocked() {
            self.stats.blocks += 1;
            self.blocked.push(worker);
        }
        // The list has the last one first.
        let end = self.ready.len();
        for worker in server.take_runnable() {
            let since = self.ready_since(worker);
            if worker.state() == State::Runnable && !self.is_ready(worker) {
                self.ready.insert(end, (worker, since));
            }
        }
    }

    /// When the loader goes away, captured workers run on, and come again while they are still in the queue.
    fn is_ready(&self, worker: Task<'d>) -> bool {
        self.ready.iter().any(|(ready, _)| *ready == worker)
    }

    /// A captured worker could run when the kernel said so. Others are new, or gave up their turn just now.
    fn ready_since(&mut self, worker: Task<'d>) -> Duration {
        let Some(i) = self.blocked.iter().position(|blocked| *blocked == worker) else {
            return now();
        };
        self.blocked.swap_remove(i);
        if let Some(time) = worker.last_blocked_for() {
            self.stats.captures.add(time);
        }
        worker.runnable_at()
    }

    /// Runs the first in the queue until there is something to decide. With nobody there, waits for that.
    fn run_next(&mut self, domain: &Domain, server: &Server<'d>) -> Result<(), Error> {
        let next = self.ready.pop_front();
        let start = now();
        let was_run = match server.run(next.and_then(|(worker, _)| worker.tid())) {
            // The loader went away and let this worker go: it runs by itself, or has ended.
            Err(error)
                if next.is_some()
                    && domain.backend() == Backend::Futex
                    && [libc::EBUSY, libc::ESRCH].contains(&error.errno()) =>
            {
                return Ok(());
            }
            answer => answer?,
        };
        match next {
            Some((_, since)) if was_run => self.stats.waits.add(start.saturating_sub(since)),
            Some(entry) => self.ready.push_front(entry), // something else happened first
            None => {}
        }
        Ok(())
    }
}

/// The clock of the tasks' times.
fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from)
}

/// A worker's thread.
fn work(domain: &Domain, job: &Job, host: &Host, server: Tid) -> Result<(), Error> {
    let mut buffer = vec![0; BUFFER_LEN];
    touch();
    let worker = domain.register_worker(server)?; // returns once the server runs it
    while let Some((path, sum)) = job.take() {
        // Each file is taken once.
        let _ = sum.set(sum_file(path, &mut buffer, host));
        worker.yield_now()?;
    }
    drop(worker);
    // The server may wait for the last one to end. If it saw that already, it may be gone.
    host.left.fetch_sub(1, SeqCst);
    let _ = domain.kick(server);
    Ok(())
}

struct Sum {
    digest: [u8; 32],
    bytes: u64,
}

fn sum_file(path: &OsStr, buffer: &mut [u8], host: &Host) -> io::Result<Sum> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut bytes = 0;
    loop {
        match file.read(buffer) {
            Ok(0) => break,
            Ok(n) => {
                host.compute(&mut hasher, &buffer[..n]);
                bytes += n as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Sum { digest: hasher.finalize().into(), bytes })
}

/// All files, and what became of them. Workers take one after the other.
struct Job {
    files: Vec<OsString>,
    sums: Vec<OnceLock<io::Result<Sum>>>,
    next: AtomicUsize,
}

impl Job {
    fn new(files: Vec<OsString>) -> Self {
        Self { sums: files.iter().map(|_| OnceLock::new()).collect(), files, next: AtomicUsize::new(0) }
    }

    fn take(&self) -> Option<(&OsStr, &OnceLock<io::Result<Sum>>)> {
        let i = self.next.fetch_add(1, SeqCst);
        Some((self.files.get(i)?, self.sums.get(i)?))
    }

    fn sums(&self) -> impl Iterator<Item = &Sum> {
        self.sums.iter().filter_map(|sum| sum.get()?.as_ref().ok())
    }

    /// The sums on standard output, errors on standard error; whether there were none.
    fn print(&self) -> io::Result<bool> {
        let mut out = BufWriter::new(io::stdout().lock());
        let mut all = true;
        for (path, sum) in self.files.iter().zip(&self.sums) {
            match sum.get() {
                Some(Ok(sum)) => out.write_all(&line(&sum.digest, path))?,
                Some(Err(error)) => {
                    complain(path, error);
                    all = false;
                }
                None => all = false,
            }
        }
        out.flush()?;
        Ok(all)
    }

    fn report(&self, hosts: &[Host], run: &Run) {
        let workers: usize = hosts.iter().map(|host| host.workers).sum();
        let bytes: u64 = self.sums().map(|sum| sum.bytes).sum();
        let most = hosts.iter().map(|host| host.most_computing.load(SeqCst));
        let back_end = match run.backend {
            Backend::SchedExt => "sched_ext",
            Backend::Futex => "futex (no loader: blocking is not seen)",
        };
        eprintln!("back end   {back_end}");
        eprintln!("threads    workers {workers}, servers {}", hosts.len());
        eprintln!("files      {}, {bytes} bytes", self.sums().count());
        eprintln!("blocked    {} times", run.stats.blocks);
        eprintln!("captured   {}", run.stats.captures);
        eprintln!("run        {}", run.stats.waits);
        eprintln!("at once    {} of one server's workers in user code, at most", most.max().unwrap_or(0));
    }
}

/// As coreutils 9 prints it: a backslash before the line tells that some in the name are escapes.
fn line(digest: &[u8; 32], path: &OsStr) -> Vec<u8> {
    let mut name = Vec::with_capacity(path.len());
    for &byte in path.as_bytes() {
        match byte {
            b'\\' => name.extend(br"\\"),
            b'\n' => name.extend(br"\n"),
            b'\r' => name.extend(br"\r"),
            _ => name.push(byte),
        }
    }
    let mut line = Vec::with_capacity(name.len() + 68);
    if name != path.as_bytes() {
        line.push(b'\\');
    }
    for byte in digest {
        line.extend(format!("{byte:02x}").into_bytes());
    }
    line.extend(b"  ");
    line.extend(name);
    line.push(b'\n');
    line
}

fn complain(path: impl AsRef<Path>, error: &io::Error) {
    eprintln!("umcg_sum: {}: {error}", path.as_ref().display());
}

/// The files to sum, sorted by the bytes of their paths, and whether some directory could not be read.
fn find_files(paths: &[PathBuf]) -> (Vec<OsString>, bool) {
    let mut files = Vec::new();
    let mut failed = false;
    let mut dirs = Vec::new();
    for path in paths {
        if path.is_dir() {
            dirs.push(path.clone());
        } else {
            files.push(path.clone().into_os_string()); // whatever is wrong with it, opening it will tell
        }
    }
    while let Some(dir) = dirs.pop() {
        if let Err(error) = list(&dir, &mut dirs, &mut files) {
            complain(&dir, &error);
            failed = true;
        }
    }
    files.sort();
    (files, failed)
}

fn list(dir: &Path, dirs: &mut Vec<PathBuf>, files: &mut Vec<OsString>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            dirs.push(entry.path());
        } else if kind.is_file() {
            files.push(entry.path().into_os_string());
        }
    }
    Ok(())
}

/// What the servers saw.
#[derive(Default)]
struct Stats {
    blocks: u64,
    /// Captures, and the time from blocking until the worker could run again.
    captures: Spans,
    /// Workers that were run, and the time they had been in the queue.
    waits: Spans,
}

impl Stats {
    fn add(&mut self, other: &Self) {
        self.blocks += other.blocks;
        self.captures.join(&other.captures);
        self.waits.join(&other.waits);
    }
}

/// How often something came to an end, and after how long.
#[derive(Default)]
struct Spans {
    count: u32,
    sum: Duration,
    longest: Duration,
}

impl Spans {
    fn add(&mut self, span: Duration) {
        self.join(&Self { count: 1, sum: span, longest: span });
    }

    fn join(&mut self, other: &Self) {
        self.count += other.count;
        self.sum += other.sum;
        self.longest = self.longest.max(other.longest);
    }
}

impl fmt::Display for Spans {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mean = self.sum.checked_div(self.count).unwrap_or_default();
        let Self { count, sum, longest } = self;
        write!(f, "{count} times, after {mean:.1?} on average, {longest:.1?} at most, {sum:.1?} in all")
    }
}

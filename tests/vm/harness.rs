// SPDX-License-Identifier: GPL-2.0-only
//! The runner: names and command line are libtest's (`vm [FILTER] [--exact] [--list]`), each test is a process.
//! `UMCG_VM_ONLY`, names of tests, leaves all others out.

use std::env;
use std::fs::File;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Failed, Trial};
use scx_stats::StatsClient;

use crate::cast::limit;
use crate::kernel_log::KernelLog;

/// Names the test that a child process is to run.
const CHILD: &str = "UMCG_VM_TEST";
/// What the loader says; shown when a test fails.
pub const LOADER_LOG: &str = "/run/umcg-test-loader.log";
/// The loader under test.
pub const LOADER: &str = env!("CARGO_BIN_EXE_scx_umcg");

/// A loader that serves does so.
const ANSWERS: &str = "the loader answers";

/// A behaviour, its name as a sentence, and how long it may take before it counts as hung.
#[derive(Clone, Copy)]
pub struct Test {
    pub name: &'static str,
    pub run: fn(),
    pub limit_s: u64,
    /// The test starts loaders of its own, so the common one is stopped meanwhile.
    pub own_loader: bool,
    /// What the kernel is to say meanwhile, and would be told off for in other tests: the first for certain, the others perhaps.
    pub expected_in_log: &'static [&'static str],
}

impl Test {
    pub const fn new(name: &'static str, run: fn()) -> Self {
        Self { name, run, limit_s: 120, own_loader: false, expected_in_log: &[] }
    }

    pub const fn limit_s(mut self, limit_s: u64) -> Self {
        self.limit_s = limit_s;
        self
    }

    pub const fn own_loader(mut self) -> Self {
        self.own_loader = true;
        self
    }

    pub const fn expects_in_log(mut self, messages: &'static [&'static str]) -> Self {
        self.expected_in_log = messages;
        self
    }
}

/// A running `scx_umcg`; dropping it stops it and waits for the end.
pub struct Loader {
    child: Child,
    pub socket: PathBuf,
}

impl Loader {
    /// Starts a loader with `args` and waits until it serves.
    pub fn start(args: &[&str]) -> Self {
        let socket = PathBuf::from(format!("/run/umcg-test-{}.sock", std::process::id()));
        let child = Command::new(LOADER)
            .arg("--socket")
            .arg(&socket)
            .args(args)
            .stdin(Stdio::null())
            .stderr(File::create(LOADER_LOG).expect("cannot create the loader's log"))
            .spawn()
            .expect("cannot start the loader");
        let mut loader = Self { child, socket };
        let deadline = Instant::now() + limit(300);
        while !loader.serves() {
            if let Some(status) = loader.child.try_wait().unwrap() {
                panic!("the loader ended before it served: {status}");
            }
            assert!(Instant::now() < deadline, "the loader does not serve");
            sleep(Duration::from_millis(50));
        }
        loader
    }

    pub fn serves(&self) -> bool {
        status_at(&self.socket).is_ok()
    }

    /// One counter or fact of `scx_umcg status --json`.
    pub fn stat(&self, name: &str) -> u64 {
        stat_at(&self.socket, name)
    }

    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Waits until it has ended by itself, or by what the test has done to it.
    pub fn wait(&mut self) -> ExitStatus {
        self.child.wait().expect("it is our child")
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            // SAFETY: kill(2) on our own child, which is not reaped yet.
            unsafe { libc::kill(self.pid(), libc::SIGTERM) };
            let _ = self.child.wait();
        }
    }
}

/// One counter or fact of the loader that serves this test.
pub fn stat(name: &str) -> u64 {
    stat_at(&own_socket(), name)
}

/// The counters at one moment. Tests share a loader, so only what has been added since is a test's own.
pub struct Counters(serde_json::Value);

impl Counters {
    pub fn now() -> Self {
        Self(status_at(&own_socket()).expect(ANSWERS))
    }

    pub fn added(&self, name: &str) -> u64 {
        stat(name) - number(&self.0, name)
    }
}

fn own_socket() -> PathBuf {
    env::var_os("UMCG_SOCKET").expect("no loader").into()
}

fn stat_at(socket: &Path, name: &str) -> u64 {
    number(&status_at(socket).expect(ANSWERS), name)
}

fn number(status: &serde_json::Value, name: &str) -> u64 {
    status[name].as_u64().unwrap_or_else(|| panic!("status has no number {name}: {status}"))
}

/// What `scx_umcg status` asks a loader; that command has tests of its own, and would be a process for each question.
fn status_at(socket: &Path) -> anyhow::Result<serde_json::Value> {
    let mut path = socket.as_os_str().to_owned();
    path.push(".stats");
    StatsClient::new().set_path(path).connect(Some(10_000))?.request("stats", Vec::new())
}

pub fn main(tests: &[Test]) -> ExitCode {
    if let Ok(name) = env::var(CHILD) {
        let test = tests.iter().find(|test| test.name == name).expect("no such test");
        (test.run)();
        return ExitCode::SUCCESS;
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1); // tests count what is in the whole machine
    let mut tests = tests.to_vec();
    if let Ok(only) = env::var("UMCG_VM_ONLY") {
        tests.retain(|test| only.split_whitespace().any(|name| name == test.name));
    }
    tests.sort_by_key(|test| test.own_loader); // the common loader starts once
    let trials = tests.iter().map(|&test| Trial::test(test.name, move || run_in_child(test))).collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    *COMMON_LOADER.lock().unwrap_or_else(PoisonError::into_inner) = None; // a static is never dropped
    conclusion.exit_code()
}

/// The loader that tests share: to load takes longer than most of them. `None` until one needs it.
static COMMON_LOADER: Mutex<Option<Loader>> = Mutex::new(None);

/// Runs one test as a process, then looks at the loader and the kernel log.
fn run_in_child(test: Test) -> Result<(), Failed> {
    let mut common = COMMON_LOADER.lock().unwrap_or_else(PoisonError::into_inner);
    if test.own_loader {
        *common = None;
    } else if common.is_none() {
        *common = Some(Loader::start(&[]));
    }
    let mut log = KernelLog::from_now();
    let mut command = Command::new(env::current_exe()?);
    command.env(CHILD, test.name).stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0);
    if let Some(loader) = &*common {
        command.env("UMCG_SOCKET", &loader.socket);
    }
    let started = Instant::now();
    let outcome = wait_for(command.spawn()?, limit(test.limit_s));
    println!("     {:.1} s", started.elapsed().as_secs_f32());

    let outcome = match &*common {
        Some(loader) if !loader.serves() => Err("the loader does not serve any more".to_owned()),
        _ => outcome,
    };
    if outcome.is_err() {
        *common = None; // what a failed test left in it is not the next one's business
    }
    outcome.and_then(|()| log.assert_clean(test.expected_in_log)).map_err(|why| {
        let loader = std::fs::read_to_string(LOADER_LOG).unwrap_or_default();
        format!("{why}\n{}  loader: {}", log.all(), loader.replace('\n', "\n  loader: ")).into()
    })
}

fn wait_for(mut child: Child, limit: Duration) -> Result<(), String> {
    let mut stdout = child.stdout.take().expect("stdout is a pipe");
    let printer = std::thread::spawn(move || {
        let mut text = String::new();
        let _ = stdout.read_to_string(&mut text);
        print!("{}", text.lines().map(|line| format!("     {line}\n")).collect::<String>());
    });
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(|error| error.to_string())? {
            break Ok(status);
        }
        if Instant::now() > deadline {
            let threads = where_it_hangs(child.id());
            kill_group(&child);
            let _ = child.wait();
            break Err(format!("hung for {} s:\n{threads}", limit.as_secs()));
        }
        sleep(Duration::from_millis(20));
    };
    kill_group(&child); // what it has left behind keeps the pipe open
    let _ = printer.join();
    match status? {
        status if status.success() => Ok(()),
        status => Err(format!("{status}")),
    }
}

/// Ends a test's process, and those that it has started.
fn kill_group(child: &Child) {
    // SAFETY: kill(2) on the process group that the child leads.
    unsafe { libc::kill(-child.id().cast_signed(), libc::SIGKILL) };
}

/// State and kernel stack of every thread of a process that does not end.
pub fn where_it_hangs(pid: u32) -> String {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return String::new();
    };
    let read = |path: PathBuf| std::fs::read_to_string(path).unwrap_or_default();
    tasks
        .flatten()
        .map(|task| {
            let stat = read(task.path().join("stat"));
            let state =
                stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().next()).unwrap_or("?");
            let stack = read(task.path().join("stack"));
            let top: Vec<_> = stack.lines().take(4).map(str::trim).collect();
            format!("  {} {state} {}\n", task.file_name().display(), top.join(" < "))
        })
        .collect()
}

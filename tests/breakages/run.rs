// SPDX-License-Identifier: GPL-2.0-only
//! What `scripts/breakages` runs: applies one breakage at a time to a copy of the repository, and looks which of the tests
//! that it names notice.
//!
//! The copy has a target directory of its own, so that Cargo builds there what a breakage touches, and no more.

#[path = "../contract/mod.rs"]
mod contract;
mod list;

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use contract::{file_of, source, vm_tests};
use list::{Breakage, Edit};
use sha2::{Digest, Sha256};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
/// Beyond this something hangs that its own limits do not end.
const VM_LIMIT: Duration = Duration::from_secs(600);
const NATIVE_LIMIT: Duration = Duration::from_secs(60);
const BUILD_LIMIT: Duration = Duration::from_secs(3600);

/// What became of a breakage.
#[derive(Clone, Debug)]
enum Verdict {
    /// By these tests; some that it names may have missed it.
    Noticed(String),
    NotNoticed,
    /// It proves nothing: there is nothing to run.
    Unusable(&'static str),
}

impl Verdict {
    fn of(failed: &[String], names: &[String]) -> Self {
        let has_failed =
            |name: &&String| failed.iter().any(|test| test.split(' ').next() == Some(name.as_str()));
        let passed: Vec<_> = names.iter().filter(|name| !has_failed(name)).map(String::as_str).collect();
        match (failed, &passed[..]) {
            ([], _) => Self::NotNoticed,
            (_, []) => Self::Noticed(failed.join(" ")),
            _ => Self::Noticed(format!("{}; not by {}", failed.join(" "), passed.join(" "))),
        }
    }

    fn is_noticed(&self) -> bool {
        matches!(self, Self::Noticed(_))
    }

    fn text(&self) -> String {
        match self {
            Self::Noticed(by) => format!("noticed by {by}"),
            Self::NotNoticed => "NOT NOTICED".to_owned(),
            Self::Unusable(why) => (*why).to_owned(),
        }
    }
}

struct Options {
    kernel: String,
    cpus: String,
    /// Results of before do not count.
    again: bool,
    /// The tests that all breakages name, where nothing is broken.
    unbroken: bool,
    /// Parts of names; none: all breakages.
    names: Vec<String>,
}

impl Options {
    fn from_args() -> Result<Self, String> {
        let mut options = Self {
            kernel: "6.18".to_owned(),
            cpus: "2".to_owned(),
            again: false,
            unbroken: false,
            names: Vec::new(),
        };
        let mut args = env::args().skip(1);
        while let Some(arg) = args.next() {
            let mut value =
                || args.next().ok_or(format!("{arg} lacks its value; see scripts/breakages --help"));
            match arg.as_str() {
                "--kernel" => options.kernel = value()?,
                "--cpus" => options.cpus = value()?,
                "--again" => options.again = true,
                "--unbroken" => options.unbroken = true,
                _ if arg.starts_with('-') => {
                    return Err(format!("unknown option {arg}; see scripts/breakages --help"));
                }
                _ => options.names.push(arg),
            }
        }
        Ok(options)
    }

    fn wants(&self, breakage: &Breakage) -> bool {
        self.names.is_empty() || self.names.iter().any(|name| breakage.name.contains(name))
    }
}

/// The tests that a breakage names, by the way that they are run.
#[derive(Default)]
struct Tests<'a> {
    vm: Vec<&'a str>,
    scripts: Vec<&'a str>,
    /// By what selects their binary.
    native: BTreeMap<Vec<String>, Vec<&'a str>>,
}

impl<'a> Tests<'a> {
    fn new(names: &'a [String]) -> Self {
        let mut tests = Self::default();
        for name in names {
            match name.split_once("::") {
                Some((file, _)) => tests.native.entry(target_of(file)).or_default().push(name.as_str()),
                None if name.contains('/') => tests.scripts.push(name),
                None => tests.vm.push(name),
            }
        }
        tests
    }

    fn takes_long(&self) -> bool {
        !self.vm.is_empty() || !self.scripts.is_empty()
    }
}

/// What tells `cargo test` which binary has the tests of a file.
fn target_of(file: &str) -> Vec<String> {
    let packages = [
        ("umcg/", "umcg"),
        ("libumcg/", "libumcg"),
        ("tests/rooms/", "umcg-rooms"),
        ("benches/", "umcg-bench"),
    ];
    let (package, path) = packages
        .iter()
        .find_map(|(dir, package)| Some((*package, file.strip_prefix(dir)?)))
        .unwrap_or(("scx_umcg", file));
    let select = match path.strip_prefix("tests/") {
        Some(test) => format!("--test={}", test.split(['/', '.']).next().unwrap_or(test)),
        None if ["umcg", "libumcg", "umcg-rooms"].contains(&package) => "--lib".to_owned(),
        None => "--bins".to_owned(),
    };
    vec![format!("--package={package}"), select]
}

/// The copy of the repository.
struct Copy {
    dir: PathBuf,
    /// What the last step has printed.
    log: PathBuf,
    options: Options,
}

impl Copy {
    fn path(&self, file: &str) -> PathBuf {
        self.dir.join(file)
    }

    /// Makes it the same as the repository; what is the same already stays as it is, or Cargo would build it again.
    fn restore(&self) {
        let files = repository_files();
        for file in &files {
            let (from, to) = (Path::new(ROOT).join(file), self.path(file));
            let Ok(text) = fs::read(&from) else { continue }; // removed, and git does not know it yet
            let mode = |path: &Path| fs::metadata(path).map(|metadata| metadata.mode()).ok();
            if fs::read(&to).ok().as_ref() != Some(&text) || mode(&from) != mode(&to) {
                fs::create_dir_all(to.parent().expect("below the copy")).expect("target is writable");
                fs::write(&to, text).expect("target is writable");
                let permissions = fs::metadata(&from).expect("it was read").permissions();
                fs::set_permissions(&to, permissions).expect("it is ours");
            }
        }
        for file in files_below(&self.dir) {
            let name = file.strip_prefix(&self.dir).expect("below the copy");
            if !Path::new(ROOT).join(name).exists() {
                fs::remove_file(&file).expect("target is writable");
            }
        }
    }

    fn edit(&self, edit: &Edit) {
        let path = self.path(&edit.file);
        let text = fs::read_to_string(&path).expect("a file of the repository");
        assert_eq!(text.matches(&edit.from).count(), 1, "{}: run cargo test --test breakages", edit.file);
        fs::write(path, text.replace(&edit.from, &edit.to)).expect("target is writable");
    }

    /// Runs a program in the copy. What it prints goes to the log, too.
    fn run(&self, program: &str, args: &[&str], limit: Duration, env: &[(&str, &str)]) -> Ran {
        let mut log = File::options().create(true).append(true).open(&self.log).expect("target is writable");
        let start = log.seek(SeekFrom::End(0)).expect("it is a file");
        let mut command = Command::new(program);
        // SAFETY: between fork and exec, prctl(2) neither allocates nor locks.
        unsafe { command.pre_exec(end_with_parent) };
        let mut child = command
            .args(args)
            .envs(env.iter().copied())
            .env("CARGO_TARGET_DIR", self.path("target"))
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a descriptor is left"))
            .stderr(log)
            .process_group(0)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot run {program}: {error}"));
        let deadline = Instant::now() + limit;
        let status = loop {
            if let Some(status) = child.try_wait().expect("it is our child") {
                break Some(status);
            }
            if Instant::now() > deadline {
                // SAFETY: kill(2) on the process group that the child leads.
                unsafe { libc::kill(-child.id().cast_signed(), libc::SIGKILL) };
                let _ = child.wait();
                break None;
            }
            sleep(Duration::from_millis(50));
        };
        let printed = fs::read(&self.log).expect("it was written").split_off(start as usize);
        let printed = String::from_utf8_lossy(&printed).into_owned();
        Ran { is_good: status.is_some_and(|status| status.success()), hangs: status.is_none(), printed }
    }

    fn cargo(&self, args: &[&str], limit: Duration) -> Ran {
        self.run(&env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned()), args, limit, &[])
    }

    fn try_out(&self, names: &[String]) -> Verdict {
        let _ = fs::remove_file(&self.log);
        match self.failed(&Tests::new(names)) {
            Ok(failed) => Verdict::of(&failed, names),
            Err(why) => Verdict::Unusable(why),
        }
    }

    /// The tests that do not pass, or why they say nothing.
    fn failed(&self, tests: &Tests) -> Result<Vec<String>, &'static str> {
        let mut failed = Vec::new();
        for (target, names) in &tests.native {
            failed.extend(self.native(target, names)?);
        }
        if !tests.vm.is_empty() {
            failed.extend(self.vm(&tests.vm)?);
        }
        for script in &tests.scripts {
            let ran = self.run(script, &[], VM_LIMIT, &[]);
            failed.extend((!ran.is_good).then(|| with_hang(script, ran.hangs)));
        }
        Ok(failed)
    }

    fn native(&self, target: &[String], names: &[&str]) -> Result<Vec<String>, &'static str> {
        let [package, select] = target else { return Err("HAS NO SUCH TEST") };
        // Cargo builds examples only for tests that are not chosen.
        let is_built = self.cargo(&["build", package, "--examples"], BUILD_LIMIT).is_good
            && self.cargo(&["test", package, select, "--no-run"], BUILD_LIMIT).is_good;
        if !is_built {
            return Err("DOES NOT BUILD");
        }
        let mut args = vec!["test", package, select, "--"];
        args.extend(names.iter().map(|test| last_part(test)));
        let ran = self.cargo(&args, NATIVE_LIMIT);
        let passed: BTreeSet<_> = ran
            .printed
            .lines()
            .filter_map(|line| Some(last_part(line.strip_prefix("test ")?.strip_suffix(" ... ok")?)))
            .collect();
        let failed = names.iter().filter(|test| !passed.contains(last_part(test)));
        Ok(failed.map(|test| with_hang(test, ran.hangs)).collect())
    }

    /// All in one machine.
    fn vm(&self, names: &[&str]) -> Result<Vec<String>, &'static str> {
        let binary = self.build_for_vm().ok_or("DOES NOT BUILD")?;
        let timeout = VM_LIMIT.as_secs().to_string();
        let Options { kernel, cpus, .. } = &self.options;
        let args = ["--kernel", kernel, "--cpus", cpus, "--timeout", &timeout, "--", &binary];
        let only = names.join(" ");
        let or = |name, default| env::var(name).unwrap_or_else(|_| String::from(default));
        let (limit, scale) = (or("UMCG_VM_LIMIT", "0.2"), or("UMCG_VM_SCALE", "0.2"));
        let env = [("UMCG_VM_ONLY", &*only), ("UMCG_VM_LIMIT", &limit), ("UMCG_VM_SCALE", &scale)];
        let run = || self.run("scripts/vm", &args, VM_LIMIT * 2, &env).printed;
        let mut printed = run();
        if printed.contains("qemu's fault") {
            printed = run();
        }
        if ["the loader ended before it served", "the loader does not serve\n"]
            .iter()
            .any(|it| printed.contains(it))
        {
            return Err("IS NOT LOADED");
        }
        let outcomes = outcomes(&printed);
        if outcomes.is_empty() {
            return Err("THE MACHINE DOES NOT RUN");
        }
        let failed = names.iter().filter(|test| outcomes.get(**test) != Some(&Some(true)));
        Ok(failed.map(|test| with_hang(test, is_hang(&printed, test, outcomes.get(*test)))).collect())
    }

    /// What the tests in the virtual machine need, as scripts/test builds it; the path of their binary.
    fn build_for_vm(&self) -> Option<String> {
        let examples = self.path("target/debug/examples/c");
        fs::create_dir_all(&examples).expect("target is writable");
        let out = format!("OUT={}", examples.display());
        let loader =
            ["build", "--package=scx_umcg", "--package=libumcg", "--bins", "--lib", "--example=umcg_sum"];
        let tests = ["test", "--test=vm", "--no-run", "--message-format=json"];
        let is_good = self.cargo(&loader, BUILD_LIMIT).is_good
            && self
                .run("make", &["-s", "-C", "examples", "PKG_CONFIG=false", &out], BUILD_LIMIT, &[])
                .is_good;
        let ran = is_good.then(|| self.cargo(&tests, BUILD_LIMIT)).filter(|ran| ran.is_good)?;
        let mut executables =
            ran.printed.split("\"executable\":\"").filter_map(|rest| rest.split('"').next());
        executables.find(|path| path.contains("/deps/vm-")).map(str::to_owned)
    }
}

/// What a program did.
struct Ran {
    is_good: bool,
    /// It had to be ended.
    hangs: bool,
    printed: String,
}

/// Who ends the runner ends what it runs; a virtual machine would go on.
fn end_with_parent() -> std::io::Result<()> {
    // SAFETY: takes no pointers.
    match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// "b" of "a::b".
fn last_part(test: &str) -> &str {
    test.rsplit("::").next().unwrap_or(test)
}

/// Whether the tests that began have passed; `None` for one that did not end.
fn outcomes(printed: &str) -> BTreeMap<&str, Option<bool>> {
    let mut outcomes = BTreeMap::new();
    let mut running = None;
    for line in printed.lines() {
        let mut result = line.trim();
        if let Some((name, rest)) = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... ")) {
            running = Some(name.trim());
            outcomes.insert(name.trim(), None);
            result = rest.trim();
        }
        if let (Some(name), "ok" | "FAILED") = (running, result) {
            outcomes.insert(name, Some(result == "ok"));
            running = None;
        }
    }
    outcomes
}

/// Whether a test that did not pass hung, or never ended, or came after one that did not.
fn is_hang(printed: &str, test: &str, outcome: Option<&Option<bool>>) -> bool {
    let report = printed.split(&format!("---- {test} ----")).nth(1).unwrap_or_default();
    let report = report.split("\n---- ").next().unwrap_or_default();
    outcome != Some(&Some(false)) || report.contains("hung for ")
}

fn with_hang(test: &str, hangs: bool) -> String {
    if hangs { format!("{test} (hangs)") } else { test.to_owned() }
}

/// What git has or would have: nothing of what is built.
fn repository_files() -> Vec<String> {
    let output = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(ROOT)
        .output()
        .expect("git is there");
    let names = String::from_utf8(output.stdout).expect("names are UTF-8");
    names.split_terminator('\0').map(str::to_owned).collect()
}

/// The files of the copy, without what is built there.
fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() && entry.file_name() != "target" => files.extend(files_below(&path)),
            Ok(kind) if kind.is_file() => files.push(path),
            _ => {}
        }
    }
    files
}

fn commit() -> String {
    let output = Command::new("git").args(["rev-parse", "--short", "HEAD"]).current_dir(ROOT).output();
    output.map_or_else(|_| "?".to_owned(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Results of before, and those of now: a line each. They stand as long as the breakage, the files that it edits and the
/// files of its tests do.
struct Results {
    path: PathBuf,
    known: BTreeMap<String, Verdict>,
    commit: String,
}

impl Results {
    fn read(path: PathBuf) -> Self {
        let text = fs::read_to_string(&path).unwrap_or_default();
        let known = text.lines().filter_map(|line| {
            let mut fields = line.split('\t');
            let (key, _, verdict) = (fields.next()?, fields.next()?, fields.next()?);
            Some((key.to_owned(), Verdict::Noticed(verdict.strip_prefix("noticed by ")?.to_owned())))
        });
        Self { known: known.collect(), path, commit: commit() }
    }

    fn add(&mut self, key: String, name: &str, verdict: &Verdict) {
        let mut file =
            File::options().create(true).append(true).open(&self.path).expect("target is writable");
        writeln!(file, "{key}\t{}\t{}\t{name}", self.commit, verdict.text()).expect("target is writable");
        self.known.insert(key, verdict.clone());
    }
}

fn key_of(breakage: &Breakage, options: &Options) -> String {
    let vm = vm_tests();
    let edited = breakage.edits.iter().map(|edit| edit.file.clone());
    let files: BTreeSet<_> =
        breakage.tests.iter().filter_map(|test| file_of(test, &vm)).chain(edited).collect();
    let mut hash = Sha256::new();
    hash.update(format!("{} {} {breakage:?}", options.kernel, options.cpus));
    files.iter().for_each(|file| hash.update(source(file).unwrap_or_default()));
    format!("{:x}", hash.finalize())[..16].to_owned()
}

/// Tries those that are to be tried, the quick ones first; whether all were noticed.
fn run(copy: &Copy, logs: &Path, mut results: Results) -> bool {
    let mut chosen: Vec<_> =
        list::read().breakages.into_iter().filter(|breakage| copy.options.wants(breakage)).collect();
    chosen.sort_by_key(|breakage| Tests::new(&breakage.tests).takes_long());
    let mut tally = BTreeMap::<&str, usize>::new();
    for breakage in &chosen {
        let key = key_of(breakage, &copy.options);
        let known = results.known.get(&key).filter(|_| !copy.options.again).cloned();
        let (verdict, note) = match known {
            Some(verdict) => (verdict, "known, ".to_owned()),
            None => {
                let started = Instant::now();
                copy.restore();
                breakage.edits.iter().for_each(|edit| copy.edit(edit));
                let verdict = copy.try_out(&breakage.tests);
                let _ = fs::copy(&copy.log, logs.join(file_name(&breakage.name)));
                results.add(key, &breakage.name, &verdict);
                (verdict, format!("{} s, ", started.elapsed().as_secs()))
            }
        };
        println!("{}: {note}{}", breakage.name, verdict.text());
        *tally.entry(if verdict.is_noticed() { "noticed" } else { "not noticed" }).or_default() += 1;
    }
    copy.restore();
    let count = |what| tally.get(what).copied().unwrap_or_default();
    println!("\n{} noticed, {} not", count("noticed"), count("not noticed"));
    !chosen.is_empty() && count("not noticed") == 0
}

fn file_name(name: &str) -> String {
    name.replace(|c: char| !c.is_ascii_alphanumeric(), "_")
}

/// The tests that the breakages name pass where nothing is broken, also with the limits that hold here.
fn run_unbroken(copy: &Copy) -> bool {
    let chosen = list::read().breakages.into_iter().filter(|breakage| copy.options.wants(breakage));
    let names: BTreeSet<_> = chosen.flat_map(|breakage| breakage.tests).collect();
    copy.restore();
    let verdict = copy.try_out(&names.into_iter().collect::<Vec<_>>());
    match &verdict {
        Verdict::NotNoticed => println!("all pass"),
        Verdict::Noticed(failed) => println!("these fail, and nothing is broken: {failed}"),
        Verdict::Unusable(why) => println!("{why}"),
    }
    matches!(verdict, Verdict::NotNoticed)
}

fn main() -> ExitCode {
    let options = match Options::from_args() {
        Ok(options) => options,
        Err(error) => {
            eprintln!("breakages: {error}");
            return ExitCode::from(2);
        }
    };
    let home = Path::new(ROOT).join("target/breakages");
    let (dir, logs) = (home.join("tree"), home.join("logs"));
    fs::create_dir_all(&dir).and_then(|()| fs::create_dir_all(&logs)).expect("target is writable");
    let copy = Copy { dir, log: home.join("log"), options };
    let is_good = if copy.options.unbroken {
        run_unbroken(&copy)
    } else {
        run(&copy, &logs, Results::read(home.join("results")))
    };
    ExitCode::from(u8::from(!is_good))
}

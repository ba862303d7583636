// SPDX-License-Identifier: GPL-2.0-only
//! The program `scx_umcg` itself: exit statuses, refusals that say what to do, and clients that misbehave.
//!
//! The failures this guards against: a script that cannot tell the command's failure from the loader's; two loaders that
//! get in each other's way; one bad client that ends the service for all.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, socket};
use nix::unistd::Pid;

use crate::api;
use crate::cast::{scaled, wait_until};
use crate::harness::{LOADER, LOADER_LOG, Loader, Test};
use crate::scene::assert_blocks_are_seen;

pub const TESTS: &[Test] = &[
    Test::new("run_exits_with_the_status_of_its_command", run_status).own_loader().limit_s(400),
    Test::new("run_tells_its_command_where_the_socket_is", run_socket).own_loader(),
    Test::new("an_ejection_is_said_in_one_line_after_the_kernels_dump", ejected)
        .own_loader()
        .expects_in_log(EJECTED),
    Test::new("run_keeps_its_commands_status_when_the_scheduler_is_ejected", run_ejected)
        .own_loader()
        .expects_in_log(EJECTED),
    Test::new("run_sets_no_time_limit", run_long).own_loader().limit_s(300),
    Test::new("status_tells_whether_a_loader_serves", status).own_loader(),
    Test::new("the_default_socket_is_where_programs_look", default_socket).own_loader(),
    Test::new("a_second_loader_is_refused", second).own_loader(),
    Test::new("a_loader_that_cannot_start_says_why", refusals).own_loader(),
    Test::new("a_client_that_talks_garbage_does_no_harm", garbage).own_loader(),
];

/// What the kernel says of a scheduler that was ejected by hand.
pub const EJECTED: &[&str] = &["disabled (disabled by sysrq-S)"];

/// The loader with `arguments`, to its end.
fn scx_umcg(arguments: &[&str]) -> Output {
    command(arguments).output().unwrap()
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(LOADER);
    command.args(arguments).stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> &str {
    str::from_utf8(bytes).unwrap()
}

/// The one line that a failure prints: `scx_umcg: what is wrong; what to do`.
fn assert_refused(output: &Output, why: &str) {
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert_eq!(message.lines().count(), 1, "{message}");
    assert!(message.starts_with("scx_umcg: ") && message.contains("; "), "{message}");
    assert!(message.contains(why), "{message}");
    assert!(output.stdout.is_empty());
}

fn assert_unloaded() {
    assert_eq!(fs::read_to_string("/sys/kernel/sched_ext/state").unwrap(), "disabled\n");
}

fn run_status() {
    for (command, status) in [
        (&["sh", "-c", "exit 3"][..], 3),
        (&["/etc/passwd"], 126),
        (&["/nonexistent/command"], 127),
        (&["sh", "-c", "kill -KILL $$"], 128 + libc::SIGKILL),
    ] {
        let output = scx_umcg(&[&["run", "--"], command].concat());
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{command:?}: {message}");
        let says_something = [126, 127].contains(&status);
        assert_eq!(message.lines().count(), usize::from(says_something), "{command:?}: {message}");
        assert_unloaded();
    }
}

/// The last line of standard error: what is wrong, the kernel's reason, and what to do.
fn assert_says_ejected(stderr: &str) {
    let last = stderr.lines().last().unwrap_or_default();
    assert!(last.starts_with("scx_umcg: the kernel ejected the scheduler: "), "{stderr}");
    assert!(last.contains("sysrq-S") && last.contains("; start it again"), "{stderr}");
    assert_eq!(stderr.matches("scx_umcg: ").count(), 1, "{stderr}");
}

fn ejected() {
    let mut loader = Loader::start(&[]);
    fs::write("/proc/sysrq-trigger", "S").unwrap();
    assert_eq!(loader.wait().code(), Some(2));
    assert_says_ejected(&fs::read_to_string(LOADER_LOG).unwrap());
    assert_unloaded();
}

fn run_ejected() {
    const EJECT: &str = "echo S >/proc/sysrq-trigger; while test -S $UMCG_SOCKET; do sleep 0.1; done; exit 7";
    let output = scx_umcg(&["run", "--", "sh", "-c", EJECT]);
    assert_eq!(output.status.code(), Some(7));
    assert_says_ejected(text(&output.stderr));
    assert_unloaded();
}

/// Longer than the watchdog and than every timeout of the loader's own.
fn run_long() {
    let seconds = scaled(40).max(12).to_string();
    let output = scx_umcg(&["run", "--watchdog", "5", "--", "sleep", &seconds]);
    assert!(output.status.success(), "{}", text(&output.stderr));
}

fn default_socket() {
    let mut loader = command(&[]).env_remove("UMCG_SOCKET").stderr(Stdio::null()).spawn().unwrap();
    // SAFETY: this is the only thread.
    unsafe { std::env::remove_var("UMCG_SOCKET") };
    wait_until("the loader serves", || api::open(None, 2, 0) == 0);
    assert!(Path::new("/run/scx_umcg/umcg.sock").exists());
    assert_blocks_are_seen();
    kill(Pid::from_raw(loader.id().cast_signed()), Signal::SIGINT).unwrap();
    assert_eq!(loader.wait().unwrap().code(), Some(0), "after SIGINT");
    assert_unloaded();
}

fn run_socket() {
    const LOOK: &str = "test -S $UMCG_SOCKET && cat /sys/kernel/sched_ext/state && echo $UMCG_SOCKET";
    let output = scx_umcg(&["run", "--", "sh", "-c", LOOK]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let lines: Vec<_> = text(&output.stdout).lines().collect();
    assert_eq!(lines[0], "enabled");
    assert!(!Path::new(lines[1]).exists(), "the socket stayed");
    assert!(!Path::new(lines[1]).parent().unwrap().exists(), "its directory stayed");
    assert_unloaded();
}

fn status() {
    let loader = Loader::start(&[]);
    let socket = loader.socket.to_str().unwrap();
    let serving = scx_umcg(&["status", "--socket", socket]);
    assert_eq!(serving.status.code(), Some(0));
    assert!(text(&serving.stdout).starts_with("serving on"), "{}", text(&serving.stdout));
    assert_eq!((loader.stat("nr_domains"), loader.stat("nr_tasks")), (0, 0));

    let nobody = scx_umcg(&["status", "--socket", "/run/nobody.sock"]);
    assert_eq!(nobody.status.code(), Some(1));
    assert!(text(&nobody.stdout).starts_with("not serving"));
    let socket = socket.to_owned();
    drop(loader);
    assert_eq!(scx_umcg(&["status", "--json", "--socket", &socket]).status.code(), Some(1));
    assert_unloaded();
}

fn second() {
    let loader = Loader::start(&[]);
    let socket = loader.socket.to_str().unwrap();
    assert_refused(&scx_umcg(&[]), "is loaded already");
    assert_refused(&scx_umcg(&["--socket", socket]), "is loaded already");
    assert_refused(&scx_umcg(&["run", "--", "true"]), "is loaded already");
    assert!(loader.serves(), "the first one suffered");
}

fn refusals() {
    let taken = "/run/umcg-test-taken";
    let _listener = UnixListener::bind(taken).unwrap();
    assert_refused(&scx_umcg(&["--socket", taken]), "is taken");
    fs::write("/run/umcg-test-file", "precious").unwrap();
    assert_refused(&scx_umcg(&["--socket", "/run/umcg-test-file"]), "is not a socket");
    assert_eq!(fs::read("/run/umcg-test-file").unwrap(), b"precious");
    assert_refused(&scx_umcg(&["--group", "no-such-group"]), "there is no group no-such-group");
    // A copy: the directories on the way to the original may be root's alone.
    fs::copy(LOADER, "/run/umcg-test-loader").unwrap();
    let mut by_nobody = Command::new("/run/umcg-test-loader");
    by_nobody.args(["--socket", "/tmp/umcg-test-nobody"]).uid(65534).gid(65534).stdin(Stdio::null());
    assert_refused(&by_nobody.output().unwrap(), "run it as root");
    assert_refused(&scx_umcg(&["--no-such-option"]), "unexpected argument '--no-such-option'");
    assert_unloaded();
}

fn connection(path: &Path) -> OwnedFd {
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    connect(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    fd
}

/// Says `hello` in one message; the error in the loader's answer.
fn say(path: &Path, hello: &[u8]) -> i32 {
    let client = connection(path);
    send(client.as_raw_fd(), hello, MsgFlags::empty()).unwrap();
    let mut answer = [0; 64];
    let length = recv(client.as_raw_fd(), &mut answer, MsgFlags::empty()).unwrap();
    assert!(length >= 4, "an answer of {length} bytes");
    i32::from_ne_bytes([answer[0], answer[1], answer[2], answer[3]])
}

fn hello(words: [u32; 4]) -> Vec<u8> {
    words.into_iter().flat_map(u32::to_ne_bytes).collect()
}

fn garbage() {
    const MAGIC: u32 = u32::from_le_bytes(*b"UMCG");

    let loader = Loader::start(&["--max-domains", "4"]);
    let path = loader.socket.as_path();
    for length in [1, 15, 17, 4096] {
        assert_eq!(say(path, &vec![0xa5; length]), -libc::EPROTO, "{length} bytes");
    }
    assert_eq!(say(path, &hello([0, 1, 1, 0])), -libc::EPROTO, "magic");
    assert_eq!(say(path, &hello([MAGIC, 2, 1, 0])), -libc::EPROTO, "another version");
    assert_eq!(say(path, &hello([MAGIC, 1, 0, 0])), -libc::EINVAL, "no tasks");
    assert_eq!(say(path, &hello([MAGIC, 1, 1, 1])), -libc::EINVAL, "reserved");
    for tasks in [1 << 20, u32::MAX] {
        assert_eq!(say(path, &hello([MAGIC, 1, tasks, 0])), -libc::ENOSPC, "{tasks} tasks");
    }
    // Clients that say nothing, and some that take a domain and go.
    let silent: Vec<_> = (0..100).map(|_| connection(path)).collect();
    for _ in 0..20 {
        let granted = say(path, &hello([MAGIC, 1, 8, 0]));
        assert!([0, -libc::ENOSPC].contains(&granted), "{granted}");
    }
    drop(silent);
    wait_until("the loader has nothing left of them", || loader.stat("nr_domains") == 0);
    assert_eq!(api::open(Some(path), 8, 0), 0);
    assert_eq!(api::backend(), "sched_ext");
    assert_eq!(loader.stat("nr_domains"), 1);
}

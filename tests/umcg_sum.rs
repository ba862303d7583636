// SPDX-License-Identifier: GPL-2.0-only
//! The example `umcg_sum` prints what sha256sum(1) prints, byte for byte. Here without a loader, with the futex back end;
//! `scripts/demo` does the same with one.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Cargo builds examples before it runs tests, next to the directory of the tests.
fn umcg_sum() -> Command {
    let test = env::current_exe().expect("a test has a path");
    let mut command = Command::new(test.with_file_name("../examples/umcg_sum"));
    command.env("UMCG_SOCKET", "/nonexistent/umcg.sock");
    command
}

fn output(command: &mut Command) -> Output {
    let output = command.output();
    output.unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"))
}

/// A tree whose names need escapes and whose order is neither that of creation nor that of path components.
fn tree(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = fs::remove_dir_all(&root);
    fs::create_dir_all(root.join("a/b")).unwrap();
    for (i, name) in [&b"z"[..], b"a/b/c", b"a-b", b"back\\slash", b"new\nline", b"re\rturn", b"\xff", b" * "]
        .into_iter()
        .enumerate()
    {
        // Lengths around the borders of SHA-256's blocks and of the reading buffer.
        let len = [0, 55, 56, 64, 65_535, 65_536, 65_537, 200_000][i];
        fs::write(root.join(OsStr::from_bytes(name)), vec![i as u8; len]).unwrap();
    }
    std::os::unix::fs::symlink("z", root.join("link")).unwrap();
    root
}

#[test]
fn sums_of_a_tree_are_those_of_sha256sum_sorted_by_path() {
    let root = tree("sorted");
    let names = [&b" * "[..], b"a-b", b"a/b/c", b"back\\slash", b"new\nline", b"re\rturn", b"z", b"\xff"];
    let expected =
        output(Command::new("sha256sum").args(names.map(|name| root.join(OsStr::from_bytes(name)))));
    for workers in ["1", "3", "40"] {
        let ours = output(umcg_sum().args(["--servers", "2", "--workers", workers]).arg(&root));
        assert!(ours.status.success(), "{ours:?}");
        assert_eq!(ours.stdout, expected.stdout, "{workers} workers");
        assert!(ours.stderr.is_empty(), "{ours:?}");
    }
}

#[test]
fn a_link_that_is_given_is_followed_and_a_missing_file_costs_the_status_only() {
    let root = tree("given");
    let given = [root.join("link"), root.join("missing"), root.join("z")];
    let expected = output(Command::new("sha256sum").args(&given));
    let ours = output(umcg_sum().args(&given));
    assert_eq!(ours.stdout, expected.stdout);
    assert_eq!(ours.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&ours.stderr).contains("missing: No such file"), "{ours:?}");
}

#[test]
fn statistics_say_that_blocking_is_not_seen_without_a_loader() {
    let ours = output(umcg_sum().arg("--stats").arg(tree("stats")));
    let stats = String::from_utf8_lossy(&ours.stderr);
    assert!(stats.contains("blocking is not seen"), "{stats}");
    assert!(stats.contains("at once    1 of one server's workers"), "{stats}");
}

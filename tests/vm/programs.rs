// SPDX-License-Identifier: GPL-2.0-only
//! Whole programs that schedule themselves: the examples, with the safe interface in Rust and with the library in C.
//!
//! scripts/test builds them. The failures this guards against: what works in a test's own process does not in a program
//! that has just been started; what works for root does not for a user of the socket's group.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::harness::{LOADER, Loader, Test};

pub const TESTS: &[Test] = &[
    Test::new("the_example_in_rust_works_with_the_scheduler", in_rust),
    Test::new("the_example_in_c_works_with_the_scheduler", in_c),
    Test::new("a_user_of_the_group_runs_the_example_and_others_may_not", users).own_loader(),
];

const SERVERS: &str = "2";
const WORKERS: &str = "8";

/// What the examples read.
const TREE: &str = "src";

fn beside_the_loader(path: &str) -> PathBuf {
    Path::new(LOADER).with_file_name(path)
}

/// Runs an example, as whom setpriv's options say. It finds none of the files in memory, so it has to wait for them.
fn run(program: &Path, loader: Option<&Loader>, user: &[&str]) -> Output {
    let mut command = Command::new("setpriv");
    command.args(user).arg("--").arg(program).args([
        "--stats",
        "--servers",
        SERVERS,
        "--workers",
        WORKERS,
        TREE,
    ]);
    if let Some(loader) = loader {
        command.env("UMCG_SOCKET", &loader.socket);
    }
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    command.stdin(Stdio::null()).output().expect("setpriv is there")
}

fn sha256sum() -> Vec<u8> {
    let find = format!("find {TREE} -type f | LC_ALL=C sort | xargs sha256sum");
    Command::new("sh").args(["-c", &find]).output().expect("a shell is there").stdout
}

/// Its sums are right, and the kernel told it of each block and each capture.
fn assert_works(output: &Output) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&sha256sum()));
    let number = |name: &str| {
        let line = said.lines().find_map(|line| line.strip_prefix(name));
        let number = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
        number.unwrap_or_else(|| panic!("{name} has no number in {said}"))
    };
    assert!(said.contains("back end   sched_ext"), "{said}");
    assert!(number("blocked") > 0, "{said}");
    assert_eq!(number("blocked"), number("captured"), "{said}");
    assert_eq!(number("at once"), 1, "{said}");
}

fn in_rust() {
    assert_works(&run(&beside_the_loader("examples/umcg_sum"), None, &[]));
}

fn in_c() {
    assert_works(&run(&beside_the_loader("examples/c/umcg_sum"), None, &[]));
}

fn users() {
    let loader = Loader::start(&["--group", "2000"]);
    let of_group = ["--reuid=1000", "--regid=2000", "--clear-groups", "--bounding-set=-all"];
    let also_of_group = ["--reuid=1000", "--regid=2001", "--groups=2000"];
    let of_another = ["--reuid=1000", "--regid=2001", "--clear-groups"];
    for (example, member) in [("examples/umcg_sum", &of_group[..]), ("examples/c/umcg_sum", &also_of_group)] {
        // A copy: the directories on the way to the original may be root's alone.
        let program = Path::new("/run/umcg-test-sum");
        fs::copy(beside_the_loader(example), program).unwrap();
        assert_works(&run(program, Some(&loader), member));

        let refused = run(program, Some(&loader), &of_another);
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(!refused.status.success() && refused.stdout.is_empty(), "{said}");
        assert!(said.contains("EACCES") || said.contains("Permission denied"), "{said}");
        fs::remove_file(program).unwrap();
    }
}

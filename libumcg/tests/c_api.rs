// SPDX-License-Identifier: MIT OR Apache-2.0
//! `include/umcg.h` and the library that it describes: the header compiles as C and as C++ without a warning, and a program
//! against it links with both forms of the library and works.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::LazyLock;

/// Where the library is. Cargo does not build shared and static libraries for tests of their package, so this does.
fn library_dir() -> &'static Path {
    static DIR: LazyLock<PathBuf> = LazyLock::new(|| {
        let tmp = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let target = tmp.parent().expect("it is in the target directory");
        run(Command::new(env!("CARGO"))
            .args(["build", "--package", "libumcg", "--target-dir"])
            .arg(target)
            .current_dir(env!("CARGO_MANIFEST_DIR")));
        target.join("debug")
    });
    &DIR
}

fn run(command: &mut Command) -> Output {
    let output = command.output().expect("the command can be started");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
    output
}

/// Compiles smoke.c, links it with `library` and runs it; it prints nothing, and no call does.
fn smoke(name: &str, compiler: &str, flags: &[&str], library: &[&str]) {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let dir = library_dir();
    run(Command::new(compiler)
        .args(flags)
        .args(["-Wall", "-Wextra", "-Werror", "-Wpedantic", "-pthread", "-I"])
        .arg(manifest.join("../include"))
        .arg(manifest.join("tests/smoke.c"))
        .args(["-x", "none", "-o"])
        .arg(&program)
        .arg("-L")
        .arg(dir)
        .args(library));
    let output = run(Command::new(&program).env("LD_LIBRARY_PATH", library_alias(dir)));
    assert!(output.stdout.is_empty() && output.stderr.is_empty(), "a call printed: {output:?}");
}

/// A directory in which the shared library has the name that its SONAME says; `scripts/install` makes that link, too.
fn library_alias(dir: &Path) -> PathBuf {
    let alias = Path::new(env!("CARGO_TARGET_TMPDIR")).join("lib");
    std::fs::create_dir_all(&alias).expect("target is writable");
    let link = alias.join("libumcg.so.0");
    let made = std::os::unix::fs::symlink(dir.join("libumcg.so"), &link);
    assert!(made.is_ok() || link.exists(), "cannot link {}", link.display());
    alias
}

#[test]
fn a_c_program_works_with_the_shared_library() {
    smoke("smoke-c", "cc", &["-std=c11", "-D_GNU_SOURCE"], &["-lumcg"]);
}

#[test]
fn a_c_program_works_with_the_static_library() {
    let archive = ["-l:libumcg.a", "-ldl", "-lm"];
    smoke("smoke-static", "cc", &["-std=c11", "-D_GNU_SOURCE"], &archive);
}

#[test]
fn a_cpp_program_works_with_the_shared_library() {
    let cpp = ["-x", "c++", "-std=c++17", "-D_GNU_SOURCE", "-Wno-old-style-cast"];
    smoke("smoke-cpp", "c++", &cpp, &["-lumcg"]);
}

#[test]
fn the_shared_library_exports_the_calls_and_nothing_else() {
    let library = library_dir().join("libumcg.so");
    let output = run(Command::new("nm").args(["-D", "--defined-only", "-f", "just-symbols"]).arg(library));
    let symbols = String::from_utf8(output.stdout).expect("symbols are ASCII");
    let mut symbols: Vec<&str> = symbols.lines().collect();
    symbols.sort_unstable();
    let calls = [
        "umcg_backend",
        "umcg_close",
        "umcg_kick",
        "umcg_open",
        "umcg_register",
        "umcg_self",
        "umcg_task_alloc",
        "umcg_task_free",
        "umcg_unregister",
        "umcg_wait",
    ];
    assert_eq!(symbols, calls);
}

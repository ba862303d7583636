// SPDX-License-Identifier: MIT OR Apache-2.0
//! `include/umcg.h` and the library that it describes: the header compiles as C and as C++ without a warning, and a program
//! against it links with both forms of the library and works.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::LazyLock;

use object::read::elf::{Dyn, FileHeader, Sym};
use object::{Endianness, elf};

const CALLS: [&str; 10] = [
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

/// Where the library is: libumcg.a, and the shared library under the names that `scripts/install` gives it. Cargo does not
/// build static libraries for tests of their package, so this does.
fn library_dir() -> &'static Path {
    static DIR: LazyLock<PathBuf> = LazyLock::new(|| {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
        let tmp = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let target = tmp.parent().expect("it is in the target directory");
        run(Command::new(env!("CARGO"))
            .args(["build", "--package", "libumcg", "--target-dir"])
            .arg(target)
            .current_dir(manifest));
        let dir = tmp.join("lib");
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir(&dir).expect("target is writable");
        symlink(target.join("debug/libumcg.a"), dir.join("libumcg.a")).expect("the directory is empty");
        symlink("libumcg.so.0", dir.join("libumcg.so")).expect("the directory is empty");
        run(Command::new(manifest.join("link")).arg(dir.join("libumcg.a")).arg(dir.join("libumcg.so.0")));
        dir
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
    let output = run(Command::new(&program).env("LD_LIBRARY_PATH", dir));
    assert!(output.stdout.is_empty() && output.stderr.is_empty(), "a call printed: {output:?}");
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

/// The names that `data`, a shared library, exports, each with its version; those without one have none.
fn exports(data: &[u8]) -> BTreeSet<(String, Option<String>)> {
    let file = elf::FileHeader64::<Endianness>::parse(data).expect("an ELF file");
    let endian = file.endian().expect("of an endianness");
    let sections = file.sections(endian, data).expect("with sections");
    let symbols = sections.symbols(endian, data, elf::SHT_DYNSYM).expect("with dynamic symbols");
    let versions = sections.versions(endian, data).expect("well-formed versions");
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("names are ASCII");
    let version = |index| {
        let versions = versions.as_ref()?;
        let version = versions.version(versions.version_index(endian, index)).expect("a known version")?;
        Some(text(version.name()))
    };
    symbols
        .enumerate()
        // The linker defines an absolute symbol for each version.
        .filter(|(_, symbol)| symbol.is_definition(endian) && symbol.st_shndx(endian) != elf::SHN_ABS)
        .map(|(index, symbol)| (text(symbols.symbol_name(endian, symbol).expect("a name")), version(index)))
        .collect()
}

#[test]
fn the_shared_library_exports_the_calls_in_their_version_and_nothing_else() {
    let data = fs::read(library_dir().join("libumcg.so.0")).expect("it has been linked");
    let expected = CALLS.map(|call| (call.to_owned(), Some("UMCG_0".to_owned())));
    assert_eq!(exports(&data), BTreeSet::from(expected));
}

#[test]
fn the_shared_library_is_found_by_its_soname() {
    let data = fs::read(library_dir().join("libumcg.so.0")).expect("it has been linked");
    let file = elf::FileHeader64::<Endianness>::parse(&*data).expect("an ELF file");
    let endian = file.endian().expect("of an endianness");
    let sections = file.sections(endian, &*data).expect("with sections");
    let (dynamic, strings) =
        sections.dynamic(endian, &*data).expect("well-formed").expect("with a dynamic section");
    let strings = sections.strings(endian, &*data, strings).expect("with strings");
    let soname =
        dynamic.iter().find(|entry| entry.tag32(endian) == Some(elf::DT_SONAME)).expect("with a name");
    assert_eq!(soname.string(endian, strings).expect("a string"), b"libumcg.so.0");
}

// SPDX-License-Identifier: MIT OR Apache-2.0
//! Each call of `include/umcg.h` has a manual page that says what header and contract say. The failure this guards against: a
//! program that handles the errors of a page, and meets another.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const HEADER: &str = include_str!("../../include/umcg.h");
const CONTRACT: &str = include_str!("../../docs/abi.md");

fn man_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../man")
}

/// What man(1) shows of a page; panics if it has something to complain about.
fn render(page: &Path) -> String {
    let output = Command::new("man")
        .args(["--warnings", "--no-hyphenation", "--no-justification", "--local-file"])
        .arg(page)
        .env("LC_ALL", "C")
        .env("MANWIDTH", "120")
        .env_remove("MANROFFOPT")
        .output()
        .expect("man is installed; run scripts/deps build");
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && complaints.is_empty(), "{}: {complaints}", page.display());
    String::from_utf8(output.stdout).expect("it is ASCII in this locale")
}

/// The sections of a rendered page, by title.
fn sections(page: &str) -> BTreeMap<&str, String> {
    let mut sections = BTreeMap::new();
    let mut title = "";
    for line in page.lines() {
        if line.starts_with(|c: char| !c.is_whitespace()) {
            title = line;
        }
        let section: &mut String = sections.entry(title).or_default();
        section.push_str(line);
        section.push('\n');
    }
    sections
}

fn page_of(call: &str) -> String {
    render(&man_dir().join(format!("{call}.3")))
}

fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The calls that the header declares: name, prototype, and the comment before it.
fn calls() -> Vec<(&'static str, &'static str, &'static str)> {
    let declared = HEADER.split("\n\n").filter_map(|paragraph| {
        let (comment, prototype) = paragraph.rsplit_once("*/\n")?;
        let (name, _) = prototype.split_once('(')?;
        let name = name.rsplit([' ', '*']).next()?;
        name.starts_with("umcg_").then_some((name, prototype, comment))
    });
    declared.collect()
}

/// The errnos that a text names, "-EINVAL" as "EINVAL".
fn errnos(text: &str) -> BTreeSet<&str> {
    let is_name = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit();
    text.split("-E")
        .skip(1)
        .filter_map(|rest| {
            let start = rest.as_ptr() as usize - text.as_ptr() as usize - 1;
            let len = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
            (len > 0).then(|| &text[start..=start + len])
        })
        .collect()
}

/// What the contract says of a call: its item of the list.
fn contract_of(call: &str) -> &'static str {
    let Some((_, item)) = CONTRACT.split_once(&format!("\n- `{call}`:")) else { return "" };
    let end = ["\n- ", "\n\n"].into_iter().filter_map(|end| item.find(end)).min();
    &item[..end.unwrap_or(item.len())]
}

#[test]
fn the_header_declares_ten_calls() {
    let names: Vec<_> = calls().into_iter().map(|(name, ..)| name).collect();
    assert_eq!(names.len(), 10, "{names:?}");
}

#[test]
fn every_call_has_a_page_with_its_prototype() {
    for (name, prototype, _) in calls() {
        let page = page_of(name);
        let sections = sections(&page);
        for title in ["NAME", "SYNOPSIS", "DESCRIPTION", "RETURN VALUE", "ERRORS", "SEE ALSO"] {
            assert!(sections.contains_key(title), "{name}(3) has no section {title}");
        }
        assert!(words(&sections["SYNOPSIS"]).contains(&words(prototype)), "{name}(3): not {prototype}");
    }
}

#[test]
fn every_page_lists_the_errors_of_the_contract_and_no_others() {
    for (name, prototype, comment) in calls() {
        let mut expected = errnos(contract_of(name));
        if prototype.contains("flags") {
            expected.insert("EINVAL"); // "unknown flags: -EINVAL everywhere"
        }
        assert!(errnos(comment).is_subset(&expected), "{name}: the header knows more than the contract");
        let page = page_of(name);
        let sections = sections(&page);
        assert_eq!(errnos(&sections["ERRORS"]), expected, "{name}(3)");
    }
}

#[test]
fn every_page_is_well_formed_and_refers_to_pages_that_exist() {
    let pages: Vec<_> = fs::read_dir(man_dir())
        .expect("there are pages")
        .map(|entry| entry.expect("readable").path())
        .collect();
    assert!(pages.len() > 11, "{pages:?}");
    for page in pages {
        let text = render(&page);
        let sections = sections(&text);
        for reference in sections["SEE ALSO"].split([' ', ',', '\n']).filter(|word| word.contains("umcg")) {
            let file = reference.replace('(', ".").replace(')', "");
            assert!(man_dir().join(file).exists(), "{}: no {reference}", page.display());
        }
    }
}

#[test]
fn the_example_of_the_overview_is_a_program_that_works() {
    let page = render(&man_dir().join("umcg.7"));
    let sections = sections(&page);
    let example = &sections["EXAMPLES"];
    let source = &example[example.find("#define").expect("it begins with that")..];
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (file, program) = (dir.join("umcg.7.c"), dir.join("umcg.7"));
    fs::write(&file, source).expect("target is writable");
    let archive = build();
    let status = Command::new("cc")
        .args(["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread", "-I"])
        .arg(man_dir().join("../include"))
        .arg("-o")
        .args([&program, &file, &archive])
        .args(["-lgcc_s", "-lm"])
        .status();
    assert!(status.expect("there is a compiler").success());
    let output = Command::new(program).env("UMCG_SOCKET", "/nonexistent").output().expect("it can be run");
    assert!(output.status.success(), "{output:?}");
    let mut lines: Vec<_> = std::str::from_utf8(&output.stdout).expect("ASCII").lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["four", "one", "three", "two"]);
}

/// The static library, which Cargo does not build for tests of its package.
fn build() -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("it is in the target directory");
    let status = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--package", "libumcg", "--target-dir"])
        .arg(target)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status();
    assert!(status.expect("cargo can be started").success());
    target.join("debug/libumcg.a")
}

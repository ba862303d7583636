// SPDX-License-Identifier: GPL-2.0-only
//! docs/abi.md, and the tests that its last chapter names.

#![allow(dead_code)] // each test that includes this has a use for some of it

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

pub const CONTRACT: &str = include_str!("../../docs/abi.md");
/// In place of the tests of a row.
pub const NONE_YET: &str = "none yet";

pub struct Row {
    pub promise: &'static str,
    pub tests: &'static str,
}

/// 2 for "## Calls", 0 for what is no heading.
fn level(line: &str) -> usize {
    let (hashes, _) = line.split_once(' ').unwrap_or_default();
    if hashes.bytes().all(|byte| byte == b'#') { hashes.len() } else { 0 }
}

/// The lines below a heading, up to the next one that is not below it.
pub fn chapter(text: &'static str, heading: &str) -> Vec<&'static str> {
    let is_below = |line: &&str| level(line) == 0 || level(line) > level(heading);
    let lines: Vec<_> =
        text.lines().skip_while(|line| *line != heading).skip(1).take_while(is_below).collect();
    assert!(!lines.is_empty(), "there is no chapter {heading}");
    lines
}

/// The rows of the tables of `columns` columns, cell by cell; their heads are not among them.
pub fn tables(chapter: &[&'static str], columns: usize) -> Vec<Vec<&'static str>> {
    let cells = |line: &'static str| line.strip_prefix("| ")?.strip_suffix(" |").map(|row| row.split('|'));
    let is_head = |at: usize| chapter.get(at + 1).is_some_and(|next| next.starts_with("|---"));
    let body = chapter.iter().enumerate().filter(|&(at, _)| !is_head(at));
    body.filter_map(|(_, line)| cells(line))
        .map(|cells| cells.map(str::trim).collect::<Vec<_>>())
        .filter(|row| row.len() == columns)
        .collect()
}

pub fn rows() -> Vec<Row> {
    let chapter = chapter(CONTRACT, "## Tests");
    let rows = tables(&chapter, 2);
    let lines = chapter.iter().filter(|line| line.starts_with("| ")).count();
    let tables = chapter.iter().filter(|line| line.starts_with("|---")).count();
    assert_eq!(rows.len() + tables, lines, "a row has not two columns");
    rows.into_iter().map(|row| Row { promise: row[0], tests: row[1] }).collect()
}

/// What stands in `backticks`.
pub fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

pub fn source(path: &str) -> Option<String> {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).ok()
}

/// The tests that need a virtual machine, and the files that they are in: what is given to `Test::new`, or to `test` of
/// capture.rs.
pub fn vm_tests() -> BTreeMap<String, String> {
    let dir = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vm")).expect("it is there");
    let mut tests = BTreeMap::new();
    for file in dir {
        let name = file.expect("readable").file_name().into_string().expect("UTF-8");
        let path = format!("tests/vm/{name}");
        let text = source(&path).expect("Rust is UTF-8");
        for start in ["Test::new(\"", " test(\""] {
            let names = text.split(start).skip(1).filter_map(|rest| Some(rest.split_once('"')?.0));
            tests.extend(names.map(|name| (name.to_owned(), path.clone())));
        }
    }
    assert!(tests.len() > 100, "they are not found any more");
    tests
}

/// Whether FILE has a function NAME that is a test.
pub fn is_native_test(test: &str) -> bool {
    let is_test = || {
        let (file, name) = test.split_once("::")?;
        let text = source(file)?;
        let (before, _) = text.split_once(&format!("fn {name}("))?;
        let mut attributes =
            before.trim_end().lines().rev().map(str::trim).take_while(|line| line.starts_with("#["));
        attributes.any(|line| line == "#[test]").then_some(())
    };
    is_test().is_some()
}

/// Whether `scripts/test` runs the script, and it is there.
pub fn is_script(path: &str) -> bool {
    let is_named = |line: &str| line.split_whitespace().any(|word| word == path);
    let runs = source("scripts/test").is_some_and(|text| text.lines().any(is_named));
    runs && source(path).is_some_and(|text| text.starts_with("#!"))
}

/// The file of a test that is named as in the contract, if there is that test.
pub fn file_of(test: &str, vm_tests: &BTreeMap<String, String>) -> Option<String> {
    match test.split_once("::") {
        Some((file, _)) => is_native_test(test).then(|| file.to_owned()),
        None if test.contains('/') => is_script(test).then(|| test.to_owned()),
        None => vm_tests.get(test).cloned(),
    }
}

pub fn assert_none(what: &str, names: impl IntoIterator<Item = impl ToString>) {
    let names: Vec<_> = names.into_iter().map(|name| name.to_string()).collect();
    assert!(names.is_empty(), "{what}:\n  {}", names.join("\n  "));
}

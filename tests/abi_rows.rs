// SPDX-License-Identifier: GPL-2.0-only
//! The last chapter of docs/abi.md names the tests of each promise; here it is held to its word.
//!
//! The failures this guards against: a test that a promise relies on is renamed or removed; a new call, error,
//! field or change of state comes without a test; a promise without a test is forgotten.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

const CONTRACT: &str = include_str!("../docs/abi.md");
const CHANGELOG: &str = include_str!("../CHANGELOG.md");
const NONE_YET: &str = "none yet";

struct Row {
    promise: &'static str,
    tests: &'static str,
}

/// 2 for "## Calls", 0 for what is no heading.
fn level(line: &str) -> usize {
    let (hashes, _) = line.split_once(' ').unwrap_or_default();
    if hashes.bytes().all(|byte| byte == b'#') { hashes.len() } else { 0 }
}

/// The lines below a heading, up to the next one that is not below it.
fn chapter(text: &'static str, heading: &str) -> Vec<&'static str> {
    let is_below = |line: &&str| level(line) == 0 || level(line) > level(heading);
    let lines: Vec<_> =
        text.lines().skip_while(|line| *line != heading).skip(1).take_while(is_below).collect();
    assert!(!lines.is_empty(), "there is no chapter {heading}");
    lines
}

/// The rows of the tables of `columns` columns, cell by cell; their heads are not among them.
fn tables(chapter: &[&'static str], columns: usize) -> Vec<Vec<&'static str>> {
    let cells = |line: &'static str| line.strip_prefix("| ")?.strip_suffix(" |").map(|row| row.split('|'));
    let is_head = |at: usize| chapter.get(at + 1).is_some_and(|next| next.starts_with("|---"));
    let body = chapter.iter().enumerate().filter(|&(at, _)| !is_head(at));
    body.filter_map(|(_, line)| cells(line))
        .map(|cells| cells.map(str::trim).collect::<Vec<_>>())
        .filter(|row| row.len() == columns)
        .collect()
}

fn rows() -> Vec<Row> {
    let chapter = chapter(CONTRACT, "## Tests");
    let rows = tables(&chapter, 2);
    let lines = chapter.iter().filter(|line| line.starts_with("| ")).count();
    let tables = chapter.iter().filter(|line| line.starts_with("|---")).count();
    assert_eq!(rows.len() + tables, lines, "a row has not two columns");
    rows.into_iter().map(|row| Row { promise: row[0], tests: row[1] }).collect()
}

/// What stands in `backticks`.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

fn errors(text: &str) -> impl Iterator<Item = &str> {
    quoted(text).filter(|word| word.starts_with("-E"))
}

/// The items of a list, each on one line; their first lines start with `mark`, the others with as many blanks.
fn items(lines: &[&str], mark: &str) -> Vec<String> {
    let blanks = " ".repeat(mark.len());
    let mut items: Vec<String> = Vec::new();
    let mut is_inside = false;
    for line in lines {
        if let Some(first) = line.strip_prefix(mark) {
            items.push(first.to_owned());
            is_inside = true;
        } else if let Some((item, more)) =
            items.last_mut().filter(|_| is_inside).zip(line.strip_prefix(&blanks))
        {
            item.push(' ');
            item.push_str(more);
        } else {
            is_inside = false;
        }
    }
    items
}

fn source(path: &str) -> Option<String> {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).ok()
}

/// The tests that need a virtual machine: what is given to `Test::new`, or to `test` of capture.rs.
fn vm_tests() -> BTreeSet<String> {
    let dir = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vm")).expect("it is there");
    let mut names = BTreeSet::new();
    for file in dir {
        let text = fs::read_to_string(file.expect("readable").path()).expect("Rust is UTF-8");
        for start in ["Test::new(\"", " test(\""] {
            names.extend(
                text.split(start).skip(1).filter_map(|rest| Some(rest.split_once('"')?.0.to_owned())),
            );
        }
    }
    assert!(names.len() > 100, "they are not found any more");
    names
}

/// Whether FILE has a function NAME that is a test.
fn is_native_test(test: &str) -> bool {
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
fn is_script(path: &str) -> bool {
    let is_named = |line: &str| line.split_whitespace().any(|word| word == path);
    let runs = source("scripts/test").is_some_and(|text| text.lines().any(is_named));
    runs && source(path).is_some_and(|text| text.starts_with("#!"))
}

fn assert_none(what: &str, names: impl IntoIterator<Item = impl ToString>) {
    let names: Vec<_> = names.into_iter().map(|name| name.to_string()).collect();
    assert!(names.is_empty(), "{what}:\n  {}", names.join("\n  "));
}

#[test]
fn every_named_test_exists() {
    let vm = vm_tests();
    let exists = |test: &str| match test {
        _ if test.contains("::") => is_native_test(test),
        _ if test.contains('/') => is_script(test),
        _ => vm.contains(test),
    };
    let wrong_ones =
        ["a_test_that_nobody_wrote", "tests/abi_rows.rs::rows", "tests/no_file.rs::rows", "tests/layout.rs"];
    for wrong in wrong_ones {
        assert!(!exists(wrong), "{wrong} is taken for a test");
    }
    for Row { promise, tests } in rows() {
        let is_named = quoted(tests).next().is_some();
        assert!(is_named != (tests == NONE_YET), "neither tests nor none yet: {promise}");
        assert_none(promise, quoted(tests).filter(|test| !exists(test)));
    }
    let beyond = chapter(CONTRACT, "### Beyond the contract").join("\n");
    assert_none("beyond the contract", quoted(&beyond).filter(|test| !exists(test)));
}

#[test]
fn every_test_of_the_virtual_machine_is_named() {
    let chapter = chapter(CONTRACT, "## Tests").join("\n");
    let named: BTreeSet<_> = quoted(&chapter).collect();
    assert_none("in no row", vm_tests().iter().filter(|test| !named.contains(test.as_str())));
}

#[test]
fn every_call_and_error_has_a_row() {
    let chapter = chapter(CONTRACT, "## Calls");
    let fence = |line: &&&str| line.starts_with("```");
    let text: Vec<_> = chapter.iter().take_while(|line| !fence(line)).copied().collect();
    let prototypes = chapter.iter().skip_while(|line| !fence(line)).skip(1).take_while(|line| !fence(line));
    let mut expected = BTreeSet::new();
    for line in prototypes {
        let Some((head, arguments)) = line.split_once('(') else { continue };
        let call = head.rsplit([' ', '*']).next().unwrap_or(head);
        expected.insert(format!("`{call}`: "));
        if arguments.contains(" flags)") {
            expected.extend(errors(&text.join(" ")).map(|error| format!("`{call}`: `{error}`")));
        }
    }
    for item in items(&chapter, "- ") {
        let call = quoted(&item).next().expect("an item starts with its call");
        expected.extend(errors(&item).map(|error| format!("`{call}`: `{error}`")));
    }
    assert!(expected.len() > 30, "they are not found any more");
    let rows = rows();
    let has_row = |start: &String| rows.iter().any(|row| row.promise.starts_with(start.as_str()));
    assert_none("calls and errors without a row", expected.iter().filter(|start| !has_row(start)));
}

#[test]
fn every_field_and_change_has_a_row() {
    let chapter = chapter(CONTRACT, "## `struct umcg_task`");
    let (fields, changes) = (tables(&chapter, 5), tables(&chapter, 3));
    assert_eq!((fields.len(), changes.len()), (10, 7), "they are not found any more");
    let expected = fields.iter().map(|row| row[2]).chain(changes.iter().map(|row| row[0]));
    let rows = rows();
    let has_row = |start: &str| {
        rows.iter().any(|row| row.promise.strip_prefix(start).is_some_and(|rest| rest.starts_with(':')))
    };
    assert_none("fields and changes without a row", expected.filter(|start| !has_row(start)));
}

/// And the changelog names none that has one by now.
#[test]
fn the_changelog_names_the_promises_without_a_test() {
    let listed: BTreeSet<_> = items(&chapter(CHANGELOG, "### Not there yet"), "  - ").into_iter().collect();
    let rows = rows().into_iter().filter(|row| row.tests == NONE_YET);
    let without: BTreeSet<_> = rows.map(|row| row.promise.to_owned()).collect();
    assert_none("not in the changelog", without.difference(&listed));
    assert_none("not in the contract, or tested by now", listed.difference(&without));
}

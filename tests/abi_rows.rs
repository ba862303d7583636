// SPDX-License-Identifier: GPL-2.0-only
//! The last chapter of docs/abi.md names the tests of each promise; here it is held to its word.
//!
//! The failures this guards against: a test that a promise relies on is renamed or removed; a new call, error,
//! field or change of state comes without a test; a promise without a test is forgotten.

mod contract;

use std::collections::BTreeSet;

use contract::{CONTRACT, NONE_YET, Row, assert_none, chapter, file_of, quoted, rows, tables, vm_tests};

const CHANGELOG: &str = include_str!("../CHANGELOG.md");

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

#[test]
fn every_named_test_exists() {
    let vm = vm_tests();
    let exists = |test: &str| file_of(test, &vm).is_some();
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
    assert_none("in no row", vm_tests().keys().filter(|test| !named.contains(test.as_str())));
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

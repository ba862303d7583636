// SPDX-License-Identifier: GPL-2.0-only
//! tests/breakages.toml is held to its word; `scripts/breakages` is what applies it.
//!
//! The failures this guards against: a breakage that breaks nothing any more, because the code or the test has changed; a
//! promise whose tests nobody has ever seen fail.

#[path = "../contract/mod.rs"]
mod contract;
mod list;

use std::collections::BTreeSet;

use contract::{assert_none, file_of, quoted, rows, source, vm_tests};

#[test]
fn every_breakage_can_be_applied() {
    for breakage in list::read().breakages {
        assert!(!breakage.edits.is_empty(), "{} breaks nothing", breakage.name);
        for edit in breakage.edits {
            let text = source(&edit.file).unwrap_or_default();
            let times = text.matches(&edit.from).count();
            assert_eq!(times, 1, "{}: {} has this so often:\n{}", breakage.name, edit.file, edit.from);
            assert_ne!(edit.from, edit.to, "{}", breakage.name);
        }
    }
}

#[test]
fn every_breakage_has_a_name_of_its_own_and_tests_that_exist() {
    let vm = vm_tests();
    let mut names = BTreeSet::new();
    for breakage in list::read().breakages {
        assert!(!breakage.tests.is_empty(), "nobody is to notice: {}", breakage.name);
        assert_none(&breakage.name, breakage.tests.iter().filter(|test| file_of(test, &vm).is_none()));
        assert!(names.insert(breakage.name.clone()), "twice: {}", breakage.name);
    }
}

/// But for the exceptions, which have none.
#[test]
fn every_promise_that_has_tests_has_one_that_notices_a_breakage() {
    let list = list::read();
    let noticing: BTreeSet<_> = list.breakages.iter().flat_map(|breakage| &breakage.tests).collect();
    let is_covered = |tests: &str| quoted(tests).any(|test| noticing.contains(&test.to_owned()));
    let rows = rows().into_iter().filter(|row| quoted(row.tests).next().is_some());
    let uncovered: BTreeSet<_> = rows.filter(|row| !is_covered(row.tests)).map(|row| row.promise).collect();
    let excepted: BTreeSet<_> = list.exceptions.iter().map(|exception| exception.promise.as_str()).collect();
    assert_none("no breakage", uncovered.difference(&excepted));
    assert_none(
        "no exception: it has a breakage, or there is no such promise",
        excepted.difference(&uncovered),
    );
}

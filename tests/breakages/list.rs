// SPDX-License-Identifier: GPL-2.0-only
//! tests/breakages.toml as Rust sees it.

#![allow(dead_code)] // the check and the runner each have a use for some of it

use serde::Deserialize;

/// The code that keeps a promise, broken on purpose.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Breakage {
    /// What is broken.
    pub name: String,
    /// Those that must notice, named as in docs/abi.md.
    pub tests: Vec<String>,
    #[serde(rename = "edit")]
    pub edits: Vec<Edit>,
}

/// `from`, which stands once in `file`, becomes `to`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Edit {
    pub file: String,
    pub from: String,
    #[serde(default)]
    pub to: String,
}

/// A row of the contract that no breakage can reach.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exception {
    pub promise: String,
    pub reason: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct List {
    #[serde(rename = "breakage")]
    pub breakages: Vec<Breakage>,
    #[serde(rename = "exception", default)]
    pub exceptions: Vec<Exception>,
}

pub fn read() -> List {
    toml::from_str(include_str!("../breakages.toml")).expect("tests/breakages.toml is well-formed")
}

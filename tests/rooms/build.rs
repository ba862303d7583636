// SPDX-License-Identifier: GPL-2.0-only
//! Compiles the BPF side's algorithm rooms for the machine that builds.

use std::{fs, io};

fn main() -> io::Result<()> {
    for dir in ["native", "../../src/bpf", "../../include"] {
        for entry in fs::read_dir(dir)? {
            println!("cargo::rerun-if-changed={}", entry?.path().display());
        }
    }
    cc::Build::new()
        .file("native/rooms.c")
        .include("../../src/bpf")
        .include("../../include")
        .std("gnu11")
        // A model that fails panics inside an atomic, and unwinds through the room that called it.
        .flag("-fexceptions")
        .warnings_into_errors(true)
        .extra_warnings(true)
        .compile("rooms");
    Ok(())
}

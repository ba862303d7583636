// SPDX-License-Identifier: GPL-2.0-only
//! Compiles the BPF side and generates its skeleton.

use std::path::Path;
use std::{env, fs, io};

/// Everything that the BPF object is made of.
const SOURCES: [&str; 2] = ["src/bpf", "include"];

fn main() -> anyhow::Result<()> {
    if env::var("CARGO_CFG_TARGET_ARCH")? != "x86_64" {
        println!(
            "cargo::error=scx_umcg runs on x86-64 only: its BPF side tells user code from kernel code by x86 registers"
        );
        return Ok(());
    }
    for dir in SOURCES {
        rerun_if_changed(Path::new(dir))?;
    }
    scx_cargo::BpfBuilder::new()?.add_cflag("-Werror").enable_skel("src/bpf/umcg.bpf.c", "bpf").build()?;
    // tests/layout.rs compares the BTF of this object with the Rust mirror.
    println!("cargo::rustc-env=UMCG_BPF_OBJECT={}/bpf.bpf.o", env::var("OUT_DIR")?);
    Ok(())
}

/// Names each file: for a directory alone, cargo would miss edits on file systems with coarse times.
fn rerun_if_changed(dir: &Path) -> io::Result<()> {
    println!("cargo::rerun-if-changed={}", dir.display());
    for entry in fs::read_dir(dir)? {
        println!("cargo::rerun-if-changed={}", entry?.path().display());
    }
    Ok(())
}

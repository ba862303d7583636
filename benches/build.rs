// SPDX-License-Identifier: GPL-2.0-only
//! Compiles the peers, which are BPF schedulers too.

fn main() -> anyhow::Result<()> {
    println!("cargo::rerun-if-changed=bpf/peers.bpf.c");
    scx_cargo::BpfBuilder::new()?.add_cflag("-Werror").enable_skel("bpf/peers.bpf.c", "bpf").build()
}

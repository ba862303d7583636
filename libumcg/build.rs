// SPDX-License-Identifier: MIT OR Apache-2.0
//! Names the shared library as dynamic linkers look it up.

fn main() {
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libumcg.so.0");
    println!("cargo::rerun-if-changed=build.rs");
}

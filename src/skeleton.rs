// SPDX-License-Identifier: GPL-2.0-only
//! The skeleton that build.rs generates from src/bpf.
#![allow(missing_docs, dead_code, non_camel_case_types, non_snake_case, non_upper_case_globals)]
#![allow(clippy::all)]

include!(concat!(env!("OUT_DIR"), "/bpf_skel.rs"));

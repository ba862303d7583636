// SPDX-License-Identifier: GPL-2.0-only
//! What UMCG's operations cost, beside their peers in the same boot. `scripts/bench` runs it.
//!
//! Under `scripts/vm --icount` the guest's clock counts instructions, one a nanosecond, so that the figures are the same on
//! every machine; on real hardware they are nanoseconds.

mod bystanders;
mod clock;
mod crowd;
mod measure;
mod ours;
mod peers;
mod report;
mod schedulers;
#[allow(missing_docs, dead_code, non_camel_case_types, non_snake_case, non_upper_case_globals)]
#[allow(clippy::all, clippy::undocumented_unsafe_blocks)]
mod skeleton {
    include!(concat!(env!("OUT_DIR"), "/bpf_skel.rs"));
}

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Measures UMCG's operations and their peers.
#[derive(Parser)]
#[command(name = "umcg-bench", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measure on this machine, as root, and write the figures as JSON
    Measure(measure::Options),
    /// Print figures as a table or JSON, and compare them with a baseline; exits with 1 if one is worse
    Report(report::Options),
    /// Register tasks that stay where they are, until standard input ends
    #[command(hide = true)]
    Crowd {
        /// The loader's socket
        socket: PathBuf,
        /// How many
        tasks: u32,
    },
}

fn main() -> ExitCode {
    run().unwrap_or_else(|error| {
        eprintln!("umcg-bench: {error:#}");
        ExitCode::from(2)
    })
}

fn run() -> Result<ExitCode> {
    match Cli::parse().command {
        Command::Measure(options) => measure::run(&options).map(|()| ExitCode::SUCCESS),
        Command::Report(options) => report::run(&options),
        Command::Crowd { socket, tasks } => crowd::run(&socket, tasks).map(|()| ExitCode::SUCCESS),
    }
}

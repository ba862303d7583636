// SPDX-License-Identifier: GPL-2.0-only
//! scx_umcg: loads the BPF scheduler that gives UMCG, user-managed concurrency groups, to an unmodified
//! kernel, and serves *domains* (one process's tasks, and the memory they share with the scheduler).
//!
//! | room | what is in it |
//! |---|---|
//! | `args` | the command line |
//! | `serve` | the event loop, and what it holds: scheduler, sockets, clients |
//! | `run`, `status` | the commands |
//! | `scheduler` | the BPF side: open, load, attach, ask, exit report |
//! | `domains`, `slots` | who has which domain and which slots |
//! | `socket`, `bytes` | what is said to clients, and how |
//! | `stats` | the statistics |
//! | `precondition`, `process` | what must hold, and what is changed, before all that |

mod args;
mod bytes;
mod domains;
mod precondition;
mod process;
mod run;
mod scheduler;
mod serve;
#[allow(dead_code, non_camel_case_types)] // one mirror for all; C's names
mod shared_abi;
mod skeleton;
mod slots;
mod socket;
mod stats;
mod status;

use std::io::{IsTerminal, stderr};
use std::mem::MaybeUninit;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use log::LevelFilter;
use nix::sys::signal::Signal;
use simplelog::{ColorChoice, ConfigBuilder, TermLogger, TerminalMode};

use args::{Cli, Command, DEFAULT_SOCKET, LoadArgs};
use serve::{Service, Stop, open_files};

/// Own failures; also what clap uses for usage errors.
const FAILURE: u8 = 2;
/// `status`: nobody serves.
const NOT_SERVING: u8 = 1;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if !error.use_stderr() => error.exit(), // --help, --version
        Err(error) => {
            eprintln!("scx_umcg: {}", usage_error(&error));
            return ExitCode::from(FAILURE);
        }
    };
    let result = match &cli.command {
        None => start_log(LevelFilter::Info, cli.load.verbose).and_then(|()| serve(&cli.load)),
        // The command's standard error is its own.
        Some(Command::Run(args)) => {
            start_log(LevelFilter::Warn, args.load.verbose).and_then(|()| run::run(args))
        }
        Some(Command::Status(args)) => {
            status::status(args).map(|serving| if serving { 0 } else { NOT_SERVING })
        }
    };
    ExitCode::from(result.unwrap_or_else(|error| {
        complain(&error);
        FAILURE
    }))
}

/// Serves until SIGINT or SIGTERM; a hangup of the terminal is as good a reason to end.
fn serve(args: &LoadArgs) -> Result<u8> {
    const SIGNALS: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];
    let (_, signals) = process::prepare(open_files(args), &SIGNALS)?;
    let path = args.socket.as_deref().unwrap_or(Path::new(DEFAULT_SOCKET));
    let mut object = MaybeUninit::uninit();
    let mut service = Service::start(args, path, &mut object)?;
    match service.serve_until(&signals, |_| Ok(Some(())))? {
        Stop::Signal(()) => service.stop_and_report().map(|()| 0),
        Stop::Ejected => Err(service.ejection()),
    }
}

/// Logs to standard error: what this program says at `quiet` level, and more from everybody with each -v.
fn start_log(quiet: LevelFilter, verbose: u8) -> Result<()> {
    let mut config = ConfigBuilder::new();
    config.set_thread_level(LevelFilter::Off);
    let level = match verbose {
        0 => {
            config.add_filter_allow_str(env!("CARGO_CRATE_NAME"));
            quiet
        }
        1 => LevelFilter::Info,
        _ => LevelFilter::Debug,
    };
    let color = if stderr().is_terminal() { ColorChoice::Auto } else { ColorChoice::Never };
    Ok(TermLogger::init(level, config.build(), TerminalMode::Stderr, color)?)
}

/// What clap says first; then come hints and the usage, which --help has, too.
fn usage_error(error: &clap::Error) -> String {
    let message = error.render().to_string();
    let what = message.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ");
    let what = what.split_whitespace().collect::<Vec<_>>().join(" ");
    format!("{what}; see scx_umcg --help")
}

/// Prints `scx_umcg: what is wrong; what to do`, on one line.
fn complain(error: &anyhow::Error) {
    eprintln!("scx_umcg: {}", sentence(error));
}

/// The outermost message is `what; what to do`; the causes go between the two.
fn sentence(error: &anyhow::Error) -> String {
    let outermost = error.to_string();
    let (what, advice) = match outermost.rsplit_once("; ") {
        Some((what, advice)) => (what, Some(advice)),
        None => (outermost.as_str(), None),
    };
    let causes = error.chain().skip(1).map(ToString::to_string);
    let what = std::iter::once(what.to_owned()).chain(causes).collect::<Vec<_>>().join(": ");
    let sentence = advice.into_iter().fold(what, |what, advice| format!("{what}; {advice}"));
    sentence.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;

    #[test]
    fn usage_errors_are_one_line() {
        let error = |line: &str| usage_error(&Cli::try_parse_from(line.split_whitespace()).unwrap_err());
        assert_eq!(
            error("scx_umcg --no-such-option"),
            "unexpected argument '--no-such-option' found; see scx_umcg --help"
        );
        let missing = error("scx_umcg run");
        assert!(missing.contains("<CMD>...; see scx_umcg --help"), "{missing}");
    }

    #[test]
    fn advice_comes_last_and_all_is_one_line() {
        let error = anyhow!("disk\nfull").context("write failed").context("cannot save; make room");
        assert_eq!(sentence(&error), "cannot save: write failed: disk full; make room");
        assert_eq!(sentence(&anyhow!("plain")), "plain");
    }
}

// SPDX-License-Identifier: GPL-2.0-only
//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand};

/// Where the loader listens unless told otherwise; the client library looks there too.
pub(crate) const DEFAULT_SOCKET: &str = "/run/scx_umcg/umcg.sock";

/// Names the socket to the clients below `run`, and to `status`.
pub(crate) const SOCKET_ENV: &str = "UMCG_SOCKET";

const EXAMPLES: &str = "\
Examples:
  scx_umcg                          serve everybody in group root, until Ctrl-C
  scx_umcg --group umcg --stats 1   let group umcg in, print statistics every second
  scx_umcg -p                       leave all other threads to the kernel's own scheduler
  scx_umcg run -- ./server 8080     serve for one command
  scx_umcg status --json            what is going on, for scripts

Exit status: 0; status: 1 when nobody serves; run: that of CMD; 2 when scx_umcg itself fails or is ejected.";

/// UMCG, user-managed concurrency groups, on an unmodified kernel: loads the BPF scheduler and serves
/// domains to processes until SIGINT or SIGTERM.
#[derive(Debug, Parser)]
#[command(name = "scx_umcg", version, after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Load, run a command with UMCG_SOCKET set, unload, and exit with the command's status
    Run(RunArgs),
    /// Tell whether a loader serves, and its statistics; exits with 1 if none does
    Status(StatusArgs),
}

/// How to load and serve; for serving and for `run`.
#[derive(Args, Debug)]
pub(crate) struct LoadArgs {
    /// Schedule only threads that ask for it with SCHED_EXT; all others stay with the kernel's own scheduler
    #[arg(short, long)]
    pub(crate) partial: bool,

    /// Unix socket to listen on [default: /run/scx_umcg/umcg.sock; with `run`: a private one]
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,

    /// Group, by name or number, whose members may use UMCG besides root
    #[arg(long, value_name = "GROUP")]
    pub(crate) group: Option<String>,

    /// Domains at the same time, one for each process that uses UMCG
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) max_domains: u32,

    /// Tasks of all domains together; each takes 128 bytes of locked memory once its domain is open
    #[arg(long, value_name = "N", default_value_t = 16384, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub(crate) max_tasks: u32,

    /// Domains of one user, root aside [default: half of --max-domains]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) max_domains_per_user: Option<u32>,

    /// Tasks of all domains of one user, root aside [default: half of --max-tasks]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub(crate) max_tasks_per_user: Option<u32>,

    /// Time slice in microseconds
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 5000, value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
    pub(crate) slice_us: u32,

    /// The kernel ejects the scheduler when a runnable thread has not run for this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=30))]
    pub(crate) watchdog: u32,

    /// Print statistics on standard error every so many seconds
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) stats: Option<u32>,

    /// Bytes for the kernel's debug dump when it ejects the scheduler; 0 for the kernel's default
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    pub(crate) exit_dump_len: u32,

    /// Say more on standard error; twice for debug messages
    #[arg(short, long, action = ArgAction::Count)]
    pub(crate) verbose: u8,
}

#[derive(Args, Debug)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) load: LoadArgs,

    /// Command to run, and its arguments
    #[arg(value_name = "CMD", required = true, trailing_var_arg = true)]
    pub(crate) command: Vec<OsString>,
}

#[derive(Args, Debug)]
pub(crate) struct StatusArgs {
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,

    /// The loader's socket [default: $UMCG_SOCKET, else /run/scx_umcg/umcg.sock]
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_after_the_command_belong_to_the_command() {
        let cli = parse("scx_umcg run -p -- ls -p --socket").unwrap();
        let Some(Command::Run(run)) = cli.command else {
            panic!("not run: {cli:?}");
        };
        assert!(run.load.partial && run.load.socket.is_none());
        assert_eq!(run.command, ["ls", "-p", "--socket"]);
    }

    #[test]
    fn usage_errors_exit_with_2() {
        for line in [
            "scx_umcg --watchdog 0",
            "scx_umcg --watchdog 31",
            "scx_umcg --max-tasks 0",
            "scx_umcg run",
            "scx_umcg extra",
            "scx_umcg --partial run -- true",
        ] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn the_manual_has_every_option_of_this_version() {
        let manual = include_str!("../man/scx_umcg.8").replace("\\-", "-");
        let command = Cli::command();
        for command in command.get_subcommands().chain([&command]) {
            for option in command.get_arguments().filter_map(clap::Arg::get_long) {
                assert!(manual.contains(&format!("--{option}")), "{}: --{option}", command.get_name());
            }
        }
        let version = env!("CARGO_PKG_VERSION");
        assert!(manual.contains(&format!("\"scx_umcg {version}\"")), "not of {version}");
    }

    #[test]
    fn limits_have_the_documented_defaults() {
        let load = parse("scx_umcg").unwrap().load;
        assert_eq!((load.max_domains, load.max_tasks, load.watchdog), (64, 16384, 30));
    }
}

// SPDX-License-Identifier: GPL-2.0-only
//! `scx_umcg status`: does a loader serve, and what has it done?

use std::env;
use std::io::{ErrorKind, Write, stdout};
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};
use scx_stats::StatsClient;
use serde::Serialize;

use crate::args::{DEFAULT_SOCKET, SOCKET_ENV, StatusArgs};
use crate::stats::{Metrics, stats_path};

/// A loader that serves answers in much less.
const TIMEOUT_MS: u64 = 10_000;

/// What `--json` prints.
#[derive(Serialize)]
struct Status {
    serving: bool,
    socket: PathBuf,
    #[serde(flatten)]
    metrics: Option<Metrics>,
}

/// Prints the status of the loader; whether it serves.
pub(crate) fn status(args: &StatusArgs) -> Result<bool> {
    let socket = args
        .socket
        .clone()
        .or_else(|| env::var_os(SOCKET_ENV).map(PathBuf::from))
        .unwrap_or_else(|| DEFAULT_SOCKET.into());
    let metrics = read(&socket)?;
    let status = Status { serving: metrics.is_some(), socket, metrics };
    let text = if args.json { serde_json::to_string(&status)? } else { describe(&status) };
    writeln!(stdout(), "{}", text.trim_end()).context("cannot write the status; check standard output")?;
    Ok(status.serving)
}

fn describe(status: &Status) -> String {
    let socket = status.socket.display();
    match &status.metrics {
        Some(metrics) => format!("serving on {socket}\n{metrics}"),
        None => format!("not serving on {socket}"),
    }
}

/// The statistics of the loader that listens on `socket`; `None` if there is none.
fn read(socket: &std::path::Path) -> Result<Option<Metrics>> {
    let mut client = match StatsClient::new().set_path(stats_path(socket)).connect(Some(TIMEOUT_MS)) {
        Ok(client) => client,
        Err(error) => return no_connection(error),
    };
    client.request("stats", Vec::new()).map(Some).map_err(|error| {
        anyhow!("the loader at {} does not answer ({error:#}); start it again", socket.display())
    })
}

/// Tells a loader that is not there from one that is out of reach.
fn no_connection(error: anyhow::Error) -> Result<Option<Metrics>> {
    match error.downcast_ref::<std::io::Error>().map(std::io::Error::kind) {
        Some(ErrorKind::NotFound | ErrorKind::ConnectionRefused) => Ok(None),
        Some(ErrorKind::PermissionDenied) => {
            Err(error.context("may not ask the loader; be root, or in the group it was started with"))
        }
        _ => Err(error.context("cannot ask the loader; check --socket")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_socket_means_not_serving() {
        assert_eq!(read("/nonexistent/umcg.sock".as_ref()).unwrap(), None);
    }

    #[test]
    fn json_has_the_same_keys_for_everybody() {
        let status = Status { serving: false, socket: "/s".into(), metrics: None };
        assert_eq!(serde_json::to_string(&status).unwrap(), r#"{"serving":false,"socket":"/s"}"#);
        let status = Status { serving: true, metrics: Some(Metrics::default()), ..status };
        let json = serde_json::to_value(&status).unwrap();
        assert_eq!((&json["serving"], &json["waits"]), (&true.into(), &0.into()));
    }
}

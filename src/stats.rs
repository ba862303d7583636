// SPDX-License-Identifier: GPL-2.0-only
//! The statistics: one schema for the socket, for `status` and for `--stats`.
//!
//! The protocol is that of scx_stats, so its tools work: each request and each answer is a line of JSON.
//! scx_stats' own server takes a thread for each connection and lines of any length. Ours is part of the
//! event loop and bounded, because everybody in the socket's group may connect.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::Result;
use scx_stats::{Meta, StatsRequest, StatsResponse, ToJson};
use scx_stats_derive::Stats;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::shared_abi::umcg_stats;

/// Longest request; the longest that makes sense takes some 60 bytes.
const MAX_REQUEST_BYTES: usize = 4096;

/// All statistics. Counters and times are totals since the scheduler was loaded.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize, Stats)]
#[stat(desc = "UMCG scheduler", top, _om_prefix = "umcg_")]
pub(crate) struct Metrics {
    #[stat(desc = "full: schedules every thread; partial: only SCHED_EXT threads", _om_skip)]
    pub(crate) mode: String,
    #[stat(desc = "domains in use, one for each process")]
    pub(crate) nr_domains: u64,
    #[stat(desc = "tasks registered now")]
    pub(crate) nr_tasks: u64,
    #[stat(desc = "registrations of tasks")]
    pub(crate) registrations: u64,
    #[stat(desc = "umcg_wait() calls that reached the scheduler")]
    pub(crate) waits: u64,
    #[stat(desc = "of those, direct switches to a named task")]
    pub(crate) switches: u64,
    #[stat(desc = "workers that blocked in the kernel")]
    pub(crate) blocks: u64,
    #[stat(desc = "blocked workers that were captured at their return to user code")]
    pub(crate) captures: u64,
    #[stat(desc = "workers that were preempted")]
    pub(crate) preemptions: u64,
    #[stat(desc = "umcg_kick() calls")]
    pub(crate) kicks: u64,
    #[stat(desc = "ns that workers were blocked, until their capture")]
    pub(crate) blocked_ns: u64,
    #[stat(desc = "ns that captured workers waited to be run")]
    pub(crate) runnable_ns: u64,
    #[stat(desc = "held tasks let go for a moment, for the sched_ext watchdog")]
    pub(crate) refreshes: u64,
    #[stat(desc = "held tasks let go for a signal, job control, ptrace or the freezer")]
    pub(crate) signal_releases: u64,
    #[stat(desc = "released tasks that no CPU had fetched in time")]
    pub(crate) rescues: u64,
    #[stat(desc = "looks at all held tasks: 50 a second, or more for signals")]
    pub(crate) sweeps: u64,
}

impl Metrics {
    pub(crate) fn new(partial: bool, nr_domains: u64, nr_tasks: u64, counters: &umcg_stats) -> Self {
        Self {
            mode: if partial { "partial" } else { "full" }.into(),
            nr_domains,
            nr_tasks,
            registrations: counters.registrations,
            waits: counters.waits,
            switches: counters.switches,
            blocks: counters.blocks,
            captures: counters.captures,
            preemptions: counters.preemptions,
            kicks: counters.kicks,
            blocked_ns: counters.blocked_ns,
            runnable_ns: counters.runnable_ns,
            refreshes: counters.refreshes,
            signal_releases: counters.signal_releases,
            rescues: counters.rescues,
            sweeps: counters.sweeps,
        }
    }
}

/// One line for each field, with its description.
impl Display for Metrics {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        let values = self.to_json().map_err(|_| fmt::Error)?;
        for (name, field) in &Self::meta().fields {
            let value = match &values[name] {
                Value::String(text) => text.clone(),
                value => value.to_string(),
            };
            writeln!(f, "{name:>16} {value:>16}  {}", field.attrs.desc.as_deref().unwrap_or(""))?;
        }
        Ok(())
    }
}

/// Where the loader that listens on `socket` serves its statistics.
pub(crate) fn stats_path(socket: &Path) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(".stats");
    path.into()
}

/// Somebody who reads the statistics.
#[derive(Debug)]
pub(crate) struct Reader {
    stream: UnixStream,
    /// What has come since the last newline.
    input: Vec<u8>,
}

impl Reader {
    /// `stream` must not block.
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self { stream, input: Vec::new() }
    }

    /// Answers the requests that have come; whether to keep the connection. A client that asks faster
    /// than it reads the answers is let go.
    pub(crate) fn serve(&mut self, metrics: impl Fn() -> Result<Metrics>) -> bool {
        let mut chunk = [0; MAX_REQUEST_BYTES];
        match self.stream.read(&mut chunk) {
            Ok(0) => return false,
            Ok(n) => self.input.extend_from_slice(&chunk[..n]),
            Err(error) => {
                return matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted);
            }
        }
        while let Some(end) = self.input.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.input.drain(..=end).collect();
            if !self.send(&answer(&line, &metrics)) {
                return false;
            }
        }
        self.input.len() < MAX_REQUEST_BYTES
    }

    fn send(&mut self, response: &StatsResponse) -> bool {
        let Ok(mut line) = serde_json::to_vec(response) else {
            return false;
        };
        line.push(b'\n');
        self.stream.write(&line).is_ok_and(|n| n == line.len())
    }
}

impl AsFd for Reader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn answer(line: &[u8], metrics: impl Fn() -> Result<Metrics>) -> StatsResponse {
    let Ok(request) = serde_json::from_slice::<StatsRequest>(line) else {
        return response(libc::EINVAL, "not a request of scx_stats".into());
    };
    let target = request.args.get("target").map_or("top", String::as_str);
    match (request.req.as_str(), target) {
        ("stats", "top") => match metrics().and_then(|metrics| metrics.to_json()) {
            Ok(value) => response(0, value),
            Err(error) => response(libc::EIO, format!("{error:#}").into()),
        },
        ("stats_meta", _) => {
            let meta = Metrics::meta();
            let all = BTreeMap::from([(meta.name.clone(), meta)]);
            serde_json::to_value(all).map_or_else(
                |error| response(libc::EIO, error.to_string().into()),
                |value| response(0, value),
            )
        }
        _ => response(libc::EINVAL, "unknown request or target".into()),
    }
}

fn response(errno: i32, value: Value) -> StatsResponse {
    StatsResponse { errno, args: BTreeMap::from([("resp".into(), value)]) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};

    fn metrics() -> Result<Metrics> {
        Ok(Metrics::new(true, 2, 3, &umcg_stats { waits: 7, ..Default::default() }))
    }

    fn pair() -> (UnixStream, Reader) {
        let (client, server) = UnixStream::pair().unwrap();
        server.set_nonblocking(true).unwrap();
        (client, Reader::new(server))
    }

    #[test]
    fn the_top_target_is_all_there_is() {
        let top: Metrics =
            serde_json::from_value(answer(b"{\"req\":\"stats\"}", metrics).args["resp"].clone()).unwrap();
        assert_eq!((top.mode.as_str(), top.nr_tasks, top.waits), ("partial", 3, 7));
        let line = br#"{"req":"stats","args":{"target":"other"}}"#;
        assert_eq!(answer(line, metrics).errno, libc::EINVAL);
        assert_eq!(answer(b"\xff\n", metrics).errno, libc::EINVAL);
    }

    #[test]
    fn every_field_is_described() {
        for (name, field) in Metrics::meta().fields {
            assert!(field.attrs.desc.is_some(), "{name}");
        }
    }

    #[test]
    fn a_request_may_come_in_pieces_and_several_at_once() {
        let (mut client, mut reader) = pair();
        assert!(reader.serve(metrics), "nothing to read yet");
        client.write_all(b"{\"req\":").unwrap();
        assert!(reader.serve(metrics));
        client.write_all(b"\"stats\"}\n{\"req\":\"stats_meta\"}\n").unwrap();
        assert!(reader.serve(metrics));
        drop(reader);
        let lines: Vec<_> = BufReader::new(client).lines().map(Result::unwrap).collect();
        assert!(lines.len() == 2 && lines[0].contains("\"waits\":7") && lines[1].contains("umcg_wait()"));
    }

    #[test]
    fn a_line_without_end_ends_the_connection() {
        let (mut client, mut reader) = pair();
        client.write_all(&[b'x'; MAX_REQUEST_BYTES]).unwrap();
        assert!(!reader.serve(metrics));
    }

    #[test]
    fn a_client_that_never_reads_is_let_go() {
        let (mut client, mut reader) = pair();
        let requests = "{\"req\":\"stats_meta\"}\n".repeat(190); // answers: more than a socket holds
        client.write_all(requests.as_bytes()).unwrap();
        assert!(!reader.serve(metrics));
    }

    #[test]
    fn the_text_has_a_line_for_each_field() {
        let text = metrics().unwrap().to_string();
        assert_eq!(text.lines().count(), Metrics::meta().fields.len());
        assert!(text.contains("           waits                7  umcg_wait() calls"));
    }
}

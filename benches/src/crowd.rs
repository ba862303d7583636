// SPDX-License-Identifier: GPL-2.0-only
//! Tasks that are registered and do nothing: what they cost those that do something, and how much memory.

use std::io::{Read, Write, stdin, stdout};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Barrier};
use std::thread;

use anyhow::{Context, Result, ensure};
use umcg::Tid;

use crate::ours;

/// Of the threads, which need none.
const STACK_LEN: usize = 16 << 10;

/// A process with a domain of its own and registered tasks in it, until this is dropped.
pub(crate) struct Crowd(Child);

impl Crowd {
    /// Returns once its threads are there, not yet registered.
    pub(crate) fn gather(socket: &Path, tasks: u32) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("crowd").arg(socket).arg(tasks.to_string());
        let mut crowd = Self(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?);
        crowd.await_word()?;
        Ok(crowd)
    }

    /// Returns once all are registered.
    pub(crate) fn register(&mut self) -> Result<()> {
        self.0.stdin.as_mut().context("it has a pipe")?.write_all(b"x")?;
        self.await_word()
    }

    fn await_word(&mut self) -> Result<()> {
        let stdout = self.0.stdout.as_mut().context("it has a pipe")?;
        ensure!(stdout.read(&mut [0])? == 1, "a crowd did not gather; see above");
        Ok(())
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The process itself: a server, and workers that are never run. A letter on standard input has them register, its end
/// ends them.
pub(crate) fn run(socket: &Path, tasks: u32) -> Result<()> {
    let domain: &'static _ = Box::leak(Box::new(ours::open(socket, tasks)?));
    let me = Tid::current();
    let start = Arc::new(Barrier::new(tasks as usize));
    for _ in 1..tasks {
        let start = Arc::clone(&start);
        thread::Builder::new().stack_size(STACK_LEN).spawn(move || {
            start.wait();
            domain.register_worker(me).map(drop)
        })?;
    }
    say_done()?;
    stdin().read_exact(&mut [0])?;
    let server = domain.register_server()?;
    start.wait();
    let mut registered = 1;
    while registered < tasks {
        server.mark_runnable();
        registered += u32::try_from(server.take_runnable().count())?;
        if registered < tasks {
            server.run(None)?;
        }
    }
    say_done()?;
    stdin().read_to_end(&mut Vec::new())?;
    std::process::exit(0)
}

fn say_done() -> Result<()> {
    stdout().write_all(b"x")?;
    Ok(stdout().flush()?)
}

// SPDX-License-Identifier: GPL-2.0-only
//! UMCG's operations, between a server and its workers on one CPU.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;

use anyhow::{Result, ensure};
use umcg::{Backend, Domain, OpenOptions, Server, State, Tid};

use crate::clock::{Samples, now};
use crate::peers::Gate;

/// A domain for `tasks` tasks, of the loader at `socket`.
pub(crate) fn open(socket: &Path, tasks: u32) -> Result<Domain> {
    let domain = Domain::open(&OpenOptions::new(tasks).socket(socket))?;
    ensure!(domain.backend() == Backend::SchedExt, "no scheduler serves");
    Ok(domain)
}

/// A server runs a worker, which stops at once: there and back.
pub(crate) fn serve(domain: &Domain, rounds: u32) -> Result<Samples> {
    let server = domain.register_server()?;
    let (me, stop) = (Tid::current(), AtomicBool::new(false));
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let worker = domain.register_worker(me)?;
            while !stop.load(SeqCst) {
                worker.park()?;
            }
            Ok(())
        });
        let tid = await_runnable(&server)?;
        run(&server, tid)?;
        let mut samples = Samples::default();
        for _ in 0..rounds {
            let start = now();
            run(&server, tid)?;
            samples.add(start, now());
        }
        stop.store(true, SeqCst);
        run(&server, tid)?;
        worker.join().expect("it does not panic").map(|()| samples)
    })
}

/// A worker switches to another of its server, and that one back.
pub(crate) fn switch(domain: &Domain, rounds: u32) -> Result<Samples> {
    let server = domain.register_server()?;
    let (me, stop) = (Tid::current(), AtomicBool::new(false));
    thread::scope(|scope| {
        let answering = scope.spawn(|| {
            let worker = domain.register_worker(me)?;
            let asking = || Tid::new(worker.user_data() as u32).expect("the one that asks says who it is");
            while !stop.load(SeqCst) {
                worker.switch_to(asking())?;
            }
            anyhow::Ok(())
        });
        let answering_tid = await_runnable(&server)?;
        let answering_task = domain.task(answering_tid).expect("it is registered");
        let asking = scope.spawn(move || {
            let worker = domain.register_worker(me)?;
            answering_task.set_user_data(u64::from(Tid::current().get()));
            ensure!(worker.switch_to(answering_tid)?, "the other worker was not run");
            let mut samples = Samples::default();
            for _ in 0..rounds {
                let start = now();
                let switched = worker.switch_to(answering_tid)?;
                samples.add(start, now());
                ensure!(switched, "the other worker was not run");
            }
            Ok(samples)
        });
        let asking_tid = await_runnable(&server)?;
        run(&server, asking_tid)?;
        stop.store(true, SeqCst);
        run(&server, answering_tid)?;
        answering.join().expect("it does not panic")?;
        asking.join().expect("it does not panic")
    })
}

/// What blocking costs.
pub(crate) struct Blocking {
    /// From before the system call in which a worker blocks to its server's next user instruction.
    pub(crate) block: Samples,
    /// From before the server's system call that ends that, to the worker's next user instruction: the worker wakes, is
    /// captured, and its server runs it again.
    pub(crate) wake: Samples,
}

pub(crate) fn blocking(domain: &Domain, rounds: u32, gate: &Gate) -> Result<Blocking> {
    let server = domain.register_server()?;
    let me = Tid::current();
    let (blocking_at, woken_at) = (AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let _worker = domain.register_worker(me)?;
            for _ in 0..rounds {
                blocking_at.store(now(), SeqCst);
                gate.pass()?;
                woken_at.store(now(), SeqCst);
            }
            anyhow::Ok(())
        });
        let mut blocking = Blocking { block: Samples::default(), wake: Samples::default() };
        let tid = await_runnable(&server)?;
        run(&server, tid)?;
        for round in 0..rounds {
            let blocked_at = now();
            blocking.block.add(blocking_at.load(SeqCst), blocked_at);
            server.take_blocked().for_each(drop);
            ensure!(
                domain.task(tid).is_some_and(|worker| worker.state() == State::Blocked),
                "it did not block"
            );
            let opened_at = now();
            gate.open()?;
            let captured = await_runnable(&server)?;
            ensure!(captured == tid, "somebody else came");
            run(&server, tid)?; // until it blocks again
            if round > 0 {
                blocking.wake.add(opened_at, woken_at.load(SeqCst));
            }
        }
        worker.join().expect("it does not panic")?;
        Ok(blocking)
    })
}

/// Registering a thread as a server, and ending that.
pub(crate) fn register(domain: &Domain, rounds: u32) -> Result<(Samples, Samples)> {
    let (mut register, mut unregister) = (Samples::default(), Samples::default());
    for _ in 0..rounds {
        let start = now();
        let server = domain.register_server()?;
        let registered = now();
        drop(server);
        unregister.add(registered, now());
        register.add(start, registered);
    }
    Ok((register, unregister))
}

/// Opening a domain.
pub(crate) fn opening(socket: &Path, rounds: u32) -> Result<Samples> {
    let mut samples = Samples::default();
    for _ in 0..rounds {
        let start = now();
        let domain = open(socket, 16)?;
        samples.add(start, now());
        drop(domain);
    }
    Ok(samples)
}

/// Runs a worker until it stops. Events may come first.
fn run(server: &Server<'_>, worker: Tid) -> Result<()> {
    loop {
        server.mark_runnable();
        if server.run(Some(worker))? {
            return Ok(());
        }
    }
}

/// Waits for the one worker that becomes runnable next.
fn await_runnable(server: &Server<'_>) -> Result<Tid> {
    loop {
        server.mark_runnable();
        if let Some(worker) = server.take_runnable().next() {
            return worker.tid().ok_or_else(|| anyhow::anyhow!("a worker without a tid"));
        }
        server.run(None)?;
    }
}

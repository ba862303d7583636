// SPDX-License-Identifier: GPL-2.0-only
//! What a program can do today without UMCG, between two threads on one CPU.

use std::io::{PipeReader, PipeWriter, Read, Write, pipe};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::thread::{self, yield_now};

use anyhow::{Context, Result, ensure};
use nix::sys::eventfd::EventFd;

use crate::clock::{Samples, now};
use crate::schedulers::Floor;

/// What a thread sleeps at until another opens it, for one.
pub(crate) enum Gate {
    Pipe(PipeReader, PipeWriter),
    Futex(AtomicU32),
}

impl Gate {
    pub(crate) fn pipe() -> Result<Self> {
        let (reader, writer) = pipe()?;
        Ok(Self::Pipe(reader, writer))
    }

    pub(crate) fn futex() -> Result<Self> {
        Ok(Self::Futex(AtomicU32::new(0)))
    }

    pub(crate) fn pass(&self) -> Result<()> {
        match self {
            Self::Pipe(reader, _) => {
                let mut reader = reader;
                Ok(reader.read_exact(&mut [0])?)
            }
            Self::Futex(word) => take(word),
        }
    }

    pub(crate) fn open(&self) -> Result<()> {
        match self {
            Self::Pipe(_, writer) => {
                let mut writer = writer;
                Ok(writer.write_all(b"x")?)
            }
            Self::Futex(word) => post(word),
        }
    }
}

/// There and back: `sched_yield(2)` alone, which switches because nobody else is there.
pub(crate) fn yield_pair(rounds: u32) -> Result<Samples> {
    let (started, stop, answers) = (AtomicBool::new(false), AtomicBool::new(false), AtomicU32::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            started.store(true, SeqCst);
            while !stop.load(SeqCst) {
                answers.fetch_add(1, SeqCst);
                yield_now();
            }
        });
        while !started.load(SeqCst) {
            yield_now();
        }
        let before = answers.load(SeqCst);
        let samples = sample(rounds, yield_now);
        let answered = answers.load(SeqCst) - before;
        stop.store(true, SeqCst);
        ensure!(answered >= rounds / 2, "{answered} answers to {rounds} yields");
        Ok(samples)
    })
}

/// There and back between two tasks that `floor` knows.
pub(crate) fn floor_pair(floor: &Floor<'_>, rounds: u32) -> Result<Samples> {
    let (joined, stop, answers) = (AtomicBool::new(false), AtomicBool::new(false), AtomicU32::new(0));
    thread::scope(|scope| {
        let answering = scope.spawn(|| {
            let result = floor.join(1);
            joined.store(true, SeqCst);
            while result.is_ok() && !stop.load(SeqCst) {
                answers.fetch_add(1, SeqCst);
                yield_now();
            }
            floor.end();
            result
        });
        let result = floor.join(0);
        while !joined.load(SeqCst) {
            yield_now();
        }
        floor.begin();
        let samples = sample(rounds, yield_now);
        stop.store(true, SeqCst);
        yield_now();
        result.and(answering.join().expect("it does not panic"))?;
        let answered = answers.load(SeqCst);
        // A thread of the kernel's may come in between now and then.
        ensure!(answered >= rounds - rounds / 100, "{answered} answers to {rounds} yields");
        Ok(samples)
    })
}

/// There and back: wake the other one, and sleep until it wakes us.
pub(crate) fn futex_pair(rounds: u32) -> Result<Samples> {
    gate_pair(rounds, Gate::futex)
}

pub(crate) fn eventfd_pair(rounds: u32) -> Result<Samples> {
    let (there, back) = (EventFd::new()?, EventFd::new()?);
    ping_pong(
        rounds,
        || Ok(there.write(1).map(drop)?),
        || Ok(back.read().map(drop)?),
        || Ok(there.read().map(drop)?),
        || Ok(back.write(1).map(drop)?),
    )
}

pub(crate) fn pipe_pair(rounds: u32) -> Result<Samples> {
    gate_pair(rounds, Gate::pipe)
}

/// A pair that one kernel always runs in the same way: under EEVDF it is chance whether a woken thread preempts the one that woke it, and
/// stays so for thousands of rounds, unless the threads are SCHED_BATCH.
pub(crate) fn batch_pipe_pair(rounds: u32) -> Result<Samples> {
    let in_batch = || {
        // SAFETY: the parameter outlives the call.
        let set = unsafe {
            libc::sched_setscheduler(0, libc::SCHED_BATCH, &libc::sched_param { sched_priority: 0 })
        };
        ensure!(set == 0, "cannot become SCHED_BATCH: {}", std::io::Error::last_os_error());
        pipe_pair(rounds)
    };
    thread::scope(|scope| scope.spawn(in_batch).join().expect("it does not panic"))
}

fn gate_pair(rounds: u32, gate: impl Fn() -> Result<Gate>) -> Result<Samples> {
    let (there, back) = (gate()?, gate()?);
    ping_pong(rounds, || there.open(), || back.pass(), || there.pass(), || back.open())
}

/// From before a `read(2)` that blocks to the next user instruction of the thread that was waiting for the CPU.
pub(crate) fn block_to_other_thread(rounds: u32) -> Result<Samples> {
    let (mut reader, mut writer) = pipe()?;
    let (blocking_at, is_blocking) = (AtomicU64::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        let blocking = scope.spawn(|| {
            for _ in 0..rounds {
                blocking_at.store(now(), SeqCst);
                is_blocking.store(true, SeqCst);
                reader.read_exact(&mut [0])?;
            }
            std::io::Result::Ok(())
        });
        let mut samples = Samples::default();
        for _ in 0..rounds {
            while !is_blocking.load(SeqCst) {
                yield_now();
            }
            samples.add(blocking_at.load(SeqCst), now());
            is_blocking.store(false, SeqCst);
            writer.write_all(b"x")?;
        }
        blocking.join().expect("it does not panic")?;
        Ok(samples)
    })
}

/// From before a gate is opened, by a thread that sleeps next, to the next user instruction of the one that passes.
pub(crate) fn wake_up(rounds: u32, gate: impl Fn() -> Result<Gate>) -> Result<Samples> {
    let (there, back) = (gate()?, gate()?);
    let opened_at = AtomicU64::new(0);
    thread::scope(|scope| {
        let woken = scope.spawn(|| {
            let mut samples = Samples::default();
            for _ in 0..rounds {
                there.pass()?;
                samples.add(opened_at.load(SeqCst), now());
                back.open()?;
            }
            anyhow::Ok(samples)
        });
        for _ in 0..rounds {
            opened_at.store(now(), SeqCst);
            there.open()?;
            back.pass()?;
        }
        woken.join().expect("it does not panic")
    })
}

/// A system call that does nothing and never blocks.
pub(crate) fn system_call(rounds: u32) -> Samples {
    sample(rounds, || {
        // SAFETY: getppid(2) takes nothing and cannot fail.
        unsafe { libc::syscall(libc::SYS_getppid) };
    })
}

fn sample(rounds: u32, mut operation: impl FnMut()) -> Samples {
    let mut samples = Samples::default();
    for _ in 0..rounds {
        let start = now();
        operation();
        samples.add(start, now());
    }
    samples
}

fn ping_pong(
    rounds: u32,
    ping: impl Fn() -> Result<()>,
    await_pong: impl Fn() -> Result<()>,
    await_ping: impl Fn() -> Result<()> + Sync,
    pong: impl Fn() -> Result<()> + Sync,
) -> Result<Samples> {
    thread::scope(|scope| {
        let other = scope.spawn(|| (0..rounds).try_for_each(|_| await_ping().and_then(|()| pong())));
        let mut samples = Samples::default();
        for _ in 0..rounds {
            let start = now();
            ping()?;
            await_pong()?;
            samples.add(start, now());
        }
        other.join().expect("it does not panic").context("the other thread")?;
        Ok(samples)
    })
}

fn post(word: &AtomicU32) -> Result<()> {
    word.store(1, SeqCst);
    futex(word, libc::FUTEX_WAKE, 1);
    Ok(())
}

fn take(word: &AtomicU32) -> Result<()> {
    while word.load(SeqCst) == 0 {
        futex(word, libc::FUTEX_WAIT, 0);
    }
    word.store(0, SeqCst);
    Ok(())
}

fn futex(word: &AtomicU32, operation: i32, value: u32) {
    let operation = operation | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the word lives as long as the call; there is no timeout to point to. Callers look at the word again.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), operation, value, std::ptr::null::<libc::timespec>())
    };
}

// SPDX-License-Identifier: GPL-2.0-only
//! Capture has no misses: 2,000 blocks in a row, and not one instruction of user code before the worker was
//! run.
//!
//! Two witnesses. The worker reads its own status with the first instruction after the system call: not
//! RUNNING is a miss. The server sees the worker's counter stand still from the block until it runs the
//! worker, while it idles, spins or sleeps by turns.

use std::arch::asm;
use std::hint::spin_loop;
use std::io::{PipeReader, PipeWriter, Write, pipe};
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::sync::mpsc;
use std::thread::{sleep, spawn};
use std::time::Duration;

use crate::api::{NONE, RUNNING, STATE_MASK};
use crate::cast::{List, Task, Worker, become_server, become_worker, open, pin, retire};
use crate::harness::{Counters, Test};
use crate::rseq::{Area, assert_has_only, restart_without_rseq};
use crate::scene::{assert_only, assert_state, assert_was_captured};

use Cpus::{All, One};
use Sleep::{Nanosleep, Pipe};

pub const TESTS: &[Test] = &[
    test("capture_of_2000_nanosleeps_rseq_32_on_one_cpu", || in_a_row(Nanosleep, Some(32), One)),
    test("capture_of_2000_nanosleeps_rseq_32_on_all_cpus", || in_a_row(Nanosleep, Some(32), All)),
    test("capture_of_2000_nanosleeps_rseq_33_on_one_cpu", || in_a_row(Nanosleep, Some(33), One)),
    test("capture_of_2000_nanosleeps_rseq_33_on_all_cpus", || in_a_row(Nanosleep, Some(33), All)),
    test("capture_of_2000_nanosleeps_no_rseq_on_all_cpus", || in_a_row(Nanosleep, None, All)),
    test("capture_of_2000_pipe_reads_rseq_32_on_one_cpu", || in_a_row(Pipe, Some(32), One)),
    test("capture_of_2000_pipe_reads_rseq_32_on_all_cpus", || in_a_row(Pipe, Some(32), All)),
    test("capture_of_2000_pipe_reads_rseq_33_on_one_cpu", || in_a_row(Pipe, Some(33), One)),
    test("capture_of_2000_pipe_reads_rseq_33_on_all_cpus", || in_a_row(Pipe, Some(33), All)),
    test("capture_of_2000_pipe_reads_no_rseq_on_all_cpus", || in_a_row(Pipe, None, All)),
];

const fn test(name: &'static str, run: fn()) -> Test {
    Test::new(name, run).limit_s(300)
}

/// How many blocks.
const TIMES: u64 = 2000;
/// A miss that is never captured after all fails the test by this many looks at the status.
const SPINS: u32 = 1 << 30;

#[derive(Clone, Copy)]
enum Sleep {
    /// Some 50 to 400 us, now and then none: the kernel decides whether it is over before it sleeps.
    Nanosleep,
    /// Until the server writes, after it has seen the block.
    Pipe,
}

/// Where all threads of the test may run.
enum Cpus {
    One,
    All,
}

/// System calls that the worker has returned from.
static CALLS: AtomicU64 = AtomicU64::new(0);
/// Of those, into user code while it was not RUNNING.
static MISSES: AtomicU64 = AtomicU64::new(0);
static STOP: AtomicBool = AtomicBool::new(false);

fn in_a_row(kind: Sleep, rseq_len: Option<u32>, cpus: Cpus) {
    restart_without_rseq();
    if matches!(cpus, Cpus::One) {
        pin(0);
    }
    let (reader, mut writer) = pipe().unwrap();
    open(4);
    let server = become_server();
    let counters = Counters::now();
    let worker = spawn_sleeper(server.tid(), kind, rseq_len, reader);
    server.await_runnable(worker.task);
    assert_eq!(CALLS.load(SeqCst), 0, "a worker ran before it was run");

    let waker = matches!(kind, Pipe).then_some(&mut writer);
    let moved = serve_blocks(server, worker.task, waker);
    STOP.store(true, SeqCst);
    server.run(worker.task);
    assert_state(worker.task, NONE);
    worker.thread.join().unwrap();
    retire(server);

    let (calls, misses) = (CALLS.load(SeqCst), MISSES.load(SeqCst));
    println!("{TIMES} blocks in {calls} calls: {misses} misses, {moved} seen by the server");
    assert_eq!((misses, moved), (0, 0), "user code ran before the worker was run");
    assert!(calls < 2 * TIMES, "most sleeps did not sleep");
    let blocks = counters.added("blocks");
    assert_eq!(blocks, counters.added("captures"));
    assert!(blocks >= TIMES, "blocks that the kernel side did not count");
}

/// Runs the worker until it has blocked TIMES times; each time it must come back once. Answers how often it
/// came to user code in between.
fn serve_blocks(server: &Task, worker: &Task, mut waker: Option<&mut PipeWriter>) -> u64 {
    let mut moved = 0;
    for nr in 0..TIMES {
        server.run(worker);
        assert_only(worker, &server.take(List::Blocked));
        let calls = CALLS.load(SeqCst);
        if let Some(writer) = &mut waker {
            writer.write_all(&[0]).unwrap();
        }
        look_around(nr);
        server.await_runnable(worker);
        assert_was_captured(worker);
        assert!(server.take(List::Blocked).is_empty(), "one block was reported twice");
        moved += u64::from(CALLS.load(SeqCst) != calls);
    }
    moved
}

/// The worker returns while its server idles, while it has the CPU, and while it leaves it to others.
fn look_around(nr: u64) {
    match nr % 3 {
        0 => {}
        1 => (0..2000).for_each(|_| spin_loop()),
        _ => sleep(Duration::from_micros(200)),
    }
}

fn spawn_sleeper(server: u32, kind: Sleep, rseq_len: Option<u32>, reader: PipeReader) -> Worker {
    let (sender, receiver) = mpsc::channel();
    let thread = spawn(move || {
        let area = rseq_len.map(Area::register);
        let task = Task::alloc();
        sender.send(task).unwrap();
        become_worker(task, server);
        while !STOP.load(SeqCst) {
            kind.call(task, &reader);
        }
        retire(task);
        assert_has_only(area);
    });
    Worker { task: receiver.recv().unwrap(), thread }
}

impl Sleep {
    /// One system call, and a look at the status with the first instruction after it.
    fn call(self, task: &Task, reader: &PipeReader) {
        let seen = match self {
            Nanosleep => {
                let us = CALLS.load(SeqCst) % 9 * 50;
                let time = libc::timespec { tv_sec: 0, tv_nsec: (us * 1000).cast_signed() };
                // SAFETY: nanosleep(2) reads the time, and writes nothing where there is no second argument.
                unsafe {
                    call_and_look(libc::SYS_nanosleep, [(&raw const time).addr(), 0, 0], 0, &task.status)
                }
            }
            Pipe => {
                let mut byte = 0_u8;
                let arguments = [reader.as_raw_fd().cast_unsigned() as usize, (&raw mut byte).addr(), 1];
                // SAFETY: read(2) writes one byte, for which there is room.
                unsafe { call_and_look(libc::SYS_read, arguments, 1, &task.status) }
            }
        };
        if seen & STATE_MASK != RUNNING {
            MISSES.fetch_add(1, SeqCst);
            await_late_capture(task);
        }
    }
}

/// The next switch captures who was missed; the count goes on when it is run.
fn await_late_capture(task: &Task) {
    let mut looks = 0..SPINS;
    while task.state() != RUNNING {
        looks.next().expect("a worker is in user code, was not captured, and nobody ever ran it");
    }
}

/// A system call that must answer `expected`. The next instruction reads `status`, the one after it counts
/// the call.
///
/// # Safety
///
/// The system call must be sound with these arguments.
unsafe fn call_and_look(nr: i64, arguments: [usize; 3], expected: i64, status: &AtomicU32) -> u32 {
    let (result, seen): (i64, u32);
    // SAFETY: the system call is the caller's promise; rcx and r11 are what it clobbers. Both words that are
    // accessed are atomics, by whole loads and a locked increment.
    unsafe {
        asm!(
            "syscall",
            "mov {seen:e}, dword ptr [{status}]",
            "lock inc qword ptr [{calls}]",
            seen = out(reg) seen,
            status = in(reg) status.as_ptr(),
            calls = in(reg) CALLS.as_ptr(),
            inlateout("rax") nr => result,
            in("rdi") arguments[0],
            in("rsi") arguments[1],
            in("rdx") arguments[2],
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    assert_eq!(result, expected, "system call {nr}");
    seen
}

// SPDX-License-Identifier: GPL-2.0-only
//! Tests of the whole, on a kernel with sched_ext: scripts/test runs this binary in a virtual machine.
//!
//! One file a behaviour. Each test runs in a process of its own, against one loader that serves them all
//! (tests of the loader itself start their own); after each, the loader must still serve and the kernel log
//! must be clean. Nothing here asserts on absolute times: tests wait for an end state, with a generous limit
//! that only turns a hang into a failure.

mod api;
mod cast;
mod client;
mod harness;
mod kernel_log;
mod scene;
mod userfault;

mod blocking;
mod bystanders;
mod capture;
mod endings;
mod enqueue;
mod first_run;
mod handlers;
mod held;
mod hostile;
mod killing;
mod loader;
mod loader_gone;
mod marked_runnable;
mod moving;
mod preempting;
mod programs;
mod registering;
mod rseq;
mod signals;
mod sleepers;
mod spawning;
mod stall;
mod stopping;
mod stress;
mod suspend;
mod timeouts;
mod users;
mod waiting;
mod words;

use std::process::ExitCode;

fn main() -> ExitCode {
    let tests = [
        blocking::TESTS,
        bystanders::TESTS,
        capture::TESTS,
        endings::TESTS,
        enqueue::TESTS,
        first_run::TESTS,
        handlers::TESTS,
        held::TESTS,
        hostile::TESTS,
        killing::TESTS,
        loader::TESTS,
        loader_gone::TESTS,
        marked_runnable::TESTS,
        moving::TESTS,
        preempting::TESTS,
        programs::TESTS,
        registering::TESTS,
        rseq::TESTS,
        signals::TESTS,
        sleepers::TESTS,
        spawning::TESTS,
        stopping::TESTS,
        stress::TESTS,
        suspend::TESTS,
        timeouts::TESTS,
        users::TESTS,
        waiting::TESTS,
        words::TESTS,
    ]
    .concat();
    harness::main(&tests)
}

// SPDX-License-Identifier: GPL-2.0-only
//! The machine suspends while a program runs. Around the time that it sleeps the kernel bypasses every BPF scheduler.
//!
//! The failures this guards against: a worker that was let go meanwhile and is on no list afterwards; a thread that waits
//! for ever; a machine that cannot suspend because the kernel cannot freeze a held worker.

use std::fs;
use std::thread::sleep;
use std::time::Duration;

use crate::api;
use crate::cast::{open, scaled};
use crate::harness::Test;
use crate::loader_gone::{Group, SERVERS, all_work_is_done};
use crate::scene::assert_blocks_are_seen;

pub const TESTS: &[Test] =
    &[Test::new("a_program_survives_the_suspend_of_its_machine", suspend).limit_s(600)];

/// Everything but the sleep itself: notifies the kernel's subsystems, freezes all threads, and after five seconds goes on.
fn suspend_the_machine() {
    fs::write("/sys/power/pm_test", "freezer").unwrap();
    fs::write("/sys/power/state", "freeze").unwrap();
}

fn suspend() {
    for _ in 0..scaled(10) {
        open(32);
        let groups: Vec<_> = (0..SERVERS).map(|_| Group::start()).collect();
        sleep(Duration::from_millis(20));
        suspend_the_machine();
        assert_eq!(api::backend(), "sched_ext");
        for group in groups {
            group.join();
        }
        all_work_is_done();
        assert_blocks_are_seen();
        assert_eq!(api::close(), 0);
    }
}

// SPDX-License-Identifier: GPL-2.0-only
//! A stall that is forced: a thread whose only CPU belongs to a real-time thread does not run, and nothing that a BPF
//! scheduler could do helps it. The kernel's watchdog ejects the scheduler.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use crate::cast::{nr_cpus, pin, spawn};
use crate::harness::Loader;

/// What the kernel says then, and of what: to the last, a line of its stack.
pub const STALLED: &[&str] = &[
    "disabled (runnable task stall)",
    "failed to run for",           // seen by the watchdog, from another CPU
    "watchdog failed to check in", // which has no other CPU to run on
    "Ext server ",                 // is turned off and on
    "+0x",
];

const DEBUGFS: &str = "/sys/kernel/debug";

/// A system-wide setting, until it is dropped.
struct Setting {
    path: String,
    before: String,
}

impl Setting {
    fn change(path: &str, value: &str) -> Self {
        let before = fs::read_to_string(path).unwrap();
        fs::write(path, value).unwrap();
        Self { path: path.to_owned(), before }
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        fs::write(&self.path, &self.before).unwrap();
    }
}

/// Takes from real-time threads what the kernel keeps for others.
fn leave_nothing_to_others(cpu: usize) -> Vec<Setting> {
    let mut settings = vec![Setting::change("/proc/sys/kernel/sched_rt_runtime_us", "-1")];
    if !Path::new(DEBUGFS).join("sched").exists() {
        let mounted = Command::new("mount").args(["-t", "debugfs", "none", DEBUGFS]).status().unwrap();
        assert!(mounted.success());
    }
    // Since 7.0; before, nothing is kept for SCHED_EXT.
    let server = format!("{DEBUGFS}/sched/ext_server/cpu{cpu}/runtime");
    if Path::new(&server).exists() {
        settings.push(Setting::change(&server, "0"));
    }
    settings
}

/// Stalls a thread until the loader, which has a short watchdog, has been told that its scheduler is ejected.
pub fn stall(mut loader: Loader) {
    let cpu = nr_cpus() - 1;
    let _settings = leave_nothing_to_others(cpu);
    let is_over = Arc::new(AtomicBool::new(false));
    let ends = is_over.clone();
    let victim = spawn(move || {
        pin(cpu);
        while !ends.load(SeqCst) {
            std::hint::spin_loop();
        }
    });
    let hog = std::thread::spawn(move || hog(cpu));
    assert_eq!(loader.wait().code(), Some(2));
    is_over.store(true, SeqCst);
    for thread in [hog, victim] {
        thread.join().unwrap();
    }
}

/// Does not leave `cpu` while the scheduler is there.
fn hog(cpu: usize) {
    pin(cpu);
    let parameters = libc::sched_param { sched_priority: 1 };
    // SAFETY: of the calling thread; the kernel only reads the parameters.
    assert_eq!(unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) }, 0);
    let enabled = || fs::read_to_string("/sys/kernel/sched_ext/state").unwrap() == "enabled\n";
    let deadline = Instant::now() + Duration::from_secs(60);
    while enabled() {
        assert!(Instant::now() < deadline, "nobody minds that a thread does not run");
        (0..1_000_000).for_each(|_| std::hint::spin_loop());
    }
}

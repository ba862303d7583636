// SPDX-License-Identifier: GPL-2.0-only
//! The kernel log of one test: whatever the kernel warns of while a test runs fails it.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;

/// What the emulated hardware makes the kernel say, whoever runs on it.
const NOISE: [&str; 4] = ["clocksource:", "hrtimer: interrupt took", "TSC", "perf: interrupt took too long"];
/// Said at a level that is not a warning, and fatal to us all the same.
const ALARMS: [&str; 5] = ["sched_ext: BPF scheduler \"umcg", "BUG:", "WARNING:", "Oops", "stall"];
/// The one thing that may be said of a scheduler that ended: it was asked to.
const ORDERLY: &str = "disabled (unregistered from user space)";
/// Said by a CPU whose ksoftirqd waits while the kernel bypasses a scheduler that comes or goes, any scheduler's:
/// <https://github.com/sched-ext/scx/issues/1259>.
const SOFTIRQ_WAITS: &str = "local softirq work is pending";
/// The scheduler has come or gone.
const CHANGED: &str = "sched_ext: BPF scheduler \"";
/// The longest that a slow machine has been seen to bypass a scheduler, and then some; in microseconds.
const BYPASS_US: u64 = 5_000_000;
/// Messages of this level and above (lower numbers) are warnings.
const KERN_WARNING: u32 = 4;

pub struct KernelLog {
    file: File,
    messages: Vec<Message>,
}

struct Message {
    level: u32,
    at_us: u64,
    text: String,
}

impl KernelLog {
    pub fn from_now() -> Self {
        let mut log = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg")
            .expect("cannot read the kernel log");
        log.seek(SeekFrom::End(0)).expect("cannot skip the old kernel log");
        Self { file: log, messages: Vec::new() }
    }

    /// Everything since `from_now`; /dev/kmsg tells each record once, so they are kept.
    fn messages(&mut self) -> &[Message] {
        let mut buffer = [0; 8192];
        loop {
            let length = match self.file.read(&mut buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => {
                    // EPIPE: records were overwritten before they were read, and nobody knows what they said.
                    let text = format!("the log is lost: {error}");
                    self.messages.push(Message { level: 0, at_us: 0, text });
                    if error.kind() != ErrorKind::BrokenPipe {
                        break;
                    }
                    continue;
                }
            };
            let record = String::from_utf8_lossy(&buffer[..length]);
            let Some((head, text)) = record.split_once(';') else { continue };
            let mut fields = head.split(',').map(|field| field.parse().unwrap_or(0)); // priority, number, time
            let level = fields.next().unwrap_or(0) as u32 & 7;
            let at_us = fields.nth(1).unwrap_or(0);
            let text = text.lines().next().unwrap_or("").to_owned();
            self.messages.push(Message { level, at_us, text });
        }
        &self.messages
    }

    /// The messages for a person who looks at a failure.
    pub fn all(&mut self) -> String {
        self.messages().iter().map(|message| format!("  kernel: {}\n", message.text)).collect()
    }

    /// Nothing bad but what is `expected`, and the first of that must be there.
    pub fn assert_clean(&mut self, expected: &[&str]) -> Result<(), String> {
        let is_expected = |message: &Message| expected.iter().any(|text| message.text.contains(text));
        let messages = self.messages();
        let is_bad = |(at, message): &(usize, &Message)| {
            message.is_bad() && !is_expected(message) && !message.is_of_bypass(&messages[*at..])
        };
        if let Some((_, message)) = messages.iter().enumerate().find(is_bad) {
            return Err(format!("the kernel log is not clean: {}", message.text));
        }
        match expected.first() {
            Some(text) if !messages.iter().any(|message| message.text.contains(text)) => {
                Err(format!("the kernel log has no line with: {text}"))
            }
            _ => Ok(()),
        }
    }
}

impl Message {
    /// Said while the kernel bypassed a scheduler, as what was said `from` here on shows.
    fn is_of_bypass(&self, from: &[Self]) -> bool {
        let changed = from.iter().find(|message| message.text.contains(CHANGED));
        self.text.contains(SOFTIRQ_WAITS)
            && changed.is_some_and(|change| change.at_us.saturating_sub(self.at_us) < BYPASS_US)
    }

    fn is_bad(&self) -> bool {
        if NOISE.iter().any(|noise| self.text.contains(noise)) || self.text.contains(ORDERLY) {
            return false;
        }
        let enabled = self.text.contains("\" enabled"); // or "enabled (partial)"
        self.level <= KERN_WARNING || (!enabled && ALARMS.iter().any(|alarm| self.text.contains(alarm)))
    }
}

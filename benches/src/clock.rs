// SPDX-License-Identifier: GPL-2.0-only
//! Intervals on CLOCK_MONOTONIC, without what reading the clock costs.

use std::sync::OnceLock;

use nix::time::{ClockId, clock_gettime};

/// Nanoseconds, which are instructions where the clock counts those.
pub(crate) fn now() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("every Linux has it");
    now.tv_sec().cast_unsigned() * 1_000_000_000 + now.tv_nsec().cast_unsigned()
}

/// From one reading to the next, when nothing is in between.
fn reading() -> u64 {
    static READING: OnceLock<u64> = OnceLock::new();
    *READING.get_or_init(|| {
        let mut costs: Vec<_> = (0..1001)
            .map(|_| {
                let start = now();
                now() - start
            })
            .collect();
        costs.sort_unstable();
        costs[costs.len() / 2]
    })
}

/// Intervals of one kind, in the order in which they were taken.
#[derive(Default)]
pub(crate) struct Samples(Vec<u64>);

impl Samples {
    pub(crate) fn add(&mut self, start: u64, end: u64) {
        self.0.push((end - start).saturating_sub(reading()));
    }

    /// Below which so many percent of them are.
    pub(crate) fn percentile(&self, percent: usize) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        sorted.get(sorted.len() * percent / 100).copied().unwrap_or(0) as f64
    }

    /// Of all, with whatever interrupts an operation now and then.
    pub(crate) fn mean(&self) -> f64 {
        mean(&self.0)
    }

    /// The mean of the best of five parts: what interrupts an operation regularly belongs to what it costs, the rest of the
    /// machine does not.
    pub(crate) fn undisturbed_mean(&self) -> f64 {
        let parts = self.0.chunks(self.0.len().div_ceil(PARTS).max(1));
        parts.map(mean).fold(f64::INFINITY, f64::min)
    }
}

const PARTS: usize = 5;

fn mean(samples: &[u64]) -> f64 {
    samples.iter().sum::<u64>() as f64 / samples.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disturbance_of_one_part_does_not_count() {
        let samples = Samples([vec![10; 20], vec![1000; 5], vec![10, 12]].concat());
        assert_eq!(samples.undisturbed_mean(), 10.0);
        assert!(samples.mean() > 150.0);
        assert_eq!((samples.percentile(50), samples.percentile(99)), (10.0, 1000.0));
    }
}

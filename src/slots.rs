// SPDX-License-Identifier: GPL-2.0-only
//! Which domain has which of the kernel side's slots.
//!
//! A domain of n tasks gets n slots in a row, so that the BPF side goes from cell to slot by an addition.
//! Slot 0 means "none". There are few domains and they come and go rarely, so first fit over a sorted list
//! will do.

use std::ops::Range;

/// The slots 1 to `nr_slots`, and the ranges of them that are taken.
#[derive(Debug)]
pub(crate) struct Slots {
    end: u32,
    /// Sorted, disjoint, none empty.
    taken: Vec<Range<u32>>,
}

impl Slots {
    /// All of `1..=nr_slots` free. `nr_slots` is below `u32::MAX`.
    pub(crate) fn new(nr_slots: u32) -> Self {
        Self { end: nr_slots + 1, taken: Vec::new() }
    }

    /// Takes the first gap that holds `n` slots; `None` if there is none, or `n` is 0.
    pub(crate) fn take(&mut self, n: u32) -> Option<Range<u32>> {
        if n == 0 {
            return None;
        }
        let mut start = 1;
        let mut at = 0;
        while at < self.taken.len() && self.taken[at].start - start < n {
            start = self.taken[at].end;
            at += 1;
        }
        if self.end - start < n {
            return None;
        }
        let range = start..start + n;
        self.taken.insert(at, range.clone());
        Some(range)
    }

    /// Gives back what `take` returned.
    pub(crate) fn give_back(&mut self, range: &Range<u32>) {
        self.taken.retain(|taken| taken != range);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slot_0_is_never_given_out() {
        assert_eq!(Slots::new(4).take(4), Some(1..5));
    }

    #[test]
    fn nothing_fits_beyond_the_end() {
        let mut slots = Slots::new(4);
        assert_eq!(slots.take(5), None);
        assert_eq!(slots.take(u32::MAX), None);
        assert_eq!(slots.take(0), None);
        assert_eq!(slots.take(3), Some(1..4));
        assert_eq!(slots.take(2), None);
        assert_eq!(slots.take(1), Some(4..5));
        assert_eq!(slots.take(1), None);
    }

    #[test]
    fn the_first_gap_that_is_wide_enough_is_used() {
        let mut slots = Slots::new(10);
        let ranges: Vec<_> = [2, 3, 2, 3].iter().map(|&n| slots.take(n).unwrap()).collect();
        slots.give_back(&ranges[0]);
        slots.give_back(&ranges[2]);
        assert_eq!(slots.take(3), None, "four are free, but no three in a row");
        assert_eq!(slots.take(1), Some(1..2));
        assert_eq!(slots.take(2), Some(6..8));
        assert_eq!(slots.take(1), Some(2..3));
    }

    #[test]
    fn neighbours_that_are_given_back_become_one_gap() {
        let mut slots = Slots::new(6);
        let ranges: Vec<_> = (0..3).map(|_| slots.take(2).unwrap()).collect();
        slots.give_back(&ranges[1]);
        slots.give_back(&ranges[0]);
        assert_eq!(slots.take(4), Some(1..5));
    }
}

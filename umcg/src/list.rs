// SPDX-License-Identifier: MIT OR Apache-2.0
//! Walking the two lists of a server.
//!
//! Head and links are addresses in memory that anybody may have written to. So each is looked up before it is
//! followed, and the walk ends after as many tasks as the domain has: what is not a task ends the list, and a circle
//! cannot trap us.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::layout::Cell;
use crate::memory::Memory;

/// The tasks of one list, from `addr` on. The next link is read before a task is handed out, for its new owner may
/// well run it at once.
pub(crate) struct Links<'a> {
    memory: &'a Memory,
    addr: u64,
    link: fn(&Cell) -> &AtomicU64,
    left: u32,
}

impl<'a> Links<'a> {
    pub(crate) fn new(memory: &'a Memory, addr: u64, link: fn(&Cell) -> &AtomicU64) -> Self {
        Self { memory, addr, link, left: memory.capacity() }
    }

    /// Takes the whole list. Pairs with the pushes, which are compare-and-exchange.
    pub(crate) fn take(memory: &'a Memory, head: &AtomicU64, link: fn(&Cell) -> &AtomicU64) -> Self {
        Self::new(memory, head.swap(0, Ordering::SeqCst), link)
    }
}

impl<'a> Iterator for Links<'a> {
    type Item = &'a Cell;

    fn next(&mut self) -> Option<&'a Cell> {
        self.left = self.left.checked_sub(1)?;
        let cell = self.memory.cell(self.memory.index_of(self.addr)?)?;
        self.addr = (self.link)(cell).load(Ordering::Acquire);
        Some(cell)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A domain whose first three cells are linked 1, 2, 3, and what a walk from 1 sees.
    fn walk(spoil: impl FnOnce(&[&Cell])) -> usize {
        let memory = Memory::of_our_own(3).unwrap();
        let cells: Vec<&Cell> = (0..3).map(|_| memory.alloc().unwrap()).collect();
        for pair in cells.windows(2) {
            pair[0].runnable_ptr.store(pair[1].addr(), Ordering::Relaxed);
        }
        spoil(&cells);
        let head = AtomicU64::new(cells[0].addr());
        let seen = Links::take(&memory, &head, |cell| &cell.runnable_ptr).count();
        assert_eq!(head.into_inner(), 0);
        seen
    }

    #[test]
    fn a_list_is_walked_to_its_end() {
        assert_eq!(walk(|_| {}), 3);
    }

    #[test]
    fn a_link_to_anything_but_a_task_ends_the_list() {
        for wild in [1, 64, u64::MAX] {
            assert_eq!(walk(|cells| cells[1].runnable_ptr.store(wild, Ordering::Relaxed)), 2);
        }
    }

    #[test]
    fn a_circle_does_not_trap_the_walk() {
        let seen = walk(|cells| {
            cells[2].runnable_ptr.store(cells[0].addr(), Ordering::Relaxed);
        });
        assert_eq!(seen, 3);
    }
}

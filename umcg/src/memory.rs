// SPDX-License-Identifier: MIT OR Apache-2.0
//! A domain's memory: the mapped cells, and who has which.
//!
//! Which cells are taken is kept outside the shared memory, where neither a wild store of the program's nor the
//! kernel can reach it. There is no lock: a worker may be stopped between any two instructions until its server runs it
//! again, and a server that waited for its lock would never do that.

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use crate::errno::Errno;
use crate::layout::{Cell, Header};
use crate::process::Generation;
use crate::shared_abi::{UMCG_ABI_VERSION, UMCG_MAGIC, UMCG_STATE_NONE};

/// Of a slot's owner: nobody's.
const FREE: u32 = 0;
/// Of a slot's owner: allocated, but not registered. No tid is that large.
const ALLOCATED: u32 = u32::MAX;
/// Beside the tid of a slot's owner: that thread has a count of the domain.
const COUNTED: u32 = 1 << 31;

/// Number of a cell, 1 to `nr_slots`.
pub(crate) type Index = u32;

/// A registered task.
#[derive(Clone, Copy)]
pub(crate) struct Registered<'a> {
    pub(crate) index: Index,
    pub(crate) tid: u32,
    pub(crate) cell: &'a Cell,
}

impl Registered<'_> {
    pub(crate) fn is_server(&self) -> bool {
        self.cell.is_server(self.tid)
    }
}

pub(crate) struct Memory {
    /// Cell 0, the header; `owners.len()` cells follow.
    base: NonNull<Cell>,
    mapped_len: NonZeroUsize,
    generation: Generation,
    /// FREE, ALLOCATED, or the tid of the thread that registered it and perhaps COUNTED, of cell index + 1.
    owners: Box<[AtomicU32]>,
    /// Where to look for a free cell first; a hint.
    next_free: AtomicU32,
    /// Cells from here on have never been allocated.
    used: AtomicU32,
}

// SAFETY: the pointer is to a mapping that lives as long as this, and all access to it is atomic.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Maps a domain that the loader made.
    pub(crate) fn of_loader(map: impl AsFd, nr_slots: u32) -> Result<Self, Errno> {
        let len = mapped_len(nr_slots)?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { mmap(None, len, prot, MapFlags::MAP_SHARED, map, 0) }?;
        let memory = Self::new(base, len, nr_slots)?;
        let header = memory.header();
        if header.magic.load(Ordering::Acquire) != UMCG_MAGIC
            || header.abi_version.load(Ordering::Relaxed) != UMCG_ABI_VERSION
            || header.nr_slots.load(Ordering::Relaxed) != nr_slots
        {
            return Err(Errno::EPROTO);
        }
        Ok(memory)
    }

    /// The same without a loader: as if its scheduler had stopped already.
    pub(crate) fn of_our_own(nr_slots: u32) -> Result<Self, Errno> {
        let len = mapped_len(nr_slots)?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { mmap_anonymous(None, len, prot, MapFlags::MAP_PRIVATE) }?;
        let memory = Self::new(base, len, nr_slots)?;
        let header = memory.header();
        header.magic.store(UMCG_MAGIC, Ordering::Relaxed);
        header.abi_version.store(UMCG_ABI_VERSION, Ordering::Relaxed);
        header.nr_slots.store(nr_slots, Ordering::Relaxed);
        header.epoch.store(1, Ordering::Release);
        Ok(memory)
    }

    /// Takes over a fresh mapping of `len` bytes, which has room for the header and `nr_slots` cells.
    fn new(base: NonNull<c_void>, len: NonZeroUsize, nr_slots: u32) -> Result<Self, Errno> {
        let mut memory = Self {
            base: base.cast(),
            mapped_len: len,
            generation: Generation::current(),
            owners: Box::default(),
            next_free: AtomicU32::new(0),
            used: AtomicU32::new(0),
        };
        // SAFETY: the mapping is ours, and this changes what a forked child sees of it only: nothing.
        unsafe { madvise(base, len.get(), MmapAdvise::MADV_DONTFORK) }?;
        let mut owners = Vec::new();
        owners.try_reserve_exact(nr_slots as usize).map_err(|_| Errno::ENOMEM)?;
        owners.resize_with(nr_slots as usize, || AtomicU32::new(FREE));
        memory.owners = owners.into_boxed_slice();
        Ok(memory)
    }

    pub(crate) fn capacity(&self) -> u32 {
        self.owners.len() as u32
    }

    /// False in a forked child: it has the parent's value, but not its mapping.
    #[inline]
    fn is_mapped(&self) -> bool {
        self.generation.is_current()
    }

    #[inline]
    pub(crate) fn header(&self) -> &Header {
        static DEAD: Header = Header::dead();

        if !self.is_mapped() {
            return &DEAD;
        }
        // SAFETY: cell 0 is mapped as long as self lives, is as large and aligned as a header, and both are atomics
        // throughout.
        unsafe { self.base.cast::<Header>().as_ref() }
    }

    pub(crate) fn cell(&self, index: Index) -> Option<&Cell> {
        self.owner(index).filter(|_| self.is_mapped())?;
        // SAFETY: 1 <= index <= nr_slots, for it has an owner: that cell is mapped as long as self lives.
        Some(unsafe { self.base.add(index as usize).as_ref() })
    }

    /// The cell whose `umcg_task` is at `addr`; none for addresses that are anything else.
    pub(crate) fn index_of(&self, addr: u64) -> Option<Index> {
        let offset = addr.checked_sub(self.base.addr().get() as u64)?;
        let size = size_of::<Cell>() as u64;
        let index = Index::try_from(offset / size).ok()?;
        (offset % size == 0 && self.owner(index).is_some()).then_some(index)
    }

    pub(crate) fn alloc(&self) -> Option<&Cell> {
        let start = self.next_free.load(Ordering::Relaxed);
        let nr_slots = self.capacity();
        let index = (start..nr_slots)
            .chain(0..start.min(nr_slots))
            .map(|slot| slot + 1)
            .find(|&index| self.change_owner(index, FREE, ALLOCATED))?;
        self.next_free.store(index, Ordering::Relaxed);
        self.used.fetch_max(index, Ordering::Release);
        let cell = self.cell(index)?;
        cell.clear();
        Some(cell)
    }

    /// Ignores cells that are not allocated, and those of registered tasks. Answers the thread that has left a count.
    pub(crate) fn free(&self, index: Index) -> Option<u32> {
        self.release(index, FREE)
    }

    /// Back to allocated, if its thread is a task no more; answers the thread that has left a count.
    pub(crate) fn disown(&self, index: Index) -> Option<u32> {
        tid_of(self.owner(index)?.load(Ordering::Acquire))?;
        self.release(index, ALLOCATED)
    }

    fn release(&self, index: Index, to: u32) -> Option<u32> {
        let owner = self.owner(index)?.load(Ordering::Acquire);
        // A thread that exits without a word leaves its tid here; the kernel side has set NONE.
        let released = !self.is_registered(index) && self.change_owner(index, owner, to);
        tid_of(owner).filter(|_| released && owner & COUNTED != 0 && self.is_mapped())
    }

    /// False if it is not allocated, or somebody's.
    pub(crate) fn take(&self, index: Index, tid: u32) -> bool {
        self.change_owner(index, ALLOCATED, tid)
    }

    /// Back to allocated.
    pub(crate) fn untake(&self, index: Index, tid: u32) {
        self.change_owner(index, tid, ALLOCATED);
    }

    /// The thread that took it has a count of the domain from now on, or has none any more.
    pub(crate) fn note_count(&self, index: Index, tid: u32, has_one: bool) {
        let (from, to) = if has_one { (tid, tid | COUNTED) } else { (tid | COUNTED, tid) };
        self.change_owner(index, from, to);
    }

    pub(crate) fn is_registered(&self, index: Index) -> bool {
        self.registered(index).is_some()
    }

    /// The registered task in that cell, by the tid that registered it: `umcg_tid` is the program's to scribble on.
    pub(crate) fn registered(&self, index: Index) -> Option<Registered<'_>> {
        let tid = tid_of(self.owner(index)?.load(Ordering::Acquire))?;
        let cell = self.cell(index)?;
        (cell.status.state() != UMCG_STATE_NONE).then_some(Registered { index, tid, cell })
    }

    pub(crate) fn all_registered(&self) -> impl Iterator<Item = Registered<'_>> {
        self.all_used().filter_map(|index| self.registered(index))
    }

    pub(crate) fn all_used(&self) -> impl Iterator<Item = Index> + use<> {
        1..=self.used.load(Ordering::Acquire)
    }

    pub(crate) fn find(&self, tid: u32) -> Option<Registered<'_>> {
        self.all_registered().find(|task| task.tid == tid)
    }

    fn owner(&self, index: Index) -> Option<&AtomicU32> {
        self.owners.get((index as usize).checked_sub(1)?)
    }

    fn change_owner(&self, index: Index, from: u32, to: u32) -> bool {
        self.owner(index).is_some_and(|owner| {
            owner.compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        })
    }
}

/// The thread that registered a slot with that owner.
fn tid_of(owner: u32) -> Option<u32> {
    (owner != FREE && owner != ALLOCATED).then_some(owner & !COUNTED)
}

impl Drop for Memory {
    fn drop(&mut self) {
        // In a forked child something else may be there by now.
        if self.is_mapped() {
            // SAFETY: exactly what `new` was given, and whoever borrowed from it borrowed from self. Unmapping
            // what is mapped does not fail.
            let _ = unsafe { munmap(self.base.cast(), self.mapped_len.get()) };
        }
    }
}

/// Header and cells, in bytes; the kernel rounds up to pages.
fn mapped_len(nr_slots: u32) -> Result<NonZeroUsize, Errno> {
    (nr_slots as usize)
        .checked_add(1)
        .and_then(|cells| cells.checked_mul(size_of::<Cell>()))
        .and_then(NonZeroUsize::new)
        .ok_or(Errno::ENOSPC)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_run_out_and_come_back() {
        let memory = Memory::of_our_own(3).unwrap();
        let cells: Vec<u64> = (0..3).map(|_| memory.alloc().unwrap().addr()).collect();
        assert!(memory.alloc().is_none(), "full");
        memory.free(memory.index_of(cells[1]).unwrap());
        assert_eq!(memory.alloc().map(Cell::addr), Some(cells[1]));
    }

    #[test]
    fn only_addresses_of_cells_are_tasks() {
        let memory = Memory::of_our_own(2).unwrap();
        let addr = memory.alloc().unwrap().addr();
        let size = size_of::<Cell>() as u64;
        assert_eq!(memory.index_of(addr), Some(1));
        for wrong in [0, addr - size, addr + 64, addr + 2 * size, u64::MAX] {
            assert_eq!(memory.index_of(wrong), None, "{wrong:#x}");
        }
    }

    #[test]
    fn a_registered_task_is_found_and_not_freed() {
        let memory = Memory::of_our_own(2).unwrap();
        let cell = memory.alloc().unwrap();
        let index = memory.index_of(cell.addr()).unwrap();
        assert!(memory.take(index, 77) && !memory.take(index, 78));
        cell.status.show(0);
        memory.free(index);
        assert_eq!(memory.find(77).map(|task| task.index), Some(index));

        // Exited by surprise: the kernel side says NONE, and the cell can be freed.
        cell.status.show(UMCG_STATE_NONE);
        assert!(memory.find(77).is_none());
        memory.free(index);
        assert!(!memory.take(index, 79), "free cells cannot be registered");
    }

    #[test]
    fn who_left_a_count_is_named_once() {
        let memory = Memory::of_our_own(1).unwrap();
        for has_left_it in [true, false] {
            let cell = memory.alloc().unwrap();
            let index = memory.index_of(cell.addr()).unwrap();
            assert!(memory.take(index, 77));
            memory.note_count(index, 77, true);
            cell.status.show(0);
            assert_eq!((memory.disown(index), memory.find(77).is_some()), (None, true), "registered");
            if !has_left_it {
                memory.note_count(index, 77, false);
            }
            cell.status.show(UMCG_STATE_NONE);
            assert_eq!(memory.disown(index), has_left_it.then_some(77));
            assert_eq!((memory.disown(index), memory.free(index)), (None, None));
        }
    }
}

// SPDX-License-Identifier: GPL-2.0-only
//! The algorithm rooms of the BPF side (custody, lists, status), compiled natively from the very files that
//! the kernel runs, for loom, a model checker.
//!
//! The rooms touch shared memory through four macros only (`src/bpf/atomic.bpf.h`). Here these end in a
//! [`Word32`] or [`Word64`], an atomic of loom's: loom runs a model again and again until every order of
//! the accesses, and every value that a weakly ordered load may see, has had its turn.
//!
//! A room sees a word as an address ([`At`]) that it can only hand back: it is no address of the machine, so
//! that an access that bypasses the macros, and thus the model checker, faults.
//!
//! A model that cannot fail proves nothing. So the races are also run on [`Atomics`] that are broken on
//! purpose, and are expected to find out.

use std::ffi::{CStr, c_char, c_void};
use std::marker::PhantomData;

use loom::sync::atomic::Ordering::{self, AcqRel, Acquire, Relaxed, SeqCst};
use loom::sync::atomic::{AtomicU32, AtomicU64, fence};

/// Runs a model of three threads in every order that takes at most two preemptions, a matter of seconds. All
/// orders take minutes; the breakages that the tests know take two preemptions at most.
pub fn check_three(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(2);
    builder.check(model);
}

/// What the rooms' atomics on a word are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Atomics {
    /// What `src/bpf/atomic.bpf.h` promises: indivisible exchanges that are full barriers.
    Kernel,
    /// Broken: an exchange is a load, and later a store.
    Torn,
    /// Broken: an exchange is indivisible, but not a barrier: a later load may overtake an earlier store.
    AcquireRelease,
    /// Broken: an exchange is indivisible, and orders nothing.
    Relaxed,
}

/// Set in the address that a room sees; the processor refuses such an address.
const NOT_CANONICAL: usize = 1 << 62;

/// The address of a word as a room sees it.
#[repr(transparent)]
pub struct At<'word, W>(*const c_void, PhantomData<&'word W>);

impl<'word, W> At<'word, W> {
    fn new(word: &'word W) -> Self {
        let address = std::ptr::from_ref(word).cast::<c_void>();
        At(address.map_addr(|a| a | NOT_CANONICAL), PhantomData)
    }

    fn word(&self) -> &'word W {
        let address = self.0.map_addr(|a| a & !NOT_CANONICAL).cast::<W>();
        // SAFETY: `new` is the only source of these, and borrows the word for 'word; rooms pass them on as
        // they are, and keep none beyond the call.
        unsafe { &*address }
    }
}

macro_rules! word {
    ($Word:ident, $Atomic:ident, $int:ty, $load:ident, $store:ident, $xchg:ident, $cmpxchg:ident) => {
        /// A word of shared memory.
        pub struct $Word {
            atomic: $Atomic,
            rooms: Atomics,
        }

        /// What the other side of the shared memory, in Rust, does with a word. Its atomics are never broken.
        impl $Word {
            /// A word whose value is `value`, and on which the rooms use `rooms`.
            pub fn new(value: $int, rooms: Atomics) -> Self {
                let atomic = $Atomic::new(value);
                Self { atomic, rooms }
            }

            /// What a room is to be given.
            pub fn at(&self) -> At<'_, Self> {
                At::new(self)
            }

            /// A plain load.
            pub fn load(&self) -> $int {
                self.atomic.load(Relaxed)
            }

            /// A plain store.
            pub fn store(&self, value: $int) {
                self.atomic.store(value, Relaxed);
            }

            /// Exchange, a full barrier.
            pub fn xchg(&self, value: $int) -> $int {
                // loom takes SeqCst on an access for AcqRel; fences it knows.
                fence(SeqCst);
                let old = self.atomic.swap(value, AcqRel);
                fence(SeqCst);
                old
            }

            /// Compare-and-exchange, a full barrier on x86 even where it fails; returns the former value.
            pub fn cmpxchg(&self, old: $int, new: $int) -> $int {
                fence(SeqCst);
                let now = self.exchange_if(old, new, AcqRel, Acquire);
                fence(SeqCst);
                now
            }

            fn exchange_if(&self, old: $int, new: $int, done: Ordering, failed: Ordering) -> $int {
                let result = self.atomic.compare_exchange(old, new, done, failed);
                result.unwrap_or_else(|now| now)
            }

            fn torn_cmpxchg(&self, old: $int, new: $int) -> $int {
                fence(SeqCst);
                let now = self.load();
                if now == old {
                    self.store(new);
                }
                fence(SeqCst);
                now
            }
        }

        #[unsafe(no_mangle)]
        extern "C-unwind" fn $load(at: At<'_, $Word>) -> $int {
            at.word().load()
        }

        #[unsafe(no_mangle)]
        extern "C-unwind" fn $store(at: At<'_, $Word>, value: $int) {
            at.word().store(value);
        }

        #[unsafe(no_mangle)]
        extern "C-unwind" fn $xchg(at: At<'_, $Word>, value: $int) -> $int {
            let word = at.word();
            match word.rooms {
                Atomics::Kernel => word.xchg(value),
                Atomics::Torn => {
                    let old = word.load();
                    word.store(value);
                    old
                }
                Atomics::AcquireRelease => word.atomic.swap(value, AcqRel),
                Atomics::Relaxed => word.atomic.swap(value, Relaxed),
            }
        }

        #[unsafe(no_mangle)]
        extern "C-unwind" fn $cmpxchg(at: At<'_, $Word>, old: $int, new: $int) -> $int {
            let word = at.word();
            match word.rooms {
                Atomics::Kernel => word.cmpxchg(old, new),
                Atomics::Torn => word.torn_cmpxchg(old, new),
                Atomics::AcquireRelease => word.exchange_if(old, new, AcqRel, Acquire),
                Atomics::Relaxed => word.exchange_if(old, new, Relaxed, Relaxed),
            }
        }
    };
}

word!(Word32, AtomicU32, u32, rooms_load32, rooms_store32, rooms_xchg32, rooms_cmpxchg32);
word!(Word64, AtomicU64, u64, rooms_load64, rooms_store64, rooms_xchg64, rooms_cmpxchg64);

// SAFETY: native/rooms.c defines all of these so; it does nothing with a word but hand it to the functions
// above, and is compiled to be unwound through.
unsafe extern "C-unwind" {
    /// `custody_hold()` of hold.bpf.h.
    #[link_name = "rooms_custody_hold"]
    pub safe fn custody_hold(custody: At<'_, Word32>);
    /// `custody_unhold()` of hold.bpf.h.
    #[link_name = "rooms_custody_unhold"]
    pub safe fn custody_unhold(custody: At<'_, Word32>);
    /// `custody_park()` of hold.bpf.h.
    #[link_name = "rooms_custody_park"]
    pub safe fn custody_park(custody: At<'_, Word32>) -> bool;
    /// `custody_release()` of hold.bpf.h.
    #[link_name = "rooms_custody_release"]
    pub safe fn custody_release(custody: At<'_, Word32>) -> bool;
    /// `custody_fetch()` of hold.bpf.h.
    #[link_name = "rooms_custody_fetch"]
    pub safe fn custody_fetch(custody: At<'_, Word32>) -> bool;
    /// `custody_is_held()` of hold.bpf.h.
    #[link_name = "rooms_custody_is_held"]
    pub safe fn custody_is_held(custody: At<'_, Word32>) -> bool;
    /// `list_push()` of list.bpf.h.
    #[link_name = "rooms_list_push"]
    pub safe fn list_push(head: At<'_, Word64>, link: At<'_, Word64>, addr: u64) -> bool;
    /// `status_move()` of state.bpf.h.
    #[link_name = "rooms_status_move"]
    pub safe fn status_move(status: At<'_, Word32>, from: u32, to: u32) -> bool;
    /// `status_show()` of state.bpf.h.
    #[link_name = "rooms_status_show"]
    pub safe fn status_show(status: At<'_, Word32>, to: u32);
    /// `state_may_become()` of state.bpf.h.
    #[link_name = "rooms_state_may_become"]
    pub safe fn state_may_become(from: u32, to: u32) -> bool;
    /// `UMCG_NR_STATES` of state.bpf.h.
    #[link_name = "rooms_nr_states"]
    pub safe fn nr_states() -> u32;
    safe fn rooms_edge(row: usize) -> Option<&'static Edge>;
}

/// `struct edge` of native/rooms.c.
#[repr(C)]
struct Edge {
    from: *const c_char,
    to: *const c_char,
}

/// The rows of `UMCG_EDGES` in state.bpf.h: the names of two states, without the prefix.
pub fn edges() -> impl Iterator<Item = (&'static str, &'static str)> {
    (0..)
        .map_while(|row| rooms_edge(row))
        // SAFETY: native/rooms.c fills the rows with string literals.
        .map(|edge| unsafe { (literal(edge.from), literal(edge.to)) })
}

/// # Safety
///
/// `text` must be a string literal of C.
unsafe fn literal(text: *const c_char) -> &'static str {
    // SAFETY: a string literal ends in NUL and lives as long as the program.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().expect("C names are ASCII")
}

// SPDX-License-Identifier: GPL-2.0-only
//! What sched_ext itself does with one task, as far as `hold.bpf.h` relies on it: `ops_state` with its
//! sequence number, the run queue's lock, and the moments at which it calls us. After `kernel/sched/ext.c`,
//! whose names the functions bear.

use loom::sync::Mutex;
use loom::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize};
use loom::thread::yield_now;
use umcg_rooms::{Atomics, Word32, custody_fetch, custody_hold, custody_park, custody_release};

/// `ops_state`: the state in the low bits, the sequence number of the last enqueue above.
const NONE: usize = 0;
const QUEUEING: usize = 1;
const QUEUED: usize = 2;
const DISPATCHING: usize = 3;
const STATE_MASK: usize = 3;
const SEQ_SHIFT: u32 = 2;

/// Under the lock of the task's run queue.
#[derive(Default)]
struct RunQueue {
    seq: usize,
    /// The task is in a queue from which a CPU will run it.
    has_task: bool,
    /// A CPU runs the task, or is switching it out.
    is_current: bool,
}

impl RunQueue {
    fn insert(&mut self) {
        assert!(!self.has_task, "the task was inserted twice");
        self.has_task = true;
    }
}

/// One task, as the core sees it, and its custody word.
pub struct Core {
    custody: Word32,
    ops_state: AtomicUsize,
    /// Set by a CPU between its claim and its insertion; cleared by whoever dequeues the task in between.
    holding_cpu: AtomicBool,
    rq: Mutex<RunQueue>,
    /// The domain's lock, and whether the task's state says that it may run user code.
    active: Mutex<bool>,
    /// How often it was run to go on to user code.
    runs: AtomicU32,
}

impl Core {
    /// A task that just stopped in a place where it may be held, and runs yet.
    pub fn held(atomics: Atomics) -> Self {
        let core = Self {
            custody: Word32::new(0, atomics),
            ops_state: AtomicUsize::new(NONE),
            holding_cpu: AtomicBool::new(false),
            rq: Mutex::new(RunQueue { is_current: true, ..RunQueue::default() }),
            active: Mutex::new(false),
            runs: AtomicU32::new(0),
        };
        custody_hold(core.custody.at());
        core
    }

    /// A task that was switched out and parked.
    pub fn parked(atomics: Atomics) -> Self {
        let core = Self::held(atomics);
        core.enqueue();
        core
    }

    /// `put_prev_task()` and `do_enqueue_task()`: the task is switched out, or comes back after a change.
    pub fn enqueue(&self) {
        let mut rq = self.rq.lock().expect("no poison");
        rq.is_current = false;
        self.do_enqueue_task(&mut rq);
    }

    fn do_enqueue_task(&self, rq: &mut RunQueue) {
        rq.seq += 1;
        let seq = rq.seq << SEQ_SHIFT;
        self.ops_state.store(QUEUEING | seq, Relaxed);
        if custody_park(self.custody.at()) {
            self.ops_state.store(QUEUED | seq, Release);
        } else {
            rq.insert();
            self.ops_state.store(NONE, Release);
        }
    }

    /// `sched_setaffinity()` and its like: `dequeue_task()`, the change, `enqueue_task()`, which leaves a task alone that runs.
    pub fn take_back(&self) {
        let mut rq = self.rq.lock().expect("no poison");
        if rq.is_current {
            return;
        }
        self.ops_dequeue();
        self.holding_cpu.store(false, Relaxed);
        rq.has_task = false;
        self.do_enqueue_task(&mut rq);
    }

    fn ops_dequeue(&self) {
        let now = self.ops_state.load(Acquire);
        let claim = |now| (self.ops_state).compare_exchange(now, NONE, Acquire, Acquire);
        if now & STATE_MASK == NONE || (now & STATE_MASK == QUEUED && claim(now).is_ok()) {
            return;
        }
        while self.ops_state.load(Acquire) & STATE_MASK == DISPATCHING {
            yield_now();
        }
    }

    /// ops.dispatch on some CPU that looks at the task: `fetch()` of queue.bpf.h.
    pub fn dispatch(&self) {
        if custody_fetch(self.custody.at()) {
            // scx_bpf_dsq_insert() notes the sequence number; once ops.dispatch has returned:
            let seq = self.ops_state.load(Relaxed) >> SEQ_SHIFT;
            self.finish_dispatch(seq);
        }
    }

    fn finish_dispatch(&self, seq: usize) {
        let claim = |now| (self.ops_state).compare_exchange(now, DISPATCHING, Acquire, Acquire);
        loop {
            let now = self.ops_state.load(Acquire);
            match now & STATE_MASK {
                QUEUED if now >> SEQ_SHIFT != seq => return,
                QUEUED if claim(now).is_ok() => return self.dispatch_to_local_dsq(),
                QUEUED => {}
                // wait_ops_state(); who enqueues has the lock, and is waited for without a spinning loop.
                QUEUEING => drop(self.rq.lock()),
                _ => return,
            }
        }
    }

    fn dispatch_to_local_dsq(&self) {
        self.holding_cpu.store(true, Relaxed);
        self.ops_state.store(NONE, Release);
        let mut rq = self.rq.lock().expect("no poison");
        if self.holding_cpu.load(Relaxed) {
            self.holding_cpu.store(false, Relaxed);
            rq.insert();
        }
    }

    /// A CPU runs the task if it is queued. At the boundary to user code it is held again, unless it may go on: `capture_locked()` of
    /// capture.bpf.h.
    pub fn run(&self) {
        {
            let mut rq = self.rq.lock().expect("no poison");
            if !rq.has_task {
                return;
            }
            rq.has_task = false;
            rq.is_current = true;
        }
        let goes_on = {
            let active = self.active.lock().expect("no poison");
            if !*active {
                custody_hold(self.custody.at());
            }
            *active
        };
        if goes_on {
            self.runs.fetch_add(1, Relaxed);
        } else {
            self.enqueue();
        }
    }

    /// `start_worker()` of wait.bpf.h, without the look that it asks some CPU for.
    pub fn start(&self) -> bool {
        let mut active = self.active.lock().expect("no poison");
        *active = true;
        custody_release(self.custody.at())
    }

    /// It is started, and some CPU looks at it.
    pub fn release(&self) {
        if self.start() {
            self.dispatch();
        }
    }

    /// The sweep lets it go, its state unchanged, and some CPU looks at it: `let_go()` of sweep.bpf.h.
    pub fn let_go(&self) {
        if custody_release(self.custody.at()) {
            self.dispatch();
        }
    }

    /// All CPUs are done: what is queued runs.
    pub fn settle(&self) {
        while self.rq.lock().expect("no poison").has_task {
            self.run();
        }
    }

    /// How often it went on to user code.
    pub fn runs(&self) -> u32 {
        self.runs.load(Relaxed)
    }

    /// Its custody word, for the steps that are no part of the core.
    pub fn custody(&self) -> &Word32 {
        &self.custody
    }
}

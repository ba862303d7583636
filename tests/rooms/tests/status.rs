// SPDX-License-Identifier: GPL-2.0-only
//! Program and kernel side change one status word, and neither loses what the other wrote.

use loom::sync::Arc;
use loom::thread;
use umcg_rooms::{Atomics, Word32, status_move, status_show};

const STATE_MASK: u32 = 0xff;
const RUNNING: u32 = 0;
const RUNNABLE: u32 = 1;
const BLOCKED: u32 = 2;
const NONE: u32 = 0xff;
const PREEMPT: u32 = 0x100;
const WAIT: u32 = 0x200;
/// Bits of the program's own.
const OWN: [u32; 2] = [0x0001_0000, 0x8000_0000];

/// What the contract asks of a program: compare-and-exchange on the whole word.
fn set_bits(status: &Word32, bits: u32) {
    let mut now = status.load();
    loop {
        match status.cmpxchg(now, now | bits) {
            seen if seen == now => return,
            seen => now = seen,
        }
    }
}

/// A worker blocks while another thread of the program sets two bits of its status, one after the other.
fn bits_while_blocking(atomics: Atomics) {
    let status = Arc::new(Word32::new(RUNNING | WAIT, atomics));
    let program = {
        let status = status.clone();
        thread::spawn(move || OWN.map(|bit| set_bits(&status, bit)))
    };
    let moved = status_move(status.at(), RUNNING, BLOCKED);
    program.join().expect("a panic of a thread is the model's");
    let status = status.load();
    assert!(moved, "the kernel side gave up");
    assert!(status == BLOCKED | WAIT | OWN[0] | OWN[1], "status: {status:#x}");
}

#[test]
fn a_change_of_state_loses_no_bits_of_the_program() {
    loom::model(|| bits_while_blocking(Atomics::Kernel));
}

#[test]
#[should_panic(expected = "status: ")]
fn torn_a_change_of_state_loses_bits_of_the_program() {
    loom::model(|| bits_while_blocking(Atomics::Torn));
}

/// Two want the server, or worker, that marked itself RUNNABLE.
fn two_take_the_mark(atomics: Atomics) {
    let status = Arc::new(Word32::new(RUNNABLE | OWN[0], atomics));
    let other = {
        let status = status.clone();
        thread::spawn(move || status_move(status.at(), RUNNABLE, RUNNING))
    };
    let won = status_move(status.at(), RUNNABLE, RUNNING);
    let other_won = other.join().expect("a panic of a thread is the model's");
    assert!(won != other_won, "won: {won}, {other_won}");
    assert!(status.load() == RUNNING | OWN[0]);
}

#[test]
fn of_two_that_take_a_mark_back_one_wins() {
    loom::model(|| two_take_the_mark(Atomics::Kernel));
}

#[test]
#[should_panic(expected = "won: true, true")]
fn torn_two_take_the_same_mark_back() {
    loom::model(|| two_take_the_mark(Atomics::Torn));
}

fn moved(status: u32, from: u32, to: u32) -> Option<u32> {
    let status = Word32::new(status, Atomics::Kernel);
    status_move(status.at(), from, to).then(|| status.load())
}

#[test]
fn a_change_of_state_ends_the_flags_that_end_with_it() {
    loom::model(|| {
        let all = PREEMPT | WAIT | OWN[0];
        // Leaving RUNNING ends a request to preempt.
        assert_eq!(moved(RUNNING | all, RUNNING, BLOCKED), Some(BLOCKED | WAIT | OWN[0]));
        // Becoming RUNNING ends the wait, too.
        assert_eq!(moved(RUNNABLE | all, RUNNABLE, RUNNING), Some(RUNNING | OWN[0]));
        assert_eq!(moved(RUNNABLE | all, RUNNING, BLOCKED), None);
    });
}

#[test]
fn a_state_is_shown_whatever_the_word_says() {
    loom::model(|| {
        for shown in [RUNNING, RUNNABLE, BLOCKED, NONE, 0x77] {
            for to in [RUNNING, RUNNABLE, BLOCKED, NONE] {
                let status = Word32::new(shown | OWN[1], Atomics::Kernel);
                status_show(status.at(), to);
                assert_eq!(status.load() & (STATE_MASK | OWN[1]), to | OWN[1]);
            }
        }
    });
}

/// An honest program makes two attempts fail at most, so the word need not be overwritten.
#[test]
fn a_state_is_shown_while_the_program_sets_bits() {
    loom::model(|| {
        let status = Arc::new(Word32::new(RUNNABLE, Atomics::Kernel));
        let program = {
            let status = status.clone();
            thread::spawn(move || OWN.map(|bit| set_bits(&status, bit)))
        };
        status_show(status.at(), RUNNING);
        program.join().expect("a panic of a thread is the model's");
        assert_eq!(status.load(), RUNNING | OWN[0] | OWN[1]);
    });
}

// SPDX-License-Identifier: GPL-2.0-only
//! The state machine of state.bpf.h is the table of changes in the contract, docs/abi.md, and nothing else.

use std::collections::BTreeSet;

use umcg_rooms::{edges, nr_states, state_may_become};

use State::*;

/// The kernel side's states, with their numbers in state.bpf.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum State {
    Free = 0,
    New = 1,
    Active = 2,
    Waiting = 3,
    Serving = 4,
    Blocked = 5,
}

const STATES: [State; 6] = [Free, New, Active, Waiting, Serving, Blocked];

impl State {
    /// Its name in state.bpf.h.
    fn name(self) -> String {
        format!("{self:?}").to_uppercase()
    }
}

/// The rows of the contract's table, as the program sees them, and what the kernel side does for each.
const CONTRACT: [(&str, &[(State, State)]); 7] = [
    ("NONE to RUNNING / RUNNABLE: umcg_register", &[(Free, Active), (Free, New)]),
    (
        "RUNNING to BLOCKED: the worker sleeps, or is picked while it sleeps",
        &[(Active, Blocked), (New, Blocked), (Waiting, Blocked)],
    ),
    ("BLOCKED to RUNNABLE: capture", &[(Blocked, Waiting)]),
    (
        "RUNNING to RUNNABLE: the task itself, before umcg_wait",
        &[(Active, Waiting), (Active, Serving), (New, Waiting)],
    ),
    ("RUNNING to RUNNABLE: preemption", &[(Active, Waiting)]),
    (
        "RUNNABLE to RUNNING: umcg_wait of a server or worker, an event, umcg_kick",
        &[(New, Active), (Waiting, Active), (Serving, Active)],
    ),
    (
        "any to NONE: umcg_unregister, exit, exec",
        &[(New, Free), (Active, Free), (Waiting, Free), (Serving, Free), (Blocked, Free)],
    ),
];

fn is_in_contract(from: State, to: State) -> bool {
    CONTRACT.iter().any(|(_, edges)| edges.contains(&(from, to)))
}

#[test]
fn the_table_names_the_edges_of_the_contract() {
    let contract: BTreeSet<_> =
        (CONTRACT.iter().flat_map(|(_, edges)| *edges)).map(|(from, to)| (from.name(), to.name())).collect();
    let table: Vec<_> = edges().map(|(from, to)| (from.to_owned(), to.to_owned())).collect();
    assert_eq!(table.iter().cloned().collect::<BTreeSet<_>>(), contract);
    assert_eq!(table.len(), contract.len(), "an edge is there twice");
}

#[test]
fn every_other_pair_is_rejected() {
    assert_eq!(nr_states() as usize, STATES.len());
    for from in STATES {
        for to in STATES {
            assert_eq!(
                state_may_become(from as u32, to as u32),
                is_in_contract(from, to),
                "{from:?} to {to:?}"
            );
        }
    }
}

#[test]
fn what_is_no_state_is_rejected() {
    for no_state in [nr_states(), 64, 0xff, u32::MAX] {
        for state in 0..nr_states() {
            assert!(!state_may_become(no_state, state), "{no_state} to {state}");
            assert!(!state_may_become(state, no_state), "{state} to {no_state}");
        }
    }
}

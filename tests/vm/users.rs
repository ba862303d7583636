// SPDX-License-Identifier: GPL-2.0-only
//! Who may use the loader, and how much of it.
//!
//! The failures this guards against: everybody on the machine may have threads held and released by root's scheduler;
//! one user opens all domains, and nobody else gets one.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nix::unistd::{Gid, Uid, setegid, seteuid, setgroups, setresgid, setresuid};

use crate::api;
use crate::cast::{in_child, load_program, wait_until};
use crate::harness::{Loader, Test};
use crate::scene::assert_blocks_are_seen;

pub const TESTS: &[Test] = &[
    Test::new("a_user_of_the_group_may_open_and_others_may_not", group).own_loader(),
    Test::new("a_user_gets_its_share_and_root_gets_all", share).own_loader(),
];

const USER: u32 = 1000;
const OTHER_USER: u32 = 1001;
const GROUP: u32 = 2000;
const OTHER_GROUP: u32 = 2001;

fn become_user(user: u32, group: u32) {
    let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(group));
    setgroups(&[]).unwrap();
    setresgid(gid, gid, gid).unwrap();
    setresuid(uid, uid, uid).unwrap();
}

fn open(loader: &Loader, max_tasks: u32) -> i32 {
    api::open(Some(&loader.socket), max_tasks, 0)
}

fn group() {
    let loader = Loader::start(&["--group", &GROUP.to_string()]);
    // The directory may be root's alone; what keeps others out is the socket itself.
    let dir = loader.socket.parent().map(Path::metadata).unwrap().unwrap();
    assert!(dir.permissions().mode() & 1 != 0);
    load_program(); // as root: other users may not lock memory
    in_child(|| {
        become_user(USER, OTHER_GROUP);
        assert_eq!(open(&loader, 1), -libc::EACCES);
    });
    in_child(|| {
        become_user(USER, GROUP);
        assert_eq!(open(&loader, 4), 0);
        assert_eq!(api::backend(), "sched_ext");
        assert_blocks_are_seen();
    });
}

fn share() {
    const OPTIONS: [&str; 8] = [
        "--max-domains",
        "8",
        "--max-tasks",
        "16",
        "--max-domains-per-user",
        "2",
        "--max-tasks-per-user",
        "9",
    ];

    let loader = Loader::start(&[&OPTIONS[..], &["--group", &GROUP.to_string()]].concat());
    let open_as = |user, max_tasks| {
        setegid(Gid::from_raw(GROUP)).unwrap();
        seteuid(Uid::from_raw(user)).unwrap();
        let answer = open(&loader, max_tasks);
        seteuid(Uid::from_raw(0)).unwrap();
        answer
    };
    // Each child has its parent's domain beside its own.
    in_child(|| {
        assert_eq!(open_as(USER, 10), -libc::ENOSPC, "more tasks than its share");
        assert_eq!(open_as(USER, 1), 0);
        in_child(|| {
            assert_eq!(open_as(USER, 9), -libc::ENOSPC, "more tasks than its share, in two domains");
            assert_eq!(open_as(USER, 7), 0);
            in_child(|| assert_eq!(open_as(USER, 1), -libc::ENOSPC, "more domains than its share"));
            in_child(|| assert_eq!(open_as(OTHER_USER, 8), 0));
            in_child(|| wait_until("there is room again", || open_as(0, 8) == 0));
            in_child(|| assert_eq!(open_as(0, 16), -libc::ENOSPC, "more tasks than there are"));
        });
    });
}

// SPDX-License-Identifier: GPL-2.0-only
//! Who may use the loader, and how much of it.
//!
//! The failures this guards against: everybody on the machine may have threads held and released by root's scheduler;
//! one user opens all domains, and nobody else gets one.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::Ordering::SeqCst;

use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, setegid, seteuid, setgroups, setresgid, setresuid};

use umcg::raw::UMCG_WAIT_ENQUEUE;

use crate::api::{self, RUNNABLE, RUNNING};
use crate::cast::{self, Task, become_server, in_child, load_program, retire, spawn_worker, wait_until};
use crate::harness::{Loader, Test};
use crate::scene::{assert_blocks_are_seen, lists_are_empty, run_to_end};

pub const TESTS: &[Test] = &[
    Test::new("a_user_of_the_group_may_open_and_others_may_not", group).own_loader(),
    Test::new("a_user_gets_its_share_and_root_gets_all", share).own_loader(),
    Test::new("there_are_no_more_domains_than_the_loader_allows", all_domains).own_loader(),
    Test::new("the_tasks_of_another_domain_are_nobody", strangers),
    Test::new("tids_are_those_of_the_processs_own_pid_namespace", pid_namespace),
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
    in_child(|| wait_until("root has all tasks", || open_as(0, 16) == 0));
    in_child(|| {
        wait_until("they are free again", || open_as(0, 1) == 0);
        in_child(|| {
            assert_eq!(open_as(0, 1), 0);
            in_child(|| assert_eq!(open_as(0, 1), 0, "root has more domains than a user"));
        });
    });
}

fn all_domains() {
    let loader = Loader::start(&["--max-domains", "2"]);
    in_child(|| {
        assert_eq!(open(&loader, 1), 0);
        in_child(|| {
            assert_eq!(open(&loader, 1), 0);
            in_child(|| assert_eq!(open(&loader, 1), -libc::ENOSPC));
        });
    });
}

/// What a process may try with the tids of another one's tasks.
fn strangers() {
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    in_child(|| {
        cast::open(2);
        let server = become_server();
        let worker = spawn_worker(server.tid(), |_| ());
        server.await_runnable(worker.task);
        let tids = [server.tid(), worker.task.tid()]; // the structs are not the child's
        in_child(|| {
            cast::open(4);
            try_strangers(tids);
            theirs.write_all(&[0]).unwrap();
        });
        ours.read_exact(&mut [0]).unwrap();
        assert_eq!((server.state(), worker.task.state()), (RUNNING, RUNNABLE));
        assert!(lists_are_empty(server));
        run_to_end(server, worker);
        retire(server);
    });
}

fn try_strangers(tids: [u32; 2]) {
    let me = become_server();
    for tid in tids {
        assert_eq!((me.switch_to(tid), me.state()), (-libc::ESRCH, RUNNING));
        assert_eq!(api::kick(tid, 0), -libc::ESRCH);
        let task = Task::alloc();
        task.server_tid.store(tid, SeqCst);
        task.status.store(RUNNABLE, SeqCst);
        let answer = std::thread::spawn(|| api::register(task.as_ptr(), 0)).join().unwrap();
        assert_eq!(answer, -libc::ESRCH);
    }
    let worker = spawn_worker(me.tid(), move |task| {
        let host = task.server_tid.load(SeqCst);
        for tid in tids {
            task.server_tid.store(tid, SeqCst);
            task.status.store(RUNNABLE, SeqCst);
            assert_eq!(api::wait(0, UMCG_WAIT_ENQUEUE), -libc::ESRCH);
        }
        task.server_tid.store(host, SeqCst);
    });
    me.await_runnable(worker.task);
    run_to_end(me, worker);
    retire(me);
}

fn pid_namespace() {
    load_program();
    in_child(|| {
        unshare(CloneFlags::CLONE_NEWPID).unwrap();
        in_child(|| {
            assert_eq!(std::process::id(), 1);
            cast::open(4);
            let server = become_server();
            assert_eq!(server.tid(), 1);
            assert_eq!(api::kick(1, 0), 0);
            retire(server);
            assert_blocks_are_seen();
        });
    });
}

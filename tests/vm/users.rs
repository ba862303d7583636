// SPDX-License-Identifier: GPL-2.0-only
//! Who may use the loader, and how much of it.
//!
//! The failures this guards against: everybody on the machine may have threads held and released by root's
//! scheduler; one user opens all domains, and nobody else gets one; a client reaches what is not its own by
//! its descriptors, or keeps memory that nobody counts.

use std::ffi::CStr;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::thread::sleep;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use nix::unistd::{Gid, Uid, setegid, seteuid, setgroups, setresgid, setresuid};

use umcg::raw::UMCG_WAIT_ENQUEUE;

use crate::api::{self, RUNNABLE, RUNNING};
use crate::cast::{self, Task, become_server, in_child, load_program, retire, spawn_worker, wait_until};
use crate::client::shared_abi::{
    UMCG_CTL_ATTACH, UMCG_CTL_KICK, UMCG_CTL_REGISTER, UMCG_CTL_UNREGISTER, umcg_ctl_args,
};
use crate::client::{Attr, Client, bpf};
use crate::harness::{Loader, Test};
use crate::scene::{assert_blocks_are_seen, lists_are_empty, run_to_end};

pub const TESTS: &[Test] = &[
    Test::new("a_user_of_the_group_may_open_and_others_may_not", group).own_loader(),
    Test::new("a_user_gets_its_share_and_root_gets_all", share).own_loader(),
    Test::new("there_are_no_more_domains_than_the_loader_allows", all_domains).own_loader(),
    Test::new("the_tasks_of_another_domain_are_nobody", strangers),
    Test::new("tids_are_those_of_the_processs_own_pid_namespace", pid_namespace),
    Test::new("the_control_program_refuses_what_is_not_the_callers", control).own_loader(),
    Test::new("with_its_descriptors_a_user_reaches_its_own_domain_only", descriptors).own_loader(),
    Test::new("memory_that_a_user_keeps_counts_until_it_is_gone", kept_memory).own_loader(),
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

/// Runs the control program for every mistake about whose a domain, a slot or a task is.
fn control() {
    let loader = Loader::start(&["--group", &GROUP.to_string()]);
    assert_eq!(open(&loader, 2), 0);
    let server = become_server();
    let worker = spawn_worker(server.tid(), |_| ());
    server.await_runnable(worker.task);
    let victim = own_domain(&loader);
    let tids = [server.tid(), worker.task.tid()];
    load_program();
    in_child(|| {
        setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY).unwrap(); // its own child locks, too
        become_user(USER, GROUP);
        let client = Client::open(&loader.socket, 4);
        assert_ne!(client.welcome.domain, victim);
        // Nobody's, until it is attached, and then only by whoever knows the nonce, once.
        let attach = |domain, nonce| {
            client.error(umcg_ctl_args { op: UMCG_CTL_ATTACH, domain, nonce, ..umcg_ctl_args::default() })
        };
        let register = |domain, slot| {
            client.error(umcg_ctl_args { op: UMCG_CTL_REGISTER, domain, slot, ..umcg_ctl_args::default() })
        };
        assert_eq!(register(client.welcome.domain, 1), -libc::EFAULT, "not attached");
        for nonce in [0, 1, !client.welcome.nonce, client.welcome.nonce] {
            assert_eq!(attach(victim, nonce), -libc::EPERM, "another's domain");
        }
        for domain in [64, u32::MAX] {
            assert_eq!(attach(domain, client.welcome.nonce), -libc::EINVAL, "no domain");
        }
        for nonce in [0, !client.welcome.nonce] {
            assert_eq!(attach(client.welcome.domain, nonce), -libc::EPERM);
        }
        client.attach();
        assert_eq!(attach(client.welcome.domain, client.welcome.nonce), -libc::EPERM, "twice");
        refused_to(&client, victim, tids);
        // Whoever has its descriptors is not the process that attached.
        in_child(|| {
            refused_to(&client, victim, tids);
            assert_eq!(register(client.welcome.domain, 1), -libc::EFAULT);
            assert_eq!(attach(client.welcome.domain, client.welcome.nonce), -libc::EPERM);
        });
    });
    assert_eq!((server.state(), worker.task.state()), (RUNNING, RUNNABLE));
    assert!(lists_are_empty(server));
    run_to_end(server, worker);
    retire(server);
}

/// The number of the only domain that has tasks: there is no other yet.
fn own_domain(loader: &Loader) -> u32 {
    assert_eq!(loader.stat("nr_domains"), 1);
    0
}

/// What a client cannot do to the `victim`, nor beyond its own slots.
fn refused_to(client: &Client, victim: u32, tids: [u32; 2]) {
    let mine = client.welcome.domain;
    let args = |op, domain| umcg_ctl_args { op, domain, ..umcg_ctl_args::default() };
    for slot in [0, 1, 2, 3, u32::MAX] {
        let register = umcg_ctl_args { slot, ..args(UMCG_CTL_REGISTER, victim) };
        assert_eq!(client.error(register), -libc::EFAULT, "slot {slot} of another's domain");
    }
    for slot in [0, 5, 1 << 31, u32::MAX] {
        let register = umcg_ctl_args { slot, ..args(UMCG_CTL_REGISTER, mine) };
        assert_eq!(client.error(register), -libc::EFAULT, "slot {slot} of four");
    }
    for tid in [tids[0], tids[1], 0, u32::MAX] {
        for domain in [victim, mine, 63, u32::MAX] {
            let kick = umcg_ctl_args { tid, ..args(UMCG_CTL_KICK, domain) };
            assert_eq!(client.error(kick), -libc::ESRCH, "task {tid} of domain {domain}");
        }
    }
    assert_eq!(client.error(args(UMCG_CTL_UNREGISTER, victim)), -libc::EINVAL, "not registered");
    for op in [0, 6, u32::MAX] {
        assert_eq!(client.error(args(op, mine)), -libc::EINVAL, "operation {op}");
    }
}

/// One command of bpf(2) as an unprivileged client: what it answers for the domain's map, and for the control
/// program. Several answers are those of several kernels.
struct Try {
    command: u32,
    name: &'static str,
    map: &'static [i32],
    program: &'static [i32],
}

const fn command(command: u32, name: &'static str, map: &'static [i32], program: &'static [i32]) -> Try {
    Try { command, name, map, program }
}

const OK: &[i32] = &[0];
const EPERM: &[i32] = &[-libc::EPERM];
const EINVAL: &[i32] = &[-libc::EINVAL];
const EBADF: &[i32] = &[-libc::EBADF];
const EACCES: &[i32] = &[-libc::EACCES];
const EBUSY: &[i32] = &[-libc::EBUSY];
/// The kernel's own ENOTSUPP, which no header for programs has.
const ENOTSUPP: &[i32] = &[-524];

const OBJ_PIN: u32 = 6;
const PROG_BIND_MAP: u32 = 35;

/// Each success is with the client's own memory, which it has mapped anyway, or shows what is no secret.
const TRIES: &[Try] = &[
    command(0, "MAP_CREATE", EPERM, EPERM),
    command(1, "MAP_LOOKUP_ELEM", OK, EINVAL),
    command(2, "MAP_UPDATE_ELEM", OK, EINVAL),
    command(3, "MAP_DELETE_ELEM", EINVAL, EINVAL),
    command(4, "MAP_GET_NEXT_KEY", OK, EINVAL),
    command(5, "PROG_LOAD", EPERM, EPERM),
    command(OBJ_PIN, "OBJ_PIN", EACCES, EACCES),
    command(7, "OBJ_GET", EACCES, EACCES),
    command(8, "PROG_ATTACH", EINVAL, EINVAL),
    command(9, "PROG_DETACH", EBADF, EBADF),
    // What it is there for.
    command(10, "PROG_RUN", EINVAL, OK),
    command(11, "PROG_GET_NEXT_ID", EPERM, EPERM),
    command(12, "MAP_GET_NEXT_ID", EPERM, EPERM),
    // Sizes, names and ids; of the program no instruction, and an id opens nothing.
    command(15, "OBJ_GET_INFO_BY_FD", OK, OK),
    command(16, "PROG_QUERY", EPERM, EPERM),
    command(17, "RAW_TRACEPOINT_OPEN", EINVAL, EINVAL),
    command(18, "BTF_LOAD", EPERM, EPERM),
    command(20, "TASK_FD_QUERY", EPERM, EPERM),
    command(21, "MAP_LOOKUP_AND_DELETE_ELEM", ENOTSUPP, EINVAL),
    // It is mapped for writing. Otherwise it would succeed, and the client could write to its memory no more.
    command(22, "MAP_FREEZE", EBUSY, EINVAL),
    command(23, "BTF_GET_NEXT_ID", EPERM, EPERM),
    command(24, "MAP_LOOKUP_BATCH", OK, EINVAL),
    command(25, "MAP_LOOKUP_AND_DELETE_BATCH", ENOTSUPP, EINVAL),
    command(26, "MAP_UPDATE_BATCH", OK, EINVAL),
    command(27, "MAP_DELETE_BATCH", ENOTSUPP, EINVAL),
    command(28, "LINK_CREATE", EINVAL, EINVAL),
    command(29, "LINK_UPDATE", EINVAL, EINVAL),
    command(31, "LINK_GET_NEXT_ID", EPERM, EPERM),
    command(32, "ENABLE_STATS", EPERM, EPERM),
    command(33, "ITER_CREATE", EINVAL, EINVAL),
    command(34, "LINK_DETACH", EINVAL, EINVAL),
    // The program keeps the map from then on, even when the client is gone: see kept_memory().
    command(PROG_BIND_MAP, "PROG_BIND_MAP", OK, EINVAL),
    command(36, "TOKEN_CREATE", EINVAL, EINVAL),
    // What the program has printed: nothing.
    command(37, "PROG_STREAM_READ_BY_FD", EINVAL, &[0, -libc::EINVAL]),
    command(38, "PROG_ASSOC_STRUCT_OPS", EINVAL, EINVAL),
    command(39, "none yet", EINVAL, EINVAL),
    command(40, "none yet", EINVAL, EINVAL),
];

/// By id there is nothing that a client may open: what gives one, and what gives a descriptor for it.
const BY_ID: &[(u32, u32, &str)] = &[
    (11, 13, "PROG_GET_FD_BY_ID"),
    (12, 14, "MAP_GET_FD_BY_ID"),
    (23, 19, "BTF_GET_FD_BY_ID"),
    (31, 30, "LINK_GET_FD_BY_ID"),
];

const PIN: &CStr = c"/sys/fs/bpf/umcg-test";

/// As distributions have it: unprivileged users make no BPF objects, and the file system for pins is root's.
fn set_up_bpf() {
    // It may be 1 already, which is for good, and means the same here.
    let _ = std::fs::write("/proc/sys/kernel/unprivileged_bpf_disabled", "2");
    let (kind, mode) = (c"bpf".as_ptr(), c"mode=0700".as_ptr());
    // SAFETY: strings for the time of the call.
    let mounted = unsafe { libc::mount(kind, c"/sys/fs/bpf".as_ptr(), kind, 0, mode.cast()) };
    assert_eq!(mounted, 0, "cannot mount {PIN:?}'s file system");
}

/// Attributes of `command` that could do something to `target`.
fn attributes(command: u32, target: &OwnedFd, client: &Client) -> Attr {
    /// Keys and values, in and out; the largest is a cell.
    static SCRATCH: [AtomicU64; 64] = [const { AtomicU64::new(0) }; 64];

    SCRATCH.iter().for_each(|word| word.store(0, SeqCst));
    let [key, value] = [&SCRATCH[0], &SCRATCH[16]].map(|word| word.as_ptr().expose_provenance() as u64);
    let pin = PIN.as_ptr().expose_provenance() as u64;
    let none = Attr::default();
    match command {
        0 => none.word(0, 2).word(4, 4).word(8, 8).word(12, 1),
        1..=4 | 21 => none.descriptor(0, target).pointer(8, key).pointer(16, value),
        5 => none.word(0, 1).word(4, 1).pointer(8, key).pointer(16, pin),
        OBJ_PIN => none.pointer(0, pin).descriptor(8, target),
        7 => none.pointer(0, pin),
        8 | 9 => none.descriptor(4, target),
        10 => none.descriptor(0, target).word(40, 48).pointer(48, value),
        15 => none.descriptor(0, target).word(4, 80).pointer(8, value),
        16 | 22 | 28 | 29 | 33 | 34 => none.descriptor(0, target),
        17 => none.pointer(0, pin).descriptor(8, target),
        18 => none.pointer(0, value).word(16, 24),
        20 => none.word(0, std::process::id()).descriptor(4, target),
        24..=27 => {
            none.pointer(8, key).pointer(16, key).pointer(24, value).word(32, 1).descriptor(36, target)
        }
        PROG_BIND_MAP => none.descriptor(0, &client.control).descriptor(4, target),
        36 => none.descriptor(4, target),
        37 => none.pointer(0, value).word(8, 64).word(12, 1).descriptor(16, target),
        38 => none.descriptor(0, target).descriptor(4, &client.control),
        _ => none,
    }
}

/// As root: the ids of all objects of a kind, by the command that gives the next one.
pub fn ids(next: u32) -> Vec<u32> {
    let step = |&id: &u32| {
        let mut attr = Attr::default().word(0, id);
        (bpf(next, &mut attr) == 0).then(|| attr.answer(4))
    };
    std::iter::successors(Some(0), step).skip(1).collect()
}

fn map_id(client: &Client) -> u32 {
    let info = [const { AtomicU32::new(0) }; 20]; // the type, then the id
    let address = info.as_ptr().expose_provenance() as u64;
    let mut attr =
        Attr::default().descriptor(0, &client.map).word(4, size_of_val(&info) as u32).pointer(8, address);
    assert_eq!(bpf(15, &mut attr), 0);
    info[1].load(SeqCst)
}

fn descriptors() {
    let loader = Loader::start(&["--group", &GROUP.to_string()]);
    load_program();
    set_up_bpf();
    let victim = Client::open(&loader.socket, 4);
    let objects: Vec<_> = BY_ID.iter().map(|&(next, get, name)| (get, name, ids(next))).collect();
    assert!(objects.iter().all(|(_, _, ids)| !ids.is_empty()), "root sees no objects");
    assert!(objects[1].2.contains(&map_id(&victim)), "another's domain is not among them");
    in_child(|| {
        become_user(USER, GROUP);
        let client = Client::open(&loader.socket, 4);
        client.attach();
        let _mapped = client.words();
        let wrong = [wrong_answers(&client), wrong_by_id(&objects)].concat();
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    });
    // Another one notices nothing.
    in_child(|| {
        become_user(OTHER_USER, GROUP);
        assert_eq!(open(&loader, 4), 0);
        assert_blocks_are_seen();
    });
}

fn wrong_answers(client: &Client) -> Vec<String> {
    let answer = |tried: &Try, target| bpf(tried.command, &mut attributes(tried.command, target, client));
    TRIES
        .iter()
        .flat_map(|tried| {
            [(tried, "map", &client.map, tried.map), (tried, "program", &client.control, tried.program)]
        })
        .map(|(tried, what, target, expected)| (tried, what, answer(tried, target), expected))
        .filter(|(_, _, answer, expected)| !expected.contains(answer))
        .map(|(tried, what, answer, expected)| {
            format!("{} of the {what}: {answer}, not {expected:?}", tried.name)
        })
        .collect()
}

fn wrong_by_id(objects: &[(u32, &str, Vec<u32>)]) -> Vec<String> {
    objects
        .iter()
        .flat_map(|(get, name, ids)| ids.iter().map(move |&id| (*get, name, id)))
        .map(|(get, name, id)| (name, id, bpf(get, &mut Attr::default().word(0, id))))
        .filter(|&(.., answer)| answer != -libc::EPERM)
        .map(|(name, id, answer)| format!("{name} of {id}: {answer}"))
        .collect()
}

/// A client is gone, and what it had is not: its mapping, or, for ever, what it bound to the control program.
fn kept_memory() {
    let loader = Loader::start(&["--group", &GROUP.to_string(), "--max-domains-per-user", "2"]);
    load_program();
    let keep = |how: fn(&Client)| {
        become_user(USER, GROUP);
        (0..2).for_each(|_| how(&Client::open(&loader.socket, 4)));
        // Longer than the loader takes to notice that the connections are gone.
        for _ in 0..20 {
            assert_eq!(open(&loader, 4), -libc::ENOSPC, "memory is kept and does not count");
            sleep(Duration::from_millis(50));
        }
    };
    in_child(|| keep(|client| _ = client.words()));
    wait_until("a mapping ends with its process", || loader.stat("nr_domains") == 0);
    in_child(|| {
        keep(|client| {
            assert_eq!(bpf(PROG_BIND_MAP, &mut attributes(PROG_BIND_MAP, &client.map, client)), 0);
        });
    });
    in_child(|| {
        become_user(OTHER_USER, GROUP);
        assert_eq!(open(&loader, 4), 0, "one user's memory counts as another one's");
        assert_blocks_are_seen();
    });
    wait_until("what is bound stays", || loader.stat("nr_domains") == 2);
}

// SPDX-License-Identifier: GPL-2.0-only
//! A hostile process harms nobody but itself: random control arguments, random words in shared memory.
//!
//! The failures this guards against: the kernel side believes a word that a program has written, and others'
//! tasks stop, run when they should not, or find strangers on their lists; the scheduler is ejected; a domain
//! stays.
//!
//! An innocent process does a job that can be checked, for as long as the test lasts. Beside it, one attacker
//! after the other lives for a second and is killed. What they do follows from a seed, which is printed;
//! `UMCG_VM_SEED` sets it. (What comes of it still depends on who runs when.)

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::num::NonZeroUsize;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::thread::sleep;
use std::time::{Duration, SystemTime};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigHandler, Signal, kill, signal};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use umcg::raw::{UMCG_TF_PREEMPT, UMCG_WAIT_ENQUEUE};

use crate::api::{self, BLOCKED, NONE, RUNNABLE, RUNNING};
use crate::cast::{
    Task, become_server, gettid, load_program, open, retire, scaled, sched_yield, spawn_worker, wait_until,
};
use crate::client::shared_abi::{
    UMCG_CALL_AGAIN, UMCG_CALL_NEW, UMCG_CTL_REGISTER, UMCG_CTL_UNREGISTER, UMCG_TF_WAIT, umcg_ctl_args,
};
use crate::client::{CELL_WORDS, Client};
use crate::harness::{Counters, Test, stat};
use crate::stress::Dice;

pub const TESTS: &[Test] = &[
    Test::new("hostile_control_arguments_harm_nobody_else", || torment(attack_control)).limit_s(3600),
    Test::new("hostile_words_in_shared_memory_harm_nobody_else", || torment(attack_memory)).limit_s(3600),
];

const SECONDS: u32 = 5;
/// The innocent process has a server and two workers.
const INNOCENTS: usize = 3;

/// What the processes of this test tell each other.
#[derive(Default)]
struct Board {
    /// Tids of the innocent.
    innocents: [AtomicU32; INNOCENTS],
    /// Rounds of their job.
    rounds: AtomicU32,
    is_over: AtomicBool,
    /// Steps that attackers took.
    steps: AtomicU32,
}

impl Board {
    /// In memory that children share.
    fn put_up() -> &'static Self {
        let len = NonZeroUsize::new(size_of::<Self>()).unwrap();
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping, aligned and large enough, never unmapped; zeroes are a board.
        unsafe { mmap_anonymous(None, len, protection, MapFlags::MAP_SHARED).unwrap().cast().as_ref() }
    }
}

/// Lets one attacker after the other loose on the loader, and looks whether anybody notices.
fn torment(attack: fn(&'static Board, Dice)) {
    load_program();
    let seconds = scaled(SECONDS);
    let seed = seed();
    println!("UMCG_VM_SEED={seed}, {seconds} attackers");
    let board = Board::put_up();
    let innocent = spawn_process(|| work(board));
    wait_until("the innocent process works", || board.rounds.load(SeqCst) > 0);
    let counters = Counters::now();
    let alone = rounds_while(board, || sleep(Duration::from_secs(1)));

    let mut beside = Vec::new();
    for number in 0..seconds {
        let dice = Dice(seed + u64::from(number));
        let rounds = rounds_while(board, || set_loose(board, || attack(board, dice)));
        assert!(rounds > 0, "the innocent process stood still beside attacker {number}");
        beside.push(rounds);
        wait_until("nothing is left of the attacker", || {
            stat("nr_domains") == 1 && stat("nr_tasks") == INNOCENTS as u64
        });
    }

    board.is_over.store(true, SeqCst);
    assert_eq!(
        waitpid(innocent, None).unwrap(),
        WaitStatus::Exited(innocent, 0),
        "the innocent process failed"
    );
    println!(
        "{} steps; rounds of the innocent: {alone} alone, {:?} at least and {:?} at most beside an attacker",
        board.steps.load(SeqCst),
        beside.iter().min(),
        beside.iter().max(),
    );
    let of = |name| counters.added(name);
    println!(
        "registrations {}, waits {}, switches {}, blocks {}, captures {}, preemptions {}, kicks {}",
        of("registrations"),
        of("waits"),
        of("switches"),
        of("blocks"),
        of("captures"),
        of("preemptions"),
        of("kicks"),
    );
    // The innocent neither register again nor kick: so the attackers got somewhere.
    assert!(of("registrations") > 0 && of("kicks") > 0, "nothing was tested");
}

fn seed() -> u64 {
    match std::env::var("UMCG_VM_SEED") {
        Ok(seed) => seed.parse().expect("UMCG_VM_SEED"),
        Err(_) => SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs(),
    }
}

fn rounds_while(board: &Board, act: impl FnOnce()) -> u32 {
    let before = board.rounds.load(SeqCst);
    act();
    board.rounds.load(SeqCst).wrapping_sub(before)
}

/// Runs an attack for a second, from its first step on.
fn set_loose(board: &'static Board, attack: impl FnOnce()) {
    let before = board.steps.load(SeqCst);
    let attacker = spawn_process(attack);
    wait_until("the attack begins", || board.steps.load(SeqCst) != before);
    sleep(Duration::from_secs(1));
    kill(attacker, Signal::SIGKILL).unwrap();
    let ended = waitpid(attacker, None).unwrap();
    assert!(matches!(ended, WaitStatus::Signaled(_, Signal::SIGKILL, _)), "the attacker ended: {ended:?}");
}

/// A child that ends with this process at the latest.
fn spawn_process(act: impl FnOnce()) -> Pid {
    // SAFETY: this process has one thread.
    match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            set_pdeathsig(Signal::SIGKILL).unwrap();
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
            // SAFETY: ends the child without the parent's destructors.
            unsafe { libc::_exit(i32::from(outcome.is_err())) }
        }
    }
}

// The innocent: two workers send each other numbers, through sockets at which they block.

/// What the innocent server keeps in its own words; nobody else may write there.
const KEEPSAKE: u64 = 0x1234_5678_9abc_def0;

/// The worker in the middle of a computation, else 0.
static WITNESS: AtomicU32 = AtomicU32::new(0);

fn work(board: &'static Board) {
    open(INNOCENTS as u32);
    let server = become_server();
    server.user_data.store(KEEPSAKE, SeqCst);
    let (mine, theirs) = UnixStream::pair().unwrap();
    let first = spawn_worker(server.tid(), move |me| ask(board, me, mine));
    let second = spawn_worker(server.tid(), move |me| answer(me, theirs));
    let workers = [first.task, second.task];
    for (place, task) in board.innocents.iter().zip([server, first.task, second.task]) {
        wait_until("it is registered", || task.tid() != 0);
        place.store(task.tid(), SeqCst);
    }
    serve(server, workers);
    first.thread.join().unwrap();
    second.thread.join().unwrap();
    assert_eq!(server.user_data.load(SeqCst), KEEPSAKE);
    assert_eq!((server.tid(), server.server_tid.load(SeqCst)), (gettid(), gettid()));
    retire(server);
}

fn ask(board: &Board, me: &Task, mut peer: UnixStream) {
    let mut number = 0_u64;
    while !board.is_over.load(SeqCst) {
        peer.write_all(&number.to_ne_bytes()).unwrap();
        assert_eq!(receive(&mut peer), Some(number + 1), "a wrong answer");
        number += 2;
        compute(me);
        board.rounds.fetch_add(1, SeqCst);
    }
}

fn answer(me: &Task, mut peer: UnixStream) {
    while let Some(number) = receive(&mut peer) {
        compute(me);
        peer.write_all(&(number + 1).to_ne_bytes()).unwrap();
    }
}

/// The next number; none if the peer has hung up.
fn receive(peer: &mut UnixStream) -> Option<u64> {
    let mut bytes = [0; 8];
    peer.read_exact(&mut bytes).ok().map(|()| u64::from_ne_bytes(bytes))
}

/// Alone, and then gives way to the other one.
fn compute(me: &Task) {
    let before = WITNESS.swap(me.tid(), SeqCst);
    for step in 0..100 {
        std::hint::black_box(step);
    }
    assert_eq!((before, WITNESS.swap(0, SeqCst)), (0, me.tid()), "two workers were in user code");
    me.next_tid.store(0, SeqCst);
    me.status.store(RUNNABLE, SeqCst);
    assert_eq!(api::wait(0, UMCG_WAIT_ENQUEUE), 0);
}

/// First in, first out, with a look at each entry before it is followed.
fn serve(me: &'static Task, workers: [&'static Task; 2]) {
    let mut queue: VecDeque<&Task> = VecDeque::new();
    loop {
        me.status.store(RUNNABLE, SeqCst);
        walk(me.blocked_ptr.swap(0, SeqCst), workers, |task| task.blocked_ptr.load(SeqCst));
        queue.extend(walk(me.runnable_ptr.swap(0, SeqCst), workers, |task| task.runnable_ptr.load(SeqCst)));
        queue.retain(|task| task.state() != NONE);
        if workers.iter().all(|worker| worker.state() == NONE) {
            me.status.store(RUNNING, SeqCst);
            return;
        }
        assert!(queue.len() <= workers.len(), "a worker is there twice");
        let next = queue.pop_front();
        me.next_tid.store(next.map_or(0, Task::tid), SeqCst);
        assert_eq!(api::wait(0, 0), 0, "umcg_wait");
        if me.next_tid.load(SeqCst) != 0 {
            queue.extend(next);
        }
    }
}

/// The tasks of a list, none of which may be a stranger.
fn walk(mut next: u64, own: [&'static Task; 2], link: fn(&Task) -> u64) -> Vec<&'static Task> {
    let mut tasks = Vec::new();
    while next != 0 {
        let task = own.into_iter().find(|task| task.as_ptr().addr() as u64 == next);
        let task = task.expect("a stranger is on the list");
        assert!(tasks.len() < own.len(), "the list is longer than there are tasks");
        tasks.push(task);
        next = link(task);
    }
    tasks.reverse();
    tasks
}

// The attackers.

const CELLS: u32 = 8;
const THREADS: usize = 5;

/// What an attacker has to play with.
struct Toys {
    board: &'static Board,
    /// All cells of its domain, the header first.
    words: &'static [AtomicU32],
    /// Its threads'.
    tids: [AtomicU32; THREADS],
}

impl Toys {
    fn new(board: &'static Board, words: &'static [AtomicU32]) -> &'static Self {
        Box::leak(Box::new(Self { board, words, tids: Default::default() }))
    }

    fn task(&self, cell: u32) -> &'static Task {
        // SAFETY: the cells are mapped for good, aligned, and all of a `Task` is atomics.
        unsafe { &*std::ptr::from_ref(&self.words[cell as usize * CELL_WORDS]).cast() }
    }

    /// One of its own threads, or, seldom, an innocent one.
    fn tid(&self, dice: &mut Dice) -> u32 {
        let of =
            |tids: &[AtomicU32], dice: &mut Dice| tids[dice.below(tids.len() as u64) as usize].load(SeqCst);
        if dice.below(8) == 0 { of(&self.board.innocents, dice) } else { of(&self.tids, dice) }
    }

    /// A word that somebody may trip over.
    fn word(&self, dice: &mut Dice) -> u32 {
        const STATES: [u32; 4] = [RUNNING, RUNNABLE, BLOCKED, NONE];
        const FLAGS: [u32; 4] = [0, UMCG_TF_PREEMPT, UMCG_TF_WAIT, UMCG_TF_PREEMPT | UMCG_TF_WAIT];
        const CALLS: [u32; 4] = [UMCG_CALL_NEW, UMCG_CALL_AGAIN, UMCG_CALL_NEW | UMCG_WAIT_ENQUEUE, u32::MAX];
        let pick = |of: [u32; 4], dice: &mut Dice| of[dice.below(4) as usize];
        match dice.below(6) {
            0 | 1 => self.tid(dice),
            2 => pick(STATES, dice) | pick(FLAGS, dice),
            3 => pick(CALLS, dice),
            4 => dice.below(1 << 10) as u32,
            _ => dice.any() as u32,
        }
    }

    /// Two words: an address of its own, of the kernel's, or anything; as a time, short, long or none.
    fn long(&self, dice: &mut Dice) -> u64 {
        match dice.below(6) {
            0 | 1 => self.task(dice.below(CELLS.into()) as u32).as_ptr().addr() as u64,
            2 => dice.below(1 << 24),
            3 => u64::from(self.word(dice)),
            4 => u64::MAX << dice.below(64),
            _ => dice.any(),
        }
    }
}

impl Dice {
    fn any(&mut self) -> u64 {
        self.below(1 << 31) << 42 ^ self.below(1 << 31) << 21 ^ self.below(1 << 31)
    }

    /// Dice for somebody else.
    fn pass_on(&mut self) -> Self {
        Self(self.any())
    }
}

extern "C" fn ignore(_: i32) {}

/// What a task may do at any time: `cell` is its own, or so it thinks.
fn step(toys: &Toys, cell: u32, dice: &mut Dice) {
    let me = toys.task(cell);
    match dice.below(11) {
        0 | 1 => {
            me.next_tid.store(toys.tid(dice), SeqCst);
            me.status.store(RUNNABLE, SeqCst);
            api::wait(dice.below(2_000_000), dice.below(2) as u32);
        }
        2 | 3 => wait_without_library(toys, cell, dice),
        4 => _ = api::kick(toys.tid(dice), 0),
        5 => sleep(Duration::from_micros(dice.below(500))),
        6 => sched_yield(),
        7 => {
            me.status.fetch_or(UMCG_TF_PREEMPT, SeqCst);
            (0..dice.below(100_000)).for_each(|step| _ = std::hint::black_box(step));
        }
        8 => {
            let victim = toys.tid(dice);
            toys.task(1 + dice.below(CELLS.into()) as u32).status.store(UMCG_TF_PREEMPT, SeqCst);
            api::kick(victim, 0);
        }
        9 => {
            let thread = toys.tid(dice).cast_signed();
            // SAFETY: a signal for a thread of this process or for nobody; its handler does nothing.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, libc::SIGUSR1) };
        }
        _ => reschedule(toys, dice),
    }
    toys.board.steps.fetch_add(1, SeqCst);
}

/// Has the core take a thread, held or not, from the scheduler and hand it back: another CPU, another policy.
fn reschedule(toys: &Toys, dice: &mut Dice) {
    let thread = &toys.tids[dice.below(THREADS as u64) as usize];
    let thread = Pid::from_raw(thread.load(SeqCst).cast_signed());
    if dice.below(2) == 0 {
        let mut cpus = CpuSet::new();
        (0..2).filter(|_| dice.below(2) == 0).for_each(|cpu| cpus.set(cpu).unwrap());
        let _ = sched_setaffinity(thread, &cpus);
        return;
    }
    let policy = [libc::SCHED_OTHER, libc::SCHED_BATCH][dice.below(2) as usize];
    // SAFETY: reads a local; the thread is this process's, or not there yet, which 0 stands for: this one.
    unsafe { libc::sched_setscheduler(thread.as_raw(), policy, &libc::sched_param { sched_priority: 0 }) };
}

/// What `umcg_wait` does, without a look at anything.
fn wait_without_library(toys: &Toys, cell: u32, dice: &mut Dice) {
    let me = toys.task(cell);
    let call = &toys.words[cell as usize * CELL_WORDS + size_of::<Task>() / 4..];
    me.next_tid.store(toys.tid(dice), SeqCst);
    call[0].store(dice.below(2_000_000) as u32, SeqCst);
    call[1].store(0, SeqCst);
    call[2].store(UMCG_CALL_NEW | dice.below(2) as u32, SeqCst);
    me.status.store(RUNNABLE | UMCG_TF_WAIT, SeqCst);
    sched_yield();
}

/// Runs `act` in threads of their own, each with its number and dice, and never returns.
fn in_threads(
    toys: &'static Toys,
    dice: &mut Dice,
    act: impl Fn(u32, &mut Dice) + Send + Copy + 'static,
) -> ! {
    // SAFETY: the handler does nothing.
    unsafe { signal(Signal::SIGUSR1, SigHandler::Handler(ignore)) }.unwrap();
    for number in 0..THREADS {
        let mut dice = dice.pass_on();
        std::thread::spawn(move || {
            toys.tids[number].store(gettid(), SeqCst);
            loop {
                act(number as u32, &mut dice);
            }
        });
    }
    loop {
        sleep(Duration::from_secs(60));
    }
}

/// Threads that are tasks at times run the control program with whatever comes.
fn attack_control(board: &'static Board, mut dice: Dice) {
    let socket = std::env::var_os("UMCG_SOCKET").expect("no loader");
    let client: &Client = Box::leak(Box::new(Client::open(Path::new(&socket), CELLS)));
    client.attach();
    let toys = Toys::new(board, client.words());
    in_threads(toys, &mut dice, move |number, dice| {
        let cell = 1 + number;
        match dice.below(8) {
            0..4 => _ = client.run(arguments(client, toys, dice)),
            4 => register(client, toys, cell, dice),
            _ => step(toys, cell, dice),
        }
    });
}

/// Each field may be right, nearly right, or anything.
fn arguments(client: &Client, toys: &Toys, dice: &mut Dice) -> umcg_ctl_args {
    let slot = dice.below(u64::from(CELLS) + 2) as u32;
    let mut either = |right: u64, near: u64| match dice.below(8) {
        0 => toys.long(dice),
        1 => near,
        _ => right,
    };
    let (domain, nonce) = (client.welcome.domain.into(), client.welcome.nonce);
    let addr = toys.words.as_ptr().addr() as u64 + u64::from(slot) * CELL_WORDS as u64 * 4;
    umcg_ctl_args {
        domain: either(domain, 0) as u32,
        slot: either(slot.into(), u64::from(slot) + (1 << 31)) as u32,
        addr: either(addr, addr + 8),
        nonce: either(nonce, 0),
        op: match either(0, 6) {
            0 => [UMCG_CTL_UNREGISTER, 1, 2, 4, 4, 4, 5][dice.below(7) as usize],
            op => op as u32,
        },
        tid: toys.word(dice),
        result: toys.word(dice).cast_signed(),
        flags: toys.word(dice),
        rseq_len: toys.word(dice),
        rseq_sig: toys.word(dice),
    }
}

/// As it should be: a server, or a worker of somebody's.
fn register(client: &Client, toys: &Toys, cell: u32, dice: &mut Dice) {
    let task = toys.task(cell);
    let is_server = dice.below(2) == 0;
    task.server_tid.store(if is_server { gettid() } else { toys.tid(dice) }, SeqCst);
    task.status.store(if is_server { RUNNING } else { RUNNABLE }, SeqCst);
    task.reserved.store(0, SeqCst);
    let addr = task.as_ptr().addr() as u64;
    let _ = client.run(umcg_ctl_args { op: UMCG_CTL_REGISTER, slot: cell, addr, ..client.args() });
    if !is_server {
        task.status.store(RUNNABLE | UMCG_TF_WAIT, SeqCst);
    }
}

/// Threads that are tasks of the library's go about their business while two others write everywhere.
fn attack_memory(board: &'static Board, mut dice: Dice) {
    open(CELLS);
    let cells: Vec<_> = (0..CELLS).map(|_| Task::alloc()).collect();
    let header = cells[0].as_ptr().cast::<AtomicU32>().wrapping_sub(CELL_WORDS);
    // SAFETY: the library gives out cells from the first on; they and the header are mapped, as atomics.
    let words = unsafe { std::slice::from_raw_parts(header, (CELLS as usize + 1) * CELL_WORDS) };
    let toys = Toys::new(board, words);
    for mut dice in [dice.pass_on(), dice.pass_on()] {
        std::thread::spawn(move || scribble(toys, &mut dice));
    }
    in_threads(toys, &mut dice, move |number, dice| {
        let task = toys.task(1 + number);
        let is_server = number < 2;
        let server = if is_server { gettid() } else { toys.tids[number as usize % 2].load(SeqCst) };
        task.reserved.store(0, SeqCst);
        task.server_tid.store(server, SeqCst);
        task.status.store(if is_server { RUNNING } else { RUNNABLE }, SeqCst);
        if api::register(task.as_ptr(), 0) != 0 && api::current().is_null() {
            return sleep(Duration::from_micros(100));
        }
        while dice.below(100) != 0 {
            step(toys, 1 + number, dice);
        }
        api::unregister(task.as_ptr());
    });
}

/// No task: writes words, in bursts, so that some steps in between go well.
fn scribble(toys: &Toys, dice: &mut Dice) {
    /// It sends the library to its other back end for good, so it is seldom written.
    const EPOCH: usize = 4;

    loop {
        for _ in 0..dice.below(40) {
            let at = dice.below(toys.words.len() as u64) as usize;
            if at == EPOCH && dice.below(200) != 0 {
                continue;
            }
            toys.words[at].store(toys.word(dice), SeqCst);
            if at.is_multiple_of(2) && dice.below(2) == 0 {
                let long = toys.long(dice);
                toys.words[at].store(long as u32, SeqCst);
                toys.words[at + 1].store((long >> 32) as u32, SeqCst);
            }
        }
        sleep(Duration::from_micros(dice.below(300)));
    }
}

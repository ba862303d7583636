// SPDX-License-Identifier: GPL-2.0-only
//! Everything at once: workers block, compute, yield and switch for a while, and two servers exchange them.
//!
//! What holds at every moment: of the workers of one host at most one is in user code. While nobody is preempted, the
//! witness is a word for each host. A worker swaps its own tid into it, computes, and finds it there again. In between
//! it neither makes a system call nor faults (all is touched and locked before), so it stays RUNNING, whoever has the
//! CPU; a second worker of its host that comes by at this time finds the word taken. So there is no false alarm.
//!
//! A worker that may be preempted anywhere looks at the states of all others instead, see `is_alone`.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::num::NonZeroUsize;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use nix::sys::mman::{MapFlags, MlockAllFlags, ProtFlags, mlockall, mmap_anonymous, munmap};
use nix::sys::resource::{Resource, setrlimit};

use umcg::raw::{UMCG_TF_PREEMPT, UMCG_WAIT_ENQUEUE};

use crate::api::{self, NONE, RUNNABLE, RUNNING};
use crate::cast::{
    List, Task, Worker, become_server, open, retire, scaled, spawn_server, spawn_worker, wait_until,
};
use crate::harness::{Counters, Test};

pub const TESTS: &[Test] = &[
    Test::new("200_workers_on_2_servers_stay_exclusive_and_progress", || stress(200, 100, false))
        .limit_s(600),
    Test::new("1000_workers_with_timeouts_and_preemption_stay_exclusive_and_progress", || {
        stress(1000, 60, true)
    })
    .limit_s(600),
];

const SERVERS: usize = 2;

/// What one server and the workers that it hosts share.
struct Host {
    tid: AtomicU32,
    /// Who is in the computation, else 0.
    witness: AtomicU32,
    /// A RUNNABLE worker that the running one may switch to, else 0.
    offer: AtomicU32,
    /// Its server waits for an event.
    idle: AtomicBool,
    /// RUNNABLE workers. Only servers lock it: a worker may be stopped with a lock, and its server would wait for it.
    queue: Mutex<VecDeque<&'static Task>>,
}

impl Host {
    const fn new() -> Self {
        Self {
            tid: AtomicU32::new(0),
            witness: AtomicU32::new(0),
            offer: AtomicU32::new(0),
            idle: AtomicBool::new(false),
            queue: Mutex::new(VecDeque::new()),
        }
    }

    /// The host of a worker that is RUNNING: servers change its server's tid only while they have it in their queue.
    fn of(worker: &Task) -> &'static Self {
        let tid = worker.server_tid.load(SeqCst);
        HOSTS.iter().find(|host| host.tid.load(SeqCst) == tid).expect("an unknown server")
    }

    fn with_queue<R>(&self, act: impl FnOnce(&mut VecDeque<&'static Task>) -> R) -> R {
        act(&mut self.queue.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

static HOSTS: [Host; SERVERS] = [const { Host::new() }; SERVERS];
static STOP: AtomicBool = AtomicBool::new(false);
/// Workers are preempted, and the waits of servers time out.
static DISTURBED: AtomicBool = AtomicBool::new(false);
static TASKS: OnceLock<Vec<&Task>> = OnceLock::new();
/// Workers that found another one of their host in the computation.
static INTRUSIONS: AtomicU32 = AtomicU32::new(0);
static DIRECT_SWITCHES: AtomicU32 = AtomicU32::new(0);
static THEFTS: AtomicU32 = AtomicU32::new(0);
static TIMEOUTS: AtomicU32 = AtomicU32::new(0);
/// What workers contend for; one may sleep, and then wait for its turn, while it has the lock.
static CONTENDED: Mutex<u64> = Mutex::new(0);

/// A linear congruential generator, seeded with the worker's number: each run takes the same choices.
pub struct Dice(pub u64);

impl Dice {
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

/// Pure computation, watched.
fn compute(me: &Task, steps: u64) {
    let is_exclusive = if DISTURBED.load(SeqCst) {
        spin(steps);
        is_alone(me)
    } else {
        let witness = &Host::of(me).witness;
        let before = witness.swap(me.tid(), SeqCst);
        spin(steps);
        (before, witness.swap(0, SeqCst)) == (0, me.tid())
    };
    if !is_exclusive {
        INTRUSIONS.fetch_add(1, SeqCst);
    }
}

fn spin(steps: u64) {
    for step in 0..steps {
        std::hint::black_box(step);
    }
}

/// False if the calling worker is not RUNNING, or another one of its host is. Nothing of it counts if the caller was
/// preempted meanwhile, which its time stamp tells, or if a worker has moved, who may have been seen here and there.
fn is_alone(me: &Task) -> bool {
    let moment = || (me.runnable_ts.load(SeqCst), THEFTS.load(SeqCst));
    let (before, host) = (moment(), me.server_tid.load(SeqCst));
    let runs_here = |task: &&&Task| task.server_tid.load(SeqCst) == host && task.state() == RUNNING;
    let running = TASKS.wait().iter().filter(runs_here).count();
    let is_running = me.state() == RUNNING;
    moment() != before || (is_running && running == 1)
}

/// Asks for the preemption of somebody, whatever he is doing, again and again.
fn preempt() {
    let (tasks, mut dice) = (TASKS.wait(), Dice(1));
    while !STOP.load(SeqCst) {
        for _ in 0..tasks.len() / 4 {
            tasks[dice.below(tasks.len() as u64) as usize].status.fetch_or(UMCG_TF_PREEMPT, SeqCst);
        }
        std::thread::sleep(Duration::from_micros(500));
    }
}

fn give_way(me: &Task) {
    me.next_tid.store(0, SeqCst);
    me.status.store(RUNNABLE, SeqCst);
    assert_eq!(api::wait(0, UMCG_WAIT_ENQUEUE), 0);
    assert_eq!(me.state(), RUNNING);
}

/// Switches to whom the server offers.
fn switch(me: &Task) {
    let next = Host::of(me).offer.swap(0, SeqCst);
    if next == 0 {
        return give_way(me);
    }
    me.next_tid.store(next, SeqCst);
    me.status.store(RUNNABLE, SeqCst);
    let answer = api::wait(0, UMCG_WAIT_ENQUEUE);
    if answer == -libc::EINVAL && DISTURBED.load(SeqCst) {
        // Preempted with the offer in hand, and moved: the other host's worker is nobody's to run here.
        assert_eq!(api::kick(next, 0), 0);
        return;
    }
    assert_eq!(answer, 0);
    assert_eq!(me.next_tid.load(SeqCst), 0, "the offered worker was not run");
    DIRECT_SWITCHES.fetch_add(1, SeqCst);
}

/// Faults a page in and gives it back, beside others who do the same to one address space.
fn fault() {
    const BYTES: NonZeroUsize = NonZeroUsize::new(1 << 16).unwrap();
    let (protection, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE);
    // SAFETY: a new mapping, of which nobody else knows, written to inside its bounds and given back once.
    unsafe {
        let memory = mmap_anonymous(None, BYTES, protection, flags).unwrap();
        memory.cast::<u8>().add(BYTES.get() / 2).write_volatile(1);
        munmap(memory, BYTES.get()).unwrap();
    }
}

/// The far end of what a worker reads from.
struct Pipe {
    /// Its worker reads, or is about to.
    hungry: AtomicBool,
    food: UnixStream,
}

fn work(me: &Task, number: usize, mut meal: UnixStream, pipe: &Pipe) {
    let mut dice = Dice(number as u64);
    while !STOP.load(SeqCst) {
        compute(me, 200 + dice.below(2000));
        match dice.below(6) {
            0 => std::thread::sleep(Duration::from_micros(dice.below(2000))),
            1 => {
                pipe.hungry.store(true, SeqCst);
                meal.read_exact(&mut [0]).unwrap();
            }
            2 => {
                let mut contended = CONTENDED.lock().unwrap();
                compute(me, 200);
                if dice.below(4) == 0 {
                    std::thread::sleep(Duration::from_micros(100));
                }
                *contended += 1;
            }
            3 => fault(),
            4 => give_way(me),
            _ => switch(me),
        }
        me.user_data.fetch_add(1, SeqCst);
    }
}

/// No task: feeds the hungry until everybody is full.
fn feed(pipes: &'static [Pipe], is_over: &AtomicBool) {
    while !is_over.load(SeqCst) {
        for pipe in pipes {
            if pipe.hungry.swap(false, SeqCst) {
                (&pipe.food).write_all(&[0]).unwrap();
            }
        }
        std::thread::sleep(Duration::from_micros(500));
    }
}

/// Serves first in, first out, offers the second to the first, and takes from the other queue what its own lacks.
fn serve(me: &'static Task, host: &'static Host, workers: &[&'static Task]) {
    let other = HOSTS.iter().find(|other| !std::ptr::eq(*other, host)).expect("there are two");
    let mut dice = Dice(me.tid().into());
    let mut serves = false;
    loop {
        me.status.store(RUNNABLE, SeqCst);
        if workers.iter().all(|worker| worker.state() == NONE) {
            me.status.store(RUNNING, SeqCst);
            return;
        }
        let blocked = me.take(List::Blocked);
        let came = me.take(List::Runnable);
        let nothing_new = blocked.is_empty() && came.is_empty();
        host.with_queue(|queue| queue.extend(came.into_iter().filter(|task| task.state() != NONE)));
        let may_run = !(serves && nothing_new);
        let next =
            may_run.then(|| host.with_queue(VecDeque::pop_front).or_else(|| steal(me, other))).flatten();
        let offered = next.and_then(|_| host.with_queue(VecDeque::pop_front));
        if offered.is_some() && other.idle.load(SeqCst) {
            api::kick(other.tid.load(SeqCst), 0);
        }
        let timeout_ns = if DISTURBED.load(SeqCst) { dice.below(4) * dice.below(1_000_000) } else { 0 };
        serves = run_and_offer(me, host, next, offered, timeout_ns);
    }
}

/// Waits; whom nobody has run is queued again. True if its worker of before still runs: a wait timed out.
fn run_and_offer(
    me: &Task,
    host: &Host,
    next: Option<&'static Task>,
    offered: Option<&'static Task>,
    timeout_ns: u64,
) -> bool {
    host.offer.store(offered.map_or(0, Task::tid), SeqCst);
    host.idle.store(next.is_none(), SeqCst);
    me.next_tid.store(next.map_or(0, Task::tid), SeqCst);
    let answer = api::wait(timeout_ns, 0);
    host.idle.store(false, SeqCst);
    match -answer {
        0 => {}
        libc::ETIMEDOUT if timeout_ns != 0 => _ = TIMEOUTS.fetch_add(1, SeqCst),
        libc::EBUSY if DISTURBED.load(SeqCst) => {}
        errno => panic!("umcg_wait: {errno}"),
    }
    if host.offer.swap(0, SeqCst) != 0 {
        host.with_queue(|queue| queue.extend(offered));
    }
    if me.next_tid.load(SeqCst) != 0 {
        host.with_queue(|queue| queue.extend(next));
    }
    answer == -libc::EBUSY
}

/// Moves a worker of the `other` host's to this server.
fn steal(me: &Task, other: &Host) -> Option<&'static Task> {
    let worker = other.with_queue(VecDeque::pop_back)?;
    worker.server_tid.store(me.tid(), SeqCst);
    THEFTS.fetch_add(1, SeqCst);
    Some(worker)
}

fn stress(nr_workers: usize, seconds: u32, disturbed: bool) {
    let seconds = scaled(seconds);
    DISTURBED.store(disturbed, SeqCst);
    setrlimit(Resource::RLIMIT_NOFILE, 4096, 4096).unwrap();
    let on_fault = MlockAllFlags::from_bits_retain(libc::MCL_ONFAULT);
    open(nr_workers as u32 + 2);
    // `open` has faulted in what is there now; this keeps what will be touched later.
    mlockall(MlockAllFlags::MCL_FUTURE | on_fault).unwrap();
    let counters = Counters::now();
    let me = become_server();
    HOSTS[0].tid.store(me.tid(), SeqCst);
    let (meals, pipes): (Vec<_>, Vec<_>) = (0..nr_workers)
        .map(|_| {
            let (meal, food) = UnixStream::pair().unwrap();
            (meal, Pipe { hungry: AtomicBool::new(false), food })
        })
        .collect();
    let pipes: &'static [Pipe] = pipes.leak();
    let workers = spawn_workers(me, meals, pipes);
    let tasks: &'static [&Task] = TASKS.get_or_init(|| workers.iter().map(|worker| worker.task).collect());
    let second = spawn_server(|task| {
        HOSTS[1].tid.store(task.tid(), SeqCst);
        serve(task, &HOSTS[1], tasks);
        api::kick(HOSTS[0].tid.load(SeqCst), 0);
    });
    static IS_OVER: AtomicBool = AtomicBool::new(false);
    let feeder = std::thread::spawn(move || feed(pipes, &IS_OVER));
    let preempter = disturbed.then(|| std::thread::spawn(preempt));
    let clock = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(seconds.into()));
        wait_until("every worker makes progress", || tasks.iter().all(|task| progress(task) > 0));
        STOP.store(true, SeqCst);
    });
    serve(me, &HOSTS[0], tasks);
    wait_until("the second server ends", || {
        api::kick(second.task.tid(), 0);
        second.task.state() == NONE
    });
    IS_OVER.store(true, SeqCst);
    for thread in
        workers.into_iter().map(|worker| worker.thread).chain([second.thread, feeder, clock]).chain(preempter)
    {
        thread.join().unwrap();
    }
    report(tasks, seconds, &counters);
    retire(me);
}

fn spawn_workers(server: &'static Task, meals: Vec<UnixStream>, pipes: &'static [Pipe]) -> Vec<Worker> {
    let spawn =
        |(number, meal)| spawn_worker(server.tid(), move |task| work(task, number, meal, &pipes[number]));
    meals.into_iter().enumerate().map(spawn).collect()
}

/// Rounds that a worker has done.
fn progress(task: &Task) -> u64 {
    task.user_data.load(SeqCst)
}

fn report(tasks: &[&Task], seconds: u32, counters: &Counters) {
    let rounds = || tasks.iter().map(|task| progress(task));
    println!(
        "{seconds} s: {} to {} rounds each, {} direct switches, {} thefts, {} blocks, {} captures, {} preemptions, \
         {} timeouts",
        rounds().min().unwrap_or(0),
        rounds().max().unwrap_or(0),
        DIRECT_SWITCHES.load(SeqCst),
        THEFTS.load(SeqCst),
        counters.added("blocks"),
        counters.added("captures"),
        counters.added("preemptions"),
        TIMEOUTS.load(SeqCst),
    );
    assert_eq!(INTRUSIONS.load(SeqCst), 0, "two workers of one host were in user code");
    assert!(DIRECT_SWITCHES.load(SeqCst) > 0 && counters.added("captures") > 0, "nothing was tested");
    if DISTURBED.load(SeqCst) {
        assert!(TIMEOUTS.load(SeqCst) > 0 && counters.added("preemptions") > 0, "nobody was disturbed");
    }
}

// SPDX-License-Identifier: GPL-2.0-only
//! A worker that blocks is reported BLOCKED to its host, and stops before user code when it is done.
//!
//! The failure this guards against: a worker that returns from the kernel runs on beside the worker that its
//! server has started meanwhile. Each way to sleep has its own path out of the kernel, so each is a test.

use std::fs::File;
use std::io::{Read, Write, pipe};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize};
use std::thread::{sleep, spawn};
use std::time::Duration;

use nix::errno::Errno;
use nix::sched::sched_getcpu;

use crate::api::{BLOCKED, NONE};
use crate::cast::{List, Task, become_server, gettid, nr_cpus, open, retire, spawn_worker, wait_until};
use crate::harness::{Counters, Test};
use crate::scene::{STEPS, Scene, assert_only, assert_state, assert_was_captured, run_to_end, stand_still};
use crate::userfault::Userfault;

pub const TESTS: &[Test] = &[
    Test::new("blocking_in_nanosleep_is_reported_and_captured", nanosleep),
    Test::new("blocking_in_a_pipe_read_is_reported_and_captured", pipe_read),
    Test::new("blocking_in_a_socket_read_is_reported_and_captured", socket),
    Test::new("blocking_in_an_eventfd_read_is_reported_and_captured", eventfd),
    Test::new("blocking_in_futex_is_reported_and_captured", futex),
    Test::new("blocking_in_epoll_wait_is_reported_and_captured", epoll_wait),
    Test::new("blocking_in_accept_is_reported_and_captured", accept),
    Test::new("blocking_in_waitpid_is_reported_and_captured", waitpid),
    Test::new("blocking_in_a_page_fault_is_reported_and_captured", page_fault),
    Test::new("blocking_in_fsync_is_reported_and_captured", fsync),
    Test::new("blocking_on_a_mutex_that_a_sleeping_thread_holds", mutex_of_a_thread),
    Test::new("blocking_on_a_mutex_that_a_sleeping_worker_holds", mutex_of_a_worker),
    Test::new("a_worker_that_slept_without_locks_stops_as_it_wakes", stops_at_wakeup),
    Test::new("a_worker_that_may_have_locks_stops_before_user_code", stops_at_boundary),
    Test::new("the_host_of_a_worker_that_blocks_goes_on_on_its_cpu", same_cpu),
    Test::new("blocked_workers_that_nobody_took_stay_on_the_list", nobody_took),
    Test::new("a_worker_that_changes_a_task_of_another_cpu_blocks_as_ever", changes_another),
    Test::new("calls_that_do_not_sleep_are_not_reported", no_sleep),
];

fn nanosleep() {
    Scene::until_blocked(|| sleep(Duration::from_millis(300))).assert_captured();
}

fn pipe_read() {
    let (mut reader, mut writer) = pipe().unwrap();
    let scene = Scene::until_blocked(move || reader.read_exact(&mut [0]).unwrap());
    scene.assert_lasts();
    writer.write_all(&[0]).unwrap();
    scene.assert_captured();
}

fn socket() {
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    let scene = Scene::until_blocked(move || theirs.read_exact(&mut [0]).unwrap());
    scene.assert_lasts();
    ours.write_all(&[0]).unwrap();
    scene.assert_captured();
}

fn eventfd() {
    let mut ours = new_eventfd();
    let mut theirs = ours.try_clone().unwrap();
    let scene = Scene::until_blocked(move || theirs.read_exact(&mut [0; 8]).unwrap());
    scene.assert_lasts();
    ours.write_all(&1_u64.to_ne_bytes()).unwrap();
    scene.assert_captured();
}

fn futex() {
    static WORD: AtomicU32 = AtomicU32::new(0);
    let scene = Scene::until_blocked(|| futex_call(&WORD, libc::FUTEX_WAIT, 0));
    scene.assert_lasts();
    WORD.store(1, SeqCst);
    futex_call(&WORD, libc::FUTEX_WAKE, 1);
    scene.assert_captured();
}

fn epoll_wait() {
    let mut event = new_eventfd();
    let epoll = new_epoll_of(&event);
    let scene = Scene::until_blocked(move || assert_eq!(nr_ready(&epoll, -1), 1));
    scene.assert_lasts();
    event.write_all(&1_u64.to_ne_bytes()).unwrap();
    scene.assert_captured();
}

fn accept() {
    let path = format!("/run/umcg-test-accept-{}.sock", std::process::id());
    let listener = UnixListener::bind(&path).unwrap();
    let scene = Scene::until_blocked(move || drop(listener.accept().unwrap()));
    scene.assert_lasts();
    let client = spawn(move || UnixStream::connect(path).unwrap());
    scene.assert_captured();
    client.join().unwrap();
}

#[expect(clippy::zombie_processes, reason = "the worker waits for it, by pid")]
fn waitpid() {
    let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
    let pid = child.id().cast_signed();
    let scene = Scene::until_blocked(move || {
        let mut status = -1;
        // SAFETY: the status is written to a variable that outlives the call.
        let result = unsafe { libc::waitpid(pid, &raw mut status, 0) };
        assert_eq!((Errno::result(result), status), (Ok(pid), 0));
    });
    scene.assert_lasts();
    drop(child.stdin.take()); // end of file for cat
    scene.assert_captured();
}

fn page_fault() {
    let page = Arc::new(Userfault::new());
    let theirs = Arc::clone(&page);
    let scene = Scene::until_blocked(move || {
        // SAFETY: the page is mapped for ever, and nobody writes to it but the kernel before this read is
        // over.
        assert_eq!(unsafe { theirs.address().read_volatile() }, 0);
    });
    scene.assert_lasts();
    page.resolve();
    scene.assert_captured();
}

/// In the VM, target/ is a file system of the host's: fsync waits for its answer, and so does the last close.
fn fsync() {
    let path = format!("{}/fsync-{}", env!("CARGO_TARGET_TMPDIR"), std::process::id());
    let mut file = File::create(&path).unwrap();
    file.write_all(&[0; 4096]).unwrap();
    let theirs = file.try_clone().unwrap();
    Scene::until_blocked(move || theirs.sync_all().unwrap()).assert_captured();
    std::fs::remove_file(path).unwrap();
}

/// A pipe writer that faults in its buffer sleeps with the pipe's mutex held. A second writer has room in the
/// pipe, so that mutex is all that it can sleep on.
fn mutex_of_a_thread() {
    let page = Arc::new(Userfault::new());
    let (_reader, mut writer) = pipe().unwrap();
    let holder = spawn({
        let (page, writer) = (Arc::clone(&page), writer.try_clone().unwrap());
        move || write_from(&page, &writer)
    });
    page.await_fault();
    let scene = Scene::until_blocked(move || writer.write_all(&[0]).unwrap());
    scene.assert_lasts();
    page.resolve();
    scene.assert_captured();
    holder.join().unwrap();
}

/// As above, between two workers. The first must not be stopped before it has let go of the mutex: nobody
/// would ever run it if its server needed that, too.
fn mutex_of_a_worker() {
    let page = Arc::new(Userfault::new());
    let (_reader, mut writer) = pipe().unwrap();
    open(4);
    let server = become_server();
    let holder = spawn_worker(server.tid(), {
        let (page, writer) = (Arc::clone(&page), writer.try_clone().unwrap());
        move |_| count_around(|| write_from(&page, &writer))
    });
    server.await_runnable(holder.task);
    let other = spawn_worker(server.tid(), move |_| count_around(|| writer.write_all(&[0]).unwrap()));
    server.await_runnable(other.task);

    for worker in [holder.task, other.task] {
        server.run(worker);
        assert_only(worker, &server.take(List::Blocked));
    }
    assert!(stand_still(), "user code of a BLOCKED worker ran");
    for worker in [holder.task, other.task] {
        assert_state(worker, BLOCKED);
    }

    page.resolve();
    await_both(server, [holder.task, other.task]);
    assert!(stand_still(), "user code of a captured worker ran");
    assert_eq!(STEPS.load(SeqCst), 2, "user code ran between a block and its capture");
    for (worker, steps) in [(other, 3), (holder, 4)] {
        assert_was_captured(worker.task);
        server.run(worker.task);
        assert_eq!(STEPS.load(SeqCst), steps, "user code of another worker ran");
        assert_state(worker.task, NONE);
        worker.thread.join().unwrap();
    }
    retire(server);
}

fn nobody_took() {
    open(4);
    let server = become_server();
    let (workers, writers): (Vec<_>, Vec<_>) = (0..3)
        .map(|_| {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let worker = spawn_worker(server.tid(), move |_| theirs.read_exact(&mut [0]).unwrap());
            server.await_runnable(worker.task);
            (worker, ours)
        })
        .unzip();
    for worker in &workers {
        server.run(worker.task);
    }
    let blocked: Vec<_> = server.take(List::Blocked).iter().map(|task| task.tid()).collect();
    assert_eq!(blocked, workers.iter().map(|worker| worker.task.tid()).collect::<Vec<_>>());
    for (worker, mut writer) in workers.into_iter().zip(writers) {
        writer.write_all(&[0]).unwrap();
        server.await_runnable(worker.task);
        server.run(worker.task);
        worker.thread.join().unwrap();
    }
    retire(server);
}

/// In the same switch, so without a wake-up, which would find another CPU idle.
fn same_cpu() {
    const ROUNDS: u32 = 200;
    static CPU: AtomicUsize = AtomicUsize::new(0);

    let (reader, mut writer) = pipe().unwrap();
    let mut reader = File::from(OwnedFd::from(reader));
    open(2);
    let server = become_server();
    let worker = spawn_worker(server.tid(), move |_| {
        for _ in 0..ROUNDS {
            CPU.store(sched_getcpu().unwrap(), SeqCst);
            reader.read_exact(&mut [0]).unwrap();
        }
    });
    server.await_runnable(worker.task);
    let mut same = 0;
    for _ in 0..ROUNDS {
        server.run(worker.task);
        same += u32::from(sched_getcpu().unwrap() == CPU.load(SeqCst));
        assert_only(worker.task, &server.take(List::Blocked));
        writer.write_all(&[0]).unwrap();
        server.await_runnable(worker.task);
    }
    server.run(worker.task);
    worker.thread.join().unwrap();
    retire(server);
    println!("{same} of {ROUNDS} times on the same CPU, of {}", nr_cpus());
    // Whoever else wants that CPU may have it first, and the kernel may move the server afterwards.
    assert!(same > ROUNDS * 9 / 10, "{same} of {ROUNDS}");
}

/// A change to a running task makes the kernel say once more that it runs, and say so on the CPU of whoever changes it.
fn changes_another() {
    const ROUNDS: i32 = 100;
    static SPINNER: AtomicU32 = AtomicU32::new(0);
    static STOP: AtomicBool = AtomicBool::new(false);

    let spinner = spawn(|| {
        SPINNER.store(gettid(), SeqCst);
        while !STOP.load(SeqCst) {
            std::hint::spin_loop();
        }
    });
    wait_until("it spins", || SPINNER.load(SeqCst) != 0);
    let (mut reader, mut writer) = pipe().unwrap();
    open(2);
    let server = become_server();
    let worker = spawn_worker(server.tid(), move |_| {
        for round in 0..ROUNDS {
            // SAFETY: takes no pointers.
            let result = unsafe { libc::setpriority(libc::PRIO_PROCESS, SPINNER.load(SeqCst), round % 2) };
            assert_eq!(Errno::result(result), Ok(0));
            reader.read_exact(&mut [0]).unwrap();
        }
    });
    server.await_runnable(worker.task);
    for _ in 0..ROUNDS {
        server.run(worker.task);
        assert_only(worker.task, &server.take(List::Blocked));
        writer.write_all(&[0]).unwrap();
        server.await_runnable(worker.task);
    }
    run_to_end(server, worker);
    retire(server);
    STOP.store(true, SeqCst);
    spinner.join().unwrap();
}

/// The control: whatever is reported in the tests above is the sleep, not the system call.
fn no_sleep() {
    let mut full = new_eventfd();
    let epoll = new_epoll_of(&full);
    open(4);
    let server = become_server();
    let counters = Counters::now();
    let worker = spawn_worker(server.tid(), move |_| {
        for round in 0..1000 {
            assert_eq!(nr_ready(&epoll, 0), 0);
            // The kernel takes the thread out of its queue for that, and puts it back.
            // SAFETY: takes no pointers.
            assert_eq!(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, round % 2) }, 0);
            full.write_all(&1_u64.to_ne_bytes()).unwrap();
            full.read_exact(&mut [0; 8]).unwrap();
            futex_call(&AtomicU32::new(1), libc::FUTEX_WAIT, 0); // the word is not 0 any more
            STEPS.fetch_add(1, SeqCst);
        }
    });
    server.await_runnable(worker.task);
    server.run(worker.task);
    assert_eq!(STEPS.load(SeqCst), 1000, "the server was told of something before the worker was done");
    assert!(server.take(List::Blocked).is_empty());
    worker.thread.join().unwrap();
    retire(server);
    assert_eq!((counters.added("blocks"), counters.added("captures")), (0, 0));
}

fn count_around(block: impl FnOnce()) {
    STEPS.fetch_add(1, SeqCst);
    block();
    STEPS.fetch_add(1, SeqCst);
}

/// Waits until each of `workers` has come back on the runnable list, once, in whatever order.
fn await_both(server: &Task, workers: [&'static Task; 2]) {
    let mut runnable = Vec::new();
    while runnable.len() < workers.len() {
        runnable.extend(server.await_list(List::Runnable));
    }
    let missing = |worker: &&Task| !runnable.iter().any(|task| std::ptr::eq(*task, *worker));
    assert!(runnable.len() == 2 && !workers.iter().any(missing), "a worker was captured twice");
}

fn write_from(page: &Userfault, writer: &impl AsRawFd) {
    // SAFETY: one byte of a page that is mapped for ever; the kernel only reads it.
    let result = unsafe { libc::write(writer.as_raw_fd(), page.address().cast(), 1) };
    assert_eq!(Errno::result(result), Ok(1));
}

/// Where in the kernel a worker stops that sleeps in `sleep` until `wake`.
fn stack_of_captured(
    server: &'static Task,
    sleep: impl FnOnce() + Send + 'static,
    wake: impl FnOnce(),
) -> String {
    let worker = spawn_worker(server.tid(), |_| sleep());
    server.await_runnable(worker.task);
    server.run(worker.task);
    assert_only(worker.task, &server.take(List::Blocked));
    wake();
    server.await_runnable(worker.task);
    assert_was_captured(worker.task);
    assert!(stand_still()); // and it has left its CPU
    let stack = std::fs::read_to_string(format!("/proc/self/task/{}/stack", worker.task.tid())).unwrap();
    run_to_end(server, worker);
    stack
}

fn stops_at_wakeup() {
    static WORD: AtomicU32 = AtomicU32::new(0);
    open(4);
    let server = become_server();
    let stack = stack_of_captured(server, || sleep(Duration::from_millis(50)), || ());
    assert!(stack.contains("nanosleep"), "{stack}");
    let wake = || {
        WORD.store(1, SeqCst);
        futex_call(&WORD, libc::FUTEX_WAKE, 1);
    };
    let stack = stack_of_captured(server, || futex_call(&WORD, libc::FUTEX_WAIT, 0), wake);
    assert!(stack.contains("futex_wait"), "{stack}");
    retire(server);
}

fn stops_at_boundary() {
    open(4);
    let server = become_server();
    let (mut reader, mut writer) = pipe().unwrap();
    let stack = stack_of_captured(
        server,
        move || reader.read_exact(&mut [0]).unwrap(),
        || writer.write_all(&[0]).unwrap(),
    );
    assert!(!stack.is_empty() && !stack.contains("pipe_read"), "{stack}");

    // The kernel says of this one, too, that it may be frozen as it sleeps; but it is in a call that may be any file's.
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    let stack = stack_of_captured(
        server,
        move || theirs.read_exact(&mut [0]).unwrap(),
        || ours.write_all(&[0]).unwrap(),
    );
    assert!(!stack.is_empty() && !stack.contains("unix_stream_read"), "{stack}");
    retire(server);
}

/// FUTEX_WAIT or FUTEX_WAKE; "the word has changed" is as good as woken.
fn futex_call(word: &AtomicU32, operation: i32, value: u32) {
    let no_timeout = std::ptr::null::<libc::timespec>();
    // SAFETY: the word outlives the call, which reads it and no other memory.
    let result = unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, value, no_timeout) };
    assert!(matches!(Errno::result(result), Ok(0 | 1) | Err(Errno::EAGAIN)));
}

fn new_eventfd() -> File {
    // SAFETY: no pointers; the kernel gives out a descriptor that is nobody else's.
    unsafe { OwnedFd::from_raw_fd(Errno::result(libc::eventfd(0, libc::EFD_CLOEXEC)).unwrap()) }.into()
}

fn new_epoll_of(file: &File) -> OwnedFd {
    let mut event = libc::epoll_event { events: libc::EPOLLIN.cast_unsigned(), u64: 0 };
    // SAFETY: the descriptor is nobody else's; the event is read before epoll_ctl returns.
    unsafe {
        let epoll = OwnedFd::from_raw_fd(Errno::result(libc::epoll_create1(libc::EPOLL_CLOEXEC)).unwrap());
        let added = libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, file.as_raw_fd(), &raw mut event);
        Errno::result(added).unwrap();
        epoll
    }
}

/// epoll_wait with room for one event.
fn nr_ready(epoll: &OwnedFd, timeout_ms: i32) -> i32 {
    let mut event = libc::epoll_event { events: 0, u64: 0 };
    // SAFETY: room for the one event that is asked for.
    Errno::result(unsafe { libc::epoll_wait(epoll.as_raw_fd(), &raw mut event, 1, timeout_ms) }).unwrap()
}

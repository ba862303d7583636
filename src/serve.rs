// SPDX-License-Identifier: GPL-2.0-only
//! One thread, one poll loop: clients that ask for a domain, readers of the statistics, the ends of
//! domains, signals, and an eye on whether the kernel has ejected the scheduler.
//!
//! Whoever may connect may also misbehave, so nothing here blocks on a client, and everything that a
//! client can make the loader keep is bounded.

use std::collections::BTreeMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use libbpf_rs::OpenObject;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signalfd::{SignalFd, siginfo};
use nix::sys::socket::{SockType, getsockopt, sockopt};
use nix::unistd::Uid;

use crate::args::LoadArgs;
use crate::domains::{Domains, Lease};
use crate::precondition;
use crate::scheduler::Scheduler;
use crate::shared_abi::{UMCG_ABI_VERSION, umcg_hello, umcg_welcome};
use crate::socket::{self, Greeting, Socket};
use crate::stats::{Metrics, Reader, stats_path};

/// How often to look for what no descriptor tells: an ejection, a closing domain's last task.
const TICK_MS: u16 = 100;
/// How long a client may take to say hello. The library says it at once.
const HELLO_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the programs on tracepoints stay after the last domain. To attach them again makes all of the kernel's wait for it.
const TRACING_LINGERS: Duration = Duration::from_secs(5);
/// Clients that have not said hello yet; one more, and the oldest must go.
const MAX_GREETERS: usize = 64;
/// Readers of the statistics; one more, and the oldest must go.
const MAX_READERS: usize = 16;
/// Connections to accept before others get their turn.
const ACCEPT_BATCH: usize = 16;

/// Why serving has ended.
pub(crate) enum Stop<T> {
    /// The caller's answer to a signal.
    Signal(T),
    /// The kernel has ejected the scheduler.
    Ejected,
}

/// A client that has not said hello.
#[derive(Debug)]
struct Greeter {
    connection: OwnedFd,
    deadline: Instant,
}

/// What a descriptor in the poll set stands for.
#[derive(Clone, Copy, Debug)]
enum Source {
    Signals,
    Clients,
    Readers,
    Greeter(u64),
    Domain(u32),
    Reader(u64),
}

#[derive(Debug)]
struct Sockets {
    clients: Socket,
    readers: Socket,
}

/// A loaded scheduler with its clients. Dropping it ends both in an orderly way.
pub(crate) struct Service<'obj> {
    scheduler: Scheduler<'obj>,
    partial: bool,
    /// None once the service has stopped.
    sockets: Option<Sockets>,
    domains: Domains,
    /// By number in order of arrival, like `readers`.
    greeters: BTreeMap<u64, Greeter>,
    readers: BTreeMap<u64, Reader>,
    arrivals: u64,
    stats_interval: Option<Duration>,
    next_stats: Instant,
    /// Nobody has a domain any more by then.
    quiet_at: Instant,
}

/// Descriptors that serving takes: three for each domain, the bounded rest, and libbpf's.
pub(crate) fn open_files(args: &LoadArgs) -> u64 {
    3 * u64::from(args.max_domains) + (MAX_GREETERS + MAX_READERS) as u64 + 256
}

impl<'obj> Service<'obj> {
    /// Loads the scheduler, then listens on `path`: a socket that can be connected to is served.
    pub(crate) fn start(
        args: &LoadArgs,
        path: &Path,
        object: &'obj mut MaybeUninit<OpenObject>,
    ) -> Result<Self> {
        let group = socket::find_group(args.group.as_deref())?;
        precondition::check()?;
        socket::check_free(path, SockType::SeqPacket)?;
        socket::create_parent(path)?;
        let scheduler = Scheduler::load(args, object)?;
        // Only one scheduler can be attached, so from here on nobody else tries to take the path.
        let sockets = Sockets {
            readers: Socket::bind(&stats_path(path), SockType::Stream, group)?,
            clients: Socket::bind(path, SockType::SeqPacket, group)?,
        };
        let stats_interval = args.stats.map(|seconds| Duration::from_secs(seconds.into()));
        log::info!("serving on {}", path.display());
        Ok(Self {
            scheduler,
            partial: args.partial,
            sockets: Some(sockets),
            domains: Domains::new(args),
            greeters: BTreeMap::new(),
            readers: BTreeMap::new(),
            arrivals: 0,
            stats_interval,
            next_stats: Instant::now() + stats_interval.unwrap_or_default(),
            quiet_at: Instant::now(),
        })
    }

    /// Serves until the kernel ejects the scheduler, or `on_signal` has an answer to a signal.
    pub(crate) fn serve_until<T>(
        &mut self,
        signals: &SignalFd,
        mut on_signal: impl FnMut(&siginfo) -> Result<Option<T>>,
    ) -> Result<Stop<T>> {
        loop {
            for source in self.ready(signals)? {
                match source {
                    Source::Signals => {
                        while let Some(signal) = signals.read_signal().context("cannot read signals")? {
                            if let Some(answer) = on_signal(&signal)? {
                                return Ok(Stop::Signal(answer));
                            }
                        }
                    }
                    Source::Clients => self.accept_clients(),
                    Source::Readers => self.accept_readers(),
                    Source::Greeter(id) => self.greet(id),
                    Source::Domain(number) => self.domains.end_lease(number),
                    Source::Reader(id) => self.answer(id),
                }
            }
            if self.scheduler.ejected() {
                return Ok(Stop::Ejected);
            }
            self.tick();
        }
    }

    /// Stops serving, tells the clients, and gives all threads back to the kernel's own scheduler.
    pub(crate) fn stop(&mut self) {
        if self.sockets.take().is_none() {
            return;
        }
        self.greeters.clear();
        self.readers.clear();
        self.scheduler.detach();
        // The BPF side has done so when it stopped; not before, or clients would act while it still does.
        self.domains.end_epoch();
    }

    /// Stops, and prints why the scheduler has exited.
    pub(crate) fn stop_and_report(&mut self) -> Result<()> {
        self.stop();
        self.scheduler.report_exit()
    }

    /// Stops, prints the kernel's debug dump, and says that and why the kernel has ejected the scheduler.
    pub(crate) fn ejection(&mut self) -> anyhow::Error {
        const ADVICE: &str = "start it again, and let its programs reopen their domains";
        match self.stop_and_report() {
            Ok(()) => anyhow!("the kernel ejected the scheduler; {ADVICE}"),
            Err(reason) => anyhow!("the kernel ejected the scheduler: {reason}; {ADVICE}"),
        }
    }

    /// Waits for a tick at most; what has something to say.
    fn ready(&self, signals: &SignalFd) -> Result<Vec<Source>> {
        // The client's end was closed, or shut down. A client that has its domain has nothing to say any
        // more, so what it sends is neither asked for nor read.
        let hangup = PollFlags::from_bits_retain(libc::POLLRDHUP);
        let input = PollFlags::POLLIN;

        let mut watched = vec![(Source::Signals, signals.as_fd(), input)];
        if let Some(sockets) = &self.sockets {
            watched.push((Source::Clients, sockets.clients.listener.as_fd(), input));
            watched.push((Source::Readers, sockets.readers.listener.as_fd(), input));
        }
        for (&id, greeter) in &self.greeters {
            watched.push((Source::Greeter(id), greeter.connection.as_fd(), input));
        }
        for (number, lease) in self.domains.leases() {
            watched.push((Source::Domain(number), lease.connection.as_fd(), hangup));
            watched.push((Source::Domain(number), lease.process.as_fd(), input));
        }
        for (&id, reader) in &self.readers {
            watched.push((Source::Reader(id), reader.as_fd(), input));
        }

        let mut fds: Vec<_> = watched.iter().map(|&(_, fd, events)| PollFd::new(fd, events)).collect();
        match poll(&mut fds, PollTimeout::from(TICK_MS)) {
            Err(Errno::EINTR) => return Ok(Vec::new()),
            result => result.context("cannot poll; lower --max-domains")?,
        };
        let ready = |fd: &PollFd| fd.revents().is_none_or(|events| !events.is_empty());
        Ok(watched.iter().zip(&fds).filter(|(_, fd)| ready(fd)).map(|(&(source, ..), _)| source).collect())
    }

    /// What is due without any descriptor's saying so.
    fn tick(&mut self) {
        let now = Instant::now();
        self.greeters.retain(|_, greeter| greeter.deadline > now);
        self.domains.reap(&self.scheduler);
        if !self.domains.is_empty() {
            self.quiet_at = now + TRACING_LINGERS;
        } else if self.quiet_at <= now {
            self.scheduler.stop_tracing();
        }
        if let Some(interval) = self.stats_interval.filter(|_| self.next_stats <= now) {
            self.next_stats = now + interval;
            match self.metrics() {
                Ok(metrics) => eprintln!("{metrics}"),
                Err(error) => log::warn!("no statistics: {error:#}"),
            }
        }
    }

    fn accept_clients(&mut self) {
        for _ in 0..ACCEPT_BATCH {
            let Some(connection) = self.sockets.as_ref().and_then(|sockets| accept(&sockets.clients)) else {
                return;
            };
            self.arrivals += 1;
            let deadline = Instant::now() + HELLO_TIMEOUT;
            self.greeters.insert(self.arrivals, Greeter { connection: connection.into(), deadline });
            // Its hello may have come along; so a flood of silent clients cannot crowd out one that speaks.
            self.greet(self.arrivals);
            if self.greeters.len() > MAX_GREETERS {
                self.greeters.pop_first();
            }
        }
    }

    fn accept_readers(&mut self) {
        for _ in 0..ACCEPT_BATCH {
            let Some(stream) = self.sockets.as_ref().and_then(|sockets| accept(&sockets.readers)) else {
                return;
            };
            if let Err(error) = stream.set_nonblocking(true) {
                log::warn!("cannot serve statistics: {error}");
                continue;
            }
            self.arrivals += 1;
            self.readers.insert(self.arrivals, Reader::new(stream));
            if self.readers.len() > MAX_READERS {
                self.readers.pop_first();
            }
        }
    }

    /// Hears what greeter `id` has to say.
    fn greet(&mut self, id: u64) {
        let Some(greeter) = self.greeters.get(&id) else {
            return;
        };
        let greeting = socket::receive_hello(greeter.connection.as_fd());
        if matches!(greeting, Greeting::Silence) {
            return;
        }
        let Some(Greeter { connection, .. }) = self.greeters.remove(&id) else {
            return;
        };
        match greeting {
            Greeting::Silence | Greeting::End => {}
            Greeting::Garbage => refuse(&connection, Errno::EPROTO),
            Greeting::Hello(hello) => match self.open(&connection, &hello) {
                Ok(welcome) => self.welcome(connection, &welcome),
                Err(errno) => refuse(&connection, errno),
            },
        }
    }

    /// Opens a domain for the user at the other end.
    fn open(&mut self, connection: &OwnedFd, hello: &umcg_hello) -> Result<umcg_welcome, Errno> {
        let user = Uid::from_raw(getsockopt(connection, sockopt::PeerCredentials)?.uid());
        let welcome = self.domains.open(&mut self.scheduler, user, hello)?;
        // Its client may be gone before anybody looks again, and come back at once.
        self.quiet_at = Instant::now() + TRACING_LINGERS;
        Ok(welcome)
    }

    /// Hands an open domain to its client. If that fails, the domain has no lease and is reaped.
    fn welcome(&mut self, connection: OwnedFd, welcome: &umcg_welcome) {
        let number = welcome.domain;
        let Some(map) = self.domains.map_for_client(number) else {
            return;
        };
        let sent = getsockopt(&connection, sockopt::PeerPidfd).and_then(|process| {
            socket::send_welcome(
                connection.as_fd(),
                welcome,
                &[map.as_fd(), self.scheduler.control_program()],
            )?;
            Ok(process)
        });
        match sent {
            Ok(process) => {
                log::debug!("domain {number}: {} tasks for {}", welcome.nr_slots, peer(&connection));
                self.domains.lease(number, Lease { connection, process });
            }
            Err(error) => log::debug!("domain {number}: its client is gone: {error}"),
        }
    }

    /// Answers what reader `id` of the statistics has asked.
    fn answer(&mut self, id: u64) {
        let Some(mut reader) = self.readers.remove(&id) else {
            return;
        };
        if reader.serve(|| self.metrics()) {
            self.readers.insert(id, reader);
        }
    }

    fn metrics(&self) -> Result<Metrics> {
        let mut nr_domains = 0;
        let mut nr_tasks = 0;
        for number in self.domains.numbers() {
            nr_domains += 1;
            nr_tasks += u64::from(self.scheduler.nr_tasks(number)?);
        }
        Ok(Metrics::new(self.partial, nr_domains, nr_tasks, &self.scheduler.counters()?))
    }
}

impl Drop for Service<'_> {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The next connection that waits, if any.
fn accept(socket: &Socket) -> Option<UnixStream> {
    match socket.listener.accept() {
        Ok((stream, _)) => Some(stream),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
        Err(error) => {
            // Our own descriptors are bounded, so it is the system that has run out: give it a moment,
            // for the connection stays and poll() would return at once.
            log::warn!("cannot accept a connection: {error}");
            std::thread::sleep(Duration::from_millis(TICK_MS.into()));
            None
        }
    }
}

/// Tells a client why it gets no domain; it may be gone, which is its own affair.
fn refuse(connection: &OwnedFd, errno: Errno) {
    log::debug!("refused a domain to {}: {errno}", peer(connection));
    let welcome =
        umcg_welcome { error: -(errno as i32), abi_version: UMCG_ABI_VERSION, ..Default::default() };
    if let Err(error) = socket::send_welcome(connection.as_fd(), &welcome, &[]) {
        log::debug!("it does not know: {error}");
    }
}

/// The process at the other end, for the log.
fn peer(connection: &OwnedFd) -> String {
    getsockopt(connection, sockopt::PeerCredentials)
        .map_or_else(|error| error.to_string(), |peer| format!("pid {} of uid {}", peer.pid(), peer.uid()))
}

// SPDX-License-Identifier: GPL-2.0-only
//! The domains: who has which number, memory and slots, from the welcome until the last task is gone.
//!
//! A domain lives as long as its *lease*: the client's connection and process. When either ends, the
//! domain is *closing*: it has no lease any more, and is freed as soon as the kernel side has no task of
//! it left, and nobody but us its memory. (A process that is being killed has tasks for a moment after its
//! connection is gone; and what somebody keeps is to count as his.)

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::fd::OwnedFd;

use libbpf_rs::{MapCore, MapFlags, MapHandle};
use nix::errno::Errno;
use nix::unistd::Uid;

use crate::args::LoadArgs;
use crate::bytes::Bytes;
use crate::scheduler::{Scheduler, create_domain_map};
use crate::shared_abi::{
    UMCG_ABI_VERSION, UMCG_DOMAIN_PARTIAL, UMCG_MAGIC, UMCG_STATE_NONE, umcg_cell, umcg_header, umcg_hello,
    umcg_task, umcg_welcome,
};
use crate::slots::Slots;

/// The signs that a process still uses its domain.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) connection: OwnedFd,
    /// Readable once the process has exited. A child may hold a duplicate of the connection.
    pub(crate) process: OwnedFd,
}

/// What one user may have at a time, so that nobody keeps the others out. Root is not limited by it.
#[derive(Clone, Copy, Debug)]
struct Share {
    domains: usize,
    tasks: u32,
}

impl Share {
    fn new(args: &LoadArgs) -> Self {
        let half = |n: u32| n.div_ceil(2);
        Self {
            domains: args.max_domains_per_user.unwrap_or(half(args.max_domains)) as usize,
            tasks: args.max_tasks_per_user.unwrap_or(half(args.max_tasks)),
        }
    }

    /// Whether a user who has domains of so many tasks each may have another one of `more` tasks.
    fn allows(self, domains: &[u32], more: u32) -> bool {
        let tasks = domains.iter().fold(more, |sum, &tasks| sum.saturating_add(tasks));
        domains.len() < self.domains && tasks <= self.tasks
    }
}

#[derive(Debug)]
struct Domain {
    /// Who opened it.
    user: Uid,
    slots: Range<u32>,
    map: MapHandle,
    lease: Option<Lease>,
}

/// All domains, by number.
#[derive(Debug)]
pub(crate) struct Domains {
    domains: BTreeMap<u32, Domain>,
    max_domains: u32,
    share: Share,
    slots: Slots,
    partial: bool,
}

impl Domains {
    pub(crate) fn new(args: &LoadArgs) -> Self {
        Self {
            domains: BTreeMap::new(),
            max_domains: args.max_domains,
            share: Share::new(args),
            slots: Slots::new(args.max_tasks),
            partial: args.partial,
        }
    }

    /// Opens the domain that `hello` asks for. It is closing until it gets its lease.
    pub(crate) fn open(
        &mut self,
        scheduler: &mut Scheduler,
        user: Uid,
        hello: &umcg_hello,
    ) -> Result<umcg_welcome, Errno> {
        check_hello(hello)?;
        if !user.is_root() && !self.share.allows(&self.of_user(user), hello.max_tasks) {
            return Err(Errno::ENOSPC);
        }
        let number = (0..self.max_domains).find(|n| !self.domains.contains_key(n)).ok_or(Errno::ENOSPC)?;
        let nonce = nonce()?;
        let slots = self.slots.take(hello.max_tasks).ok_or(Errno::ENOSPC)?;
        let opened = new_map(hello.max_tasks, self.partial).and_then(|map| {
            scheduler.start_tracing()?;
            scheduler.open_domain(number, slots.start, hello.max_tasks, nonce, &map)?;
            Ok(map)
        });
        let map = opened.inspect_err(|_| self.slots.give_back(&slots))?;
        self.domains.insert(number, Domain { user, slots, map, lease: None });
        Ok(umcg_welcome {
            error: 0,
            abi_version: UMCG_ABI_VERSION,
            domain: number,
            nr_slots: hello.max_tasks,
            nonce,
        })
    }

    /// The number of tasks of each domain of a user, also of those that are closing.
    fn of_user(&self, user: Uid) -> Vec<u32> {
        let theirs = self.domains.values().filter(|domain| domain.user == user);
        theirs.map(|domain| domain.slots.len() as u32).collect()
    }

    /// Keeps domain `number` open as long as `lease` lasts.
    pub(crate) fn lease(&mut self, number: u32, lease: Lease) {
        if let Some(domain) = self.domains.get_mut(&number) {
            domain.lease = Some(lease);
        }
    }

    /// Ends the lease of domain `number`.
    pub(crate) fn end_lease(&mut self, number: u32) {
        if let Some(domain) = self.domains.get_mut(&number) {
            domain.lease = None;
        }
    }

    /// Frees the domains that are closing and not in use any more.
    pub(crate) fn reap(&mut self, scheduler: &Scheduler) {
        self.domains.retain(|&number, domain| {
            if domain.lease.is_some() {
                return true;
            }
            match scheduler.close_domain(number) {
                Ok(()) => {
                    log::debug!("domain {number}: closed");
                    self.slots.give_back(&domain.slots);
                    false
                }
                // Tried again at the next wake-up.
                Err(error) => {
                    log::debug!("domain {number}: not closed yet: {error}");
                    true
                }
            }
        });
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.domains.is_empty()
    }

    /// Tells the clients that nobody schedules them any more.
    pub(crate) fn end_epoch(&self) {
        for (number, domain) in &self.domains {
            let header = umcg_header { epoch: 1, ..header(domain.slots.len() as u32, self.partial) };
            if let Err(error) = domain.map.update(&0u32.to_ne_bytes(), header.as_bytes(), MapFlags::ANY) {
                log::warn!("domain {number}: its process does not know that the scheduler is gone: {error}");
            }
        }
    }

    /// The memory of domain `number`, for its client: another open file than ours, so that the kernel side
    /// can tell whether they still have it.
    pub(crate) fn map_for_client(&self, number: u32) -> Option<MapHandle> {
        let map = &self.domains.get(&number)?.map;
        map.info()
            .and_then(|info| MapHandle::from_map_id(info.info.id))
            .inspect_err(|error| log::warn!("domain {number}: cannot be handed out: {error}"))
            .ok()
    }

    /// All leases, with the number of their domain.
    pub(crate) fn leases(&self) -> impl Iterator<Item = (u32, &Lease)> {
        self.domains.iter().filter_map(|(&number, domain)| Some((number, domain.lease.as_ref()?)))
    }

    /// The numbers of all domains, also of those that are closing.
    pub(crate) fn numbers(&self) -> impl Iterator<Item = u32> {
        self.domains.keys().copied()
    }
}

/// What is wrong with a client's first message.
fn check_hello(hello: &umcg_hello) -> Result<(), Errno> {
    if hello.magic != UMCG_MAGIC || hello.abi_version != UMCG_ABI_VERSION {
        return Err(Errno::EPROTO);
    }
    if hello.max_tasks == 0 || hello.reserved != 0 {
        return Err(Errno::EINVAL);
    }
    Ok(())
}

fn header(nr_slots: u32, partial: bool) -> umcg_header {
    umcg_header {
        magic: UMCG_MAGIC,
        abi_version: UMCG_ABI_VERSION,
        nr_slots,
        flags: if partial { UMCG_DOMAIN_PARTIAL } else { 0 },
        ..Default::default()
    }
}

/// The memory of a domain, with no task registered.
fn new_map(nr_slots: u32, partial: bool) -> Result<MapHandle, Errno> {
    let map = create_domain_map(nr_slots)?;
    let free = umcg_cell {
        task: umcg_task { umcg_status: UMCG_STATE_NONE, ..Default::default() },
        ..Default::default()
    };
    let header = header(nr_slots, partial);
    let keys: Vec<u8> = (0..=nr_slots).flat_map(u32::to_ne_bytes).collect();
    let cells = [header.as_bytes(), &free.as_bytes().repeat(nr_slots as usize)].concat();
    map.update_batch(&keys, &cells, nr_slots + 1, MapFlags::ANY, MapFlags::ANY)
        .inspect_err(|error| log::warn!("cannot fill a domain: {error}"))
        .map_err(|_| Errno::ENOMEM)?;
    Ok(map)
}

/// A number that nobody can guess, and not 0, which means "used up".
fn nonce() -> Result<u64, Errno> {
    let mut bytes = [0; size_of::<u64>()];
    File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut bytes))
        .inspect_err(|error| log::warn!("cannot read /dev/urandom: {error}"))
        .map_err(|_| Errno::ENOMEM)?;
    Ok(u64::from_ne_bytes(bytes).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HELLO: umcg_hello =
        umcg_hello { magic: UMCG_MAGIC, abi_version: UMCG_ABI_VERSION, max_tasks: 1, reserved: 0 };

    #[test]
    fn a_user_has_a_share_of_domains_and_of_tasks() {
        let share = Share { domains: 2, tasks: 10 };
        assert!(share.allows(&[], 10));
        assert!(!share.allows(&[], 11));
        assert!(share.allows(&[6], 4));
        assert!(!share.allows(&[6], 5));
        assert!(!share.allows(&[1, 1], 1));
        assert!(!share.allows(&[6], u32::MAX), "the sum overflows");
    }

    #[test]
    fn a_hello_is_checked_before_anything_is_allocated() {
        let check = |hello| check_hello(&hello).err();
        assert_eq!(check(HELLO), None);
        assert_eq!(check(umcg_hello { magic: 0, ..HELLO }), Some(Errno::EPROTO));
        assert_eq!(check(umcg_hello { abi_version: 2, ..HELLO }), Some(Errno::EPROTO));
        assert_eq!(check(umcg_hello { max_tasks: 0, ..HELLO }), Some(Errno::EINVAL));
        assert_eq!(check(umcg_hello { reserved: 1, ..HELLO }), Some(Errno::EINVAL));
    }
}

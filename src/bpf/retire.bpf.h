/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * How tasks go: they unregister, exit or call exec, or they die.
 *
 * A slot is emptied and taken out of `pids` and `tids` first, and given up under the lock last: see register.bpf.h.
 */
#ifndef UMCG_RETIRE_BPF_H
#define UMCG_RETIRE_BPF_H

#include "serve.bpf.h"

/* Gives the slot up: from here on anybody may claim it. Under the lock. */
static __always_inline void retire_locked(struct umcg_domain *domain, struct umcg_ref *self,
					  struct umcg_ref *host, struct umcg_ref *server, u64 now_ns,
					  struct umcg_released *released)
{
	domain->nr_tasks--;
	set_state(self->slot, UMCG_FREE);
	status_show(&self->cell->task.umcg_status, UMCG_STATE_NONE);
	end_serving(self, host, &released->host);
	self->slot->serving = 0;
	UMCG_XCHG(&self->slot->custody, UMCG_CUSTODY_FREE);
	if (!server->slot)
		return;
	self->cell->task.umcg_runnable_ts = now_ns;
	push_runnable(server, self);
	tell_server(server, &released->told);
}

/* Unless its pid or tid is another task's by now, which is registered, too. */
static __always_inline void unpublish(const struct umcg_slot *slot, u32 nr)
{
	struct umcg_tid_key key = { .domain = slot->domain, .tid = slot->tid };
	s32 pid = slot->pid;
	u32 *known = bpf_map_lookup_elem(&pids, &pid);

	if (known && *known == nr)
		bpf_map_delete_elem(&pids, &pid);
	known = bpf_map_lookup_elem(&tids, &key);
	if (known && *known == nr)
		bpf_map_delete_elem(&tids, &key);
}

/* @surprise: it did not unregister; its server learns of it by the runnable list. */
static __always_inline int retire(u32 nr, bool surprise)
{
	struct umcg_released released = {};
	struct umcg_ref self, host, server = {};
	struct umcg_domain *domain;
	struct task_struct *old;
	u64 now_ns = bpf_ktime_get_ns();
	u32 domain_nr, server_tid;

	if (!ref_get(&self, nr))
		return -EINVAL;
	domain_nr = self.slot->domain;
	domain = domain_of(domain_nr);
	if (!domain)
		return -EINVAL;
	if (!surprise && UMCG_LOAD(&self.slot->serving))
		return -EBUSY; /* only its own umcg_wait() can change that to yes */
	server_tid = UMCG_LOAD(&self.cell->task.umcg_server_tid);
	if (!surprise || server_tid == self.slot->tid || !ref_find(&server, domain_nr, server_tid) ||
	    !ref_is_server(&server))
		server.slot = NULL;

	/* Empty it before it is free: the next registration may claim it the moment that it is. */
	old = bpf_kptr_xchg(&self.slot->task, NULL);
	if (!old)
		return -EINVAL; /* somebody else is at it */
	unpublish(self.slot, nr);
	is_noted(self.slot);
	bpf_task_release(old);

	lock_with_host(domain, &self, &host);
	if (server.slot && !ref_is(&server, domain_nr, server_tid))
		server.slot = NULL;
	retire_locked(domain, &self, &host, &server, now_ns, &released);
	bpf_spin_unlock(&domain->lock);
	__sync_fetch_and_add(&nr_registered, -1);
	queue_released(&released);
	return 0;
}

static __always_inline void retire_by_surprise(u32 nr)
{
	if (nr && !UMCG_LOAD(&epoch_over))
		retire(nr, true);
}

/* Exits in whatever state: what SIGKILL leaves of a task is this. */
SEC("tp_btf/sched_process_exit")
int BPF_PROG(umcg_task_exit, struct task_struct *p)
{
	retire_by_surprise(slot_of_pid(p->pid, p));
	return 0;
}

/* The program that registered is gone; the new image starts unregistered, and with the pid of its process. */
SEC("tp_btf/sched_process_exec")
int BPF_PROG(umcg_task_exec, struct task_struct *p, pid_t old_pid)
{
	retire_by_surprise(slot_of_pid(old_pid, p));
	return 0;
}

#endif /* UMCG_RETIRE_BPF_H */

/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * How tasks come: UMCG_CTL_REGISTER.
 *
 * A slot is claimed under the lock, filled, and only then published in `pids` and `tids`; it is taken out of these
 * first and given up under the lock last (retire.bpf.h). Who found it in between sees by ref_is() that it is gone.
 */
#ifndef UMCG_REGISTER_BPF_H
#define UMCG_REGISTER_BPF_H

#include "retire.bpf.h"
#include "serve.bpf.h"
#include "sweep.bpf.h"
#include "timeout.bpf.h"

/* Its tid in its own pid namespace, which is what the program knows it by. */
static __always_inline u32 task_vtid(struct task_struct *p)
{
	struct pid *pid = BPF_CORE_READ(p, thread_pid);
	u32 level = BPF_CORE_READ(pid, level);
	struct upid upid = {};
	u64 at = (u64)pid + bpf_core_field_offset(struct pid, numbers);

	bpf_probe_read_kernel(&upid, sizeof(upid), (void *)(at + level * bpf_core_type_size(struct upid)));
	return upid.nr;
}

/* The calling process's domain, or NULL: the number is the client's word, the owner is ours. */
static __always_inline struct umcg_domain *own_domain(u32 nr, struct task_struct *p)
{
	struct umcg_domain *domain = domain_of(nr);

	return domain && domain->first_slot && domain->tgid == p->tgid ? domain : NULL;
}

/* What umcg_register() promises to check of the struct; a server comes RUNNING, a worker RUNNABLE. */
static __always_inline int check_task(const struct umcg_task *task, bool is_server)
{
	u32 state = UMCG_LOAD(&task->umcg_status) & UMCG_STATE_MASK;

	if (UMCG_LOAD(&task->umcg_reserved))
		return -EINVAL;
	return state == (is_server ? UMCG_STATE_RUNNING : UMCG_STATE_RUNNABLE) ? 0 : -EINVAL;
}

/* Under the lock all is looked at again: the domain may have been closed, and be another process's by now. */
static __always_inline int claim_slot(struct umcg_domain *domain, const struct umcg_ref *self, u32 first_slot,
				      u32 tgid, bool is_server)
{
	struct umcg_slot *slot = self->slot;
	int ret = -EINVAL;

	bpf_spin_lock(&domain->lock);
	if (domain->tgid == tgid && domain->first_slot == first_slot && self->nr - first_slot < domain->nr_slots &&
	    slot->state == UMCG_FREE) {
		domain->nr_tasks++;
		set_state(slot, is_server ? UMCG_ACTIVE : UMCG_NEW);
		slot->is_server = is_server;
		slot->listed_on = 0;
		slot->host = 0;
		slot->serving = 0;
		slot->tid = 0; /* ref_is() nobody yet */
		slot->deadline_ns = 0;
		slot->asleep = false;
		slot->captured = false;
		ret = 0;
	}
	bpf_spin_unlock(&domain->lock);
	return ret;
}

/* A claimed slot that could not be filled. */
static __always_inline void unclaim_slot(struct umcg_domain *domain, struct umcg_slot *slot)
{
	bpf_spin_lock(&domain->lock);
	domain->nr_tasks--;
	set_state(slot, UMCG_FREE);
	bpf_spin_unlock(&domain->lock);
}

static __always_inline void announce_worker(struct umcg_domain *domain, struct umcg_ref *self, u32 server_tid)
{
	struct umcg_released released = {};
	struct umcg_ref server;
	u64 now_ns = bpf_ktime_get_ns();

	if (!ref_find(&server, self->slot->domain, server_tid))
		return; /* it left since it was checked: the worker waits as one whose server is gone */
	bpf_spin_lock(&domain->lock);
	if (ref_is(&server, self->slot->domain, server_tid)) {
		self->cell->task.umcg_runnable_ts = now_ns;
		push_runnable(&server, self);
		tell_server(&server, &released.told);
	}
	bpf_spin_unlock(&domain->lock);
	queue_released(&released);
}

static __always_inline int publish(struct umcg_slot *slot, struct task_struct *p, u32 nr)
{
	struct umcg_tid_key key = { .domain = slot->domain, .tid = slot->tid };
	struct task_struct *ref = bpf_task_acquire(p);
	u32 *hint;

	if (!ref)
		return -ESRCH;
	ref = bpf_kptr_xchg(&slot->task, ref);
	if (ref)
		bpf_task_release(ref);
	if (!bpf_map_update_elem(&pids, &slot->pid, &nr, BPF_ANY) && !bpf_map_update_elem(&tids, &key, &nr, BPF_ANY)) {
		hint = tid_hint(key.domain, key.tid);
		if (hint)
			UMCG_STORE(hint, nr);
		return 0;
	}
	unpublish(slot, nr);
	ref = bpf_kptr_xchg(&slot->task, NULL);
	if (ref)
		bpf_task_release(ref);
	return -ENOMEM;
}

static int ctl_register(struct umcg_ctl_args *args, struct task_struct *p)
{
	struct umcg_domain *domain = own_domain(args->domain, p);
	struct umcg_ref self, server;
	u32 nr, tid = task_vtid(p), server_tid, first_slot;
	bool is_server;
	int ret;

	if (!domain || args->slot - 1 >= domain->nr_slots)
		return -EFAULT;
	if (slot_of_pid(p->pid, p))
		return -EEXIST;
	first_slot = domain->first_slot;
	nr = first_slot + args->slot - 1;
	self.nr = nr;
	self.slot = slot_at(nr);
	self.cell = cell_at(args->domain, args->slot);
	if (!self.slot || !self.cell)
		return -EFAULT;

	server_tid = UMCG_LOAD(&self.cell->task.umcg_server_tid);
	is_server = server_tid == tid;
	ret = check_task(&self.cell->task, is_server);
	if (ret)
		return ret;
	if (!is_server && (!ref_find(&server, args->domain, server_tid) || !ref_is_server(&server)))
		return -ESRCH;
	if (UMCG_LOAD(&self.slot->state) != UMCG_FREE)
		return -EINVAL; /* before its timer is touched, which may be in use */
	ret = is_server ? init_timeout(self.slot) : 0;
	if (ret)
		return ret;
	ret = claim_slot(domain, &self, first_slot, p->tgid, is_server);
	if (ret)
		return ret;

	self.slot->domain = args->domain;
	self.slot->cell = args->slot;
	self.slot->addr = args->addr;
	self.slot->in_handler = false;
	self.slot->seen_signals = 0;
	self.slot->charged_ns = p->se.sum_exec_runtime;
	self.slot->vtime = p->scx.dsq_vtime & ~NOTE_MASK;
	self.slot->payer = 0;
	self.slot->boundary = 0;
	self.slot->tid = tid;
	self.slot->pid = p->pid;
	self.cell->task.umcg_tid = tid;
	__sync_fetch_and_add(&nr_registered, 1); /* before slot_of_pid() is to find it */
	ret = publish(self.slot, p, nr);
	if (ret) {
		__sync_fetch_and_add(&nr_registered, -1);
		unclaim_slot(domain, self.slot);
		return ret;
	}
	if (note_of(p) != nr)
		is_to_be_noted(self.slot);
	need_sweep();
	STAT_INC(registrations);
	if (!is_server)
		announce_worker(domain, &self, server_tid);
	return 0;
}

#endif /* UMCG_REGISTER_BPF_H */

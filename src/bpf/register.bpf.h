/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * How tasks come and go: the control program, which every client may run in its own threads, the loader's
 * program, and the tracepoints of exit and exec.
 *
 * A slot is claimed under the lock, filled, and only then published in `tids`; it is taken out of `tids`
 * first and given up under the lock last. Who found it in between sees by ref_is() that it is gone.
 */
#ifndef UMCG_REGISTER_BPF_H
#define UMCG_REGISTER_BPF_H

#include "compat.bpf.h"
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

/* So that a signal for this process is known to matter: see umcg_signal_generate. */
static __always_inline void mark_owner(struct task_struct *p)
{
	struct umcg_task_ctx *leader;

	bpf_rcu_read_lock();
	leader = bpf_task_storage_get(&task_ctxs, p->group_leader, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (leader)
		leader->owns_domain = true;
	bpf_rcu_read_unlock();
}

static int ctl_attach(struct umcg_ctl_args *args, struct task_struct *p)
{
	struct umcg_domain *domain = domain_of(args->domain);
	u64 nonce = args->nonce;
	u32 tgid = p->tgid;
	int ret = -EPERM;

	if (!domain)
		return -EINVAL;
	bpf_spin_lock(&domain->lock);
	if (nonce && domain->nonce == nonce) {
		domain->nonce = 0;
		domain->tgid = tgid;
		ret = 0;
	}
	bpf_spin_unlock(&domain->lock);
	if (!ret)
		mark_owner(p);
	return ret;
}

/* Gives the slot up: from here on anybody may claim it. Under the lock. */
static __always_inline void retire_locked(struct umcg_domain *domain, struct umcg_ref *self,
					  struct umcg_ref *host, struct umcg_ref *server, u64 now_ns,
					  struct umcg_released *released)
{
	domain->nr_tasks--;
	set_state(self->slot, UMCG_FREE);
	status_show(&self->cell->task.umcg_status, UMCG_STATE_NONE);
	end_serving(self, host, released);
	self->slot->serving = 0;
	UMCG_XCHG(&self->slot->custody, UMCG_CUSTODY_FREE);
	if (!server->slot)
		return;
	self->cell->task.umcg_runnable_ts = now_ns;
	push_runnable(server, self);
	tell_server(server, released);
}

/* @surprise: it did not unregister; its server learns of it by the runnable list. */
static __always_inline int retire_slot(u32 nr, struct umcg_task_ctx *tctx, bool surprise)
{
	struct umcg_released released = {};
	struct umcg_ref self, host, server;
	struct umcg_tid_key key = {};
	struct umcg_domain *domain;
	struct task_struct *old;
	u64 now_ns = bpf_ktime_get_ns();
	bool again = true;
	u32 server_tid;
	int i;

	if (!ref_get(&self, nr))
		return -EINVAL;
	domain = domain_of(self.slot->domain);
	if (!domain)
		return -EINVAL;
	if (!surprise && UMCG_LOAD(&self.slot->serving))
		return -EBUSY; /* only its own umcg_wait() can change that to yes */
	key.domain = self.slot->domain;
	key.tid = self.slot->tid;
	server_tid = UMCG_LOAD(&self.cell->task.umcg_server_tid);
	if (!surprise || server_tid == key.tid || !ref_find(&server, key.domain, server_tid) ||
	    !ref_is_server(&server))
		server.slot = NULL;

	/* Empty it before it is free: the next registration may claim it the moment that it is. */
	if (tctx)
		tctx->slot = 0;
	bpf_map_delete_elem(&tids, &key);
	old = bpf_kptr_xchg(&self.slot->task, NULL);
	if (!old)
		return -EINVAL; /* somebody else is at it */
	bpf_task_release(old);

	for (i = 0; i < UMCG_LOOK_UPS && again; i++) {
		if (!ref_get(&host, self.slot->host))
			host.slot = NULL;
		bpf_spin_lock(&domain->lock);
		again = self.slot->host != host.nr && i < UMCG_LOOK_UPS - 1;
		if (server.slot && !ref_is(&server, key.domain, server_tid))
			server.slot = NULL;
		if (!again)
			retire_locked(domain, &self, &host, &server, now_ns, &released);
		bpf_spin_unlock(&domain->lock);
	}
	__sync_fetch_and_add(&nr_registered, -1);
	bpf_rcu_read_lock();
	queue_released(&released);
	bpf_rcu_read_unlock();
	return 0;
}

static __always_inline int retire(struct umcg_task_ctx *tctx, bool surprise)
{
	return retire_slot(tctx->slot, tctx, surprise);
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
static __always_inline int claim_slot(struct umcg_domain *domain, struct umcg_slot *slot, u32 first_slot, u32 tgid,
				      bool is_server)
{
	int ret = -EINVAL;

	bpf_spin_lock(&domain->lock);
	if (domain->tgid == tgid && domain->first_slot == first_slot && slot->state == UMCG_FREE) {
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
		tell_server(&server, &released);
	}
	bpf_spin_unlock(&domain->lock);
	bpf_rcu_read_lock();
	queue_released(&released);
	bpf_rcu_read_unlock();
}

static __always_inline int publish(struct umcg_task_ctx *tctx, struct umcg_slot *slot, struct task_struct *p,
				   u32 nr)
{
	struct umcg_tid_key key = { .domain = slot->domain, .tid = slot->tid };
	struct task_struct *ref = bpf_task_acquire(p);

	if (!ref)
		return -ESRCH;
	ref = bpf_kptr_xchg(&slot->task, ref);
	if (ref)
		bpf_task_release(ref);
	tctx->slot = nr;
	if (!bpf_map_update_elem(&tids, &key, &nr, BPF_ANY))
		return 0;
	tctx->slot = 0;
	ref = bpf_kptr_xchg(&slot->task, NULL);
	if (ref)
		bpf_task_release(ref);
	return -ENOMEM;
}

static int ctl_register(struct umcg_ctl_args *args, struct task_struct *p)
{
	struct umcg_domain *domain = own_domain(args->domain, p);
	struct umcg_task_ctx *tctx = bpf_task_storage_get(&task_ctxs, p, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	struct umcg_ref self, server;
	u32 nr, tid = task_vtid(p), server_tid, first_slot;
	bool is_server;
	int ret;

	if (!domain || args->slot - 1 >= domain->nr_slots)
		return -EFAULT;
	if (!tctx)
		return -ENOMEM;
	if (tctx->slot)
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
	ret = init_timeout(self.slot);
	if (ret)
		return ret;
	ret = claim_slot(domain, self.slot, first_slot, p->tgid, is_server);
	if (ret)
		return ret;

	self.slot->domain = args->domain;
	self.slot->cell = args->slot;
	self.slot->addr = args->addr;
	self.slot->at_boundary = false;
	self.slot->in_handler = false;
	self.slot->seen_signals = 0;
	self.slot->tid = tid;
	self.cell->task.umcg_tid = tid;
	ret = publish(tctx, self.slot, p, nr);
	if (ret) {
		unclaim_slot(domain, self.slot);
		return ret;
	}
	__sync_fetch_and_add(&nr_registered, 1);
	need_sweep();
	STAT_INC(registrations);
	if (!is_server)
		announce_worker(domain, &self, server_tid);
	return 0;
}

static int ctl_unregister(struct task_struct *p)
{
	struct umcg_task_ctx *tctx = bpf_task_storage_get(&task_ctxs, p, 0, 0);

	return tctx && tctx->slot ? retire(tctx, false) : -EINVAL;
}

/* A waiting worker comes on the list, unless it is there. */
static __always_inline void list_again(struct umcg_ref *worker, struct umcg_ref *server,
				       struct umcg_released *released)
{
	if (worker->slot->state != UMCG_WAITING)
		return;
	if (!is_listed(worker, server))
		push_runnable(server, worker);
	tell_server(server, released);
}

static int ctl_kick(struct umcg_ctl_args *args, struct task_struct *p)
{
	struct umcg_domain *domain = own_domain(args->domain, p);
	struct umcg_released released = {};
	struct umcg_ref task, server;
	int ret = -ESRCH;
	u32 server_tid;

	if (!domain || !ref_find(&task, args->domain, args->tid))
		return -ESRCH;
	server_tid = UMCG_LOAD(&task.cell->task.umcg_server_tid);
	if (server_tid == args->tid || !ref_find(&server, args->domain, server_tid) || !ref_is_server(&server))
		server.slot = NULL;
	STAT_INC(kicks);

	bpf_spin_lock(&domain->lock);
	if (ref_is(&task, args->domain, args->tid)) {
		ret = 0;
		if (server_tid == args->tid)
			tell_server(&task, &released);
		else if (server.slot && ref_is(&server, args->domain, server_tid))
			list_again(&task, &server, &released);
	}
	bpf_spin_unlock(&domain->lock);
	bpf_rcu_read_lock();
	queue_released(&released);
	bpf_rcu_read_unlock();
	return ret;
}

static int ctl_rseq(struct umcg_ctl_args *args, struct task_struct *p)
{
	struct umcg_rseq_area area;

	rseq_area_of(p, &area);
	args->addr = area.addr;
	args->rseq_len = area.len;
	args->rseq_sig = area.sig;
	return 0;
}

SEC("syscall")
int umcg_ctl(struct umcg_ctl_args *args)
{
	struct task_struct *p = bpf_get_current_task_btf();

	switch (args->op) {
	case UMCG_CTL_ATTACH:
		args->result = ctl_attach(args, p);
		break;
	case UMCG_CTL_REGISTER:
		args->result = ctl_register(args, p);
		break;
	case UMCG_CTL_UNREGISTER:
		args->result = ctl_unregister(p);
		break;
	case UMCG_CTL_KICK:
		args->result = ctl_kick(args, p);
		break;
	case UMCG_CTL_RSEQ:
		args->result = ctl_rseq(args, p);
		break;
	default:
		args->result = -EINVAL;
	}
	return 0;
}

static int admin_open(struct umcg_admin_args *args, struct umcg_domain *domain)
{
	u32 first_slot = args->first_slot, nr_slots = args->nr_slots;
	u64 nonce = args->nonce;
	int ret = -EEXIST;

	bpf_spin_lock(&domain->lock);
	if (!domain->first_slot) {
		domain->tgid = 0;
		domain->nr_slots = nr_slots;
		domain->nr_tasks = 0;
		domain->nonce = nonce;
		domain->first_slot = first_slot;
		ret = 0;
	}
	bpf_spin_unlock(&domain->lock);
	if (ret)
		return ret;
	if (slot_limit < args->first_slot + args->nr_slots)
		slot_limit = args->first_slot + args->nr_slots;
	return 0;
}

static int admin_close(struct umcg_domain *domain)
{
	int ret = 0;

	bpf_spin_lock(&domain->lock);
	domain->nonce = 0;
	domain->tgid = 0; /* no registration from here on */
	if (domain->nr_tasks)
		ret = -EBUSY;
	else
		domain->first_slot = 0;
	bpf_spin_unlock(&domain->lock);
	return ret;
}

/* The loader's own: its descriptor never leaves it, so its arguments are believed. */
SEC("syscall")
int umcg_admin(struct umcg_admin_args *args)
{
	struct umcg_domain *domain = domain_of(args->domain);

	if (!domain)
		args->result = -EINVAL;
	else if (args->op == UMCG_ADMIN_OPEN)
		args->result = admin_open(args, domain);
	else if (args->op == UMCG_ADMIN_CLOSE)
		args->result = admin_close(domain);
	else
		args->result = -EINVAL;
	return 0;
}

/* Exits in whatever state: what SIGKILL leaves of a task is this. */
SEC("tp_btf/sched_process_exit")
int BPF_PROG(umcg_task_exit, struct task_struct *p)
{
	struct umcg_task_ctx *tctx = bpf_task_storage_get(&task_ctxs, p, 0, 0);

	if (tctx && tctx->slot)
		retire(tctx, true);
	return 0;
}

/* The program that registered is gone; the new image starts unregistered. */
SEC("tp_btf/sched_process_exec")
int BPF_PROG(umcg_task_exec, struct task_struct *p)
{
	struct umcg_task_ctx *tctx = bpf_task_storage_get(&task_ctxs, p, 0, 0);

	if (tctx && tctx->slot)
		retire(tctx, true);
	return 0;
}

#endif /* UMCG_REGISTER_BPF_H */

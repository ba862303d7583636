/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The control program, which every client may run in its own threads: its arguments are a client's word.
 */
#ifndef UMCG_CONTROL_BPF_H
#define UMCG_CONTROL_BPF_H

#include "compat.bpf.h"
#include "register.bpf.h"
#include "retire.bpf.h"

/* So that a signal for this process is known to matter: see umcg_signal_generate. */
static __always_inline void mark_owner(struct task_struct *p)
{
	struct umcg_process *process;

	bpf_rcu_read_lock();
	process = bpf_task_storage_get(&processes, p->group_leader, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (process)
		process->owns_domain = true;
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

static int ctl_unregister(struct task_struct *p)
{
	u32 nr = slot_of_pid(p->pid, p);

	return nr ? retire(nr, false) : -EINVAL;
}

/* A waiting worker comes on the list, unless it is there; so does one on its way to its first wait, inside umcg_register(). */
static __always_inline void list_again(struct umcg_ref *worker, struct umcg_ref *server,
				       u32 *released)
{
	if (worker->slot->state != UMCG_WAITING && worker->slot->state != UMCG_NEW)
		return;
	push_runnable(server, worker);
	tell_server(server, released);
}

static int ctl_kick(struct umcg_ctl_args *args, struct task_struct *p)
{
	struct umcg_domain *domain = own_domain(args->domain, p);
	struct umcg_released released = {};
	struct umcg_ref task, server = {};
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
			tell_server(&task, &released.told);
		else if (server.slot && ref_is(&server, args->domain, server_tid))
			list_again(&task, &server, &released.told);
	}
	bpf_spin_unlock(&domain->lock);
	queue_released(&released);
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

#endif /* UMCG_CONTROL_BPF_H */

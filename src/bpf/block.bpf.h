/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A task goes to sleep inside the kernel: ops.quiescent with SCX_DEQ_SLEEP, on its CPU, as the running task.
 *
 * RUNNING becomes BLOCKED, and the host is started by the ops.dispatch of the same schedule(). A task that
 * is not RUNNING stays what it is; that it sleeps is noted, because whoever runs it then must see it BLOCKED.
 *
 * Some sleeps end where the task wakes, others at the boundary to user code only (see capture.bpf.h). Which of the two, the kernel
 * says itself: who sleeps TASK_INTERRUPTIBLE | TASK_FREEZABLE may be frozen in place for as long as the machine is suspended, so it
 * holds nothing that anybody could wait for (lockdep looks at that). NFS sleeps so with locks all the same, by an exception that only
 * lockdep's own kernels can see (TASK_FREEZABLE_UNSAFE); so the system call must be one that touches no file, too.
 */
#ifndef UMCG_BLOCK_BPF_H
#define UMCG_BLOCK_BPF_H

#include "capture.bpf.h"

/* Under the lock. */
static __always_inline bool worker_blocks(struct umcg_ref *self, struct umcg_ref *host, u64 now_ns,
					  u32 *released)
{
	if (self->slot->state != UMCG_ACTIVE || !hosted_by(self, host))
		return false;
	if (!status_move(&self->cell->task.umcg_status, UMCG_STATE_RUNNING, UMCG_STATE_BLOCKED))
		return false;
	set_state(self->slot, UMCG_BLOCKED);
	self->slot->since_ns = now_ns;
	self->cell->task.umcg_blocked_ts = now_ns;
	push_blocked(host, self);
	end_serving(self, host, released);
	return true;
}

/* From the kernel's linux/sched.h. */
#define TASK_INTERRUPTIBLE_FREEZABLE (0x0001 | 0x2000)

/* x86-64's numbers of futex, nanosleep, rt_sigtimedwait, clock_nanosleep, futex_waitv, futex_wait. */
static __always_inline bool touches_no_file(u64 nr)
{
	return nr == 202 || nr == 35 || nr == 128 || nr == 230 || nr == 449 || nr == 455;
}

/* A system call with the numbers of 32-bit programs; from the kernel's asm/thread_info.h. */
#define TS_COMPAT 0x0002

static __always_inline bool sleeps_without_locks(struct task_struct *p)
{
	const struct pt_regs *regs;

	if ((p->__state & TASK_INTERRUPTIBLE_FREEZABLE) != TASK_INTERRUPTIBLE_FREEZABLE ||
	    p->thread_info.status & TS_COMPAT)
		return false;
	regs = (const struct pt_regs *)bpf_task_pt_regs(p);
	return regs && touches_no_file(regs->orig_ax);
}

static __always_inline void task_sleeps(struct task_struct *p, struct umcg_slot *slot)
{
	struct umcg_released released = {};
	struct umcg_ref self, host;
	struct umcg_domain *domain;
	struct umcg_cpu_ctx *cctx;
	u64 now_ns = bpf_ktime_get_ns();
	bool blocked, asleep;

	if (!ref_of(&self, slot, note_of(p)))
		return;
	domain = domain_of(self.slot->domain);
	if (!domain)
		return;
	slot->boundary = 0;
	lock_with_host(domain, &self, &host);
	blocked = worker_blocks(&self, &host, now_ns, &released.host);
	asleep = !blocked && self.slot->state != UMCG_BLOCKED;
	if (asleep)
		self.slot->asleep = true;
	bpf_spin_unlock(&domain->lock);

	/* A held task that sleeps does so deep in the kernel, perhaps with locks: it is held again at the boundary. */
	custody_unhold(&self.slot->custody);
	cctx = this_cpu_ctx();
	if (!cctx)
		return;
	if (blocked) {
		cctx->stats.blocks++;
		if (sleeps_without_locks(p))
			scx_bpf_task_set_slice(p, SLICE_STOP_AT_WAKEUP);
	} else if (asleep) {
		scx_bpf_task_set_slice(p, SLICE_LOOK_AT_WAKEUP);
	}
	if (dispatch_is_skipped())
		queue_released(&released);
	else
		run_released_next(cctx, &released);
}

#endif /* UMCG_BLOCK_BPF_H */

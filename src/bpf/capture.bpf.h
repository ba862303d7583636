/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Capture: a worker that blocked has finished in the kernel, and stops before its first user instruction.
 *
 * It may not be stopped earlier: when it wakes it may hold locks of the kernel that its own server needs.
 * The kernel says "about to return to user mode after having been switched out" in one place only, the rseq
 * update. So:
 *
 *	tp_btf/rseq_update	notes that it is at the boundary and interrupts its own CPU
 *	ops.dispatch(prev)	finds the note: BLOCKED becomes RUNNABLE, the server is told, prev is to be held
 *	ops.enqueue(prev)	parks it
 *
 * Until Linux 6.18 the tracepoint also fires inside the delivery of a signal, which goes on to touch the
 * user's stack: stopping there would mean stopping with mm locks held. signal_deliver announces that one.
 *
 * Who is known to have slept without locks (block.bpf.h) need not get that far: ops.enqueue captures it as it wakes, and spares
 * a switch to it and back. It is still inside its system call then, which it finishes once it is run. If anything of the kernel's
 * waits for it, a signal for instance, it takes the long way.
 *
 * The same road takes a held worker that was let go for a moment, or slept, back to where it may be held.
 *
 * And it preempts: a RUNNING worker with UMCG_TF_PREEMPT stops where it is about to return to user code, or where
 * the timer tick (ops.tick) finds it there. Never inside the kernel, where it may hold locks.
 */
#ifndef UMCG_CAPTURE_BPF_H
#define UMCG_CAPTURE_BPF_H

#include "compat.bpf.h"
#include "serve.bpf.h"

extern struct pt_regs *__irq_regs __ksym;

#define SIGKILL_BIT (1ULL << (9 - 1))

/*
 * Notes in a task that sleeps, for when it wakes: its time slice, which it does not need now and gets when it is inserted, is one that
 * nobody else has. What it has had of the CPU is taken off the second one still.
 */
#define SLICE_STOP_AT_WAKEUP SCX_SLICE_INF
#define SLICE_LOOK_AT_WAKEUP (1ULL << 63)

static __always_inline bool stops_at_wakeup(const struct task_struct *p)
{
	return p->scx.slice == SLICE_STOP_AT_WAKEUP;
}

static __always_inline bool is_noted_for_wakeup(const struct task_struct *p)
{
	return p->scx.slice > SLICE_LOOK_AT_WAKEUP >> 1;
}

/* Its task no longer sleeps. In RCU, any context but under the lock. */
static __always_inline void is_awake(struct umcg_slot *slot)
{
	struct umcg_domain *domain;

	if (!slot->asleep)
		return;
	domain = domain_of(slot->domain);
	if (!domain)
		return;
	bpf_spin_lock(&domain->lock);
	slot->asleep = false;
	bpf_spin_unlock(&domain->lock);
}

/* How often a task has been switched out, and never 0. It does not change within the schedule() that switches it out the next time. */
static __always_inline u64 nr_switches_of(const struct task_struct *p)
{
	return p->nvcsw + p->nivcsw + 1;
}

/*
 * The task that runs is about to return to user code, and is to stop there. An interrupt for that is on its way. Should another class get
 * the CPU before, the note is void: the task may be anywhere in the kernel when it is next looked at.
 */
static __always_inline void note_boundary(struct task_struct *p, struct umcg_slot *slot, struct umcg_cpu_ctx *cctx)
{
	slot->boundary = nr_switches_of(p);
	cctx->stops_here = true;
}

/* True once for each note. */
static __always_inline bool is_at_boundary(const struct task_struct *p, struct umcg_slot *slot)
{
	u64 noted = slot->boundary;

	slot->boundary = 0;
	return noted == nr_switches_of(p);
}

/* Its way leads to do_exit(): never hold it. Every thread of a process that dies has SIGKILL pending. */
static __always_inline bool task_is_dying(const struct task_struct *p)
{
	return p->flags & PF_EXITING || p->pending.signal.sig[0] & SIGKILL_BIT;
}

/* Exactly what worker_preempted() will find, or the task would be interrupted for ever and never stop. */
static __always_inline bool wants_preemption(const struct umcg_slot *slot, u32 nr)
{
	struct umcg_slot *host;
	struct umcg_cell *cell;
	u32 status;

	if (!slot->host || UMCG_LOAD(&slot->state) != UMCG_ACTIVE)
		return false;
	cell = cell_at(slot->domain, slot->cell);
	if (!cell)
		return false;
	status = UMCG_LOAD(&cell->task.umcg_status);
	if ((status & (UMCG_STATE_MASK | UMCG_TF_PREEMPT)) != (UMCG_STATE_RUNNING | UMCG_TF_PREEMPT))
		return false;
	host = slot_at(slot->host);
	return host && host->serving == nr;
}

/* At the boundary to user code: is it to stop there? A server that was let go for a signal is to run its handler. */
static __always_inline bool wants_capture(const struct umcg_slot *slot, u32 nr)
{
	u32 state = UMCG_LOAD(&slot->state);

	if (state == UMCG_WAITING)
		return !slot->is_server;
	return state == UMCG_BLOCKED || wants_preemption(slot, nr);
}

/* Under the lock. True if a block ended here. */
static __always_inline bool capture_locked(struct umcg_ref *self, struct umcg_ref *server, u64 now_ns,
					   struct umcg_released *released)
{
	if (self->slot->state == UMCG_WAITING && !self->slot->is_server)
		custody_hold(&self->slot->custody);
	if (self->slot->state != UMCG_BLOCKED)
		return false;
	self->slot->asleep = false;
	stop_captured(self, now_ns);
	if (server->slot && server->nr == self->nr) { /* it names itself: a server from now on, which nobody has to run */
		self->slot->is_server = true;
		self->slot->captured = false;
		become_running(self, &released->told);
		return true;
	}
	status_show(&self->cell->task.umcg_status, UMCG_STATE_RUNNABLE);
	if (!server->slot)
		return true; /* gone: held until it names a living one and is kicked */
	push_runnable(server, self);
	tell_server(server, &released->told);
	return true;
}

static __always_inline void capture(struct task_struct *p, struct umcg_slot *slot, u32 nr, struct umcg_released *released)
{
	struct umcg_ref self, host, server = {};
	struct umcg_domain *domain;
	bool captured, preempted = false;
	u64 now_ns, since_ns;
	u32 server_tid;

	if (!ref_of(&self, slot, nr))
		return;
	domain = domain_of(self.slot->domain);
	if (!domain || task_is_dying(p))
		return;
	server_tid = UMCG_LOAD(&self.cell->task.umcg_server_tid);
	if (!ref_find(&server, self.slot->domain, server_tid) || !ref_is_server(&server))
		server.slot = NULL;
	now_ns = bpf_ktime_get_ns();

	lock_with_host(domain, &self, &host);
	if (server.slot && !ref_is(&server, self.slot->domain, server_tid))
		server.slot = NULL;
	since_ns = self.slot->since_ns;
	captured = capture_locked(&self, &server, now_ns, released);
	if (!captured && UMCG_LOAD(&self.cell->task.umcg_status) & UMCG_TF_PREEMPT)
		preempted = worker_preempted(&self, &host, now_ns, &released->host);
	bpf_spin_unlock(&domain->lock);

	if (preempted)
		STAT_INC(preemptions);
	if (captured) {
		STAT_INC(captures);
		STAT_ADD(blocked_ns, now_ns - since_ns);
	}
}

SEC("tp_btf/rseq_update")
int BPF_PROG(umcg_rseq_update, struct task_struct *p)
{
	struct umcg_slot *slot = slot_of(p);
	struct umcg_cpu_ctx *cctx;

	if (!slot)
		return 0;
	is_awake(slot); /* it may have woken where nobody asked ops.enqueue */
	if (slot->in_handler) {
		slot->in_handler = false;
		return 0;
	}
	/* In another class no callback of ours would see it stop. */
	if (!(p->scx.flags & SCX_TASK_QUEUED) || !wants_capture(slot, note_of(p)))
		return 0;
	cctx = this_cpu_ctx();
	if (!cctx)
		return 0;
	note_boundary(p, slot, cctx);
	scx_bpf_kick_cpu(bpf_get_smp_processor_id(), SCX_KICK_PREEMPT);
	return 0;
}

/*
 * ops.tick: the interrupt that this runs in has hit user code if the registers that it saved say so; then the
 * schedule() that follows is at the boundary.
 */
static __always_inline bool tick_hit_user(void)
{
	struct pt_regs **saved = bpf_this_cpu_ptr(&__irq_regs), *regs = *saved;
	u64 cs = 0;

	if (!regs || bpf_probe_read_kernel(&cs, sizeof(cs), &regs->cs))
		return false;
	return (cs & 3) == 3;
}

static __always_inline void preempt_at_tick(struct task_struct *p)
{
	struct umcg_slot *slot = slot_of(p);
	struct umcg_cpu_ctx *cctx;

	if (!slot || !wants_preemption(slot, note_of(p)) || !tick_hit_user())
		return;
	cctx = this_cpu_ctx();
	if (!cctx)
		return;
	note_boundary(p, slot, cctx);
	scx_bpf_task_set_slice(p, 0);
}

/* Linux 6.18 and older: the rseq update of the delivery itself comes next, and is none of ours. */
SEC("tp_btf/signal_deliver")
int BPF_PROG(umcg_signal_deliver, int sig, struct kernel_siginfo *info, struct k_sigaction *ka)
{
	struct umcg_slot *slot;

	if (!signal_delivery_updates_rseq() || (u64)ka->sa.sa_handler <= 1) /* SIG_DFL, SIG_IGN */
		return 0;
	slot = slot_of(bpf_get_current_task_btf());
	if (slot)
		slot->in_handler = true;
	return 0;
}

#endif /* UMCG_CAPTURE_BPF_H */

/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * UMCG on an unmodified kernel: the sched_ext scheduler.
 *
 * Threads of a program register as *workers* and *servers* (docs/abi.md has the contract). At any time at most
 * one worker of a server runs user code; the server decides which. What a program cannot see alone, this
 * scheduler tells it: a worker blocked in the kernel, and a blocked worker can run again.
 *
 * What happens to a worker W of server S on one CPU:
 *
 *	S: umcg_wait(next = W)	ops.yield	W RUNNING, S held		wait.bpf.h
 *				ops.dispatch	inserts W			queue.bpf.h
 *				ops.enqueue(S)	parks S				hold.bpf.h
 *	W: read(empty pipe)	ops.quiescent	W BLOCKED, S RUNNING		block.bpf.h
 *				ops.dispatch	inserts S
 *	(data arrives)		ops.enqueue(W)	queued like any other task	policy.bpf.h
 *	W: finishes read()	rseq_update	interrupts itself		capture.bpf.h
 *				ops.dispatch	W RUNNABLE, on S's list; S told
 *				ops.enqueue(W)	parks W
 *
 * A worker that slept without locks (in a futex, say) stops as it wakes, and has the last three lines in one ops.enqueue(W).
 *
 * The rooms, each of which includes what it needs: atomic, hold, list, state are pure algorithms and are
 * also built natively for the model checker; maps says where everything lives and what the lock covers; serve
 * has the steps that wait, timeout, block, capture, register and retire are made of; control is the program that clients
 * call, admin the loader's; queue brings released tasks to a CPU; sweep looks after held tasks, and reap runs its
 * rounds; policy is for everybody else; compat knows the kernels apart.
 *
 * The core calls ops.dispatch *before* ops.enqueue of the task that is switched out. So whatever chooses who runs
 * next happens in ops.yield, ops.quiescent and at the head of ops.dispatch; ops.enqueue only parks.
 */
#include <scx/common.bpf.h>
#include <scx/compat.bpf.h>

#include "admin.bpf.h"
#include "block.bpf.h"
#include "capture.bpf.h"
#include "control.bpf.h"
#include "policy.bpf.h"
#include "reap.bpf.h"
#include "sweep.bpf.h"
#include "wait.bpf.h"

char _license[] SEC("license") = "GPL";

UEI_DEFINE(uei);

/*
 * A plain sched_yield(2) means something else. The status tells that the task is inside umcg_wait(); a handler may
 * have interrupted that, and yield on its own, so the library announces each sched_yield(2) of the wait, too.
 */
static __always_inline bool is_wait(const struct umcg_ref *self)
{
	return UMCG_LOAD(&self->cell->task.umcg_status) & UMCG_TF_WAIT && UMCG_LOAD(&self->cell->call.flags);
}

bool BPF_STRUCT_OPS(umcg_yield, struct task_struct *from, struct task_struct *to)
{
	struct umcg_cpu_ctx *cctx = this_cpu_ctx();
	struct umcg_slot *slot = noted_slot_of(from);
	struct umcg_ref self = { .slot = slot };
	void *cells;

	if (to || !cctx)
		return false; /* yield_to() is KVM's; there is no hand-over to arbitrary tasks */
	if (slot) {
		self.nr = note_of(from);
		cells = cells_of(slot->domain);
		self.cell = cell_in(cells, slot->cell);
	}
	if (!self.cell)
		cut_slice(from, cctx);
	else if (is_wait(&self))
		umcg_waits(from, &self, cells, cctx);
	else
		task_yields(from, &self, cctx);
	return false;
}

s32 BPF_STRUCT_OPS(umcg_select_cpu, struct task_struct *p, s32 prev_cpu, u64 wake_flags)
{
	if (is_noted_for_wakeup(p))
		return prev_cpu; /* ops.enqueue is to see it */
	return policy_select_cpu(p, prev_cpu, wake_flags);
}

/* True if @p is held: then it is in no queue until it is released. */
static __always_inline bool hold_registered(struct task_struct *p, struct umcg_slot *slot)
{
	slot->periods = 0;
	if (slot->seen_signals) /* may have been taken since */
		slot->seen_signals &= p->signal->shared_pending.signal.sig[0];
	if (!custody_park(&slot->custody))
		return false;
	/* Pairs with the signal code, which marks it dying and then starts the sweep, which looks for parked
	 * tasks: either it finds this one parked, or this finds it dying. */
	if (task_is_dying(p) && custody_release(&slot->custody) && custody_fetch(&slot->custody))
		return false;
	return true;
}

static __always_inline void capture_queued(struct task_struct *p, struct umcg_slot *slot)
{
	struct umcg_released released = {};

	capture(p, slot, note_of(p), &released);
	queue_released(&released);
}

/* A registered task that ops.dispatch was not asked about, because the local queue had a task; or it wakes, or is handed back. */
static __always_inline bool stops_now(struct task_struct *p, struct umcg_slot *slot, u64 *enq_flags)
{
	bool stops = is_at_boundary(p, slot);

	if (is_noted_for_wakeup(p)) {
		stops = stops_at_wakeup(p) && !wanted_by_kernel(p, 0);
		scx_bpf_task_set_slice(p, SLICE); /* the note has been read */
		is_awake(slot);
		*enq_flags &= ~SCX_ENQ_WAKEUP; /* no CPU was chosen for it */
	}
	return stops;
}

void BPF_STRUCT_OPS(umcg_enqueue, struct task_struct *p, u64 enq_flags)
{
	struct umcg_cpu_ctx *cctx = this_cpu_ctx();
	struct umcg_slot *slot = noted_slot_of(p);

	if (!cctx)
		return;
	policy_charge(p, slot, cctx, enq_flags & SCX_ENQ_WAKEUP);
	if (slot && stops_now(p, slot, &enq_flags))
		capture_queued(p, slot);
	queue_unasked_next(cctx);
	if (slot && hold_registered(p, slot))
		return;
	policy_enqueue(p, slot, enq_flags);
}

/*
 * The core ejects a scheduler that puts a task on the local queue of a CPU where it may not be. A task that its CPU is still
 * switching out cannot migrate whenever a BPF program runs there meanwhile, for the kernel counts that to whom it still takes for
 * current.
 */
static __always_inline bool may_move_to(const struct task_struct *p, s32 cpu)
{
	if (scx_bpf_task_cpu(p) == cpu)
		return true;
	return !task_is_on_cpu(p) && !p->migration_disabled && bpf_cpumask_test_cpu(cpu, p->cpus_ptr);
}

/* Runs what ops.yield, ops.quiescent or the capture just noted for this CPU. */
static __always_inline bool run_next(s32 cpu, struct umcg_cpu_ctx *cctx)
{
	struct umcg_slot *slot = slot_at(cctx->next);
	struct task_struct *p;

	cctx->next = 0;
	p = fetch(slot);
	if (!p)
		return false;
	/*
	 * Insert first, then look: an insertion is for the task as the core has it then, and is dropped if the core
	 * takes it back later. What was looked at before may be out of date: since then it may have run elsewhere.
	 */
	scx_bpf_dsq_insert(p, SCX_DSQ_LOCAL, SLICE, 0);
	if (burst_is_over(cctx) || !may_move_to(p, cpu)) {
		scx_bpf_dispatch_cancel();
		insert_shared(p, slot, 0);
		wake_cpu_for(p);
		return false;
	}
	return true;
}

static __always_inline void capture_prev(struct task_struct *prev, struct umcg_slot *slot, struct umcg_cpu_ctx *cctx)
{
	struct umcg_released released = {};

	capture(prev, slot, note_of(prev), &released);
	run_released_next(cctx, &released);
}

void BPF_STRUCT_OPS(umcg_dispatch, s32 cpu, struct task_struct *prev)
{
	struct umcg_cpu_ctx *cctx = this_cpu_ctx();
	struct umcg_slot *slot;

	if (!cctx)
		return;
	if (cctx->stops_here) {
		cctx->stops_here = false;
		slot = prev ? slot_of(prev) : NULL;
		if (slot && is_at_boundary(prev, slot))
			capture_prev(prev, slot, cctx);
	}
	if (run_next(cpu, cctx))
		return;
	end_burst(cctx);
	drain_ready();
	if (scx_bpf_dsq_move_to_local(SHARED_DSQ, 0) || !prev || !(prev->scx.flags & SCX_TASK_QUEUED))
		return;
	slot = slot_of(prev);
	if (!slot || !custody_is_held(&slot->custody))
		keep_running(prev, slot, cctx);
}

void BPF_STRUCT_OPS(umcg_tick, struct task_struct *p)
{
	preempt_at_tick(p);
	policy_tick(p);
}

void BPF_STRUCT_OPS(umcg_quiescent, struct task_struct *p, u64 deq_flags)
{
	struct umcg_slot *slot;

	if (!(deq_flags & SCX_DEQ_SLEEP))
		return; /* it moves to another CPU, or a property of it changes: it is queued again in a moment */
	slot = noted_slot_of(p);
	if (slot)
		task_sleeps(p, slot);
}

/* It comes from another class, where nobody read or held it. */
void BPF_STRUCT_OPS(umcg_enable, struct task_struct *p)
{
	u32 nr = slot_of_pid(p->pid, p);
	struct umcg_slot *slot = slot_at(nr);
	bool sleeps = task_sleeps_now(p);

	scx_bpf_task_set_dsq_vtime(p, vtime_now | nr);
	scx_bpf_task_set_slice(p, slot && slot->asleep && sleeps ? SLICE_LOOK_AT_WAKEUP : SLICE);
	if (!slot)
		return;
	is_noted(slot);
	if (!sleeps)
		is_awake(slot);
	custody_unhold(&slot->custody); /* it is held again where that may be */
}

s32 BPF_STRUCT_OPS_SLEEPABLE(umcg_init)
{
	s32 err = scx_bpf_create_dsq(SHARED_DSQ, -1);

	return err ?: init_sweep();
}

/* Without these two the core ejects a scheduler when a CPU comes or goes. What is queued is for all CPUs. */
void BPF_STRUCT_OPS(umcg_cpu_online, s32 cpu)
{
}

void BPF_STRUCT_OPS(umcg_cpu_offline, s32 cpu)
{
}

/* However the scheduler ends: the library looks at the epoch whenever a wait returns that should not have. */
static __always_inline void end_epoch(void)
{
	struct umcg_header *header;
	u32 domain;

	epoch_over = true;
	bpf_for(domain, 0, max_domains) {
		header = (void *)cell_at(domain, 0);
		if (header)
			UMCG_STORE(&header->epoch, 1);
	}
}

void BPF_STRUCT_OPS(umcg_exit, struct scx_exit_info *ei)
{
	end_epoch();
	UEI_RECORD(uei, ei);
}

SCX_OPS_DEFINE(umcg_ops,
	       .yield = (void *)umcg_yield,
	       .select_cpu = (void *)umcg_select_cpu,
	       .enqueue = (void *)umcg_enqueue,
	       .dispatch = (void *)umcg_dispatch,
	       .tick = (void *)umcg_tick,
	       .quiescent = (void *)umcg_quiescent,
	       .enable = (void *)umcg_enable,
	       .cpu_online = (void *)umcg_cpu_online,
	       .cpu_offline = (void *)umcg_cpu_offline,
	       .init = (void *)umcg_init,
	       .exit = (void *)umcg_exit,
	       .flags = SCX_OPS_ENQ_LAST,
	       .timeout_ms = 30000,
	       .name = "umcg");

/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The policy for everybody who is not held: weighted virtual time on one shared queue.
 *
 * Whoever used the least CPU time for its weight runs next, for a slice; a task that wakes goes to an idle CPU
 * at once if there is one. To the queue a server and the workers that it runs are one task, of the server's weight, so that a program
 * gets what its servers would get, however many workers they have. What they hand to each other directly is one *burst*, which lasts a slice like anybody's (see burst_is_over()), so that
 * a pair that switches for ever takes turns with its neighbours.
 */
#ifndef UMCG_POLICY_BPF_H
#define UMCG_POLICY_BPF_H

#include "maps.bpf.h"

#define SHARED_DSQ 0
#define WEIGHT_DEFAULT 100
/* The lightest tasks pay a hundredfold; what they owe, and what others are owed, is bounded, or the watchdog finds them before their turn. */
#define MAX_SLICES_APART 50

/*
 * The slice that a task is given. The core ends one at the first tick after it is used up, without a word on how much too late, up to 4 ms
 * at 250 Hz; and who pays for less than it had gets more than its share. So there is room in it that nobody uses, and ops.tick ends it.
 */
#define SLICE_ROOM (1ULL << 40)
#define SLICE (SLICE_ROOM + slice_ns)

/* For a task that was just queued: @p's CPU may be about to idle, and is not idle yet to scx_bpf_pick_idle_cpu(). */
static __always_inline void wake_cpu_for(struct task_struct *p)
{
	s32 cpu = scx_bpf_pick_idle_cpu(p->cpus_ptr, 0);

	scx_bpf_kick_cpu(cpu >= 0 ? cpu : scx_bpf_task_cpu(p), SCX_KICK_IDLE);
}

/*
 * Virtual time is in these units, above a task's note (see maps.bpf.h): it goes round within a week, and is only ever compared. That of
 * registered tasks is in the slots.
 */
#define VTIME_UNIT_NS 64

static __always_inline u64 vtime_of(u64 weighted_ns)
{
	return weighted_ns / VTIME_UNIT_NS << NOTE_BITS;
}

/* The virtual time of the queue: that of the task that had a CPU last; without a note. */
u64 vtime_now;

static __always_inline bool vtime_before(u64 a, u64 b)
{
	return (s64)(a - b) < 0;
}

/* Who slept for long may claim one slice of it, no more. */
static __always_inline u64 vtime_at_least(u64 vtime, bool slept)
{
	u64 earliest = vtime_now - vtime_of(slept ? slice_ns : MAX_SLICES_APART * slice_ns);

	return vtime_before(vtime, earliest) ? earliest : vtime;
}

static __always_inline u64 vtime_at_most(u64 vtime)
{
	u64 latest = vtime_now + vtime_of(MAX_SLICES_APART * slice_ns);

	return vtime_before(latest, vtime) ? latest : vtime;
}

/* Whoever answers for a registered task in the queue: a worker is charged to the server that runs it, or ran it last. */
static __always_inline struct umcg_slot *payer_of(struct umcg_slot *slot)
{
	struct umcg_slot *payer = slot->is_server ? NULL : slot_at(slot->payer);

	return payer && payer->domain == slot->domain && payer->state != UMCG_FREE ? payer : slot;
}

/* What @p has had of its slice, as far as the core has counted; 0 if it has none of ours. */
static __always_inline u64 slice_used_ns(const struct task_struct *p)
{
	u64 used_ns = SLICE - p->scx.slice;

	return used_ns < SLICE_ROOM / 2 ? used_ns : 0;
}

/* The slice of @p, which runs on the CPU of @cctx, is about to become 0. What it has had of it in the end is known when it is queued. */
static __always_inline void note_cut(const struct task_struct *p, struct umcg_cpu_ctx *cctx)
{
	if (!cctx || !p->scx.slice) /* which the tick may have cut just now */
		return;
	cctx->cut = p->pid;
	cctx->cut_ns = p->se.sum_exec_runtime - slice_used_ns(p);
}

/* The task that runs here has had its slice, or gives it away. */
static __always_inline void cut_slice(struct task_struct *p, struct umcg_cpu_ctx *cctx)
{
	note_cut(p, cctx);
	scx_bpf_task_set_slice(p, 0);
}

/* Interrupts who runs on @cpu, unless that one has had even less. */
static __always_inline void preempt_on(s32 cpu, u64 vtime)
{
	const struct rq *rq = bpf_per_cpu_ptr(&runqueues, cpu);
	const struct task_struct *curr = rq ? rq->curr : NULL;

	if (!curr || (!note_of(curr) && !vtime_before(vtime, curr->scx.dsq_vtime)))
		return;
	note_cut(curr, cpu_ctx_of(cpu));
	scx_bpf_kick_cpu(cpu, SCX_KICK_PREEMPT);
}

/*
 * @p wakes with that virtual time, and no CPU idles. Who has used so much less than its share that it is half a slice ahead does not
 * wait for the end of somebody's slice; who computes most of the time is never that far ahead, so it interrupts nobody.
 */
static __always_inline void preempt_for(struct task_struct *p, u64 vtime)
{
	if (vtime_before(vtime + vtime_of(slice_ns / 2), vtime_now))
		preempt_on(scx_bpf_task_cpu(p), vtime);
}

/* @slot is @p's, or NULL. The virtual time that it is queued with. */
static __always_inline u64 insert_shared(struct task_struct *p, struct umcg_slot *slot, u64 enq_flags)
{
	struct umcg_slot *payer = slot ? payer_of(slot) : NULL;
	u64 vtime = vtime_at_most(payer ? payer->vtime : p->scx.dsq_vtime & ~NOTE_MASK);

	if (payer)
		payer->vtime = vtime;
	scx_bpf_dsq_insert_vtime(p, SHARED_DSQ, SLICE, vtime | note_of(p), enq_flags);
	return vtime;
}

/* A registered task that was held, for no matter how long. */
static __always_inline void insert_after_wait(struct task_struct *p, struct umcg_slot *slot)
{
	struct umcg_slot *payer = payer_of(slot);

	payer->vtime = vtime_at_least(payer->vtime, true);
	insert_shared(p, slot, 0);
}

static __always_inline void policy_enqueue(struct task_struct *p, struct umcg_slot *slot, u64 enq_flags)
{
	u64 vtime;

	/* A kernel thread of one CPU is short and urgent: it goes before all that queue, and interrupts who is far behind it. */
	if (p->flags & PF_KTHREAD && p->nr_cpus_allowed == 1) {
		if (enq_flags & SCX_ENQ_WAKEUP)
			preempt_for(p, p->scx.dsq_vtime);
		scx_bpf_dsq_insert(p, SCX_DSQ_LOCAL, SLICE, enq_flags);
		return;
	}
	vtime = insert_shared(p, slot, enq_flags);
	/* With SCX_ENQ_LAST the CPU is on its way to idle and looks no more; a task that wakes has had its CPU chosen. */
	if (enq_flags & SCX_ENQ_LAST)
		scx_bpf_kick_cpu(scx_bpf_task_cpu(p), 0);
	else if (enq_flags & SCX_ENQ_WAKEUP)
		preempt_for(p, vtime);
	else
		wake_cpu_for(p);
}

/* What @used_ns of a task that began with @vtime add to that. */
static __always_inline u64 price_of(u64 used_ns, u64 vtime, u32 weight)
{
	if (used_ns && vtime_before(vtime_now, vtime))
		vtime_now = vtime;
	if (weight != WEIGHT_DEFAULT) /* a division is dear */
		used_ns = used_ns * WEIGHT_DEFAULT / weight;
	return vtime_of(used_ns);
}

static __always_inline void pay(struct task_struct *p, u64 used_ns, bool wakes)
{
	u64 nr = note_of(p), vtime = p->scx.dsq_vtime - nr;

	vtime += price_of(used_ns, vtime, p->scx.weight);
	scx_bpf_task_set_dsq_vtime(p, vtime_at_least(vtime, wakes) | nr);
}

static __always_inline void charge_to(struct umcg_slot *payer, const struct task_struct *p, u64 used_ns, bool wakes)
{
	struct task_struct *server = payer->task;

	__sync_fetch_and_add(&payer->vtime, price_of(used_ns, payer->vtime, server ? server->scx.weight : p->scx.weight));
	payer->vtime = vtime_at_least(payer->vtime, wakes);
}

static __always_inline void policy_tick(struct task_struct *p)
{
	struct umcg_cpu_ctx *cctx = this_cpu_ctx();

	if (cctx && p->scx.slice < SLICE - slice_ns)
		cut_slice(p, cctx);
}

/*
 * @p pays for the CPU time that it has had since it paid last. To be called wherever it is given a new slice. That is late for who
 * sleeps, but then nobody asks; ops.stopping, which comes in time, costs as much again as all that is done there.
 *
 * What is gone of its slice tells, and costs no look into a map; but the slice of a registered task ends early and often, and holds
 * notes, so of those the slot tells. @cctx is only needed for whose slice was cut, and so not at a wake-up.
 */
static __always_inline void policy_charge(struct task_struct *p, struct umcg_slot *slot, struct umcg_cpu_ctx *cctx, bool wakes)
{
	u64 now_ns = p->se.sum_exec_runtime;

	if (slot) {
		charge_to(payer_of(slot), p, now_ns - slot->charged_ns, wakes);
		slot->charged_ns = now_ns;
	} else if (cctx && cctx->cut == p->pid && !p->scx.slice) {
		cctx->cut = 0;
		pay(p, now_ns - cctx->cut_ns, wakes);
	} else {
		pay(p, slice_used_ns(p), wakes);
	}
}

static __always_inline s32 policy_select_cpu(struct task_struct *p, s32 prev_cpu, u64 wake_flags)
{
	bool is_idle = false;
	s32 cpu = scx_bpf_select_cpu_dfl(p, prev_cpu, wake_flags, &is_idle);

	if (is_idle) {
		policy_charge(p, slot_of(p), NULL, true);
		scx_bpf_dsq_insert(p, SCX_DSQ_LOCAL, SLICE, 0);
	}
	return cpu;
}

/*
 * Whether the registered tasks that hand this CPU to each other have to queue like others. If the last one spins,
 * it has one more slice, its own. To read the clock is dear, so that is done once a jiffy, and the burst may last so much longer.
 */
static __always_inline bool burst_is_over(struct umcg_cpu_ctx *cctx)
{
	u64 now_ns, jiffies = bpf_jiffies64();

	if (jiffies == cctx->burst_jiffies)
		return false;
	cctx->burst_jiffies = jiffies;
	now_ns = scx_bpf_now();
	if (!cctx->burst_start_ns)
		cctx->burst_start_ns = now_ns;
	return now_ns - cctx->burst_start_ns >= slice_ns && scx_bpf_dsq_nr_queued(SHARED_DSQ);
}

/* ops.dispatch hands this CPU to whoever queues. */
static __always_inline void end_burst(struct umcg_cpu_ctx *cctx)
{
	cctx->burst_start_ns = 0;
}

/* Nobody else wants this CPU: the task that has used up its slice gets another one. */
static __always_inline void keep_running(struct task_struct *p, struct umcg_slot *slot, struct umcg_cpu_ctx *cctx)
{
	policy_charge(p, slot, cctx, false);
	scx_bpf_task_set_slice(p, SLICE);
}

#endif /* UMCG_POLICY_BPF_H */

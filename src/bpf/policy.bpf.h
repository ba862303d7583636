/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The policy for everybody who is not held: weighted virtual time on one shared queue.
 *
 * Whoever used the least CPU time for its weight runs next, for a slice; a task that wakes goes to an idle CPU
 * at once if there is one. Registered tasks compete as everybody else does when they run or want to run. What they
 * hand to each other directly is one *burst*, which lasts a slice like anybody's (see burst_is_over()), so that
 * a pair that switches for ever takes turns with its neighbours.
 */
#ifndef UMCG_POLICY_BPF_H
#define UMCG_POLICY_BPF_H

#include "maps.bpf.h"

#define SHARED_DSQ 0
#define WEIGHT_DEFAULT 100
/* The lightest tasks pay a hundredfold; what they owe is bounded, or the watchdog finds them before their turn comes. */
#define MAX_SLICES_AHEAD 50

/* For a task that was just queued: @p's CPU may be about to idle, and is not idle yet to scx_bpf_pick_idle_cpu(). */
static __always_inline void wake_cpu_for(struct task_struct *p)
{
	s32 cpu = scx_bpf_pick_idle_cpu(p->cpus_ptr, 0);

	scx_bpf_kick_cpu(cpu >= 0 ? cpu : scx_bpf_task_cpu(p), SCX_KICK_IDLE);
}

/* The virtual time of the queue: that of the task that started last. */
u64 vtime_now;

static __always_inline bool vtime_before(u64 a, u64 b)
{
	return (s64)(a - b) < 0;
}

static __always_inline void insert_shared(struct task_struct *p, u64 enq_flags)
{
	u64 vtime = p->scx.dsq_vtime;

	/* Who slept for long may claim one slice of it, no more. */
	if (vtime_before(vtime, vtime_now - slice_ns))
		vtime = vtime_now - slice_ns;
	scx_bpf_dsq_insert_vtime(p, SHARED_DSQ, slice_ns, vtime, enq_flags);
}

static __always_inline void policy_enqueue(struct task_struct *p, u64 enq_flags)
{
	/* A kernel thread of one CPU is short and urgent. */
	if (p->flags & PF_KTHREAD && p->nr_cpus_allowed == 1) {
		scx_bpf_dsq_insert(p, SCX_DSQ_LOCAL, slice_ns, enq_flags);
		return;
	}
	insert_shared(p, enq_flags);
	/* With SCX_ENQ_LAST the CPU is on its way to idle and looks no more; a task that wakes has had its CPU chosen. */
	if (enq_flags & SCX_ENQ_LAST)
		scx_bpf_kick_cpu(scx_bpf_task_cpu(p), 0);
	else if (!(enq_flags & SCX_ENQ_WAKEUP))
		wake_cpu_for(p);
}

static __always_inline s32 policy_select_cpu(struct task_struct *p, s32 prev_cpu, u64 wake_flags)
{
	bool is_idle = false;
	s32 cpu = scx_bpf_select_cpu_dfl(p, prev_cpu, wake_flags, &is_idle);

	if (is_idle)
		scx_bpf_dsq_insert(p, SCX_DSQ_LOCAL, slice_ns, 0);
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
	return now_ns - cctx->burst_start_ns >= slice_ns && scx_bpf_dsq_nr_queued(SHARED_DSQ);
}

static __always_inline void policy_running(struct task_struct *p, struct umcg_cpu_ctx *cctx)
{
	if (cctx->counted != p->pid) { /* else another class had the CPU meanwhile */
		cctx->counted = p->pid;
		cctx->exec_start = p->se.sum_exec_runtime;
	}
	if (vtime_before(vtime_now, p->scx.dsq_vtime))
		vtime_now = p->scx.dsq_vtime;
}

/*
 * @p pays for the CPU time that it has had, and for @running_ns that the core has not added up yet. To be called wherever it stops and
 * may be queued next. That is what ops.stopping is for, which costs as much again as all that is done there.
 */
static __always_inline void policy_charge(struct task_struct *p, struct umcg_cpu_ctx *cctx, u64 running_ns)
{
	u64 used_ns, vtime;

	if (cctx->counted != p->pid)
		return; /* it has not run, or has paid */
	cctx->counted = 0;
	used_ns = p->se.sum_exec_runtime - cctx->exec_start + running_ns;
	vtime = p->scx.dsq_vtime + used_ns * WEIGHT_DEFAULT / p->scx.weight;
	if (vtime_before(vtime_now + MAX_SLICES_AHEAD * slice_ns, vtime))
		vtime = vtime_now + MAX_SLICES_AHEAD * slice_ns;
	scx_bpf_task_set_dsq_vtime(p, vtime);
}

/* As the task that runs goes to sleep: what it has had of this CPU since the core looked last. */
static __always_inline u64 running_ns(const struct task_struct *p)
{
	const struct rq *rq = bpf_this_cpu_ptr(&runqueues);
	s64 ns = rq->clock_task - p->se.exec_start;

	return ns > 0 ? ns : 0;
}

#endif /* UMCG_POLICY_BPF_H */

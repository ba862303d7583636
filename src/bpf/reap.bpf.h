/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The rounds of the sweep (sweep.bpf.h), which also retires who died unseen (retire.bpf.h).
 */
#ifndef UMCG_REAP_BPF_H
#define UMCG_REAP_BPF_H

#include "retire.bpf.h"
#include "sweep.bpf.h"

/* @periods that have ended with this round: 0 or 1, as in all below and in sweep.bpf.h. */
static __always_inline void sweep_slot(u32 nr, u32 periods)
{
	struct umcg_slot *slot = slot_at(nr);
	struct task_struct *p;
	u32 custody;

	if (!slot)
		return;
	custody = UMCG_LOAD(&slot->custody);
	if (custody != UMCG_CUSTODY_PARKED && custody != UMCG_CUSTODY_READY)
		return;
	p = slot->task;
	if (!p)
		return;
	if (custody == UMCG_CUSTODY_PARKED) {
		sweep_timeout(slot);
		sweep_parked(slot, nr, p, periods);
	} else {
		sweep_ready(slot, nr, periods);
	}
}

/* A dead task that is registered still: the kernel skips a tracing program that it interrupted on the same CPU. */
static __always_inline bool is_left_over(u32 nr)
{
	struct umcg_slot *slot = slot_at(nr);
	struct task_struct *p = slot ? slot->task : NULL;

	return p && p->exit_state;
}

static int sweep_one(u32 nr, u32 *periods)
{
	bool left_over;

	bpf_rcu_read_lock();
	left_over = is_left_over(nr);
	if (!left_over)
		sweep_slot(nr, *periods);
	bpf_rcu_read_unlock();
	if (left_over)
		retire(nr, true);
	return 0;
}

static int sweep(void *map, u32 *key, struct umcg_sweep *timer)
{
	u64 now_ns = bpf_ktime_get_ns();
	u32 periods = 0;

	if (UMCG_LOAD(&epoch_over))
		return 0;
	report_bugs();
	UMCG_XCHG(&sweep_asked, 0); /* from here on a request is for the next round */
	if (now_ns - period_ns >= SWEEP_PERIOD_NS) {
		period_ns = now_ns;
		periods = 1;
	}
	bpf_loop(UMCG_LOAD(&slot_limit), sweep_one, &periods, 0);
	STAT_INC(sweeps);
	UMCG_STORE(&swept_ns, bpf_ktime_get_ns());
	UMCG_XCHG(&sweep_armed, 0);
	if (UMCG_LOAD(&nr_registered))
		need_sweep();
	return 0;
}

static __always_inline int init_sweep(void)
{
	u32 zero = 0;
	struct umcg_sweep *sweep_timer = bpf_map_lookup_elem(&sweeps, &zero);
	int err;

	if (!sweep_timer)
		return -ENOENT;
	err = bpf_timer_init(&sweep_timer->timer, &sweeps, CLOCK_MONOTONIC);
	return err ?: bpf_timer_set_callback(&sweep_timer->timer, sweep);
}

#endif /* UMCG_REAP_BPF_H */

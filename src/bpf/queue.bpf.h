/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * How a released task gets a CPU.
 *
 * Only ops.dispatch may insert a task other than the one at hand. A task that is released by what happens
 * to its predecessor on the same CPU is noted there and started by the ops.dispatch of the same
 * schedule(): one context switch, no wake-up. Every other one goes through `ready`, which all CPUs drain.
 *
 * `ready` holds hints: slot numbers worth a look. What is to be done with a slot, its custody word says, so
 * that a number may be there twice, be outdated, or (queue full) be missing: the sweep asks again.
 */
#ifndef UMCG_QUEUE_BPF_H
#define UMCG_QUEUE_BPF_H

#include "maps.bpf.h"

struct {
	__uint(type, BPF_MAP_TYPE_QUEUE);
	__uint(max_entries, 16384);
	__type(value, u32);
} ready SEC(".maps");

/* Entries of `ready`, or a little more: spares ops.dispatch the call when there is nothing. */
s32 nr_ready;

/* Tasks that one step released and must pass on once the lock is dropped; at most a host and a worker. */
struct umcg_released {
	u32 first;
	u32 second;
};

static __always_inline void released_add(struct umcg_released *released, u32 nr)
{
	if (!released->first)
		released->first = nr;
	else
		released->second = nr;
}

static __always_inline void wake_cpu_for(struct task_struct *p)
{
	s32 cpu = scx_bpf_pick_idle_cpu(p->cpus_ptr, 0);

	if (cpu >= 0)
		scx_bpf_kick_cpu(cpu, SCX_KICK_IDLE);
}

/* Asks the CPUs to look at a slot. In RCU, any context. */
static __always_inline void queue_slot(u32 nr)
{
	struct umcg_slot *slot = slot_at(nr);
	struct task_struct *p;

	if (!slot)
		return;
	__sync_fetch_and_add(&nr_ready, 1);
	if (bpf_map_push_elem(&ready, &nr, 0))
		__sync_fetch_and_add(&nr_ready, -1); /* full, or its lock is ours: left to the sweep */
	p = slot->task;
	if (p)
		wake_cpu_for(p);
}

static __always_inline void queue_released(const struct umcg_released *released)
{
	if (released->first)
		queue_slot(released->first);
	if (released->second)
		queue_slot(released->second);
}

/* For callbacks that precede ops.dispatch in the same schedule(): the first one runs here and next. */
static __always_inline void run_released_next(const struct umcg_released *released)
{
	struct umcg_cpu_ctx *cctx = this_cpu_ctx();

	if (!released->first)
		return;
	if (!cctx || cctx->next) {
		queue_released(released);
		return;
	}
	cctx->next = released->first;
	if (released->second)
		queue_slot(released->second);
}

/* The local queue had a task, so the core did not ask ops.dispatch: let the other CPUs have it. */
static __always_inline void queue_unasked_next(void)
{
	struct umcg_cpu_ctx *cctx = this_cpu_ctx();
	u32 nr;

	if (!cctx || !cctx->next)
		return;
	nr = cctx->next;
	cctx->next = 0;
	queue_slot(nr);
}

/* A CPU that may run @p: this one, else its own. */
static __always_inline s32 cpu_for(struct task_struct *p, s32 cpu)
{
	if (bpf_cpumask_test_cpu(cpu, p->cpus_ptr))
		return cpu;
	cpu = scx_bpf_task_cpu(p);
	if (bpf_cpumask_test_cpu(cpu, p->cpus_ptr))
		return cpu;
	return bpf_cpumask_first(p->cpus_ptr);
}

/*
 * ops.dispatch: does what a slot's custody asks for. True if this CPU has something to run now.
 * A parked task is inserted too: for the watchdog's eyes, and ops.running sends it back (see sweep.bpf.h).
 */
static __always_inline bool run_slot(u32 nr, s32 this_cpu)
{
	struct umcg_slot *slot = slot_at(nr);
	struct task_struct *p;
	s32 cpu;

	if (!slot)
		return false;
	if (!custody_fetch(&slot->custody) && !custody_show(&slot->custody))
		return false;
	p = slot->task;
	if (!p)
		return false;
	cpu = cpu_for(p, this_cpu);
	if (cpu == this_cpu) {
		scx_bpf_dsq_insert(p, SCX_DSQ_LOCAL, slice_ns, 0);
		return true;
	}
	scx_bpf_dsq_insert(p, SCX_DSQ_LOCAL_ON | cpu, slice_ns, 0);
	return false;
}

/* How many hints one ops.dispatch looks at; the others are for other CPUs, or the next time. */
#define UMCG_READY_BATCH 8

static __always_inline bool run_ready(s32 cpu)
{
	u32 nr;
	int i;

	for (i = 0; i < UMCG_READY_BATCH && UMCG_LOAD(&nr_ready) > 0; i++) {
		if (bpf_map_pop_elem(&ready, &nr))
			return false;
		__sync_fetch_and_add(&nr_ready, -1);
		if (run_slot(nr, cpu))
			return true;
	}
	return false;
}

#endif /* UMCG_QUEUE_BPF_H */

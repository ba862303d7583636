/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * How a released task gets a CPU.
 *
 * Only ops.dispatch may insert a task other than the one at hand. A task that is released by what happens
 * to its predecessor on the same CPU is noted there and started by the ops.dispatch of the same
 * schedule(): one context switch, no wake-up. Every other one goes through `ready`, which all CPUs drain into the
 * queue that everybody waits in.
 *
 * `ready` holds hints: slot numbers worth a look. What is to be done with a slot, its custody word says, so
 * that a number may be there twice, be outdated, or (queue full) be missing: the sweep asks again.
 */
#ifndef UMCG_QUEUE_BPF_H
#define UMCG_QUEUE_BPF_H

#include "maps.bpf.h"
#include "policy.bpf.h"

struct {
	__uint(type, BPF_MAP_TYPE_QUEUE);
	__uint(max_entries, 16384);
	__type(value, u32);
} ready SEC(".maps");

/* Entries of `ready`, or a little more: spares ops.dispatch the call when there is nothing. */
s32 nr_ready;

/*
 * Tasks that one step released, to be passed on once the lock is dropped: slots, 0 for nobody. Each has its place, so that none is
 * looked at under the lock: it would split in two what the verifier has to walk.
 */
struct umcg_released {
	u32 started; /* the worker or server that was named */
	u32 host;    /* of a worker that stopped */
	u32 told;    /* a server with an event */
};

/* Asks the CPUs to look at a slot, if it is somebody's. In RCU, any context. */
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

__noinline int queue_slots(u32 started, u32 host, u32 told)
{
	if (!(started | host | told))
		return 0;
	bpf_rcu_read_lock();
	queue_slot(started);
	queue_slot(host);
	queue_slot(told);
	bpf_rcu_read_unlock();
	return 0;
}

static __always_inline void queue_released(const struct umcg_released *released)
{
	queue_slots(released->started, released->host, released->told);
}

/* For callbacks that precede ops.dispatch in the same schedule(): the first one runs here and next. */
static __always_inline void run_released_next(struct umcg_cpu_ctx *cctx, const struct umcg_released *released)
{
	u32 started = released->started, host = released->host, told = released->told;

	if (!cctx->next) {
		cctx->next = started ?: host ?: told;
		told = started || host ? told : 0;
		host = started ? host : 0;
		started = 0;
	}
	if (started | host | told)
		queue_slots(started, host, told);
}

/*
 * The local queue has a task, so the core will run that one and not ask ops.dispatch. To be asked where a task goes to sleep; where it
 * does not, ops.enqueue sees by queue_unasked_next() that nobody asked.
 */
static __always_inline bool dispatch_is_skipped(void)
{
	const struct rq *rq = bpf_this_cpu_ptr(&runqueues);

	return rq->scx.local_dsq.nr;
}

/* The local queue had a task, or another class, so the core did not ask ops.dispatch: let the other CPUs have it. */
static __always_inline void queue_unasked_next(struct umcg_cpu_ctx *cctx)
{
	u32 nr = cctx->next;

	if (!nr)
		return;
	cctx->next = 0;
	queue_slot(nr);
}

/* ops.dispatch: the task of a @slot that the caller is to insert now, or NULL. */
static __always_inline struct task_struct *fetch(struct umcg_slot *slot)
{
	if (!slot || !custody_fetch(&slot->custody))
		return NULL;
	return slot->task;
}

/* How many hints one ops.dispatch looks at; the others are for other CPUs, or the next time. */
#define UMCG_READY_BATCH 8

/* Puts released tasks where everybody queues: whoever is not handed a CPU directly competes for one like others. */
static __always_inline void drain_ready(void)
{
	struct umcg_slot *slot;
	struct task_struct *p;
	u32 nr;
	int i;

	for (i = 0; i < UMCG_READY_BATCH && UMCG_LOAD(&nr_ready) > 0; i++) {
		if (bpf_map_pop_elem(&ready, &nr))
			return;
		__sync_fetch_and_add(&nr_ready, -1);
		slot = slot_at(nr);
		p = fetch(slot);
		if (p)
			insert_after_wait(p, slot);
	}
}

#endif /* UMCG_QUEUE_BPF_H */

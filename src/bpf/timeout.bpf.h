/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Timeouts of umcg_wait(): a timer in each slot that is, or was, a server's.
 *
 * A timer is never cancelled: what it finds decides. It counts only if the task still waits and the deadline of
 * *that* wait has passed; a timer left over from an earlier wait finds a later deadline, or none, or nobody waiting.
 *
 * The kernel allocates some 200 bytes for one, so workers have none. Who becomes a server later gets it from the sweep, once its
 * first timeout is overdue, for there is no memory to be had in umcg_wait(), under the run queue's lock.
 */
#ifndef UMCG_TIMEOUT_BPF_H
#define UMCG_TIMEOUT_BPF_H

#include "serve.bpf.h"

#define END_OF_TIME (~0ULL >> 1) /* ktime_t is signed */

static int wait_timed_out(void *map, u32 *nr, struct umcg_slot *slot)
{
	struct umcg_released released = {};
	struct umcg_domain *domain;
	struct umcg_ref self;
	u64 now_ns = bpf_ktime_get_ns(), early_for = 0;
	u32 domain_nr = slot->domain;

	if (UMCG_LOAD(&epoch_over) || !ref_get(&self, *nr))
		return 0;
	domain = domain_of(domain_nr);
	if (!domain)
		return 0;
	bpf_spin_lock(&domain->lock);
	if (self.slot->state != UMCG_WAITING && self.slot->state != UMCG_SERVING) {
		/* nobody waits any more */
	} else if (self.slot->domain != domain_nr) {
		/* the slot has come to another domain, whose lock this is not */
	} else if (self.slot->deadline_ns > now_ns) {
		early_for = self.slot->deadline_ns; /* a later wait, or our clock lags a little behind the timer's */
	} else if (self.slot->deadline_ns) {
		self.slot->deadline_ns = 0;
		self.cell->call.result = -ETIMEDOUT;
		become_running(&self, &released.told); /* one that serves stays serving */
	}
	bpf_spin_unlock(&domain->lock);
	if (early_for)
		bpf_timer_start(&slot->timer, early_for, BPF_F_TIMER_ABS);
	queue_released(&released);
	return 0;
}

/* Once for each slot; a slot that is used again has its timer already. */
static __always_inline int init_timeout(struct umcg_slot *slot)
{
	int err = bpf_timer_init(&slot->timer, &slots, CLOCK_MONOTONIC);

	if (err)
		return err == -EBUSY ? 0 : err;
	return bpf_timer_set_callback(&slot->timer, wait_timed_out);
}

/* CLOCK_MONOTONIC @timeout_ns from now, 0 for no timeout; what lies beyond the end of time is the end of time. */
__noinline u64 deadline_after(u64 timeout_ns)
{
	u64 now_ns, deadline_ns;

	if (!timeout_ns)
		return 0;
	now_ns = bpf_ktime_get_ns();
	deadline_ns = now_ns + timeout_ns;
	return deadline_ns < now_ns || deadline_ns > END_OF_TIME ? END_OF_TIME : deadline_ns;
}

/* It may fail; what is overdue, the sweep starts again. */
static __always_inline void start_timeout(struct umcg_slot *slot)
{
	bpf_timer_start(&slot->timer, slot->deadline_ns, BPF_F_TIMER_ABS);
}

#endif /* UMCG_TIMEOUT_BPF_H */

/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Custody: who answers for a task that is not to run.
 *
 * A task is *held* by not inserting it anywhere when the core hands it to ops.enqueue. Deciding to hold it
 * and being handed it are two moments, on a CPU that is just switching it out, while another CPU may want
 * it released. One word a task settles every order of events:
 *
 *	          hold()            park()             release()           fetch()
 *	    FREE --------> HOLD -------------> PARKED ------------> READY ----------> FREE
 *	     ^   <--------  |
 *	     |    release()
 *	     |    unhold()
 *
 *	FREE	the core has it: it runs, sleeps, or is queued like any other task
 *	HOLD	the core has it, and is to hand it to us: park it then
 *	PARKED	we have it and keep it
 *	READY	we have it, and some CPU must insert it: only the one whose fetch() succeeds does
 *
 * Example, the race that lost tasks before this word was there: CPU 0 runs ops.yield of A (hold: FREE to
 * HOLD) and is about to switch; CPU 1 wakes A. If release() comes first, it finds HOLD, makes it FREE and
 * inserts nothing; CPU 0's ops.enqueue then fails to park and queues A. If park() comes first, release()
 * finds PARKED and answers for inserting A. There is no third order.
 *
 * The core may take a parked task back at any time (affinity, nice, policy change) and hands it to
 * ops.enqueue again: so park() is to be called in every state. An insertion that was noted before the core
 * took the task back is dropped by the core's own sequence number, and the task comes through ops.enqueue instead. One
 * that was decided before and noted after (a late insertion) runs a task that is held: it comes as far as one that is let go for a
 * moment (sweep.bpf.h), and is held there.
 */
#ifndef UMCG_HOLD_BPF_H
#define UMCG_HOLD_BPF_H

#include "atomic.bpf.h"

enum umcg_custody {
	UMCG_CUSTODY_FREE = 0,
	UMCG_CUSTODY_HOLD = 1,
	UMCG_CUSTODY_PARKED = 2,
	UMCG_CUSTODY_READY = 3,
};

static __always_inline bool custody_move(u32 *custody, u32 from, u32 to)
{
	return UMCG_CMPXCHG(custody, from, to) == from;
}

/*
 * The task itself, on its CPU, before it is switched out: park me. It runs, so the core has it, whatever the word
 * says: after a late insertion (see above) it may be READY still.
 */
static __always_inline void custody_hold(u32 *custody)
{
	UMCG_XCHG(custody, UMCG_CUSTODY_HOLD);
}

/* The task itself: it goes to sleep instead. */
static __always_inline void custody_unhold(u32 *custody)
{
	UMCG_XCHG(custody, UMCG_CUSTODY_FREE);
}

/*
 * ops.enqueue: true if the task is ours now and must not be inserted.
 * READY here means that it was released while the core had taken it back: this enqueue is its release.
 */
static __always_inline bool custody_park(u32 *custody)
{
	if (custody_move(custody, UMCG_CUSTODY_HOLD, UMCG_CUSTODY_PARKED))
		return true;
	if (UMCG_LOAD(custody) == UMCG_CUSTODY_PARKED)
		/* Taken back and handed over again. A release() right after this load makes it READY, and whoever
		 * fetches it finds it in our hands: this very enqueue, which the core waits for. */
		return true;
	custody_move(custody, UMCG_CUSTODY_READY, UMCG_CUSTODY_FREE);
	return false;
}

/* Each further attempt takes a park() of the same task, a context switch, in between. */
#define UMCG_RELEASE_ATTEMPTS 8

/* Anybody: it may run. True if the caller must see to it that some CPU fetches it. */
static __always_inline bool custody_release(u32 *custody)
{
	u32 now;
	int i;

	for (i = 0; i < UMCG_RELEASE_ATTEMPTS; i++) {
		now = UMCG_LOAD(custody);
		if (now == UMCG_CUSTODY_PARKED && custody_move(custody, now, UMCG_CUSTODY_READY))
			return true;
		if (now == UMCG_CUSTODY_HOLD && custody_move(custody, now, UMCG_CUSTODY_FREE))
			return false;
		if (now == UMCG_CUSTODY_FREE || now == UMCG_CUSTODY_READY)
			return false;
	}
	return false;
}

/* A CPU in ops.dispatch: true if it, and nobody else, is to insert the task. */
static __always_inline bool custody_fetch(u32 *custody)
{
	return custody_move(custody, UMCG_CUSTODY_READY, UMCG_CUSTODY_FREE);
}

static __always_inline bool custody_is_held(const u32 *custody)
{
	u32 c = UMCG_LOAD(custody);

	return c == UMCG_CUSTODY_HOLD || c == UMCG_CUSTODY_PARKED;
}

#endif /* UMCG_HOLD_BPF_H */

/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The state machine: the kernel side's state of a task, the edges between, and the status word that shows
 * it to the program.
 *
 * The status word is the program's to write, so decisions rest on the state kept here, and the status word
 * only answers two questions that the program alone can: did it mark itself RUNNABLE, and (by exchange)
 * who of several wins that mark.
 *
 *	state    shown as              meaning
 *	FREE     NONE                  the slot is nobody's
 *	NEW      RUNNABLE              a worker that registered and has not waited yet
 *	ACTIVE   RUNNING, or RUNNABLE  may run user code; RUNNABLE once it marked itself so
 *	WAITING  RUNNABLE              stopped: in umcg_wait(), captured, or preempted
 *	SERVING  RUNNABLE              a server in umcg_wait() whose worker is ACTIVE
 *	BLOCKED  BLOCKED               a worker that sleeps in the kernel, or finishes there
 *
 * All changes happen under the domain's lock. An edge that UMCG_EDGES does not name is a bug of ours, not of
 * a program: it ejects the scheduler with the two states.
 */
#ifndef UMCG_STATE_BPF_H
#define UMCG_STATE_BPF_H

#include "../../include/umcg.h"
#include "atomic.bpf.h"

enum umcg_state {
	UMCG_FREE = 0,
	UMCG_NEW = 1,
	UMCG_ACTIVE = 2,
	UMCG_WAITING = 3,
	UMCG_SERVING = 4,
	UMCG_BLOCKED = 5,
	UMCG_NR_STATES = 6,
};

#define UMCG_EDGES(EDGE)                                                  \
	EDGE(FREE, NEW, "a worker registers")                             \
	EDGE(FREE, ACTIVE, "a server registers")                          \
	EDGE(NEW, WAITING, "a new worker waits for its first run")        \
	EDGE(NEW, ACTIVE, "a new worker is run before it waited")         \
	EDGE(NEW, BLOCKED, "a new worker is run while it sleeps")         \
	EDGE(NEW, FREE, "exit")                                           \
	EDGE(ACTIVE, WAITING, "umcg_wait; preemption")                    \
	EDGE(ACTIVE, SERVING, "a server starts its worker")               \
	EDGE(ACTIVE, BLOCKED, "a worker sleeps, or is run while it does") \
	EDGE(ACTIVE, FREE, "unregister; exit")                            \
	EDGE(WAITING, ACTIVE, "run; an event or kick for a server")       \
	EDGE(WAITING, BLOCKED, "run while it sleeps")                     \
	EDGE(WAITING, FREE, "killed")                                     \
	EDGE(SERVING, ACTIVE, "its worker stopped; timeout")              \
	EDGE(SERVING, FREE, "killed")                                     \
	EDGE(BLOCKED, WAITING, "capture")                                 \
	EDGE(BLOCKED, FREE, "exit")

#define UMCG_EDGE_BIT(from, to, why) | ((u64)1 << (UMCG_##from * UMCG_NR_STATES + UMCG_##to))
#define UMCG_LEGAL_EDGES ((u64)0 UMCG_EDGES(UMCG_EDGE_BIT))

static __always_inline bool state_may_become(u32 from, u32 to)
{
	if (from >= UMCG_NR_STATES || to >= UMCG_NR_STATES)
		return false;
	return UMCG_LEGAL_EDGES >> (from * UMCG_NR_STATES + to) & 1;
}

/* Only a program that hammers its own status word makes more than two attempts fail. */
#define UMCG_STATUS_ATTEMPTS 4

/* Changes the state bits @from one state @to another, clears the flags @ends, and keeps all other bits. */
static __always_inline bool status_change(u32 *status, u32 from, u32 to, u32 ends)
{
	u32 old;
	int i;

	for (i = 0; i < UMCG_STATUS_ATTEMPTS; i++) {
		old = UMCG_LOAD(status);
		if ((old & UMCG_STATE_MASK) != from)
			return false;
		if (UMCG_CMPXCHG(status, old, (old & ~(UMCG_STATE_MASK | ends)) | to) == old)
			return true;
	}
	return false;
}

/*
 * Moves a status word @from one state @to another. False if it was not in @from, or if the program keeps changing
 * it, which counts as "not in @from".
 *
 * Leaving RUNNING ends a request to preempt; becoming RUNNING ends the library's wait.
 */
static __always_inline bool status_move(u32 *status, u32 from, u32 to)
{
	return status_change(status, from, to, UMCG_TF_PREEMPT | (to == UMCG_STATE_RUNNING ? UMCG_TF_WAIT : 0));
}

/*
 * Takes back the mark of a task that has marked itself RUNNABLE and not waited yet. It may be on its way to
 * sched_yield(2), which must still be known for umcg_wait()'s: a plain one means something else. So the flag
 * of the wait stays; the library clears it.
 */
static __always_inline bool status_unmark(u32 *status)
{
	return status_change(status, UMCG_STATE_RUNNABLE, UMCG_STATE_RUNNING, UMCG_TF_PREEMPT);
}

/* Shows @to whatever the program has made of the word; its own 16 bits survive unless it fights for them. */
static __always_inline void status_show(u32 *status, u32 to)
{
	if (!status_move(status, UMCG_LOAD(status) & UMCG_STATE_MASK, to))
		UMCG_STORE(status, to);
}

#endif /* UMCG_STATE_BPF_H */

/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The steps that everything else is made of: tell a server, end serving, start a task. All under the lock.
 *
 * A host and its worker name each other (host->serving, worker->host). The pair is only believed if both
 * sides agree, so that a side that vanished, and even a slot that was given to somebody else, cannot
 * mislead: hosted_by().
 */
#ifndef UMCG_SERVE_BPF_H
#define UMCG_SERVE_BPF_H

#include "maps.bpf.h"
#include "queue.bpf.h"

static __always_inline bool hosted_by(const struct umcg_ref *worker, const struct umcg_ref *host)
{
	return host->slot && worker->slot->host == host->nr && host->slot->serving == worker->nr;
}

static __always_inline void push_blocked(struct umcg_ref *server, struct umcg_ref *worker)
{
	list_push(&server->cell->task.umcg_blocked_ptr, &worker->cell->task.umcg_blocked_ptr, worker->slot->addr);
}

/* On the list, which the server has not taken since. */
static __always_inline bool is_listed(const struct umcg_ref *worker, const struct umcg_ref *server)
{
	return worker->slot->listed_on == server->slot->tid && worker->slot->listed_gen == server->slot->list_gen &&
	       UMCG_LOAD(&server->cell->task.umcg_runnable_ptr);
}

/* A worker that is on the list already, because somebody ran it without taking the list, stays where it is: to
 * push it again would tie the list to itself. */
static __always_inline void push_runnable(struct umcg_ref *server, struct umcg_ref *worker)
{
	if (is_listed(worker, server))
		return;
	list_push(&server->cell->task.umcg_runnable_ptr, &worker->cell->task.umcg_runnable_ptr,
		  worker->slot->addr);
	if (!UMCG_LOAD(&worker->cell->task.umcg_runnable_ptr))
		server->slot->list_gen++; /* it was empty: the server has taken what was there */
	worker->slot->listed_on = server->slot->tid;
	worker->slot->listed_gen = server->slot->list_gen;
}

static __always_inline void become_running(struct umcg_ref *task, u32 *released)
{
	set_state(task->slot, UMCG_ACTIVE);
	status_show(&task->cell->task.umcg_status, UMCG_STATE_RUNNING);
	if (custody_release(&task->slot->custody))
		*released = task->nr;
}

/*
 * An event for a server, after the push. Pairs with the server's loop: it marks itself RUNNABLE, then takes
 * its lists. Either it takes the entry, or this finds the mark and takes it back, so that its umcg_wait()
 * returns at once; or both. A server that serves is not disturbed.
 */
static __always_inline void tell_server(struct umcg_ref *server, u32 *released)
{
	if (server->slot->state == UMCG_WAITING)
		become_running(server, released);
	else if (server->slot->state == UMCG_ACTIVE)
		status_unmark(&server->cell->task.umcg_status);
}

/* A server that serves has nobody to serve any more: it becomes RUNNING unless it is (its wait had timed out). */
static __always_inline void free_host(struct umcg_ref *host, u32 *released)
{
	host->slot->serving = 0;
	if (host->slot->state == UMCG_SERVING || host->slot->state == UMCG_WAITING)
		become_running(host, released);
	else if (host->slot->state == UMCG_ACTIVE)
		status_unmark(&host->cell->task.umcg_status);
}

/* A worker stopped. */
static __always_inline void end_serving(struct umcg_ref *worker, struct umcg_ref *host, u32 *released)
{
	if (hosted_by(worker, host))
		free_host(host, released);
	worker->slot->host = 0;
}

/*
 * Takes the lock, with @host looked up as it is then: a worker may be taken over while nobody has the lock. If that
 * goes on, there is no host to speak of.
 */
static __always_inline void lock_with_host(struct umcg_domain *domain, const struct umcg_ref *self,
					   struct umcg_ref *host)
{
	int i;

	for (i = 0; i < UMCG_LOOK_UPS; i++) {
		if (!ref_get(host, self->slot->host))
			host->slot = NULL;
		bpf_spin_lock(&domain->lock);
		if (self->slot->host == host->nr)
			return;
		bpf_spin_unlock(&domain->lock);
	}
	host->slot = NULL;
	bpf_spin_lock(&domain->lock);
}

/* It stops at a place where it may be kept: inside umcg_wait(), or at the boundary to user code. */
static __always_inline void stop(struct umcg_ref *task, u32 state)
{
	set_state(task->slot, state);
	task->slot->seen_signals = 0; /* of another time */
	custody_hold(&task->slot->custody);
}

/* The kernel side stops a worker that has not asked for it. */
static __always_inline void stop_captured(struct umcg_ref *self, u64 now_ns)
{
	self->cell->task.umcg_runnable_ts = now_ns;
	self->slot->since_ns = now_ns;
	self->slot->captured = true;
	self->slot->is_server = false;
	self->slot->deadline_ns = 0;
	stop(self, UMCG_WAITING);
}

/*
 * RUNNING to RUNNABLE without having asked for it in umcg_wait(): preempted, or the worker's own sched_yield(2).
 * True if it was a worker and stops here.
 */
static __always_inline bool worker_preempted(struct umcg_ref *self, struct umcg_ref *host, u64 now_ns,
					     u32 *released)
{
	if (self->slot->state != UMCG_ACTIVE || !hosted_by(self, host))
		return false;
	if (!status_move(&self->cell->task.umcg_status, UMCG_STATE_RUNNING, UMCG_STATE_RUNNABLE))
		return false; /* it marked itself: its umcg_wait() comes in a moment */
	stop_captured(self, now_ns);
	push_runnable(host, self);
	end_serving(self, host, released);
	return true;
}

#endif /* UMCG_SERVE_BPF_H */

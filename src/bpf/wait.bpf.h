/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * umcg_wait(), which arrives as sched_yield(2) with UMCG_TF_WAIT in the status.
 *
 * Worked example. Server S (tid 10) has marked itself RUNNABLE, stored 11 in umcg_next_tid and called
 * umcg_wait(); worker W (tid 11) is parked. ops.yield of S: W's status goes from RUNNABLE to RUNNING, W's custody
 * from PARKED to READY, S becomes SERVING and is to be held, W is noted on this CPU. schedule() then calls
 * ops.dispatch, which inserts W here, and ops.enqueue(S), which parks it. One system call, one switch.
 */
#ifndef UMCG_WAIT_BPF_H
#define UMCG_WAIT_BPF_H

#include "serve.bpf.h"
#include "timeout.bpf.h"

/* start_worker(): the worker was asleep, so it became BLOCKED at once and its host goes on. */
#define UMCG_STARTED_ASLEEP 1

/*
 * A wait, in one step under the lock: what takes part in that was looked up before. What is rare is put off until the lock
 * is dropped, and has a step of its own.
 */
struct umcg_wait {
	struct umcg_ref self;
	struct umcg_ref host; /* of self, if that waits as a worker; may be nobody, see ref_get_any() */
	struct umcg_ref next; /* slot NULL: there is none */
	u32 next_tid;
	u32 server_tid;
	u32 flags;
	u64 now_ns;	 /* CLOCK_MONOTONIC if next seems to sleep, else 0 */
	u64 deadline_ns; /* CLOCK_MONOTONIC, 0 for none */
	u64 captured_ns; /* when next was captured, else 0 */
	bool as_server;	 /* self names itself */
	bool server_is_there; /* that self names; only looked up where it is not the host */
	bool switched;	 /* next is RUNNING */
	bool joins;	 /* to be done: queue self at the server that it names, see join_server() */
	u32 taken_from;	 /* to be done: this host lost its worker, see leave_host() */
	struct umcg_released released;
};

/* The one step that several may try and one wins: RUNNABLE to RUNNING, or to BLOCKED if it sleeps. */
static __always_inline bool take(struct umcg_ref *task)
{
	u32 *status = &task->cell->task.umcg_status;

	if (task->slot->asleep)
		return status_move(status, UMCG_STATE_RUNNABLE, UMCG_STATE_BLOCKED);
	if (task->slot->state == UMCG_WAITING)
		return status_move(status, UMCG_STATE_RUNNABLE, UMCG_STATE_RUNNING);
	return status_unmark(status);
}

/*
 * Makes w->next RUNNING, served by @host. A worker that only marked itself RUNNABLE and still runs is taken
 * all the same, as in the seed: its own umcg_wait() will return at once. The host that it had is free then.
 */
static __always_inline int start_worker(struct umcg_wait *w, struct umcg_ref *host)
{
	struct umcg_ref *worker = &w->next;
	u32 state = worker->slot->state;

	if (UMCG_LOAD(&worker->cell->task.umcg_server_tid) != host->slot->tid)
		return -EINVAL;
	if (state != UMCG_NEW && state != UMCG_WAITING && state != UMCG_ACTIVE)
		return -EBUSY;
	if (worker->slot->serving)
		return -EBUSY; /* a server whose wait had timed out, and that wants to be a worker now */
	if (worker->slot->asleep && !w->now_ns)
		return -EAGAIN;
	if (!take(worker))
		return -EBUSY;

	w->taken_from = worker->slot->host;
	worker->slot->host = 0;
	if (worker->slot->asleep) {
		worker->slot->asleep = false;
		set_state(worker->slot, UMCG_BLOCKED);
		worker->slot->since_ns = w->now_ns;
		worker->cell->task.umcg_blocked_ts = w->now_ns;
		push_blocked(host, worker);
		return UMCG_STARTED_ASLEEP;
	}
	if (worker->slot->captured) {
		worker->slot->captured = false;
		w->captured_ns = worker->slot->since_ns;
	}
	if (state != UMCG_ACTIVE)
		set_state(worker->slot, UMCG_ACTIVE);
	worker->slot->host = host->nr;
	worker->slot->payer = host->nr;
	host->slot->serving = worker->nr;
	if (custody_release(&worker->slot->custody))
		w->released.started = worker->nr;
	w->switched = true;
	return 0;
}

static __always_inline int start_server(struct umcg_wait *w)
{
	struct umcg_ref *server = &w->next;
	u32 state = server->slot->state;

	if ((state != UMCG_WAITING && state != UMCG_ACTIVE) || server->slot->serving)
		return -EBUSY;
	server->slot->asleep = false; /* a server that sleeps is no business of anybody's */
	if (!take(server))
		return -EBUSY;
	if (state == UMCG_WAITING)
		become_running(server, &w->released.started);
	w->switched = true;
	return 0;
}

/* A server that names itself idles, as one that names nobody. */
static __always_inline bool names_another(const struct umcg_wait *w)
{
	return w->next.slot && w->next.nr != w->self.nr;
}

static __always_inline int server_waits(struct umcg_wait *w)
{
	struct umcg_ref *self = &w->self;
	int ret;

	self->slot->is_server = true;
	self->slot->deadline_ns = w->deadline_ns;
	if (self->slot->serving) { /* its wait had timed out */
		if (names_another(w) && w->next.nr != self->slot->serving)
			return -EBUSY;
		/* To name its worker again changes nothing, unless that marked itself and sleeps: it blocks now. */
		if (!names_another(w) || !w->next.slot->asleep) {
			self->cell->task.umcg_next_tid = 0;
			stop(self, UMCG_SERVING);
			return 0;
		}
	} else if (!names_another(w)) {
		stop(self, UMCG_WAITING);
		return 0;
	}
	if (ref_is_server(&w->next))
		ret = start_server(w);
	else
		ret = start_worker(w, self);
	if (ret < 0)
		return ret;
	self->cell->task.umcg_next_tid = 0;
	if (ret == UMCG_STARTED_ASLEEP)
		status_move(&self->cell->task.umcg_status, UMCG_STATE_RUNNABLE, UMCG_STATE_RUNNING);
	else
		stop(self, self->slot->serving ? UMCG_SERVING : UMCG_WAITING);
	return 0;
}

/* Its host is gone: another server may take it over. */
static __always_inline int orphan_waits(struct umcg_wait *w, bool to_host)
{
	if (!to_host || !w->server_is_there)
		return -ESRCH;
	w->self.slot->host = 0;
	stop(&w->self, UMCG_WAITING);
	w->joins = true;
	return 0;
}

static __always_inline int worker_waits(struct umcg_wait *w)
{
	struct umcg_ref *self = &w->self, *host = &w->host;
	bool to_host = !w->next.slot || w->next.nr == host->nr;
	bool names_host, host_waits;
	int ret;

	self->slot->is_server = false;
	self->slot->deadline_ns = 0;
	if (self->slot->serving)
		return -EBUSY; /* a server whose wait had timed out, and that wants to be a worker now */
	if (self->slot->host != host->nr)
		return -EAGAIN; /* another server took it over meanwhile */
	if (!hosted_by(self, host))
		return orphan_waits(w, to_host);
	names_host = w->server_tid == host->slot->tid;
	if (w->flags & UMCG_WAIT_ENQUEUE && !names_host && !w->server_is_there)
		return -ESRCH;
	if (!to_host) {
		if (ref_is_server(&w->next) || w->next.nr == self->nr)
			return -EINVAL;
		ret = start_worker(w, host);
		if (ret < 0)
			return ret;
	}
	self->cell->task.umcg_next_tid = 0;

	/* From here on self has stopped; if it started another worker, its host serves that one and goes on waiting. */
	stop(self, UMCG_WAITING);
	host_waits = host->slot->state == UMCG_SERVING;
	end_serving(self, host, &w->released.host);
	if (w->flags & UMCG_WAIT_ENQUEUE && !names_host) {
		w->joins = true;
	} else if (w->flags & UMCG_WAIT_ENQUEUE || (to_host && !host_waits)) {
		push_runnable(host, self);
		tell_server(host, &w->released.told);
	}
	return 0;
}

/* Under the lock, with what was looked up before it: all of that may have changed, so it is checked here. */
static __always_inline int wait_locked(struct umcg_wait *w)
{
	struct umcg_slot *self = w->self.slot;

	self->asleep = false; /* whatever became of the note: it runs */
	if (self->state == UMCG_WAITING || self->state == UMCG_SERVING) {
		/* It was let go for a signal, and its wait goes on; so does the time that it may take. */
		custody_hold(&self->custody);
		w->deadline_ns = 0;
		return 0;
	}
	if ((UMCG_LOAD(&w->self.cell->task.umcg_status) & UMCG_STATE_MASK) != UMCG_STATE_RUNNABLE)
		return 0; /* an event made it RUNNING: nothing to wait for */
	if (self->state == UMCG_NEW) { /* inside umcg_register(): nothing to give up yet, nobody to name */
		stop(&w->self, UMCG_WAITING);
		return 0;
	}
	if (self->state != UMCG_ACTIVE)
		return -EAGAIN; /* BLOCKED and not captured: the scheduler is going away, or the program writes what it likes */
	if (w->next_tid && (!w->next.slot || !ref_is(&w->next, self->domain, w->next_tid)))
		return -ESRCH;
	return w->as_server ? server_waits(w) : worker_waits(w);
}

/* Whether a domain has a server of that tid; 0 or 1. Global for the reason that slot_of_tid() gives. */
__noinline u32 is_server_tid(u32 domain, u32 tid)
{
	struct umcg_ref server = {};

	return ref_find(&server, domain, tid) && ref_is(&server, domain, tid) && ref_is_server(&server);
}

/*
 * The host of a worker loses it without its having stopped: another server has taken it over, or it is a worker no more. @worker
 * is its slot.
 */
__noinline int leave_host(u32 domain_nr, u32 worker_nr, u32 host_nr)
{
	struct umcg_domain *domain = domain_of(domain_nr);
	struct umcg_slot *worker = slot_at(worker_nr);
	struct umcg_ref host = {};
	u32 released = 0;

	if (!domain || !worker || !ref_get(&host, host_nr))
		return 0;
	bpf_spin_lock(&domain->lock);
	/* It may have been run there again by now. */
	if (host.slot->domain == domain_nr && host.slot->serving == worker_nr && worker->host != host_nr)
		free_host(&host, &released);
	bpf_spin_unlock(&domain->lock);
	return queue_slots(0, released, 0);
}

/* A worker that waits comes on the list of a server that is not its host. */
__noinline int join_server(u32 domain_nr, u32 worker_nr, u32 server_tid)
{
	struct umcg_domain *domain = domain_of(domain_nr);
	struct umcg_ref worker = {}, server = {};
	u32 released = 0;

	if (!domain || !ref_get(&worker, worker_nr) || !ref_find(&server, domain_nr, server_tid))
		return 0;
	bpf_spin_lock(&domain->lock);
	if (worker.slot->state == UMCG_WAITING && ref_is(&server, domain_nr, server_tid)) {
		push_runnable(&server, &worker);
		tell_server(&server, &released);
	}
	bpf_spin_unlock(&domain->lock);
	return queue_slots(0, 0, released);
}

/* False only in the verifier's mind. */
static __always_inline bool wait_look_up(struct umcg_wait *w, void *cells)
{
	struct umcg_task *task = &w->self.cell->task;
	struct umcg_slot *self = w->self.slot;
	u32 domain = self->domain;

	w->flags = UMCG_LOAD(&w->self.cell->call.flags);
	w->server_tid = UMCG_LOAD(&task->umcg_server_tid);
	w->next_tid = UMCG_LOAD(&task->umcg_next_tid);
	w->as_server = w->server_tid == self->tid;
	if (w->next_tid) {
		if (!ref_find_any(&w->next, domain, w->next_tid, cells))
			return false;
		if (w->next.slot->asleep)
			w->now_ns = bpf_ktime_get_ns();
	}
	if (w->as_server) {
		w->deadline_ns = deadline_after(UMCG_LOAD(&w->self.cell->call.timeout_ns));
		return true;
	}
	if (!ref_get_any(&w->host, self->host, cells))
		return false;
	if (!hosted_by(&w->self, &w->host) || w->server_tid != w->host.slot->tid)
		w->server_is_there = is_server_tid(domain, w->server_tid);
	return true;
}

/* What the system call would return. */
static __always_inline void wait_fail(struct umcg_ref *self, int error)
{
	self->cell->call.result = error;
	status_move(&self->cell->task.umcg_status, UMCG_STATE_RUNNABLE, UMCG_STATE_RUNNING);
}

static __always_inline void wait_account(const struct umcg_wait *w, struct umcg_stats *st)
{
	st->waits++;
	st->switches += w->switched;
	if (w->captured_ns)
		st->runnable_ns += bpf_ktime_get_ns() - w->captured_ns;
}

/* What was put off until the lock is dropped. */
static __always_inline void wait_afterwards(const struct umcg_wait *w)
{
	if (w->taken_from)
		leave_host(w->self.slot->domain, w->next.nr, w->taken_from);
	if (w->joins)
		join_server(w->self.slot->domain, w->self.nr, w->server_tid);
}

/* A server from now on: whoever hosts it as a worker loses it. */
static __always_inline void worker_no_more(struct umcg_domain *domain, struct umcg_ref *self)
{
	u32 host;

	bpf_spin_lock(&domain->lock);
	host = self->slot->host;
	self->slot->host = 0;
	bpf_spin_unlock(&domain->lock);
	leave_host(self->slot->domain, self->nr, host);
}

/* ops.yield of a registered task inside umcg_wait(); its run queue is locked. */
static __always_inline void umcg_waits(struct task_struct *p, const struct umcg_ref *self, void *cells,
				       struct umcg_cpu_ctx *cctx)
{
	struct umcg_domain *domain = domain_of(self->slot->domain);
	struct umcg_wait w = { .self = *self };
	int ret;

	if (!domain || !wait_look_up(&w, cells))
		return;
	if (w.as_server && w.self.slot->host)
		worker_no_more(domain, &w.self);
	bpf_spin_lock(&domain->lock);
	ret = wait_locked(&w);
	bpf_spin_unlock(&domain->lock);
	if (ret == -EAGAIN)
		return; /* what was looked up has changed; the library calls again while the status is RUNNABLE */
	UMCG_STORE(&w.self.cell->call.flags, 0);
	if (ret < 0) {
		wait_fail(&w.self, ret);
		return;
	}
	wait_account(&w, &cctx->stats);
	wait_afterwards(&w);
	if (!custody_is_held(&w.self.slot->custody)) { /* it goes on: nobody else has this CPU */
		queue_released(&w.released);
		return;
	}
	if (w.deadline_ns)
		start_timeout(w.self.slot); /* or the sweep does */
	scx_bpf_task_set_slice(p, 0);
	run_released_next(cctx, &w.released);
}

/* ops.yield of a registered task outside of umcg_wait(): a worker gives its host the CPU. */
static __always_inline void task_yields(struct task_struct *p, struct umcg_ref *self, struct umcg_cpu_ctx *cctx)
{
	struct umcg_released released = {};
	struct umcg_domain *domain = domain_of(self->slot->domain);
	struct umcg_ref host;
	u64 now_ns;
	bool stopped;

	scx_bpf_task_set_slice(p, 0);
	if (!domain || !self->slot->host)
		return;
	now_ns = bpf_ktime_get_ns();
	lock_with_host(domain, self, &host);
	stopped = worker_preempted(self, &host, now_ns, &released.host);
	bpf_spin_unlock(&domain->lock);
	if (!stopped)
		return;
	STAT_INC(preemptions);
	run_released_next(cctx, &released);
}

#endif /* UMCG_WAIT_BPF_H */

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

/* Who takes part in a wait; each may be nobody: see ref_get_any(). */
struct umcg_wait {
	struct umcg_ref self;
	struct umcg_ref host;	   /* of self, if that is a hosted worker */
	struct umcg_ref server;	   /* that self names, if it needs one: UMCG_WAIT_ENQUEUE, or no host */
	struct umcg_ref next;
	struct umcg_ref next_host; /* of next: it marked itself RUNNABLE and has not waited yet */
	u32 next_tid;
	u32 server_tid;
	u32 flags;
	u64 now_ns; /* CLOCK_MONOTONIC if next seems to sleep, else 0 */
	u64 deadline_ns; /* CLOCK_MONOTONIC, 0 for none */
	u64 captured_ns; /* when next was captured, else 0 */
	bool server_looked_up;
	bool switched; /* next is RUNNING */
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
 * all the same, as in the seed: its own umcg_wait() will return at once. Its former host is free then.
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

	end_serving(worker, &w->next_host, &w->released.former_host);
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
	return w->next_tid && w->next.nr != w->self.nr;
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
		self->cell->task.umcg_next_tid = 0;
		stop(self, UMCG_SERVING);
		return 0;
	}
	if (!names_another(w)) {
		end_serving(self, &w->host, &w->released.host); /* it was a worker until now */
		stop(self, UMCG_WAITING);
		return 0;
	}
	if (ref_is_server(&w->next))
		ret = start_server(w);
	else
		ret = start_worker(w, self);
	if (ret < 0)
		return ret;
	end_serving(self, &w->host, &w->released.host);
	self->cell->task.umcg_next_tid = 0;
	if (ret == UMCG_STARTED_ASLEEP)
		status_move(&self->cell->task.umcg_status, UMCG_STATE_RUNNABLE, UMCG_STATE_RUNNING);
	else
		stop(self, self->slot->serving ? UMCG_SERVING : UMCG_WAITING);
	return 0;
}

static __always_inline void enqueue_self(struct umcg_wait *w, struct umcg_ref *server)
{
	push_runnable(server, &w->self);
	tell_server(server, &w->released.told);
}

/* The server that self names, which is looked up only where one is needed. */
static __always_inline bool server_is_there(const struct umcg_wait *w)
{
	return ref_is(&w->server, w->self.slot->domain, w->server_tid) && ref_is_server(&w->server);
}

static __always_inline int worker_waits(struct umcg_wait *w)
{
	struct umcg_ref *self = &w->self;
	bool to_host = !w->next_tid || w->next.nr == w->host.nr;
	bool host_waits;
	int ret = 0;

	self->slot->is_server = false;
	self->slot->deadline_ns = 0;
	if (self->slot->serving)
		return -EBUSY; /* a server whose wait had timed out, and that wants to be a worker now */
	if (w->flags & UMCG_WAIT_ENQUEUE && !server_is_there(w))
		return -ESRCH;
	if (!hosted_by(self, &w->host)) { /* its host is gone: another server may take it over */
		if (!w->server_looked_up)
			return -EAGAIN; /* it was there when it was looked up */
		if (!to_host || !server_is_there(w))
			return -ESRCH;
		self->slot->host = 0;
		stop(self, UMCG_WAITING);
		enqueue_self(w, &w->server);
		return 0;
	}
	if (!to_host) {
		if (ref_is_server(&w->next) || w->next.nr == self->nr)
			return -EINVAL;
		ret = start_worker(w, &w->host);
		if (ret < 0)
			return ret;
	}
	self->cell->task.umcg_next_tid = 0;

	/* From here on self has stopped; if it started another worker, its host serves that one and goes on waiting. */
	stop(self, UMCG_WAITING);
	host_waits = w->host.slot->state == UMCG_SERVING;
	end_serving(self, &w->host, &w->released.host);
	if (w->flags & UMCG_WAIT_ENQUEUE)
		enqueue_self(w, &w->server);
	else if (to_host && !host_waits)
		enqueue_self(w, &w->host);
	return 0;
}

/* Under the lock, with what was looked up before it: all of that may have changed, so it is checked here. */
static __always_inline int wait_locked(struct umcg_wait *w)
{
	struct umcg_slot *self = w->self.slot;

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
	if (self->host != w->host.nr)
		return -EAGAIN; /* another server took it over meanwhile */
	if (w->next_tid && !ref_is(&w->next, self->domain, w->next_tid))
		return -ESRCH;
	if (w->next_tid && w->next.slot->host != w->next_host.nr)
		return -EAGAIN;
	if (ref_is_server(&w->self))
		return server_waits(w);
	return worker_waits(w);
}

/* False only in the verifier's mind: see ref_get_any(). */
static __always_inline bool wait_look_up(struct umcg_wait *w)
{
	struct umcg_task *task = &w->self.cell->task;
	u32 domain = w->self.slot->domain, server_tid = UMCG_LOAD(&task->umcg_server_tid);
	u32 server = nobody;

	w->flags = UMCG_LOAD(&w->self.cell->call.flags);
	w->deadline_ns = deadline_after(UMCG_LOAD(&w->self.cell->call.timeout_ns));
	w->server_tid = server_tid;
	w->next_tid = UMCG_LOAD(&task->umcg_next_tid);
	if (!ref_get_any(&w->host, w->self.slot->host, &w->self))
		return false;
	if (server_tid != w->self.slot->tid && (w->flags & UMCG_WAIT_ENQUEUE || !hosted_by(&w->self, &w->host))) {
		server = slot_of_tid(domain, server_tid);
		w->server_looked_up = true;
	}
	if (!ref_get_any(&w->server, server, &w->self) ||
	    !ref_get_any(&w->next, slot_of_tid(domain, w->next_tid), &w->self) ||
	    !ref_get_any(&w->next_host, w->next.slot->host, &w->self))
		return false;
	if (w->next.slot->asleep)
		w->now_ns = bpf_ktime_get_ns();
	return true;
}

/* What the system call would return. */
static __always_inline void wait_fail(struct umcg_ref *self, int error)
{
	self->cell->call.result = error;
	status_move(&self->cell->task.umcg_status, UMCG_STATE_RUNNABLE, UMCG_STATE_RUNNING);
}

/* Statistics of a wait; @captured_ns: when whom it started was captured, or 0. */
__noinline int wait_account(bool is_switch, u64 captured_ns)
{
	struct umcg_stats *st = this_stats();

	if (!st)
		return 0;
	st->waits++;
	if (is_switch)
		st->switches++;
	if (captured_ns)
		st->runnable_ns += bpf_ktime_get_ns() - captured_ns;
	return 0;
}

/* ops.yield of a registered task inside umcg_wait(): @nr is its slot, its run queue is locked. */
static __always_inline void umcg_waits(struct task_struct *p, u32 nr)
{
	struct umcg_wait w = {};
	struct umcg_domain *domain;
	int ret;

	if (!ref_get(&w.self, nr))
		return;
	domain = domain_of(w.self.slot->domain);
	if (!domain)
		return;
	if (!wait_look_up(&w))
		return;
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
	wait_account(w.switched, w.captured_ns);
	if (!custody_is_held(&w.self.slot->custody)) { /* it goes on: nobody else has this CPU */
		queue_released(&w.released);
		return;
	}
	if (w.deadline_ns)
		start_timeout(w.self.slot, w.deadline_ns);
	scx_bpf_task_set_slice(p, 0);
	run_released_next(&w.released);
}

/* ops.yield of a registered task outside of umcg_wait(): a worker gives its host the CPU. */
static __always_inline void task_yields(struct task_struct *p, struct umcg_ref *self)
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
	run_released_next(&released);
}

#endif /* UMCG_WAIT_BPF_H */

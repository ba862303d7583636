/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The sweep: a timer that looks at every held task, for what no callback tells.
 *
 * - The watchdog of sched_ext ejects a scheduler one of whose runnable tasks has not run for a while, and a
 *   held task counts as runnable. So each is let go about once a second, as for a signal (below), and comes no further. Once a
 *   second rather than just below the watchdog's limit, because a grace period of RCU tasks waits for every one of them, too.
 * - A signal, fatal or not, wakes a task that sleeps, and does nothing to one that is runnable; so do job control,
 *   ptrace and the freezer. A held task with anything of the kind pending is let go, its state unchanged: it does
 *   inside the kernel what is asked of it, and is held again at the boundary (a worker: capture.bpf.h), or runs
 *   its handler and goes on waiting (a server: wait.bpf.h).
 * - A released task that no CPU fetched (the queue of hints was full) is queued again.
 *
 * It runs while tasks are registered.
 */
#ifndef UMCG_SWEEP_BPF_H
#define UMCG_SWEEP_BPF_H

#include "capture.bpf.h"
#include "queue.bpf.h"
#include "timeout.bpf.h"

#define SWEEP_PERIOD_NS (20ULL * 1000 * 1000)
#define SWEEP_GAP_NS (1000ULL * 1000) /* from one round to the next at least, whatever asks for it */
#define PERIODS_UNTIL_LET_GO 50 /* one second */
#define PERIODS_UNTIL_RESCUED 3

struct umcg_sweep {
	struct bpf_timer timer;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct umcg_sweep);
} sweeps SEC(".maps");

/* When the last round ended, and when the last one began that ended a period; CLOCK_MONOTONIC. */
u64 swept_ns, period_ns;

/* 1 while the timer is armed, and while somebody who cannot wait for the period's end has set it; exchange. */
u32 sweep_armed, sweep_asked;

static __always_inline void arm_sweep(u64 delay_ns)
{
	u32 zero = 0;
	struct umcg_sweep *sweep = bpf_map_lookup_elem(&sweeps, &zero);

	if (!sweep || bpf_timer_start(&sweep->timer, delay_ns, 0)) {
		UMCG_XCHG(&sweep_armed, 0); /* whoever needs it next tries again */
		UMCG_XCHG(&sweep_asked, 0);
	}
}

/*
 * A round now, or soon after the last one: a flood of requests is not to be a flood of rounds. Nor are requests to put the
 * round off: to start a timer again takes it away from the CPU that is about to run it, so only the first one starts it.
 */
static __always_inline void sweep_soon(void)
{
	u64 since_ns, ended_ns = UMCG_LOAD(&swept_ns);

	if (UMCG_LOAD(&sweep_asked) || UMCG_XCHG(&sweep_asked, 1))
		return;
	since_ns = bpf_ktime_get_ns() - ended_ns;
	arm_sweep(since_ns < SWEEP_GAP_NS ? SWEEP_GAP_NS - since_ns : 0);
}

/*
 * A task was registered. Pairs with sweep() in reap.bpf.h: it disarms, then looks at nr_registered.
 * This may replace what sweep_soon() has set, so it looks for that afterwards; what it does not see then, replaces this.
 */
static __always_inline void need_sweep(void)
{
	if (UMCG_XCHG(&sweep_armed, 1))
		return;
	arm_sweep(SWEEP_PERIOD_NS);
	if (UMCG_LOAD(&sweep_asked))
		arm_sweep(SWEEP_GAP_NS);
}

/* From the kernel's linux/sched/jobctl.h: JOBCTL_STOP_PENDING, TRAP_STOP, TRAP_NOTIFY, TRAP_FREEZE. */
#define JOBCTL_PENDING (1UL << 17 | 1UL << 19 | 1UL << 20 | 1UL << 23)

/*
 * Anything that the task would do in the kernel, if it ran. The kernel chose one thread for a signal of the process and marked it in
 * a flag whose place differs between kernels: so every one that may take it counts, unless the signal was @seen.
 */
static __always_inline bool wanted_by_kernel(const struct task_struct *p, u64 seen)
{
	u64 deliverable = ~p->blocked.sig[0];
	u64 shared = p->signal->shared_pending.signal.sig[0] & ~seen;

	return (shared | p->pending.signal.sig[0]) & deliverable || p->jobctl & JOBCTL_PENDING || p->task_works;
}

/*
 * For a signal of the process each task is let go once: whom it was for takes it, the others come back. The same number may come
 * again while nobody looks, and then it seems to have been seen; so a server, whose handlers run at once, is let go every period.
 */
static __always_inline bool is_to_be_let_go(struct umcg_slot *slot, const struct task_struct *p, u32 periods)
{
	u64 seen = slot->is_server && periods ? 0 : slot->seen_signals;

	slot->seen_signals = p->signal->shared_pending.signal.sig[0];
	return task_is_dying(p) || wanted_by_kernel(p, seen);
}

/*
 * The timer of a wait should have come a while ago. It could not be started, because there is none yet or the kernel had no memory
 * for it; or the timer of an earlier wait, which starts itself anew, overtook it.
 */
static __always_inline void sweep_timeout(struct umcg_slot *slot)
{
	u64 deadline_ns = slot->deadline_ns;

	if (deadline_ns && deadline_ns + SWEEP_PERIOD_NS < bpf_ktime_get_ns() && !init_timeout(slot))
		start_timeout(slot);
}

static __always_inline bool let_go(struct umcg_slot *slot, u32 nr)
{
	if (!custody_release(&slot->custody))
		return false;
	queue_slot(nr);
	return true;
}

static __always_inline void sweep_parked(struct umcg_slot *slot, u32 nr, struct task_struct *p, u32 periods)
{
	if (is_to_be_let_go(slot, p, periods)) {
		if (let_go(slot, nr))
			STAT_INC(signal_releases);
		return;
	}
	slot->periods += periods;
	if (slot->periods < PERIODS_UNTIL_LET_GO)
		return;
	slot->periods = 0;
	if (let_go(slot, nr))
		STAT_INC(refreshes);
}

static __always_inline void sweep_ready(struct umcg_slot *slot, u32 nr, u32 periods)
{
	slot->periods += periods;
	if (slot->periods < PERIODS_UNTIL_RESCUED)
		return;
	slot->periods = 0;
	STAT_INC(rescues);
	queue_slot(nr);
}

/*
 * A signal: held tasks need not wait for the next round, but no longer than SWEEP_GAP_NS. What passes no tracepoint (exit_group, exec, a core dump,
 * ptrace, the freezer) the next round finds.
 */
SEC("tp_btf/signal_generate")
int BPF_PROG(umcg_signal_generate, int sig, struct kernel_siginfo *info, struct task_struct *p)
{
	struct umcg_process *process;

	if (!UMCG_LOAD(&nr_registered))
		return 0;
	process = bpf_task_storage_get(&processes, p->group_leader, 0, 0);
	if (process && process->owns_domain)
		sweep_soon();
	return 0;
}

#endif /* UMCG_SWEEP_BPF_H */

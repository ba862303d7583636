/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Where everything lives, and how to get from one to the other.
 *
 *	task_struct --pids--> slot number --slots[]--> struct umcg_slot (ours alone)
 *	who runs on a CPU --cpu_ctxs--^
 *	                                                            | domain, cell
 *	                                                            v
 *	               domain_states[] (lock, owner; ours alone)   domains[domain][cell]
 *	                                                            struct umcg_cell (shared with the program)
 *	(domain, tid) --tids--> slot number
 *
 * Locking: a domain's lock covers the state, host and serving fields of its slots and every push on its
 * lists. It is the only lock, and no helper may be called while it is held; so a function first looks up
 * all that it may need, takes the lock, checks that what it looked up still holds, acts, drops the lock and
 * then passes on the tasks that it released. The custody word of a slot is no part of this: it has its own
 * protocol (hold.bpf.h), so that ops.enqueue and ops.dispatch need no lock.
 */
#ifndef UMCG_MAPS_BPF_H
#define UMCG_MAPS_BPF_H

#include <scx/common.bpf.h>
#include "intf.h"
#include "hold.bpf.h"
#include "list.bpf.h"
#include "state.bpf.h"

/* Set by the loader before load; the maps are sized to match. */
const volatile bool partial_mode;
const volatile u32 max_domains = 64;
const volatile u32 max_slots = 16384; /* slots[0] is nobody's: slot number 0 means "none" */
const volatile u64 slice_ns = 5000000;

/* Kernel side of one task. */
struct umcg_slot {
	struct task_struct __kptr *task; /* set by registration, taken by retire() */
	struct bpf_timer timer; /* of umcg_wait(): see timeout.bpf.h */
	u64 deadline_ns; /* CLOCK_MONOTONIC of the wait in progress, 0 for none; under the lock */
	u64 seen_signals; /* of the process, that the sweep has let this task go for; a lost update costs another time */
	u32 custody;	 /* enum umcg_custody; atomics of hold.bpf.h only */
	u32 state;	 /* enum umcg_state; written under the domain's lock */
	u32 host;	 /* slot of the server that serves this ACTIVE worker, else 0; under the lock */
	u32 serving;	 /* slot of the worker that this server serves, else 0; under the lock */
	u32 domain;	 /* constant while registered, like all below up to addr */
	u32 cell;
	u32 tid;	 /* in the process's own pid namespace */
	s32 pid;	 /* in the initial one */
	u32 listed_on;	 /* tid of the server on whose runnable list it was put last, else 0; under the lock */
	u32 listed_gen;	 /* list_gen of that server then */
	u32 list_gen;	 /* server: how often its runnable list was begun anew; under the lock */
	u64 addr;	 /* of the struct umcg_task in the process */
	u64 since_ns;	 /* when it was blocked, or captured: for the statistics; under the lock */
	u32 periods;	 /* of the sweep since it was parked or released; a lost update costs a period */
	bool is_server;	 /* as it named its server when it registered or last waited; under the lock */
	bool asleep;	 /* went to sleep in a state that does not show it; under the lock */
	bool in_handler; /* the next rseq update belongs to the delivery of a signal: written by the task itself only */
	bool captured;	 /* WAITING by the kernel side's doing: since_ns counts; under the lock */
};

/* Kernel side of one domain. */
struct umcg_domain {
	struct bpf_spin_lock lock;
	u32 tgid;	/* the process that attached, else 0; in the initial pid namespace; under the lock, like all below */
	u32 first_slot; /* 0: not in use */
	u32 nr_slots;
	u32 nr_tasks;
	u64 nonce;	/* what ATTACH must know; 0 once it is used */
};

/* Of a process, kept with its thread group's leader. */
struct umcg_process {
	bool owns_domain; /* signals for it matter */
};

/* Hand-over between the callbacks of one schedule() on one CPU, which holds the run queue's lock. */
struct umcg_cpu_ctx {
	u32 current;	 /* slot of the task that runs, 0 if it is not registered: see slot_of_current() */
	u32 next;	 /* slot that ops.dispatch is to run next */
	u32 handed_over; /* slot of the task about to run, if it got this CPU from a registered one, else 0 */
	bool at_boundary; /* the task that runs is about to return to user code, and is to stop there */
	u64 burst_start_ns; /* scx_bpf_now() when a registered task last got this CPU otherwise */
	u64 burst_jiffies;  /* when that was last compared with the clock */
	u64 exec_start;	 /* ns: sum_exec_runtime of the task below when it was put on this CPU */
	s32 counted;	 /* pid of the task that has not paid yet for its time on this CPU, else 0 */
};

/* Clang describes a type that only a nested map names by a mere forward declaration, unless a variable has it. */
struct umcg_cell *umcg_cell_in_full;

struct umcg_domain_map {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE | BPF_F_INNER_MAP);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct umcg_cell);
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 64);
	__uint(key_size, sizeof(u32));
	__array(values, struct umcg_domain_map);
} domains SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 64);
	__type(key, u32);
	__type(value, struct umcg_domain);
} domain_states SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 16385);
	__type(key, u32);
	__type(value, struct umcg_slot);
} slots SEC(".maps");

struct umcg_tid_key {
	u32 domain;
	u32 tid;
};

#define UMCG_TID_HINTS 4096 /* a power of two */

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, struct umcg_tid_key);
	__type(value, u32);
} tids SEC(".maps");

/* Where a tid was last registered: spares most look-ups in `tids`. Hints; the slot tells whether it is that task's. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, UMCG_TID_HINTS);
	__type(key, u32);
	__type(value, u32);
} tid_hints SEC(".maps");

/* Slot of a registered task by its pid in the initial namespace. A hint, too: task storage would know for certain, and takes 250 bytes. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, s32);
	__type(value, u32);
} pids SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct umcg_process);
} processes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct umcg_cpu_ctx);
} cpu_ctxs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct umcg_stats);
} stats SEC(".maps");

static __always_inline struct umcg_stats *this_stats(void)
{
	u32 zero = 0;

	return bpf_map_lookup_elem(&stats, &zero);
}

#define STAT_ADD(field, n)                             \
	do {                                           \
		struct umcg_stats *__st = this_stats(); \
		if (__st)                              \
			__st->field += (n);            \
	} while (0)
#define STAT_INC(field) STAT_ADD(field, 1)

static __always_inline struct umcg_cpu_ctx *this_cpu_ctx(void)
{
	u32 zero = 0;

	return bpf_map_lookup_elem(&cpu_ctxs, &zero);
}

static __always_inline struct umcg_cpu_ctx *cpu_ctx_of(s32 cpu)
{
	u32 zero = 0;

	return bpf_map_lookup_percpu_elem(&cpu_ctxs, &zero, cpu);
}

static __always_inline struct umcg_domain *domain_of(u32 domain)
{
	return bpf_map_lookup_elem(&domain_states, &domain);
}

static __always_inline struct umcg_slot *slot_at(u32 slot)
{
	return slot ? bpf_map_lookup_elem(&slots, &slot) : NULL;
}

/* Slot @nr if it is @p's, else NULL. */
static __always_inline struct umcg_slot *slot_if_of(u32 nr, const struct task_struct *p)
{
	struct umcg_slot *slot = slot_at(nr);

	return slot && slot->task == p ? slot : NULL;
}

/*
 * The slot of a task that runs on this CPU or is just being switched out, NULL for everybody who is not registered.
 * ops.running notes its number, so that the callbacks of a switch do not each look it up. A note may be out of date (the task has
 * gone, or another class has the CPU): whose slot it is decides.
 */
static __always_inline struct umcg_slot *slot_of_current(const struct umcg_cpu_ctx *cctx, const struct task_struct *p)
{
	return cctx ? slot_if_of(cctx->current, p) : NULL;
}

/* Registered tasks of all domains; atomics. */
u32 nr_registered;

/* Slot number of a task that registered with this @pid, else 0. */
static __always_inline u32 slot_of_pid(s32 pid, const struct task_struct *p)
{
	u32 *known, nr;

	if (!UMCG_LOAD(&nr_registered))
		return 0;
	known = bpf_map_lookup_elem(&pids, &pid);
	nr = known ? UMCG_LOAD(known) : 0; /* once: the element may be another's in a moment */
	return slot_if_of(nr, p) ? nr : 0;
}

/* Slot number of a task, 0 for everybody who is not registered. */
static __always_inline u32 slot_of(const struct task_struct *p)
{
	return slot_of_pid(p->pid, p);
}

/* How often a look-up is repeated that the lock then shows to be outdated; each takes a race of its own. */
#define UMCG_LOOK_UPS 2

/* A registered task as everything below handles it: our side, the shared side, and its number. */
struct umcg_ref {
	struct umcg_slot *slot;
	struct umcg_cell *cell;
	u32 nr;
};

/* The shared side of a domain, for cell_in(); NULL if there is no such domain. */
static __always_inline void *cells_of(u32 domain)
{
	return bpf_map_lookup_elem(&domains, &domain);
}

static __always_inline struct umcg_cell *cell_in(void *cells, u32 cell)
{
	return cells ? bpf_map_lookup_elem(cells, &cell) : NULL;
}

static __always_inline struct umcg_cell *cell_at(u32 domain, u32 cell)
{
	return cell_in(cells_of(domain), cell);
}

static __always_inline bool ref_of(struct umcg_ref *ref, struct umcg_slot *slot, u32 nr)
{
	ref->nr = nr;
	ref->slot = slot;
	ref->cell = cell_at(slot->domain, slot->cell);
	return ref->cell != NULL;
}

static __always_inline bool ref_get(struct umcg_ref *ref, u32 nr)
{
	struct umcg_slot *slot = slot_at(nr);

	ref->slot = NULL;
	return slot && ref_of(ref, slot, nr);
}

/*
 * A task of the domain that has these @cells, or nobody: slots[0] reads like a free slot, and names cell 0, which nobody then
 * looks at. There is always something to point at, so what follows need not be verified once with and once without a task that
 * may be missing. False only in the verifier's mind.
 */
static __always_inline bool ref_get_any(struct umcg_ref *ref, u32 nr, void *cells)
{
	ref->nr = nr;
	ref->slot = bpf_map_lookup_elem(&slots, &nr);
	ref->cell = ref->slot ? cell_in(cells, ref->slot->cell) : NULL;
	return ref->cell != NULL;
}

static __always_inline u32 *tid_hint(u32 domain, u32 tid)
{
	u32 index = (tid ^ domain * 41) % UMCG_TID_HINTS; /* tids of a process follow each other, those of others are near */

	return bpf_map_lookup_elem(&tid_hints, &index);
}

/*
 * The slot of a tid in a domain, or 0. Global, like a few more below: such a function is verified once, and to its
 * callers the result is any number; as a constant in one branch, it would split all that follows in two.
 */
__noinline u32 slot_of_tid(u32 domain, u32 tid)
{
	struct umcg_tid_key key = { .domain = domain, .tid = tid };
	u32 *nr = tid_hint(domain, tid);
	struct umcg_slot *slot;

	if (!tid || !nr)
		return 0;
	slot = slot_at(*nr);
	if (slot && slot->tid == tid && slot->domain == domain && slot->state != UMCG_FREE)
		return *nr;
	nr = bpf_map_lookup_elem(&tids, &key);
	return nr ? *nr : 0;
}

/* Looks a tid up in a domain. Under the lock, ref_is() tells whether it is still that task. */
static __always_inline bool ref_find(struct umcg_ref *ref, u32 domain, u32 tid)
{
	u32 nr = slot_of_tid(domain, tid);

	return nr && ref_get(ref, nr);
}

static __always_inline bool ref_is(const struct umcg_ref *ref, u32 domain, u32 tid)
{
	return ref->slot->state != UMCG_FREE && ref->slot->domain == domain && ref->slot->tid == tid;
}

/* As in the seed: a server names itself as its server, and nothing else tells it from a worker. */
static __always_inline bool ref_is_server(const struct umcg_ref *ref)
{
	return UMCG_LOAD(&ref->cell->task.umcg_server_tid) == ref->slot->tid;
}

/* No slot at or above was ever given to a domain. Written by the loader's program. */
u32 slot_limit;

/* The scheduler ends, or has: what is shared is the library's alone, which goes on without us. */
bool epoch_over;

/* First illegal edge ever asked for, (from << 8 | to) + 1. */
u32 illegal_edge;

/* The only writer of slot->state. Under the lock, where scx_bpf_error() may not be called: report_bugs() does. */
static __always_inline void set_state(struct umcg_slot *slot, u32 to)
{
	if (!state_may_become(slot->state, to) && !illegal_edge)
		illegal_edge = (slot->state << 8 | to) + 1;
	slot->state = to;
}

static __always_inline void report_bugs(void)
{
	u32 edge = UMCG_LOAD(&illegal_edge);

	if (edge)
		scx_bpf_error("illegal task state change %u to %u", (edge - 1) >> 8, (edge - 1) & 0xff);
}

#endif /* UMCG_MAPS_BPF_H */

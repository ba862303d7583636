/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Where everything lives, and how to get from one to the other.
 *
 *	task_struct --its note--> slot number --slots[]--> struct umcg_slot (ours alone)
 *	pid --pids--------------^                                   | domain, cell
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
	u64 charged_ns;	 /* sum_exec_runtime up to which its CPU time is paid for */
	u64 vtime;	 /* virtual time (see policy.bpf.h) of this server and of the workers that it runs; atomics */
	u32 payer;	 /* slot of the server that ran this worker last, else 0 */
	u64 boundary;	 /* it is about to return to user code, and to stop there, if it has been switched so often: see is_at_boundary() */
	u32 unnoted;	 /* the task has no note of this slot yet; exchange */
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

/* Hand-over between the callbacks of one schedule() on one CPU, which holds the run queue's lock; and what the CPU counts. */
struct umcg_cpu_ctx {
	struct umcg_stats stats; /* first: the loader reads it */
	u32 next;	 /* slot that ops.dispatch is to run next */
	bool stops_here; /* worth a look: the task that runs may be to stop where it is about to return to user code */
	s32 cut;	 /* pid of a task whose slice was cut and that has not paid for it yet, else 0 */
	u64 cut_ns;	 /* its sum_exec_runtime at the beginning of that slice */
	u64 burst_start_ns; /* scx_bpf_now() at the first look at the burst that goes on, 0 before that */
	u64 burst_jiffies;  /* when that was last compared with the clock */
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

#define STAT_ADD(field, n)                                   \
	do {                                                 \
		struct umcg_cpu_ctx *__cctx = this_cpu_ctx(); \
		if (__cctx)                                  \
			__cctx->stats.field += (n);          \
	} while (0)
#define STAT_INC(field) STAT_ADD(field, 1)

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
 * A task's note: the number of its slot, in the low bits of its virtual time, where every callback finds it at the price of a load
 * (a hash map asks twenty times that). Above it the virtual time goes on in coarser units, and orders the queue as it did.
 */
#define NOTE_BITS 21 /* the largest --max-tasks fits */
#define NOTE_MASK ((1ULL << NOTE_BITS) - 1)

static __always_inline u32 note_of(const struct task_struct *p)
{
	return p->scx.dsq_vtime & NOTE_MASK;
}

static __always_inline void set_note(struct task_struct *p, u32 nr)
{
	scx_bpf_task_set_dsq_vtime(p, (p->scx.dsq_vtime & ~NOTE_MASK) | nr);
}

/* Slot of a task, NULL for everybody who is not registered. A note may be out of date: whose slot it is decides. */
static __always_inline struct umcg_slot *slot_of(const struct task_struct *p)
{
	return slot_if_of(note_of(p), p);
}

/* Registered tasks of all domains, and those of them that have no note yet; atomics. */
u32 nr_registered, nr_unnoted;

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

/* The kernel lets nobody but the callbacks of a scheduler write a note: the task gets it where it stops for the first time. */
static __always_inline void is_to_be_noted(struct umcg_slot *slot)
{
	if (!UMCG_XCHG(&slot->unnoted, 1))
		__sync_fetch_and_add(&nr_unnoted, 1);
}

/* It has its note, or needs none any more. */
static __always_inline void is_noted(struct umcg_slot *slot)
{
	if (UMCG_XCHG(&slot->unnoted, 0))
		__sync_fetch_and_add(&nr_unnoted, -1);
}

/* Global for the reason that slot_of_tid() gives. */
__noinline u32 unnoted_slot_of(s32 pid)
{
	u32 *known = bpf_map_lookup_elem(&pids, &pid);

	return known ? UMCG_LOAD(known) : 0;
}

/* slot_of() for the callbacks in which a task stops, or comes to be queued: who has just registered gets the note. */
static __always_inline struct umcg_slot *noted_slot_of(struct task_struct *p)
{
	struct umcg_slot *slot = slot_of(p);
	u32 nr;

	if (slot || !UMCG_LOAD(&nr_unnoted))
		return slot;
	nr = unnoted_slot_of(p->pid);
	slot = slot_if_of(nr, p);
	if (!slot)
		return NULL;
	set_note(p, nr);
	is_noted(slot);
	return slot;
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

static __always_inline bool slot_has_tid(const struct umcg_slot *slot, u32 domain, u32 tid)
{
	return slot && slot->tid == tid && slot->domain == domain && slot->state != UMCG_FREE;
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

	if (!tid || !nr)
		return 0;
	if (slot_has_tid(slot_at(*nr), domain, tid))
		return *nr;
	nr = bpf_map_lookup_elem(&tids, &key);
	return nr ? *nr : 0;
}

/* ref_get_any() of a tid: what the hint says, if it is right, without a call. */
static __always_inline bool ref_find_any(struct umcg_ref *ref, u32 domain, u32 tid, void *cells)
{
	u32 *hint = tid_hint(domain, tid);

	ref->nr = hint ? *hint : 0;
	ref->slot = bpf_map_lookup_elem(&slots, &ref->nr);
	if (!slot_has_tid(ref->slot, domain, tid))
		return ref_get_any(ref, slot_of_tid(domain, tid), cells);
	ref->cell = cell_in(cells, ref->slot->cell);
	return ref->cell != NULL;
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

/* The only writer of slot->state. Under the lock, where scx_bpf_error() may not be called: the sweep does, by report_bugs(). */
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

/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The algorithm rooms of the BPF side, from the files that the kernel runs. Their atomics are calls into
 * src/lib.rs, where the model checker decides what each of them sees and who goes on after it.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <umcg.h>

typedef uint32_t u32;
typedef uint64_t u64;

#undef __always_inline
#define __always_inline inline __attribute__((always_inline, unused))

u32 rooms_load32(const u32 *word);
u64 rooms_load64(const u64 *word);
void rooms_store32(u32 *word, u32 val);
void rooms_store64(u64 *word, u64 val);
u32 rooms_xchg32(u32 *word, u32 val);
u64 rooms_xchg64(u64 *word, u64 val);
u32 rooms_cmpxchg32(u32 *word, u32 old, u32 new);
u64 rooms_cmpxchg64(u64 *word, u64 old, u64 new);

#define BY_WIDTH(op, word) _Generic(*(word), u32: op##32, u64: op##64)
#define UMCG_LOAD(word) BY_WIDTH(rooms_load, word)(word)
#define UMCG_STORE(word, val) BY_WIDTH(rooms_store, word)(word, val)
#define UMCG_XCHG(word, val) BY_WIDTH(rooms_xchg, word)(word, val)
#define UMCG_CMPXCHG(word, old, new) BY_WIDTH(rooms_cmpxchg, word)(word, old, new)

#include <hold.bpf.h>
#include <list.bpf.h>
#include <state.bpf.h>

void rooms_custody_hold(u32 *custody)
{
	custody_hold(custody);
}

void rooms_custody_unhold(u32 *custody)
{
	custody_unhold(custody);
}

bool rooms_custody_park(u32 *custody)
{
	return custody_park(custody);
}

bool rooms_custody_release(u32 *custody)
{
	return custody_release(custody);
}

bool rooms_custody_fetch(u32 *custody)
{
	return custody_fetch(custody);
}

bool rooms_custody_is_held(const u32 *custody)
{
	return custody_is_held(custody);
}

bool rooms_list_push(u64 *head, u64 *link, u64 addr)
{
	return list_push(head, link, addr);
}

bool rooms_status_move(u32 *status, u32 from, u32 to)
{
	return status_move(status, from, to);
}

void rooms_status_show(u32 *status, u32 to)
{
	status_show(status, to);
}

bool rooms_state_may_become(u32 from, u32 to)
{
	return state_may_become(from, to);
}

struct edge {
	const char *from;
	const char *to;
};

#define EDGE_ROW(from, to, why) { #from, #to },
static const struct edge edges[] = { UMCG_EDGES(EDGE_ROW) };

/* Row @i of the table of edges, NULL after the last one. */
const struct edge *rooms_edge(size_t i)
{
	return i < sizeof(edges) / sizeof(edges[0]) ? &edges[i] : NULL;
}

u32 rooms_nr_states(void)
{
	return UMCG_NR_STATES;
}

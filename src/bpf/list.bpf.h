/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The two lists of a server, in memory that the program can write.
 *
 * They are stacks: we push by compare-and-exchange, the server takes all by exchange. We never pop and
 * never follow a link, so there is no ABA and nothing to believe. All pushes of a domain happen under its
 * lock; the only competitor is the program, whose honest xchg can make one attempt fail, not the next.
 */
#ifndef UMCG_LIST_BPF_H
#define UMCG_LIST_BPF_H

#include "atomic.bpf.h"

/*
 * An honest program makes one attempt fail: its exchange empties the list, and another one of an empty list changes nothing.
 * Only one that hammers its own list head gets this far, and then loses its own entry.
 */
#define UMCG_PUSH_ATTEMPTS 4

/*
 * Pushes the task at @addr, an address in the program, whose link word is @link.
 * The exchange pairs with the server's xchg: who sees the entry sees its link, status and time.
 */
static __always_inline bool list_push(u64 *head, u64 *link, u64 addr)
{
	u64 first;
	int i;

	for (i = 0; i < UMCG_PUSH_ATTEMPTS; i++) {
		first = UMCG_LOAD(head);
		UMCG_STORE(link, first);
		if (UMCG_CMPXCHG(head, first, addr) == first)
			return true;
	}
	return false;
}

#endif /* UMCG_LIST_BPF_H */

/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The only atomics that shared state is touched with.
 *
 * Rooms that hold an algorithm (hold, list, status) use nothing else, so that a native build can give them
 * other definitions and a model checker can run every interleaving of the very lines that the kernel runs.
 * UMCG_CMPXCHG and UMCG_XCHG are full barriers, a failed UMCG_CMPXCHG too: so it is on x86-64, and park() needs it.
 */
#ifndef UMCG_ATOMIC_BPF_H
#define UMCG_ATOMIC_BPF_H

#ifndef UMCG_CMPXCHG
#define UMCG_CMPXCHG(ptr, old, new) __sync_val_compare_and_swap(ptr, old, new)
#define UMCG_XCHG(ptr, val) __sync_lock_test_and_set(ptr, val)
#define UMCG_LOAD(ptr) (*(volatile typeof(*(ptr)) *)(ptr))
#define UMCG_STORE(ptr, val) (*(volatile typeof(*(ptr)) *)(ptr) = (val))
#endif

#endif /* UMCG_ATOMIC_BPF_H */

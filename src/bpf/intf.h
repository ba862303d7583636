/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What the library, the loader and the BPF side agree on below the public API.
 *
 * A domain is one mmapable array. Its cell 0 is the header, cells 1 to nr_slots are tasks:
 *
 *	cell 0            cell 1                      cell 2
 *	+----------------+-------------+-------------+-------------+--
 *	| umcg_header    | umcg_task   | umcg_call   | umcg_task   | ...
 *	+----------------+-------------+-------------+-------------+--
 *	0               128           192           256
 *
 * All of it is the client's to scribble on, so the kernel side believes nothing that it reads here: it
 * reads once, bounds, and checks against its own struct slot.
 *
 * How a process gets there: it connects to the loader's SOCK_SEQPACKET socket and sends umcg_hello; the
 * loader answers umcg_welcome, with two descriptors (SCM_RIGHTS) if the error is 0: the domain's map and
 * the control program. From then on no daemon is on any path; the connection stays open as the sign that
 * the process still uses the domain.
 */
#ifndef UMCG_INTF_H
#define UMCG_INTF_H

#include "../../include/umcg.h"

#define UMCG_MAGIC 0x47434d55U /* "UMCG" */

/*
 * In umcg_call.flags: the kernel side has not seen this umcg_wait() yet. The library sets it, the kernel side clears
 * it when it reads the flags. If the scheduler goes away, the library knows by it whether the wait's first step (to
 * switch, to tell a server) is still to be done, and is not done twice.
 */
#define UMCG_CALL_NEW 0x80000000U
/*
 * In umcg_call.flags: a further sched_yield(2) of a umcg_wait() that the kernel side has seen. Without one of the two
 * flags it is a signal handler's own, which interrupted the wait.
 */
#define UMCG_CALL_AGAIN 0x40000000U

/* The library's to the kernel side and back, for the umcg_wait() in progress. */
struct umcg_call {
	uint64_t timeout_ns; /* written by the library */
	uint32_t flags;	     /* UMCG_WAIT_* and UMCG_CALL_*: written by the library; 0 once the kernel side has read it */
	int32_t result;	     /* written by the kernel side: 0 or -errno; the library zeroes it first */
	uint64_t reserved[6];
};

struct umcg_cell {
	struct umcg_task task;
	struct umcg_call call;
};

/* Cell 0 of a domain. Written by the loader before the client sees it, but for epoch. */
struct umcg_header {
	uint32_t magic;
	uint32_t abi_version;
	uint32_t nr_slots;
	uint32_t flags; /* UMCG_DOMAIN_* */
	/* 0 while the BPF scheduler serves this domain; written once, when it stops. */
	uint32_t epoch;
	uint32_t reserved[27];
};

/* Tasks must be SCHED_EXT to be served: the loader runs in partial mode. */
#define UMCG_DOMAIN_PARTIAL 1U

/* The client's first and only message. */
struct umcg_hello {
	uint32_t magic;
	uint32_t abi_version;
	uint32_t max_tasks;
	uint32_t reserved;
};

/* The loader's answer. */
struct umcg_welcome {
	int32_t error; /* 0 or -errno */
	uint32_t abi_version;
	uint32_t domain;
	uint32_t nr_slots;
	uint64_t nonce; /* proves to the control program that this process was given the domain */
};

/* Operations of the control program, BPF_PROG_RUN of `umcg_ctl` in the calling thread. */
enum umcg_ctl_op {
	UMCG_CTL_ATTACH = 1,	 /* domain, nonce: binds the domain to the calling process */
	UMCG_CTL_REGISTER = 2,	 /* domain, slot, addr */
	UMCG_CTL_UNREGISTER = 3, /* none */
	UMCG_CTL_KICK = 4,	 /* domain, tid */
	UMCG_CTL_RSEQ = 5,	 /* reports the calling thread's rseq area in addr, rseq_len, rseq_sig */
};

/* Argument and answer: the kernel copies the struct back to where it came from. */
struct umcg_ctl_args {
	uint32_t op;
	int32_t result; /* 0 or -errno */
	uint32_t domain;
	uint32_t slot;
	uint32_t tid;
	uint32_t flags;
	uint64_t addr; /* of the struct umcg_task in the calling process; or of its rseq area */
	uint64_t nonce;
	uint32_t rseq_len;
	uint32_t rseq_sig;
};

/* Operations of the loader's program, BPF_PROG_RUN of `umcg_admin`. */
enum umcg_admin_op {
	UMCG_ADMIN_OPEN = 1,  /* domain, first_slot, nr_slots, nonce: makes the domain ready for ATTACH */
	UMCG_ADMIN_CLOSE = 2, /* domain: -EBUSY while it has tasks, or its client the memory */
};

struct umcg_admin_args {
	uint32_t op;
	int32_t result; /* 0 or -errno */
	uint32_t domain;
	uint32_t first_slot; /* of the kernel side's slots, 1 or more: the task in cell N has first_slot + N - 1 */
	uint32_t nr_slots;
	uint32_t reserved;
	uint64_t nonce; /* not 0 */
};

/* Counters since load; one per CPU, the loader adds them up. */
struct umcg_stats {
	uint64_t registrations;
	uint64_t waits;		  /* umcg_wait() calls that reached the scheduler */
	uint64_t switches;	  /* of those, direct switches to a named task */
	uint64_t blocks;	  /* RUNNING to BLOCKED */
	uint64_t captures;	  /* BLOCKED to RUNNABLE */
	uint64_t preemptions;	  /* RUNNING to RUNNABLE by the kernel side */
	uint64_t kicks;		  /* umcg_kick() calls */
	uint64_t blocked_ns;	  /* from each block to its capture */
	uint64_t runnable_ns;	  /* from each capture until the worker was run */
	uint64_t refreshes;	  /* held tasks let go for a moment, for the sched_ext watchdog */
	uint64_t signal_releases; /* held tasks let go for a signal, job control, ptrace or the freezer */
	uint64_t rescues;	  /* released tasks that no CPU had fetched in time */
	uint64_t sweeps;	  /* looks at all held tasks */
};

#endif /* UMCG_INTF_H */

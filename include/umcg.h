/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/**
 * @file umcg.h
 * UMCG, user-managed concurrency groups, on a stock Linux kernel: the C API and the
 * layout of the memory that a program shares with the kernel side. docs/abi.md is the
 * contract in prose; umcg(7) is the tutorial.
 *
 * Many *worker* threads are multiplexed over a few *server* threads. A server's loop, in short:
 *
 *	for (;;) {
 *		atomic_store(&self->umcg_status, UMCG_STATE_RUNNABLE);	// first: see umcg_wait()
 *		for (p = xchg(&self->umcg_blocked_ptr, 0); p; p = n) {	// blocked before runnable
 *			n = p->umcg_blocked_ptr;
 *			policy_dequeue(p);
 *		}
 *		for (p = xchg(&self->umcg_runnable_ptr, 0); p; p = n) {
 *			n = p->umcg_runnable_ptr;
 *			policy_enqueue(p);
 *		}
 *		p = policy_pick();
 *		self->umcg_next_tid = p ? p->umcg_tid : 0;
 *		umcg_wait(0, 0);	// runs p; returns when there is something to decide
 *	}
 *
 * Terms, used the same way in all of the code: *task* is a registered thread, *server* a task whose
 * umcg_server_tid is its own tid, *worker* any other task, *domain* one process's tasks and their memory.
 *
 * This header is the truth of the layout. src/shared_abi.rs mirrors it, and tests/layout.rs compares
 * the mirror with this file and with the type information of the compiled BPF object.
 */
#ifndef UMCG_H
#define UMCG_H

#ifndef __VMLINUX_H__ /* the BPF side brings the kernel's own types */
#include <stdint.h>
#include <sys/types.h>
#endif

#ifdef __cplusplus
extern "C" {
#endif

/** Version of everything in this file that programs and the kernel side must agree on. */
#define UMCG_ABI_VERSION 1

/*
 * umcg_status
 *
 *	31             16 15            8 7              0
 *	+----------------+---------------+----------------+
 *	| the program's  |     flags     |     state      |
 *	+----------------+---------------+----------------+
 *
 * Program and kernel side both change it by compare-and-exchange on the whole word, so that neither
 * loses the other's bits. The kernel side changes the state and the two flags named below.
 */
#define UMCG_STATE_MASK 0xffU

#define UMCG_STATE_RUNNING 0U  /**< may run user code */
#define UMCG_STATE_RUNNABLE 1U /**< stopped at the boundary to user code, or about to wait */
#define UMCG_STATE_BLOCKED 2U  /**< a worker that sleeps, or finishes, inside the kernel */
#define UMCG_STATE_NONE 0xffU  /**< not registered */

/** Set by the program on a RUNNING worker: preempt it. Cleared when it leaves RUNNING. */
#define UMCG_TF_PREEMPT 0x100U
/** The library's own: the thread is inside umcg_wait(). */
#define UMCG_TF_WAIT 0x200U

/**
 * What a task shares with the kernel side; 64 bytes, 64-byte aligned, little-endian.
 *
 * All words are naturally aligned and accessed whole. "kernel side: xchg/cmpxchg" means that a program
 * must use the same on its side; plain loads and stores suffice elsewhere.
 */
struct umcg_task {
	/** State, flags and 16 bits of the program's own. Both sides, cmpxchg. */
	uint32_t umcg_status;
	/** Tid of this task's server; its own tid makes it a server. Written by the program; the kernel
	 *  side reads it at the task's next stop or event. */
	uint32_t umcg_server_tid;
	/** Whom umcg_wait() switches to, 0 for nobody in particular. Written by the program; the kernel
	 *  side stores 0 in the step that makes that task RUNNING. */
	uint32_t umcg_next_tid;
	/** This task's tid in the process's own pid namespace. Written by umcg_register(). */
	uint32_t umcg_tid;
	/** Server: head of the list of workers that blocked. Worker: next in that list. The kernel side
	 *  pushes by cmpxchg, the server takes the whole list by xchg. */
	uint64_t umcg_blocked_ptr;
	/** Server: head of the list of workers that became RUNNABLE. Worker: next in that list. */
	uint64_t umcg_runnable_ptr;
	/** CLOCK_MONOTONIC, ns: last change RUNNING to BLOCKED. Written by the kernel side. */
	uint64_t umcg_blocked_ts;
	/** CLOCK_MONOTONIC, ns: last change to RUNNABLE by the kernel side. */
	uint64_t umcg_runnable_ts;
	/** The program's own; the kernel side never looks at it. */
	uint64_t umcg_user_data;
	/** Zero at registration. */
	uint64_t umcg_reserved;
} __attribute__((aligned(64)));

/** umcg_open(): without a loader, go on with the futex back end instead of failing. */
#define UMCG_OPEN_FALLBACK 1U
/** umcg_wait(): a worker is pushed on its server's runnable list as it waits. */
#define UMCG_WAIT_ENQUEUE 1U

/*
 * Calls. Each returns 0 or a negative errno. None prints. All are safe from any thread; unknown flags
 * are -EINVAL everywhere.
 */

/**
 * Opens this process's domain at the loader that listens on @p socket; once per process.
 *
 * @param socket path; NULL means $UMCG_SOCKET, else /run/scx_umcg/umcg.sock
 * @param max_tasks tasks that the domain can hold at once
 * @param flags 0 or UMCG_OPEN_FALLBACK
 * @return -ENOENT, -ECONNREFUSED: no loader; -EACCES: this user may not; -ENOSPC: the loader's limits;
 *	-EPROTO: another ABI version; -EALREADY: open; -EINVAL: flags, or max_tasks is 0
 */
int umcg_open(const char *socket, unsigned int max_tasks, unsigned int flags);

/**
 * Closes the domain; its memory is gone afterwards.
 * @return -EBUSY: tasks are registered; -ENOENT: not open
 */
int umcg_close(void);

/** @return a zeroed struct with status NONE inside the domain; NULL: full, or not open */
struct umcg_task *umcg_task_alloc(void);

/** Gives back what umcg_task_alloc() returned. The task must not be registered. */
void umcg_task_free(struct umcg_task *task);

/**
 * Registers the calling thread with @p self: a server comes with state RUNNING, a worker with RUNNABLE.
 * A worker is pushed on its server's runnable list, and the call returns once it is run.
 *
 * @return -EFAULT: not a struct of this domain; -EINVAL: misaligned, state, reserved not zero, flags;
 *	-EEXIST: this thread is registered; -ESRCH: no such server
 */
int umcg_register(struct umcg_task *self, unsigned int flags);

/**
 * Ends the registration; the status becomes NONE. A worker's host becomes RUNNING.
 * @return -EINVAL: not this thread's; -EBUSY: serving, or in a signal handler that interrupted one of these calls
 */
int umcg_unregister(struct umcg_task *self);

/**
 * With status RUNNING returns 0 at once; otherwise gives up the CPU to umcg_next_tid, or with 0 a worker
 * to its host, and a server until an event. Once it returns, on errors too, the status is RUNNING. A
 * umcg_next_tid that is not 0 afterwards was not run.
 *
 * @param timeout_ns relative, 0 for none; servers only
 * @param flags 0 or UMCG_WAIT_ENQUEUE
 * @return -ESRCH: no such task, or a worker's server is gone; -EBUSY: not RUNNABLE, or serving, or the
 *	caller serves another; -EINVAL: not registered, status BLOCKED or NONE, not the caller's worker, flags;
 *	-ETIMEDOUT; -ERANGE: a worker with a timeout; -EDEADLK: in a signal handler that interrupted umcg_wait()
 */
int umcg_wait(uint64_t timeout_ns, unsigned int flags);

/**
 * A waiting server becomes RUNNING; a RUNNING worker with UMCG_TF_PREEMPT is preempted; a waiting worker
 * is pushed on its server's runnable list; otherwise nothing happens.
 * @return -ESRCH: no such task; -EINVAL: flags
 */
int umcg_kick(pid_t tid, unsigned int flags);

/** @return the calling thread's struct; NULL when it is not registered */
struct umcg_task *umcg_self(void);

/** @return "sched_ext", "futex" or "none" */
const char *umcg_backend(void);

#ifdef __cplusplus
}
#endif

#endif /* UMCG_H */

/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The C API as a C and a C++ program sees it: a server, written as include/umcg.h shows it, runs two workers on the futex
 * back end; then the errors of the calls that need nobody else. Exits with the line of the first check that fails.
 */
#include <umcg.h>

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <sys/syscall.h>

#define CHECK(condition)                                                          \
	do {                                                                      \
		if (!(condition)) {                                               \
			fprintf(stderr, "line %d: %s\n", __LINE__, #condition);    \
			exit(1);                                                  \
		}                                                                 \
	} while (0)

#define NR_WORKERS 2
#define ROUNDS 100

#ifdef __cplusplus
static_assert(sizeof(struct umcg_task) == 64, "size");
static_assert(alignof(struct umcg_task) == 64, "alignment");
#else
_Static_assert(sizeof(struct umcg_task) == 64, "size");
_Static_assert(_Alignof(struct umcg_task) == 64, "alignment");
#endif

static uint32_t server_tid;
static int inside, rounds, left = NR_WORKERS;

static uint32_t my_tid(void)
{
	return (uint32_t)syscall(SYS_gettid);
}

static struct umcg_task *prepared(uint32_t server, uint32_t state)
{
	struct umcg_task *task = umcg_task_alloc();

	CHECK((uintptr_t)task % 64 == 0);
	CHECK(task && (task->umcg_status & UMCG_STATE_MASK) == UMCG_STATE_NONE);
	task->umcg_server_tid = server;
	task->umcg_status = state;
	return task;
}

static void *work(void *arg)
{
	struct umcg_task *self = prepared(server_tid, UMCG_STATE_RUNNABLE);
	int i;

	(void)arg;
	CHECK(umcg_register(self, 0) == 0);
	CHECK(umcg_self() == self && self->umcg_tid == my_tid());
	for (i = 0; i < ROUNDS; i++) {
		CHECK(__atomic_add_fetch(&inside, 1, __ATOMIC_SEQ_CST) == 1);
		rounds++;
		__atomic_sub_fetch(&inside, 1, __ATOMIC_SEQ_CST);
		__atomic_store_n(&self->umcg_status, UMCG_STATE_RUNNABLE, __ATOMIC_SEQ_CST);
		CHECK(umcg_wait(0, UMCG_WAIT_ENQUEUE) == 0);
	}
	CHECK(umcg_unregister(self) == 0);
	umcg_task_free(self);
	__atomic_sub_fetch(&left, 1, __ATOMIC_SEQ_CST);
	CHECK(umcg_kick((pid_t)server_tid, 0) == 0);
	return NULL;
}

/* The loop of the header; the queue holds all workers, so it cannot overflow. */
static void serve(struct umcg_task *self)
{
	struct umcg_task *queue[NR_WORKERS], *p, *n;
	unsigned int head = 0, tail = 0;

	for (;;) {
		__atomic_store_n(&self->umcg_status, UMCG_STATE_RUNNABLE, __ATOMIC_SEQ_CST);
		if (!__atomic_load_n(&left, __ATOMIC_SEQ_CST))
			return;
		CHECK(!__atomic_exchange_n(&self->umcg_blocked_ptr, 0, __ATOMIC_SEQ_CST));
		p = (struct umcg_task *)__atomic_exchange_n(&self->umcg_runnable_ptr, 0, __ATOMIC_SEQ_CST);
		for (; p; p = n) {
			n = (struct umcg_task *)p->umcg_runnable_ptr;
			queue[tail++ % NR_WORKERS] = p;
		}
		self->umcg_next_tid = head != tail ? queue[head % NR_WORKERS]->umcg_tid : 0;
		p = self->umcg_next_tid ? queue[head % NR_WORKERS] : NULL;
		CHECK(umcg_wait(0, 0) == 0);
		CHECK((self->umcg_status & UMCG_STATE_MASK) == UMCG_STATE_RUNNING);
		if (p && !self->umcg_next_tid)
			head++; /* it was run */
	}
}

static void check_errors(void)
{
	CHECK(umcg_self() == NULL);
	CHECK(umcg_task_alloc() == NULL);
	CHECK(umcg_wait(0, 0) == -EINVAL);
	CHECK(umcg_kick(1, 0) == -ESRCH);
	CHECK(umcg_close() == -ENOENT);
	CHECK(umcg_open("/nonexistent/umcg.sock", 4, 0) == -ENOENT);
	CHECK(umcg_register(NULL, 0) == -EFAULT);
	CHECK(umcg_unregister(NULL) == -EINVAL);
	umcg_task_free(NULL);
	CHECK(strcmp(umcg_backend(), "none") == 0);
}

int main(void)
{
	pthread_t threads[NR_WORKERS];
	struct umcg_task *self;
	int i;

	check_errors();
	CHECK(umcg_open("/nonexistent/umcg.sock", NR_WORKERS + 1, UMCG_OPEN_FALLBACK) == 0);
	CHECK(strcmp(umcg_backend(), "futex") == 0);
	server_tid = my_tid();
	self = prepared(server_tid, UMCG_STATE_RUNNING);
	CHECK(umcg_register(self, 0) == 0);
	for (i = 0; i < NR_WORKERS; i++)
		CHECK(pthread_create(&threads[i], NULL, work, NULL) == 0);
	serve(self);
	for (i = 0; i < NR_WORKERS; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
	CHECK(rounds == NR_WORKERS * ROUNDS);
	CHECK(umcg_close() == -EBUSY);
	CHECK(umcg_unregister(self) == 0);
	CHECK(umcg_close() == 0);
	check_errors();
	return 0;
}

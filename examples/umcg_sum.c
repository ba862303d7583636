/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * sha256sum for directory trees, many files at a time: N worker threads over M servers. The same as umcg_sum.rs, on the
 * C API.
 *
 * Workers read with plain blocking read(2). When one sleeps in there, its server runs the next; when it has what it slept
 * for, it is stopped at the boundary to user code until it is its turn again:
 *
 *	server 0				server 1
 *	ready: worker 4, worker 0		ready: worker 5
 *	runs:  worker 2				runs:  worker 1
 *	blocked in read(2): worker 6		blocked in read(2): worker 3, worker 7
 *
 * Each server has workers of its own and one policy, first in, first out; a worker lets the next have its turn after each
 * file. --stats tells what happened, and whether the promise was kept that no two workers of a server are in
 * user code at once. Without a loader the program works too, but then nobody sees that a worker blocks.
 *
 * Build it with make, and try it: scx_umcg run -- ./umcg_sum --stats ../src
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <fts.h>
#include <getopt.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysinfo.h>
#include <time.h>
#include <unistd.h>

#include <umcg.h>

#include "sha256.h"

#define BUFFER_LEN (64 << 10) /* what a worker reads at a time, bytes */

/* How often something came to an end, and after how long. */
struct spans {
	uint64_t count, sum_ns, longest_ns;
};

/* What a server saw. */
struct stats {
	uint64_t blocks;
	struct spans captures; /* and the time from blocking until the worker could run again */
	struct spans waits;    /* workers that were run, and the time they had been in the queue */
};

struct worker {
	pthread_t thread;
	struct host *host;
	struct umcg_task *task; /* its umcg_user_data leads back here */
	/* The server's: */
	struct worker *next;
	uint64_t ready_since_ns;
	bool ready, blocked;	/* ready: in the queue */
};

/* A server and its workers. */
struct host {
	pthread_t thread;
	pid_t tid;
	struct worker *workers;
	unsigned int nr_workers;
	struct worker *first, *last; /* the queue of those that can run */
	struct stats stats;
	atomic_uint left;			/* workers whose threads are tasks, or will be */
	atomic_uint computing, most_computing;	/* in compute(): now, and at most ever */
};

struct file {
	char *path;
	int error; /* errno, or 0 */
	uint64_t nr_bytes;
	uint8_t digest[32];
};

static struct file *files;
static size_t nr_files;
static atomic_size_t next_file; /* workers take one after the other */

/* A thread that fails would leave the others waiting for it, so it ends the program. */
static void or_die(const char *what, int error)
{
	if (!error)
		return;
	fprintf(stderr, "umcg_sum: %s: %s\n", what, strerror(error));
	exit(1);
}

static void *allocated(void *memory)
{
	or_die("cannot allocate", memory ? 0 : ENOMEM);
	return memory;
}

static void complain(const char *path, int error)
{
	fprintf(stderr, "umcg_sum: %s: %s\n", path, strerror(error));
}

/* The clock of the tasks' times. */
static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ULL + now.tv_nsec;
}

static void spans_join(struct spans *all, const struct spans *some)
{
	all->count += some->count;
	all->sum_ns += some->sum_ns;
	if (some->longest_ns > all->longest_ns)
		all->longest_ns = some->longest_ns;
}

static void spans_add(struct spans *all, uint64_t from_ns, uint64_t to_ns)
{
	uint64_t ns = to_ns > from_ns ? to_ns - from_ns : 0;

	spans_join(all, &(struct spans){ 1, ns, ns });
}

/*
 * Workers
 */

/*
 * Never enters the kernel: no system call, and no memory that touch() or read(2) has not brought in. A worker cannot block
 * in here, so two at once would both be in user code.
 */
static __attribute__((noinline)) void compute(struct host *host, struct sha256 *sha, const uint8_t *data, size_t len)
{
	unsigned int computing = atomic_fetch_add(&host->computing, 1) + 1;
	unsigned int most = atomic_load(&host->most_computing);

	while (computing > most && !atomic_compare_exchange_weak(&host->most_computing, &most, computing))
		;
	sha256_update(sha, data, len);
	atomic_fetch_sub(&host->computing, 1);
}

/* Brings into memory what compute() will need: its code, and the stack below us. */
static void touch(void)
{
	struct host nobody = { 0 };
	struct sha256 sha;
	uint8_t data[4001] = { 0 };

	sha256_init(&sha);
	compute(&nobody, &sha, data, sizeof(data));
}

static int sum_fd(int fd, struct file *file, uint8_t *buffer, struct host *host)
{
	struct sha256 sha;
	ssize_t n;

	sha256_init(&sha);
	while ((n = read(fd, buffer, BUFFER_LEN))) {
		if (n > 0) {
			compute(host, &sha, buffer, n);
			file->nr_bytes += n;
		} else if (errno != EINTR) {
			return errno;
		}
	}
	sha256_final(&sha, file->digest);
	return 0;
}

static void sum_file(struct file *file, uint8_t *buffer, struct host *host)
{
	int fd = open(file->path, O_RDONLY | O_CLOEXEC);

	if (fd < 0) {
		file->error = errno;
		return;
	}
	file->error = sum_fd(fd, file, buffer, host);
	close(fd);
}

/* Lets the server choose whom to run next; this worker goes to the end of the queue. */
static void yield_turn(struct umcg_task *self)
{
	__atomic_store_n(&self->umcg_status, UMCG_STATE_RUNNABLE, __ATOMIC_SEQ_CST);
	self->umcg_next_tid = 0;
	or_die("umcg_wait", -umcg_wait(0, UMCG_WAIT_ENQUEUE));
}

static void *work(void *argument)
{
	struct worker *worker = argument;
	struct host *host = worker->host;
	struct umcg_task *self = allocated(umcg_task_alloc());
	uint8_t *buffer = allocated(malloc(BUFFER_LEN));
	size_t i;

	touch();
	worker->task = self;
	self->umcg_user_data = (uintptr_t)worker;
	self->umcg_server_tid = host->tid;
	self->umcg_status = UMCG_STATE_RUNNABLE;
	or_die("umcg_register", -umcg_register(self, 0)); /* returns once the server runs it */
	while ((i = atomic_fetch_add(&next_file, 1)) < nr_files) {
		sum_file(&files[i], buffer, host);
		yield_turn(self);
	}
	or_die("umcg_unregister", -umcg_unregister(self));
	umcg_task_free(self);
	free(buffer);
	/* The server may wait for the last one to end. If it saw that already, it may be gone. */
	atomic_fetch_sub(&host->left, 1);
	umcg_kick(host->tid, 0);
	return NULL;
}

/*
 * Servers. From the start of the first worker on they must not allocate: a worker may be stopped with a lock of the
 * allocator's in its hand, and only its server could let it go on.
 */

static struct worker *worker_of(uint64_t task)
{
	return (struct worker *)(uintptr_t)((struct umcg_task *)(uintptr_t)task)->umcg_user_data;
}

static void take_blocked(struct host *host, struct umcg_task *self)
{
	uint64_t task = __atomic_exchange_n(&self->umcg_blocked_ptr, 0, __ATOMIC_SEQ_CST);

	while (task) {
		struct worker *worker = worker_of(task);

		task = worker->task->umcg_blocked_ptr;
		worker->blocked = true;
		host->stats.blocks++;
	}
}

/* A captured worker could run when the kernel said so. Others are new, or gave up their turn just now. */
static uint64_t ready_since_ns(struct host *host, struct worker *worker)
{
	struct umcg_task *task = worker->task;

	if (!worker->blocked)
		return now_ns();
	worker->blocked = false;
	spans_add(&host->stats.captures, task->umcg_blocked_ts, task->umcg_runnable_ts);
	return task->umcg_runnable_ts;
}

/* The list has the last one first, the queue the first one. */
static void take_runnable(struct host *host, struct umcg_task *self)
{
	uint64_t task = __atomic_exchange_n(&self->umcg_runnable_ptr, 0, __ATOMIC_SEQ_CST);
	struct worker *first = NULL, *last = NULL;

	while (task) {
		struct worker *worker = worker_of(task);

		task = worker->task->umcg_runnable_ptr;
		/* When the loader goes away, captured workers run on, and come again while they are in the queue. */
		if (worker->ready)
			continue;
		worker->ready = true;
		worker->ready_since_ns = ready_since_ns(host, worker);
		worker->next = first;
		first = worker;
		if (!last)
			last = worker;
	}
	if (!first)
		return;
	if (host->first)
		host->last->next = first;
	else
		host->first = first;
	host->last = last;
}

/* Runs the first in the queue until there is something to decide. With nobody there, waits for that. */
static void run_next(struct host *host, struct umcg_task *self)
{
	struct worker *next = host->first;
	uint64_t start_ns = now_ns();
	int error;

	self->umcg_next_tid = next ? next->task->umcg_tid : 0;
	error = -umcg_wait(0, 0);
	/* The loader went away and let this worker go: it runs by itself, or has ended. */
	if (next && (error == EBUSY || error == ESRCH) && !strcmp(umcg_backend(), "futex")) {
		host->first = next->next;
		next->ready = false;
		return;
	}
	or_die("umcg_wait", error);
	if (next && !self->umcg_next_tid) { /* it was run; else something else happened first */
		host->first = next->next;
		next->ready = false;
		spans_add(&host->stats.waits, next->ready_since_ns, start_ns);
	}
}

static void start_workers(struct host *host)
{
	for (unsigned int i = 0; i < host->nr_workers; i++) {
		struct worker *worker = &host->workers[i];

		worker->host = host;
		or_die("cannot start a thread", pthread_create(&worker->thread, NULL, work, worker));
	}
}

static void *serve(void *argument)
{
	struct host *host = argument;
	struct umcg_task *self = allocated(umcg_task_alloc());

	host->tid = self->umcg_server_tid = gettid();
	self->umcg_status = UMCG_STATE_RUNNING;
	or_die("umcg_register", -umcg_register(self, 0));
	start_workers(host);
	for (;;) {
		/* First: what happens from here on makes umcg_wait() return at once. */
		__atomic_store_n(&self->umcg_status, UMCG_STATE_RUNNABLE, __ATOMIC_SEQ_CST);
		if (!atomic_load(&host->left))
			break;
		take_blocked(host, self); /* before the runnable list: a worker may be on both */
		take_runnable(host, self);
		run_next(host, self);
	}
	or_die("umcg_unregister", -umcg_unregister(self));
	umcg_task_free(self);
	return NULL;
}

static void run(struct host *hosts, unsigned int nr_hosts)
{
	unsigned int i, j;

	for (i = 0; i < nr_hosts; i++)
		or_die("cannot start a thread", pthread_create(&hosts[i].thread, NULL, serve, &hosts[i]));
	for (i = 0; i < nr_hosts; i++) {
		pthread_join(hosts[i].thread, NULL);
		for (j = 0; j < hosts[i].nr_workers; j++)
			pthread_join(hosts[i].workers[j].thread, NULL);
	}
}

/*
 * Files
 */

static void add_file(const char *path)
{
	if (!(nr_files & (nr_files - 1))) /* full at 0, 1, 2, 4, 8 and so on */
		files = allocated(realloc(files, (nr_files ? 2 * nr_files : 1) * sizeof(*files)));
	files[nr_files++] = (struct file){ .path = allocated(strdup(path)) };
}

static int by_path(const void *a, const void *b)
{
	return strcmp(((const struct file *)a)->path, ((const struct file *)b)->path);
}

/* Answers whether it could read all directories. Symbolic links are followed where they are given, and skipped below. */
static bool find_files(char **paths)
{
	FTS *tree = allocated(fts_open(paths, FTS_PHYSICAL | FTS_COMFOLLOW | FTS_NOCHDIR, NULL));
	bool all = true;
	FTSENT *entry;

	while ((entry = fts_read(tree))) {
		switch (entry->fts_info) {
		case FTS_D:
		case FTS_DP:
			break;
		case FTS_F:
			add_file(entry->fts_path);
			break;
		case FTS_DNR:
		case FTS_ERR:
			complain(entry->fts_path, entry->fts_errno);
			all = false;
			break;
		default: /* whatever is wrong with a path that was given, opening it will tell */
			if (entry->fts_level == FTS_ROOTLEVEL)
				add_file(entry->fts_path);
		}
	}
	fts_close(tree);
	qsort(files, nr_files, sizeof(*files), by_path);
	return all;
}

/* As coreutils 9 prints it: a backslash before the line tells that some in the name are escapes. */
static void print_sum(const struct file *file)
{
	if (strpbrk(file->path, "\\\n\r"))
		putchar('\\');
	for (int i = 0; i < 32; i++)
		printf("%02x", file->digest[i]);
	printf("  ");
	for (const char *c = file->path; *c; c++) {
		switch (*c) {
		case '\\': printf("\\\\"); break;
		case '\n': printf("\\n"); break;
		case '\r': printf("\\r"); break;
		default: putchar(*c);
		}
	}
	putchar('\n');
}

/* Answers whether there were no errors. */
static bool print_sums(void)
{
	bool all = true;

	for (size_t i = 0; i < nr_files; i++) {
		if (!files[i].error) {
			print_sum(&files[i]);
		} else {
			complain(files[i].path, files[i].error);
			all = false;
		}
	}
	or_die("cannot write the sums", fflush(stdout) || ferror(stdout) ? errno : 0);
	return all;
}

static void print_spans(const char *what, const struct spans *spans)
{
	double ms = 1e-6;

	fprintf(stderr, "%s%" PRIu64 " times, after %.3f ms on average, %.3f ms at most, %.1f ms in all\n", what,
		spans->count, spans->count ? spans->sum_ns * ms / spans->count : 0, spans->longest_ns * ms,
		spans->sum_ns * ms);
}

static void report(const struct host *hosts, unsigned int nr_hosts, unsigned int nr_workers, const char *back_end)
{
	bool sees_blocking = !strcmp(back_end, "sched_ext");
	struct stats stats = { 0 };
	unsigned int most = 0;
	uint64_t nr_bytes = 0;
	size_t nr_sums = 0;

	for (unsigned int i = 0; i < nr_hosts; i++) {
		stats.blocks += hosts[i].stats.blocks;
		spans_join(&stats.captures, &hosts[i].stats.captures);
		spans_join(&stats.waits, &hosts[i].stats.waits);
		if (hosts[i].most_computing > most)
			most = hosts[i].most_computing;
	}
	for (size_t i = 0; i < nr_files; i++) {
		nr_sums += !files[i].error;
		nr_bytes += files[i].error ? 0 : files[i].nr_bytes;
	}
	fprintf(stderr, "back end   %s%s\n", back_end, sees_blocking ? "" : " (no loader: blocking is not seen)");
	fprintf(stderr, "threads    workers %u, servers %u\n", nr_workers, nr_hosts);
	fprintf(stderr, "files      %zu, %" PRIu64 " bytes\n", nr_sums, nr_bytes);
	fprintf(stderr, "blocked    %" PRIu64 " times\n", stats.blocks);
	print_spans("captured   ", &stats.captures);
	print_spans("run        ", &stats.waits);
	fprintf(stderr, "at once    %u of one server's workers in user code, at most\n", most);
}

/*
 * Options
 */

static void usage(FILE *to)
{
	fprintf(to, "usage: umcg_sum [--workers N] [--servers M] [--stats] PATH...\n\n"
		    "Prints SHA-256 sums as sha256sum(1) does, sorted by path. Of a directory, all regular files\n"
		    "below it; symbolic links are followed where they are given, and skipped in a directory.\n\n"
		    "  --workers N  threads that read and compute (default: 4 for each server)\n"
		    "  --servers M  threads that decide which worker runs, and so workers that run at once\n"
		    "               (default: one for each CPU)\n"
		    "  --stats      print on standard error what the servers saw\n");
}

static unsigned int number(const char *text)
{
	char *end;
	unsigned long n = strtoul(text, &end, 10);

	if (n < 1 || n > 4096 || *end) {
		fprintf(stderr, "umcg_sum: %s is not a number of threads; give one from 1 to 4096\n", text);
		exit(2);
	}
	return n;
}

struct options {
	unsigned int nr_workers, nr_servers;
	bool stats;
};

static struct options parse(int argc, char **argv)
{
	static const struct option known[] = {
		{ "workers", required_argument, NULL, 'w' },
		{ "servers", required_argument, NULL, 's' },
		{ "stats", no_argument, NULL, 'v' },
		{ "help", no_argument, NULL, 'h' },
		{ 0 },
	};
	struct options options = { .nr_servers = get_nprocs() };
	int option;

	while ((option = getopt_long(argc, argv, "h", known, NULL)) != -1) {
		switch (option) {
		case 'w': options.nr_workers = number(optarg); break;
		case 's': options.nr_servers = number(optarg); break;
		case 'v': options.stats = true; break;
		case 'h': usage(stdout); exit(0);
		default: usage(stderr); exit(2);
		}
	}
	if (optind == argc) {
		usage(stderr);
		exit(2);
	}
	if (!options.nr_workers)
		options.nr_workers = 4 * options.nr_servers;
	if (options.nr_servers > options.nr_workers) /* it would have nothing to do */
		options.nr_servers = options.nr_workers;
	return options;
}

static struct host *new_hosts(unsigned int nr_hosts, unsigned int nr_workers)
{
	struct host *hosts = allocated(calloc(nr_hosts, sizeof(*hosts)));

	for (unsigned int i = 0; i < nr_hosts; i++) {
		hosts[i].nr_workers = nr_workers / nr_hosts + (i < nr_workers % nr_hosts);
		hosts[i].left = hosts[i].nr_workers;
		hosts[i].workers = allocated(calloc(hosts[i].nr_workers, sizeof(*hosts[i].workers)));
	}
	return hosts;
}

int main(int argc, char **argv)
{
	struct options options = parse(argc, argv);
	struct host *hosts = new_hosts(options.nr_servers, options.nr_workers);
	bool all = find_files(argv + optind);

	or_die("umcg_open", -umcg_open(NULL, options.nr_servers + options.nr_workers, UMCG_OPEN_FALLBACK));
	run(hosts, options.nr_servers);
	all &= print_sums();
	if (options.stats)
		report(hosts, options.nr_servers, options.nr_workers, umcg_backend());
	or_die("umcg_close", -umcg_close());
	return all ? 0 : 1;
}

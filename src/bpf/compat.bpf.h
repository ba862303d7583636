/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Every difference between kernel versions that this scheduler knows of, asked of the running kernel's BTF,
 * never of its version number. The scx headers' own compat.bpf.h covers sched_ext's interface.
 */
#ifndef UMCG_COMPAT_BPF_H
#define UMCG_COMPAT_BPF_H

#include <scx/common.bpf.h>
#include <scx/compat.bpf.h>

/* Linux 6.18 and older keep rseq in three fields of the task; newer ones in a struct. */
struct task_struct___rseq_fields {
	void *rseq;
	u32 rseq_len;
	u32 rseq_sig;
	unsigned long rseq_event_mask;
} __attribute__((preserve_access_index));

struct rseq_data___new {
	void *usrptr;
	u32 len;
	u32 sig;
} __attribute__((preserve_access_index));

struct task_struct___rseq_data {
	struct rseq_data___new rseq;
} __attribute__((preserve_access_index));

/* Linux 6.18 and older run the rseq update inside the delivery of a signal as well. */
static __always_inline bool signal_delivery_updates_rseq(void)
{
	return bpf_core_field_exists(struct task_struct___rseq_fields, rseq_event_mask);
}

/* Signed words in Linux 6.18, bytes in 7.3, and libbpf cannot turn a load of one into a load of the other. */
struct task_struct___words {
	int on_cpu;
	int on_rq;
} __attribute__((preserve_access_index));

/* Whether a CPU runs it, or is switching it out still. */
static __always_inline bool task_is_on_cpu(const struct task_struct *p)
{
	if (bpf_core_field_size(p->on_cpu) == sizeof(int))
		return ((const struct task_struct___words *)p)->on_cpu;
	return p->on_cpu;
}

/* Whether it sleeps; one that is just being moved to another CPU does not. */
static __always_inline bool task_sleeps_now(const struct task_struct *p)
{
	if (bpf_core_field_size(p->on_rq) == sizeof(int))
		return !((const struct task_struct___words *)p)->on_rq;
	return !p->on_rq;
}

struct umcg_rseq_area {
	u64 addr;
	u32 len;
	u32 sig;
};

static __always_inline void rseq_area_of(struct task_struct *p, struct umcg_rseq_area *area)
{
	if (bpf_core_field_exists(struct task_struct___rseq_fields, rseq_len)) {
		struct task_struct___rseq_fields *t = (void *)p;

		area->addr = (u64)BPF_CORE_READ(t, rseq);
		area->len = BPF_CORE_READ(t, rseq_len);
		area->sig = BPF_CORE_READ(t, rseq_sig);
	} else {
		struct task_struct___rseq_data *t = (void *)p;

		area->addr = (u64)BPF_CORE_READ(t, rseq.usrptr);
		area->len = BPF_CORE_READ(t, rseq.len);
		area->sig = BPF_CORE_READ(t, rseq.sig);
	}
}

#endif /* UMCG_COMPAT_BPF_H */

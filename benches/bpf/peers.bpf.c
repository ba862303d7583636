/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Schedulers to measure ourselves against, one of which is loaded at a time:
 *
 *	floor	hands one CPU from one task to another and back at each sched_yield(2), and knows no other tasks: what
 *		it costs is sched_ext itself
 *	empty	nothing but a name: every decision is the core's own
 *	simple	weighted virtual time on one queue, the policy of scx_simple
 */
#include <scx/common.bpf.h>
#include <scx/compat.bpf.h>

char _license[] SEC("license") = "GPL";

#define SLICE_NS 5000000
#define QUEUE 0
#define WEIGHT_DEFAULT 100

UEI_DEFINE(uei);

/* Written by the bench: 0 the floor's tasks are like all others, 1 they alternate, 2 the last hand-over. */
u32 floor_mode;

struct floor_slot {
	struct task_struct __kptr *task;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2);
	__type(key, u32);
	__type(value, struct floor_slot);
} floor_slots SEC(".maps");

/* Thread ids of the two, and 1 + the index of whom ops.dispatch is to run next; on one CPU. */
u32 floor_pid_0, floor_pid_1, floor_next;

struct floor_join_args {
	u32 index;
};

SEC("syscall")
int floor_join(struct floor_join_args *args)
{
	struct task_struct *task, *old;
	struct floor_slot *slot;
	u32 index = args->index;

	slot = bpf_map_lookup_elem(&floor_slots, &index);
	if (!slot)
		return -EINVAL;
	task = bpf_task_acquire(bpf_get_current_task_btf());
	if (!task)
		return -ESRCH;
	if (index)
		floor_pid_1 = task->pid;
	else
		floor_pid_0 = task->pid;
	old = bpf_kptr_xchg(&slot->task, task);
	if (old)
		bpf_task_release(old);
	return 0;
}

bool BPF_STRUCT_OPS(floor_yield, struct task_struct *from, struct task_struct *to)
{
	if (to)
		return false;
	scx_bpf_task_set_slice(from, 0);
	if (floor_mode)
		floor_next = from->pid == floor_pid_0 ? 2 : 1;
	return false;
}

void BPF_STRUCT_OPS(floor_enqueue, struct task_struct *p, u64 enq_flags)
{
	if (floor_mode == 1 && (p->pid == floor_pid_0 || p->pid == floor_pid_1))
		return; /* held, until the other one yields */
	scx_bpf_dsq_insert(p, SCX_DSQ_GLOBAL, SLICE_NS, enq_flags);
}

void BPF_STRUCT_OPS(floor_dispatch, s32 cpu, struct task_struct *prev)
{
	struct floor_slot *slot;
	struct task_struct *p;
	u32 index = floor_next;

	if (!index)
		return;
	floor_next = 0;
	index--;
	slot = bpf_map_lookup_elem(&floor_slots, &index);
	if (!slot)
		return;
	p = slot->task;
	if (p)
		scx_bpf_dsq_insert(p, SCX_DSQ_LOCAL, SLICE_NS, 0);
}

void BPF_STRUCT_OPS(floor_exit, struct scx_exit_info *ei)
{
	UEI_RECORD(uei, ei);
}

SCX_OPS_DEFINE(floor_ops,
	       .yield = (void *)floor_yield,
	       .enqueue = (void *)floor_enqueue,
	       .dispatch = (void *)floor_dispatch,
	       .exit = (void *)floor_exit,
	       .flags = SCX_OPS_SWITCH_PARTIAL | SCX_OPS_ENQ_LAST,
	       .timeout_ms = 30000,
	       .name = "umcg_floor");

void BPF_STRUCT_OPS(empty_exit, struct scx_exit_info *ei)
{
	UEI_RECORD(uei, ei);
}

SCX_OPS_DEFINE(empty_ops,
	       .exit = (void *)empty_exit,
	       .timeout_ms = 30000,
	       .name = "umcg_empty");

u64 vtime_now;

static __always_inline bool before(u64 a, u64 b)
{
	return (s64)(a - b) < 0;
}

s32 BPF_STRUCT_OPS(simple_select_cpu, struct task_struct *p, s32 prev_cpu, u64 wake_flags)
{
	bool is_idle = false;
	s32 cpu = scx_bpf_select_cpu_dfl(p, prev_cpu, wake_flags, &is_idle);

	if (is_idle)
		scx_bpf_dsq_insert(p, SCX_DSQ_LOCAL, SLICE_NS, 0);
	return cpu;
}

void BPF_STRUCT_OPS(simple_enqueue, struct task_struct *p, u64 enq_flags)
{
	u64 vtime = p->scx.dsq_vtime;

	if (before(vtime, vtime_now - SLICE_NS))
		vtime = vtime_now - SLICE_NS;
	scx_bpf_dsq_insert_vtime(p, QUEUE, SLICE_NS, vtime, enq_flags);
}

void BPF_STRUCT_OPS(simple_dispatch, s32 cpu, struct task_struct *prev)
{
	scx_bpf_dsq_move_to_local(QUEUE, 0);
}

void BPF_STRUCT_OPS(simple_running, struct task_struct *p)
{
	if (before(vtime_now, p->scx.dsq_vtime))
		vtime_now = p->scx.dsq_vtime;
}

void BPF_STRUCT_OPS(simple_stopping, struct task_struct *p, bool runnable)
{
	u64 used_ns = SLICE_NS - p->scx.slice;

	scx_bpf_task_set_dsq_vtime(p, p->scx.dsq_vtime + used_ns * WEIGHT_DEFAULT / p->scx.weight);
}

void BPF_STRUCT_OPS(simple_enable, struct task_struct *p)
{
	scx_bpf_task_set_dsq_vtime(p, vtime_now);
}

s32 BPF_STRUCT_OPS_SLEEPABLE(simple_init)
{
	return scx_bpf_create_dsq(QUEUE, -1);
}

void BPF_STRUCT_OPS(simple_exit, struct scx_exit_info *ei)
{
	UEI_RECORD(uei, ei);
}

SCX_OPS_DEFINE(simple_ops,
	       .select_cpu = (void *)simple_select_cpu,
	       .enqueue = (void *)simple_enqueue,
	       .dispatch = (void *)simple_dispatch,
	       .running = (void *)simple_running,
	       .stopping = (void *)simple_stopping,
	       .enable = (void *)simple_enable,
	       .init = (void *)simple_init,
	       .exit = (void *)simple_exit,
	       .timeout_ms = 30000,
	       .name = "umcg_simple");

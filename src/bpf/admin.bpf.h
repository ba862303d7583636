/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The loader's program: it opens and closes domains. Its descriptor never leaves the loader, so its arguments are
 * believed.
 */
#ifndef UMCG_ADMIN_BPF_H
#define UMCG_ADMIN_BPF_H

#include "maps.bpf.h"

static int admin_open(struct umcg_admin_args *args, struct umcg_domain *domain)
{
	u32 first_slot = args->first_slot, nr_slots = args->nr_slots;
	u64 nonce = args->nonce;
	int ret = -EEXIST;

	bpf_spin_lock(&domain->lock);
	if (!domain->first_slot) {
		domain->tgid = 0;
		domain->nr_slots = nr_slots;
		domain->nr_tasks = 0;
		domain->nonce = nonce;
		domain->first_slot = first_slot;
		ret = 0;
	}
	bpf_spin_unlock(&domain->lock);
	if (ret)
		return ret;
	if (slot_limit < args->first_slot + args->nr_slots)
		slot_limit = args->first_slot + args->nr_slots;
	return 0;
}

/* References to a domain's map that are ours: the loader's descriptor, and its place in `domains`. */
#define UMCG_OWN_REFS 2

/*
 * The client still has its memory: a descriptor, a mapping, or that it had the control program keep it
 * (BPF_PROG_BIND_MAP, which needs no privilege). It counts as long as it is there, or nobody would count it.
 */
static __always_inline bool memory_is_kept(u32 nr)
{
	struct bpf_map *map = bpf_map_lookup_elem(&domains, &nr);

	return map && map->refcnt.counter > UMCG_OWN_REFS;
}

static int admin_close(struct umcg_admin_args *args, struct umcg_domain *domain)
{
	bool is_kept = memory_is_kept(args->domain);
	int ret = 0;

	bpf_spin_lock(&domain->lock);
	domain->nonce = 0;
	domain->tgid = 0; /* no registration from here on */
	if (domain->nr_tasks || is_kept)
		ret = -EBUSY;
	else
		domain->first_slot = 0;
	bpf_spin_unlock(&domain->lock);
	return ret;
}

SEC("syscall")
int umcg_admin(struct umcg_admin_args *args)
{
	struct umcg_domain *domain = domain_of(args->domain);

	if (!domain)
		args->result = -EINVAL;
	else if (args->op == UMCG_ADMIN_OPEN)
		args->result = admin_open(args, domain);
	else if (args->op == UMCG_ADMIN_CLOSE)
		args->result = admin_close(args, domain);
	else
		args->result = -EINVAL;
	return 0;
}

#endif /* UMCG_ADMIN_BPF_H */

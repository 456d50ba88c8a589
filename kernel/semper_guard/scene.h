/* SPDX-License-Identifier: GPL-2.0 */
/* What is known of the machine at the instant of a fatal error. */
#ifndef SEMPER_GUARD_SCENE_H
#define SEMPER_GUARD_SCENE_H

#include <linux/types.h>

struct sg_event;

/* What a hook knows as its function begins, before it does anything. */
struct sg_call {
	unsigned long caller;
	unsigned long sp;
	u32 preempt_count;
	bool irqs_off;
};

/* Filled where it stands, so that `caller` and `sp` are those of the hook's function. */
#define SG_CALL() ((struct sg_call){		\
	.caller = _RET_IP_,			\
	.sp = current_stack_pointer,		\
	.preempt_count = preempt_count(),	\
	.irqs_off = irqs_disabled(),		\
})

/*
 * Looks, and fills the event and its state; kind, reachable, restartable and nested are the caller's.
 * Any context, the stack of a double fault included (4 KiB).
 */
void sg_scene_look(struct sg_event *event, const struct sg_call *call);

/* The thread under an interrupt or NMI: its context and depth in place of the interrupt's. */
void sg_scene_look_below(struct sg_event *event, u32 preempt_count);

void sg_scene_init(void);

#endif

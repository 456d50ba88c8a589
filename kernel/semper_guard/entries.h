/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Functions whose entry is recorded, so that they can be entered again, or returned from early.
 *
 * A recorded entry is sound while its function runs: same thread, further up the same stack, its return
 * address still in place. Another interrupt on the same stack may leave those words as they were, so
 * that the function runs is known by the kernel's own mark: softirqs being served, or in_hrtirq.
 */
#ifndef SEMPER_GUARD_ENTRIES_H
#define SEMPER_GUARD_ENTRIES_H

#include <linux/types.h>

#include "jumps.h"

enum sg_handler {
	SG_HRTIMER_INTERRUPT,	/* the hard interrupt of the local timer */
	SG_SOFTIRQS,
	SG_WATCHDOG,		/* the soft lockup detector's timer */
	SG_HANDLERS
};

/* This CPU's entry of a handler that may run now, or NULL. Any context, preemption off. */
const struct sg_entry *sg_entry_sound(enum sg_handler handler);

/*
 * Whether a handler runs, with a sound entry. In the context of that handler alone: SG_HARDIRQ for the
 * timer, SG_SOFTIRQ for softirqs.
 */
bool sg_entry_restartable(enum sg_handler handler);

/* Enters a handler again, with preemption, RCU and interrupts as they were at its entry. */
void __noreturn sg_entry_begin_again(enum sg_handler handler);

/* Called at each entry of the watchdog's timer, in hard interrupt context. */
void sg_lockup_tick(void);

/* Process context. A handler that this kernel has not is none that is begun again. */
void sg_entries_init(void);
void sg_entries_exit(void);

#endif

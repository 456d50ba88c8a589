/* SPDX-License-Identifier: GPL-2.0 */
/* CPUs that loop: soft lockups, hard lockups, and a detector of the latter of our own. */
#ifndef SEMPER_GUARD_LOCKUP_H
#define SEMPER_GUARD_LOCKUP_H

#include <linux/types.h>

struct pt_regs;
struct sg_event;
struct sg_call;

/* A panic() that the soft lockup detector's timer calls. Any context. */
bool sg_lockup_is_soft(const struct sg_event *event);

/* Looks at the thread under the watchdog's interrupt. */
void sg_lockup_look_soft(struct sg_event *event);
/* Carries out SG_REDIRECT or SG_GO_ON: leaves panic() and the timer for the interrupted thread. */
void __noreturn sg_lockup_leave_watchdog(bool redirect);

/* Looks at the thread under an NMI. */
void sg_lockup_look_hard(struct sg_event *event, struct pt_regs *regs);

/* Asks a CPU by NMI to park what it runs in the kernel. Returns 0 or -EINVAL, -ENODEV. */
int sg_lockup_rescue(unsigned int cpu);

int sg_lockup_init(void);
void sg_lockup_exit(void);

#endif

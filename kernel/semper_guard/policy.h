/* SPDX-License-Identifier: GPL-2.0 */
/* What the operator wants: the module's parameters, and what was said since. */
#ifndef SEMPER_GUARD_POLICY_H
#define SEMPER_GUARD_POLICY_H

#include <linux/types.h>

#include "decision.h"

/* From now on every hook is passed through; never taken back. Any context. */
void sg_policy_allow(void);
bool sg_policy_allows(void);

enum sg_policy sg_policy_now(void);
unsigned int sg_policy_max_events(void);
unsigned int sg_policy_deadline_s(void);
unsigned int sg_policy_hard_lockup_misses(void);
unsigned int sg_policy_hold_shutdown_s(void);

/* Whether a crash kernel is loaded and its dump comes before any rescue. Any context. */
bool sg_policy_crash_kernel_first(void);

/* Process context: clears panic_on_oom, and gives it back. */
void sg_policy_disarm_oom(void);
void sg_policy_rearm_oom(void);

/* Any context: panic_on_oom is cleared for good, because it has struck. */
void sg_policy_forget_oom(void);

#endif

/* SPDX-License-Identifier: GPL-2.0 */
/* What stands in the place of the hooked functions: look, decide, carry out. */
#ifndef SEMPER_GUARD_GUARD_H
#define SEMPER_GUARD_GUARD_H

#include <linux/compiler.h>

struct pt_regs;

__printf(1, 2) void sg_guard_panic(const char *fmt, ...);
void sg_guard_nmi_panic(struct pt_regs *regs, const char *message);
void sg_guard_warning(const char *origin);
void sg_guard_crash_kexec(struct pt_regs *regs);
void sg_guard_restart(void);

/* A CPU that loops, as seen in an NMI on it. */
void sg_guard_lockup(struct pt_regs *regs, const char *message);

#endif

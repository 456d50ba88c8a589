/* SPDX-License-Identifier: GPL-2.0 */
/* The five functions by which a kernel dies, and their way to guard.c. */
#ifndef SEMPER_GUARD_HOOKS_H
#define SEMPER_GUARD_HOOKS_H

struct pt_regs;

/* Between these two the hooked functions are the real ones on this CPU; preemption stays off. */
void sg_hooks_bypass_begin(void);
void sg_hooks_bypass_end(void);

/* The real functions, some of which are not exported. To be called between the two above. */
void sg_hooks_nmi_panic(struct pt_regs *regs, const char *message);
void sg_hooks_check_panic_on_warn(const char *origin);
void sg_hooks_crash_kexec(struct pt_regs *regs);
void sg_hooks_emergency_restart(void);

/* All five or none. Process context. Returns 0, or the error of the first that cannot be hooked. */
int sg_hooks_init(void);
void sg_hooks_exit(void);

#endif

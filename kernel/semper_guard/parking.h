/* SPDX-License-Identifier: GPL-2.0 */
/* A thread that must not go on, and must not die either, sleeps for ever. */
#ifndef SEMPER_GUARD_PARKING_H
#define SEMPER_GUARD_PARKING_H

#include <linux/compiler.h>
#include <linux/types.h>

struct pt_regs;

/* Parks the current thread from any context that is not another's interrupt. */
void __noreturn sg_park(void);

/* Has interrupted code of the current thread parked when the interrupt returns to it. */
void sg_redirect_to_parking(struct pt_regs *regs);

/* The same for an NMI, which returns by a frame beyond regs; false if there is no such frame. */
bool sg_nmi_frame_found(struct pt_regs *regs);
void sg_redirect_nmi_to_parking(struct pt_regs *regs);

/* From jumps.S, on a stack that begins anew. */
void __noreturn sg_park_here(void);

/* Process context, at load. */
void sg_parking_init(void);

/* For the scene: who holds oom_lock, as far as known. Any context. */
bool sg_parking_holds_oom_lock(void);

#endif

/* SPDX-License-Identifier: GPL-2.0 */
/* Jumps that C has no words for. The offsets in jumps.S are those of struct sg_entry. */
#ifndef SEMPER_GUARD_JUMPS_H
#define SEMPER_GUARD_JUMPS_H

#include <linux/build_bug.h>
#include <linux/stddef.h>

/* What a function was entered with: its callee-saved registers, its stack, its first argument. */
struct sg_entry {
	unsigned long bx;	/*  0 */
	unsigned long bp;	/*  8 */
	unsigned long r12;	/* 16 */
	unsigned long r13;	/* 24 */
	unsigned long r14;	/* 32 */
	unsigned long r15;	/* 40 */
	unsigned long sp;	/* 48: where its return address is */
	unsigned long di;	/* 56 */
};

static_assert(offsetof(struct sg_entry, sp) == 48);
static_assert(offsetof(struct sg_entry, di) == 56);

/*
 * The three jumps do not return, but objtool looks no further than one object: BUG() stands after each.
 */

/* Takes another stack, and parks on it. Interrupts and preemption as they are. */
void sg_jump_to_parking(unsigned long sp);

/* Where a redirected thread begins: interrupts off, rsp as of sg_parking_stack(). Never called. */
void sg_land_in_parking(void);

/* Returns from the function that was entered so, with a value of int. */
void sg_jump_to_return(const struct sg_entry *entry, long value);

/* Enters that function once more; `function` is its address. */
void sg_jump_to_entry(const struct sg_entry *entry, unsigned long function);

#endif

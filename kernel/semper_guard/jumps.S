/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Jumps that C has no words for; see jumps.h.
 *
 * No frame here ends as it began (Kbuild keeps objtool of 6.1 away). A bare `ret` and no
 * indirect jump, because indirect branch tracking lets an indirect jump go to marked places only. Nobody
 * comes here but on a path that ends a thread or an interrupt, so speculation gains nothing.
 */
#include <linux/linkage.h>
#include <linux/objtool.h>
#include <linux/version.h>
#include <asm/nospec-branch.h>
#include <asm/unwind_hints.h>

/* An unwinder ends here; without the hint, objtool takes what follows for unreachable. */
.macro NO_FRAME
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 4, 0)
	UNWIND_HINT_END_OF_STACK
#else
	UNWIND_HINT_EMPTY
#endif
.endm

	.text

/* %rdi: the new stack pointer, a multiple of 16 */
SYM_CODE_START(sg_jump_to_parking)
	NO_FRAME
	mov	%rdi, %rsp
SYM_INNER_LABEL(sg_land_in_parking, SYM_L_GLOBAL)
	ANNOTATE_NOENDBR /* An iret goes there, which is not tracked. */
	xor	%ebp, %ebp
	push	$0 /* the place of a return address, which nobody uses */
	jmp	sg_park_here
SYM_CODE_END(sg_jump_to_parking)

/* %rdi: struct sg_entry; %rsi: the value */
SYM_CODE_START(sg_jump_to_return)
	NO_FRAME
	mov	0(%rdi), %rbx
	mov	8(%rdi), %rbp
	mov	16(%rdi), %r12
	mov	24(%rdi), %r13
	mov	32(%rdi), %r14
	mov	40(%rdi), %r15
	mov	48(%rdi), %rsp
	mov	%rsi, %rax
	ANNOTATE_UNRET_SAFE
	ret
	int3
SYM_CODE_END(sg_jump_to_return)

/* %rdi: struct sg_entry; %rsi: the function's address */
SYM_CODE_START(sg_jump_to_entry)
	NO_FRAME
	mov	0(%rdi), %rbx
	mov	8(%rdi), %rbp
	mov	16(%rdi), %r12
	mov	24(%rdi), %r13
	mov	32(%rdi), %r14
	mov	40(%rdi), %r15
	mov	48(%rdi), %rsp
	push	%rsi
	mov	56(%rdi), %rdi
	ANNOTATE_UNRET_SAFE
	ret
	int3
SYM_CODE_END(sg_jump_to_entry)

	.section .note.GNU-stack, "", @progbits

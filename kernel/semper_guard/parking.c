// SPDX-License-Identifier: GPL-2.0
/*
 * A thread that must not go on, and must not die either, sleeps for ever.
 *
 * The stack begins anew near its top, as in the kernel's own rewind_stack_and_make_dead(): what called is
 * forgotten, whether it ran on the thread's stack, an interrupt stack or that of an exception. Then
 * what the thread leaves behind is repaired as far as that can be: readers' sections of RCU, preemption,
 * interrupts, oom_lock. Other locks stay locked. A thread that is asleep costs nothing and frees
 * nothing: its files, memory and locks are as they were.
 */
#include <linux/bug.h>
#include <linux/irqflags.h>
#include <linux/magic.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/preempt.h>
#include <linux/ptrace.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/sched/task_stack.h>

#include "jumps.h"
#include "parking.h"
#include "policy.h"
#include "symbols.h"

/* Deeper nesting than this is damage, and not a number to believe. */
#define RCU_DEPTH_MAX 64

static struct mutex *oom_lock;

/* The owner is the task's address with flags in the lowest three bits (kernel/locking/mutex.c). */
static bool owned_by_current(const struct mutex *lock)
{
	return (atomic_long_read(&lock->owner) & ~7UL) == (unsigned long)current;
}

bool sg_parking_holds_oom_lock(void)
{
	return oom_lock && owned_by_current(oom_lock);
}

/* Below the registers of user space, which ptrace and /proc still look at. */
static unsigned long fresh_stack(void)
{
	return ALIGN_DOWN((unsigned long)task_pt_regs(current) - 64, 16);
}

static void leave_rcu(void)
{
	int depth = rcu_preempt_depth();

	if (depth > RCU_DEPTH_MAX)
		return;
	while (depth-- > 0)
		__rcu_read_unlock();
}

void __noreturn sg_park_here(void)
{
	*end_of_stack(current) = STACK_END_MAGIC;
	preempt_count_set(PREEMPT_DISABLED);
	leave_rcu();
	current->pagefault_disabled = 0;
	/* They are on the stack that is gone; schedule() would follow them. */
	current->plug = NULL;
	current->bio_list = NULL;
	local_irq_enable();
	preempt_count_set(PREEMPT_ENABLED);
	if (sg_parking_holds_oom_lock()) {
		sg_policy_forget_oom();
		mutex_unlock(oom_lock);
	}
	pr_emerg("parked: %s[%d]\n", current->comm, current->pid);
	for (;;) {
		/* Idle: khungtaskd would report an uninterruptible one, and the load would grow. */
		set_current_state(TASK_IDLE);
		schedule();
	}
}

/* A parked thread comes back to nothing, but its kernel stack names this module's code. */
static void stay_loaded(void)
{
	__module_get(THIS_MODULE);
}

void __noreturn sg_park(void)
{
	stay_loaded();
	sg_jump_to_parking(fresh_stack());
	BUG();
}

void sg_redirect_to_parking(struct pt_regs *regs)
{
	stay_loaded();
	regs->ip = (unsigned long)sg_land_in_parking;
	regs->sp = fresh_stack();
	regs->flags &= ~X86_EFLAGS_IF;
}

/*
 * asm_exc_nmi (arch/x86/entry/entry_64.S) returns by a second copy of the frame, which lies beyond
 * pt_regs; nested NMIs make that copy again from the one in pt_regs.
 */
struct nmi_frame {
	unsigned long ip, cs, flags, sp, ss;
};

static struct nmi_frame *nmi_frame(struct pt_regs *regs)
{
	return (struct nmi_frame *)(regs + 1);
}

bool sg_nmi_frame_found(struct pt_regs *regs)
{
	const struct nmi_frame *frame = nmi_frame(regs);

	return frame->ip == regs->ip && frame->sp == regs->sp && frame->flags == regs->flags;
}

void sg_redirect_nmi_to_parking(struct pt_regs *regs)
{
	struct nmi_frame *frame = nmi_frame(regs);

	sg_redirect_to_parking(regs);
	frame->ip = regs->ip;
	frame->sp = regs->sp;
	frame->flags = regs->flags;
}

void sg_parking_init(void)
{
	oom_lock = sg_variable("oom_lock");
}

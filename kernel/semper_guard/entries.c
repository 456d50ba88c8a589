// SPDX-License-Identifier: GPL-2.0
/* Functions whose entry is recorded, so that they can be entered again, or returned from early. */
#include <linux/bug.h>
#include <linux/ftrace.h>
#include <linux/hrtimer.h>
#include <linux/interrupt.h>
#include <linux/irqflags.h>
#include <linux/percpu.h>
#include <linux/preempt.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>

#include "entries.h"
#include "symbols.h"

/* An interrupt stack is as long; an entry further away is of another time. */
#define STACK_REACH_BYTES 16384

struct record {
	struct sg_entry entry;
	unsigned long returns_to;
	struct task_struct *task;
	u32 preempt_count;
	int rcu_depth;
	bool irqs_off;
};

struct handler {
	const char *names[2];	/* the second is what older kernels call it */
	unsigned long address;
	struct ftrace_ops ops;
};

static DEFINE_PER_CPU(struct record [SG_HANDLERS], records);

static struct hrtimer_cpu_base __percpu *hrtimer_bases;

static void notrace enter(unsigned long ip, unsigned long parent_ip, struct ftrace_ops *ops,
			  struct ftrace_regs *fregs);

static struct handler handlers[SG_HANDLERS] = {
	[SG_HRTIMER_INTERRUPT] = { .names = { "hrtimer_interrupt" } },
	[SG_SOFTIRQS] = { .names = { "handle_softirqs", "__do_softirq" } },
	[SG_WATCHDOG] = { .names = { "watchdog_timer_fn" } },
};

static void notrace enter(unsigned long ip, unsigned long parent_ip, struct ftrace_ops *ops,
			  struct ftrace_regs *fregs)
{
	struct handler *handler = container_of(ops, struct handler, ops);
	struct pt_regs *regs = ftrace_get_regs(fregs);
	struct record *record = &(*this_cpu_ptr(&records))[handler - handlers];

	if (!regs)
		return;
	record->entry = (struct sg_entry){
		.bx = regs->bx, .bp = regs->bp, .r12 = regs->r12, .r13 = regs->r13,
		.r14 = regs->r14, .r15 = regs->r15, .sp = regs->sp, .di = regs->di,
	};
	record->returns_to = *(unsigned long *)regs->sp;
	record->task = current;
	record->preempt_count = preempt_count();
	record->rcu_depth = rcu_preempt_depth();
	record->irqs_off = !(regs->flags & X86_EFLAGS_IF);
	if (handler == &handlers[SG_WATCHDOG])
		sg_lockup_tick();
}

const struct sg_entry *sg_entry_sound(enum sg_handler handler)
{
	const struct record *record = &(*this_cpu_ptr(&records))[handler];
	unsigned long here = current_stack_pointer;

	if (!handlers[handler].address || record->task != current)
		return NULL;
	if (record->entry.sp <= here || record->entry.sp - here > STACK_REACH_BYTES)
		return NULL;
	if (*(unsigned long *)record->entry.sp != record->returns_to)
		return NULL;
	return &record->entry;
}

/* Set from the first timer to the last of a run of hrtimer_interrupt() (kernel/time/hrtimer.c). */
static bool in_hrtimer_interrupt(void)
{
	return hrtimer_bases && raw_cpu_ptr(hrtimer_bases)->in_hrtirq;
}

bool sg_entry_restartable(enum sg_handler handler)
{
	if (handler == SG_HRTIMER_INTERRUPT && !in_hrtimer_interrupt())
		return false;
	return sg_entry_sound(handler);
}

void __noreturn sg_entry_begin_again(enum sg_handler handler)
{
	const struct record *record = &(*this_cpu_ptr(&records))[handler];

	local_irq_disable();
	while (rcu_preempt_depth() > record->rcu_depth)
		__rcu_read_unlock();
	preempt_count_set(record->preempt_count);
	/* What was taken from the set of pending softirqs and not done yet is done again. */
	if (handler == SG_SOFTIRQS)
		or_softirq_pending(BIT(NR_SOFTIRQS) - 1);
	if (!record->irqs_off)
		local_irq_enable();
	sg_jump_to_entry(&record->entry, handlers[handler].address);
	BUG();
}

static int hook(struct handler *handler, const char *name)
{
	unsigned long address = sg_symbol(name);
	unsigned long site;
	int error;

	if (!address)
		return -ENOENT;
	handler->ops.func = enter;
	handler->ops.flags = FTRACE_OPS_FL_SAVE_REGS;
	site = sg_ftrace_site(address);
	if (!site)
		return -ENOENT;
	error = ftrace_set_filter_ip(&handler->ops, site, 0, 0);
	if (!error)
		error = register_ftrace_function(&handler->ops);
	if (!error)
		handler->address = address;
	return error;
}

void sg_entries_init(void)
{
	struct handler *handler;

	hrtimer_bases = (__force void __percpu *)sg_variable("hrtimer_bases");
	for (handler = handlers; handler < handlers + SG_HANDLERS; handler++) {
		int error = hook(handler, handler->names[0]);

		if (error && handler->names[1])
			error = hook(handler, handler->names[1]);
		if (error)
			pr_warn("%s cannot be recorded (error %d): not begun again\n",
				handler->names[0], error);
	}
}

void sg_entries_exit(void)
{
	struct handler *handler;

	for (handler = handlers; handler < handlers + SG_HANDLERS; handler++) {
		if (handler->address)
			unregister_ftrace_function(&handler->ops);
	}
}

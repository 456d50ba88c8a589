// SPDX-License-Identifier: GPL-2.0
/*
 * CPUs that loop.
 *
 * Where the hardware gives no NMI watchdog (most virtual machines), each CPU's soft lockup timer looks
 * at the next CPU's count of the same timer. A CPU that stands still for hard_lockup_misses
 * periods gets an NMI, and what loops there with interrupts off is parked. The count only says where to
 * look: that interrupts are off and kernel code runs is seen in the NMI itself.
 */
#include <linux/bug.h>
#include <linux/cpumask.h>
#include <linux/hrtimer.h>
#include <linux/percpu.h>
#include <linux/ptrace.h>
#include <linux/sched.h>
#include <linux/sched/task_stack.h>
#include <linux/smp.h>
#include <linux/string.h>
#include <asm/apic.h>
#include <asm/irq_regs.h>
#include <asm/nmi.h>

#include "entries.h"
#include "events.h"
#include "guard.h"
#include "lockup.h"
#include "parking.h"
#include "policy.h"
#include "scene.h"
#include "symbols.h"

enum request {
	NOTHING,
	RESCUE,			/* an operator's: also with interrupts on */
	RESCUE_IF_LOCKED,	/* our detector's */
};

struct beat {
	unsigned long ticks;	/* of this CPU's watchdog */
	unsigned long seen;	/* of the next CPU's, at the last tick */
	unsigned int misses;
};

static DEFINE_PER_CPU(struct beat, beats);
static DEFINE_PER_CPU(int, requests);
static struct apic **current_apic;
static const struct cpumask *watched;

bool sg_lockup_is_soft(const struct sg_event *event)
{
	return event->state.context == SG_HARDIRQ &&
	       !strncmp(event->symbol, "watchdog_timer_fn", 17) && sg_entry_sound(SG_WATCHDOG);
}

static bool on_own_stack(unsigned long sp)
{
	unsigned long stack = (unsigned long)task_stack_page(current);

	return sp > stack && sp < stack + THREAD_SIZE;
}

/* Kernel code of a thread, on its own stack: neither user space nor an interrupt nor a softirq. */
static bool reachable(const struct sg_event *event, struct pt_regs *regs)
{
	return regs && !user_mode(regs) && event->state.context == SG_TASK &&
	       on_own_stack(regs->sp);
}

void sg_lockup_look_soft(struct sg_event *event)
{
	event->state.kind = SG_SOFT_LOCKUP;
	sg_scene_look_below(event, event->preempt_count - HARDIRQ_OFFSET);
	event->state.reachable = reachable(event, get_irq_regs());
}

void __noreturn sg_lockup_leave_watchdog(bool redirect)
{
	const struct sg_entry *entry = sg_entry_sound(SG_WATCHDOG);

	if (redirect)
		sg_redirect_to_parking(get_irq_regs());
	sg_jump_to_return(entry, HRTIMER_RESTART);
	BUG();
}

void sg_lockup_look_hard(struct sg_event *event, struct pt_regs *regs)
{
	event->state.kind = SG_HARD_LOCKUP;
	sg_scene_look_below(event, event->preempt_count - NMI_OFFSET - HARDIRQ_OFFSET);
	event->state.reachable = reachable(event, regs) && sg_nmi_frame_found(regs);
}

static int answer_nmi(unsigned int command, struct pt_regs *regs)
{
	int request = this_cpu_xchg(requests, NOTHING);

	if (request == NOTHING)
		return NMI_DONE;
	if (request == RESCUE || !(regs->flags & X86_EFLAGS_IF))
		sg_guard_lockup(regs, request == RESCUE ? "rescue was asked for" :
				"semper_guard: CPU takes no interrupts");
	return NMI_HANDLED;
}

static void send(unsigned int cpu, enum request request)
{
	per_cpu(requests, cpu) = request;
	/* Pairs with the NMI itself, which is no barrier for the sender's stores. */
	smp_mb();
	(*current_apic)->send_IPI(cpu, NMI_VECTOR);
}

int sg_lockup_rescue(unsigned int cpu)
{
	if (cpu >= nr_cpu_ids || !cpu_online(cpu))
		return -EINVAL;
	if (!current_apic)
		return -ENODEV;
	send(cpu, RESCUE);
	return 0;
}

void notrace sg_lockup_tick(void)
{
	struct beat *own = this_cpu_ptr(&beats);
	unsigned int limit = sg_policy_hard_lockup_misses();
	unsigned int next;
	unsigned long ticks;

	own->ticks++;
	if (!limit || !watched || !current_apic || sg_policy_now() == SG_OBSERVE)
		return;
	next = cpumask_next(smp_processor_id(), cpu_online_mask);
	if (next >= nr_cpu_ids)
		next = cpumask_first(cpu_online_mask);
	ticks = READ_ONCE(per_cpu(beats, next).ticks);
	/* One that has never ticked is not watched, or is just coming up. */
	if (next == smp_processor_id() || !cpumask_test_cpu(next, watched) || !ticks ||
	    ticks != own->seen) {
		own->seen = ticks;
		own->misses = 0;
	} else if (++own->misses == limit) {
		own->misses = 0;
		send(next, RESCUE_IF_LOCKED);
	}
}

int sg_lockup_init(void)
{
	current_apic = sg_variable("apic");
	watched = sg_variable("watchdog_cpumask");
	if (!current_apic || !watched)
		pr_warn("no apic or watchdog_cpumask: hard lockups are found by the hardware alone\n");
	return register_nmi_handler(NMI_LOCAL, answer_nmi, 0, "semper_guard");
}

void sg_lockup_exit(void)
{
	unregister_nmi_handler(NMI_LOCAL, "semper_guard");
}

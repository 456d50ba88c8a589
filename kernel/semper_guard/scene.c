// SPDX-License-Identifier: GPL-2.0
/* What is known of the machine at the instant of a fatal error. */
#include <linux/irqflags.h>
#include <linux/kernel.h>
#include <linux/mm_types.h>
#include <linux/mutex.h>
#include <linux/preempt.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/sched/task.h>
#include <linux/smp.h>
#include <linux/string.h>
#include <asm/cpu_entry_area.h>

#include "events.h"
#include "parking.h"
#include "policy.h"
#include "postponed.h"
#include "scene.h"
#include "symbols.h"

/* Without one of these a host soon does nothing any more. */
static const char *const names[] = {
	"rtnl_mutex", "cgroup_mutex", "event_mutex", "text_mutex", "slab_mutex", "module_mutex",
	"jump_label_mutex", "pcpu_alloc_mutex", "wq_pool_mutex", "tty_mutex",
};

static struct mutex *locks[ARRAY_SIZE(names)];
static struct cea_exception_stacks **exception_stacks;

static const char *known_lock(void)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(locks); i++) {
		if (locks[i] && (atomic_long_read(&locks[i]->owner) & ~7UL) == (unsigned long)current)
			return names[i];
	}
	return NULL;
}

static bool on_double_fault_stack(unsigned long sp)
{
	struct cea_exception_stacks *stacks;

	if (!exception_stacks)
		return false;
	stacks = *raw_cpu_ptr((struct cea_exception_stacks * __percpu *)exception_stacks);
	return stacks && sp >= CEA_ESTACK_BOT(stacks, DF) && sp < CEA_ESTACK_TOP(stacks, DF);
}

static enum sg_context context_of(u32 count)
{
	if (count & NMI_MASK)
		return SG_NMI;
	if (count & HARDIRQ_MASK)
		return SG_HARDIRQ;
	if (count & SOFTIRQ_OFFSET)
		return SG_SOFTIRQ;
	return SG_TASK;
}

static enum sg_thread thread_of(const struct task_struct *task)
{
	if (!task->pid)
		return SG_IDLE;
	if (task->pid == 1)
		return SG_INIT;
	if (!(task->flags & PF_KTHREAD))
		return SG_USER;
	/* Workers are bound as well, but their pool starts others. */
	if (task->flags & PF_NO_SETAFFINITY && task->nr_cpus_allowed == 1 &&
	    !(task->flags & PF_WQ_WORKER))
		return SG_PER_CPU;
	return SG_KTHREAD;
}

/* "vhost-PID" is a kernel thread that works for QEMU (until 6.4; then it is one of QEMU's own). */
static pid_t owner_of(const struct task_struct *task)
{
	pid_t owner;

	if (!(task->flags & PF_KTHREAD) || strncmp(task->comm, "vhost-", 6) ||
	    kstrtoint(task->comm + 6, 10, &owner))
		return 0;
	return owner;
}

static void look_at_count(struct sg_state *state, u32 count)
{
	state->context = context_of(count);
	state->depth = (count & PREEMPT_MASK) >> PREEMPT_SHIFT;
	state->bh_off = (count & SOFTIRQ_MASK) && !(count & SOFTIRQ_OFFSET);
}

void sg_scene_look_below(struct sg_event *event, u32 preempt_count)
{
	look_at_count(&event->state, preempt_count);
}

void sg_scene_look(struct sg_event *event, const struct sg_call *call)
{
	struct sg_state *state = &event->state;
	const char *lock = known_lock();

	event->caller = call->caller;
	event->preempt_count = call->preempt_count;
	event->irqs_off = call->irqs_off;
	event->cpu = raw_smp_processor_id();
	event->pid = current->pid;
	event->tgid = current->tgid;
	event->owner = owner_of(current);
	memcpy(event->comm, current->comm, sizeof(event->comm));
	event->comm[sizeof(event->comm) - 1] = '\0';
	/* The call before the return address; that may be the first of another function. */
	snprintf(event->symbol, sizeof(event->symbol), "%ps", (void *)(call->caller - 1));

	look_at_count(state, call->preempt_count);
	if (on_double_fault_stack(call->sp)) {
		/* The entry of the exception has added these two. */
		look_at_count(state, call->preempt_count - NMI_OFFSET - HARDIRQ_OFFSET);
		state->context = SG_STACK_FAULT;
	}
	state->thread = thread_of(current);
	state->rcu_depth = max(rcu_preempt_depth(), 0);
	state->policy = sg_policy_now();
	state->allowed = sg_policy_allows();
	state->crash_kernel_first = sg_policy_crash_kernel_first();
	state->before = sg_postponed_count();
	state->max_events = sg_policy_max_events();
	state->known_lock = lock;
	if (lock)
		strscpy(event->lock, lock, sizeof(event->lock));
	state->oom_lock = sg_parking_holds_oom_lock();
	if (state->oom_lock)
		strscpy(event->lock, "oom_lock", sizeof(event->lock));
}

void sg_scene_init(void)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(names); i++)
		locks[i] = sg_variable(names[i]);
	exception_stacks = sg_variable("cea_exception_stacks");
	if (!exception_stacks)
		pr_warn("no cea_exception_stacks: a stack that is used up counts as an NMI\n");
}

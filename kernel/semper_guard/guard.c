// SPDX-License-Identifier: GPL-2.0
/*
 * What stands in the place of the hooked functions.
 *
 *   called ──► look (scene.c) ──► decide (decision.c) ──► event (events.c) ──► carry out
 *
 * Preemption is off from the first instruction to the last, so that whoever unloads the module can
 * wait for all of them.
 */
#include <linux/irqflags.h>
#include <linux/kernel.h>
#include <linux/percpu.h>
#include <linux/preempt.h>
#include <linux/string.h>

#include "decision.h"
#include "entries.h"
#include "events.h"
#include "guard.h"
#include "hooks.h"
#include "lockup.h"
#include "parking.h"
#include "policy.h"
#include "postponed.h"
#include "scene.h"

/*
 * How many fatal errors this CPU is in the middle of. An NMI may come into another; a third is the
 * guard's own fault.
 */
static DEFINE_PER_CPU(int, inside);
#define INSIDE_MAX 2

static struct sg_event *begin(const struct sg_call *call, enum sg_kind kind)
{
	struct sg_event *event;
	int depth;

	preempt_disable_notrace();
	depth = this_cpu_inc_return(inside);
	event = sg_event_claim();
	sg_scene_look(event, call);
	event->state.kind = kind;
	event->state.nested = depth > INSIDE_MAX;
	return event;
}

/* The verdict, which the event tells. */
static enum sg_verdict decide(struct sg_event *event)
{
	event->decision = sg_decide(&event->state);
	sg_event_done(event);
	return event->decision.verdict;
}

/* The same where the host would have died: it is put off, and counts. */
static enum sg_verdict decide_on_death(struct sg_event *event)
{
	event->decision = sg_decide(&event->state);
	if (event->decision.verdict != SG_LET_HAPPEN)
		sg_postponed_note(event);
	sg_event_done(event);
	return event->decision.verdict;
}

static void end(void)
{
	this_cpu_dec(inside);
	preempt_enable_notrace();
}

/* Before a jump that takes preempt_count along, or sets the count. */
static void end_by_jump(void)
{
	this_cpu_dec(inside);
}

static void trim(char *text)
{
	size_t length = strlen(text);

	if (length && text[length - 1] == '\n')
		text[length - 1] = '\0';
}

static enum sg_handler handler_of(const struct sg_event *event)
{
	return event->state.context == SG_HARDIRQ ? SG_HRTIMER_INTERRUPT : SG_SOFTIRQS;
}

void sg_guard_panic(const char *fmt, ...)
{
	struct sg_call call = SG_CALL();
	struct sg_event *event = begin(&call, SG_PANIC);
	enum sg_handler handler;
	va_list arguments;

	va_start(arguments, fmt);
	vscnprintf(event->message, sizeof(event->message), fmt, arguments);
	va_end(arguments);
	trim(event->message);

	if (sg_lockup_is_soft(event))
		sg_lockup_look_soft(event);
	else if (!strncmp(event->message, "Out of memory: ", 15))
		event->state.kind = SG_OUT_OF_MEMORY;
	handler = handler_of(event);
	if (event->state.context == SG_HARDIRQ || event->state.context == SG_SOFTIRQ)
		event->state.restartable = sg_entry_restartable(handler);

	switch (decide_on_death(event)) {
	case SG_PARK:
		end_by_jump();
		sg_park();
	case SG_BEGIN_AGAIN:
		end_by_jump();
		sg_entry_begin_again(handler);
	case SG_REDIRECT:
		end();
		sg_lockup_leave_watchdog(true);
	case SG_GO_ON:
		end();
		sg_lockup_leave_watchdog(false);
	default:
		sg_policy_allow();
		panic("%s", event->message);
	}
}

/* A function that may return is called for real, and all that it calls. */
#define LET_HAPPEN(call) do {		\
	sg_hooks_bypass_begin();	\
	call;				\
	sg_hooks_bypass_end();		\
} while (0)

void sg_guard_nmi_panic(struct pt_regs *regs, const char *message)
{
	struct sg_call call = SG_CALL();
	struct sg_event *event = begin(&call, SG_NMI_PANIC);
	enum sg_verdict verdict;

	strscpy(event->message, message, sizeof(event->message));
	if (!strncmp(message, "Hard LOCKUP", 11))
		sg_lockup_look_hard(event, regs);
	verdict = decide_on_death(event);
	if (verdict == SG_REDIRECT)
		sg_redirect_nmi_to_parking(regs);
	else if (verdict == SG_LET_HAPPEN)
		LET_HAPPEN(sg_hooks_nmi_panic(regs, message));
	end();
}

void sg_guard_lockup(struct pt_regs *regs, const char *message)
{
	struct sg_call call = SG_CALL();
	struct sg_event *event;

	if (sg_policy_allows())
		return;
	call.caller = regs->ip + 1;
	event = begin(&call, SG_HARD_LOCKUP);
	strscpy(event->message, message, sizeof(event->message));
	sg_lockup_look_hard(event, regs);
	/* Nobody has asked for a panic: no death is put off, and what cannot be rescued stays. */
	if (decide(event) == SG_REDIRECT)
		sg_redirect_nmi_to_parking(regs);
	end();
}

void sg_guard_warning(const char *origin)
{
	struct sg_call call = SG_CALL();
	struct sg_event *event = begin(&call, SG_WARNING);

	strscpy(event->message, origin, sizeof(event->message));
	if (decide(event) == SG_LET_HAPPEN)
		LET_HAPPEN(sg_hooks_check_panic_on_warn(origin));
	end();
}

void sg_guard_crash_kexec(struct pt_regs *regs)
{
	struct sg_call call = SG_CALL();
	struct sg_event *event = begin(&call, SG_CRASH_KEXEC);

	if (decide(event) == SG_LET_HAPPEN)
		LET_HAPPEN(sg_hooks_crash_kexec(regs));
	end();
}

void sg_guard_restart(void)
{
	struct sg_call call = SG_CALL();
	struct sg_event *event = begin(&call, SG_RESTART);

	if (decide_on_death(event) == SG_LET_HAPPEN)
		LET_HAPPEN(sg_hooks_emergency_restart());
	end();
}

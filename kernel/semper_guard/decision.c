// SPDX-License-Identifier: GPL-2.0
/*
 * The decision, a pure function: no clock, no lock, no memory of its own.
 *
 * docs/design/guard.md has this function as a table; tests/unit/test_guard_decision.py holds the two
 * together over all combinations.
 */
#include "decision.h"

static struct sg_decision decided(enum sg_verdict verdict, enum sg_reason reason)
{
	struct sg_decision decision = { .verdict = verdict, .reason = reason };

	return decision;
}

/* Whether something may stay locked for ever when this thread never runs again. */
static bool holds_lock(const struct sg_state *state)
{
	return state->depth || state->bh_off || state->known_lock;
}

/* A thread that would die in its own context. */
static struct sg_decision decide_task(const struct sg_state *state)
{
	if (state->thread == SG_IDLE)
		return decided(SG_LET_HAPPEN, SG_IDLE_THREAD);
	if (state->thread == SG_PER_CPU && state->policy == SG_STRICT)
		return decided(SG_LET_HAPPEN, SG_CPU_THREAD);
	if (!holds_lock(state))
		return decided(SG_PARK, SG_NO_LOCK_KNOWN);
	if (state->policy == SG_STRICT)
		return decided(SG_LET_HAPPEN, SG_LOCK_HELD);
	return decided(SG_PARK, SG_LOCK_LEFT);
}

/* The thread's stack is used up; parking begins the stack anew. What it held is not known. */
static struct sg_decision decide_stack_fault(const struct sg_state *state)
{
	if (state->thread == SG_IDLE)
		return decided(SG_LET_HAPPEN, SG_IDLE_THREAD);
	if (state->policy == SG_STRICT)
		return decided(SG_LET_HAPPEN, SG_STACK_USED_UP);
	return decided(SG_PARK, SG_STACK_USED_UP);
}

/* An interrupt belongs to nobody who could be parked: the handler begins again, or the host dies. */
static struct sg_decision decide_interrupt(const struct sg_state *state)
{
	if (state->policy != SG_IRQ_RESTART)
		return decided(SG_LET_HAPPEN, SG_IN_INTERRUPT);
	if (!state->restartable)
		return decided(SG_LET_HAPPEN, SG_NOT_RESTARTABLE);
	return decided(SG_BEGIN_AGAIN, SG_RESTARTABLE);
}

static struct sg_decision decide_panic(const struct sg_state *state)
{
	switch (state->context) {
	case SG_TASK:
		return decide_task(state);
	case SG_STACK_FAULT:
		return decide_stack_fault(state);
	case SG_SOFTIRQ:
	case SG_HARDIRQ:
		return decide_interrupt(state);
	default:
		/* A machine check, among others: the hardware is not to be trusted. */
		return decided(SG_LET_HAPPEN, SG_IN_NMI);
	}
}

/* A CPU loops. Whoever found that out is not the culprit and can return. */
static struct sg_decision decide_lockup(const struct sg_state *state)
{
	if (state->thread == SG_IDLE || !state->reachable)
		return decided(SG_GO_ON, SG_LOOP_NOT_REACHED);
	if (!holds_lock(state))
		return decided(SG_REDIRECT, SG_LOOP_REACHED);
	if (state->policy == SG_STRICT)
		return decided(SG_LET_HAPPEN, SG_LOCK_HELD);
	return decided(SG_REDIRECT, SG_LOCK_LEFT);
}

static struct sg_decision decide_out_of_memory(const struct sg_state *state)
{
	if (state->context == SG_TASK && state->thread != SG_IDLE && state->oom_lock)
		return decided(SG_PARK, SG_OOM_DISARMED);
	return decided(SG_LET_HAPPEN, SG_OOM_LOCK_UNKNOWN);
}

/**
 * sg_decide() - survive this, or let it happen?
 * @state: what is known of the machine at this instant
 *
 * First what forbids every rescue, then by kind. No technique is tried that is not the verdict.
 *
 * Return: the verdict, and the reason that the event names.
 */
struct sg_decision sg_decide(const struct sg_state *state)
{
	if (state->allowed)
		return decided(SG_LET_HAPPEN, SG_ALLOWED);
	if (state->policy == SG_OBSERVE)
		return decided(SG_LET_HAPPEN, SG_OBSERVING);
	if (state->nested)
		return decided(SG_LET_HAPPEN, SG_NESTED);
	if (state->kind == SG_WARNING)
		return decided(SG_GO_ON, SG_MAY_RETURN);
	if (state->crash_kernel_first)
		return decided(SG_LET_HAPPEN, SG_CRASH_KERNEL);
	if (state->before >= state->max_events)
		return decided(SG_LET_HAPPEN, SG_TOO_MANY);

	switch (state->kind) {
	case SG_PANIC:
		return decide_panic(state);
	case SG_OUT_OF_MEMORY:
		return decide_out_of_memory(state);
	case SG_SOFT_LOCKUP:
	case SG_HARD_LOCKUP:
		return decide_lockup(state);
	default:
		return decided(SG_GO_ON, SG_MAY_RETURN);
	}
}

/* A name by its number; "?" for a number that no name has. */
#define NAME(names, number) \
	((unsigned int)(number) < sizeof(names) / sizeof((names)[0]) ? (names)[number] : "?")

const char *sg_kind_name(int kind)
{
	static const char *const names[SG_KINDS] = {
		"panic", "out-of-memory", "soft-lockup", "hard-lockup",
		"nmi-panic", "warning", "crash-kexec", "restart",
	};

	return NAME(names, kind);
}

const char *sg_context_name(int context)
{
	static const char *const names[SG_CONTEXTS] = {
		"task", "softirq", "hardirq", "nmi", "stack-fault",
	};

	return NAME(names, context);
}

const char *sg_thread_name(int thread)
{
	static const char *const names[SG_THREADS] = {
		"user", "kthread", "per-cpu", "idle", "init",
	};

	return NAME(names, thread);
}

const char *sg_policy_name(int policy)
{
	static const char *const names[SG_POLICIES] = {
		"observe", "strict", "lenient", "irq-restart",
	};

	return NAME(names, policy);
}

const char *sg_verdict_name(int verdict)
{
	static const char *const names[SG_VERDICTS] = {
		"let-happen", "park", "redirect", "begin-again", "go-on",
	};

	return NAME(names, verdict);
}

const char *sg_reason_name(int reason)
{
	static const char *const names[SG_REASONS] = {
		"allowed", "observing", "nested", "too-many", "crash-kernel", "may-return",
		"no-lock-known", "lock-left", "lock-held", "idle-thread", "cpu-thread",
		"restartable", "not-restartable", "in-interrupt", "in-nmi", "stack-used-up",
		"loop-reached", "loop-not-reached", "oom-disarmed", "oom-lock-unknown",
	};

	return NAME(names, reason);
}

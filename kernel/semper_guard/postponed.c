// SPDX-License-Identifier: GPL-2.0
/* The death that was put off: how often it was, and its going ahead. */
#include <linux/atomic.h>
#include <linux/hrtimer.h>
#include <linux/kernel.h>
#include <linux/ktime.h>
#include <linux/panic.h>
#include <linux/reboot.h>

#include "events.h"
#include "policy.h"
#include "postponed.h"

static atomic_t count = ATOMIC_INIT(0);
static atomic_t armed = ATOMIC_INIT(0);
static struct hrtimer deadline;
static int first_kind;
static char first_message[120];

void sg_postponed_note(const struct sg_event *event)
{
	if (atomic_fetch_inc(&count))
		return;
	first_kind = event->state.kind;
	strscpy(first_message, event->message, sizeof(first_message));
}

unsigned int sg_postponed_count(void)
{
	return atomic_read(&count);
}

/* Hard interrupt context, so that neither a dead softirq nor a dead thread is in the way. */
static enum hrtimer_restart run_out(struct hrtimer *timer)
{
	sg_policy_allow();
	panic("semper_guard: nobody evacuated in %u s after: %s", sg_policy_deadline_s(),
	      first_message);
	return HRTIMER_NORESTART;
}

void sg_postponed_arm(void)
{
	if (!sg_postponed_count() || !sg_policy_deadline_s() || atomic_xchg(&armed, 1))
		return;
	hrtimer_start(&deadline, ktime_set(sg_policy_deadline_s(), 0), HRTIMER_MODE_REL_HARD);
}

void sg_postponed_go_ahead(void)
{
	if (!sg_postponed_count())
		return;
	sg_policy_allow();
	if (first_kind == SG_RESTART)
		emergency_restart();
	panic("semper_guard: evacuated; put off was: %s", first_message);
}

void sg_postponed_init(void)
{
	hrtimer_init(&deadline, CLOCK_MONOTONIC, HRTIMER_MODE_REL_HARD);
	deadline.function = run_out;
}

void sg_postponed_exit(void)
{
	hrtimer_cancel(&deadline);
}

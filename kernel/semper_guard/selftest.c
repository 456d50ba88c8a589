// SPDX-License-Identifier: GPL-2.0
/*
 * What has to hold before anything is hooked: a few milliseconds at load.
 *
 * The whole table of the decision is for a test in user space; here are the rows that would kill an
 * innocent thread if this build got them wrong.
 */
#include <linux/kernel.h>
#include <linux/string.h>

#include "decision.h"
#include "events.h"
#include "selftest.h"

static bool holds(const char *what, bool true_)
{
	if (!true_)
		pr_err("self-test: %s\n", what);
	return true_;
}

static bool test_decision(void)
{
	struct sg_state state = { .max_events = 1 };
	bool good = true;
	int policy, context;

	for (policy = 0; policy < SG_POLICIES; policy++) {
		for (context = 0; context < SG_CONTEXTS; context++) {
			bool in_interrupt = context == SG_SOFTIRQ || context == SG_HARDIRQ;

			state.policy = policy;
			state.context = context;
			state.thread = SG_IDLE;
			good &= holds("the idle thread is never parked",
				      sg_decide(&state).verdict != SG_PARK);
			state.thread = SG_USER;
			good &= holds("an interrupt parks nobody",
				      !in_interrupt || sg_decide(&state).verdict != SG_PARK);
		}
	}
	state = (struct sg_state){ .policy = SG_STRICT, .max_events = 1 };
	good &= holds("a thread without locks is parked", sg_decide(&state).verdict == SG_PARK);
	state.before = 1;
	good &= holds("max_events ends it", sg_decide(&state).reason == SG_TOO_MANY);
	return good;
}

static bool test_strings(void)
{
	char text[32];
	bool good;

	sg_json_string(text, sizeof(text), "a\"\\\n\x80");
	good = holds("JSON is escaped", !strcmp(text, "\"a\\\"\\\\\\u000a\\u0080\""));
	sg_json_string(text, 12, "aaaaaaaaaaaaaaaaaaaaa");
	return good & holds("JSON is cut whole", !strcmp(text, "\"aaa\""));
}

int sg_selftest(void)
{
	bool good = test_decision();

	good &= test_strings();
	return good ? 0 : -EINVAL;
}

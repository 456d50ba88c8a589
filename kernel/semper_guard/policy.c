// SPDX-License-Identifier: GPL-2.0
/* What the operator wants: the module's parameters, and what was said since. */
#include <linux/kexec.h>
#include <linux/module.h>
#include <linux/string.h>

#include "policy.h"
#include "symbols.h"

static int policy = SG_STRICT;
static unsigned int max_events = 64;
static unsigned int deadline_s = 300;
static unsigned int hard_lockup_misses = 4;
static unsigned int hold_shutdown_s;
static bool crash_kernel_first;
static bool allowed;

static int *panic_on_oom;
static int panic_on_oom_was;

static int set_policy(const char *value, const struct kernel_param *parameter)
{
	int i;

	for (i = 0; i < SG_POLICIES; i++) {
		if (sysfs_streq(value, sg_policy_name(i))) {
			WRITE_ONCE(policy, i);
			return 0;
		}
	}
	pr_err("policy is one of observe, strict, lenient, irq-restart\n");
	return -EINVAL;
}

static int get_policy(char *buffer, const struct kernel_param *parameter)
{
	return sysfs_emit(buffer, "%s\n", sg_policy_name(policy));
}

static const struct kernel_param_ops policy_ops = {
	.set = set_policy,
	.get = get_policy,
};

module_param_cb(policy, &policy_ops, NULL, 0644);
MODULE_PARM_DESC(policy, "observe, strict (default), lenient or irq-restart");
module_param(max_events, uint, 0644);
MODULE_PARM_DESC(max_events, "so many fatal errors are survived, the next one is not (64)");
module_param(deadline_s, uint, 0644);
MODULE_PARM_DESC(deadline_s, "seconds from the first to the real panic; 0: never (300)");
module_param(crash_kernel_first, bool, 0644);
MODULE_PARM_DESC(crash_kernel_first, "a loaded crash kernel dumps at once, nothing is rescued (N)");
module_param(hard_lockup_misses, uint, 0644);
MODULE_PARM_DESC(hard_lockup_misses, "silent watchdog periods until a CPU is rescued; 0: never (4)");
module_param(hold_shutdown_s, uint, 0644);
MODULE_PARM_DESC(hold_shutdown_s, "seconds for which a reboot waits for \"evacuated\" (0)");

void sg_policy_allow(void)
{
	WRITE_ONCE(allowed, true);
}

bool notrace sg_policy_allows(void)
{
	return READ_ONCE(allowed);
}

enum sg_policy sg_policy_now(void)
{
	return READ_ONCE(policy);
}

unsigned int sg_policy_max_events(void)
{
	return READ_ONCE(max_events);
}

unsigned int sg_policy_deadline_s(void)
{
	return READ_ONCE(deadline_s);
}

unsigned int sg_policy_hard_lockup_misses(void)
{
	return READ_ONCE(hard_lockup_misses);
}

unsigned int sg_policy_hold_shutdown_s(void)
{
	return READ_ONCE(hold_shutdown_s);
}

bool sg_policy_crash_kernel_first(void)
{
	return READ_ONCE(crash_kernel_first) && kexec_crash_loaded();
}

void sg_policy_disarm_oom(void)
{
	panic_on_oom = sg_variable("sysctl_panic_on_oom");
	if (!panic_on_oom || !*panic_on_oom || sg_policy_now() == SG_OBSERVE)
		return;
	panic_on_oom_was = *panic_on_oom;
	WRITE_ONCE(*panic_on_oom, 0);
	pr_notice("panic_on_oom was %d and is 0 while the guard is loaded: the OOM killer works\n",
		  panic_on_oom_was);
}

/* What an operator has set since then stays. */
void sg_policy_rearm_oom(void)
{
	if (panic_on_oom && panic_on_oom_was && !*panic_on_oom)
		WRITE_ONCE(*panic_on_oom, panic_on_oom_was);
}

void sg_policy_forget_oom(void)
{
	if (panic_on_oom)
		WRITE_ONCE(*panic_on_oom, 0);
}

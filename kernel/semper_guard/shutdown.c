// SPDX-License-Identifier: GPL-2.0
/*
 * An orderly shutdown or reboot waits for the VMs, within a bound.
 *
 * The last line only: systemd ends user space before it calls reboot(2), so the agent needs an inhibitor
 * of logind as well.
 */
#include <linux/completion.h>
#include <linux/jiffies.h>
#include <linux/kernel.h>
#include <linux/notifier.h>
#include <linux/reboot.h>

#include "policy.h"
#include "shutdown.h"

static DECLARE_COMPLETION(evacuated);

static int hold(struct notifier_block *block, unsigned long action, void *unused)
{
	unsigned int seconds = sg_policy_hold_shutdown_s();

	if (!seconds || sg_policy_allows() || sg_policy_now() == SG_OBSERVE)
		return NOTIFY_DONE;
	pr_notice("the shutdown waits for \"evacuated\", %u s at most\n", seconds);
	if (!wait_for_completion_timeout(&evacuated, (unsigned long)seconds * HZ))
		pr_warn("nobody evacuated in %u s: the shutdown goes on\n", seconds);
	return NOTIFY_DONE;
}

static struct notifier_block block = {
	.notifier_call = hold,
	.priority = INT_MAX,
};

void sg_shutdown_go_on(void)
{
	complete_all(&evacuated);
}

int sg_shutdown_init(void)
{
	return register_reboot_notifier(&block);
}

void sg_shutdown_exit(void)
{
	unregister_reboot_notifier(&block);
}

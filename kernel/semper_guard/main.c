// SPDX-License-Identifier: GPL-2.0
/*
 * semper_guard: outlives the host kernel's own death, until the virtual machines are elsewhere.
 *
 * Implements the kernel's part of the method of US10552210B2. docs/design/guard.md has the design.
 */
#include <linux/module.h>
#include <linux/version.h>
#include <asm/cpufeature.h>

#include "device.h"
#include "entries.h"
#include "events.h"
#include "hooks.h"
#include "lockup.h"
#include "parking.h"
#include "policy.h"
#include "postponed.h"
#include "scene.h"
#include "selftest.h"
#include "shutdown.h"
#include "symbols.h"

/* Why this kernel cannot be guarded, or NULL. What was never tried is not tried on somebody's host. */
static const char *unsupported(void)
{
	if (LINUX_VERSION_CODE < KERNEL_VERSION(6, 1, 0) ||
	    LINUX_VERSION_CODE >= KERNEL_VERSION(6, 13, 0))
		return "the guard was tried on kernels 6.1 and 6.12 only";
	if (sg_symbol("vpanic"))
		return "its panic() goes by vpanic(), which the guard does not know";
	if (IS_ENABLED(CONFIG_PREEMPT_RT))
		return "PREEMPT_RT is not supported";
#ifdef X86_FEATURE_FRED
	if (cpu_feature_enabled(X86_FEATURE_FRED))
		return "FRED is in use, and returns from NMIs by other frames";
#endif
	return NULL;
}

static int __init init(void)
{
	const char *why;
	int error = sg_symbols_init();

	if (error)
		return error;
	why = unsupported();
	if (why) {
		pr_err("not loaded: %s\n", why);
		return -EOPNOTSUPP;
	}
	error = sg_selftest();
	if (error)
		return error;
	sg_events_init();
	sg_postponed_init();
	sg_parking_init();
	sg_scene_init();
	error = sg_device_init();
	if (error)
		goto undo_events;
	error = sg_lockup_init();
	if (error)
		goto undo_device;
	error = sg_shutdown_init();
	if (error)
		goto undo_lockup;
	sg_entries_init();
	error = sg_hooks_init();
	if (error)
		goto undo_entries;
	sg_policy_disarm_oom();
	pr_info("armed, policy %s\n", sg_policy_name(sg_policy_now()));
	return 0;

undo_entries:
	sg_entries_exit();
	sg_shutdown_exit();
undo_lockup:
	sg_lockup_exit();
undo_device:
	sg_device_exit();
undo_events:
	sg_events_exit();
	sg_postponed_exit();
	return error;
}

/* Never while a thread is parked: each of them holds a reference to the module. */
static void __exit leave(void)
{
	sg_policy_rearm_oom();
	sg_hooks_exit();
	sg_entries_exit();
	sg_shutdown_exit();
	sg_lockup_exit();
	sg_device_exit();
	sg_events_exit();
	sg_postponed_exit();
	pr_info("disarmed\n");
}

module_init(init);
module_exit(leave);

MODULE_LICENSE("GPL");
MODULE_AUTHOR("The sempervirt authors");
MODULE_DESCRIPTION("Puts the host kernel's death off until its virtual machines are elsewhere");
MODULE_VERSION("0.1.0");

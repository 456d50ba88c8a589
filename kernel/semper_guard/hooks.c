// SPDX-License-Identifier: GPL-2.0
/*
 * The five functions by which a kernel dies.
 *
 * An ftrace handler rewrites where the call goes. PERMANENT: /proc/sys/kernel/ftrace_enabled cannot take
 * the hooks away. IPMODIFY: one such user for each function, so a livepatch of panic(), or a kprobe with
 * a post-handler there, is in the way, and is named.
 */
#include <linux/ftrace.h>
#include <linux/percpu.h>
#include <linux/preempt.h>
#include <linux/rcupdate.h>

#include "guard.h"
#include "hooks.h"
#include "policy.h"
#include "symbols.h"

enum hooked {
	PANIC,
	NMI_PANIC,	/* claims panic_cpu before it calls panic() */
	WARNING,
	CRASH_KEXEC,	/* before panic(), when an oops has a crash kernel to go to */
	RESTART,
	HOOKS
};

struct hook {
	const char *name;
	void *to;
	unsigned long address;
	struct ftrace_ops ops;
};

static struct hook hooks[HOOKS] = {
	[PANIC] = { .name = "panic", .to = (void *)sg_guard_panic },
	[NMI_PANIC] = { .name = "nmi_panic", .to = sg_guard_nmi_panic },
	[WARNING] = { .name = "check_panic_on_warn", .to = sg_guard_warning },
	[CRASH_KEXEC] = { .name = "crash_kexec", .to = sg_guard_crash_kexec },
	[RESTART] = { .name = "emergency_restart", .to = sg_guard_restart },
};

static DEFINE_PER_CPU(int, bypass);

static void notrace enter(unsigned long ip, unsigned long parent_ip, struct ftrace_ops *ops,
			  struct ftrace_regs *fregs)
{
	struct hook *hook = container_of(ops, struct hook, ops);
	struct pt_regs *regs = ftrace_get_regs(fregs);

	if (!regs || sg_policy_allows() || raw_cpu_read(bypass))
		return;
	regs->ip = (unsigned long)hook->to;
}

void sg_hooks_bypass_begin(void)
{
	preempt_disable_notrace();
	raw_cpu_inc(bypass);
}

void sg_hooks_bypass_end(void)
{
	raw_cpu_dec(bypass);
	preempt_enable_notrace();
}

void sg_hooks_nmi_panic(struct pt_regs *regs, const char *message)
{
	((void (*)(struct pt_regs *, const char *))hooks[NMI_PANIC].address)(regs, message);
}

void sg_hooks_check_panic_on_warn(const char *origin)
{
	((void (*)(const char *))hooks[WARNING].address)(origin);
}

void sg_hooks_crash_kexec(struct pt_regs *regs)
{
	((void (*)(struct pt_regs *))hooks[CRASH_KEXEC].address)(regs);
}

void sg_hooks_emergency_restart(void)
{
	((void (*)(void))hooks[RESTART].address)();
}

/* Says who else rewrites calls of the function: kernel/trace/ftrace.c keeps them in a list. */
static void say_who_is_there(const struct hook *hook, unsigned long site)
{
	struct ftrace_ops **list = sg_variable("ftrace_ops_list");
	struct ftrace_ops *end = sg_variable("ftrace_list_end");
	void *(*lookup)(void *hash, unsigned long ip) = sg_variable("ftrace_lookup_ip");
	struct ftrace_ops *ops;
	bool found = false;

	if (list && end && lookup) {
		/* Operations are freed after a grace period. */
		rcu_read_lock();
		for (ops = *list; ops && ops != end; ops = rcu_dereference_raw(ops->next)) {
			if (!(ops->flags & (FTRACE_OPS_FL_IPMODIFY | FTRACE_OPS_FL_DIRECT)) ||
			    !lookup(rcu_dereference_raw(ops->func_hash->filter_hash), site))
				continue;
			pr_err("%s() is rewritten by %ps already; unload that first\n",
			       hook->name, ops->func);
			found = true;
		}
		rcu_read_unlock();
	}
	if (!found)
		pr_err("%s() cannot be hooked: busy, or kernel.ftrace_enabled is 0\n", hook->name);
}

static int install(struct hook *hook)
{
	unsigned long site;
	int error;

	hook->address = sg_symbol(hook->name);
	site = hook->address ? sg_ftrace_site(hook->address) : 0;
	if (!site) {
		pr_err("this kernel has no %s() that ftrace can hook\n", hook->name);
		return -ENOENT;
	}
	hook->ops.func = enter;
	hook->ops.flags = FTRACE_OPS_FL_SAVE_REGS | FTRACE_OPS_FL_IPMODIFY |
			  FTRACE_OPS_FL_PERMANENT;
	error = ftrace_set_filter_ip(&hook->ops, site, 0, 0);
	if (!error)
		error = register_ftrace_function(&hook->ops);
	if (error == -EBUSY)
		say_who_is_there(hook, site);
	else if (error)
		pr_err("%s() cannot be hooked: error %d\n", hook->name, error);
	return error;
}

static void remove(struct hook *hook)
{
	unregister_ftrace_function(&hook->ops);
	ftrace_free_filter(&hook->ops);
}

int sg_hooks_init(void)
{
	int i, error;

	for (i = 0; i < HOOKS; i++) {
		error = install(&hooks[i]);
		if (error)
			goto undo;
	}
	return 0;
undo:
	while (i--)
		remove(&hooks[i]);
	synchronize_rcu();
	return error;
}

void sg_hooks_exit(void)
{
	int i;

	for (i = HOOKS - 1; i >= 0; i--)
		remove(&hooks[i]);
	/* guard.c runs with preemption off: nobody is in there any more. */
	synchronize_rcu();
}

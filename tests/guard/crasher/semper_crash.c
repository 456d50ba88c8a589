// SPDX-License-Identifier: GPL-2.0
/*
 * semper_crash: kills the kernel that it is loaded into, in a way that is written to /proc/semper_crash.
 *
 * For the machines of tests/guard alone. Writing returns only where the way does. A read of the file waits
 * for an RCU grace period and tells its length, for a health check.
 */
#include <linux/delay.h>
#include <linux/ftrace.h>
#include <linux/hrtimer.h>
#include <linux/interrupt.h>
#include <linux/irq_work.h>
#include <linux/kprobes.h>
#include <linux/kthread.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/proc_fs.h>
#include <linux/rcupdate.h>
#include <linux/rtnetlink.h>
#include <linux/sched.h>
#include <linux/smp.h>
#include <linux/spinlock.h>
#include <linux/timer.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>
#include <linux/workqueue.h>
#include <asm/apic.h>
#include <asm/nmi.h>

struct way {
	const char *name;
	void (*crash)(void);
};

/* One for each way: a lock that a parked thread has left stays locked. */
static DEFINE_SPINLOCK(plain_lock);
static DEFINE_SPINLOCK(irq_lock);
static DEFINE_SPINLOCK(bh_lock);
static int *volatile nothing;
static const int constant = 1;

static void write_to_null(void)
{
	*nothing = 1;
}

/* -- in the thread that writes -------------------------------------------------------------- */

static void direct_panic(void)
{
	panic("a direct %s", "panic\n");
}

static void call_null(void)
{
	void (*volatile function)(void) = NULL;

	function();
}

static void write_read_only(void)
{
	*(volatile int *)&constant = 2;
}

static void beyond_vmalloc(void)
{
	char *page = vmalloc(PAGE_SIZE);

	if (page)
		((volatile char *)page)[PAGE_SIZE] = 1;
}

static void not_canonical(void)
{
	*(volatile int *)0xdead000000000100UL = 1;
}

static void bug(void)
{
	BUG();
}

static void broken_stack(void)
{
	void __stack_chk_fail(void);

	__stack_chk_fail();
}

static void divide(void)
{
	asm volatile("xor %%edx, %%edx\n\tmov $1, %%eax\n\tdiv %%edx" ::: "eax", "edx");
}

static void with_spinlock(void)
{
	spin_lock(&plain_lock);
	BUG();
}

static void with_spinlock_irqs_off(void)
{
	unsigned long flags;

	spin_lock_irqsave(&irq_lock, flags);
	write_to_null();
	spin_unlock_irqrestore(&irq_lock, flags);
}

static void with_spinlock_bh(void)
{
	spin_lock_bh(&bh_lock);
	BUG();
}

static void no_preemption(void)
{
	preempt_disable();
	panic("without preemption");
}

static void in_rcu(void)
{
	rcu_read_lock();
	BUG();
}

static void in_nested_rcu(void)
{
	rcu_read_lock();
	rcu_read_lock();
	write_to_null();
}

static void with_mmap_lock(void)
{
	mmap_write_lock(current->mm);
	BUG();
}

static void with_rtnl(void)
{
	rtnl_lock();
	BUG();
}

static noinline int deeper(int depth)
{
	volatile char frame[512];

	frame[0] = depth;
	return deeper(depth + 1) + frame[0];
}

static void stack(void)
{
	deeper(0);
}

static void warning(void)
{
	WARN(1, "a warning");
}

static void loop(void)
{
	for (;;)
		cpu_relax();
}

static void loop_no_preemption(void)
{
	preempt_disable();
	loop();
}

static void loop_irqs_off(void)
{
	local_irq_disable();
	loop();
}

static void hang(void)
{
	set_current_state(TASK_UNINTERRUPTIBLE);
	schedule();
}

static void all_memory(void)
{
	while (alloc_page(GFP_HIGHUSER))
		cond_resched();
}

/* -- in other threads ------------------------------------------------------------------------ */

static void work_bug(struct work_struct *work)
{
	BUG();
}
static DECLARE_WORK(work, work_bug);

static void in_worker(void)
{
	schedule_work(&work);
}

static int thread_panic(void *unused)
{
	panic("in a kernel thread");
	return 0;
}

static void in_kthread(void)
{
	kthread_run(thread_panic, NULL, "semper_crash");
}

static int thread_null(void *unused)
{
	write_to_null();
	return 0;
}

static void null_in_kthread(void)
{
	kthread_run(thread_null, NULL, "vhost-%d", current->pid);
}

static int thread_bound(void *unused)
{
	panic("in a thread of its CPU");
	return 0;
}

static void in_bound_kthread(void)
{
	struct task_struct *task = kthread_create(thread_bound, NULL, "semper_bound");

	if (IS_ERR(task))
		return;
	kthread_bind(task, 0);
	wake_up_process(task);
}

/* -- in interrupts --------------------------------------------------------------------------- */

static enum hrtimer_restart hrtimer_null(struct hrtimer *timer)
{
	write_to_null();
	return HRTIMER_NORESTART;
}
static struct hrtimer hrtimer;

static void in_hrtimer(void)
{
	hrtimer_init(&hrtimer, CLOCK_MONOTONIC, HRTIMER_MODE_REL_HARD);
	hrtimer.function = hrtimer_null;
	hrtimer_start(&hrtimer, ms_to_ktime(20), HRTIMER_MODE_REL_HARD);
}

static void timer_null(struct timer_list *timer)
{
	write_to_null();
}
static DEFINE_TIMER(timer, timer_null);

static void in_timer(void)
{
	mod_timer(&timer, jiffies + 5);
}

static void tasklet_bug(struct tasklet_struct *tasklet)
{
	BUG();
}
static DECLARE_TASKLET(tasklet, tasklet_bug);

static void in_tasklet(void)
{
	tasklet_schedule(&tasklet);
}

static void irq_work_null(struct irq_work *irq_work)
{
	write_to_null();
}
static DEFINE_IRQ_WORK(irq_work, irq_work_null);

static void in_irq_work(void)
{
	irq_work_queue(&irq_work);
}

static void remote_panic(void *unused)
{
	panic("in a call from another CPU");
}

static void in_remote_call(void)
{
	smp_call_function(remote_panic, NULL, false);
}

static int panic_by_nmi(unsigned int command, struct pt_regs *regs)
{
	panic("in an NMI");
	return NMI_HANDLED;
}

static int nmi_panic_by_nmi(unsigned int command, struct pt_regs *regs)
{
	nmi_panic(regs, "NMI: Not continuing");
	return NMI_HANDLED;
}

/* To its own CPU. The interrupt controller is not exported in every kernel. */
static void send_nmi(void)
{
	struct kprobe probe = { .symbol_name = "kallsyms_lookup_name" };
	unsigned long (*lookup)(const char *name);
	struct apic **controller;

	if (register_kprobe(&probe))
		return;
	lookup = (void *)probe.addr;
	unregister_kprobe(&probe);
	controller = (void *)lookup("apic");
	(*controller)->send_IPI(raw_smp_processor_id(), NMI_VECTOR);
}

static void inside_nmi(void)
{
	register_nmi_handler(NMI_LOCAL, panic_by_nmi, NMI_FLAG_FIRST, "semper_crash");
	send_nmi();
}

static void by_nmi_panic(void)
{
	register_nmi_handler(NMI_LOCAL, nmi_panic_by_nmi, NMI_FLAG_FIRST, "semper_crash");
	send_nmi();
	udelay(100);
	unregister_nmi_handler(NMI_LOCAL, "semper_crash");
}

/* No death: another user of a function that the guard hooks, which is then in the way. */
static void notrace leave_as_is(unsigned long ip, unsigned long parent_ip, struct ftrace_ops *ops,
				struct ftrace_regs *fregs)
{
}

static struct ftrace_ops occupier = {
	.func = leave_as_is,
	.flags = FTRACE_OPS_FL_SAVE_REGS | FTRACE_OPS_FL_IPMODIFY,
};

static void occupy(void)
{
	ftrace_set_filter(&occupier, "nmi_panic", strlen("nmi_panic"), 1);
	register_ftrace_function(&occupier);
}

static void vacate(void)
{
	unregister_ftrace_function(&occupier);
}

static const struct way ways[] = {
	{ "occupy", occupy },
	{ "vacate", vacate },
	{ "panic", direct_panic },
	{ "null", write_to_null },
	{ "call-null", call_null },
	{ "read-only", write_read_only },
	{ "guard-page", beyond_vmalloc },
	{ "not-canonical", not_canonical },
	{ "bug", bug },
	{ "broken-stack", broken_stack },
	{ "divide", divide },
	{ "spinlock", with_spinlock },
	{ "spinlock-irqs-off", with_spinlock_irqs_off },
	{ "spinlock-bh", with_spinlock_bh },
	{ "no-preemption", no_preemption },
	{ "rcu", in_rcu },
	{ "nested-rcu", in_nested_rcu },
	{ "mmap-lock", with_mmap_lock },
	{ "rtnl", with_rtnl },
	{ "stack", stack },
	{ "warning", warning },
	{ "loop", loop },
	{ "loop-no-preemption", loop_no_preemption },
	{ "loop-irqs-off", loop_irqs_off },
	{ "hang", hang },
	{ "all-memory", all_memory },
	{ "worker", in_worker },
	{ "kthread", in_kthread },
	{ "vhost", null_in_kthread },
	{ "bound-kthread", in_bound_kthread },
	{ "hrtimer", in_hrtimer },
	{ "timer", in_timer },
	{ "tasklet", in_tasklet },
	{ "irq-work", in_irq_work },
	{ "remote-call", in_remote_call },
	{ "nmi", inside_nmi },
	{ "nmi-panic", by_nmi_panic },
};

static ssize_t crash(struct file *file, const char __user *from, size_t size, loff_t *offset)
{
	char name[32];
	int i;

	if (!size || size >= sizeof(name) || copy_from_user(name, from, size))
		return -EINVAL;
	name[size] = '\0';
	if (name[size - 1] == '\n')
		name[size - 1] = '\0';
	for (i = 0; i < ARRAY_SIZE(ways); i++) {
		if (!strcmp(name, ways[i].name)) {
			pr_emerg("semper_crash: %s\n", name);
			ways[i].crash();
			return size;
		}
	}
	return -EINVAL;
}

static ssize_t grace_period(struct file *file, char __user *to, size_t size, loff_t *offset)
{
	u64 begin = ktime_get_ns();
	char text[32];
	int length;

	if (*offset)
		return 0;
	synchronize_rcu();
	length = scnprintf(text, sizeof(text), "%llu\n", ktime_get_ns() - begin);
	return simple_read_from_buffer(to, size, offset, text, length);
}

static const struct proc_ops operations = {
	.proc_write = crash,
	.proc_read = grace_period,
};

static int __init init(void)
{
	return proc_create("semper_crash", 0600, NULL, &operations) ? 0 : -ENOMEM;
}
module_init(init);

MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Kills the kernel on purpose, for tests");

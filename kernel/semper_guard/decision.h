/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The decision: must this host die of what just happened, or is there a way to go on?
 *
 * A pure function of values. It is compiled into the module, and by tests as a user-space library that
 * tries every combination against the table in docs/design/guard.md.
 */
#ifndef SEMPER_GUARD_DECISION_H
#define SEMPER_GUARD_DECISION_H

#ifdef __KERNEL__
#include <linux/types.h>
#else
#include <stdbool.h>
#endif

/* What was about to happen. */
enum sg_kind {
	SG_PANIC,		/* panic() */
	SG_OUT_OF_MEMORY,	/* panic() by panic_on_oom */
	SG_SOFT_LOCKUP,		/* panic() by softlockup_panic, in the watchdog's timer */
	SG_HARD_LOCKUP,		/* an NMI found a CPU that takes no interrupts */
	SG_NMI_PANIC,		/* nmi_panic() for any other reason */
	SG_WARNING,		/* check_panic_on_warn() */
	SG_CRASH_KEXEC,		/* crash_kexec(), which comes before panic() */
	SG_RESTART,		/* emergency_restart() */
	SG_KINDS
};

/* What the CPU was doing. */
enum sg_context {
	SG_TASK,
	SG_SOFTIRQ,		/* serving, not merely disabled */
	SG_HARDIRQ,
	SG_NMI,
	SG_STACK_FAULT,		/* on the stack of the double fault: the thread's own is used up */
	SG_CONTEXTS
};

/* Whose thread it was. */
enum sg_thread {
	SG_USER,		/* of a process: QEMU's, perhaps */
	SG_KTHREAD,
	SG_PER_CPU,		/* a kernel thread that its CPU cannot do without */
	SG_IDLE,		/* pid 0: it can never be parked */
	SG_INIT,		/* pid 1 */
	SG_THREADS
};

/* Each policy survives what the one before it does, and more. */
enum sg_policy {
	SG_OBSERVE,		/* events only */
	SG_STRICT,		/* only where nothing is known to be left locked */
	SG_LENIENT,		/* also where locks stay locked for ever */
	SG_IRQ_RESTART,		/* also in interrupts, which are begun again */
	SG_POLICIES
};

enum sg_verdict {
	SG_LET_HAPPEN,		/* the real function runs */
	SG_PARK,		/* this thread sleeps for ever */
	SG_REDIRECT,		/* the thread that loops will sleep for ever */
	SG_BEGIN_AGAIN,		/* the interrupted handler runs once more from its entry */
	SG_GO_ON,		/* the call returns as if nothing had been asked */
	SG_VERDICTS
};

enum sg_reason {
	SG_ALLOWED,		/* an operator, the agent or the deadline said so */
	SG_OBSERVING,
	SG_NESTED,		/* a fatal error while the guard dealt with another on this CPU */
	SG_TOO_MANY,		/* max_events were survived already */
	SG_CRASH_KERNEL,	/* one is loaded, and comes first by policy */
	SG_MAY_RETURN,		/* the caller can live with a return */
	SG_NO_LOCK_KNOWN,	/* nothing known is left locked */
	SG_LOCK_LEFT,		/* a lock may stay locked for ever; the policy accepts that */
	SG_LOCK_HELD,		/* the same, and the policy does not accept that */
	SG_IDLE_THREAD,
	SG_CPU_THREAD,		/* without this thread its CPU is of no use; strict */
	SG_RESTARTABLE,		/* what the handler began with is known */
	SG_NOT_RESTARTABLE,
	SG_IN_INTERRUPT,	/* the policy does not begin interrupts again */
	SG_IN_NMI,
	SG_STACK_USED_UP,
	SG_LOOP_REACHED,
	SG_LOOP_NOT_REACHED,	/* the loop goes on, its CPU is lost, the host lives */
	SG_OOM_DISARMED,	/* oom_lock is given back, and panic_on_oom cleared */
	SG_OOM_LOCK_UNKNOWN,	/* without oom_lock every allocation would wait for ever */
	SG_REASONS
};

/* The running state of the machine, as far as the decision depends on that. */
struct sg_state {
	int policy;		/* enum sg_policy */
	int kind;		/* enum sg_kind */
	int context;		/* enum sg_context */
	int thread;		/* enum sg_thread */
	unsigned int depth;	/* preemption off: spin locks held, or preempt_disable() */
	bool bh_off;		/* softirqs off, by spin_lock_bh() perhaps */
	bool known_lock;	/* a mutex that many need is known to be the thread's */
	unsigned int rcu_depth;	/* told only: parking leaves the readers' sections */
	bool reachable;		/* the loop can be redirected: kernel code, and its frame was found */
	bool restartable;	/* the entry of the running handler was recorded, and is sound */
	bool oom_lock;		/* the thread holds oom_lock, and its address is known */
	bool nested;
	bool allowed;
	bool crash_kernel_first; /* one is loaded, and the policy prefers its dump */
	unsigned int before;	/* fatal errors survived so far */
	unsigned int max_events;
};

struct sg_decision {
	int verdict;		/* enum sg_verdict */
	int reason;		/* enum sg_reason */
};

struct sg_decision sg_decide(const struct sg_state *state);

const char *sg_kind_name(int kind);
const char *sg_context_name(int context);
const char *sg_thread_name(int thread);
const char *sg_policy_name(int policy);
const char *sg_verdict_name(int verdict);
const char *sg_reason_name(int reason);

#endif

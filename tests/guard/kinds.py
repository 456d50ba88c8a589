"""The ways in which a kernel dies, and what the guard has to make of each.

Ways that leave nothing behind which a later one needs are tried one after the other in one boot.
What ends the boot, or something in it, has a boot of its own, or comes last.
"""

from __future__ import annotations

from dataclasses import dataclass

SYSCTL = "/proc/sys/kernel"
PROC = "echo {} >/proc/semper_crash"


@dataclass(frozen=True)
class Kind:
    """A way to die, and the last event of the incident as it must be."""

    name: str
    command: str
    verdict: str
    reason: str
    kind: str = "panic"
    context: str = "task"
    before: str = ""
    """A command that makes the way deadly: a sysctl, usually."""
    after: str = ""
    """Takes that back."""
    deadline_s: float = 120.0
    quick: bool = False
    """Part of `make test`."""


def of(name: str, verdict: str, reason: str, *, quick: bool = False, context: str = "task") -> Kind:
    """A way of the crasher's."""
    return Kind(name, PROC.format(name), verdict, reason, context=context, quick=quick)


def lockup(way: str, kind: str, reason: str, *, quick: bool = False) -> Kind:
    """A CPU that loops; the watchdogs are told to be quick about it."""
    return Kind(
        way, PROC.format(way), "redirect", reason, kind=kind, quick=quick,
        before=f"echo 3 >{SYSCTL}/watchdog_thresh; echo 1 >{SYSCTL}/softlockup_panic",
        after=f"echo 0 >{SYSCTL}/softlockup_panic; echo 10 >{SYSCTL}/watchdog_thresh",
    )  # fmt: skip


FREE = "no-lock-known"
LEFT = "lock-left"

# Under `irq-restart`, in this order, in one boot.
SURVIVED = (
    of("panic", "park", FREE, quick=True),
    Kind("sysrq-c", "echo c >/proc/sysrq-trigger", "park", FREE, quick=True),
    of("null", "park", FREE, quick=True),
    of("call-null", "park", FREE),
    of("read-only", "park", FREE),
    of("guard-page", "park", FREE),
    of("not-canonical", "park", FREE),
    of("bug", "park", FREE),
    of("divide", "park", FREE),
    of("broken-stack", "park", FREE, quick=True),
    of("rcu", "park", FREE),
    of("nested-rcu", "park", FREE, quick=True),
    of("mmap-lock", "park", FREE, quick=True),
    of("no-preemption", "park", LEFT),
    of("spinlock", "park", LEFT, quick=True),
    of("spinlock-irqs-off", "park", LEFT),
    of("spinlock-bh", "park", LEFT),
    of("worker", "park", FREE, quick=True),
    of("kthread", "park", FREE),
    of("vhost", "park", FREE, quick=True),
    of("bound-kthread", "park", FREE),
    of("hrtimer", "begin-again", "restartable", context="hardirq", quick=True),
    of("timer", "begin-again", "restartable", context="softirq", quick=True),
    of("tasklet", "begin-again", "restartable", context="softirq"),
    of("stack", "park", "stack-used-up", context="stack-fault", quick=True),
    Kind("nmi-panic", PROC.format("nmi-panic"), "go-on", "may-return", kind="nmi-panic",
         context="nmi", quick=True),
    Kind("warning", PROC.format("warning"), "go-on", "may-return", kind="warning", quick=True,
         before="echo 1 >/proc/sys/kernel/panic_on_warn",
         after="echo 0 >/proc/sys/kernel/panic_on_warn"),
    Kind("sysrq-b", "echo b >/proc/sysrq-trigger", "go-on", "may-return", kind="restart",
         quick=True),
    lockup("loop", "soft-lockup", "loop-reached", quick=True),
    lockup("loop-no-preemption", "soft-lockup", LEFT),
    lockup("loop-irqs-off", "hard-lockup", "loop-reached", quick=True),
)  # fmt: skip

# Each in a boot of its own: it needs a kernel without an oops, or leaves something out of order.
ALONE = (
    Kind("hang", PROC.format("hang"), "park", FREE,
         before="echo 3 >/proc/sys/kernel/hung_task_timeout_secs; "
                "echo 1 >/proc/sys/kernel/hung_task_panic"),
    # The sysctl is set after the guard has cleared it.
    Kind("out-of-memory", "tail /dev/zero", "park", "oom-disarmed", kind="out-of-memory",
         before="echo 1 >/proc/sys/vm/panic_on_oom"),
    Kind("init", "touch /tmp/die", "park", FREE, quick=True),
)  # fmt: skip

# What must be let happen, by policy.
FATAL = (
    ("strict", of("spinlock", "let-happen", "lock-held")),
    ("strict", of("rtnl", "let-happen", "lock-held")),
    ("strict", of("stack", "let-happen", "stack-used-up")),
    ("strict", of("bound-kthread", "let-happen", "cpu-thread")),
    ("lenient", of("hrtimer", "let-happen", "in-interrupt")),
    ("irq-restart", of("irq-work", "let-happen", "not-restartable")),
    ("irq-restart", of("nmi", "let-happen", "in-nmi")),
    ("observe", of("panic", "let-happen", "observing")),
)


def named(name: str) -> Kind:
    """One that is survived."""
    return next(kind for kind in (*SURVIVED, *ALONE) if kind.name == name)

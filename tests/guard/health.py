"""Whether a host works: what an agent and a migration need of the kernel, and more."""

from __future__ import annotations

from sempervirt.demo.guard.emulated import NoAnswerError
from tests.guard.machine import Machine

# Each ends with status 0 on a host that works. `ps` does not read /proc/PID/cmdline, which waits
# for ever for a parked thread that holds its process's mmap_lock.
CHECKS = {
    "processes": "for i in 1 2 3 4 5; do /bin/busybox true || exit 1; done",
    "files": "dd if=/dev/urandom of=/tmp/file bs=4k count=64 2>/dev/null && sync && rm /tmp/file",
    "grace periods": "cat /proc/semper_crash",
    "modules": "insmod /lib/dummy.ko && rmmod dummy",
    "loopback": "ping -c 2 -i 0.2 -W 3 127.0.0.1",
    "processors": "taskset 1 /bin/busybox true && taskset 2 /bin/busybox true",
    "process list": "ps -o pid,comm,stat",
    "mounts": "mkdir -p /tmp/m && mount -t tmpfs m /tmp/m && umount /tmp/m",
    "interfaces": "ip link set lo down && ip link set lo up",
    "time": "a=$(cat /tmp/beat); sleep 1; b=$(cat /tmp/beat); [ $b -gt $a ]",
    "device": "[ -c /dev/semper_guard ]",
}
CHECK_S = 20


def faults(machine: Machine) -> list[str]:
    """The checks that fail, with what they say; none on a host that works."""
    # One question for all: each costs a round trip over an emulated serial port.
    body = " ".join(
        f"timeout {CHECK_S} sh -c '{command}' >/tmp/check 2>&1 "
        f"|| {{ echo '{name}:'; cat /tmp/check; }};"
        for name, command in CHECKS.items()
    )
    try:
        said = machine.do(body + " true", deadline_s=CHECK_S * len(CHECKS))
    except NoAnswerError as error:
        return [f"no answer: {error}"]
    return said.splitlines()

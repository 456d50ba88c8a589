"""Where signs come from: the device's lines, the log, counters, pressure, records; hostile ones
too.
"""

from __future__ import annotations

import json
import random
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sempervirt.guard.signs import EVIDENCE_CHARACTERS, SignId
from sempervirt.guard.sources.counters import Counter, Taint, kernel_counters, machine_checks
from sempervirt.guard.sources.kernel_log import KernelLog, read_record
from sempervirt.guard.sources.module import ModuleDevice, read_line
from sempervirt.guard.sources.pressure import Pressure, Thermal, stalled
from sempervirt.guard.sources.records import Rasdaemon, Smart, smart_problem
from sempervirt.guard.sources.source import AbsentError

EVENT = {
    "v": 1, "seq": 3, "incident": 3, "lost": 0, "ns": 19775584000, "kind": "panic",
    "verdict": "park", "reason": "no-lock-known", "policy": "strict", "context": "task",
    "thread": "user", "caller": "oops_end.cold", "cpu": 0, "pid": 796, "tgid": 790, "owner": 0,
    "comm": "CPU 1/KVM", "depth": 0, "bh_off": False, "irqs_off": False, "rcu_depth": 0,
    "preempt_count": 0, "lock": "", "before": 0, "message": "Fatal exception",
}  # fmt: skip


def line(**changed: object) -> bytes:
    return json.dumps({**EVENT, **changed}).encode() + b"\n"


# The module's device


def test_a_line_of_the_device_is_a_sign_with_the_process_that_is_broken() -> None:
    sign = read_line(line())
    assert sign.id is SignId.MODULE_PANIC
    assert sign.broken == (790,)
    assert "CPU 1/KVM[796], park (no-lock-known): Fatal exception" in sign.evidence


def test_a_worker_of_vhost_breaks_the_process_that_it_works_for() -> None:
    assert read_line(line(tgid=2, owner=790)).broken == (2, 790)


@pytest.mark.parametrize("verdict", ["go-on", "begin-again", "let-happen"])
def test_where_no_thread_was_parked_nothing_is_broken(verdict: str) -> None:
    assert read_line(line(verdict=verdict)).broken == ()


@pytest.mark.parametrize(
    "kind",
    ["panic", "out-of-memory", "soft-lockup", "hard-lockup", "nmi-panic", "warning", "crash-kexec",
     "restart"],
)  # fmt: skip
def test_every_kind_that_the_module_names_has_its_sign(kind: str) -> None:
    source = Path(__file__).parents[2] / "kernel/semper_guard/decision.c"
    assert f'"{kind}"' in source.read_text()
    assert read_line(line(kind=kind)).id.value == f"module.{kind}"


@pytest.mark.parametrize(
    "hostile",
    [
        b"", b"\n", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 1024, b'{"v":1}', b"0" * 5000,
        line(v=2), line(v="1"), line(kind="boredom"), line(tgid=-1), line(tgid=1 << 40),
        line(pid=True), line(message=5), line(seq=1.5), line(kind="x" * 900),
        line(message="x" * 2000),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_a_sign_of_its_own_and_harms_nobody(hostile: bytes) -> None:
    sign = read_line(hostile)
    assert sign.id is SignId.MODULE_UNREADABLE
    assert sign.broken == ()
    assert len(sign.evidence) <= EVIDENCE_CHARACTERS
    assert sign.evidence.isprintable()


@given(st.binary(max_size=1200))
def test_no_bytes_make_the_reader_raise(content: bytes) -> None:
    assert read_line(content).evidence.isprintable()


def test_lines_with_a_byte_changed_are_read_or_unreadable() -> None:
    chance = random.Random(1)
    for _ in range(3000):
        content = bytearray(line())
        content[chance.randrange(len(content))] = chance.randrange(256)
        sign = read_line(bytes(content))
        assert all(1 < pid <= 1 << 22 for pid in sign.broken)


def test_a_device_that_is_not_there_is_absent_and_a_file_in_its_place_too(tmp_path: Path) -> None:
    with pytest.raises(AbsentError, match="not loaded"):
        ModuleDevice(tmp_path / "none").look(0)
    (tmp_path / "file").write_bytes(line())
    with pytest.raises(AbsentError, match="not the module's device"):
        ModuleDevice(tmp_path / "file").look(0)


# The kernel's log

MEANT = {
    SignId.LOG_OOPS: (
        "BUG: kernel NULL pointer dereference, address: 0000000000000000",
        "BUG: unable to handle page fault for address: ffffc90000a3f000",
        "general protection fault, probably for non-canonical address 0xdead: 0000 [#1] SMP",
        "kernel BUG at mm/slub.c:435!", "Oops: 0002 [#1] PREEMPT SMP NOPTI",
        "list_add corruption. prev->next should be next", "invalid opcode: 0000 [#1] SMP",
        "Oops: Oops: 0002 [#1] PREEMPT SMP NOPTI", "Oops: divide error: 0000 [#1] SMP NOPTI",
        "Oops: general protection fault, probably for non-canonical address 0xdead: 0000 [#1] SMP",
        "Kernel panic - not syncing: Fatal exception", "double fault: 0000 [#1] PREEMPT SMP",
    ),
    SignId.LOG_SOFT_LOCKUP: (
        "watchdog: BUG: soft lockup - CPU#3 stuck for 26s! [qemu-system-x86:1234]",
    ),
    SignId.LOG_HARD_LOCKUP: (
        "NMI watchdog: Watchdog detected hard LOCKUP on cpu 1",
        "watchdog: CPU2: Watchdog detected hard LOCKUP on cpu 3",
    ),
    SignId.LOG_HUNG_TASK: ("INFO: task jbd2/sda1-8:300 blocked for more than 120 seconds.",),
    SignId.LOG_RCU_STALL: ("rcu: INFO: rcu_sched self-detected stall on CPU",
                           "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:"),
    SignId.LOG_WARNING: ("WARNING: CPU: 0 PID: 796 at kernel/sched/core.c:1 x+0x1/0x2",),
    SignId.LOG_MACHINE_CHECK: ("mce: [Hardware Error]: Machine check events logged",
                               "Memory failure: 0x1234: recovery action for dirty page: Failed"),
    SignId.LOG_NMI: ("Uhhuh. NMI received for unknown reason 3d on CPU 0.",),
    SignId.LOG_PCI_ERROR: ("pcieport 0000:00:1c.0: AER: Uncorrected (Fatal) error received",),
    SignId.LOG_STORAGE_ERROR: (
        "I/O error, dev sda, sector 2048 op 0x0:(READ) flags 0x80700",
        "critical medium error, dev sdb, sector 7", "nvme nvme0: controller is down; will reset",
        "Buffer I/O error on dev sda1, logical block 0, async page read",
    ),
    SignId.LOG_FILE_SYSTEM: (
        "EXT4-fs error (device sda1): ext4_lookup:1855: inode #2: comm ls: deleted inode",
        "EXT4-fs (sda1): Remounting filesystem read-only",
        "XFS (dm-0): Corruption detected. Unmount and run xfs_repair",
    ),
    SignId.LOG_OUT_OF_MEMORY: ("Out of memory: Killed process 12 (stress) total-vm:1kB",),
    SignId.LOG_THERMAL: ("CPU1: Core temperature is above threshold, cpu clock is throttled",),
    SignId.LOG_WATCHDOG: ("watchdog: watchdog0: pretimeout event",),
}  # fmt: skip


def record(text: str, priority: int = 4) -> bytes:
    return f"{priority},1234,5678901,-;{text}\n SUBSYSTEM=cpu\n".encode()


@pytest.mark.parametrize(
    ("sign", "text"), [(sign, text) for sign, texts in MEANT.items() for text in texts]
)
def test_what_the_kernel_says_has_its_sign(sign: SignId, text: str) -> None:
    found = read_record(record(text))
    assert found is not None
    assert found.id is sign
    # Whoever writes into the log from user space cannot pass for the kernel.
    assert read_record(record(text, priority=8 + 4)) is None
    # What stands within a text was chosen by somebody else: a name of a device, say.
    assert read_record(record(f"usb 1-1: Product: {text}")) is None


# What the kernel writes of a thread, whose name any user chooses, and of a file beside it.
OF_USERS = (
    "{name}[790]: segfault at 0 ip 000055d1 sp 00007ffd error 4 in {rest}[55d1+1000]",
    "{name} invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0, oom_score_adj=0",
    "{name}: page allocation failure: order:4, mode:0x40cc0(GFP_KERNEL|__GFP_COMP)",
    "{name} (790) used greatest stack depth: 12000 bytes left",
)


@pytest.mark.parametrize("text", [text for texts in MEANT.values() for text in texts])
@pytest.mark.parametrize("written", OF_USERS)
def test_no_name_of_a_thread_passes_for_a_fault(text: str, written: str) -> None:
    for length in range(1, 16):  # TASK_COMM_LEN
        name, rest = text[:length], text[length:]
        assert read_record(record(written.format(name=name, rest=rest))) is None, name


def test_every_sign_of_the_log_was_tried() -> None:
    assert set(MEANT) == {sign for sign in SignId if sign.value.startswith("log.")}


ORDINARY = """\
Linux version 6.1.0-57-cloud-amd64 (gcc-12 (Debian 12.2.0-14) 12.2.0)
Command line: BOOT_IMAGE=/boot/vmlinuz root=/dev/vda1 ro oops=panic panic=10
x86/fpu: Supporting XSAVE feature 0x001: 'x87 floating point registers'
rcu: Hierarchical RCU implementation.
rcu: \tRCU event tracing is enabled.
mce: CPU supports 10 MCE banks
NMI watchdog: Enabled. Permanently consumes one hw-PMU counter.
ACPI: PCI: Interrupt link LNKA configured for IRQ 10
pcieport 0000:00:1c.0: AER: enabled with IRQ 25
pcieport 0000:00:1c.0: AER: Corrected error received: 0000:00:1c.0
EDAC MC0: Giving out device to module skx_edac controller Skylake Socket#0 IMC#0
EXT4-fs (sda1): mounted filesystem with ordered data mode. Quota mode: none.
EXT4-fs (sda1): re-mounted. Quota mode: none.
XFS (dm-0): Ending clean mount
BTRFS info (device sdb): using crc32c
blk-mq: reduced tag depth (1023 -> 512)
sd 0:0:0:0: [sda] Attached SCSI disk
sd 2:0:0:0: [sdb] Synchronizing SCSI cache
nvme nvme0: 8/0/0 default/read/poll queues
nvme nvme0: pci function 0000:01:00.0
usb 1-1: new high-speed USB device number 3 using xhci_hcd
usb 1-1: USB disconnect, device number 3
usb 1-1: Product: Kernel panic - not syncing: BUG: unable to handle
cpu 3 is now offline
smpboot: Booting Node 0 Processor 3 APIC 0x3
Memory: 3908000K/4193716K available
systemd[1]: Hostname set to <Oops: 0002>.
kvm [1234]: ignored rdmsr: 0x140 data 0x0
kvm: SMP vm created on host with unstable TSC; guest TSC will not be reliable
qemu-system-x86[812]: segfault at 0 ip 00007f sp 00007f error 4 in libc.so.6
traps: python3[99] general protection fault ip:7f3 sp:7ff error:0 in libc.so.6
audit: type=1400 audit(1.1:2): apparmor="DENIED" operation="open" comm="kernel BUG at"
oom_reaper: reaped process 12 (stress), now anon-rss:0kB
stress invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0, oom_score_adj=0
hrtimer: interrupt took 4521234 ns
perf: interrupt took too long (2501 > 2500), lowering kernel.perf_event_max_sample_rate
clocksource: timekeeping watchdog on CPU0: Marking clocksource 'tsc' as unstable
TCP: request_sock_TCP: Possible SYN flooding on port 80. Sending cookies.
device tap0 entered promiscuous mode
bridge: filtering via arp/ip/ip6tables is no longer available by default
watchdog: watchdog0: watchdog did not stop!
semper_guard: armed, policy strict
CPU1: Core temperature/speed normal
virtio_balloon virtio3: Out of puff! Can't get 1 pages
""".splitlines()


@pytest.mark.parametrize("text", ORDINARY)
def test_what_a_healthy_kernel_says_is_no_sign(text: str) -> None:
    assert read_record(record(text)) is None


@pytest.mark.parametrize(
    "hostile", [b"", b";", b"4", b"-1,2,3,-;Oops: ", b"99999999,1;Oops: ", b"4,1,1,-;\xff" * 3000]
)
def test_a_record_that_is_none_is_no_sign(hostile: bytes) -> None:
    assert read_record(hostile) is None


@given(st.binary(max_size=400))
def test_no_record_makes_the_reader_raise(content: bytes) -> None:
    read_record(content)


def test_a_log_that_cannot_be_read_is_absent(tmp_path: Path) -> None:
    with pytest.raises(AbsentError):
        KernelLog(tmp_path / "none").look(0)


# Counters


def host(tmp_path: Path) -> tuple[Path, Path]:
    system, proc = tmp_path / "sys", tmp_path / "proc"
    (system / "kernel").mkdir(parents=True)
    (system / "devices/system/edac/mc/mc0").mkdir(parents=True)
    (proc / "sys/kernel").mkdir(parents=True)
    (system / "kernel/oops_count").write_text("3\n")
    (system / "kernel/warn_count").write_text("0\n")
    (system / "devices/system/edac/mc/mc0/ce_count").write_text("1\n")
    (system / "devices/system/edac/mc/mc0/ue_count").write_text("0\n")
    (proc / "interrupts").write_text(" MCE:   0   0   Machine check exceptions\n")
    (proc / "sys/kernel/tainted").write_text("4096\n")
    return system, proc


def test_a_counter_that_grows_is_a_sign_and_what_was_before_is_none(tmp_path: Path) -> None:
    system, proc = host(tmp_path)
    counters = {counter.name: counter for counter in kernel_counters(system, proc)}
    assert all(counter.look(0) == () for counter in counters.values())
    (system / "kernel/oops_count").write_text("5\n")
    (proc / "interrupts").write_text(" MCE:   0   1   Machine check exceptions\n")
    (system / "devices/system/edac/mc/mc0/ue_count").write_text("2\n")
    (oops,) = counters["oops counter"].look(0)
    assert (oops.id, oops.count) == (SignId.COUNTER_OOPS, 2)
    (check,) = counters["machine checks"].look(0)
    assert check.id is SignId.COUNTER_MACHINE_CHECK
    (memory,) = counters["uncorrected memory"].look(0)
    assert (memory.id, memory.count) == (SignId.MEMORY_UNCORRECTED, 2)
    assert all(counter.look(0) == () for counter in counters.values())


def test_a_counter_that_is_not_there_or_says_nonsense_is_told(tmp_path: Path) -> None:
    with pytest.raises(AbsentError, match="oopses"):
        kernel_counters(tmp_path, tmp_path)[0].look(0)
    system, proc = host(tmp_path)
    (system / "kernel/oops_count").write_text("many\n")
    with pytest.raises(ValueError, match="no number"):
        kernel_counters(system, proc)[0].look(0)


def test_a_counter_that_falls_is_no_sign() -> None:
    numbers = iter([5, 3, 4])
    counter = Counter("x", SignId.COUNTER_OOPS, "oopses", lambda: next(numbers))
    assert [len(counter.look(0)) for _ in range(3)] == [0, 0, 1]


def test_machine_checks_are_summed_over_the_processors() -> None:
    assert machine_checks("  0: 1\n MCE:  2  3   Machine check exceptions\n MCP: 9 9  polls\n") == 5
    with pytest.raises(FileNotFoundError):
        machine_checks("  0: 1\n")


def test_machine_checks_are_found_on_a_host_with_many_processors(tmp_path: Path) -> None:
    system, proc = host(tmp_path)
    lines = [f"{n:4}:" + f"{n:11}" * 256 + "  PCI-MSI nvme0q1\n" for n in range(300)]
    text = "".join(lines) + " MCE:{:11}" + f"{0:11}" * 255 + "   Machine check exceptions\n"
    (proc / "interrupts").write_text(text.format(0))
    (counter,) = (one for one in kernel_counters(system, proc) if one.name == "machine checks")
    assert counter.look(0) == ()
    (proc / "interrupts").write_text(text.format(1))
    assert [sign.id for sign in counter.look(0)] == [SignId.COUNTER_MACHINE_CHECK]


def test_a_bit_of_the_taint_is_a_sign_once(tmp_path: Path) -> None:
    _, proc = host(tmp_path)
    taint = Taint(proc)
    assert taint.look(0) == ()
    (proc / "sys/kernel/tainted").write_text(f"{4096 | 1 << 7 | 1 << 14}\n")
    assert [sign.id for sign in taint.look(0)] == [SignId.TAINT_DIED, SignId.TAINT_SOFT_LOCKUP]
    assert taint.look(0) == []


# Pressure and temperature


def test_pressure_is_a_sign_above_its_limit(tmp_path: Path) -> None:
    (tmp_path / "pressure").mkdir()
    path = tmp_path / "pressure/memory"
    path.write_text("some avg10=90.00 avg60=90.00 avg300=1.00 total=1\n"
                    "full avg10=99.00 avg60=39.99 avg300=1.00 total=1\n")  # fmt: skip
    assert Pressure("memory", tmp_path).look(0) == ()
    path.write_text("full avg10=1.00 avg60=40.00 avg300=1.00 total=1\n")
    (sign,) = Pressure("memory", tmp_path).look(0)
    assert sign.id is SignId.PRESSURE_MEMORY
    path.write_text("full avg60=x\n")
    with pytest.raises(ValueError, match="no line"):
        stalled(path.read_text(), "full")
    with pytest.raises(AbsentError):
        Pressure("io", tmp_path).look(0)


def test_a_zone_that_reaches_its_trip_point_is_told_once_until_it_has_cooled(
    tmp_path: Path,
) -> None:
    zone = tmp_path / "class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "trip_point_0_type").write_text("passive\n")
    (zone / "trip_point_0_temp").write_text("10\n")
    (zone / "trip_point_1_type").write_text("critical\n")
    (zone / "trip_point_1_temp").write_text("105000\n")
    thermal = Thermal(tmp_path)
    seen = []
    for temperature in ("40000", "105000", "106000", "90000", "105000"):
        (zone / "temp").write_text(temperature)
        seen.append([sign.id for sign in thermal.look(0)])
    hot = [SignId.THERMAL_CRITICAL]
    assert seen == [[], hot, [], [], hot]
    with pytest.raises(AbsentError):
        Thermal(tmp_path / "none").look(0)


# Records of other programs


def test_new_rows_of_rasdaemon_are_signs(tmp_path: Path) -> None:
    path = tmp_path / "ras.db"
    with pytest.raises(AbsentError):
        Rasdaemon(path).look(1)
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE mc_event (id INTEGER PRIMARY KEY, err_type, err_msg, label)")
    database.execute("INSERT INTO mc_event VALUES (1, 'Corrected', 'old', 'DIMM_A')")
    database.commit()
    source = Rasdaemon(path)
    assert source.look(1) == []
    database.execute("INSERT INTO mc_event VALUES (2, 'Uncorrected', 'new', 'DIMM_B')")
    database.commit()
    (sign,) = source.look(1)
    assert sign.id is SignId.RASDAEMON_MEMORY
    assert "Uncorrected, new, DIMM_B" in sign.evidence
    assert source.look(1) == []
    database.close()
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(OSError, match="database"):
        source.look(1)


def test_a_disk_that_says_that_it_fails_is_told_once(tmp_path: Path) -> None:
    for name in ("sda", "loop0", "nvme0n1", "sda1x"):
        (tmp_path / name).mkdir()
    said = {"/dev/sda": '{"smart_status": {"passed": false}}', "/dev/nvme0n1": "{}"}
    source = Smart(lambda command: said[command[-1]], lambda: "/usr/sbin/smartctl", tmp_path)
    (sign,) = source.look(1)
    assert (sign.id, sign.evidence) == (SignId.STORAGE_SMART, "sda: SMART says that it is failing")
    assert source.look(1) == []
    with pytest.raises(AbsentError, match="smartmontools"):
        Smart(lambda _: "", lambda: None, tmp_path).look(1)


def test_a_smartctl_that_can_ask_no_disk_is_absent_and_says_why(tmp_path: Path) -> None:
    for name in ("sda", "sdb"):
        (tmp_path / name).mkdir()
    refused = (
        '{"smartctl": {"exit_status": 2, "messages": '
        '[{"string": "Smartctl open device: /dev/sda failed: Permission denied"}]}}'
    )
    asked = '{"smartctl": {"exit_status": 4}, "smart_status": {"passed": true}}'
    said = {"/dev/sda": refused, "/dev/sdb": refused}
    source = Smart(lambda command: said[command[-1]], lambda: "/usr/sbin/smartctl", tmp_path)
    with pytest.raises(AbsentError, match="Permission denied"):
        source.look(1)
    said["/dev/sdb"] = asked
    assert source.look(1) == []


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ('{"smart_status": {"passed": true}}', False),
        ('{"nvme_smart_health_information_log": {"critical_warning": 4}}', True),
        ('{"nvme_smart_health_information_log": {"critical_warning": 0}}', False),
        ("[]", False), ("null", False), ('{"smart_status": 7}', False),
    ],
)  # fmt: skip
def test_what_smartctl_says(output: str, problem: bool) -> None:
    assert bool(smart_problem(output)) is problem


def test_what_is_no_json_of_smartctl_is_an_error() -> None:
    for output in ("", "smartctl 7.3", "[" * 100_000):
        with pytest.raises(ValueError, match=r".+"):
            smart_problem(output)

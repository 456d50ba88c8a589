"""The trial of the host guard: a kernel that dies, and a VM that is carried out of its host.

    this machine, in a network namespace of its own
    ├── etcd
    ├── semperd b ── QEMU with the guest, afterwards
    └── QEMU (no KVM): host a, a stock Debian kernel with the module
        └── semperd a ── QEMU with the guest, before: a boot sector that counts

`counter` is the guest, `image` what host a boots, `host_a` the machine (an `emulated` one), `stage`
all of it together, `trial` one death and what came of it. The command is `cli.demo_guard`.
"""

"""Another QEMU for a VM on the same host: restart of QEMU, save and restore."""

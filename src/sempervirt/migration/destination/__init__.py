"""The host that a VM comes to: it never runs the guest before the VM is its own."""

"""A host with systemd that is rebooted in order: `python -m tests.guard.reboot`."""

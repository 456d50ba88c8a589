"""The host that a VM leaves: it owns the VM until the store has handed it over, and drives."""

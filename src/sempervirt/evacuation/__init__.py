"""The VMs of a host leave the host: a plan, then one move after the other, each outcome checked."""

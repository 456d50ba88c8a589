"""A VM moves to a new QEMU process on the same host."""

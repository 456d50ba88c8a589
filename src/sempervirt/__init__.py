"""Keeps QEMU/KVM virtual machines running through the death of their storage backend."""

__version__ = "0.1.0"

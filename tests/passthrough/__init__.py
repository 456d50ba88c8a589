"""Passed-through devices: real mediators, a QEMU that is new enough, and a guest's stock driver."""

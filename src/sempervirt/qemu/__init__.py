"""One QEMU process: its description, its command line, its monitor and its runstates."""

"""A VM as a whole: its QEMU and its disks, its record, its claim, the work that goes on with it."""

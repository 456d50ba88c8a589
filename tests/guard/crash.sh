#!/bin/busybox sh
# The first process after a panic, in the crash kernel: says that it is there, and what there is to dump.
/bin/busybox mkdir -p /proc
/bin/busybox mount -t proc proc /proc
echo "crash kernel: up, with a dump of $(/bin/busybox stat -c %s /proc/vmcore) bytes"
/bin/busybox sleep 1
/bin/busybox reboot -f

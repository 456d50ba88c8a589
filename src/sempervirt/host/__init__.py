"""This host's kernel, as VMs and disks both need it: processes, sockets, files that last.

It stands below `vm` and `disk`, which are siblings and may not import each other.
"""

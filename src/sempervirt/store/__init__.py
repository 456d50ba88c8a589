"""Who owns which VM, hosts, and the epoch of each image: one port, SQLite and etcd behind it.

`port` is the port, `registry` what is kept through it, `epoch` the record beside an image.
"""

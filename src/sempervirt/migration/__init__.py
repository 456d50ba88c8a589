"""Moving a running VM to another host.

`source` and `destination` are the two ends: each a pure machine (`state`, `decide`) and its driver.
`wire` is a process of semper-wired, `stream` is QEMU's own migration, `messages` is what the hosts
say to each other, `obstacles` is every reason that would stop a move.
"""

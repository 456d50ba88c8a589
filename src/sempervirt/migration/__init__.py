"""Moving a running VM to another host: the decisions, and what they are carried out with.

`states` is the source's state machine, `arrival` the destination's, `convergence` decides how
hard to push: all pure. `stream` is QEMU's migration, `wire` a process of semper-wired, `messages`
what the hosts say to each other. The drivers are the agent's (`departure`, `reception`).
"""

"""Moving a running VM to another host: the decisions. What carries them out comes later.

`states` is the source's state machine, `arrival` the destination's, `convergence` decides how
hard to push. All are pure.
"""

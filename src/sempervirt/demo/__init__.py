"""Proving that a guest survives: trials with a real VM, verified writers and real kills.

`semper demo` runs one trial with a live display; `make torture` and the tests run many.
"""

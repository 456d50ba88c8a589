"""Standbys: how soon they take over (`make standby`), and that never two write one disk
(`make split-brain`).
"""

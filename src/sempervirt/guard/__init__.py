"""The guard of a host: what tells that the host may die, what each sign means, and what is done.

    sources/*.look() ──► Watch ─────────────► Guard ──────────────► ports
    module, log,         a thread for each:   decide(presets,       evacuate the VMs,
    counters,            one that hangs,      state, event, now)    tell the module,
    pressure, logind     floods or lies       pure: decisions       load the module,
                         stops nothing        with evidence         let a shutdown go on

The method is that of US10552210B2: a fatal event of a kernel is met by a preset that says what the
event means, the host is kept alive (kernel/semper_guard), and its virtual machines leave.
docs/design/guard.md has the design.
"""

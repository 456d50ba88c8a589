"""Errors between the host and the probe in a guest.

SempervirtError
├── ProbeRefused             the probe answered: no (kind: invalid, unavailable, failed)
└── OutcomeUnknown
    ├── ProbeSilent          no answer by the deadline; the guest may be hung, or slow
    ├── ProbeRebooted        the guest booted again before it answered
    └── ProbeGone            the connection ended before an answer; QEMU is probably gone
"""

from __future__ import annotations

from sempervirt.core.errors import OutcomeUnknown, SempervirtError


class ProbeRefused(SempervirtError):
    """The probe said no. `kind` is "invalid", "unavailable" (not done) or "failed" (tried)."""

    def __init__(self, command: str, kind: str, message: str) -> None:
        super().__init__(f"probe refuses {command} ({kind}): {message}")
        self.command = command
        self.kind = kind


class ProbeSilent(OutcomeUnknown):
    """The probe did not answer by the deadline."""


class ProbeRebooted(OutcomeUnknown):
    """The guest rebooted with the command under way; its writers and their ledger are gone."""


class ProbeGone(OutcomeUnknown):
    """The connection to the guest ended."""

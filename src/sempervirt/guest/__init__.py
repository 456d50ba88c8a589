"""The test guests: a distribution's kernel, an initramfs around semper-probe, and its client.

image()       where the built image is: kernel, initramfs, release, kernel command line
debian()      the same of a Debian with systemd, on a disk
ProbeClient   talks to semper-probe in the running guest
initramfs     builds the image (`python -m sempervirt.guest build`, called by `make guest`)
"""

from sempervirt.guest.errors import ProbeGone, ProbeRebooted, ProbeRefused, ProbeSilent
from sempervirt.guest.location import CMDLINE, DebianImage, GuestImage, debian, image
from sempervirt.guest.probe import ClockOffset, ProbeClient

__all__ = [
    "CMDLINE",
    "ClockOffset",
    "DebianImage",
    "GuestImage",
    "ProbeClient",
    "ProbeGone",
    "ProbeRebooted",
    "ProbeRefused",
    "ProbeSilent",
    "debian",
    "image",
]

"""The test guest: a distribution's kernel, an initramfs around semper-probe, and its client.

image()       where the built image is: kernel, initramfs, release
build()       makes it (`python -m sempervirt.guest build`, called by `make guest`)
probe         ProbeClient, which talks to semper-probe in the running guest
"""

from sempervirt.guest.image import CMDLINE, GuestImage, image

__all__ = ["CMDLINE", "GuestImage", "image"]

"""The Debian packages on a fresh Debian with systemd: `python -m tests.packages`."""

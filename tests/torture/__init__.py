"""Torture of the disk path under a real guest; `make torture` runs it at length."""

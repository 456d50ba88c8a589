"""The whole system under a real guest: the short form of `make torture`."""

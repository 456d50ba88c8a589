"""A VM is saved to a file, and ends."""

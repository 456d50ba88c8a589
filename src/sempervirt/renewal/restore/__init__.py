"""A VM is made from a saved state."""

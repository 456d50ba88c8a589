"""A VM's disks: volumes, the backends that serve them, and their supervision."""

"""A guest that moves between the two hosts of `lab`, and everything that dies meanwhile."""

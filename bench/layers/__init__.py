"""What snapshots cost: no layer, a chain of four, the pause, a merge beside a guest."""

"""`semper demo passthrough`: a guest that owns an NVMe controller moves between two QEMUs, live."""

"""Where signs come from: one small source for each, all with the interface of `source.py`."""

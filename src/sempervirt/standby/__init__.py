"""A whole VM that is already up when the first one dies (method: US20200371882A1)."""

"""Names, sizes, time values, errors and events: values only, no I/O and no asyncio."""

"""The compose deployment in a real container engine, under faults: see `__main__`."""

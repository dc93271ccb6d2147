"""The bank: one backbone and its domains in a folder. `Bank` for networks, `Store` for bytes."""

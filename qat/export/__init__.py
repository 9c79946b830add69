"""Models for devices: files that hold integers."""

"""Stored soft labels of many crops per image: the format, writing, reading, importing."""

"""Data: class-folder trees, crops, stored soft labels, loaders. Knows nothing of models."""

"""Data: class-folder trees, crops, loaders."""

from qat.data.imagenet import Batch, ImageNetDataModule

__all__ = ["Batch", "ImageNetDataModule"]

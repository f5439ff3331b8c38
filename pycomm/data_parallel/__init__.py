"""Data parallelism: one replica of the model per rank, gradients averaged in buckets while backward still runs."""

from pycomm.data_parallel.module import DataParallel

__all__ = ["DataParallel"]

"""GPUs: NCCL between them, loaded at run time; see ``backend.py``."""

from pycomm.backends.nccl.backend import NcclBackend
from pycomm.backends.nccl.offers import Offer, offer

__all__ = ["NcclBackend", "Offer", "offer"]

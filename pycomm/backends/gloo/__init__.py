"""The back end for several hosts without GPUs; see ``backend.py``."""

from pycomm.backends.gloo.backend import HostsBackend

__all__ = ["HostsBackend"]

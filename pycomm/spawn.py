"""Child interpreters that import the same packages as this one, and that do not outlive it."""

from __future__ import annotations

import os
import sys

__all__ = ["ends_with_this_process", "same_imports"]


def same_imports() -> str:
    """Code for the start of ``python -c``: takes over this process's ``sys.path``.

    ``python -c`` and ``python -m`` look into the working directory first. Where that is a checkout of pycomm, a child
    would import the sources there, without their extension, instead of the installed package that its parent runs.
    """
    return f"import sys; sys.path[:] = {sys.path!r}"


def ends_with_this_process() -> str:
    """Code that follows :func:`same_imports`: the kernel kills the child when this process ends, even by SIGKILL."""
    return f"from pycomm_command import end_with_parent; end_with_parent({os.getpid()})"

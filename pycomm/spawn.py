"""Child interpreters that import the same packages as this one."""

from __future__ import annotations

import sys

__all__ = ["same_imports"]


def same_imports() -> str:
    """Code for the start of ``python -c``: takes over this process's ``sys.path``.

    ``python -c`` and ``python -m`` look into the working directory first. Where that is a checkout of pycomm, a child
    would import the sources there, without their extension, instead of the installed package that its parent runs.
    """
    return f"import sys; sys.path[:] = {sys.path!r}"

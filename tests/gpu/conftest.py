"""These tests need a GPU and a build with CUDA code; `make gpu` runs them."""

from __future__ import annotations

import pytest
import torch

from pycomm import _C


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = None
    if not torch.cuda.is_available():
        reason = "no GPU"
    elif not _C.cuda_build():
        reason = "no CUDA code in this build"
    if reason is not None:
        for item in items:
            if "tests/gpu" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=reason))

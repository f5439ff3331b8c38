"""Conversions to 16 and 8 bits and back: every code, and floats around every rounding boundary."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

FORMATS = {
    "float16": (0, torch.float16, np.uint16, 65536, 0x7E00),
    "bfloat16": (1, torch.bfloat16, np.uint16, 65536, 0x7FC0),
    "e4m3": (2, torch.float8_e4m3fn, np.uint8, 256, 0x7F),
    "e5m2": (3, torch.float8_e5m2, np.uint8, 256, 0x7F),
}


def widened(library: ctypes.CDLL, name: str) -> np.ndarray:
    """The value of every code."""
    index, _, _, num_codes, _ = FORMATS[name]
    codes, values = np.arange(num_codes, dtype=np.uint16), np.zeros(num_codes, np.float32)
    library.convert_back(
        index, ctypes.c_void_p(codes.ctypes.data), ctypes.c_int64(num_codes), ctypes.c_void_p(values.ctypes.data)
    )
    return values


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_has_its_value(library: ctypes.CDLL, name: str) -> None:
    _, dtype, storage, num_codes, _ = FORMATS[name]
    codes = torch.from_numpy(np.arange(num_codes).astype(storage))
    wanted = codes.view(dtype).float().numpy()
    np.testing.assert_array_equal(widened(library, name), wanted)


@pytest.mark.parametrize("name", FORMATS)
def test_floats_are_rounded_to_nearest_even(library: ctypes.CDLL, name: str) -> None:
    index, dtype, storage, _, nan = FORMATS[name]
    exact = np.unique(np.abs(widened(library, name)[np.isfinite(widened(library, name))]))
    middles = (exact[1:].astype(np.float64) + exact[:-1]) / 2
    near = np.concatenate([exact, middles.astype(np.float32)])
    random = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32).view(np.float32)
    with np.errstate(over="ignore"):
        beyond = exact[-1] * np.float32([1, 1.03, 1.06, 1.1, 2, np.inf])
    positive = np.concatenate([near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(0)), beyond])
    values = np.concatenate([positive, -positive, random, np.float32([np.nan])]).astype(np.float32)
    got = np.zeros(len(values), np.uint16)
    library.convert(
        index, ctypes.c_void_p(values.ctypes.data), ctypes.c_int64(len(values)), ctypes.c_void_p(got.ctypes.data)
    )
    limited = torch.from_numpy(values)
    if storage is np.uint8:  # what is beyond the largest finite value becomes that one
        limited = limited.clamp(-float(exact[-1]), float(exact[-1]))
    wanted = limited.to(dtype).view(torch.uint8 if storage is np.uint8 else torch.int16).numpy().view(storage).copy()
    wanted[np.isnan(values)] = nan
    np.testing.assert_array_equal(got.astype(storage), wanted)

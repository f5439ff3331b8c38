"""What a host reduction must give, bit for bit: docs/determinism.md in NumPy."""

from __future__ import annotations

import numpy as np

Raw = np.ndarray  # elements as the dtype below stores them; bfloat16 as its bits

STORAGE = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int8": np.int8,
    "uint8": np.uint8,
    "int32": np.int32,
    "int64": np.int64,
}
NAN_BITS = {"float32": 0x7FC00000, "float64": 0x7FF8000000000000, "float16": 0x7E00, "bfloat16": 0x7FC0}
INTEGERS = ["int8", "uint8", "int32", "int64"]
CASES = [
    (dtype, op)
    for dtype in STORAGE
    for op in ("sum", "avg", "min", "max", "prod")
    if not (op == "avg" and dtype in INTEGERS)
]


def bits_of(raw: Raw) -> Raw:
    return raw.view(f"u{raw.dtype.itemsize}")


def widen(dtype: str, raw: Raw) -> np.ndarray:
    """The values of ``raw`` [N] in the type that accumulates them."""
    if dtype == "bfloat16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32) if dtype == "float16" else raw


def narrow(dtype: str, values: np.ndarray) -> Raw:
    """``values`` [N], rounded to nearest even where the dtype is smaller, with every NaN in the one promised form."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        raw = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)  # a half rounds to even; NaN below
    else:
        raw = values.astype(STORAGE[dtype])
    if dtype in NAN_BITS:
        raw = raw.copy()
        bits_of(raw)[np.isnan(values)] = NAN_BITS[dtype]
    return raw


def reference(dtype: str, op: str, sources: list[Raw]) -> Raw:
    """The reduction as docs/determinism.md defines it."""
    if len(sources) == 1:
        return sources[0]
    acc = widen(dtype, sources[0])
    with np.errstate(all="ignore"):
        for source in sources[1:]:
            value = widen(dtype, source)
            if op in ("sum", "avg"):
                acc = acc + value
            elif op == "prod":
                acc = acc * value
            else:
                better = value < acc if op == "min" else value > acc
                acc = np.where(better | (value != value), value, acc)
        if op == "avg":
            acc = acc / acc.dtype.type(len(sources))
        return narrow(dtype, acc)


def some_sources(dtype: str, num_src: int, count: int, seed: int) -> list[Raw]:
    """Random bits, so NaN, infinities, subnormals and overflow are among them, with ordinary values in every second
    place."""
    rng = np.random.default_rng(seed)
    sources = []
    for _ in range(num_src):
        raw = rng.integers(0, 256, count * np.dtype(STORAGE[dtype]).itemsize, np.uint8).view(STORAGE[dtype])
        if dtype not in INTEGERS:
            accumulator = np.float64 if dtype == "float64" else np.float32
            raw[::2] = narrow(dtype, rng.standard_normal(len(raw[::2])).astype(accumulator))
        sources.append(raw)
    return sources

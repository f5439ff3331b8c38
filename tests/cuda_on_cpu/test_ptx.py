"""What nvcc makes of signal.cuh: the orderings that the portable twins stand for. No GPU is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

INSTRUCTION = r"^\s+(?:@\S+ )?((?:ld|st|atom|bar|barrier|fence|membar)\.[\w.]+)"
CSRC = Path(__file__).resolve().parent.parent.parent / "csrc"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize(("kernel", "num_entries"), [("all_gather", 1), ("put_get", 2)])
def test_flags_are_ordered_at_system_scope(tmp_path: Path, kernel: str, num_entries: int) -> None:
    ptx = tmp_path / "kernel.ptx"
    options = ["-std=c++20", "-O3", "-arch=compute_80", "-ptx", f"-I{CSRC}", f"-I{CSRC / 'include'}", "-o", str(ptx)]
    command = ["nvcc", *options, str(CSRC / "cuda" / "kernels" / f"{kernel}.cu")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    entries = ptx.read_text().split(".entry")[1:]
    assert len(entries) == num_entries
    for entry in entries:
        used = Counter(re.findall(INSTRUCTION, entry, flags=re.MULTILINE))
        assert used["st.release.sys.b32"] > 0
        assert used["ld.acquire.sys.b32"] > 0
        assert any(name.startswith(("bar.red", "barrier.cta.red")) for name in used)
        scoped = {name for name in used if re.search(r"\.(cta|cluster|gpu)\b", name) and not name.startswith("bar")}
        assert scoped == set()  # everything that ranks share is accessed at system scope
        assert not any(".nc" in name for name in used)  # loads past the caches' coherence

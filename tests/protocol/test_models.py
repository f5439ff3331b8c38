"""The signal protocol of the CUDA kernels, model-checked with SPIN: every interleaving of each model; see views.pml."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SIGNAL = HERE.parent.parent / "csrc" / "cuda" / "device" / "signal.cuh"
IS_LARGE = os.environ.get("PYCOMM_TEST_MODELS") == "large"  # a few minutes

# Sizes of each model. No size shows everything: one thread a block needs no meeting, two ranks have one peer each.
SIZES = {
    "barrier": [{"RANKS": 2, "THREADS": 2, "KERNELS": 3}, {"RANKS": 3, "THREADS": 1, "KERNELS": 2}],
    "channel": [{"RANKS": 2, "THREADS": 2, "MESSAGES": 4}, {"RANKS": 3, "THREADS": 1, "MESSAGES": 3}],
    "faults": [{"RANKS": 2, "BLOCKS": 1, "KERNELS": 3}, {"RANKS": 3, "BLOCKS": 1, "KERNELS": 1}],
}
LARGE = {
    "barrier": [{"RANKS": 2, "THREADS": 2, "KERNELS": 5}, {"RANKS": 3, "THREADS": 1, "KERNELS": 3}],
    "channel": [{"RANKS": 2, "THREADS": 2, "MESSAGES": 9}, {"RANKS": 3, "THREADS": 1, "MESSAGES": 4}],
    "faults": [{"RANKS": 2, "BLOCKS": 2, "KERNELS": 2}, {"RANKS": 3, "BLOCKS": 1, "KERNELS": 2}],
}
MODELS = [(name, size) for name in SIZES for size in SIZES[name] + (LARGE[name] if IS_LARGE else [])]
MISSING = [tool for tool in ("spin", "gcc") if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (Debian's packages)")

Check = Callable[[str, dict[str, int], int], str]


def breakages(model: str) -> dict[str, int]:
    """What a model can break, by name: a new one is tested as it comes."""
    (block,) = re.findall(r"/\* What may be broken.*?\n\n", (HERE / f"{model}.pml").read_text(), flags=re.DOTALL)
    return {name: int(number) for name, number in re.findall(r"#define (\w+) (\d+)", block)}


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Check:
    """check(model, size, broken): what the verifier prints after a complete search."""
    built: dict[str, Path] = {}

    def run(*command: str, folder: Path, **environment: str) -> str:
        environment = {**os.environ, **environment}
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def check(model: str, size: dict[str, int], broken: int) -> str:
        defines = [f"-D{name}={value}" for name, value in size.items()]
        key = " ".join([model, *defines])
        if key not in built:
            folder = built[key] = tmp_path_factory.mktemp(model)
            run("spin", "-a", *defines, str(HERE / f"{model}.pml"), folder=folder)
            level = "-O1" if IS_LARGE else "-O0"  # small ones run in less time than -O1 takes
            run("gcc", level, "-w", "-DSAFETY", "-DMEMLIM=3000", "-o", "pan", "pan.c", folder=folder)
        said = run("./pan", "-m1000000", folder=built[key], BROKEN=str(broken))
        assert "max search depth too small" not in said
        return said

    return check


def verdict(said: str) -> str:
    """ "holds", or the first violation of a property; an assertion that a model is too small is none."""
    violation = re.search(r"pan:1: (.*)", said)
    if violation is None:
        assert "Search not completed" not in said, said
        assert "errors: 0" in said, said
        return "holds"
    assert re.match(r"assertion violated|invalid end state", violation[1]), said
    assert ".last-" not in violation[1], said
    return violation[1]


@pytest.mark.parametrize(("model", "size"), MODELS)
def test_the_protocol_holds(check: Check, model: str, size: dict[str, int]) -> None:
    assert verdict(check(model, size, 0)) == "holds"


@pytest.mark.parametrize(("model", "name"), [(model, name) for model in SIZES for name in breakages(model)])
def test_a_broken_protocol_is_found_out(check: Check, model: str, name: str) -> None:
    verdicts = (verdict(check(model, size, breakages(model)[name])) for size in SIZES[model])
    assert any(found != "holds" for found in verdicts)


def test_every_ordering_between_ranks_is_in_a_model() -> None:
    """signal.cuh names its orderings after the model and the breakage: kBarrierSignal is SIGNAL of barrier.pml."""
    (body,) = re.findall(r"enum class Ordering \{(.*?)\};", SIGNAL.read_text(), flags=re.DOTALL)
    names = re.findall(r"\bk(Barrier|Channel)(\w+),", body)
    assert len(names) == 8
    for model, name in names:
        assert name.upper() in breakages(model.lower())

"""Nothing below knows what is above it: Python imports and C++ includes go downwards only.

The rules are functions of a directory, so each is also shown a tree that breaks it.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Lowest first. A module may import lower layers and its own package, not its siblings. "__init__" is `import pycomm`,
# the public names: for programs on top, never for the parts that it is made of.
PYTHON_LAYERS = (
    {"errors", "process"},
    {"env", "spawn"},
    {"_C", "stores"},
    {"records"},
    {"rendezvous", "annotations", "arguments", "checkpoints"},
    {"gpu"},
    {"backends"},
    {"collectives", "messages"},
    {"fused"},
    {"communicator"},
    {"mesh"},
    {"data_parallel", "tensor_parallel", "pipeline", "torch_backend"},
    {"models"},
    {"__init__"},
    {"pretrain", "plan", "doctor"},
    {"cli", "__main__"},
)
CHOOSERS = ("init", "_connect")  # of communicator.py: they make the back end that was asked for by name
PYTHON_LEVEL = {name: level for level, names in enumerate(PYTHON_LAYERS) for name in names}

# What each part of csrc may include from csrc, and the headers of others that only some of it may see.
CXX_ZONES = {
    "include": {"include"},
    "host": {"include", "host"},
    "nccl": {"include", "nccl"},
    "cuda/device": {"include", "cuda/device"},
    "cuda": {"include", "cuda", "cuda/device"},
    "bindings": {"include", "host", "nccl", "cuda", "cuda/device", "bindings"},
}
TORCH_HEADER = re.compile(r"^(torch|ATen|c10|caffe2)/")
PYTHON_HEADER = re.compile(r"^(pybind11/|Python\.h$)")


def imported_modules(tree: ast.AST, package: tuple[str, ...], root: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, relative ones resolved against ``package``, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*parents, *(node.module or "").split("."))).strip(".")
            for alias in node.names:
                path = root / base.replace(".", "/") / alias.name
                is_module = path.is_dir() or any(path.with_suffix(s).is_file() for s in (".py", ".pyi"))
                yield node.lineno, f"{base}.{alias.name}" if is_module else base


def upward_imports(root: Path) -> list[str]:
    """What in root/pycomm imports its own layer's siblings or a higher layer, or has no layer."""
    found = []
    for path in sorted((root / "pycomm").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        owner = parts[1]
        if owner not in PYTHON_LEVEL:
            found.append(f"{path}: {owner} has no layer: name it in PYTHON_LAYERS")
            continue
        for line, name in imported_modules(ast.parse(path.read_text()), parts[:-1], root):
            if name.split(".")[0] != "pycomm":
                continue
            target = (*name.split("."), "__init__")[1]
            if target != owner and PYTHON_LEVEL.get(target, len(PYTHON_LAYERS)) >= PYTHON_LEVEL[owner]:
                found.append(f"{path}:{line}: {owner} imports {target}")
    return found


def environment_readers(root: Path) -> list[str]:
    """Where root/pycomm touches the environment outside env.py."""
    found = []
    for path in sorted((root / "pycomm").rglob("*.py")):
        if path == root / "pycomm" / "env.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
                names = {node.attr}
            if names & {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}:
                found.append(f"{path}:{getattr(node, 'lineno', 0)}: reads the environment")
    return found


def back_ends_told_apart(root: Path) -> list[str]:
    """Where root/pycomm asks which back end it has, outside those that may: what one can do is in its Capabilities."""
    names = {"shm", "nccl", "gloo", "gloo+shm"}
    found = []
    for path in sorted((root / "pycomm").rglob("*.py")):
        owner = path.relative_to(root).with_suffix("").parts[1]
        if owner in ("backends", "doctor"):
            continue
        tree = ast.parse(path.read_text())
        where = dict.fromkeys(ast.walk(tree), "")
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef) and owner == "communicator" and function.name in CHOOSERS:
                where.update(dict.fromkeys(ast.walk(function), function.name))
        for node, chooser in where.items():
            texts = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
            classes = {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and part.id.endswith("Backend")}
            classes -= {"Backend"}
            if isinstance(node, ast.Compare | ast.MatchValue) and texts & names and not chooser:
                found.append(f"{path}:{node.lineno}: compares with the name of a back end")
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                found += [f"{path}:{node.lineno}: asks whether it is a {name}" for name in sorted(classes)]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pycomm.backends"):
                imported = {alias.name for alias in node.names if alias.name.endswith("Backend")} - {"Backend"}
                if imported and owner != "communicator":
                    found.append(f"{path}:{node.lineno}: imports {', '.join(sorted(imported))}")
    return found


def zone_of(path: str) -> str:
    """The zone of a path below csrc: its directory, of which only cuda/device is two levels deep."""
    return "cuda/device" if path.startswith("cuda/device/") else path.split("/")[0]


def forbidden_includes(root: Path) -> list[str]:
    """What in root/csrc includes a header that its zone must not know."""
    csrc = root / "csrc"
    found = []
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in {".hpp", ".cpp", ".h", ".cu", ".cuh"}):
        zone = zone_of(path.relative_to(csrc).as_posix())
        for number, line in enumerate(path.read_text().splitlines(), 1):
            match = re.match(r'\s*#\s*include\s*[<"]([^>"]+)[>"]', line)
            if not match:
                continue
            header = match[1]
            # Three ways to write one of our own: from csrc, from csrc/include, beside the file.
            bases = (csrc, csrc / "include", path.parent)
            own = next((p.resolve() for base in bases if (p := base / header).is_file()), None)
            if TORCH_HEADER.match(header):
                found.append(f"{path}:{number}: {header}: libtorch never appears")
            elif PYTHON_HEADER.match(header) and zone != "bindings":
                found.append(f"{path}:{number}: {header}: only bindings know Python")
            elif own is not None:
                target = zone_of(own.relative_to(csrc.resolve()).as_posix())
                if target not in CXX_ZONES.get(zone, set()):
                    found.append(f"{path}:{number}: {zone} includes {target}")
    return found


def run_python(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("rule", [upward_imports, environment_readers, back_ends_told_apart, forbidden_includes])
def test_the_repository_keeps_its_layers(rule):
    assert rule(ROOT) == []


@pytest.mark.parametrize(
    ("rule", "file", "text", "said"),
    [
        (upward_imports, "pycomm/env.py", "def f():\n from pycomm import mesh\n", "env imports mesh"),
        (upward_imports, "pycomm/backends/shm.py", "from pycomm import communicator\n", "imports communicator"),
        (upward_imports, "pycomm/backends/shm.py", "from ..communicator import Work\n", "imports communicator"),
        (upward_imports, "pycomm/backends/shm.py", "from .. import communicator\n", "imports communicator"),
        (upward_imports, "pycomm/mesh.py", "import pycomm\n", "imports __init__"),
        (upward_imports, "pycomm/mesh.py", "from pycomm import DataParallel\n", "imports __init__"),
        (upward_imports, "pycomm/pipeline/a.py", "from pycomm.data_parallel import bucket\n", "imports data_parallel"),
        (upward_imports, "pycomm/extra.py", "", "has no layer"),
        (environment_readers, "pycomm/mesh.py", "import os\nX = os.environ['X']\n", "mesh.py:2"),
        (environment_readers, "pycomm/mesh.py", "from os import getenv\n", "mesh.py:1"),
        (back_ends_told_apart, "pycomm/mesh.py", "def f(c):\n return c.backend == 'nccl'\n", "mesh.py:2: compares"),
        (back_ends_told_apart, "pycomm/mesh.py", "def init(c):\n return c.backend in ('shm', 'gloo')\n", "compares"),
        (back_ends_told_apart, "pycomm/mesh.py", "x = isinstance(c, (int, NcclBackend))\n", "is a NcclBackend"),
        (back_ends_told_apart, "pycomm/mesh.py", "from pycomm.backends.shm import ShmBackend\n", "imports ShmBackend"),
        (back_ends_told_apart, "pycomm/communicator.py", "def f(c):\n return c.name != 'shm'\n", "compares"),
        (forbidden_includes, "csrc/host/a.cpp", '#include "bindings/b.hpp"\n', "host includes bindings"),
        (forbidden_includes, "csrc/host/a.cpp", '#include "nccl/n.hpp"\n', "host includes nccl"),
        (forbidden_includes, "csrc/include/pycomm/a.hpp", '# include "host/h.hpp"\n', "include includes host"),
        (forbidden_includes, "csrc/cuda/device/a.cuh", '#include "../kernels/k.cuh"\n', "cuda/device includes cuda"),
        (forbidden_includes, "csrc/host/a.cpp", "#include <pybind11/pybind11.h>\n", "only bindings know Python"),
        (forbidden_includes, "csrc/bindings/a.cpp", "#include <torch/extension.h>\n", "libtorch never appears"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, rule, file, text, said):
    for name in ("communicator.py", "mesh.py", "__init__.py", "data_parallel/bucket.py", "data_parallel/__init__.py"):
        plant(tmp_path / "pycomm" / name, "")
    for name in ("bindings/b.hpp", "nccl/n.hpp", "host/h.hpp", "cuda/kernels/k.cuh"):
        plant(tmp_path / "csrc" / name, "")
    assert rule(tmp_path) == []
    plant(tmp_path / file, text)
    (message,) = rule(tmp_path)
    assert said in message


def test_what_is_allowed_is_not_reported(tmp_path):
    plant(tmp_path / "pycomm/errors.py", "")
    plant(tmp_path / "pycomm/env.py", "import os\nfrom pycomm import errors\nX = os.environ\n")
    plant(tmp_path / "pycomm/pipeline/actions.py", "")
    plant(tmp_path / "pycomm/pipeline/stage.py", "from pycomm.pipeline import actions\nfrom . import actions\n")
    plant(tmp_path / "pycomm/doctor.py", "import pycomm\nfrom pycomm import _C, errors\n")
    plant(
        tmp_path / "pycomm/communicator.py",
        "from pycomm.backends.shm import ShmBackend\ndef init(b): return b == 'shm'\n",
    )
    plant(tmp_path / "pycomm/backends/a.py", "x = isinstance(b, ShmBackend)\n")
    plant(tmp_path / "csrc/include/pycomm/types.hpp", "")
    plant(tmp_path / "csrc/host/a.hpp", '#include "pycomm/types.hpp"\n')
    plant(tmp_path / "csrc/bindings/b.cpp", '#include <pybind11/pybind11.h>\n#include "host/a.hpp"\n')
    rules = upward_imports, environment_readers, back_ends_told_apart, forbidden_includes
    assert [message for rule in rules for message in rule(tmp_path)] == []


def plant(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_collective_is_known_in_nine_files_that_contributing_names():
    word = re.compile(r"\b(scan|kScan)\b")
    sources = [path for path in (*ROOT.glob("pycomm/**/*.py*"), *ROOT.glob("csrc/**/*.?pp")) if path.suffix != ".pyc"]
    found = {str(path.relative_to(ROOT)) for path in sources if word.search(path.read_text())}
    text = (ROOT / "CONTRIBUTING.md").read_text()
    listed = text[text.index("## Adding a collective") : text.index("## Adding a kernel")]
    listed = set(re.findall(r"`((?:csrc|pycomm)/[^`]+)`", listed.replace("<name>", "scan")))
    assert found == listed
    assert len(found) == 9


def test_import_is_silent_starts_no_thread_and_opens_no_gpu():
    code = """
import os, torch, numpy
before = len(os.listdir("/proc/self/task"))
import pycomm
assert len(os.listdir("/proc/self/task")) == before, "import pycomm started a thread"
assert not torch.cuda.is_initialized(), "import pycomm initialised CUDA"
"""
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_import_needs_only_torch_and_numpy():
    code = """
import sys, torch, numpy
before = set(sys.modules)
import pycomm
new = {name.partition(".")[0] for name in set(sys.modules) - before}
sys.exit(" ".join(sorted(new - set(sys.stdlib_module_names) - {"pycomm", "torch", "numpy"})) or None)
"""
    done = run_python(code)
    assert (done.returncode, done.stderr) == (0, "")

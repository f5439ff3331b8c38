"""What `pip install` builds and ships. One sdist and one wheel, built from it, serve every test here."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).resolve().parent.parent
# libpthread, librt and libdl are separate in a glibc older than 2.34.
SYSTEM_LIBRARIES = {"libc", "libstdc++", "libgcc_s", "libm", "libpthread", "librt", "libdl"}
LOADERS = {"linux-vdso", "ld-linux-x86-64", "ld-linux-aarch64"}


def run(command, *, cwd=ROOT, env=None):
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="session")
def sdist(tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    status, output = run([sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, ROOT])
    assert status == 0, output
    (path,) = out.glob("*.tar.gz")
    return path


@pytest.fixture(scope="session")
def wheel(sdist, tmp_path_factory):
    """Built from the sdist, so the sdist lacks nothing; without optimisation, for nothing here runs it."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, sdist]
    settings = ["-C", f"build-dir={out / 'build'}", "-C", "cmake.build-type=None"]
    status, output = run([*command, *settings])
    assert status == 0, output
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture
def configure(tmp_path):
    """configure(defines, env) runs cmake's configure step alone, in an empty build folder: (status, output, folder)."""

    def run_cmake(defines=(), env=None):
        build = tmp_path / "build"
        command = [shutil.which("cmake"), "-S", ROOT, "-B", build, "-G", "Ninja", "-DSKBUILD_PROJECT_VERSION=0.0.0"]
        command += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        status, output = run([*command, *defines], env=env)
        return status, " ".join(output.split()), build

    return run_cmake


def without_cuda(tmp_path):
    """An environment whose PATH holds a compiler and ninja, and no nvcc, wherever the machine keeps one."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("c++", "cc", "g++", "gcc", "ninja", "as", "ld", "ar", "ranlib"):
        path = shutil.which(tool)
        if path is not None:
            (folder / tool).symlink_to(path)
    kept = {name: value for name, value in os.environ.items() if name not in ("CUDACXX", "CUDA_HOME", "CUDA_PATH")}
    return {**kept, "PATH": str(folder)}


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    roots = {name.split("/")[0] for name in names}
    assert {root for root in roots if not re.fullmatch(r"pycomm|pycomm_command|pycomm-.*\.dist-info", root)} == set()
    assert "pycomm/py.typed" in names
    assert "pycomm/_C.pyi" in names
    assert len([name for name in names if re.fullmatch(r"pycomm/_C\..*\.so", name)]) == 1
    assert len([name for name in names if name.endswith("licenses/LICENSE")]) == 1
    unwanted = re.compile(r"(^|/)(tests?|benchmarks?|examples?)(/|_)|\.(cpp|hpp|cu|cuh)$")
    assert [name for name in names if unwanted.search(name)] == []


def test_the_wheel_has_every_python_file(wheel):
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    packages = [ROOT / "pycomm", ROOT / "pycomm_command"]
    assert shipped == {path.relative_to(ROOT).as_posix() for package in packages for path in package.rglob("*.py")}


def test_the_extension_needs_only_system_libraries(wheel, tmp_path):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".so"))
    status, output = run(["ldd", archive.extract(name, tmp_path)])
    assert status == 0, output
    libraries = {Path(line.split()[0]).name.split(".so")[0] for line in output.splitlines()}
    assert libraries >= {"libc", "libstdc++"}
    assert libraries - SYSTEM_LIBRARIES - LOADERS == set()


def test_the_sdist_holds_the_sources(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "CMakeLists.txt", "constraints.txt", "pycomm/_C.pyi"} <= names
    assert [name for name in names if name.endswith((".so", ".pyc")) or name.startswith(("build/", "dist/"))] == []


def test_cuda_on_without_nvcc_is_an_error_that_says_what_to_do(configure, tmp_path):
    defines = ["-DPYCOMM_CUDA=ON", "-DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF"]
    status, output, _ = configure(defines, env=without_cuda(tmp_path))
    assert status != 0
    assert "PYCOMM_CUDA=ON needs nvcc, and none was found" in output
    assert "CUDA_HOME" in output


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_cuda_on_chooses_architectures_and_auto_needs_a_gpu(configure, tmp_path):
    status, output, _ = configure(["-DPYCOMM_CUDA=ON"])
    assert status == 0, output
    assert re.search(r"CUDA code by nvcc [\d.]+ for 80-real;90-real;(100-real;100|90)-virtual", output)
    if not list(Path("/proc/driver/nvidia/gpus").glob("*")):
        shutil.rmtree(tmp_path / "build")
        status, output, _ = configure(["-DPYCOMM_CUDA=AUTO"])
        assert status == 0, output
        assert "no CUDA code, since this machine has no GPU" in output


def test_an_unknown_cuda_setting_is_an_error_that_names_the_choices(configure):
    status, output, _ = configure(["-DPYCOMM_CUDA=maybe"])
    assert status != 0
    assert "PYCOMM_CUDA=maybe: it is one of AUTO, ON, OFF" in output


@pytest.mark.parametrize("setting", ["AUTO", "OFF"])
def test_no_cuda_is_needed(configure, tmp_path, setting):
    status, output, _ = configure([f"-DPYCOMM_CUDA={setting}"], env=without_cuda(tmp_path))
    assert status == 0, output


def test_max_jobs_bounds_the_compilers(configure):
    status, output, build = configure(env={**os.environ, "MAX_JOBS": "3"})
    assert status == 0, output
    ninja = (build / "build.ninja").read_text()
    pools = (build / "CMakeFiles" / "rules.ninja").read_text() + ninja
    assert re.search(r"^pool compile\n  depth = 3$", pools, flags=re.MULTILINE)
    objects = re.findall(r"^build \S+\.o: .*?^$", ninja, flags=re.MULTILINE | re.DOTALL)
    assert len(objects) > 5
    assert all("\n  pool = compile\n" in statement for statement in objects)


def test_max_jobs_that_is_no_number_is_an_error(configure):
    status, output, _ = configure(env={**os.environ, "MAX_JOBS": "all"})
    assert status != 0
    assert "MAX_JOBS=all is not a positive whole number" in output


def test_the_stub_names_what_the_extension_has():
    from pycomm import _C

    stub = ast.parse((ROOT / "pycomm" / "_C.pyi").read_text())
    functions = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}
    constants = {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}
    classes = {node.name: node for node in stub.body if isinstance(node, ast.ClassDef)}
    assert functions | constants | classes.keys() == {name for name in dir(_C) if not name.startswith("_")}
    for name, node in classes.items():
        members = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
        members |= {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
        public = {member for member in members if not member.startswith("_")}
        assert public == {member for member in vars(getattr(_C, name)) if not member.startswith("_")}, name


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """installed(*arguments): `pycomm *arguments` of the wheel, run from the checkout, as README tells people to."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "wheel")
    venv.create(folder / "venv")
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    # Plain paths: the .pth files of the outer environment, and so its editable install, are not read.
    (site / "paths.pth").write_text(f"{folder / 'wheel'}\n{sysconfig.get_path('purelib')}\n")
    script = folder / "pycomm"
    script.write_text("import sys\nfrom pycomm.cli import main\nsys.exit(main())\n")
    return lambda *arguments: run([folder / "venv/bin/python", script, *arguments], cwd=ROOT)


def test_workers_import_the_installed_package_and_not_the_checkout(installed, tmp_path):
    status, output = installed("doctor")
    assert status == 0, output
    small = ["--model.vocab-size", "300", "--model.hidden", "16", "--model.num-heads", "2", "--model.num-layers", "1"]
    status, output = installed(
        "pretrain", "--steps", "2", *small, "--text", ROOT / "pycomm", "--out", tmp_path, "--run.sample-tokens", "3"
    )
    assert status == 0, output

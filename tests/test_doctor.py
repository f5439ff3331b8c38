"""The doctor tells the truth: on this machine, on invented ones, and when its own ranks fail."""

import json
import os
import re
import sys
from pathlib import Path

import psutil
import pytest

from pycomm import _C, doctor
from pycomm.doctor import host
from pycomm.doctor.checks import Check, Report, Section, format_bytes
from pycomm.doctor.self_test import self_test


def plant(root: Path, files: dict[str, str]) -> tuple[Path, Path]:
    """Write files below root and return its (proc, sys)."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / "proc", root / "sys"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "50000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "300000 100000\n",
            },
            0.5,
        ),
        # A container that shows the host's path of its group, but not the group: the root is its own.
        ({"proc/self/cgroup": "0::/docker/x\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2.0),
        (
            {
                "proc/self/cgroup": "3:cpuacct,cpu:/job\n2:memory:/job\n0::/\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
            },
            2.5,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
    ],
)
def test_cpu_quota(tmp_path, files, quota):
    assert host.cpu_quota(*plant(tmp_path, files)) == quota


def test_a_quota_below_the_cores_is_a_warning_with_advice(tmp_path):
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}
    check = host.cores(*plant(tmp_path, files))
    assert check.status == "warning"
    assert "0.5" in check.detail
    assert "at most 1 ranks" in check.advice


def test_a_forced_simd_level_is_told(monkeypatch):
    monkeypatch.setenv("PYCOMM_SIMD", "scalar")
    assert host.simd().status == "warning"
    assert "scalar (PYCOMM_SIMD)" in host.simd().detail
    monkeypatch.delenv("PYCOMM_SIMD")
    assert host.simd().status == "ok"


@pytest.mark.parametrize(
    ("limits", "num_bytes"),
    [
        ({}, 4096 * 1024),
        ({"memory.max": "max\n", "memory.current": "5\n"}, 4096 * 1024),
        ({"memory.max": "1000000\n", "memory.current": "400000\n"}, 600_000),
        ({"memory.max": "1000\n", "memory.current": "2000\n"}, 0),
    ],
)
def test_available_memory_is_the_tightest_limit(tmp_path, limits, num_bytes):
    files = {f"sys/fs/cgroup/job/{name}": text for name, text in limits.items()}
    files |= {"proc/self/cgroup": "0::/job\n", "proc/meminfo": "MemTotal: 8192 kB\nMemAvailable: 4096 kB\n"}
    assert host.available_memory(*plant(tmp_path, files)) == num_bytes


def test_caches_and_huge_pages_are_read(tmp_path):
    cache = "sys/devices/system/cpu/cpu0/cache"
    files = {"sys/kernel/mm/transparent_hugepage/shmem_enabled": "always within_size [advise] never\n"}
    for index, (level, kind, size) in enumerate(
        [("1", "Data", "32K"), ("1", "Instruction", "32K"), ("2", "Unified", "1024K")]
    ):
        files |= {
            f"{cache}/index{index}/level": level,
            f"{cache}/index{index}/type": kind,
            f"{cache}/index{index}/size": size,
        }
    _, sys_root = plant(tmp_path, files)
    assert host.caches(sys_root).detail == "L1d 32 KiB, L2 1 MiB"
    assert host.shmem_huge_pages(sys_root).detail == "advise"
    assert host.caches(tmp_path / "nowhere").status == "absent"


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (335544320, "320 MiB"), (3 << 40, "3 TiB")]
)
def test_format_bytes(num_bytes, text):
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(("code", "version"), [(2804, "2.8.4"), (20903, "2.9.3"), (22809, "2.28.9"), (23102, "2.31.2")])
def test_nccl_version_text(code, version):
    assert _C.nccl_version_text(code) == version


def test_an_extension_of_another_version_is_a_failure():
    check = doctor.extension("0.2.0", "0.1.0", 0xC0DE)
    assert check.status == "failed"
    assert "0.2.0" in check.detail
    assert "0.1.0" in check.detail
    assert "pip install" in check.advice
    assert doctor.extension("0.1.0", "0.1.0", 0xC0DE).status == "ok"


@pytest.mark.parametrize(("status", "healthy"), [("ok", True), ("absent", True), ("warning", True), ("failed", False)])
def test_only_a_failure_makes_the_report_unhealthy(status, healthy):
    assert Report([Section("a", [Check("b", "ok", ""), Check("c", status, "")])]).healthy is healthy


WORKERS = {
    "hangs": ("import signal\nsignal.pause()\n", "rank 0 did not finish in time; rank 1 did not finish in time"),
    "dies": ("raise SystemExit('out of luck')\n", "rank 0: out of luck; rank 1: out of luck"),
    "is_killed": ("import os\nos.kill(os.getpid(), 9)\n", "rank 0: exit status -9; rank 1: exit status -9"),
    "is_wrong": (
        'print(\'{"wrong": ["all_reduce"], "latency_us": 1.0, "bandwidth_gbps": 1.0}\')\n',
        "wrong result: all_reduce",
    ),
}


@pytest.mark.parametrize("name", WORKERS)
def test_a_self_test_that_fails_says_how_and_leaves_no_process(tmp_path, monkeypatch, name):
    text, said = WORKERS[name]
    (tmp_path / f"rank_{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))  # of the ranks too
    before = psutil.Process().children()
    (check,) = self_test(3.0, worker=f"rank_{name}")
    assert (check.status, check.detail) == ("failed", said)
    assert psutil.Process().children() == before


def test_the_report_on_this_machine_as_json(capsys, monkeypatch):
    # As inside someone's launcher: the self-test's ranks are its own.
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    status = doctor.main(["--json"])
    found = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for section in found["sections"] for check in section["checks"]}
    assert checks["two ranks"]["status"] == "ok", checks["two ranks"]
    assert checks["Python"]["detail"] == ".".join(map(str, sys.version_info[:3]))
    assert checks["cores"]["detail"].startswith(f"{len(os.sched_getaffinity(0))} usable")
    assert {"latency", "bandwidth", "CUDA toolkit", "CUDA driver", "NCCL", "memfd_create", "auto"} <= checks.keys()
    assert (status, found["healthy"]) == (0, True)


def test_the_report_for_people_marks_what_fails(capsys, monkeypatch):
    monkeypatch.setattr(host, "memfd", lambda: Check("memfd_create", "failed", "no", "allow [it] here"))
    assert doctor.main(["--timeout-s", "0"]) == 1
    text = capsys.readouterr().out
    assert re.search("✓ +pycomm", text)
    assert re.search("✗ +memfd_create", text)
    assert "→ allow [it] here" in text
    assert "Self-test" not in text

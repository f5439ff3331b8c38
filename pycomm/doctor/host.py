"""The machine: cores, caches, memory, and the limits that the host transport meets."""

import os
import platform
import resource
from collections.abc import Iterator
from pathlib import Path

from pycomm import _C, env
from pycomm.doctor.checks import Check, format_bytes

PROC = Path("/proc")
SYS = Path("/sys")


def machine() -> list[Check]:
    return [
        Check("kernel", "ok", f"{platform.system()} {platform.release()} on {platform.machine()}"),
        cores(),
        caches(),
        simd(),
        memory(),
    ]


def limits() -> list[Check]:
    return [memfd(), pidfd(), open_files(), shmem_huge_pages()]


def cgroup_dirs(controller: str, proc: Path = PROC, sys: Path = SYS) -> Iterator[Path]:
    """This process's control group and its ancestors, for either version of cgroups; only those that exist here."""
    root = sys / "fs" / "cgroup"
    for line in read_text(proc / "self" / "cgroup").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controller if controllers else root
        group = base / name.strip("/")
        yield from (path for path in (group, *group.parents) if path.is_relative_to(base) and path.is_dir())


def cpu_quota(proc: Path = PROC, sys: Path = SYS) -> float | None:
    """Cores' worth of time that the tightest enclosing control group grants, or None without a quota."""
    quotas = []
    for path in cgroup_dirs("cpu", proc, sys):
        words = read_text(path / "cpu.max").split() or [
            *read_text(path / "cpu.cfs_quota_us").split(),
            *read_text(path / "cpu.cfs_period_us").split(),
        ]
        if len(words) == 2 and words[0] not in ("max", "-1"):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def available_memory(proc: Path = PROC, sys: Path = SYS) -> int:
    """Bytes that can still be allocated: the kernel's estimate, or less where a control group is tighter."""
    fields = dict(line.split(":", 1) for line in read_text(proc / "meminfo").splitlines())
    free = [int(fields["MemAvailable"].split()[0]) * 1024]
    for path in cgroup_dirs("memory", proc, sys):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            words = read_text(path / limit).split() + read_text(path / used).split()
            if len(words) == 2 and words[0] != "max":
                free.append(int(words[0]) - int(words[1]))
    return max(min(free), 0)


def cores(proc: Path = PROC, sys: Path = SYS) -> Check:
    usable, quota = len(os.sched_getaffinity(0)), cpu_quota(proc, sys)
    detail = f"{usable} usable of {os.cpu_count()}"
    if quota is not None and quota < usable:
        advice = f"start at most {max(int(quota), 1)} ranks here: more take turns, and every wait becomes longer"
        return Check("cores", "warning", f"{detail}, time for {quota:g} (control group quota)", advice)
    return Check("cores", "ok", detail)


def caches(sys: Path = SYS) -> Check:
    found = []
    for index in sorted((sys / "devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (read_text(index / name).strip() for name in ("level", "type", "size"))
        if kind != "Instruction" and size.endswith("K"):
            suffix = "d" if kind == "Data" else ""
            found.append(f"L{level}{suffix} {format_bytes(int(size[:-1]) * 1024)}")
    return Check("caches", "ok" if found else "absent", ", ".join(found) or "not told by the kernel")


def simd() -> Check:
    best, forced = _C.best_simd_level(), env.simd()
    if forced in (None, best):
        return Check("SIMD", "ok", f"{best}, the best this processor has")
    return Check("SIMD", "warning", f"{forced} (PYCOMM_SIMD), while the processor has {best}", "unset PYCOMM_SIMD")


def memory() -> Check:
    return Check("memory", "ok", f"{format_bytes(available_memory())} available")


def memfd() -> Check:
    try:
        fd = os.memfd_create("pycomm-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        return Check("memfd_create", "failed", str(error), "the host transport needs it: allow the system call here")
    try:
        os.posix_fallocate(fd, 0, 1 << 20)
    except OSError as error:
        return Check("memfd_create", "failed", f"1 MiB cannot be reserved: {error}", "raise the memory limit")
    finally:
        os.close(fd)
    return Check("memfd_create", "ok", "works")


def pidfd() -> Check:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        return Check("pidfd_open", "failed", str(error), "dead ranks are seen by it: Linux 5.3, or allow the call here")
    return Check("pidfd_open", "ok", "works")


def open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    detail = f"{soft} ({hard} at most)"
    if soft != resource.RLIM_INFINITY and soft < 1024:
        return Check("open files", "warning", detail, "ulimit -n 1024, or more with many ranks")
    return Check("open files", "ok", detail)


def shmem_huge_pages(sys: Path = SYS) -> Check:
    text = read_text(sys / "kernel/mm/transparent_hugepage/shmem_enabled")
    chosen = text.partition("[")[2].partition("]")[0]
    if chosen in ("", "never", "deny"):
        return Check("huge pages in shared memory", "absent", chosen or "not told by the kernel")
    return Check("huge pages in shared memory", "ok", chosen)


def read_text(path: Path) -> str:
    """The file's text, or nothing where the kernel or a container does not show it."""
    try:
        return path.read_text()
    except OSError:
        return ""

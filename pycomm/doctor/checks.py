"""What one line of the report is."""

from dataclasses import dataclass
from typing import Literal

# ok: works. absent: is not here and need not be. warning: works, with a drawback. failed: pycomm cannot work so.
Status = Literal["ok", "absent", "warning", "failed"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. ``advice`` says what to do about it, where something can be done."""

    name: str
    status: Status
    detail: str
    advice: str = ""


@dataclass(frozen=True)
class Section:
    title: str
    checks: list[Check]


@dataclass(frozen=True)
class Report:
    """All that the doctor found. Healthy: no check failed."""

    sections: list[Section]

    @property
    def healthy(self) -> bool:
        return all(check.status != "failed" for section in self.sections for check in section.checks)


def format_bytes(num_bytes: int) -> str:
    """Binary units, three digits at least: 33554432 is "32 MiB", 1610612736 is "1.5 GiB"."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"

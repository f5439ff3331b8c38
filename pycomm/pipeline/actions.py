"""A pipeline schedule as data: what every rank does, in order. No tensor in sight.

A model is cut into stages 0 … S-1, each on a rank; a batch into micro-batches 0 … m-1. Users may write schedules by
hand or as CSV; :mod:`pycomm.pipeline.verify` says whether one is sound.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from pycomm.errors import ScheduleError

__all__ = ["COMPUTE", "KINDS", "TRANSFERS", "Action", "Schedule", "held_after", "last_uses", "mate", "steps"]

COMPUTE = ("F", "B", "W", "BW")
TRANSFERS = ("SEND_F", "RECV_F", "SEND_B", "RECV_B")
KINDS = COMPUTE + TRANSFERS
_MATES = MappingProxyType(
    {"SEND_F": ("RECV_F", 1), "RECV_F": ("SEND_F", -1), "SEND_B": ("RECV_B", -1), "RECV_B": ("SEND_B", 1)}
)
COLUMNS = ("rank", "index", "kind", "stage", "microbatch", "group")


class Action(NamedTuple):
    """One thing that a rank does.

    Attributes:
        kind: "F" forward, "B" gradient of the input, "W" gradients of the weights, "BW" both at once; "SEND_F" and
            "SEND_B": ``stage`` sends its output or its input's gradient; "RECV_F" and "RECV_B": ``stage`` receives
            its input or its output's gradient.
        stage: which part of the model.
        microbatch: which part of the batch.
        group: transfers of a rank with one number stand side by side and progress together; None: alone.
    """

    kind: str
    stage: int
    microbatch: int
    group: int | None = None

    @property
    def key(self) -> tuple[str, int, int]:
        """The action without its group."""
        return self[:3]

    def __str__(self) -> str:
        group = "" if self.group is None else f" (group {self.group})"
        return f"{self.kind} of stage {self.stage}, micro-batch {self.microbatch}{group}"


@dataclass
class Schedule:
    """What every rank does in one step of training.

    Attributes:
        ranks: one list a rank, in order of execution.
        rank_of: stage -> rank.
        num_microbatches: m.
        memory_bound: of each rank, the most stage-microbatches that it promises to hold at once; None: no promise.
    """

    ranks: list[list[Action]]
    rank_of: list[int]
    num_microbatches: int
    memory_bound: list[int] | None = None

    @property
    def num_stages(self) -> int:
        return len(self.rank_of)

    def crosses(self, stage: int) -> bool:
        """Whether ``stage`` and the next one are on different ranks."""
        return self.rank_of[stage] != self.rank_of[stage + 1]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one line an action, with the columns rank,index,kind,stage,microbatch,group (empty: none)."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            for rank, actions in enumerate(self.ranks):
                writer.writerows((rank, index, *action) for index, action in enumerate(actions))

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str]) -> Schedule:
        """Read what :meth:`to_csv` wrote; lines may come in any order. A stage lives where its actions are.

        Raises:
            ScheduleError: a line makes no sense; names it.
        """
        found: dict[int, dict[int, Action]] = {}
        rank_of: dict[int, int] = {}
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = set(COLUMNS) - set(reader.fieldnames or ())
            if missing:
                raise ScheduleError(f"{path}: columns {sorted(missing)} are missing; expected {','.join(COLUMNS)}")
            for row in reader:
                try:
                    rank, index, action = _parse(row)
                except (ValueError, TypeError) as error:
                    raise ScheduleError(f"{path}, line {reader.line_num}: {error}") from None
                if index in found.setdefault(rank, {}):
                    raise ScheduleError(f"{path}, line {reader.line_num}: rank {rank} has two actions number {index}")
                if rank_of.setdefault(action.stage, rank) != rank:
                    raise ScheduleError(
                        f"{path}, line {reader.line_num}: stage {action.stage} is on rank {rank_of[action.stage]}, "
                        f"not on rank {rank}"
                    )
                found[rank][index] = action
        if not found or sorted(rank_of) != list(range(len(rank_of))):
            raise ScheduleError(f"{path}: stages are numbered from 0 without gaps, found {sorted(rank_of)}")
        num_actions = sum(map(len, found.values()))
        num_microbatches = max(action.microbatch for actions in found.values() for action in actions.values()) + 1
        for count, what in ((max(found) + 1, "ranks"), (num_microbatches, "micro-batches")):
            if count > num_actions:
                raise ScheduleError(f"{path}: {num_actions} actions cannot be those of {count} {what}")
        ranks = [[action for _, action in sorted(found.get(rank, {}).items())] for rank in range(max(found) + 1)]
        return cls(ranks, [rank_of[stage] for stage in range(len(rank_of))], num_microbatches)


def mate(action: Action) -> tuple[str, int, int]:
    """The other end of a transfer: kind, stage and micro-batch."""
    kind, distance = _MATES[action.kind]
    return kind, action.stage + distance, action.microbatch


def steps(actions: Sequence[Action]) -> list[tuple[Action, ...]]:
    """Cut a rank's list into what it does at once: a computation, a transfer, or a group of transfers."""
    cut: list[tuple[Action, ...]] = []
    for action in actions:
        if cut and action.group is not None and cut[-1][0].group == action.group:
            cut[-1] += (action,)
        else:
            cut.append((action,))
    return cut


def last_uses(actions: Sequence[Action]) -> set[tuple[str, int, int]]:
    """The actions after which a rank needs nothing of a stage's micro-batch any more: its last B, W or BW."""
    last = {action[1:3]: action.key for action in actions if action.kind in ("B", "W", "BW")}
    return set(last.values())


def held_after(actions: Sequence[Action]) -> Iterator[tuple[Action, int]]:
    """Each action of a rank, and how many stage-microbatches it holds then: each from its F to its last B or W."""
    release = last_uses(actions)
    held = 0
    for action in actions:
        if action.kind == "F":
            held += 1
        yield action, held
        if action.key in release:
            held -= 1


def _parse(row: dict[str, str]) -> tuple[int, int, Action]:
    rank, index, stage, microbatch = (int(row[name]) for name in ("rank", "index", "stage", "microbatch"))
    if min(rank, index, stage, microbatch) < 0:
        raise ValueError("a number is negative")
    if row["kind"] not in KINDS:
        raise ValueError(f"kind is {row['kind']!r}: it is one of {', '.join(KINDS)}")
    return rank, index, Action(row["kind"], stage, microbatch, int(row["group"]) if row["group"] else None)

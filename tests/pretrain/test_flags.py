"""Flags, files and variables that make no sense: one line that says so, exit code 2, and nothing started."""

import dataclasses
import math
import os
import re
from pathlib import Path

import pytest

from pycomm import cli
from pycomm.pretrain import PretrainConfig
from tests.pretrain.helpers import TEXT

NOT_TEXT = os.fsdecode(b"\xff")
HUGE = 10**32
WHOLE = (
    *("nproc", "dp", "pp", "tp", "zero", "steps", "seed", "global-batch", "micro-batch", "model.vocab-size"),
    *("model.max-seq", "model.num-layers", "model.num-heads", "model.hidden", "model.mlp-ratio", "optim.warmup-steps"),
    *("data.val-sequences", "run.val-every", "run.save-every", "run.keep", "run.sample-tokens"),
)
REAL = (
    *("optim.lr", "optim.min-lr-ratio", "optim.weight-decay", "optim.beta1", "optim.beta2", "optim.eps", "optim.clip"),
    *("data.max-text-mb", "data.held-out", "run.temperature", "run.bucket-mb", "run.timeout-s", "run.peak-tflops"),
)
POSITIVE = (
    *("nproc", "steps", "global-batch", "micro-batch", "model.max-seq", "model.hidden", "run.keep", "data.held-out"),
    *("run.bucket-mb", "run.timeout-s", "run.peak-tflops"),
)
OTHERS = [
    ["--steps", "abc"],
    ["--optim.lr", ""],
    ["--optim.lr", "nan"],
    ["--run.sample-tokens", str(HUGE)],
    ["--run.temperature", "1e-320"],
    ["--optim.beta1", "1"],
    ["--seed", str(1 << 63)],
    ["--model.hidden", "99999992", "--model.num-layers", "99999"],
    ["--micro-batch", "1000000", "--global-batch", "2000000"],
    ["--global-batch", "17"],
    ["--dp", "1"],
    ["--model.positions", "x"],
    ["--nproc"],
    ["small"],
    ["--run.sample-prompt", NOT_TEXT],
    ["--out", NOT_TEXT],
    ["--json", NOT_TEXT],
    ["--resume", NOT_TEXT],
    ["--text", NOT_TEXT],
    ["--text", "x" * 300],
    ["--text", "nowhere"],
    ["--out", "/"],
    ["--out", "file"],
    ["--out", "file/below"],
    ["--out", "dangling"],
    ["--json", "."],
    ["--json", "file/below"],
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a file, a dangling link, a folder, and damaged checkpoints."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, info in {"no_text": b"\xff", "no_object": b"[]", "no_step": b'{"format": 1}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "info.json").write_bytes(info)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    return tmp_path


def outcome(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int | str | None, str]:
    """Exit code and stderr."""
    try:
        code: int | str | None = cli.main(arguments)
    except SystemExit as stopped:  # of the parsers
        code = stopped.code
    return code, capsys.readouterr().err


def refusal(flag: str, value: float) -> str:
    """What the check of the settings says of a number, which takes no time, unlike the command line's parser."""
    *group, name = flag.replace("-", "_").split(".")
    try:
        config = PretrainConfig()
        if group:
            part = dataclasses.replace(getattr(config, group[0]), **{name: value})
            config = dataclasses.replace(config, **{group[0]: part})
        else:
            config = dataclasses.replace(config, **{name: value})
        config.validate(2)
    except ValueError as error:
        return str(error)
    return ""


def test_no_number_is_taken_that_makes_no_sense() -> None:
    """Of 100 numbers, those that only a worker, or torch, or the last step would have choked on included."""
    cases = [(flag, value) for flag in WHOLE for value in (-1, HUGE)]
    cases += [(flag, value) for flag in REAL for value in (-1.0, math.nan, math.inf, -math.inf, 1e300)]
    cases += [(flag, 0) for flag in POSITIVE]
    for flag, value in cases:
        said = refusal(flag, value)
        name = flag.split(".")[-1]
        assert name in said or name.replace("-", "_") in said, (flag, value, said)
        assert "\n" not in said
    assert not refusal("seed", 7)


def test_no_flag_starts_workers_or_ends_in_a_traceback(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pycomm.pretrain.launch.launch", lambda *_: pytest.fail("workers were started"))
    for case in OTHERS:
        code, said = outcome(["pretrain", *case], capsys)
        assert code == 2, (case, code, said)
        assert case[0].split(".")[-1].removeprefix("--") in said, (case, said)
        assert said.startswith("pycomm pretrain: ") is (said.count("\n") == 1), (case, said)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 is not below WORLD_SIZE=0"),
        ({"RANK": "x"}, "RANK='x' is not a whole number"),
        *(({"MASTER_PORT": port}, f"MASTER_PORT={port} is no port") for port in ("99999", "-1", "0")),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT='abc' is not a whole number"),
    ],
)
def test_variables_of_a_launcher(
    variables: dict[str, str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (usual | variables).items():
        monkeypatch.setenv(name, value)
    code, errors = outcome(["pretrain"], capsys)
    assert (code, errors.count("\n")) == (2, 1), errors
    assert errors.startswith(f"pycomm pretrain: {said}")


SMALL = [
    *("--nproc", "1", "--steps", "2", "--global-batch", "2", "--micro-batch", "2", "--run.sample-tokens", "2"),
    *("--model.vocab-size", "400", "--model.max-seq", "16", "--model.num-layers", "1", "--model.num-heads", "2"),
    *("--model.hidden", "16", "--run.timeout-s", "60", "--run.save-every", "1"),
]


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYCOMM_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "flags-cache"))


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--resume", "nowhere"], "--resume nowhere: no checkpoint there"),
        (["--resume", "x" * 300], "--resume x+: File name too long"),
        (["--resume", "no_text"], "the checkpoint .*no_text is damaged"),
        (["--resume", "no_object"], "the checkpoint .*no_object is damaged"),
        (["--resume", "no_step"], "the checkpoint .*no_step is damaged"),
        (["--json", "/dev/full"], "--json /dev/full: No space left on device"),
        (["--out", "x" * 300], r"the run's folder \(--out x+\): File name too long"),
        (["--out", "/proc/run"], r"the run's folder \(--out /proc/run\): No such file"),
        (["--text", "file"], "too little text"),
    ],
)
def test_files_that_are_looked_at_late_are_told_in_one_line(
    arguments: list[str], said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = [] if "--text" in arguments else ["--text", *map(str, TEXT)]
    code, errors = outcome(["pretrain", *SMALL, *text, *arguments], capsys)
    assert (code, errors.count("\n")) == (2, 1), errors
    assert re.match(f"pycomm pretrain: .*{said}", errors), errors


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("step", [0, 1])
def test_a_full_disk_is_told_in_one_line(
    step: int, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a checkpoint is written, which torch wraps in errors of its own, and before: nothing is lost silently."""
    opened = Path.open

    def full(path: Path, *args: object, **kwargs: object) -> object:
        if path.suffix == ".distcp" and f"step_00000{step + 1}" in str(path):
            raise OSError(28, "No space left on device", str(path))
        return opened(path, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", full)
    code, errors = outcome(["pretrain", *SMALL, "--text", *map(str, TEXT), "--out", "run"], capsys)
    assert (code, errors.count("\n")) == (2, 1), errors
    assert errors.startswith("pycomm pretrain: the run's folder (--out run): No space left on device")
    assert "make room" in errors
    assert (here / "run" / "checkpoints" / "latest").exists() is bool(step)


@pytest.mark.usefixtures("cache")
def test_names_of_text_files_need_not_be_utf_8(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = here / f"folder{NOT_TEXT}"
    folder.mkdir()
    (folder / f"file{NOT_TEXT}").write_text("some words to learn " * 200)
    assert cli.main(["pretrain", *SMALL, "--text", str(folder), "--out", "run"]) == 0
    assert "folder\\udcff" in capsys.readouterr().out


def test_flags_of_schedule_and_doctor(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "latin.csv").write_bytes(b"\xff")
    (here / "far.csv").write_text("rank,index,kind,stage,microbatch,group\n99999999,0,F,0,0,\n")
    (here / "many.csv").write_text("rank,index,kind,stage,microbatch,group\n0,0,F,0,99999999999,\n")
    schedule = ["schedule", "interleaved_1f1b", "--ranks", "2", "--microbatches", "2", "--chunks", "2"]
    wrong = ("-1", "nan", "inf", "1e400", "abc", "")
    cases = [[*schedule, f"--{flag}={value}"] for flag in ("f", "b", "w", "comm") for value in wrong]
    counts = ("-1", "0", "1.5", "abc", "", "99999999999999999999")
    cases += [[*schedule, f"--{flag}={value}"] for flag in ("ranks", "microbatches", "chunks") for value in counts]
    paths = ("file/below", ".", "/dev/full", "", "x" * 300)
    cases += [[*schedule, flag, path] for flag in ("--svg", "--csv") for path in paths]
    cases += [["schedule", name] for name in ("", "x", "gpipe", "nowhere.csv", "latin.csv", f"{NOT_TEXT}.csv")]
    cases += [["doctor", f"--timeout-s={value}"] for value in (*wrong, "1e300")]
    cases += [["doctor", "--tune"]]
    for case in cases:
        code, said = outcome(case, capsys)
        assert code == 2, (case, code, said)
        assert said, case
    for name in ("far.csv", "many.csv"):  # a schedule, but not a sound one
        assert outcome(["schedule", name], capsys)[0] == 1

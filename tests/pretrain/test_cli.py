"""``pycomm pretrain`` as people start it: real processes, real launcher, real signals."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

import pycomm
from pycomm import cli
from tests.pretrain.helpers import TEXT

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 120.0  # against a hang; nothing here takes a tenth of it on an idle machine
SMALL = [
    *("--model.vocab-size", "400", "--model.max-seq", "16", "--model.num-layers", "1", "--model.num-heads", "2"),
    *("--model.hidden", "16", "--global-batch", "4", "--micro-batch", "1", "--run.sample-tokens", "5"),
    *("--text", *map(str, TEXT)),
]


@pytest.fixture
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    outside = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    path = [entry for entry in (outside.get("PYTHONPATH"), str(ROOT)) if entry]
    cache = tmp_path_factory.getbasetemp() / "cli-cache"  # one for all tests of a session
    return outside | {"PYCOMM_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(path)}


def pretrain(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pycomm.cli", "pretrain", *SMALL, *arguments]


@contextmanager
def endless_run(environment: dict[str, str], out: Path) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A run of two workers that has done its first step, and the processes below the launcher."""
    command = pretrain("--steps", "1000000", "--out", str(out), "--run.save-every", "1000000")
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 1/"):
                break
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2
        yield process, workers
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=DEADLINE_S)


def assert_all_end(workers: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(workers, timeout=DEADLINE_S)
    for process in alive:
        process.kill()
    assert not alive, "workers outlived the run"


def test_a_whole_run_then_another_then_a_resumed_one(environment: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["--nproc", "2", "--out", str(out), "--json", str(tmp_path / "copy.jsonl")]
    done = subprocess.run(
        pretrain("--steps", "3", *arguments), env=environment, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 0, done.stderr
    assert "ranks: 2 (shm)" in done.stdout
    assert "generated text" in done.stdout
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert {"step", "loss", "lr", "grad_norm", "tokens_per_s", "mfu", "exposed_comm_ms"} <= rows[0].keys()
    assert (tmp_path / "copy.jsonl").read_text() == (out / "metrics.jsonl").read_text()
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "checkpoints" / "latest" / "info.json").is_file()
    assert (out / "tokenizer.json").is_file()
    assert f"checkpoint: {out / 'checkpoints' / 'step_000003'}" in done.stdout

    # Alone, without a launcher, beside the first run; same data and seed, so its first loss differs by rounding only.
    alone = subprocess.run(
        pretrain("--steps", "1", "--nproc", "1", "--out", str(out)),
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert alone.returncode == 0, alone.stderr
    assert f"run folder: {out}-2" in alone.stdout
    assert "holds a run already" in alone.stdout
    first = json.loads((tmp_path / "run-2" / "metrics.jsonl").read_text())
    # Means of 64 fp32 losses of magnitude 6, grouped differently: at most 64 roundings of 2**-24 each.
    assert first["loss"] == pytest.approx(rows[0]["loss"], abs=6 * 64 * 2**-24)

    resumed = subprocess.run(
        pretrain("--steps", "4", "--resume", str(out), *arguments[2:]),
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "after step 3" in resumed.stdout
    again = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert again[:3] == rows
    assert [row["step"] for row in again] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("signum", "whole_group", "code"),
    [(signal.SIGINT, True, 130), (signal.SIGINT, False, 130), (signal.SIGTERM, False, 143)],
)
def test_a_stop_ends_all_workers_and_keeps_a_checkpoint(
    environment: dict[str, str], tmp_path: Path, signum: signal.Signals, whole_group: bool, code: int
) -> None:
    with endless_run(environment, tmp_path / "run") as (process, workers):
        (os.killpg if whole_group else os.kill)(process.pid, signum)
        output, errors = process.communicate(timeout=DEADLINE_S)
        assert_all_end(workers)
    assert process.returncode == code
    assert "Traceback" not in errors
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    assert (saved / "info.json").is_file()
    assert f"checkpoint: {saved}" in output
    assert f"--resume {saved}" in output
    assert "go on with: pycomm pretrain --model.vocab-size 400" in output


def test_a_killed_worker_ends_the_run(environment: dict[str, str], tmp_path: Path) -> None:
    with endless_run(environment, tmp_path / "run") as (process, workers):
        workers[-1].send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=DEADLINE_S)
        assert_all_end(workers)
    assert process.returncode == 1
    assert "was ended by SIGKILL" in errors
    assert "Traceback" not in errors


def test_workers_end_with_a_killed_launcher(environment: dict[str, str], tmp_path: Path) -> None:
    with endless_run(environment, tmp_path / "run") as (process, workers):
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=DEADLINE_S)
        assert_all_end(workers)


def test_a_bug_in_one_worker_is_shown_once(environment: dict[str, str], tmp_path: Path) -> None:
    code = (
        "import sys; from pycomm.pretrain.launch import launch; from pycomm_command import StopSignals; "
        'code = \'import runpy; runpy.run_module("tests.pretrain.failing_worker", run_name="__main__")\'; '
        f"sys.exit(launch(2, code, [{str(tmp_path / 'run')!r}], StopSignals()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert "rank 1 failed:" in done.stderr
    assert done.stderr.rstrip().endswith("ZeroDivisionError: a bug on rank 1")
    assert "torch/distributed/elastic" not in done.stderr
    assert len(done.stderr.splitlines()) < 40


def test_settings_that_do_not_fit_are_told_before_workers_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain", "--pp", "2"]) == 2
    assert "data parallel only" in capsys.readouterr().err
    assert cli.main(["pretrain", "--nproc", "2", "--dp", "1"]) == 2
    assert "--dp must equal" in capsys.readouterr().err
    assert cli.main(["pretrain", "--nproc", "0"]) == 2
    assert "--nproc" in capsys.readouterr().err


def test_an_error_that_only_a_worker_can_see_is_told_once(environment: dict[str, str], tmp_path: Path) -> None:
    arguments = ["--resume", str(tmp_path / "nothing"), "--out", str(tmp_path / "run")]
    done = subprocess.run(pretrain(*arguments), env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 2
    assert done.stderr.count(f"pycomm pretrain: --resume {tmp_path / 'nothing'}: no checkpoint there") == 1
    assert "Traceback" not in done.stderr
    assert "exit code" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_version_help_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"pycomm {pycomm.__version__}\n"
    assert cli.main(["--help"]) == 0
    assert "pretrain" in capsys.readouterr().out
    assert cli.main([]) == 2
    assert "usage" in capsys.readouterr().err
    assert cli.main(["train"]) == 2
    assert "there is no command 'train'" in capsys.readouterr().err

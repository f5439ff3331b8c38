"""The cache's folder and its locks: nobody else may decide what a model learns, or what file is emptied."""

import os
import stat
from pathlib import Path

import pytest

from pycomm import env
from pycomm.pretrain.data import prepare
from pycomm.pretrain.files import FileError, file_errors, locked, own_folder
from tests.pretrain.helpers import small_config


def test_a_lock_is_not_followed_and_nothing_is_emptied(tmp_path: Path) -> None:
    """Somebody who can guess the name of a lock must not get a file of ours emptied."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "link.lock").symlink_to(victim)
    os.link(victim, tmp_path / "hard.lock")
    with pytest.raises(FileError, match=r"the lock .*link.lock: .*; remove it"), locked(tmp_path / "link.lock"):
        pytest.fail("the lock was taken")
    with locked(tmp_path / "hard.lock"), locked(tmp_path / "new.lock"):
        pass
    assert victim.read_text() == "precious"
    assert stat.S_IMODE((tmp_path / "new.lock").stat().st_mode) == 0o600


def test_prepare_takes_its_lock_so(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    prepare(small_config(), cache)
    (lock,) = (cache / "pretrain").glob("*.lock")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    lock.unlink()
    lock.symlink_to(victim)
    with pytest.raises(FileError, match="the lock"):
        prepare(small_config(), cache)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("level", ["cache", "cache/pretrain"])
def test_a_cache_that_others_can_write_is_refused(tmp_path: Path, level: str) -> None:
    folder = tmp_path / level
    folder.mkdir(parents=True)
    for mode in (0o770, 0o707):
        folder.chmod(mode)
        with pytest.raises(FileError, match=rf"{folder} can be written by other users \(mode {mode:o}\).*chmod go-w"):
            prepare(small_config(), tmp_path / "cache")
    folder.chmod(0o755)
    assert len(prepare(small_config(), tmp_path / "cache").train) > 0


def test_a_cache_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(FileError, match=r"belongs to user \d+ and you are \d+.*set PYCOMM_CACHE_DIR"):
        prepare(small_config(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_new_cache_is_this_user_s_alone(tmp_path: Path) -> None:
    assert stat.S_IMODE(own_folder(tmp_path / "new").stat().st_mode) == 0o700


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not put the cache into the working directory."""
    monkeypatch.setenv("PYCOMM_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert env.cache_dir() == Path("/somewhere/pycomm")


def test_what_a_killed_build_has_left_is_removed(tmp_path: Path) -> None:
    prepare(small_config(), tmp_path)
    (entry,) = (path for path in (tmp_path / "pretrain").iterdir() if path.is_dir())
    leftover = entry.rename(entry.with_name(f"{entry.name}.abcdefgh.tmp"))
    prepare(small_config(), tmp_path)
    assert not leftover.exists()
    assert entry.exists()


def test_what_is_no_error_of_a_file_passes() -> None:
    with pytest.raises(KeyError), file_errors("it", "do something"):
        raise KeyError

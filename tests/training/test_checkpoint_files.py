"""Which checkpoint is found, kept and believed."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kalle.errors import UserError
from kalle.files import DiskError
from kalle.training.checkpointing import (
    BEST,
    LAST,
    DirectCheckpointIO,
    damage,
    keep_best_checkpoints,
    point_last,
    prune,
    resume_path,
    save_atomic,
    step_path,
    step_paths,
)


def save(folder: Path, step: int) -> Path:
    path = step_path(folder, step)
    save_atomic({"state_dict": {"weight": torch.full((500,), float(step))}, "global_step": step}, path)
    point_last(path)
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_which_checkpoint_is_meant(tmp_path: Path) -> None:
    assert resume_path("auto", tmp_path) is None
    assert resume_path("auto", tmp_path / "nowhere") is None
    path = save(tmp_path, 7)
    assert resume_path("auto", tmp_path) == path
    assert (tmp_path / LAST).resolve() == path.resolve()
    assert resume_path("never", tmp_path) is None
    assert resume_path(str(tmp_path / LAST), tmp_path / "elsewhere") == tmp_path / LAST
    with pytest.raises(UserError, match=r"no checkpoint to resume from: got resume='.*gone\.ckpt', expected auto, never or an existing"):
        resume_path(str(tmp_path / "gone.ckpt"), tmp_path)


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (9, 10, 123456789012):
        save(tmp_path, step)
    (tmp_path / "step-x.ckpt").touch()
    (tmp_path / "step-00000999.ckpt.0123456789abcdef.partial").touch()
    assert [path.name for path in step_paths(tmp_path)] == ["step-123456789012.ckpt", "step-00000010.ckpt", "step-00000009.ckpt"]


def test_a_folder_with_only_an_old_last_checkpoint_resumes(tmp_path: Path) -> None:
    shutil.move(save(tmp_path, 3), tmp_path / "kept")
    (tmp_path / LAST).unlink()
    shutil.move(tmp_path / "kept", tmp_path / LAST)
    assert resume_path("auto", tmp_path) == tmp_path / LAST
    newer = save(tmp_path, 4)
    assert resume_path("auto", tmp_path) == newer


@pytest.mark.parametrize("kind", ["cut", "empty", "flipped", "other"])
def test_the_newest_whole_one_is_found_when_the_last_is_damaged(kind: str, tmp_path: Path, caplog) -> None:
    older, newer = save(tmp_path, 10), save(tmp_path, 20)
    if kind == "flipped":  # in the middle of the weights: torch alone would load it
        data = bytearray(newer.read_bytes())
        data[data.index(torch.full((4,), 20.0).numpy().tobytes()) + 40] ^= 1
        newer.write_bytes(data)
        torch.load(newer, weights_only=True)
    elif kind == "other":
        torch.save({"weights": 1}, newer)
    else:
        newer.write_bytes(b"") if kind == "empty" else cut(newer)
    with caplog.at_level(logging.WARNING):
        assert resume_path("auto", tmp_path) == older
    assert "step-00000020.ckpt" in caplog.text
    assert f"continuing from '{older}' instead" in caplog.text


def test_nothing_whole_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    for step in (1, 2):
        cut(save(tmp_path, step))
    with pytest.raises(UserError, match=r"no whole checkpoint in .*step-00000002.*step-00000001.*copy one back .* or .*resume=never"):
        resume_path("auto", tmp_path)


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_noticed(share: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = save(tmp_path_factory.mktemp("cut"), 1)
    assert damage(path) is None
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert damage(path) is not None


def test_pruning_keeps_what_it_is_told_and_the_best(tmp_path: Path) -> None:
    paths = [save(tmp_path, step) for step in range(1, 5)]
    keep_best_checkpoints(paths[0])
    torn = tmp_path / "step-00000009.ckpt.0123456789abcdef.partial"
    torn.touch()
    os.utime(torn, (0, 0))
    prune(tmp_path, paths[2:])
    assert sorted(path.name for path in tmp_path.iterdir()) == [BEST, LAST, "step-00000003.ckpt", "step-00000004.ckpt"]
    assert torch.load(tmp_path / BEST, weights_only=True)["global_step"] == 1
    keep_best_checkpoints(paths[3])
    assert torch.load(tmp_path / BEST, weights_only=True)["global_step"] == 4


def test_file_and_folder_are_synced_in_this_order(tmp_path: Path, monkeypatch) -> None:
    events: list[str] = []
    sync, replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("rename"), replace(*paths)))
    save_atomic({"state_dict": {}}, tmp_path / "step-00000001.ckpt")
    assert events == ["file", "rename", "folder"]


def test_what_the_disk_refuses_is_kept_for_later(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    io = DirectCheckpointIO()
    io.save_checkpoint({"state_dict": {}}, tmp_path / "file" / "step-00000001.ckpt")
    assert isinstance(io.error, DiskError)
    io.save_checkpoint({"state_dict": {}}, tmp_path / "step-00000001.ckpt")
    assert io.error is None


class Runs:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (self.path,))


def test_a_folder_is_no_checkpoint_and_nothing_in_it_runs(tmp_path: Path) -> None:
    """torch's distributed checkpoints have a pickle for metadata, which a path to resume from must not read."""
    folder = step_path(tmp_path, 2)
    folder.mkdir()
    for name in ("meta.pt", ".metadata"):
        (folder / name).write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    for resume in ("auto", str(folder)):
        with pytest.raises(UserError):
            resume_path(resume, tmp_path)
    older = save(tmp_path, 1)
    assert resume_path("auto", tmp_path) == older
    prune(tmp_path, [older])
    assert folder.is_dir(), "not ours to remove"
    assert not (tmp_path / "ran").exists()
    torch.load(save(tmp_path, 3), weights_only=True)

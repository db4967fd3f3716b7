"""`kalle encode` and `kalle evaluate` as two processes at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training.distributed import kalle_on_ranks

pytestmark = pytest.mark.slow


def test_encode_in_two_processes_leaves_the_bytes_of_one(toy_weights: Path, toy_corpus: Path, tmp_path: Path) -> None:
    words = ["encode", f"flowvae={toy_weights}", f"corpus={toy_corpus}", "device=cpu", "shard_size=2"]
    for name, world_size in (("one", 1), ("two", 2)):
        results = kalle_on_ranks([*words, f"out={tmp_path / name}"], world_size, timeout_seconds=900)
        assert [result.returncode for result in results] == [0] * world_size, results[0].stderr
    one, two = (
        {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
        for name in ("one", "two")
    )
    assert one == two


def test_evaluate_in_two_processes_leaves_the_rows_of_one(toy_weights: Path, toy_corpus: Path, tmp_path: Path) -> None:
    words = ["evaluate", "kind=reconstruction", f"model={toy_weights}", f"testset={toy_corpus}", "testset.min_words=1", "device=cpu"]
    light = ["~metrics.wer", "~metrics.sim", "~metrics.stoi", "~metrics.pesq_wb", "~metrics.pesq_nb", "progress=false", "resamples=20"]
    for name, world_size in (("one", 1), ("two", 2)):
        results = kalle_on_ranks([*words, *light, f"out={tmp_path / name}"], world_size, timeout_seconds=900)
        assert [result.returncode for result in results] == [0] * world_size, results[0].stderr
    rows = [[json.loads(line) for line in (tmp_path / name / "items.jsonl").read_text().splitlines()] for name in ("one", "two")]
    assert rows[0] == rows[1]
    assert rows[0]

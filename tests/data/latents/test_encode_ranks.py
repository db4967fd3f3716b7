from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalle.data.latents.encode import CorpusEncoder, EncodeConfig, encode_corpus, in_background
from kalle.data.latents.shards import read_info
from kalle.data.shared_work import OthersUnfinished, Share, local_rank, share_of_process
from kalle.errors import UserError
from kalle.files import LOCKS_FOLDER, folder_lock
from kalle.models.flowvae import FlowVAE

MakeCuts = Callable[..., list[Any]]
LENGTHS = [3000, 4000, 4000, 5001, 4000, 2500, 6399]


@given(st.integers(1, 9), st.integers(0, 40))
def test_every_piece_of_work_belongs_to_one_rank(world_size: int, pieces: int) -> None:
    shares = [Share(rank, world_size) for rank in range(world_size)]
    assert all(sum(share.owns(number) for share in shares) == 1 for number in range(pieces))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Share(0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "3", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Share(1, 3)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, Share(2, 4)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, Share(0, 1)),
        ({"RANK": "1"}, Share(0, 1)),
    ],
)
def test_the_environment_names_the_share(environment: dict[str, str], expected: Share) -> None:
    assert share_of_process(environment=environment) == expected
    assert share_of_process(4, 5, environment) == Share(4, 5), "what is given goes before the environment"


def test_local_rank() -> None:
    assert local_rank({}) is None
    assert local_rank({"SLURM_LOCALID": "3"}) == 3
    assert local_rank({"LOCAL_RANK": "1", "SLURM_LOCALID": "3"}) == 1


def test_numbers_that_are_no_ranks_are_refused() -> None:
    with pytest.raises(UserError, match="expected both or neither"):
        share_of_process(1, None, {})
    with pytest.raises(UserError, match="rank=2 of world_size=2"):
        share_of_process(2, 2, {})
    with pytest.raises(UserError, match="RANK: got 'one'"):
        share_of_process(environment={"RANK": "one", "WORLD_SIZE": "2"})


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def encode_as(encoder: CorpusEncoder, splits: dict[str, Any], out: Path, rank: int, world_size: int) -> bool:
    """Whether the folder is complete after this rank."""
    try:
        encode_corpus(encoder, splits, out, share=Share(rank, world_size))
    except OthersUnfinished:
        return False
    return True


@pytest.mark.parametrize(("world_size", "order"), [(2, (1, 0)), (3, (0, 2, 1)), (7, (6, 5, 4, 3, 2, 1, 0))])
def test_ranks_leave_the_bytes_of_one_process(
    make_cuts: MakeCuts, tiny_flowvae: FlowVAE, tmp_path: Path, world_size: int, order: tuple[int, ...]
) -> None:
    splits = {"train": make_cuts(LENGTHS), "valid": make_cuts([4000, 100, 4160], "v")}
    encoder = CorpusEncoder(tiny_flowvae, EncodeConfig(shard_size=2))
    encode_corpus(encoder, splits, tmp_path / "one")
    complete = [encode_as(encoder, splits, tmp_path / "many", rank, world_size) for rank in order]
    # Six shards: the seventh rank has none, and so completes nothing by coming first.
    assert complete == [False] * (world_size - 1) + [True]
    assert bytes_of(tmp_path / "many") == bytes_of(tmp_path / "one")
    assert not (tmp_path / "many" / LOCKS_FOLDER).exists()


def test_a_rank_that_died_leaves_its_shards_to_its_restart(
    make_cuts: MakeCuts, tiny_flowvae: FlowVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = {"train": make_cuts(LENGTHS)}
    config = EncodeConfig(shard_size=1)
    encode_corpus(CorpusEncoder(tiny_flowvae, config), splits, tmp_path / "one")
    out, encoder = tmp_path / "many", CorpusEncoder(tiny_flowvae, config)
    plain, seen = encoder._encode_group, []

    def dying(group: Any) -> Any:
        seen.append(group)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return plain(group)

    monkeypatch.setattr(encoder, "_encode_group", dying)
    with pytest.raises(KeyboardInterrupt):
        encode_as(encoder, splits, out, 0, 2)
    assert not encode_as(CorpusEncoder(tiny_flowvae, config), splits, out, 1, 2)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    seen.clear()
    monkeypatch.setattr(encoder, "_encode_group", lambda group: seen.append(group) or plain(group))
    assert encode_as(encoder, splits, out, 0, 2)
    assert len(seen) == 2, "shards 4 and 6; 0 and 2 were whole"
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert bytes_of(out) == bytes_of(tmp_path / "one")


def test_a_shard_that_another_process_writes_is_left_to_it(
    make_cuts: MakeCuts, tiny_flowvae: FlowVAE, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    splits, out = {"train": make_cuts(LENGTHS)}, tmp_path / "out"
    encoder = CorpusEncoder(tiny_flowvae, EncodeConfig(shard_size=3))
    with folder_lock(out, "train.000001", wait=False) as holder:
        assert holder is None
        assert not encode_as(encoder, splits, out, 0, 1)
    assert "shard 1 is being written by" in caplog.text
    assert encode_as(encoder, splits, out, 0, 1)
    assert read_info(out)["splits"]["train"]["utterances"] == len(LENGTHS)


def test_loading_ahead_changes_nothing(make_cuts: MakeCuts, tiny_flowvae: FlowVAE, tmp_path: Path) -> None:
    splits = {"train": make_cuts(LENGTHS)}
    for threads in (0, 3):
        encode_corpus(CorpusEncoder(tiny_flowvae, EncodeConfig(shard_size=3, loader_threads=threads)), splits, tmp_path / str(threads))
    assert bytes_of(tmp_path / "0") == bytes_of(tmp_path / "3")
    with pytest.raises(UserError, match="loader_threads=-1"):
        EncodeConfig(loader_threads=-1)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_background_work_keeps_its_order_and_its_errors(threads: int) -> None:
    def inverse(number: int) -> float:
        return 1 / number

    results = in_background(inverse, [3, 2, 1, 0, 5], threads)
    assert [next(results)[0] for _ in range(3)] == [3, 2, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert [value for _, value in in_background(inverse, range(1, 40), threads)] == [1 / n for n in range(1, 40)]

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet

from kalle.cli.main import main
from kalle.data.corpus.cuts import load_audio
from kalle.data.latents import waves
from kalle.data.latents.storage import Folder
from kalle.data.latents.waves import ShardWaves, WaveShardConfig, portions, write_wave_shards
from kalle.data.loading.datamodules import FlowVAEDataModule, LMDataModule, measure_loader
from kalle.errors import UserError
from kalle.text.tokenizer import Tokenizer

MakeCuts = Callable[..., list[Any]]
LENGTHS = [1500 + 517 * n for n in range(9)]


def module(corpus: Any, **options: Any) -> FlowVAEDataModule:
    return FlowVAEDataModule(corpus, 3200, 4, hop_length=160, gap_seconds=(0.01, 0.02), **{"seed": 5, **options})


def epoch_of(data: FlowVAEDataModule, epoch: int = 0) -> list[tuple[tuple[str, ...], bytes]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return [(batch.cut_ids, batch.wav.numpy().tobytes()) for batch in loader]


def test_shards_give_the_batches_of_the_corpus(make_cuts: MakeCuts, write_corpus: Callable[..., Path], tmp_path: Path) -> None:
    torch.set_num_threads(1)
    corpus = write_corpus(train=make_cuts(LENGTHS), valid=make_cuts([5001], "v"))
    assert main(["data", "shard", str(corpus), str(tmp_path / "out"), "--items", "4"]) == 0
    for options in ({}, {"cache": True}):
        assert epoch_of(module(tmp_path / "out", **options), 3) == epoch_of(module(corpus), 3)
    (one,), (other,) = module(tmp_path / "out").val_dataloader(), module(corpus).val_dataloader()
    assert torch.equal(one.wav, other.wav)
    folder = tmp_path / "out" / "train"
    assert sorted(path.name for path in folder.glob("*.tar")) == [f"recording.{n:06d}.tar" for n in range(3)]
    cuts = list(CutSet.from_shar(in_dir=folder))
    assert [cut.id for cut in cuts] == [f"c{n:03d}" for n in range(len(LENGTHS))]
    assert [cut.num_samples for cut in cuts] == LENGTHS
    assert [cut.supervisions[0].text for cut in cuts] == [cut.supervisions[0].text for cut in make_cuts(LENGTHS)]
    assert np.array_equal(cuts[4].load_audio()[0], load_audio(make_cuts(LENGTHS)[4], 16000))


def test_an_interrupted_run_goes_on(make_cuts: MakeCuts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"train": make_cuts(LENGTHS)}
    plain, calls = load_audio, []

    def failing(cut: Any, rate: int) -> np.ndarray:
        calls.append(cut.id)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return plain(cut, rate)

    monkeypatch.setattr(waves, "load_audio", failing)
    with pytest.raises(KeyboardInterrupt):
        write_wave_shards(splits, tmp_path / "out", WaveShardConfig(items=3))
    with pytest.raises(UserError):
        module(tmp_path / "out").train_dataloader()
    calls[:] = ["x"] * 10
    info = write_wave_shards(splits, tmp_path / "out", WaveShardConfig(items=3))
    assert calls[10:] == [f"c{n:03d}" for n in range(3, 9)], "the first shard was whole"
    assert info["splits"]["train"]["samples"] == sum(LENGTHS)
    calls.clear()
    assert write_wave_shards(splits, tmp_path / "out", WaveShardConfig(items=3)) == info
    assert not calls
    with pytest.raises(UserError, match=r"already holds recording of another|files of another run"):
        write_wave_shards(splits, tmp_path / "out", WaveShardConfig(items=4))


def test_a_shard_ends_with_its_items_or_its_megabytes(make_cuts: MakeCuts) -> None:
    cuts = make_cuts([5000, 5000, 20000, 1000, 1000, 1000, 1000])
    sizes = [len(part) for part in portions(cuts, WaveShardConfig(items=3, megabytes=0.02))]
    assert sizes == [2, 1, 3, 1]
    with pytest.raises(UserError, match=r"megabytes"):
        WaveShardConfig(megabytes=0)


def test_clipping_is_counted(make_cuts: MakeCuts, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (cut,) = make_cuts([3000])
    loud = np.zeros(3000, np.float32)
    loud[:7] = 1.5
    soundfile.write(cut.recording.sources[0].source, loud, 16000, subtype="FLOAT")
    info = write_wave_shards({"train": [cut]}, tmp_path / "out")
    assert info["splits"]["train"]["clipped"] == 7
    assert "7 samples beyond [-1, 1] are clipped" in caplog.text


def test_another_rate_is_resampled(make_cuts: MakeCuts, tmp_path: Path) -> None:
    cuts = make_cuts([8000, 6000])
    write_wave_shards({"train": cuts}, tmp_path / "out")
    waves = ShardWaves(Folder(tmp_path / "out"), "train", 8000)
    assert waves.lengths().tolist() == [4000, 3000]
    assert np.array_equal(waves.audio(1), load_audio(cuts[1], 8000))


def test_what_continues_a_cut_is_near_it(make_cuts: MakeCuts, tmp_path: Path) -> None:
    write_wave_shards({"train": make_cuts([1000] * 6)}, tmp_path / "out", WaveShardConfig(items=2))
    data = module(tmp_path / "out", shuffle="shards", window_shards=1)
    loader = data.train_dataloader()
    dataset: Any = loader.dataset
    read: list[int] = []
    plain = dataset.reader.audio
    dataset.reader.audio = lambda index: (read.append(index), plain(index))[1]
    for item in range(6):
        read.clear()
        dataset._crop(0, item, 0, 0)
        assert len(read) > 2
        assert {index // 2 for index in read} == {item // 2}


def test_mistakes(make_cuts: MakeCuts, write_corpus: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_corpus(train=make_cuts([3000]))
    write_wave_shards({"train": make_cuts([3000])}, tmp_path / "out")
    with pytest.raises(UserError, match=r"run `kalle data shard"):
        module(corpus, shuffle="shards").train_dataloader()
    with pytest.raises(UserError, match=r"data.shuffle: got 'shard'"):
        module(tmp_path / "out", shuffle="shard").train_dataloader()
    with pytest.raises(UserError, match=r"data.window_shards: got 0"):
        module(tmp_path / "out", shuffle="shards", window_shards=0).train_dataloader()
    with pytest.raises(UserError, match=r"no split 'test'"):
        module(tmp_path / "out").test_dataloader()
    with pytest.raises(UserError, match=r"holds waveforms"):
        LMDataModule(tmp_path / "out", Tokenizer.bytes(), 200).train_dataloader()
    with pytest.raises(UserError):
        write_wave_shards({"train": []}, tmp_path / "none")
    assert main(["data", "shard", str(tmp_path / "nowhere"), str(tmp_path / "x")]) == 2
    assert "not a prepared corpus" in capsys.readouterr().err


def test_the_speed_of_a_loader_counts_what_it_gives(make_cuts: MakeCuts, write_corpus: Callable[..., Path]) -> None:
    data = module(write_corpus(train=make_cuts(LENGTHS)), num_workers=5)
    ticks = iter([0.0, 1.0, 10.0, 12.0])
    speed = measure_loader(data, 7, 0, warm_up=1, clock=lambda: next(ticks))
    crops = sum(-(-length // 3200) for length in LENGTHS)
    sizes = ([4] * (crops // 4) + [crops % 4] * bool(crops % 4)) * 4
    assert (speed.batches, speed.items, speed.seconds, speed.start_seconds) == (7, sum(sizes[2:9]), 2.0, 1.0)
    assert (speed.frames, speed.items_per_second) == (speed.items * 3200, speed.items / 2)
    assert data.num_workers == 5
    with pytest.raises(UserError, match=r"batches=0"):
        measure_loader(data, 0, 0)

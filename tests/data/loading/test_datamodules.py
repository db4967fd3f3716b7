from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch

from kalle.data.corpus.cuts import load_audio
from kalle.data.latents.encode import CorpusEncoder, EncodeConfig, encode_corpus
from kalle.data.latents.shards import read_items
from kalle.data.loading.datamodules import FlowVAEDataModule, LMDataModule, ResumableLoader
from kalle.data.loading.datasets import LatentDataset, SpeakerConfig, speaker_crop
from kalle.errors import UserError
from kalle.models.flowvae import FlowVAE
from kalle.models.lm_batch import LMBatch, WaveBatch
from kalle.models.speaker import SpeakerMel
from kalle.text.phonemes import PhonemeTokenizer
from kalle.text.tokenizer import Tokenizer, prompt_ids

MakeCuts = Callable[..., list[Any]]
LENGTHS = [1500 + 517 * n for n in range(14)]
BUDGET = 300


@pytest.fixture
def corpus(make_cuts: MakeCuts, write_corpus: Callable[..., Path]) -> Path:
    return write_corpus(train=make_cuts(LENGTHS), valid=make_cuts([5001, 900], "v"), test=make_cuts([3000], "t"))


@pytest.fixture
def latent_folder(make_cuts: MakeCuts, tiny_flowvae: FlowVAE, tmp_path: Path) -> Path:
    splits = {"train": make_cuts(LENGTHS), "valid": make_cuts([5001, 3000, 2000], "v"), "test": make_cuts([3000], "t")}
    encode_corpus(CorpusEncoder(tiny_flowvae, EncodeConfig(shard_size=5)), splits, tmp_path / "latents")
    return tmp_path / "latents"


def epoch_of(loader: ResumableLoader, epoch: int) -> list[Any]:
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return list(loader)


def wave_module(corpus: Path, **options: Any) -> FlowVAEDataModule:
    return FlowVAEDataModule(corpus, 3200, 4, hop_length=160, gap_seconds=(0.01, 0.02), **{"seed": 5, **options})


def lm_module(folder: Path, **options: Any) -> LMDataModule:
    return LMDataModule(folder, Tokenizer.bytes(), **{"max_positions": BUDGET, "seed": 5, "buckets": 3, **options})


def same_waves(one: list[WaveBatch], other: list[WaveBatch]) -> bool:
    return [batch.cut_ids for batch in one] == [batch.cut_ids for batch in other] and all(
        torch.equal(a.wav, b.wav) for a, b in zip(one, other, strict=True)
    )


def same_lm(one: list[LMBatch], other: list[LMBatch]) -> bool:
    return [batch.cut_ids for batch in one] == [batch.cut_ids for batch in other] and all(
        torch.equal(a.latents, b.latents) and torch.equal(a.text_ids, b.text_ids) for a, b in zip(one, other, strict=True)
    )


def test_crops_are_pieces_of_their_cut(corpus: Path, make_cuts: MakeCuts) -> None:
    sources = {cut.id: load_audio(cut, 16000) for cut in make_cuts(LENGTHS)}
    batches = epoch_of(wave_module(corpus).train_dataloader(), 0)
    seen = [name for batch in batches for name in batch.cut_ids]
    assert {name: seen.count(name) for name in sources} == {f"c{n:03d}": -(-length // 3200) for n, length in enumerate(LENGTHS)}
    assert [len(batch.cut_ids) for batch in batches[:-1]] == [4] * (len(batches) - 1)
    for batch in batches:
        assert batch.wav.shape == (len(batch.cut_ids), 3200)
        assert batch.wav.dtype == torch.float32
        for row, name in zip(batch.wav.numpy(), batch.cut_ids, strict=True):
            if len(sources[name]) >= 3200:
                windows = np.lib.stride_tricks.sliding_window_view(sources[name], 3200)
                assert (windows == row).all(axis=1).any()


@pytest.mark.parametrize("short", ["join", "pad"])
def test_short_cuts_are_continued(corpus: Path, make_cuts: MakeCuts, short: str) -> None:
    loader = wave_module(corpus, short=short).train_dataloader()
    dataset: Any = loader.dataset
    assert dataset.short_cuts == sum(length < 3200 for length in LENGTHS) == 4
    source = load_audio(make_cuts(LENGTHS)[0], 16000)
    (row,) = [row for batch in epoch_of(loader, 0) for row, name in zip(batch.wav.numpy(), batch.cut_ids, strict=True) if name == "c000"]
    if short == "pad":
        assert np.array_equal(row, np.pad(source, (0, 1700)))
    else:
        silent = np.convolve(row == 0, np.ones(321)).max()
        assert silent < 321, "no more silence than the longest gap"
        assert np.abs(row[-200:]).max() > 0 or np.abs(row[-800:-400]).max() > 0


def test_wave_epochs_are_fresh_and_reproducible(corpus: Path) -> None:
    loader = wave_module(corpus).train_dataloader()
    first, second = epoch_of(loader, 0), epoch_of(loader, 1)
    assert same_waves(first, epoch_of(wave_module(corpus).train_dataloader(), 0))
    assert not same_waves(first, second)
    assert not same_waves(first, epoch_of(wave_module(corpus, seed=6).train_dataloader(), 0))
    crops = {
        name: {b.wav[b.cut_ids.index(name)].numpy().tobytes() for b in first + second if name in b.cut_ids} for name in ("c013", "c009")
    }
    assert all(len(pieces) > 1 for pieces in crops.values())


@pytest.mark.parametrize("options", [{"num_workers": 2}, {"cache": True}, {"cache": True, "num_workers": 1}])
def test_waves_do_not_depend_on_workers_or_cache(corpus: Path, options: dict[str, Any]) -> None:
    reference = wave_module(corpus).train_dataloader()
    other = wave_module(corpus, **options).train_dataloader()
    for epoch in (0, 3):
        assert same_waves(epoch_of(reference, epoch), epoch_of(other, epoch))


def test_validation_is_whole_and_constant(corpus: Path) -> None:
    module = wave_module(corpus)
    batches = list(module.val_dataloader())
    assert [batch.wav.shape for batch in batches] == [(1, 5001), (1, 900)]
    assert [batch.cut_ids for batch in batches] == [("v000",), ("v001",)]
    assert same_waves(batches, list(module.val_dataloader()))
    assert [batch.cut_ids for batch in module.test_dataloader()] == [("t000",)]


@pytest.mark.parametrize("segment", [0, -160, 3201])
def test_segment_must_be_whole_frames(tmp_path: Path, segment: int) -> None:
    with pytest.raises(UserError, match=f"multiple of the samples per frame \\(160\\): got {segment}"):
        FlowVAEDataModule(tmp_path, segment, 4, hop_length=160)


def test_wave_module_mistakes(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(UserError, match="short: got 'tile'"):
        wave_module(corpus, short="tile").train_dataloader()
    with pytest.raises(UserError):
        wave_module(tmp_path / "nowhere").train_dataloader()


def test_lm_batches(latent_folder: Path) -> None:
    module = lm_module(latent_folder)
    items = {item.id: item for item in read_items(latent_folder, "train")}
    batches = epoch_of(module.train_dataloader(), 0)
    assert sorted(name for batch in batches for name in batch.cut_ids) == sorted(items)
    assert max(len(batch.cut_ids) for batch in batches) > 1
    for batch in batches:
        rows = len(batch.cut_ids)
        assert rows * (batch.text_ids.shape[1] + batch.latents.shape[1]) <= BUDGET
        assert (batch.text_ids.dtype, batch.text_lengths.dtype, batch.latent_lengths.dtype) == (torch.int64,) * 3
        assert batch.posterior is not None
        for row, name in enumerate(batch.cut_ids):
            length, frames = int(batch.text_lengths[row]), int(batch.latent_lengths[row])
            assert torch.equal(batch.text_ids[row, :length], prompt_ids(Tokenizer.bytes(), items[name].text))
            stored = torch.from_numpy(items[name].latents.load()).float()
            assert frames == len(stored)
            assert torch.equal(batch.posterior.mean[row, :frames], stored[:, :4])
            assert torch.equal(batch.posterior.log_std[row, :frames], stored[:, 4:])
            noise = (batch.latents[row, :frames] - stored[:, :4]) / stored[:, 4:].exp()
            assert 0.6 < noise.std() < 1.4
            assert not batch.latents[row, frames:].any()


def test_latents_are_fresh_every_epoch_and_reproducible(latent_folder: Path) -> None:
    def samples(module: LMDataModule, epoch: int) -> dict[str, torch.Tensor]:
        batches = epoch_of(module.train_dataloader(), epoch)
        return {name: b.latents[row, : b.latent_lengths[row]] for b in batches for row, name in enumerate(b.cut_ids)}

    reference = samples(lm_module(latent_folder), 0)
    again = samples(lm_module(latent_folder, buckets=1, max_positions=150), 0)
    assert all(torch.equal(reference[name], again[name]) for name in reference), "noise depends on the cut, not on its batch"
    for other in (samples(lm_module(latent_folder), 1), samples(lm_module(latent_folder, seed=6), 0)):
        assert not any(torch.equal(reference[name], other[name]) for name in reference)


@pytest.mark.parametrize("options", [{"num_workers": 2}, {"cache": True}])
def test_lm_batches_do_not_depend_on_workers_or_cache(latent_folder: Path, options: dict[str, Any]) -> None:
    reference, other = lm_module(latent_folder).train_dataloader(), lm_module(latent_folder, **options).train_dataloader()
    for epoch in (0, 2):
        assert same_lm(epoch_of(reference, epoch), epoch_of(other, epoch))


def test_words_are_drawn_as_bytes_in_training_alone(latent_folder: Path) -> None:
    pytest.importorskip("hibari")
    tokenizer = PhonemeTokenizer.create(byte_words=0.5)

    def texts(batches: Iterable[LMBatch]) -> dict[str, bytes]:
        return {
            cut: ids[:length].numpy().tobytes()
            for batch in batches
            for cut, ids, length in zip(batch.cut_ids, batch.text_ids, batch.text_lengths, strict=True)
        }

    one, other = (LMDataModule(str(latent_folder), tokenizer, 200, seed=0) for _ in range(2))
    first = texts(epoch_of(one.train_dataloader(), 0))
    assert first == texts(epoch_of(other.train_dataloader(), 0))
    assert first != texts(epoch_of(one.train_dataloader(), 1))
    assert texts(one.val_dataloader()) == {
        item.id: prompt_ids(tokenizer, item.text).numpy().tobytes() for item in one.dataset("valid").items
    }


def test_lm_validation_is_constant(latent_folder: Path) -> None:
    module = lm_module(latent_folder)
    loader = module.val_dataloader()
    reference = list(loader)
    assert {name for batch in reference for name in batch.cut_ids} == {"v000", "v001", "v002"}
    assert same_lm(reference, list(loader))
    assert same_lm(reference, list(lm_module(latent_folder).val_dataloader()))
    assert [batch.cut_ids for batch in module.test_dataloader()] == [("t000",)]


def test_too_long_utterances_are_counted(latent_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = lm_module(latent_folder, drop_longer_than=60)
    seen = [name for batch in epoch_of(module.train_dataloader(), 0) for name in batch.cut_ids]
    dataset = module.dataset("train")
    assert dataset.rejected == {"longer than 60 positions": len(LENGTHS) - len(seen)}
    assert 0 < len(seen) < len(LENGTHS)
    assert "left out of 'train'" in caplog.text
    with pytest.raises(UserError):
        lm_module(latent_folder, drop_longer_than=3).train_dataloader()


def test_lm_module_mistakes(latent_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        lm_module(tmp_path / "nowhere").train_dataloader()
    with pytest.raises(UserError, match="max_positions=0"):
        lm_module(latent_folder, max_positions=0)
    with pytest.raises(UserError):
        lm_module(latent_folder, speaker=SpeakerConfig()).train_dataloader()


def test_a_text_that_cannot_be_read_is_named(
    make_cuts: MakeCuts, tiny_flowvae: FlowVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts = make_cuts([4000, 4000])
    cuts[1].supervisions[0].text = "It\u0092s"
    monkeypatch.setattr("kalle.data.latents.encode.unspeakable", lambda text: "")  # as in folders of earlier versions
    encode_corpus(CorpusEncoder(tiny_flowvae, EncodeConfig()), {"train": cuts}, tmp_path / "latents")
    for tokenizer in (Tokenizer.bytes(), PhonemeTokenizer.create()):
        with pytest.raises(UserError, match=r"'c001'.*kalle prepare"):
            LatentDataset(tmp_path / "latents", "train", tokenizer)


def test_speaker_batches(make_cuts: MakeCuts, tiny_flowvae: FlowVAE, tmp_path: Path) -> None:
    encoder = CorpusEncoder(tiny_flowvae, EncodeConfig(speaker_mels=True), SpeakerMel())
    encode_corpus(encoder, {"train": make_cuts([60000, 3000])}, tmp_path / "latents")
    module = lm_module(tmp_path / "latents", speaker=SpeakerConfig(crop_frames=50, latent_dim=6), max_positions=2000)
    stored = {item.id: item.speaker_mels for item in read_items(tmp_path / "latents", "train")}
    crops: dict[str, list[bytes]] = {"c000": [], "c001": []}
    for epoch in (0, 1):
        for batch in epoch_of(module.train_dataloader(), epoch):
            assert batch.speaker_mels.shape == (len(batch.cut_ids), 80, 50)
            assert batch.speaker_noise.shape == (len(batch.cut_ids), 6)
            for row, name in enumerate(batch.cut_ids):
                mels = stored[name]
                assert mels is not None
                windows = np.lib.stride_tricks.sliding_window_view(mels.load(), 50, axis=1)
                assert (windows.transpose(1, 0, 2) == batch.speaker_mels[row].numpy()).all(axis=(1, 2)).any()
                crops[name].append(batch.speaker_noise[row].numpy().tobytes())
    assert all(len(set(noises)) == 2 for noises in crops.values())
    plain = lm_module(tmp_path / "latents", speaker=SpeakerConfig(crop_frames=50), max_positions=2000)
    assert epoch_of(plain.train_dataloader(), 0)[0].speaker_noise is None


def test_speaker_crop_repeats_short_mels() -> None:
    mels = np.arange(6, dtype=np.float16).reshape(1, 6)
    assert speaker_crop(mels, 8, 0).tolist() == [[0, 1, 2, 3, 4, 5, 0, 1]]
    assert speaker_crop(mels, 6, 0).tolist() == mels.tolist()


class Recorder(lightning.LightningModule):
    """Remembers the batches it was given; stops in the middle when told to."""

    path: Path

    def __init__(self, stop_after: int | None = None, hook: str = "batch") -> None:
        super().__init__()
        self.hook = hook
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, LMBatch]] = []
        self.stop_after = stop_after

    def training_step(self, batch: LMBatch, batch_idx: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, copy.deepcopy(batch)))
        return self.weight.sum()

    def on_train_batch_end(self, *_: Any) -> None:
        self.stop("batch")

    def on_train_epoch_end(self) -> None:
        self.stop("epoch end")

    def stop(self, hook: str) -> None:
        if hook == self.hook and len(self.seen) == self.stop_after:
            self.trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(module: Recorder, data: LMDataModule, epochs: int, checkpoint: Path | None = None) -> None:
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=False)


@pytest.mark.parametrize(
    ("epochs", "batches_more", "hook", "workers"),
    [
        (0, 2, "batch", 0),
        (1, 1, "batch", 1),
        (1, 0, "batch", 0),
        (1, 0, "epoch end", 0),
        (2, -1, "batch", 1),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_trainer_resumes_behind_the_last_batch(
    latent_folder: Path, tmp_path: Path, epochs: int, batches_more: int, hook: str, workers: int
) -> None:
    whole = Recorder()
    fit(whole, lm_module(latent_folder), 3)
    batches = len(whole.seen) // 3
    assert batches >= 3
    assert [epoch for epoch, _ in whole.seen] == [epoch for epoch in range(3) for _ in range(batches)]
    first = Recorder(epochs * batches + batches_more, hook)
    first.path = tmp_path / "half.ckpt"
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(first, lm_module(latent_folder, num_workers=workers), 3)
    second = Recorder()
    fit(second, lm_module(latent_folder, num_workers=workers), 3, tmp_path / "half.ckpt")
    both = first.seen + second.seen
    assert [epoch for epoch, _ in both] == [epoch for epoch, _ in whole.seen]
    assert same_lm([batch for _, batch in both], [batch for _, batch in whole.seen])


def test_loader_counts_only_batches_of_its_epoch(latent_folder: Path) -> None:
    loader = lm_module(latent_folder).train_dataloader()
    batches = iter(loader)
    next(batches)
    next(batches)
    assert loader.state_dict() == {"epoch": 0, "delivered": 2, "world_size": 1}
    loader.sampler.set_epoch(1)  # type: ignore[attr-defined]
    assert loader.state_dict() == {"epoch": 1, "delivered": 0, "world_size": 1}
    resumed = lm_module(latent_folder).train_dataloader()
    resumed.load_state_dict({"epoch": 3, "delivered": 4, "world_size": 1})
    assert resumed.state_dict() == {"epoch": 3, "delivered": 4, "world_size": 1}
    assert len(list(resumed)) == len(resumed) - 4
    assert len(list(resumed)) == len(resumed)


def test_batches_move(latent_folder: Path) -> None:
    (batch, *_) = lm_module(latent_folder).val_dataloader()
    moved = batch.to("meta")
    assert moved.cut_ids == batch.cut_ids
    assert {moved.text_ids.device.type, moved.latents.device.type, moved.posterior.mean.device.type} == {"meta"}
    assert moved.speaker_mels is None
    assert WaveBatch(torch.zeros(1, 2), ("a",)).to("meta").wav.device.type == "meta"

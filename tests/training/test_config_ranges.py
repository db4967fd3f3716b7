"""Numbers and lists of a configuration that nothing could work with: one line with key, value and what is expected."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from kalle.cli.main import main
from kalle.data.latents.encode import EncodingConfig, JoinConfig
from kalle.data.loading.datasets import SpeakerConfig
from kalle.errors import UserError
from kalle.training import config as training
from kalle.training.flowvae import ClipSchedule, FlowVAEObjective
from kalle.training.lm import LMObjective
from kalle.training.optimisation import AdamWConfig, Exponential, WarmupCosine
from kalle.training.update_guard import GuardConfig

WRONG = [
    (training.TrainerConfig, "log_every_n_steps", -1, "trainer.log_every_n_steps: got -1, expected at least 0"),
    (training.TrainerConfig, "val_check_interval", 0, "trainer.val_check_interval: got 0, expected at least 1"),
    (training.TrainerConfig, "val_check_interval", 0.0, "trainer.val_check_interval: got 0.0, expected more than 0 and at most 1"),
    (training.TrainerConfig, "val_check_interval", 1.5, "expected more than 0 and at most 1"),
    (training.TrainerConfig, "limit_val_batches", -1, "trainer.limit_val_batches: got -1, expected at least 0"),
    (training.TrainerConfig, "limit_val_batches", 1.5, "expected at least 0 and at most 1"),
    (training.TrainerConfig, "check_val_every_n_epoch", 0, "trainer.check_val_every_n_epoch: got 0, expected at least 1"),
    (training.TrainerConfig, "accumulate_grad_batches", 0, "trainer.accumulate_grad_batches: got 0, expected at least 1"),
    (training.TrainerConfig, "num_nodes", 0, "trainer.num_nodes: got 0, expected at least 1"),
    (training.TrainerConfig, "max_epochs", -2, "trainer.max_epochs: got -2, expected at least 1"),
    (training.TrainerConfig, "num_sanity_val_steps", -2, "trainer.num_sanity_val_steps: got -2, expected at least -1"),
    (training.TrainerConfig, "gradient_clip_val", float("nan"), "trainer.gradient_clip_val: got nan, expected at least 0"),
    (training.ProgressConfig, "log_every_seconds", -1, "callbacks.progress.log_every_seconds: got -1, expected at least 0"),
    (training.EMAConfig, "decay", 1.5, "callbacks.ema.decay: got 1.5, expected at least 0 and at most 1"),
    (training.ReconstructionMediaConfig, "utterances", -1, "callbacks.media.utterances: got -1"),
    (training.MetricsConfig, "utterances", 0, "callbacks.metrics.utterances: got 0, expected at least 1"),
    (training.MetricsConfig, "names", "stoi", "callbacks.metrics.names: got 'stoi', expected a list"),
    (training.SpeechMediaConfig, "texts", "Hello.", "callbacks.media.texts: got 'Hello.', expected a list"),
    (GuardConfig, "keep_batches", -1, "callbacks.guard.keep_batches: got -1, expected at least 0"),
    (WarmupCosine, "warmup_steps", -1, "scheduler.warmup_steps: got -1, expected at least 0"),
    (Exponential, "decay", 0, "scheduler.decay: got 0, expected more than 0 and at most 1"),
    (AdamWConfig, "betas", 0.9, "optimizer.betas: got 0.9, expected a list"),
    (LMObjective, "end_weight", -1, "objective.end_weight: got -1, expected at least 0"),
    (LMObjective, "speaker_drop", 2, "objective.speaker_drop: got 2, expected at least 0 and at most 1"),
    (FlowVAEObjective, "mel_weight", -1, "objective.mel_weight: got -1, expected at least 0"),
    (FlowVAEObjective, "discriminator_start_step", -1, "objective.discriminator_start_step: got -1"),
    (ClipSchedule, "norm", 0, "clip.norm: got 0, expected more than 0"),
    (SpeakerConfig, "crop_frames", 0, "data.speaker.crop_frames: got 0, expected at least 1"),
    (JoinConfig, "gap_seconds", 0.1, "join.gap_seconds: got 0.1, expected a list"),
    (JoinConfig, "gap_seconds", (0.1,), r"join.gap_seconds: got \[0.1\], expected two numbers"),
]


@pytest.mark.parametrize(("config", "name", "value", "message"), WRONG)
def test_a_number_out_of_range_is_refused(config: type, name: str, value: object, message: str) -> None:
    needed = {"lr": 1e-3} if config is AdamWConfig else {}
    with pytest.raises(UserError, match=message):
        config(**needed, **{name: value})


@pytest.mark.parametrize(
    ("config", "source", "values"),
    [
        (training.LMTrainingConfig, training.LMDataConfig(latents="l"), {"seed": -5, "threads": 0, "row_positions": 0, "freeze": "a.*"}),
        (training.FlowVAETrainingConfig, training.FlowVAEDataConfig(corpus="c"), {"seed": 2**32, "threads": -1}),
    ],
)
def test_a_training_names_its_key(config: type, source: object, values: dict[str, object]) -> None:
    for name, value in values.items():
        with pytest.raises(UserError, match=f"^{name}: got "):
            config(out="o", data=source, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("num_workers", -1), ("window_shards", 0), ("max_positions", 0), ("max_items", 0), ("buckets", 0)]
)
def test_data_of_a_language_model(name: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"data\.{name}: got {value}, expected at least"):
        training.LMDataConfig(latents="l", **{name: value})


@pytest.mark.parametrize(("name", "value"), [("segment_samples", 0), ("batch_size", 0), ("gap_seconds", (0.3, 0.1)), ("gap_seconds", 0.1)])
def test_data_of_a_flowvae(name: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"data\.{name}: got "):
        training.FlowVAEDataConfig(corpus="c", **{name: value})


def test_the_splits_of_an_encoding_are_a_list() -> None:
    with pytest.raises(UserError, match="splits: got 'train', expected a list, each a text"):
        EncodingConfig(flowvae="f", corpus="c", out="o", splits="train")  # type: ignore[arg-type]
    assert EncodingConfig(flowvae="f", corpus="c", out="o", splits=["train"]).splits == ("train",)  # type: ignore[arg-type]


def test_every_default_is_in_range() -> None:
    for config in {config for config, *_ in WRONG if config is not AdamWConfig}:
        assert dataclasses.is_dataclass(config())


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize("word", ["seed=-5", "threads=-1", "trainer.val_check_interval=0", "data.num_workers=-1"])
def test_the_command_line_refuses_it_too(tmp_path: Path, monkeypatch, capsys, word: str, dry: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "lm", "data.latents=l", "out=o", word, *dry]) == 2
    key, _, value = word.partition("=")
    assert f"error: {key}: got {value}, expected" in capsys.readouterr().err


def test_a_flowvae_that_gathers_no_batches_is_told_so(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "flowvae", "data.corpus=c", "out=o", "trainer.accumulate_grad_batches=0"]) == 2
    assert "trainer.accumulate_grad_batches: got 0, expected at least 1" in capsys.readouterr().err

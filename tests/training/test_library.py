"""Training as a library: plain dataclasses, callbacks and loggers of one's own, and what a run refuses to continue."""

from __future__ import annotations

import dataclasses
import gzip
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from kalle.errors import UserError
from kalle.files import folder_lock
from kalle.models.discriminators import DiscriminatorConfig
from kalle.models.flowvae import FlowVAE, FlowVAEConfig
from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.text.tokenizer import Tokenizer
from kalle.training import (
    AdamWConfig,
    FlowVAEDataConfig,
    FlowVAETrainingConfig,
    LMCallbacks,
    LMDataConfig,
    LMObjective,
    LMTrainingConfig,
    TrainerConfig,
    WeightsFolder,
    plan_lm,
    train_flowvae,
    train_lm,
)
from kalle.training.session import data_contents

QUICK = TrainerConfig(max_steps=2, val_check_interval=2, log_every_n_steps=1, devices=1)


@pytest.fixture
def lm_config(toy_lm_config: KalleLMConfig, toy_latents: Path, tmp_path: Path) -> LMTrainingConfig:
    data = LMDataConfig(latents=str(toy_latents), max_positions=250, num_workers=0)
    return LMTrainingConfig(
        out=tmp_path / "run",
        data=data,
        lm=toy_lm_config,
        tokenizer=Tokenizer.bytes(),
        trainer=QUICK,
        device="cpu",
        optimizer=AdamWConfig(1e-3),
    )  # fmt: skip


class Steps(Callback):
    """Counts updates."""

    count = 0

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.count = trainer.global_step


def test_a_language_model_is_trained_with_loggers_and_callbacks_of_ones_own(
    lm_config: LMTrainingConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    steps, table = Steps(), CSVLogger(tmp_path / "mine")
    result = train_lm(lm_config, callbacks=[steps], loggers=[table])
    assert (steps.count, result.folder, result.weights) == (2, tmp_path / "run", tmp_path / "run" / "weights")
    assert result.metrics["train/loss"] == pytest.approx(result.metrics["train/total"])
    assert "val/frame_kl" in result.metrics
    assert list((tmp_path / "mine").rglob("metrics.csv"))
    assert KalleLM.from_pretrained(result.weights).hidden_size == 16
    assert f"the weights are in '{result.weights}'" in caplog.text


def test_a_flowvae_is_trained_and_measured(toy_flowvae_config: FlowVAEConfig, toy_corpus: Path, tmp_path: Path) -> None:
    config = FlowVAETrainingConfig(
        out=tmp_path / "run",
        data=FlowVAEDataConfig(corpus=str(toy_corpus), segment_samples=3200, batch_size=5, gap_seconds=(0.01, 0.02), num_workers=0),
        flowvae=toy_flowvae_config,
        discriminators=DiscriminatorConfig(periods=(2,), resolutions=((256, 60, 240),), width=0.05),
        trainer=QUICK,
        device="cpu",
        logger=None,
    )
    result = train_flowvae(config, metrics={"samples": lambda recording, audio: float(len(audio))})
    assert FlowVAE.from_pretrained(result.weights).config == toy_flowvae_config
    assert result.metrics["val/samples"] > 0
    assert {path.name for path in result.folder.iterdir()} - {"git.diff"} == {"checkpoints", "config.yaml", "run.json", "weights"}


def test_a_plan_is_the_same_path_without_storage(lm_config: LMTrainingConfig) -> None:
    plan = plan_lm(dataclasses.replace(lm_config, compact_vocabulary=True))
    assert plan.footprint is not None
    assert plan.parameters < plan_lm(lm_config).parameters == sum(p.numel() for p in KalleLM(lm_config.lm).parameters())
    assert not Path(lm_config.out).exists()
    with pytest.raises(UserError, match="freeze: no parameter fits"):
        plan_lm(dataclasses.replace(lm_config, freeze=("nothing.*",)))


def test_a_plan_refuses_a_flowvae_that_did_not_make_the_latents(
    lm_config: LMTrainingConfig, toy_flowvae_config: FlowVAEConfig, tmp_path: Path
) -> None:
    torch.manual_seed(99)
    FlowVAE(toy_flowvae_config).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="give the Flow-VAE they were encoded with"):
        plan_lm(dataclasses.replace(lm_config, flowvae=WeightsFolder(str(tmp_path / "other"))))


def test_data_that_was_made_anew_in_its_place_is_noticed(lm_config: LMTrainingConfig, toy_latents: Path, tmp_path: Path) -> None:
    latents = Path(shutil.copytree(toy_latents, tmp_path / "latents"))
    config = dataclasses.replace(lm_config, data=dataclasses.replace(lm_config.data, latents=str(latents)))
    train_lm(config, loggers=[])
    longer = dataclasses.replace(config, trainer=dataclasses.replace(QUICK, max_steps=3))
    info = json.loads((latents / "info.json").read_text())
    (latents / "info.json").write_text(json.dumps({**info, "mean": [value + 1e-3 for value in info["mean"]]}))
    with pytest.raises(UserError, match=r"what '.*latents' holds.*allow_changes=true"):
        train_lm(longer, loggers=[])
    (latents / "info.json").write_text((toy_latents / "info.json").read_text())
    assert train_lm(longer, loggers=[]).trainer.global_step == 3


def test_the_cuts_of_a_corpus_are_told_apart(tmp_path: Path) -> None:
    values = {"data": {"corpus": [{"path": str(tmp_path), "share": 1.0}]}}
    found = set()
    for content in (b"one", b"two", b"one"):
        (tmp_path / "cuts_train.jsonl.gz").write_bytes(gzip.compress(content))
        found.add(data_contents(values)[str(tmp_path)])
    assert len(found) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 7}, "seed was 0 and is 7"),
        ({"objective": LMObjective(end_weight=1.0)}, "objective.end_weight was 0.02 and is 1.0"),
        ({"data": "other"}, "data.latents was "),
    ],
)
def test_a_run_goes_on_with_what_it_began_with(
    change: dict[str, Any], message: str, lm_config: LMTrainingConfig, toy_latents: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train_lm(lm_config, loggers=[])
    written = (tmp_path / "run" / "config.yaml").read_text()
    if "data" in change:
        (tmp_path / "link").symlink_to(toy_latents)
        (tmp_path / "other").mkdir()
        for path in toy_latents.iterdir():
            (tmp_path / "other" / path.name).symlink_to(path)
        change = {"data": dataclasses.replace(lm_config.data, latents=str(tmp_path / "other"))}
        same = dataclasses.replace(lm_config, data=dataclasses.replace(lm_config.data, latents=str(tmp_path / "link"), num_workers=0))
        caplog.set_level(logging.INFO)
        train_lm(same, loggers=[])
        assert "was finished: all its 2 steps were made before" in caplog.text
        written = (tmp_path / "run" / "config.yaml").read_text()
    other = dataclasses.replace(lm_config, **change)
    with pytest.raises(UserError, match=f"was trained with other values: {message}.*allow_changes=true"):
        train_lm(other, loggers=[])
    assert (tmp_path / "run" / "config.yaml").read_text() == written
    longer = dataclasses.replace(QUICK, max_steps=3)
    assert train_lm(dataclasses.replace(other, allow_changes=True, trainer=longer), loggers=[]).trainer.global_step == 3


def test_a_run_of_an_older_version_had_the_defaults_of_what_it_did_not_know(lm_config: LMTrainingConfig, tmp_path: Path) -> None:
    train_lm(lm_config, loggers=[])
    path = tmp_path / "run" / "config.yaml"
    values = yaml.safe_load(path.read_text())
    del values["objective"]["input_noise"], values["objective"]["alignment_layers"]
    path.write_text(yaml.safe_dump(values))
    train_lm(lm_config, loggers=[])
    other = dataclasses.replace(lm_config, objective=dataclasses.replace(lm_config.objective, input_noise=0.25))
    with pytest.raises(UserError, match=r"objective\.input_noise was .* and is 0\.25"):
        train_lm(other, loggers=[])


def test_weights_that_are_no_numbers_are_not_exported(lm_config: LMTrainingConfig, tmp_path: Path) -> None:
    parts = LMCallbacks(guard=None, ema=None)
    with pytest.raises(UserError):
        train_lm(dataclasses.replace(lm_config, callbacks=parts, optimizer=AdamWConfig(1e30)), loggers=[])
    assert not (tmp_path / "run" / "weights").exists()


def test_a_second_training_into_one_folder_is_refused(lm_config: LMTrainingConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with folder_lock(tmp_path / "run", "training", wait=False) as holder:
        assert holder is None
        with pytest.raises(UserError, match=r"another training writes into .* or choose out=NEW"):
            train_lm(lm_config, loggers=[])
        assert not (tmp_path / "run" / "config.yaml").exists()

"""The metrics of the validation: which utterances count, what is averaged, and what a pair without a score does."""

from __future__ import annotations

import logging
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kalle.cli.train import reconstruction_metrics
from kalle.errors import UserError
from kalle.models.flowvae import FlowVAE, FlowVAEConfig
from kalle.models.lm_batch import WaveBatch
from kalle.training.callbacks import ReconstructionMetrics
from kalle.training.config import FlowVAECallbacks, FlowVAEDataConfig, FlowVAETrainingConfig, MetricsConfig
from kalle.training.flowvae import ClipSchedule, FlowVAEObjective, FlowVAETraining
from kalle.training.optimisation import Exponential


def batches(lengths: list[int]) -> list[WaveBatch]:
    return [WaveBatch(torch.full((1, length), 0.1), (f"cut{length}",)) for length in lengths]


@pytest.fixture
def module(toy_flowvae_config: FlowVAEConfig) -> FlowVAETraining:
    torch.manual_seed(0)
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    return FlowVAETraining(FlowVAE(toy_flowvae_config), optimizer, Exponential(decay=1.0), FlowVAEObjective(), ClipSchedule())


def seconds(recording: NDArray[np.float32], audio: NDArray[np.float32]) -> float:
    """Its own input, and a refusal of the shortest."""
    assert recording.shape == audio.shape
    if len(recording) < 2000:
        raise ValueError("too short")
    return len(recording) / 1000


def test_a_run_logs_the_mean_of_the_first_utterances_that_have_a_score(module: FlowVAETraining, fit: Any, caplog: Any) -> None:
    never = lambda recording, audio: seconds(recording[:1], audio[:1])  # noqa: E731
    metrics = ReconstructionMetrics({"seconds": seconds, "never": never}, utterances=3)
    caplog.set_level(logging.WARNING)
    trainer = fit(module, batches([3200, 3200]), 2, valid=batches([3200, 1600, 4800, 8000]), callbacks=[metrics])
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged["val/seconds"] == pytest.approx((3.2 + 4.8) / 2), "neither the unscored second nor the fourth counts"
    assert logged["val/seconds_not_scored"] == 1
    assert logged["val/never_not_scored"] == 3
    assert "val/never" not in logged
    assert "no seconds of 'cut1600' at step 2: too short" in caplog.text
    assert "val/mel_l1" in logged


def test_ranks_take_turns_and_the_sanity_check_does_not_count() -> None:
    seen: list[int] = []
    metrics = ReconstructionMetrics({"seconds": lambda recording, audio: float(seen.append(len(recording)) or 1)}, utterances=3)
    for sanity in (True, False):
        trainer: Any = SimpleNamespace(world_size=2, global_rank=1, sanity_checking=sanity, global_step=0)
        metrics.on_validation_epoch_start(trainer, None)  # type: ignore[arg-type]
        for index, batch in enumerate(batches([1000, 2000, 3000])):
            metrics.on_validation_batch_end(trainer, None, {"wav": batch.wav}, batch, index)  # type: ignore[arg-type]
    assert seen == [1000], "of utterances 1, 3 and 5 of the split only the first is among its first three"


def config(metrics: MetricsConfig, rate_hz: int = 16000) -> FlowVAETrainingConfig:
    flowvae = FlowVAEConfig(sample_rate=rate_hz)
    return FlowVAETrainingConfig(out="o", data=FlowVAEDataConfig(corpus="c"), flowvae=flowvae, callbacks=FlowVAECallbacks(metrics=metrics))


def test_the_configured_metrics_score_as_evaluation_does() -> None:
    pytest.importorskip("pystoi")
    pytest.importorskip("pesq")
    metrics = reconstruction_metrics(config(MetricsConfig()))
    time = np.arange(32000) / 16000
    speech = np.sin(2 * np.pi * (150 + 40 * np.sin(9 * time)) * time) * (0.2 + 0.2 * np.sin(2 * np.pi * 4 * time))
    recording = (speech + 0.02 * np.random.default_rng(0).standard_normal(32000)).astype(np.float32)
    noisy = recording + 0.1 * np.random.default_rng(1).standard_normal(32000).astype(np.float32)
    for name, perfect in (("stoi", 1.0), ("pesq_wb", 4.644), ("pesq_nb", 4.549)):
        metric = metrics[name]
        assert metric(recording, recording) == pytest.approx(perfect, abs=2e-3)
        assert metric(recording, noisy) < perfect - 0.05
        with pytest.raises(ValueError):  # noqa: PT011
            metric(np.zeros(32000, np.float32), np.zeros(32000, np.float32))


def test_other_rates_and_names(caplog: pytest.LogCaptureFixture) -> None:
    assert not reconstruction_metrics(config(MetricsConfig(names=("stoi",)), 24000))
    assert "no stoi in validation" in caplog.text
    with pytest.raises(UserError, match=r"callbacks.metrics.names: got 'mos', expected some of stoi"):
        reconstruction_metrics(config(MetricsConfig(names=("mos",))))

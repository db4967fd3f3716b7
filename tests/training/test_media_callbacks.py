from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from kalle.gaussian import DiagGaussian
from kalle.models.flowvae import FlowVAE, FlowVAEConfig
from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.models.lm_batch import LMBatch, WaveBatch
from kalle.synthesis.options import StopRule
from kalle.text.tokenizer import Tokenizer
from kalle.training.callbacks import EMA, ReconstructionMedia, SpeechMedia, log_speech, mel_image, speech_sampler
from kalle.training.flowvae import ClipSchedule, FlowVAEObjective, FlowVAETraining
from kalle.training.lm import KalleLMTraining, LMObjective
from kalle.training.optimisation import Exponential


def trainer_with(loggers: list[Any], step: int = 5, **changes: Any) -> Any:
    return SimpleNamespace(loggers=loggers, global_step=step, sanity_checking=False, is_global_zero=True, **changes)


def tags(folder: Path) -> dict[str, list[int]]:
    from tensorboard.backend.event_processing.event_accumulator import AUDIO, IMAGES, EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={AUDIO: 0, IMAGES: 0})
    events.Reload()
    found = events.Tags()
    sounds = {name: [event.step for event in events.Audio(name)] for name in found["audio"]}
    return sounds | {name: [event.step for event in events.Images(name)] for name in found["images"]}


def test_mel_image_has_low_frequencies_at_the_bottom() -> None:
    tone = torch.sin(2 * torch.pi * 200 * torch.arange(16000) / 16000)
    picture = mel_image(tone, 16000)
    assert picture.dtype == np.uint8
    assert picture.shape == (100, 66)
    assert picture.min() == 0
    assert picture.max() == 255
    assert picture.astype(float).mean(1).argmax() > 80
    assert mel_image(torch.zeros(4000), 16000).max() == 0


def test_speech_goes_to_loggers_that_can_hold_it(tmp_path: Path) -> None:
    board, table = TensorBoardLogger(tmp_path, name="tb", version=""), CSVLogger(tmp_path, name="csv")
    log_speech([board, table], "speech/0", 2 * torch.ones(4000), 16000, 5)
    board.finalize("success")
    assert tags(tmp_path / "tb") == {"speech/0": [5], "speech/0/mel": [5]}


def test_wandb_gets_sound_and_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.loggers import WandbLogger

    calls: list[tuple[str, str, Any]] = []
    target = object.__new__(WandbLogger)
    monkeypatch.setattr(
        WandbLogger, "log_audio", lambda self, key, audios, step, sample_rate: calls.append(("audio", key, (step, sample_rate)))
    )
    monkeypatch.setattr(WandbLogger, "log_image", lambda self, key, images, step: calls.append(("image", key, images[0].shape[0])))
    log_speech([target], "speech/0", torch.zeros(4000), 16000, 5)
    assert calls == [("audio", "speech/0", (5, [16000])), ("image", "speech/0/mel", 100)]


@pytest.fixture
def flowvae_module(toy_flowvae_config: FlowVAEConfig) -> FlowVAETraining:
    torch.manual_seed(0)
    return FlowVAETraining(FlowVAE(toy_flowvae_config), torch.optim.AdamW, lambda optimizer: optimizer, FlowVAEObjective(), ClipSchedule())


def test_recordings_are_sent_once_and_reconstructions_always(flowvae_module: FlowVAETraining, tmp_path: Path) -> None:
    board, media = TensorBoardLogger(tmp_path, name="tb", version=""), ReconstructionMedia(utterances=2)
    batches = [WaveBatch(0.1 * torch.ones(1, 4000 + 160 * n), (str(n),)) for n in range(3)]
    for step in (5, 10):
        for index, batch in enumerate(batches):
            media.on_validation_batch_end(trainer_with([board], step), flowvae_module, None, batch, index)
    skipped = trainer_with([board], 20)
    skipped.sanity_checking = True
    media.on_validation_batch_end(skipped, flowvae_module, None, batches[0], 0)
    board.finalize("success")
    found = tags(tmp_path / "tb")
    assert {name: steps for name, steps in found.items() if not name.endswith("mel")} == {
        "recording/0": [5],
        "recording/1": [5],
        "reconstruction/0": [5, 10],
        "reconstruction/1": [5, 10],
    }


@pytest.fixture
def lm_module(toy_lm_config: KalleLMConfig) -> KalleLMTraining:
    torch.manual_seed(0)
    return KalleLMTraining(KalleLM(toy_lm_config).eval(), torch.optim.AdamW, lambda optimizer: optimizer, LMObjective())


def test_texts_are_spoken_by_the_sampler(lm_module: KalleLMTraining, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def sampler(module: KalleLMTraining, text: str) -> torch.Tensor:
        return torch.zeros(0 if text == "mute" else 4000)

    board, media = TensorBoardLogger(tmp_path, name="tb", version=""), SpeechMedia(["one", "mute"], sampler, 16000)

    def validate(step: int) -> None:
        for index in range(3):
            media.on_validation_batch_end(trainer_with([board], step, num_val_batches=[3]), lm_module, None, None, index)  # type: ignore[arg-type]

    caplog.set_level("INFO")
    validate(2)
    board.finalize("success")
    assert tags(tmp_path / "tb") == {"speech/0": [2], "speech/0/mel": [2]}
    assert caplog.text.count("'mute' ended before its first frame") == 1


@pytest.mark.parametrize("speaks_first", [True, False])
def test_the_averaged_weights_speak(speaks_first: bool, toy_lm_config: KalleLMConfig, fit) -> None:
    """Whatever the order of the callbacks; the average is in place during validation only."""
    torch.manual_seed(0)
    module = KalleLMTraining(KalleLM(toy_lm_config), partial(torch.optim.AdamW, lr=1e-2), Exponential(decay=1.0), LMObjective())
    mean = torch.randn(2, 5, toy_lm_config.latent_dim)
    lengths = torch.tensor([5, 5])
    batch = LMBatch(torch.ones(2, 3, dtype=torch.long), torch.tensor([3, 3]), mean, lengths, DiagGaussian(mean, -torch.ones_like(mean)))
    spoken: list[torch.Tensor] = []
    trained: list[torch.Tensor] = []

    class Raw(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            trained.append(pl_module.lm.audio_linear.weight.detach().clone())

    def sampler(speaking: KalleLMTraining, text: str) -> torch.Tensor:
        spoken.append(speaking.lm.audio_linear.weight.detach().clone())
        return torch.zeros(0)

    media, average = SpeechMedia(["x"], sampler, 16000), EMA(0.9)
    callbacks = [media, average] if speaks_first else [average, media]
    fit(module, [batch], 3, valid=[batch, batch], callbacks=[Raw(), *callbacks])
    assert len(spoken) == len(trained) == 3
    assert torch.equal(spoken[-1], module.lm.audio_linear.weight), "the end leaves the average in the module"
    assert not torch.equal(spoken[-1], trained[-1])


def test_the_sampler_speaks_with_the_current_weights(lm_module: KalleLMTraining, flowvae_module: FlowVAETraining) -> None:
    never = StopRule(threshold=0.0)
    flowvae = flowvae_module.flowvae.eval()
    sampler = speech_sampler(flowvae, Tokenizer.bytes(), seed=1, max_frames=6, stop=never)
    with torch.no_grad():
        one, again = sampler(lm_module, "hello"), sampler(lm_module, "hello")
        assert one.shape == (6 * flowvae.config.hop_length,)
        assert torch.equal(one, again)
        assert not torch.equal(one, speech_sampler(flowvae, Tokenizer.bytes(), seed=2, max_frames=6, stop=never)(lm_module, "hello"))
        lm_module.lm.distribution_linear.bias += 0.5
        assert not torch.equal(one, sampler(lm_module, "hello"))
        at_once = speech_sampler(flowvae, Tokenizer.bytes(), seed=1, max_frames=6, stop=StopRule(threshold=1e9, min_index=-1))
        assert at_once(lm_module, "hello").shape == (0,)

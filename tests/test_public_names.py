"""The names and commands that users rely on: everything here stays importable, with these parameters in this order."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

from kalle import DiagGaussian, FlowVAE, Kalle, KalleLM, Voice
from kalle.cli.main import COMMANDS, HYDRA_COMMANDS, dispatch, typer_command
from kalle.synthesis import generate
from kalle.synthesis.generate import Frame
from kalle.synthesis.options import GenerationOptions, StopRule
from kalle.synthesis.speech import Speech

SIGNATURES = {
    DiagGaussian.sample: "noise temperature generator",
    DiagGaussian.kl_to: "other",
    FlowVAE.from_pretrained: "folder device dtype",
    FlowVAE.save_pretrained: "folder",
    FlowVAE.encode: "wav",
    FlowVAE.decode: "z",
    FlowVAE.to_prior: "z",
    FlowVAE.from_prior: "z_prior",
    KalleLM.from_pretrained: "folder device dtype quantize",
    KalleLM.save_pretrained: "folder",
    KalleLM.forward: "batch",
    KalleLM.prefill: "text_ids prompt_latents speaker_latent",
    KalleLM.step: "z state",
    generate: "lm text_ids prompt_latents speaker_latent noise generator stop max_frames temperature options watcher",
    Kalle.from_pretrained: "folder_or_hub_id device dtype quantize compile",
    Kalle.voice: "audio text",
    Kalle.random_voice: "seed",
    Kalle.synthesize: "text voice options",
    Kalle.synthesize_batch: "requests",
    Kalle.stream: "text voice options",
    Voice.save: "path",
    Voice.load: "path",
}
"""Function -> its first parameters, without self."""
FIELDS = {
    DiagGaussian: "mean log_std",
    Frame: "z distribution end_kl",
    StopRule: "threshold min_index",
    Speech: "audio sample_rate stop_reason seed",
}
TYPER_COMMANDS = "say stream voices adapt serve web prepare data calibrate bench export convert download doctor"
SUBCOMMANDS = {
    "voices": {"create", "random", "list", "show", "play", "check"},
    "data": {"doctor", "retranscribe", "shard"},
    "convert": {"release", "to-release", "quantize", "tokenizer"},
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_a_public_function_keeps_its_parameters(function: Any) -> None:
    wanted = SIGNATURES[function].split()
    found = [name for name in inspect.signature(function).parameters if name != "self"]
    assert found[: len(wanted)] == wanted


@pytest.mark.parametrize("cls", FIELDS, ids=lambda cls: cls.__name__)
def test_a_public_dataclass_keeps_its_fields(cls: Any) -> None:
    wanted = FIELDS[cls].split()
    assert [field.name for field in dataclasses.fields(cls)][: len(wanted)] == wanted


def test_a_result_has_its_rate_and_its_confidence() -> None:
    assert isinstance(Kalle.sample_rate, property)
    assert isinstance(Speech.confidence, property)


def test_generation_options_are_keywords_of_synthesis() -> None:
    names = {field.name for field in dataclasses.fields(GenerationOptions)}
    assert {"seed", "temperature", "guidance", "max_seconds", "stop", "retries", "compatibility"} <= names


def test_training_is_a_library() -> None:
    training = pytest.importorskip("kalle.training")
    for function in (training.train_flowvae, training.train_lm, training.plan_flowvae, training.plan_lm):
        assert next(iter(inspect.signature(function).parameters)) == "config"
    assert {"folder", "weights", "metrics"} <= {field.name for field in dataclasses.fields(training.TrainingResult)}


@pytest.mark.parametrize("name", TYPER_COMMANDS.split())
def test_a_command_is_there(name: str) -> None:
    assert name in COMMANDS
    command = typer_command(name)
    assert SUBCOMMANDS.get(name, set()) <= set(getattr(command, "commands", ()))
    assert command.params or command.commands


@pytest.mark.parametrize("words", [["train", "flowvae"], ["train", "lm"], ["encode"], ["evaluate"]], ids=" ".join)
def test_a_command_of_hydra_explains_its_keys(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert words[0] in HYDRA_COMMANDS
    assert dispatch([*words, "--help"]) == 0
    assert "out" in capsys.readouterr().out

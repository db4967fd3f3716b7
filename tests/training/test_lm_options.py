"""Options of `kalle train lm` as a user sets them, at toy size."""

from __future__ import annotations

import csv
import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from kalle.cli.hydra_entry import compose
from kalle.cli.main import main
from kalle.cli.train import train as train_composed
from kalle.data.loading.datamodules import TRAIN
from kalle.errors import UserError
from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.models.speaker import SpeakerEncoderConfig
from kalle.synthesis.adapter import Adapter
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.options import StopRule
from kalle.training import TrainingResult


@pytest.fixture
def train(lm_overrides: list[str], tmp_path: Path):
    def run(*overrides: str, out: str = "run") -> TrainingResult:
        return train_composed(compose("train_lm", [*lm_overrides, f"out={tmp_path / out}", *overrides]))

    return run


def padding_shares(run: TrainingResult) -> list[float]:
    with (run.weights.parent / "csv" / "version_0" / "metrics.csv").open() as file:
        return [float(row["train/padding_share"]) for row in csv.DictReader(file) if row["train/padding_share"]]


def weights(run: TrainingResult) -> dict[str, torch.Tensor]:
    return load_file(run.weights / "lm" / "model.safetensors")


@pytest.mark.slow
def test_packing_batches_by_sums_and_wastes_less(train) -> None:
    padded, packed = train(out="padded"), train("packing=true", "row_positions=null", out="packed")
    assert len(padding_shares(padded)) == len(padding_shares(packed)) == 6
    assert max(padding_shares(packed)) == 0 < max(padding_shares(padded))
    plan, dataset = packed.trainer.datamodule.plan(TRAIN, shuffle=True), packed.trainer.datamodule.dataset(TRAIN)
    lengths = dataset.text_lengths + dataset.audio_lengths
    assert max(int(lengths[batch].sum()) for batch in plan(0)) <= 250


@pytest.mark.slow
def test_adapters_are_exported_merged_and_alone(train, toy_weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="kalle"):
        run = train("lora=default", "lora.rank=2", "lora.dropout=0.2", f"init={toy_weights}", "callbacks.ema=null", "packing=true")
    assert any("of them train" in record.message for record in caplog.records)
    base, merged = KalleLM.from_pretrained(toy_weights), KalleLM.from_pretrained(run.weights)
    ids = torch.tensor([[1, 2, 3]])
    before = base.predict(ids).mean
    adapter = Adapter.load(run.weights / "adapter")
    assert adapter.notes["steps_made"] == run.trainer.global_step > 0
    adapted = adapter.applied_to(base.eval())
    torch.testing.assert_close(adapted.predict(ids).mean, merged.predict(ids).mean, atol=1e-5, rtol=1e-4)
    assert torch.equal(base.predict(ids).mean, before)
    assert not torch.allclose(before, merged.predict(ids).mean, atol=1e-6)
    assert not any("lora" in name for name in weights(run))


@pytest.mark.slow
def test_averaged_adapters_are_those_exported(train, toy_weights: Path) -> None:
    run = train("lora=default", "lora.rank=2", f"init={toy_weights}", "lora.also_train=[audio_linear.*]")
    base, merged = KalleLM.from_pretrained(toy_weights), KalleLM.from_pretrained(run.weights)
    adapted = Adapter.load(run.weights / "adapter").applied_to(base)
    ids, latents = torch.tensor([[1, 2, 3]]), torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(adapted.predict(ids, latents).mean, merged.predict(ids, latents).mean, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_vocabulary_of_used_tokens_trains_the_same_weights(train) -> None:
    no_decay = "optimizer.weight_decay=0"
    whole, compact = train(no_decay, out="whole"), train(no_decay, "compact_vocabulary=true", out="compact")
    ours, theirs = weights(compact), weights(whole)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [("lora=default", "lora.rank=2", "lora.dropout=0.3"), ("compact_vocabulary=true",)], ids=["lora", "compact"]
)
def test_continued_runs_equal_uninterrupted_ones(options: tuple[str, ...], train, tmp_path: Path) -> None:
    more = (*options, "packing=true", "activation_checkpointing=true", "scheduler.total_steps=6")
    whole = train(*more, out="whole")
    train(*more, "trainer.max_steps=4", out="cut")
    continued = train(*more, out="cut")
    one, other = weights(whole), weights(continued)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_start_from_text_weights(train, tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    text = LlamaForCausalLM(LlamaConfig(**size, head_dim=8, vocab_size=260))
    text.save_pretrained(tmp_path / "text")
    run = train(f"init_text={tmp_path / 'text'}", "freeze=[backbone.*]")
    trained = KalleLM.from_pretrained(run.weights)
    assert torch.equal(trained.backbone.embed_tokens.weight[:260], text.model.embed_tokens.weight)
    assert torch.equal(trained.backbone.layers[0].mlp.up_proj.weight, text.model.layers[0].mlp.up_proj.weight)
    assert len(trained.backbone.layers) == 1


@pytest.mark.slow
def test_a_stop_head_is_taught_to_weights_that_have_none(train, toy_weights: Path) -> None:
    frozen = "freeze=[backbone.*,audio_linear.*,distribution_linear.*]"
    run = train(
        f"init={toy_weights}", "lm.stop_head=true", frozen, "compact_vocabulary=false", f"flowvae.folder={toy_weights}", "packing=true"
    )
    before, after = load_file(toy_weights / "lm" / "model.safetensors"), weights(run)
    assert after.keys() - before.keys() == {"stop_head.weight", "stop_head.bias"}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    untrained = KalleLM.from_pretrained(toy_weights)
    untrained.add_stop_head(torch.Generator().manual_seed(0))
    assert not torch.equal(untrained.state_dict()["stop_head.weight"], after["stop_head.weight"])
    with (run.weights.parent / "csv" / "version_0" / "metrics.csv").open() as file:
        columns = next(csv.reader(file))
    assert {"train/stop_bce", "val/stop_bce"} <= set(columns)
    kalle = Kalle.from_pretrained(run.weights, "cpu")
    assert kalle.config.stop == StopRule(probability=0.5)
    assert len(kalle.synthesize("Hi.", seed=1, max_seconds=0.1, retries=0).stop_probability) > 0


def test_mistakes_are_told_before_anything_is_written(train, toy_weights: Path, tmp_path: Path) -> None:
    for options, message in (
        (("freeze=[nothing.*]",), "freeze: no parameter fits"),
        (("attention=flex",), "attention=flex needs a CUDA device"),
        (("compact_vocabulary=maybe",), "expected true, false or auto"),
        (("packing=true", "row_positions=0"), "row_positions: got 0"),
        ((f"init={toy_weights}", f"init_text={toy_weights}"), "expected one of them; leave one out"),
        (("lora=default", "lora.targets=[qkv]"), "no linear layer is named 'qkv'"),
        (("lora=default", "lm.stop_head=true", f"init={toy_weights}"), "without a stop head, expected weights that have one"),
    ):
        with pytest.raises(UserError, match=message):
            train(*options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["sft", "lora"])
def test_experiments_compose(name: str) -> None:
    config = compose("train_lm", [f"experiment={name}", "out=x", "data.latents=y"])
    assert config.packing
    assert ("lora" in config) == (name == "lora")


def test_weights_of_another_width_bring_it_along(lm_overrides, toy_lm_config: KalleLMConfig, tmp_path: Path) -> None:
    """The noise of a voice is as wide as the model that ``init`` brings, not as the one that the configuration describes."""
    speaker = SpeakerEncoderConfig(channels=16, embedding_dim=8, pooled_channels=16, attention_channels=4)
    KalleLM(dataclasses.replace(toy_lm_config, speaker=speaker)).save_pretrained(tmp_path / "start")
    words = [word for word in lm_overrides if not word.startswith("lm")]
    words += ["lm=nano_speaker", "data=lm_speaker", f"init={tmp_path / 'start'}", f"out={tmp_path / 'run'}", "trainer.max_steps=1"]
    assert main(["train", "lm", *words, "--dry-run"]) == 0
    assert main(["train", "lm", *words]) == 0
    assert KalleLM.from_pretrained(tmp_path / "run" / "weights").hidden_size == toy_lm_config.backbone["hidden_size"] == 16
    recorded = OmegaConf.load(tmp_path / "run" / "config.yaml")
    assert recorded.lm.backbone.hidden_size == recorded.data.speaker.latent_dim == 16
    assert recorded.lm.latent_dim == toy_lm_config.latent_dim != 64
    assert recorded.lm.speaker.channels == 16
    assert KalleLMConfig.from_dict(OmegaConf.to_container(recorded.lm)) == KalleLM.from_pretrained(tmp_path / "start").config

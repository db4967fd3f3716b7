"""What `kalle train` refuses: in one line, with exit code 2, and before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kalle.cli.main import main
from kalle.models.flowvae import FlowVAE, FlowVAEConfig
from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.training.checkpointing import LAST, step_path
from kalle.training.train import copy_flowvae

CROPS = "{_target_: kalle.data.loading.datasets.SpeakerConfig, crop_frames: 20, latent_dim: 16}"


def refused(stage: str, overrides: list[str], out: Path, capsys) -> str:
    """The line on stderr of a run that must end with code 2."""
    capsys.readouterr()
    assert main(["train", stage, *overrides, f"out={out}"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    assert error.startswith("error: ")
    return error


@pytest.mark.parametrize(
    ("stage", "more", "message"),
    [
        ("lm", ["optimizer.lr=abc"], "optimizer.lr: got 'abc', expected a number"),
        ("lm", ["optimizer.betas=[0.9]"], "optimizer.betas: got [0.9], expected two numbers"),
        ("lm", ["optimizer.lr=-1"], "expected values it can work with (Invalid learning rate: -1); correct optimizer.*"),
        ("lm", ["scheduler.warmup_steps=many"], "scheduler.warmup_steps: got 'many', expected a whole number"),
        ("flowvae", ["scheduler.decay=fast"], "scheduler.decay: got 'fast', expected a number"),
        ("lm", ["trainer.max_steps=0"], "trainer.max_steps: got 0, expected at least 1"),
        ("lm", ["trainer.max_steps=-1"], "trainer.max_steps: got -1, expected at least 1 (or -1 with trainer.max_epochs)"),
        ("flowvae", ["trainer.max_steps=-5", "trainer.max_epochs=2"], "trainer.max_steps: got -5, expected at least 1"),
        ("flowvae", ["trainer.max_steps=long"], "trainer.max_steps: got 'long', expected a whole number"),
        ("lm", ["trainer.max_steps=-1", "trainer.max_epochs=2"], "scheduler.total_steps: got -1, expected at least 1"),
        ("flowvae", ["trainer.gradient_clip_val=1.0"], "trainer.gradient_clip_val: got 1.0, expected null"),
        ("flowvae", ["trainer.gradient_clip_val=1.0"], "set clip.norm=1.0"),
        ("flowvae", ["trainer.accumulate_grad_batches=2"], "trainer.accumulate_grad_batches: got 2, expected 1"),
        ("flowvae", ["trainer.accumulate_grad_batches=2"], "clip.norm"),
        ("lm", ["objective.direction=foo"], "objective.direction: got 'foo', expected prediction_posterior or posterior_prediction"),
        ("lm", ["objective.end_weight=abc"], "objective.end_weight: got 'abc', expected a number; correct it"),
        ("flowvae", ["objective.mel_weight=abc"], "objective.mel_weight: got 'abc', expected a number; correct it"),
        ("flowvae", ["clip.norm=abc"], "clip.norm: got 'abc', expected a number; correct it"),
        ("flowvae", ["objective.kl_reduction=foo"], "objective.kl_reduction: got 'foo', expected mean or sum_dim"),
        ("flowvae", ["objective.kl_reduction=none"], "objective.kl_reduction: got 'none', expected mean or sum_dim"),
        ("lm", ["+trainer.stepz=1"], "unknown configuration key: got 'trainer.stepz', expected one of: trainer.max_steps, "),
        ("lm", ["seed=abc"], "seed: got 'abc', expected a whole number; correct it"),
        ("lm", ["callbacks.ema=5"], "callbacks.ema: got 5, expected an object {...} or null; correct it"),
        ("lm", ["lm.latent_dim=wide"], "lm.latent_dim: got 'wide', expected a whole number; correct it"),
        ("flowvae", ["flowvae.encoder.residual_layers=six"], "flowvae.encoder.residual_layers: got 'six', expected a whole number"),
        ("flowvae", ["flowvae.encoder.channels=5"], "flowvae.encoder.channels: got 5, expected a list, each a whole number"),
        ("flowvae", ["flowvae.encoder=null"], "flowvae.encoder: got None, expected an object {...}; correct it"),
        ("flowvae", ["flowvae.decoder=abc"], "flowvae.decoder: got 'abc', expected an object {...}; correct it"),
        ("flowvae", ["mel_loss.config=3"], "mel: got 3, expected a MelConfig, an object {...} in a configuration; set one key in it"),
        ("flowvae", ["discriminators.periods=abc"], "discriminators.periods: got 'abc', expected a list, each a whole number"),
        ("lm", ["lm.backbone=null"], "lm.backbone: got None, expected an object {...}; correct it"),
        ("flowvae", ["data.batch_size=many"], "data.batch_size: got 'many', expected a whole number; correct it"),
        ("lm", ["+lm.backbone.num_hidden_layer=3"], "unknown key 'num_hidden_layer' in 'lm.backbone'; valid keys: "),
        ("lm", ["lm.backbone.vocab_size=100"], "the tokenizer has 265 tokens but the model embeds 100; set lm.backbone.vocab_size=265"),
        ("lm", [f"data.speaker={CROPS}"], "speaker: got data.speaker but no speaker encoder, expected both or neither"),
        ("flowvae", ["data.corpus=/nonexist"], "not a prepared corpus: got '/nonexist'"),
        ("lm", ["data.latents=/nonexist"], "not a complete latent folder: got '/nonexist'"),
    ],
)
@pytest.mark.parametrize("logger", ["logger=tensorboard"])
def test_refusals_leave_nothing(stage: str, more: list[str], message: str, logger: str, flowvae_overrides, lm_overrides, tmp_path, capsys):
    overrides = flowvae_overrides if stage == "flowvae" else lm_overrides
    error = refused(stage, [*overrides, logger, *more], tmp_path / "run", capsys)
    assert message in error
    assert not (tmp_path / "run").exists()


def test_the_flowvae_must_have_made_the_latents(lm_overrides, toy_flowvae_config: FlowVAEConfig, tmp_path: Path, capsys) -> None:
    from kalle.checkpoint import weights_hash

    torch.manual_seed(99)
    other = FlowVAE(toy_flowvae_config)
    other.save_pretrained(tmp_path / "other")
    error = refused("lm", [*lm_overrides, f"flowvae={tmp_path / 'other'}"], tmp_path / "run", capsys)
    assert "come from another Flow-VAE" in error
    assert weights_hash(other.encoder)[:12] in error
    assert "give the Flow-VAE they were encoded with" in error
    assert not (tmp_path / "run").exists()


def test_init_must_have_the_dimensions_of_the_latents(lm_overrides, toy_lm_config: KalleLMConfig, tmp_path: Path, capsys) -> None:
    import dataclasses

    KalleLM(dataclasses.replace(toy_lm_config, latent_dim=7)).save_pretrained(tmp_path / "seven")
    error = refused("lm", [*lm_overrides, f"init={tmp_path / 'seven'}"], tmp_path / "run", capsys)
    assert f"the latents have 4 dimensions but that of init='{tmp_path / 'seven'}' is 7" in error


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["data.speaker=null"], "speaker: got a speaker encoder but data.speaker=null, expected both or neither; add data=lm_speaker"),
        (["data.speaker.latent_dim=8"], "data.speaker.latent_dim is 8 but the model is 16 wide; set data.speaker.latent_dim=16"),
    ],
)
def test_a_speaker_encoder_needs_its_data(more: list[str], message: str, lm_overrides: list[str], tmp_path: Path, capsys) -> None:
    with_speaker = [word.replace("lm=nano", "lm=nano_speaker") for word in lm_overrides] + ["data=lm_speaker"]
    assert message in refused("lm", [*with_speaker, *more], tmp_path / "run", capsys)


@pytest.mark.parametrize("stage", ["flowvae", "lm"])
def test_another_architecture_in_the_same_folder(stage: str, flowvae_overrides, lm_overrides, tmp_path: Path, capsys) -> None:
    overrides = [*(flowvae_overrides if stage == "flowvae" else lm_overrides), "trainer.max_steps=2"]
    assert main(["train", stage, *overrides, f"out={tmp_path}"]) == 0
    before = (tmp_path / "checkpoints" / LAST).read_bytes()
    other = "flowvae.decoder.channels=16" if stage == "flowvae" else "lm.backbone.num_hidden_layers=1"
    error = refused(stage, [*overrides, other], tmp_path, capsys)
    assert f"'{step_path(tmp_path / 'checkpoints', 2)}' holds another model" in error
    assert "choose out=NEW or resume=never" in error
    assert (tmp_path / "checkpoints" / LAST).read_bytes() == before


@pytest.mark.parametrize("content", [b"not a checkpoint", b"", {"weights": 1}, [1]])
def test_resume_from_something_else(content: object, lm_overrides: list[str], tmp_path: Path, capsys) -> None:
    path = tmp_path / "file.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    error = refused("lm", [*lm_overrides, f"resume={path}"], tmp_path / "run", capsys)
    assert f"not a checkpoint: got '{path}', expected a .ckpt file that a training run wrote" in error
    assert not (tmp_path / "run").exists()


def test_a_folder_with_the_name_of_a_checkpoint_is_never_read(lm_overrides: list[str], tmp_path: Path, capsys, monkeypatch) -> None:
    """Neither one of ours in ``resume=auto`` nor Lightning's own, which it would read by itself under SLURM."""
    opened: list[object] = []
    monkeypatch.setattr("pickle.load", lambda *arguments, **more: opened.append(arguments))
    for path, message in (
        (step_path(tmp_path / "a" / "checkpoints", 10), "(a folder, and only a file is safe to read)"),
        (tmp_path / "b" / "hpc_ckpt_1.ckpt", "move it away, or choose out=NEW"),
    ):
        path.mkdir(parents=True)
        (path / ".metadata").write_bytes(b"cbuiltins\nexit\n(tR.")
        out = path.parents[1] if path.parent.name == "checkpoints" else path.parent
        error = refused("lm", lm_overrides, out, capsys)
        assert message in error
        assert path.name in error
    assert not opened


def test_help_says_what_can_be_trained(capsys) -> None:
    for word in ("--help", "-h"):
        assert main(["train", word]) == 0
        assert "kalle train flowvae data.corpus=DIR out=DIR" in capsys.readouterr().out
    assert main(["train", "opera"]) == 2


def test_a_flowvae_is_copied_over_an_older_one_by_a_rename(tmp_path: Path) -> None:
    """The older one may be mapped by a loaded model, which a copy onto the same file would change."""
    for name in ("new", "run"):
        (tmp_path / name / "flowvae").mkdir(parents=True)
        for file in ("config.json", "model.safetensors"):
            (tmp_path / name / "flowvae" / file).write_text(name)
    with (tmp_path / "run" / "flowvae" / "model.safetensors").open() as mapped:
        copy_flowvae(str(tmp_path / "new"), tmp_path / "run")
        assert mapped.read() == "run"
    assert (tmp_path / "run" / "flowvae" / "model.safetensors").read_text() == "new"
    assert sorted(path.name for path in (tmp_path / "run" / "flowvae").iterdir()) == ["config.json", "model.safetensors"]

"""Every file of configs/ composes and builds what it names."""

from __future__ import annotations

import dataclasses
import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import OmegaConf

from kalle.cli.hydra_entry import compose, configs_dir, folder_override, run_hydra
from kalle.cli.main import main
from kalle.cli.train import keys, nested, training_config
from kalle.errors import UserError
from kalle.models.discriminators import DiscriminatorConfig
from kalle.models.flowvae import FlowConfig, FlowVAE, FlowVAEConfig
from kalle.models.lm import KalleLM
from kalle.models.lora import LoRAConfig
from kalle.training import Exponential, FlowVAEDataConfig, FlowVAETrainingConfig, LMDataConfig, LMTrainingConfig, TokenizerConfig
from kalle.training.config import EMAConfig

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))
ROOTS = sorted(name for name in FILES if "/" not in name)
OPTIONS = sorted(name for name in FILES if "/" in name)
ROOTS_OF_GROUP = {
    "data": ["train_lm"],
    "experiment": ["train_flowvae", "train_lm"],
    "flowvae": ["train_flowvae"],
    "lm": ["train_lm"],
    "mel_loss": ["train_flowvae"],
    "protocol": ["evaluate"],
    "testset": ["evaluate"],
    "tokenizer": ["train_lm"],
    "trainer": ["train_flowvae", "train_lm"],
}
REQUIRED = {
    "train_flowvae": ["out=o", "data.corpus=c"],
    "train_lm": ["out=o", "data.latents=l"],
    "encode": ["out=o", "corpus=c", "flowvae.folder=f"],
    "evaluate": ["out=o", "kind=wavs", "testset.path=t"],
}


def resolved(root: str, *overrides: str) -> dict[str, Any]:
    values = OmegaConf.to_container(compose(root, [*REQUIRED[root], *overrides]), resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    return values


def suits(root: str, group: str, option: str) -> bool:
    """Options that are named after a stage belong to its root only."""
    stage = root.removeprefix("train_")
    other = {"flowvae": "lm", "lm": "flowvae"}.get(stage)
    if (group, option) == ("experiment", "lora"):
        return stage == "lm"
    if group in ("testset", "protocol") or group in ("flowvae", "lm") or other is None:
        return True
    return other not in option.split("_")


def test_what_is_tested_is_everything() -> None:
    assert configs_dir() == CONFIGS
    assert set(ROOTS) == set(REQUIRED) and len(ROOTS) == 4  # noqa: PT018
    assert len(OPTIONS) >= 20
    assert {name.split("/")[0] for name in OPTIONS} == set(ROOTS_OF_GROUP)
    for name in OPTIONS:
        group, option = name.split("/")
        assert any(suits(root, group, option) for root in ROOTS_OF_GROUP[group]), name


@pytest.mark.parametrize("root", ROOTS)
def test_root_composes(root: str) -> None:
    assert resolved(root)["out"] == "o"


@pytest.mark.parametrize("name", OPTIONS)
def test_option_composes_under_its_roots(name: str) -> None:
    group, option = name.split("/")
    for root in ROOTS_OF_GROUP[group]:
        if suits(root, group, option):
            more = ["testset.path=t"] if group == "testset" else []
            assert resolved(root, f"{group}={option}", *more)


FLOWVAES = {  # millions of parameters, dimensions, latent frames a second
    "full": (204.4, 512, 12.5),
    "dim64": (196.63, 64, 12.5),
    "dim64_no_flow": (147.16, 64, 12.5),
    "dim64_100hz": (194.70, 64, 100),
    "dim256": (199.98, 256, 12.5),
    "dim256_25hz": (199.88, 256, 25),
    "dim1024": (213.35, 1024, 12.5),
    "small": (25.35, 128, 12.5),
    "nano": (6.01, 64, 12.5),
    "nano_bigvgan": (4.21, 64, 12.5),
}


@pytest.mark.parametrize("option", [name.split("/")[1] for name in OPTIONS if name.startswith("flowvae/")])
def test_flowvae_is_built(option: str) -> None:
    config = compose("train_flowvae", [*REQUIRED["train_flowvae"], f"flowvae={option}"])
    with torch.device("meta"):
        model = FlowVAE(instantiate(config.flowvae, _convert_="all"))
    millions, dimensions, rate_hz = FLOWVAES[option]
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
    assert (model.config.latent_dim, model.config.frame_rate_hz) == (dimensions, rate_hz)
    assert (model.flow is None) == option.endswith("no_flow")
    assert model.config.decoder.hop_length == model.config.hop_length
    assert config.data.segment_samples % model.config.hop_length == 0
    wav = torch.zeros(1, 4 * model.config.hop_length, device="meta")
    posterior = model.encode(wav)
    assert posterior.mean.shape == (1, 4, dimensions)
    assert model.decode(posterior.mean).shape == wav.shape


def test_variants_list_differences_only() -> None:
    full = dataclasses.asdict(FlowVAEConfig())
    for option in FLOWVAES:
        own = OmegaConf.to_container(OmegaConf.load(CONFIGS / "flowvae" / f"{option}.yaml"))
        if "defaults" in own:
            for key in own.keys() - {"defaults"}:
                assert own[key] != full[key], (option, key)


def test_the_low_kl_vae_differs_in_its_flow_and_its_kl() -> None:
    low, plain = (compose("train_flowvae", [*REQUIRED["train_flowvae"], *more]) for more in (["experiment=low_kl_flowvae"], []))
    assert low.flowvae.flow is None
    objective, default = instantiate(low.objective), instantiate(plain.objective)
    per_element = objective.kl_weight * low.flowvae.latent_dim
    assert objective.kl_reduction == "sum_dim"
    assert per_element < default.kl_weight / 1000
    assert (objective.mel_weight, objective.feature_weight) == (default.mel_weight, default.feature_weight)


@pytest.mark.parametrize(("option", "weight"), [("single", 45.0), ("multi_scale", 15.0)])
def test_a_mel_loss_comes_with_its_weight(option: str, weight: float) -> None:
    config = compose("train_flowvae", [*REQUIRED["train_flowvae"], f"mel_loss={option}"])
    assert config.objective.mel_weight == weight
    loss = instantiate(config.mel_loss, _convert_="all")
    wav = torch.randn(1, 6400, generator=torch.Generator().manual_seed(0))
    assert float(loss(wav, wav)) == 0
    assert float(loss(wav, 0.5 * wav)) > 0.1
    changed = compose("train_flowvae", [*REQUIRED["train_flowvae"], f"mel_loss={option}", "objective.mel_weight=3"])
    assert changed.objective.mel_weight == 3


@pytest.mark.parametrize("option", [name.split("/")[1] for name in OPTIONS if name.startswith("lm/")])
def test_lm_is_built(option: str) -> None:
    config = compose("train_lm", [*REQUIRED["train_lm"], f"lm={option}"])
    with torch.device("meta"):
        model = KalleLM(instantiate(config.lm, _convert_="all"))
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    low, high = {"full": (1238, 1241), "full_speaker": (1250, 1275), "small": (75, 110), "nano": (3, 8), "nano_speaker": (3, 8)}[option]
    assert low < millions < high


def test_speaker_variant_fits_its_data() -> None:
    config = compose("train_lm", [*REQUIRED["train_lm"], "lm=nano_speaker", "data=lm_speaker"])
    model, plain = (KalleLM(instantiate(lm, _convert_="all")) for lm in (config.lm, compose("train_lm", ["lm=nano"]).lm))
    assert model.speaker_encoder is not None
    assert config.data.speaker.latent_dim == model.hidden_size
    assert set(plain.state_dict()) < set(model.state_dict())
    assert instantiate(config.data.speaker).crop_frames == 200


@pytest.mark.parametrize("root", ["train_flowvae", "train_lm"])
def test_a_composed_configuration_is_the_default_dataclass(root: str) -> None:
    """Every default stands in the dataclass; configs/ chooses sizes."""
    from kalle.losses.waveform import MelConfig, MelL1

    built = training_config(compose(root, REQUIRED[root]))
    if isinstance(built, FlowVAETrainingConfig):
        assert isinstance(built.mel_loss, MelL1)
        assert built.mel_loss.mel.config == MelConfig()
        assert dataclasses.replace(built, mel_loss=None) == FlowVAETrainingConfig(out="o", data=FlowVAEDataConfig(corpus="c"))
    else:
        plain = LMTrainingConfig(out="o", data=LMDataConfig(latents="l"), lm=built.lm)
        assert dataclasses.replace(built, tokenizer=TokenizerConfig()) == plain
        chosen = training_config(compose(root, [*REQUIRED[root], "scheduler=exponential", "lora=default", "callbacks.ema=null"]))
        assert (chosen.scheduler, chosen.lora, chosen.callbacks.ema) == (Exponential(), LoRAConfig(), None)


@pytest.mark.parametrize(
    ("root", "first", "key", "given", "expected"),
    [
        ("train_flowvae", "experiment=nano_flowvae_decoder", "discriminators", "width: 0.125", DiscriminatorConfig(width=0.125)),
        ("train_flowvae", "flowvae=dim64_no_flow", "flowvae.flow", "couplings: 2", FlowConfig(couplings=2)),
        ("train_flowvae", "discriminators=null", "discriminators", "width: 0.5", DiscriminatorConfig(width=0.5)),
        ("train_lm", "experiment=lora", "callbacks.ema", "decay: 0.5", EMAConfig(decay=0.5)),
    ],
)
def test_what_an_experiment_leaves_out_can_be_put_back(root: str, first: str, key: str, given: str, expected: object) -> None:
    built = training_config(compose(root, [*REQUIRED[root], first, f"{key}={{{given}}}"]))
    assert operator.attrgetter(key)(built) == expected
    name, _, value = given.partition(": ")
    with pytest.raises(UserError) as caught:
        compose(root, [*REQUIRED[root], first, f"{key}.{name}={value}"])
    assert str(caught.value).startswith(f"{key} is null in this configuration: got {key}.{name}, expected ")
    assert str(caught.value).endswith(f"give {key}={{{given}}}")


@pytest.mark.parametrize(
    ("root", "overrides", "expected"),
    [
        ("train_lm", ["sed=1"], ["'sed'", "seed", "threads", "objective"]),
        ("train_lm", ["init.folder=x"], ["unknown", "'init.folder'", "init, freeze"]),
        ("train_lm", ["objective.end_weigth=1"], ["'objective.end_weigth'", "objective.end_weight", "objective.input_noise"]),
        ("train_flowvae", ["objective={mel_wieght: 1}"], ["'objective.mel_wieght'", "objective.mel_weight"]),
        ("train_flowvae", ["flowvae=nano", "flowvae.decoder.chanels=4"], ["'flowvae.decoder.chanels'", "flowvae.decoder.n_fft"]),
        ("train_flowvae", ["flowvae=huge"], ["huge", "full", "nano", "nano_bigvgan", "small"]),
        ("train_lm", ["nothing/here=x"], ["nothing/here"]),
        ("encode", ["shard_sise=4"], ["'shard_sise'", "shard_size", "batch_size"]),
        ("evaluate", ["metrics.wer.modell=x"], ["'metrics.wer.modell'", "metrics.wer.model"]),
        ("train_lm", ["objective=[1"], ["no viable alternative at input '[1'"]),
    ],
)
def test_mistakes_in_overrides_are_one_line_and_list_what_is_valid(root: str, overrides: list[str], expected: list[str], capsys) -> None:
    for attempt in (
        lambda: compose(root, [*REQUIRED[root], *overrides]),
        lambda: run_hydra(lambda config: None, root, [*REQUIRED[root], *overrides]),
    ):
        GlobalHydra.instance().clear()
        with pytest.raises(UserError) as caught:
            attempt()
        message = str(caught.value)
        assert "\n" not in message
        for word in expected:
            assert word in message, message
        assert "with +" not in message, "a new key would be one that nothing reads"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (["train", "lm"], "out"),
        (["train", "lm", "out=o"], "data.latents"),
        (["train", "flowvae", "out=o"], "data.corpus"),
        (["encode", "corpus=c", "out=o"], "flowvae.folder"),
        (["evaluate", "testset=asterisk", "kind=wavs", "wavs=w"], "out"),
    ],
)
def test_a_missing_value_is_named(command: list[str], named: str, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    assert f"no value for {named}" in error


@pytest.mark.parametrize("stage", ["flowvae", "lm"])
def test_cfg_job_prints_the_configuration(stage: str, capsys) -> None:
    assert main(["train", stage, "--cfg", "job", "seed=17"]) == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    assert printed.seed == 17
    assert printed.trainer.max_steps == 1000000


@pytest.mark.parametrize("stage", ["flowvae", "lm"])
def test_help_lists_every_key_and_explains_it(stage: str, capsys) -> None:
    assert main(["train", stage, "--help"]) == 0
    short = capsys.readouterr().out
    assert len(short.splitlines()) <= 60
    assert main(["train", stage, "--help-all"]) == 0
    full = capsys.readouterr().out
    composed = resolved(f"train_{stage}")
    for section, part in composed.items():
        names = [f"{section}.{key}" for key in part] if isinstance(part, dict) else [section]
        for name in names:
            if name not in ("_target_", "mel_loss.config") and not name.endswith("_target_"):
                assert f"\n{name}" in full, name
                assert f"\n{section}" in short, name
    for cls in (FlowVAETrainingConfig, LMTrainingConfig):
        undocumented = [
            key[0] for name, _, doc, part in keys(cls) for key in (nested(name, part) if part else [(name, "", doc)]) if not key[2]
        ]
        assert undocumented == []


@pytest.mark.parametrize("command", ["encode", "evaluate"])
def test_help_shows_the_keys_with_their_comments(command: str, capsys) -> None:
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 60
    composed = compose(command, [])
    assert all(f"\n{key}:" in shown for key in composed if key != "testset")
    assert "defaults:" not in shown
    assert "hydra:" not in shown


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_multirun(tmp_path: Path, monkeypatch, flag: str, place: int) -> None:
    """The flag may be written before, between and behind the overrides."""
    monkeypatch.chdir(tmp_path)
    seen: list[tuple[int, str, str]] = []
    words = ["seed=1,2", "out=o", "data.latents=l"]
    words.insert(place, flag)
    assert run_hydra(lambda config: seen.append((config.seed, config.data.latents, config.out)), "train_lm", words) == 0
    assert seen == [(1, "l", "o/0"), (2, "l", "o/1")]


def test_failures_of_single_runs_and_sweeps_reach_the_caller(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)

    def bug(config: Any) -> None:
        raise ZeroDivisionError("a bug")

    def mistake(config: Any) -> None:
        raise UserError("seed: got 1, expected 2; change it")

    base = ["out=o", "data.latents=l"]
    for words in (base, ["-m", "seed=1,2", *base]):
        with pytest.raises(ZeroDivisionError):
            run_hydra(bug, "train_lm", words)
        capsys.readouterr()
        with pytest.raises(UserError, match="expected 2"):
            run_hydra(mistake, "train_lm", words)
        if words is base:
            assert capsys.readouterr().err == ""


def test_the_environment_and_arguments_are_left_as_they_were(monkeypatch) -> None:
    import os
    import sys

    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    before = list(sys.argv)
    run_hydra(lambda config: None, "encode", [*REQUIRED["encode"]])
    assert sys.argv == before
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_folder_override() -> None:
    assert folder_override(["flowvae=a=b", "seed=1", "flowvae.folder=d"], "flowvae") == ["flowvae.folder=a=b", "seed=1", "flowvae.folder=d"]

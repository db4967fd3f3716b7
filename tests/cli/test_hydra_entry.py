from __future__ import annotations

from pathlib import Path

import pytest

from kalle.cli import hydra_entry
from kalle.cli.hydra_entry import compose, configs_dir
from kalle.errors import UserError


def test_configs_inside_the_package_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "kalle"
    (package / "cli").mkdir(parents=True)
    monkeypatch.setattr(hydra_entry, "__file__", str(package / "cli" / "hydra_entry.py"))
    with pytest.raises(UserError, match="no configuration folder: looked in"):
        configs_dir()
    beside = package.parents[1] / "configs"
    beside.mkdir()
    assert configs_dir() == beside
    (package / "configs").mkdir()
    assert configs_dir() == package / "configs"


def test_a_bug_inside_a_part_is_not_taken_for_a_mistake() -> None:
    from hydra.errors import InstantiationException

    error = InstantiationException("Error in call to target 'a.B'")
    error.__cause__ = ZeroDivisionError("x")
    assert hydra_entry.readable(error, "train_lm", []) is error
    error.__cause__ = ValueError("size: got 0")
    assert str(hydra_entry.readable(error, "train_lm", [])) == "configuration train_lm: a.B refuses its values: size: got 0; correct them"
    error.__cause__ = UserError("hop: got 1, expected 2; change it")
    assert hydra_entry.readable(error, "train_lm", []) is error.__cause__


def test_interpolations_reach_their_values() -> None:
    config = compose("train_lm", ["out=here", "data.latents=l", "lm=nano_speaker", "data=lm_speaker", "lm.backbone.hidden_size=64"])
    assert config.data.speaker.latent_dim == 64


def test_hydra_s_plain_errors_are_mistakes_and_the_job_s_are_bugs() -> None:
    def bug(config: object) -> None:
        raise ValueError("a bug")

    words = ["out=o", "data.latents=l"]
    with pytest.raises(UserError, match=r"^lm: got 'null', expected one of base, full, "):
        hydra_entry.run_hydra(bug, "train_lm", [*words, "lm=null"])
    with pytest.raises(ValueError, match="a bug") as caught:
        hydra_entry.run_hydra(bug, "train_lm", words)
    assert not isinstance(caught.value, UserError)


@pytest.mark.parametrize("word", ["trainer=null", "=1", "+=", "@=x", "/=x", "out=${no}", "out=${out}", "trainer=${out}"])
def test_a_value_that_hydra_asserts_or_resolves_too_late_is_one_line(word: str) -> None:
    from kalle.cli.train import training_config

    with pytest.raises(UserError) as caught:
        training_config(compose("train_lm", ["data.latents=l", "tokenizer=bytes", *(["out=o"] if "out" not in word[:4] else []), word]))
    assert "\n" not in str(caught.value)
    assert "assert" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "word", "message"),
    [
        ("train_lm", "lm=nope", "lm: got 'nope', expected one of base, full, full_speaker, nano, nano_speaker, small; correct it"),
        ("train_lm", "lm=", "lm: got '', expected one of base, full,"),
        ("train_lm", "lm=[base,nope]", "lm: got 'nope', expected one of base, full,"),
        ("train_lm", "experiment=a/b", "experiment: got 'a/b', expected one of lora,"),
        ("train_lm", "hydra/launcher=nope", "hydra/launcher: got 'nope', expected one of basic"),
        ("evaluate", "testset=nope", "testset: got 'nope', expected one of asterisk, list"),
        ("evaluate", "metrics=[]", "metrics: got [], expected an object {...}; set one key in it, as metrics.KEY=VALUE"),
        ("train_lm", "optimizer=[]", "optimizer: got [], expected an object {...}; set one key in it, as optimizer.KEY=VALUE"),
        ("evaluate", "synthesis.seeds={a:1}", "synthesis.seeds: got {a:1}, expected a list [...]; correct it"),
    ],
)
def test_a_wrong_choice_or_type_names_the_right_ones_and_no_folder(config: str, word: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        compose(config, [word])
    assert str(caught.value).startswith(message)
    assert "search path" not in str(caught.value)
    assert str(configs_dir()) not in str(caught.value)


EVALUATE = ["kind=wavs", "wavs=w", "testset.path=t", "out=o"]
ENCODE = ["flowvae.folder=f", "corpus=c", "out=o"]


@pytest.mark.parametrize(
    ("config", "words", "message"),
    [
        ("evaluate", [*EVALUATE, "metrics=3"], "metrics: got 3, expected an object"),
        ("evaluate", [*EVALUATE, "metrics.wer=3"], "metrics.wer: got 3, expected an object"),
        ("evaluate", [*EVALUATE, "reconstruction=3"], "reconstruction: got 3, expected an object"),
        ("evaluate", [*EVALUATE, "synthesis=3"], "synthesis: got 3, expected an object"),
        ("evaluate", [*EVALUATE, "+reconstruction.foo=3"], "got 'reconstruction.foo', expected one of: reconstruction.sample, "),
        ("evaluate", [*EVALUATE, "+foo=3"], "got 'foo', expected one of: "),
        ("evaluate", [*EVALUATE, "out="], "out: got '', expected a path"),
        ("evaluate", [*EVALUATE, "out=[]"], "out: got [], expected a path"),
        ("encode", [*ENCODE, "join=3"], "join: got 3, expected an object"),
        ("encode", [*ENCODE, "+x=3"], "got 'x', expected one of: "),
        ("encode", [*ENCODE, "+join.x=3"], "got 'join.x', expected one of: join."),
        ("encode", [*ENCODE, "~flowvae.folder"], "no value for flowvae: expected one in the command"),
        ("encode", [*ENCODE, "out="], "out: got an empty text, expected a path; give one, as out=DIR"),
        ("train_lm", ["data.latents=l", "tokenizer=bytes", "out="], "out: got an empty text, expected a path; give one, as out=DIR"),
    ],
)
def test_values_that_fit_no_dataclass_are_one_line(config: str, words: list[str], message: str) -> None:
    from kalle.cli.encode import encoding_config
    from kalle.cli.evaluate import filled_config
    from kalle.cli.train import training_config

    build = {"evaluate": filled_config, "encode": encoding_config, "train_lm": training_config}[config]
    with pytest.raises(UserError) as caught:
        build(compose(config, words))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)

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
    with pytest.raises(UserError, match="Config group override must be a string or a list"):
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

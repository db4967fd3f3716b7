from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kalle.checkpoint import read_json, write_json
from kalle.errors import UserError
from kalle.synthesis.options import StopRule
from kalle.synthesis.weights import FolderConfig, StoredStop, read_folder, write_stop


def config(folder: Path, values: dict[str, Any]) -> FolderConfig:
    write_json(folder / "config.json", values)
    return read_folder(folder)


def test_every_known_key_is_read(weight_folder: Path) -> None:
    stop = {"threshold": 1, "min_index": 5, "false_stop_rate": 0.01, "missed_stop_rate": 0}
    values = {"format_version": 1, "parts": ["flowvae", "lm", "tokenizer"], "stop": stop, "language": "en"} | {
        "voice": "ann",
        "sample_rate": 8000,
    }
    assert config(weight_folder, values) == FolderConfig(StopRule(1, 5), "en", "ann", 8000)
    assert config(weight_folder, {"stop": None, "language": None}) == config(weight_folder, {}) == FolderConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bogus": 1}, r"unknown key 'bogus' in .*config\.json'; valid keys: format_version, parts, stop, language, voice, sample_rate"),
        (
            {"stop": {"tresh": 1}},
            r"unknown key 'stop\.tresh' .*valid keys: stop\.threshold, stop\.min_index, stop\.probability, stop\.false_stop_rate",
        ),
        ({"stop": {"threshold": "x"}}, r"stop\.threshold is 'x', expected a number"),
        ({"stop": {"min_index": 1.5}}, r"stop\.min_index is 1\.5, expected a whole number"),
        ({"stop": 3}, r"stop is 3, expected an object"),
        ({"language": 1}, "language is 1, expected a text or null"),
        ({"parts": "lm"}, "parts is 'lm', expected a list, each a text"),
        ({"sample_rate": True}, "sample_rate is True, expected a whole number or null"),
        ({"format_version": 99}, "update kalle"),
        ({"format_version": "1"}, "update kalle"),
    ],
)
def test_a_typo_or_a_wrong_type_is_named(weight_folder: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(weight_folder, values)


def test_a_calibrated_stop_is_stored_beside_the_other_keys(weight_folder: Path) -> None:
    before = read_json(weight_folder / "config.json")
    write_stop(weight_folder, StoredStop(0.12, 2, 0.01, 0.02, 50))
    after = read_json(weight_folder / "config.json")
    assert after.pop("stop") == {"threshold": 0.12, "min_index": 2, "false_stop_rate": 0.01, "missed_stop_rate": 0.02, "utterances": 50}
    assert after == before
    assert read_folder(weight_folder).stop == StopRule(0.12, 2)
    assert sorted(path.name for path in weight_folder.iterdir()) == ["config.json", "flowvae", "lm", "tokenizer"]


def test_a_folder_without_config_gets_one_with_the_stop(weight_folder: Path) -> None:
    (weight_folder / "config.json").unlink()
    write_stop(weight_folder, StoredStop(0.12, 2))
    assert read_folder(weight_folder).stop == StopRule(0.12, 2)


def test_a_broken_config_is_left_as_it_is(weight_folder: Path) -> None:
    (weight_folder / "config.json").write_text('{"bogus": 1}')
    with pytest.raises(UserError, match="unknown key 'bogus'"):
        write_stop(weight_folder, StoredStop(0.12))
    assert (weight_folder / "config.json").read_text() == '{"bogus": 1}'

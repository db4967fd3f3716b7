from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kalle.checkpoint import read_json, write_json
from kalle.errors import UserError
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.options import GenerationOptions, SpeechRequest, StopRule
from kalle.synthesis.weights import FolderConfig, StoredStop, read_weight_folder, write_stop
from kalle.text.phonemes import PhonemeTokenizer


def config(folder: Path, values: dict[str, Any]) -> FolderConfig:
    write_json(folder / "config.json", values)
    return read_weight_folder(folder)


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
    assert read_weight_folder(weight_folder).stop == StopRule(0.12, 2)
    assert sorted(path.name for path in weight_folder.iterdir()) == ["config.json", "flowvae", "lm", "tokenizer"]


def test_a_folder_without_config_gets_one_with_the_stop(weight_folder: Path) -> None:
    (weight_folder / "config.json").unlink()
    write_stop(weight_folder, StoredStop(0.12, 2))
    assert read_weight_folder(weight_folder).stop == StopRule(0.12, 2)


def test_a_broken_config_is_left_as_it_is(weight_folder: Path) -> None:
    (weight_folder / "config.json").write_text('{"bogus": 1}')
    with pytest.raises(UserError, match="unknown key 'bogus'"):
        write_stop(weight_folder, StoredStop(0.12))
    assert (weight_folder / "config.json").read_text() == '{"bogus": 1}'


LEARNT = {"characters": {"en": "abcdefghijklmnopqrstuvwxyzH,.'", "fr": "abcdeéè."}, "capital_words": False}


def test_a_text_is_spoken_in_the_characters_that_the_weights_learnt(weight_folder: Path) -> None:
    told = config(weight_folder, {"language": "en", "text": LEARNT})
    assert told.words("“He doesn’t”\nSTOP – now", GenerationOptions()) == ("He doesn't stop, now", ())
    assert "language 'zh'" in told.words("你好", GenerationOptions())[1][0]
    assert told.transcript("Éa – b é") == "éa, b é"
    with pytest.raises(UserError, match="do not speak 'zh': expected en or fr"):
        told.words("Hello", GenerationOptions(language="zh"))
    untold = config(weight_folder, {"language": "en"})
    assert untold.words("“He”\nSTOP – now", GenerationOptions()) == ("“He”\nSTOP – now", ())

    kalle = Kalle.from_pretrained(weight_folder, "cpu")
    write_json(weight_folder / "config.json", {"language": "en", "text": LEARNT})
    mapped = Kalle.from_pretrained(weight_folder, "cpu")

    def ids(kalle: Kalle, text: str) -> list[int]:
        return kalle.resolve(SpeechRequest(text, options=GenerationOptions(seed=0))).text_ids.tolist()

    assert ids(mapped, "“He’s…”") == ids(kalle, "He's...")


@pytest.mark.parametrize(
    "text", [{"characters": {"english": ""}}, {"characters": 3}, {"bogus": 1}, {"replace": {"ab": "c"}}, {"characters": {"fr": None}}]
)
def test_a_table_of_other_things_is_refused(weight_folder: Path, text: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="text"):
        config(weight_folder, {"language": "en", "text": text})


def test_words_without_phonemes_are_named(weight_folder: Path) -> None:
    pytest.importorskip("hibari")
    kalle = Kalle.from_pretrained(weight_folder, "cpu")
    PhonemeTokenizer(kalle.tokenizer._backend).save(weight_folder / "tokenizer")
    spelled = Kalle(kalle.flowvae, kalle.lm, PhonemeTokenizer(kalle.tokenizer._backend, symbols="həlO"))
    request = SpeechRequest("Kubernetes, [hello](/həlO/).", options=GenerationOptions(seed=0))
    assert "lacks them: Kubernetes;" in spelled.resolve(request).warnings[0]
    assert read_weight_folder(weight_folder).given_phonemes

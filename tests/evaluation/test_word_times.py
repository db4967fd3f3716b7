from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kalle.audio import read_audio
from kalle.errors import UserError
from kalle.evaluation import asr
from kalle.evaluation.alignment import WordAligner, words_of
from kalle.evaluation.asr import AlignedPiece, FasterWhisper

PROMPT = Path(__file__).parents[2] / "recipes" / "quickstart" / "corpus" / "audio" / "agent-pass.opus"
TEXT = "Please enter your password followed by the pound key."


def pieces(*texts: str) -> list[AlignedPiece]:
    return [AlignedPiece(text, float(number), number + 1.0) for number, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("split", "text", "language", "words"),
    [
        ([" One", " two."], "One two.", "en", [("One", 0, 1), ("two.", 1, 2)]),
        ([" Don", "'t", " stop", "."], "Don't stop.", "en", [("Don't", 0, 2), ("stop.", 2, 4)]),
        ([" well", "-", "known"], "well-known", "en", [("well-known", 0, 3)]),
        ([' "', "Yes", '"', ",", " he"], '"Yes", he', "en", [('"Yes",', 0, 4), ("he", 4, 5)]),
        ([" a", " b"], "a  b\n c", "en", [("a", 0, 1), ("b", 1, 2)]),
        (["你", "好", "。"], "你好。", "zh", [("你", 0, 1), ("好", 1, 2), ("。", 2, 2.5)]),
        ([], "One", "en", []),
    ],
)
def test_words_are_those_of_the_text(split: list[str], text: str, language: str, words: list[tuple[str, float, float]]) -> None:
    found = words_of(pieces(*split), text, language, 2.5 if language == "zh" else 60)
    assert [(each.text, each.start_s, each.end_s) for each in found] == words


def test_no_time_is_beyond_the_audio() -> None:
    assert [each.end_s for each in words_of(pieces(" a", " b", " c"), "a b c", "en", 1.5)] == [1.0, 1.5, 1.5]


@pytest.fixture(scope="module")
def aligner() -> WordAligner:
    made = WordAligner("tiny.en")
    try:
        made.check("en")
    except UserError:
        pytest.skip("the recogniser tiny.en is not installed")
    return made


def test_words_of_a_recording_move_with_it(aligner: WordAligner) -> None:
    audio = read_audio(PROMPT)
    words = aligner(audio, 16000, TEXT, "en")
    assert [each.text for each in words] == TEXT.split()
    starts = np.array([each.start_s for each in words])
    assert (np.diff(starts) > 0.05).all()
    assert all(0 <= each.start_s < each.end_s <= len(audio) / 16000 for each in words)
    later = aligner(np.concatenate([np.zeros(16000, np.float32), audio]), 16000, TEXT, "en")
    moved = np.array([each.start_s for each in later]) - starts
    assert np.abs(moved[1:] - 1).max() < 0.1, "the first word may begin in the silence"


def test_other_rates_are_resampled(aligner: WordAligner) -> None:
    words = aligner(read_audio(PROMPT), 16000, TEXT, "en")
    at_24k = aligner(read_audio(PROMPT, 24000), 24000, TEXT, "en")
    assert [each.start_s for each in at_24k] == pytest.approx([each.start_s for each in words], abs=0.1)


def test_what_cannot_be_aligned_is_said(aligner: WordAligner, monkeypatch: pytest.MonkeyPatch) -> None:
    assert aligner(np.zeros(0, np.float32), 16000, TEXT, "en") == []
    assert aligner(np.zeros(8000, np.float32), 16000, " ", "en") == []
    with pytest.raises(UserError, match=r"31 s.*at most 30"):
        aligner(np.zeros(31 * 16000, np.float32), 16000, TEXT, "en")
    with pytest.raises(UserError, match="English only"):
        aligner.check("zh")
    monkeypatch.setattr(asr, "_installed_folders", lambda packaged: None)
    with pytest.raises(UserError, match="pip install"):
        WordAligner().check("en")


def test_a_language_that_whisper_lacks_is_said_before_anything_is_spoken() -> None:
    many = WordAligner("base")
    try:
        many.check("fr")
    except UserError:
        pytest.skip("the recogniser base is not installed")
    with pytest.raises(UserError, match=r"does not know the language: got 'ga', expected one of af, "):
        many.check("ga")
    with pytest.raises(UserError, match="does not know the language"):
        FasterWhisper("base", languages=["fr"])(np.zeros(16000, np.float32), "ga")

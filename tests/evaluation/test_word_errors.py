from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kalle.errors import UserError
from kalle.evaluation.metrics import MetricError, ScoreItem
from kalle.evaluation.scoring import Scores, summarise
from kalle.evaluation.word_errors import WER, corpus_style, normaliser, seed_tts, whisper_english, word_errors


class Says:
    def __init__(self, *texts: str) -> None:
        self.texts = list(texts)

    def __call__(self, audio: np.ndarray, language: str) -> str:
        return self.texts.pop(0)

    def describe(self) -> dict[str, object]:
        return {"model": "fake"}


def item(text: str, language: str = "en") -> ScoreItem:
    return ScoreItem("x", np.zeros(1600, np.float32), text, language)


def test_regression_value_of_the_seed_tts_normaliser() -> None:
    reference, hypothesis = "It’s a well-known don't.", "It's a well known don't"
    assert seed_tts(reference, "en") == ["its", "a", "wellknown", "don't"]
    assert word_errors(seed_tts(reference, "en"), seed_tts(hypothesis, "en")).rate == 0.75


def test_chinese_is_scored_per_character_without_punctuation() -> None:
    assert seed_tts("你好，世界。", "zh") == list("你好世界")
    assert word_errors(list("你好世界"), list("你好世")).rate == 0.25


def test_whisper_normaliser_unifies_what_the_protocol_does_not() -> None:
    text, heard = "Mr. Smith can't pay twenty dollars, uh, today.", "mister smith can not pay $20 today"
    assert whisper_english(text, "en") == whisper_english(heard, "en")
    assert seed_tts(text, "en") != seed_tts(heard, "en")


def test_authors_normaliser_turns_punctuation_into_spaces_and_splits_cjk() -> None:
    assert corpus_style("Well-known, 你好 OK", "zh") == ["well", "known", "你", "好", "ok"]


def test_both_means_and_they_differ() -> None:
    metric = WER(Says("one two three four five six seven eight", "wrong wrong"), normalisers=["seed_tts"])
    texts = ("one two three four five six seven eight", "nine ten")
    rows = [{"system": "s", "id": text, **metric(item(text))} for text in texts]
    summary = summarise(rows, metric.aggregates, resamples=200, seed=0)["s"]
    assert summary["wer_utt_mean"].value == 0.5
    assert summary["wer_corpus"].value == pytest.approx(2 / 10)


def test_second_normaliser_is_a_second_column() -> None:
    row = WER(Says("it is well known"), normalisers=["seed_tts", "kalle_authors"])(item("It is well-known"))
    assert row["wer"] == pytest.approx(2 / 3)
    assert row["wer_kalle_authors"] == 0
    assert row["transcript"] == "it is well known"


def test_an_utterance_can_exceed_one_and_silence_is_all_deletions() -> None:
    metric = WER(Says("a b c", ""), normalisers=["seed_tts"])
    assert metric(item("x"))["wer"] == 3
    assert metric(item("x y"))["wer"] == 1


def test_text_of_punctuation_cannot_be_scored() -> None:
    with pytest.raises(MetricError, match="empty after normalisation: seed_tts, whisper"):
        WER(Says("anything"))(item("..."))


def test_a_text_that_one_normaliser_empties_keeps_the_columns_of_the_other() -> None:
    scores = Scores([WER(Says("uh um", "one"))])
    scores.add("s", item("Uh, um, hmm, mm, mhm."))
    scores.add("s", replace(item("one"), id="other"))
    first, second = scores.rows
    assert (first["wer"], first["metric_errors"]) == (0.6, {"wer": "the text is empty after normalisation: whisper"})
    assert "wer_whisper" not in first
    summary = summarise(scores.rows, scores.metrics[0].aggregates, 20, 0)["s"]
    assert (summary["wer_utt_mean"].count, summary["wer_utt_mean_whisper"].count) == (2, 1)
    assert second["wer_whisper"] == 0


def test_what_chinese_needs_is_looked_for_before_anything_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install zhconv"):
        WER(Says(), languages=["en", "zh"])


@pytest.mark.parametrize("text", ["\u8edf\u9ad4\u5f88\u597d", "\u8f6f\u4f53\u5f88\u597d"])
@pytest.mark.parametrize("heard", ["\u8edf\u9ad4\u5f88\u597d", "\u8f6f\u4f53\u5f88\u597d"])
def test_both_scripts_of_chinese_are_one(text: str, heard: str) -> None:
    pytest.importorskip("zhconv")
    row = WER(Says(heard), normalisers=["seed_tts"])(item(text, "zh"))
    assert row["wer_words"] == 4
    # A word of Taiwan is a word of the mainland to the protocol, whose references are simplified.
    assert row["wer"] == (0.25 if text == "\u8f6f\u4f53\u5f88\u597d" and heard != text else 0)


def test_unknown_normaliser_lists_the_known() -> None:
    with pytest.raises(UserError, match="seed_tts, whisper, kalle_authors"):
        normaliser("nist")


def test_british_spelling_is_no_error_under_whisper_and_is_one_under_seed_tts() -> None:
    reference, heard = "The colour of the grey theatre was recognised.", "the color of the gray theater was recognized"
    assert whisper_english(reference, "en") == whisper_english(heard, "en")
    assert word_errors(seed_tts(reference, "en"), seed_tts(heard, "en")).errors == 4


def test_whispers_normaliser_is_that_of_transformers_but_for_the_spelling() -> None:
    english = pytest.importorskip("transformers.models.whisper.english_normalizer")
    import importlib.resources
    import json

    table = json.loads(importlib.resources.files("whisper_normalizer").joinpath("normalizers/english.json").read_text())
    theirs = english.EnglishTextNormalizer(table)
    for text in (
        "I'm gonna pay $20.50 for Mr. O'Neil's colour TVs, uh, won't I?",
        "In 1984 twenty-one men sat at No. 5 [noise]; it's done!",
    ):
        assert whisper_english(text, "en") == theirs(text).split()


def test_items_of_one_language_are_heard_together_and_stay_in_order() -> None:
    class Batches:
        def __init__(self) -> None:
            self.asked: list[tuple[str, int]] = []

        def batch(self, audios: list[np.ndarray], language: str) -> list[str]:
            self.asked.append((language, len(audios)))
            return [f"{language} {len(audio)}" for audio in audios]

        def describe(self) -> dict[str, object]:
            return {}

    transcriber = Batches()
    items = [ScoreItem(str(n), np.zeros(n, np.float32), "x", language) for n, language in ((1, "en"), (2, "fr"), (3, "en"))]
    rows = WER(transcriber, ["seed_tts"]).batch(items)  # type: ignore[arg-type]
    assert [row["transcript"] for row in rows if not isinstance(row, MetricError)] == ["en 1", "fr 2", "en 3"]
    assert transcriber.asked == [("en", 2), ("fr", 1)]

"""Two transcripts of a corpus, and the items on which they agree."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from kalle.cli.data import app
from kalle.data.corpus.cuts import cuts_path, load_cuts, make_cut, write_cuts
from kalle.data.corpus.measures import MeasuredItem, Measures
from kalle.data.corpus.retranscribe import Recogniser, RetranscribeOptions, compare_transcripts, retranscribe_corpus
from kalle.errors import UserError
from kalle.evaluation.word_errors import one_script, whisper_english, word_errors

RATE_HZ = 16000
# Text of the item, language, what the recogniser says of it.
SAID = [
    ("Twenty one boats, isn't it?", "en", "21 boats isn't it"),
    ("the river runs to the sea", "en", "the river runs to a sea"),
    ("a lamp", "en", "the camp"),
    ("", "en", "words nobody wrote down"),
    ("", "en", "..."),
    ("?!", "en", "hm well"),
    ("今天天气很好我们去公园", "zh", "今天天汽很好我们去公园"),
    ("colours of autumn", "en", "colours of autumn"),
]


def told(calls: list[int], fail_after: int = 1000) -> Recogniser:
    """A recogniser that knows the items by their level: what it is told is all it says."""

    def transcribe(audio: np.ndarray, rate_hz: int, language: str) -> str:
        if len(calls) == fail_after:
            raise KeyboardInterrupt
        number = round(float(np.abs(audio).max()) * 100) - 1
        calls.append(number)
        assert SAID[number][1] == language
        assert rate_hz == RATE_HZ
        return SAID[number][2]

    errors: Callable = lambda first, second: word_errors(first, second).errors  # noqa: E731
    return Recogniser(transcribe, whisper_english, errors, {"model": "told"}, max_seconds=2.0)


def untracked(items, total):
    return items


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "audio").mkdir(parents=True)
    cuts = []
    for number, (text, language, _) in enumerate(SAID):
        samples = 3 * RATE_HZ if number == len(SAID) - 1 else RATE_HZ
        soundfile.write(folder / "audio" / f"{number}.wav", np.full(samples, 0.01 * (number + 1)), RATE_HZ)
        cuts.append(make_cut(str(number), f"audio/{number}.wav", RATE_HZ, samples, RATE_HZ, text, "ann", language))
    write_cuts(cuts_path(folder, "train"), cuts)
    (folder / ".completed").write_text("x\n")
    return folder


def texts(folder: Path) -> dict[str, str]:
    return {cut.id: cut.supervisions[0].text for cut in load_cuts(folder, "train")}


def test_items_stay_where_both_agree_and_every_other_has_a_reason(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = retranscribe_corpus(corpus, out, told([]), RetranscribeOptions(), untracked)
    assert texts(out) == {"0": SAID[0][0], "6": SAID[6][0]}
    reasons = {row["id"]: row["reason"] for row in map(json.loads, (out / "items.jsonl").read_text().splitlines())}
    assert reasons == dict(
        zip("01234567", ["", "disagrees", "disagrees", "no text", "no text", "text without words", "", "longer than 2 s"], strict=True)
    )
    assert report["kept"] + sum(report["left_out_by_reason"].values()) == report["items"] == 8
    rates = {row["id"]: row["error_rate"] for row in map(json.loads, (out / "items.jsonl").read_text().splitlines())}
    assert rates["0"] == 0
    assert rates["1"] == pytest.approx(1 / 6)
    assert rates["6"] == pytest.approx(1 / 11)
    assert (out / "agreement.png").read_bytes().startswith(b"\x89PNG")
    assert load_cuts(out, "train")[0].load_audio().shape == (1, RATE_HZ)


@pytest.mark.parametrize(("text", "expected"), [("asr", {"0": SAID[0][2], "6": SAID[6][2]}), ("fill", {"3": SAID[3][2]})])
def test_texts_of_the_recogniser_are_taken_on_request(corpus: Path, tmp_path: Path, text: str, expected: dict[str, str]) -> None:
    report = retranscribe_corpus(corpus, tmp_path / "out", told([]), RetranscribeOptions(text=text), untracked)
    found = texts(tmp_path / "out")
    assert found == {**{"0": SAID[0][0], "6": SAID[6][0]}, **expected}
    assert report["new_texts"] == len(expected)
    assert report["left_out_by_reason"].get("nothing heard", 0) == (1 if text == "fill" else 0)


def test_an_interrupted_run_goes_on_and_another_threshold_needs_no_recogniser(corpus: Path, tmp_path: Path) -> None:
    calls: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        retranscribe_corpus(corpus, tmp_path / "out", told(calls, fail_after=3), RetranscribeOptions(), untracked)
    assert not (tmp_path / "out" / ".completed").exists()
    retranscribe_corpus(corpus, tmp_path / "out", told(calls), RetranscribeOptions(), untracked)
    assert calls == [0, 1, 2, 3, 4, 5, 6]
    retranscribe_corpus(corpus, tmp_path / "out", told(calls), RetranscribeOptions(max_error_rate=0.2), untracked)
    assert len(calls) == 7
    assert set(texts(tmp_path / "out")) == {"0", "1", "6"}


@pytest.mark.parametrize(("named", "default"), [("English", ""), ("en_GB", ""), (None, "eng")])
def test_languages_are_told_to_the_recogniser_by_their_codes(corpus: Path, tmp_path: Path, named: str | None, default: str) -> None:
    cuts = [cut for cut in load_cuts(corpus, "train") if cut.supervisions[0].language == "en"]
    for cut in cuts:
        cut.supervisions[0].language = named
    write_cuts(cuts_path(corpus, "train"), cuts)
    calls: list[int] = []
    retranscribe_corpus(corpus, tmp_path / "out", told(calls), RetranscribeOptions(language=default), untracked)
    assert len(calls) == len([item for item in cuts if item.duration <= 2.0]) > 0


def test_mistakes_are_user_errors(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="got 'both', expected one of keep, asr, fill"):
        RetranscribeOptions(text="both")
    with pytest.raises(UserError, match="got -1"):
        RetranscribeOptions(max_error_rate=-1)
    with pytest.raises(UserError, match="got 'klingon!'"):
        RetranscribeOptions(language="klingon!")
    with pytest.raises(UserError):
        retranscribe_corpus(corpus, corpus, told([]), RetranscribeOptions(), untracked)
    cuts = load_cuts(corpus, "train")
    for cut in cuts:
        cut.supervisions[0].language = None
    write_cuts(cuts_path(corpus, "train"), cuts)
    with pytest.raises(UserError, match="no language: got none for '0'"):
        retranscribe_corpus(corpus, tmp_path / "out", told([]), RetranscribeOptions(), untracked)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_real_recogniser_keeps_real_prompts_and_drops_swapped_texts(tmp_path: Path) -> None:
    from kalle.cli.main import main
    from kalle.evaluation.asr import find_asr_model

    try:
        find_asr_model("auto")
    except UserError as error:
        pytest.skip(str(error))
    assert main(["prepare", "embedded", "--out", str(tmp_path / "corpus")]) == 0
    cuts = [cut for cut in load_cuts(tmp_path / "corpus", "test") if 2 < cut.duration < 6][:8]
    true = [cut.supervisions[0].text for cut in cuts]
    for cut, text in zip(cuts[:2], true[1::-1], strict=True):
        cut.supervisions[0].text = text
    small = tmp_path / "small"
    small.mkdir()
    write_cuts(cuts_path(small, "train"), cuts)
    (small / ".completed").write_text("x\n")
    result = CliRunner().invoke(app, ["retranscribe", str(small), "--out", str(tmp_path / "out"), "--threads", "1"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    kept = texts(tmp_path / "out")
    assert not {cuts[0].id, cuts[1].id} & set(kept)
    assert len(kept) >= 4


@pytest.mark.parametrize("sign", ["\u2019", "\u2018", "\u02bc", "\uff07", "\u2032", "`"])
def test_a_typographic_apostrophe_is_no_error(tmp_path: Path, sign: str) -> None:
    verdict = judged(f"It isn{sign}t John{sign}s boat, they{sign}re ours.", "en", "it isn't john's boat they're ours")
    assert (verdict.errors, verdict.reason) == (0, "")


@pytest.mark.parametrize(
    ("text", "heard"),
    [("\u8edf\u9ad4\u5f88\u597d", "\u8f6f\u4f53\u5f88\u597d"), ("\u8f6f\u4f53\u5f88\u597d", "\u8edf\u9ad4\u5f88\u597d")],
)
def test_both_scripts_of_chinese_are_compared_in_one(text: str, heard: str) -> None:
    pytest.importorskip("zhconv")
    verdict = judged(text, "zh", heard)
    assert (verdict.errors, verdict.tokens) == (0, 4)
    assert verdict.new_text == text


def judged(text: str, language: str, heard: str):
    recogniser = dataclasses.replace(told([]), one_script=one_script)
    item = MeasuredItem("a", "train", text, "", language, RATE_HZ, Measures(seconds=1.0))
    return compare_transcripts(item, language, {"transcript": heard}, recogniser, RetranscribeOptions())

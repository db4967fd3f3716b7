from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kalle.audio import Audio, read_audio
from kalle.errors import UserError
from kalle.evaluation import Settings, SpeakingConfig, evaluate_synthesis, evaluate_wavs
from kalle.evaluation.comparison import read_run
from kalle.evaluation.metrics import DurationRatio, MelDistance
from kalle.evaluation.protocols import item_seed, other_recordings, rtf_note
from kalle.evaluation.report import Result, terminal_report, verdict
from kalle.evaluation.similarity import Similarity
from kalle.evaluation.test_list import TestItem
from kalle.evaluation.word_errors import WER
from kalle.extras import cpu_name
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.options import GenerationOptions
from kalle.synthesis.speech import Speech
from kalle.synthesis.voice import Voice

QUICK = Settings(resamples=50, figure_items=0)


class Lengths:
    """An embedder that remembers which audio it saw."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, audio: Audio) -> Audio:
        self.seen.append(len(audio))
        return np.array([len(audio), 1.0], dtype=np.float32)

    def describe(self) -> dict[str, object]:
        return {}


def speech_of(samples: int, stop_reason: str = "end", seed: int = 0) -> Speech:
    frames = samples // 1280
    nothing = np.zeros((frames, 8), np.float32)
    audio = np.full(samples, 0.1, np.float32)
    return Speech(audio, 16000, stop_reason, seed, nothing, nothing, np.zeros(frames, np.float32), 100)


def test_a_real_tiny_model_speaks_and_is_scored(kalle: Kalle, items: list[TestItem], transcriber: object, tmp_path: Path) -> None:
    metrics = [WER(transcriber, ["seed_tts"]), Similarity(embedder=Lengths()), DurationRatio(), MelDistance()]  # type: ignore[arg-type]
    result = evaluate_synthesis(kalle, items[:2], metrics, tmp_path, settings=Settings(resamples=50, figure_items=1))
    assert result.value("recording", "wer_utt_mean") == 0
    assert result.value("synthesis", "wer_utt_mean") == 1
    assert result.value("synthesis", "mel_l1") is None
    row = next(row for row in result.rows if row["system"] == "synthesis")
    assert row["audio_s"] == pytest.approx(row["frames"] * 0.08)
    assert row["audio_s"] == pytest.approx(len(read_audio(tmp_path / row["wav"])) / 16000)
    synthesis = [row for row in result.rows if row["system"] == "synthesis"]
    expected_rtf = sum(row["synthesis_s"] for row in synthesis) / sum(row["audio_s"] for row in synthesis)
    assert result.value("synthesis", "rtf") == pytest.approx(expected_rtf)
    assert sum(result.counts["synthesis"]["stop_reasons"].values()) == 2
    assert [note for note in result.notes if note.startswith("rtf = ")] == [rtf_note(synthesis)]
    assert rtf_note(synthesis).endswith(f"; on {cpu_name()}")
    assert rtf_note([{"processor": "A"}, {"processor": "B"}, {"processor": "A"}, {}]).endswith("; on A (2 rows), B (1 rows)")
    assert json.loads((tmp_path / "results.json").read_text())["config"]["prompts"] == "none"
    assert (tmp_path / "figure.png").is_file()


def test_seeds_repeat_and_differ(kalle: Kalle, items: list[TestItem], tmp_path: Path) -> None:
    config = SpeakingConfig(seeds=(1, 2))
    first, again = (
        evaluate_synthesis(kalle, items[:1], [DurationRatio()], tmp_path / name, config=config, settings=QUICK) for name in "ab"
    )
    rows = [row for row in first.rows if row["system"] == "synthesis"]
    assert [row["wav"] for row in rows] == ["wavs/synthesis/a_0.seed1.wav", "wavs/synthesis/a_0.seed2.wav"]
    one, two = ((tmp_path / "a" / row["wav"]).read_bytes() for row in rows)
    assert one != two
    assert one == (tmp_path / "b" / again.rows[1]["wav"]).read_bytes()


def test_stop_reasons_early_stops_and_empty_speech(
    kalle: Kalle, items: list[TestItem], transcriber: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transcriber.known[12800] = items[0].text
    spoken = iter([speech_of(12800), speech_of(32000, "max_frames"), speech_of(0)])
    monkeypatch.setattr(Kalle, "synthesize", lambda self, text, voice, **options: next(spoken))
    result = evaluate_synthesis(kalle, items, [WER(transcriber, ["seed_tts"]), DurationRatio()], tmp_path, settings=QUICK)
    assert result.counts["synthesis"]["stop_reasons"] == {"end": 2, "max_frames": 1}
    assert result.value("synthesis", "no_end_rate") == pytest.approx(1 / 3)
    assert result.value("synthesis", "early_stop_rate") == pytest.approx(1 / 3)  # 0.8 s of 1.6 s is not early, 0 s is
    silent = result.rows[-1]
    assert (silent["wav"], silent["wer"], silent["duration_ratio"]) == (None, 1.0, 0.0)


def test_prompts_of_the_speaker_are_other_utterances(
    kalle: Kalle, items: list[TestItem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[tuple[int, str]] = []
    embedder = Lengths()
    original = Kalle.voice

    def voice(self: Kalle, audio: Audio, text: str) -> Voice:
        prompts.append((len(audio), text))
        return original(self, audio, text)

    monkeypatch.setattr(Kalle, "voice", voice)
    metrics = [Similarity(embedder=embedder)]
    evaluate_synthesis(kalle, items, metrics, tmp_path, config=SpeakingConfig("speaker"), settings=QUICK)
    lengths = [len(item.audio()) for item in items]
    assert prompts == [(lengths[1], items[1].text), (lengths[2], items[2].text), (lengths[0], items[0].text)]
    assert embedder.seen[0] == lengths[1]  # SIM is to the prompt
    assert embedder.seen[1] == lengths[0]  # first of the recording itself


def test_list_prompts_and_a_missing_one_is_counted(kalle: Kalle, items: list[TestItem], tmp_path: Path) -> None:
    prompted = dataclasses.replace(items[0], prompt_path=items[1].audio_path, prompt_text=items[1].text)
    gone = dataclasses.replace(items[1], prompt_path=tmp_path / "gone.wav", prompt_text="something")
    result = evaluate_synthesis(kalle, [prompted, gone], [DurationRatio()], tmp_path / "out", config=SpeakingConfig("list"), settings=QUICK)
    assert result.counts["synthesis"]["errors"] == 1
    assert result.summary["synthesis"]["duration_ratio"].count == 1


def failed_seeds(result: Result) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for row in result.rows:
        if row["system"] == "synthesis" and "error" in row:
            found.setdefault(row["id"], []).append(row["seed"])
    return found


def test_a_seed_that_fails_costs_itself_alone(kalle: Kalle, items: list[TestItem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, plain = item_seed(2, 0), Kalle.synthesize

    def refusing(self: Kalle, text: str, voice: Voice | None = None, *, options: GenerationOptions) -> Speech:
        if options.seed == bad:
            raise UserError("no room: got one word too many, expected fewer; shorten the text")
        return plain(self, text, voice, options=options)

    monkeypatch.setattr(Kalle, "synthesize", refusing)
    config = SpeakingConfig(seeds=(1, 2, 3))
    result = evaluate_synthesis(kalle, items[:2], [DurationRatio()], tmp_path, config=config, settings=QUICK)
    assert failed_seeds(result) == {items[0].id: [2]}
    assert [row["seed"] for row in result.rows if row["system"] == "synthesis"] == [1, 2, 3, 1, 2, 3]
    assert (result.counts["synthesis"]["items"], result.counts["synthesis"]["seeds"], result.errors) == (2, 3, 1)
    assert read_run(tmp_path).failed_seeds() == [items[0].id]
    assert "1 of 6 syntheses (2 items, 3 seeds) could not be scored" in verdict(result)


def test_a_voice_that_fails_costs_every_seed(kalle: Kalle, items: list[TestItem], tmp_path: Path) -> None:
    prompted = dataclasses.replace(items[0], prompt_path=items[1].audio_path, prompt_text=items[1].text)
    gone = dataclasses.replace(items[1], prompt_path=tmp_path / "gone.wav", prompt_text="something")
    config = SpeakingConfig("list", seeds=(4, 5))
    result = evaluate_synthesis(kalle, [prompted, gone], [DurationRatio()], tmp_path / "out", config=config, settings=QUICK)
    assert failed_seeds(result) == {items[1].id: [4, 5]}
    assert result.counts["synthesis"]["errors"] == 2
    assert read_run(tmp_path / "out").failed() == [items[1].id]


def test_bad_choices(kalle: Kalle, items: list[TestItem], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected one of none, list, speaker"):
        SpeakingConfig("some")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="seeds"):
        SpeakingConfig(seeds=(1, 1))
    voice = kalle.voice(items[0].audio(), items[0].text)
    with pytest.raises(UserError, match="prompts=none with a voice"):
        evaluate_synthesis(kalle, items, [DurationRatio()], tmp_path, config=SpeakingConfig("speaker"), voice=voice)


def test_other_recordings_stay_with_the_speaker() -> None:
    def item(name: str, speaker: str | None, audio: bool = True) -> TestItem:
        return TestItem(name, "text", Path(name) if audio else None, speaker)

    items = [item("a", "one"), item("b", "two"), item("c", "one"), item("d", None), item("e", "one", audio=False)]
    assert [other.id if other else None for other in other_recordings(items)] == ["c", None, "a", None, "a"]


def test_wavs_are_rescored_without_a_model(items: list[TestItem], transcriber: object, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    for item in items[:2]:
        assert item.audio_path is not None
        (folder / f"{item.file_stem}.wav").write_bytes(item.audio_path.read_bytes())
    metrics = [WER(transcriber, ["seed_tts"]), MelDistance()]  # type: ignore[arg-type]
    result = evaluate_wavs(folder, items, metrics, tmp_path / "out", aligned=True, settings=QUICK)
    assert result.value("wavs", "wer_utt_mean") == 0
    assert result.value("wavs", "mel_l1") == 0
    assert result.counts["wavs"]["errors"] == 1
    assert "a_2.wav" in next(row["error"] for row in result.rows if "error" in row)
    shown = terminal_report(result)
    assert max(map(len, shown.splitlines())) <= 80
    assert "|" not in shown
    (row,) = [line for line in shown.splitlines() if line.startswith("wer_corpus")]
    assert row.endswith("lower is better")
    assert "wavs: 0.0% of the words were not understood, against 0.0% of the recordings; 1 of 3 items could not be scored." in " ".join(
        shown.split()
    )
    unaligned = evaluate_wavs(folder, items, metrics, tmp_path / "out2", settings=QUICK)
    assert unaligned.value("wavs", "mel_l1") is None


def test_wavs_that_are_not_there(items: list[TestItem], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="folder of wavs not found"):
        evaluate_wavs(tmp_path / "nowhere", items, [MelDistance()], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"got none of 3.*a_0\.wav"):
        evaluate_wavs(tmp_path / "empty", items, [MelDistance()], tmp_path / "out")
    with pytest.raises(UserError, match="the list is empty"):
        evaluate_wavs(tmp_path / "empty", [], [MelDistance()], tmp_path / "out")
    assert not (tmp_path / "out").exists()

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from kalle.audio import read_audio, resample, write_audio
from kalle.errors import UserError
from kalle.evaluation import ScoreItem, Settings, evaluate_reconstruction, evaluate_wavs
from kalle.evaluation.metrics import Aggregate, DurationRatio, MelDistance
from kalle.evaluation.test_list import TestItem
from kalle.evaluation.word_errors import WER
from kalle.gaussian import DiagGaussian
from kalle.models.flowvae import FlowVAE

QUICK = Settings(resamples=50, figure_items=0)


class Broken:
    """A metric that gives what must not reach a summary."""

    name = "broken"
    needs = frozenset({"aligned"})
    aggregates = (Aggregate("broken", "broken"),)

    def __call__(self, item: ScoreItem) -> dict[str, float]:
        return {"broken": float("nan")}

    def describe(self) -> dict[str, object]:
        return {}


def test_rows_summary_and_files(flowvae: FlowVAE, items: list[TestItem], transcriber: object, tmp_path: Path) -> None:
    metrics = [WER(transcriber, ["seed_tts"]), MelDistance(), DurationRatio()]  # type: ignore[arg-type]
    result = evaluate_reconstruction(
        flowvae, items, metrics, tmp_path / "out", sample=True, settings=Settings(resamples=50, figure_items=1)
    )
    assert result.value("recording", "wer_utt_mean") == 0
    assert result.value("recording", "mel_l1") is None
    assert result.value("reconstruction", "mel_l1") != result.value("reconstruction_sample", "mel_l1")
    assert [row["system"] for row in result.rows[:3]] == ["recording", "reconstruction", "reconstruction_sample"]
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored["summary"]["reconstruction"]["mel_l1"]["value"] == result.value("reconstruction", "mel_l1")
    assert len(stored["summary"]["reconstruction"]["mel_l1"]["interval"]) == 2
    assert stored["versions"]["torch"] == torch.__version__.split("+")[0] or stored["versions"]["torch"] == torch.__version__
    assert stored["extra"]["latent_health"]["items"] == 3
    lines = (tmp_path / "out" / "items.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == stored["rows"]
    assert "| reconstruction | 3 | 0 |" in (tmp_path / "out" / "report.md").read_text()
    assert (tmp_path / "out" / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_the_mean_is_decoded_and_written(flowvae: FlowVAE, items: list[TestItem], tmp_path: Path) -> None:
    result = evaluate_reconstruction(flowvae, items[:1], [MelDistance()], tmp_path, settings=QUICK)
    wav = torch.from_numpy(items[0].audio())[None]
    with torch.no_grad():
        expected = flowvae.decode(flowvae.encode(wav).mean)[0]
    written = read_audio(tmp_path / result.rows[1]["wav"])
    assert result.rows[1]["wav"] == "wavs/reconstruction/a_0.wav"
    torch.testing.assert_close(torch.from_numpy(written), expected, atol=1e-4, rtol=0)


def test_a_perfect_codec_has_distance_zero(
    flowvae: FlowVAE, items: list[TestItem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(self: FlowVAE, wav: torch.Tensor) -> DiagGaussian:
        samples = wav[:, : wav.shape[1] // 1280 * 1280].reshape(1, -1, 1280)
        return DiagGaussian(samples, torch.zeros_like(samples))

    monkeypatch.setattr(FlowVAE, "encode", encode)
    monkeypatch.setattr(FlowVAE, "decode", lambda self, z: z.flatten(1))
    monkeypatch.setattr(FlowVAE, "to_prior", lambda self, z: z)
    assert evaluate_reconstruction(flowvae, items, [MelDistance()], tmp_path, settings=QUICK).value("reconstruction", "mel_l1") == 0


def test_same_seed_same_rows_and_an_item_does_not_depend_on_the_others(flowvae: FlowVAE, items: list[TestItem], tmp_path: Path) -> None:
    def sampled(name: str, chosen: list[TestItem], seed: int) -> list[float]:
        result = evaluate_reconstruction(flowvae, chosen, [MelDistance()], tmp_path / name, sample=True, seed=seed, settings=QUICK)
        return [row["mel_l1"] for row in result.rows if row["system"] == "reconstruction_sample"]

    first = sampled("a", items[:2], 1)
    assert first == sampled("b", items[:2], 1)
    assert first[:1] == sampled("c", items[:1], 1)
    assert first[:1] != sampled("d", items[:1], 2)


def test_a_missing_recording_is_counted_and_the_rest_scored(flowvae: FlowVAE, items: list[TestItem], tmp_path: Path) -> None:
    gone = dataclasses.replace(items[1], audio_path=tmp_path / "gone.wav")
    result = evaluate_reconstruction(flowvae, [items[0], gone, items[2]], [MelDistance()], tmp_path / "out", settings=QUICK)
    assert result.errors == 1
    assert result.counts["reconstruction"] == {"items": 3, "seeds": 1, "errors": 1, "metric_errors": {}}
    assert result.summary["reconstruction"]["mel_l1"].count == 2
    assert "gone.wav" in next(row["error"] for row in result.rows if "error" in row)
    assert "(n=2)" in (tmp_path / "out" / "report.md").read_text()


def test_a_metric_that_is_not_finite_is_an_error(flowvae: FlowVAE, items: list[TestItem], tmp_path: Path) -> None:
    result = evaluate_reconstruction(flowvae, items, [Broken(), MelDistance()], tmp_path, settings=QUICK)
    assert result.counts["reconstruction"]["metric_errors"] == {"broken": 3}
    assert result.value("reconstruction", "broken") is None
    assert any("broken failed on every item" in note for note in result.notes)


def test_nothing_to_score_leaves_nothing(flowvae: FlowVAE, items: list[TestItem], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="the list is empty"):
        evaluate_reconstruction(flowvae, [], [MelDistance()], out)
    with pytest.raises(UserError, match="got no metric"):
        evaluate_reconstruction(flowvae, items, [], out)
    with pytest.raises(UserError, match=r"1 of 1 items failed.*no recording"):
        evaluate_reconstruction(flowvae, [TestItem("x", "text only")], [MelDistance()], out)
    assert not out.exists()


def test_the_report_says_at_which_rate_recordings_are_stored(
    flowvae: FlowVAE, items: list[TestItem], transcriber: object, tmp_path: Path
) -> None:
    """A telephone's 8 kHz holds nothing for metrics that hear 16, whatever it is resampled to."""
    narrow = []
    for item in items:
        path = tmp_path / "narrow" / f"{item.file_stem}.wav"
        write_audio(path, resample(item.audio(), 16000, 8000), 8000)
        narrow.append(dataclasses.replace(item, audio_path=path))
    metrics = [WER(transcriber, ["seed_tts"])]  # type: ignore[arg-type]
    result = evaluate_reconstruction(flowvae, narrow, metrics, tmp_path / "out", settings=QUICK)
    assert {(row["system"], row["rate_hz"]) for row in result.rows} == {("recording", 8000), ("reconstruction", 16000)}
    folder = evaluate_wavs(tmp_path / "narrow", narrow, metrics, tmp_path / "wavs", settings=QUICK)
    assert {(row["system"], row["rate_hz"]) for row in folder.rows} == {("recording", 8000), ("wavs", 8000)}
    for notes in (result.notes, folder.notes):
        assert "recording: the audio of 3 of 3 items is stored at less than the 16000 Hz of wer_utt_mean, wer_corpus" in notes


def test_recordings_can_be_left_out(flowvae: FlowVAE, items: list[TestItem], tmp_path: Path) -> None:
    settings = dataclasses.replace(QUICK, score_recordings=False)
    result = evaluate_reconstruction(flowvae, items, [MelDistance()], tmp_path, settings=settings)
    assert set(result.summary) == {"reconstruction"}
    assert not (tmp_path / "figure.png").exists()

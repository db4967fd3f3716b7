from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kalle.checkpoint import read_json, weights_hash, write_json
from kalle.cli.calibrate import calibration_lines
from kalle.cli.main import main
from kalle.data.latents.shards import LatentRecord, ShardFolder
from kalle.errors import UserError
from kalle.evaluation.calibration import (
    ConfidenceCalibration,
    EndScores,
    batches_of,
    calibrate,
    calibrate_confidence,
    end_scores,
    held_out,
    rates_at,
    speak_freely,
)
from kalle.gaussian import DiagGaussian
from kalle.models.lm_batch import LMBatch
from kalle.synthesis.generate import Request
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.options import StopRule
from kalle.synthesis.speech import Speech
from kalle.synthesis.weights import StoredConfidence, read_weight_folder, write_confidence

TEXTS = ("one", "two words", "three whole words", "four")
FRAMES = (6, 9, 7, 12)
KL = st.floats(0, 5, allow_nan=False)
SCORES = st.lists(st.tuples(st.lists(KL, min_size=1, max_size=8), KL), min_size=1, max_size=8).map(
    lambda rows: EndScores(tuple(np.array(inside) for inside, _ in rows), np.array([end for _, end in rows]))
)


def scores(*rows: tuple[list[float], float]) -> EndScores:
    return EndScores(tuple(np.array(inside, dtype=np.float64) for inside, _ in rows), np.array([end for _, end in rows]))


@given(SCORES, KL, st.integers(-1, 4))
def test_the_rates_are_what_the_stop_rule_does(found: EndScores, threshold: float, min_index: int) -> None:
    rule = StopRule(threshold, min_index)
    false = [any(rule.stops(kl, index) for index, kl in enumerate(inside)) for inside in found.inside]
    missed = [not rule.stops(end, len(inside)) for inside, end in zip(found.inside, found.at_end, strict=True)]
    rates = rates_at(found, threshold, min_index)
    assert rates.false_stop == pytest.approx(np.mean(false))
    assert rates.missed_stop == pytest.approx(np.mean(missed))


@settings(max_examples=200)
@given(SCORES, st.integers(-1, 2))
def test_no_threshold_is_better_than_the_chosen_one(found: EndScores, min_index: int) -> None:
    if all(len(inside) <= min_index for inside in found.inside):
        with pytest.raises(UserError, match="no utterance is longer than"):
            calibrate(found, min_index)
        return
    chosen = calibrate(found, min_index)
    assert chosen.rates.threshold > 0
    assert chosen.rates == rates_at(found, chosen.rates.threshold, min_index)
    values = np.concatenate([*found.inside, found.at_end])
    candidates = np.concatenate([values, values + 1e-9, [1e-3, 100.0]])
    best = min(rates_at(found, float(value), min_index).total for value in candidates if value >= 1e-3)
    assert chosen.rates.total <= best + 1e-9


def test_the_threshold_lies_in_the_middle_of_the_valley() -> None:
    chosen = calibrate(scores(([9, 9, 9, 9, 0.9], 0.01), ([9, 9, 9, 9, 1.6, 2.0], 0.04)))
    assert chosen.rates.threshold == pytest.approx(np.sqrt(0.04 * 0.9), rel=1e-3)
    assert (chosen.rates.false_stop, chosen.rates.missed_stop, chosen.separates) == (0, 0, True)
    assert "warning" not in "\n".join(calibration_lines(chosen))


def test_of_two_valleys_the_wider_is_taken() -> None:
    inside, ends = [0.2] + [4.0] * 9, [0.1] * 5 + [0.3] + [1.0] * 4
    found = scores(*[([9, 9, 9, 9, low], end) for low, end in zip(inside, ends, strict=True)])
    assert calibrate(found).rates.threshold == pytest.approx(2.0)


def test_guarded_frames_cannot_stop_and_ends_too_early_are_missed() -> None:
    found = scores(([0.001, 9, 9, 9, 3.0], 0.1), ([9, 9], 0.1))
    assert rates_at(found, 0.5).total == rates_at(found, 1.0).total
    assert (rates_at(found, 0.5).false_stop, rates_at(found, 0.5).missed_stop) == (0.0, 0.5)
    assert rates_at(found, 0.5, min_index=-1).false_stop == 0.5


def test_a_hopeless_model_is_told() -> None:
    chosen = calibrate(scores(*[([9, 9, 9, 9, 0.5], 1.0 + i / 10) for i in range(10)]))
    assert not chosen.separates
    assert "warning: no threshold separates the ends from the rest" in calibration_lines(chosen)[-1]


class Scripted(torch.nn.Module):
    """Predicts the end distribution behind the last frame, and something else inside, whatever it reads."""

    device = torch.device("cpu")

    def forward(self, batch: LMBatch) -> DiagGaussian:
        rows, frames = batch.latents.shape[:2]
        prediction = DiagGaussian.standard(torch.zeros(rows, frames + 1, 3))
        for row, length in enumerate(batch.latent_lengths):
            prediction.mean[row, length] = prediction.log_std[row, length] = 1.0
            prediction.mean[row, length + 1 :] = float("nan")
        return prediction


def test_positions_are_read_where_the_utterance_ends_and_padding_nowhere() -> None:
    batch = LMBatch(torch.zeros(3, 2).long(), torch.tensor([2, 2, 2]), torch.zeros(3, 7, 3), torch.tensor([7, 4, 1]))
    found = end_scores(Scripted(), [batch, batch])
    assert [len(inside) for inside in found.inside] == [7, 4, 1] * 2
    np.testing.assert_allclose(found.at_end, 0, atol=1e-6)
    np.testing.assert_allclose(np.concatenate(found.inside), 0.6353, atol=1e-3)


def test_nan_is_refused() -> None:
    class Broken(Scripted):
        def forward(self, batch: LMBatch) -> DiagGaussian:
            prediction = super().forward(batch)
            prediction.mean[1, 2] = float("nan")
            return prediction

    batch = LMBatch(torch.zeros(3, 2).long(), torch.tensor([2, 2, 2]), torch.zeros(3, 7, 3), torch.tensor([7, 4, 1]))
    with pytest.raises(UserError, match="predicts NaN or infinity"):
        end_scores(Broken(), [batch])


@pytest.fixture
def model(tmp_path: Path, kalle: Kalle) -> Path:
    folder = tmp_path / "model"
    kalle.flowvae.save_pretrained(folder)
    kalle.lm.save_pretrained(folder)
    kalle.tokenizer.save(folder / "tokenizer")
    write_json(folder / "config.json", {"format_version": 1, "language": "en"})
    return folder


@pytest.fixture
def latents(tmp_path: Path, kalle: Kalle) -> Path:
    """A latent folder with one split of four utterances and one that is empty."""
    root, generator = tmp_path / "latents", np.random.default_rng(0)
    arrays = [generator.standard_normal((frames, 16)).astype(np.float16) for frames in FRAMES]
    for array in arrays:
        array[-1, :8] = 4.0  # a last frame that a model can know
    rows = [
        LatentRecord(f"u{i}", text, "ann", "en", (f"u{i}",), frames * 1280, 16000, array)
        for i, (text, frames, array) in enumerate(zip(TEXTS, FRAMES, arrays, strict=True))
    ]
    root.mkdir()
    ShardFolder(root, "valid").write(0, rows, "x", {})
    (root / "empty").mkdir()
    info = {"encoder_hash": weights_hash(kalle.flowvae.encoder), "speaker_mels": False, "splits": {"valid": {}, "empty": {}}}
    write_json(root / "info.json", info)
    (root / ".completed").touch()
    return root


def test_batches_hold_every_utterance_once_with_its_own_latents(model: Path, latents: Path, kalle: Kalle) -> None:
    dataset = held_out(model, kalle.lm, latents)
    together = [batch() for batch in batches_of(dataset, 10_000)]
    alone = [batch() for batch in batches_of(dataset, 1)]
    assert sorted(name for batch in together for name in batch.cut_ids) == [f"u{i}" for i in range(4)]
    assert [len(batch.cut_ids) for batch in alone] == [1] * 4
    ends = [
        dict(zip((name for batch in batches for name in batch.cut_ids), end_scores(kalle.lm, batches).at_end, strict=True))
        for batches in (together, alone)
    ]
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)
    assert len(set(ends[0].values())) == 4


@pytest.fixture
def taught(model: Path, latents: Path, kalle: Kalle) -> Path:
    """The weight folder, with a language model that has learnt where these utterances end."""
    lm = copy.deepcopy(kalle.lm)
    batches = [batch() for batch in batches_of(held_out(model, lm, latents), 10_000)]
    optimizer = torch.optim.Adam(lm.parameters(), lr=0.01)
    for batch in 25 * batches:
        prediction, lengths = lm(batch), batch.latent_lengths
        at_end = prediction[torch.arange(len(lengths)), lengths]
        inside = prediction[:, : int(lengths.min())]
        loss = at_end.kl_to(DiagGaussian.end(at_end.mean)).mean() + inside.kl_to(DiagGaussian.standard(inside.mean)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    lm.save_pretrained(model)
    return model


def run(model: Path, latents: Path, *options: str) -> int:
    return main(["calibrate", str(model), "--latents", str(latents), *options])


def test_a_rule_that_is_no_better_than_none_is_not_stored(model: Path, latents: Path, capsys) -> None:
    before = (model / "config.json").read_bytes()
    assert run(model, latents) == 2
    printed = capsys.readouterr()
    assert "<- chosen" in printed.out
    assert "no stop rule was stored: got 0.0% false and 100.0% missed stops" in printed.err
    assert (model / "config.json").read_bytes() == before
    assert calibrate(scores(*[([9, 9, 9, 9, 9], 1.0)] * 9, ([9, 9, 9, 9, 0.5], 1.0))).usable


def test_the_command_prints_a_table_and_stores_the_rule(taught: Path, latents: Path, tmp_path: Path, capsys) -> None:
    model = taught
    assert run(model, latents, "--plot", str(tmp_path / "a.png"), "--free-running", "2", "--min-index", "2") == 0
    out = capsys.readouterr().out
    stored = read_json(model / "config.json")
    assert stored["language"] == "en"
    assert stored["stop"]["utterances"] == 4
    assert stored["stop"]["min_index"] == 2
    assert read_weight_folder(model).stop == StopRule(stored["stop"]["threshold"], 2)
    assert f"threshold {stored['stop']['threshold']:.4g} nats per dimension, above frame index 2" in out
    assert "<- chosen" in out
    assert "of 2 texts did not end by themselves" in out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_dry_run_stores_nothing(model: Path, latents: Path, capsys) -> None:
    before = (model / "config.json").read_bytes()
    assert run(model, latents, "--dry-run") == 0
    assert (model / "config.json").read_bytes() == before
    assert "stored" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "test"], "no split 'test'"),
        (["--split", "empty"], "no utterances left in the split 'empty'"),
        (["--plot", "a.xyz"], "unknown image format"),
    ],
)
def test_bad_options(model: Path, latents: Path, capsys, options: list[str], message: str) -> None:
    assert run(model, latents, *options) == 2
    assert message in capsys.readouterr().err
    assert "stop" not in read_json(model / "config.json")


def test_bad_folders(model: Path, latents: Path, tmp_path: Path, capsys) -> None:
    assert run(model, tmp_path / "none") == 2
    assert "not a complete latent folder" in capsys.readouterr().err
    write_json(latents / "info.json", read_json(latents / "info.json") | {"encoder_hash": "0" * 64})
    assert run(model, latents) == 2
    assert "come from another Flow-VAE: got encoder 000000000000" in capsys.readouterr().err
    assert run(tmp_path / "none", latents) == 2
    assert "no such weight folder" in capsys.readouterr().err


def test_free_running_counts_the_endings(kalle: Kalle) -> None:
    never = speak_freely(kalle, ["a", "b"], [10, 10], StopRule(0.0))
    assert (never.no_end_rate, never.stop_reasons) == (1.0, {"max_frames": 2})
    assert never.duration_ratio == pytest.approx(kalle.synthesize("a", seed=0, stop=StopRule(0.0)).frames / 10)
    always = speak_freely(kalle, ["a", "b"], [10, 10], StopRule(1e9))
    assert (always.no_end_rate, always.duration_ratio) == (0.0, 0.4)


def test_the_confidence_of_speech_is_measured_against_that_of_random_ids(kalle: Kalle, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def spoken(lm: object, flowvae: object, request: Request) -> Speech:
        asked.append(request.text_ids)
        confidence = 0.75 + 0.01 * (len(asked) % 4) if len(asked) % 2 else 0.5
        log_std = np.full((3, 16), np.log(1 / confidence - 1), np.float32)
        return Speech(np.zeros(3, np.float32), 16000, "end", 0, log_std, log_std, log_std[:, 0], 9)

    monkeypatch.setattr("kalle.evaluation.calibration.speak", spoken)
    found = calibrate_confidence(kalle, TEXTS)
    assert len(asked) == 2 * len(TEXTS)
    for good, bad in zip(asked[::2], asked[1::2], strict=True):
        assert len(good) == len(bad)
        assert torch.equal(good[[0, -2, -1]], bad[[0, -2, -1]]), "only the words differ"
        assert not torch.equal(good, bad)
    stored = found.to_stored()
    assert (stored.detected_rate, stored.false_alarm_rate, stored.utterances) == (1.0, 0.0, len(TEXTS))
    assert 0.5 < stored.low < 0.75 < stored.usual < 0.8
    assert found.separates
    assert not ConfidenceCalibration(found.good, found.good, 1.0).separates


def test_a_stored_confidence_is_what_doubtful_speech_is_known_by(model: Path) -> None:
    write_confidence(model, StoredConfidence(low=0.999, temperature=1.0))
    loaded = Kalle.from_pretrained(model, "cpu")
    assert loaded.config.confidence == StoredConfidence(low=0.999, temperature=1.0)
    options = {"seed": 1, "max_seconds": 0.4, "stop": StopRule(0.0)}
    assert loaded.synthesize("Hi.", **options).doubtful
    assert not loaded.synthesize("Hi.", temperature=0.5, **options).doubtful, "it was not measured at this temperature"

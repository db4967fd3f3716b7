"""The stop threshold of a checkpoint, chosen on held-out speech: how near to the end distribution predictions come inside an
utterance, and how near at its end."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from kalle.checkpoint import weights_hash
from kalle.errors import UserError
from kalle.evaluation.figures import new_figure, save_figure
from kalle.extras import install_command
from kalle.gaussian import DiagGaussian
from kalle.models.flowvae import FlowVAE
from kalle.models.lm import KalleLM
from kalle.models.lm_batch import LMBatch
from kalle.seeds import purpose_seed
from kalle.synthesis.generate import Request
from kalle.synthesis.options import SpeechRequest, StopRule
from kalle.synthesis.speech import speak
from kalle.synthesis.weights import StoredConfidence, StoredStop, load_tokenizer
from kalle.text.tokenizer import BEFORE_SPEECH

if TYPE_CHECKING:
    from kalle.data.loading.datasets import LatentDataset
    from kalle.synthesis.kalle import Kalle

FloatArray = NDArray[np.float64]
TABLE_THRESHOLDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
DEFAULT_MAX_POSITIONS = 4000
SPREADS = 4.0
SEPARATED = 0.1
"""The two rates together stay below this where the model knows its ends."""
_FLOOR = 1e-4
"""Nats per dimension; lower values are not told apart."""
_OUTSIDE = 2.0
"""A threshold with all values on one side lies beyond them by this factor."""


@dataclass(frozen=True)
class EndScores:
    """Teacher-forced divergence from the end distribution, nats per dimension, of N utterances."""

    inside: tuple[FloatArray, ...]
    """For each utterance (T,): at the position that predicts frame 0, 1, …"""
    at_end: FloatArray
    """(N,): at the position behind the last frame."""

    def __post_init__(self) -> None:
        assert len(self.inside) == len(self.at_end) > 0, (len(self.inside), len(self.at_end))

    def lowest_inside(self, min_index: int) -> FloatArray:
        """(N,): the lowest value at a frame above ``min_index``, infinite where there is none."""
        return np.array([values[min_index + 1 :].min(initial=np.inf) for values in self.inside])

    def reachable_ends(self, min_index: int) -> FloatArray:
        """(N,): the value at the end, infinite where the end comes too early for ``min_index``."""
        indices = np.array([len(values) for values in self.inside])
        return np.where(indices > min_index, self.at_end, np.inf)


@dataclass(frozen=True)
class Rates:
    """Rates of wrong decisions of one threshold on the held-out utterances."""

    threshold: float
    false_stop: float
    """Share of utterances that some position inside would have cut."""
    missed_stop: float
    """Share of utterances whose end would have been passed."""

    @property
    def total(self) -> float:
        """Both together: what calibration minimises."""
        return self.false_stop + self.missed_stop


@dataclass(frozen=True)
class Calibration:
    """The chosen threshold and what it was chosen from."""

    rates: Rates
    min_index: int
    utterances: int
    table: tuple[Rates, ...]
    """The chosen threshold among some round ones."""

    @property
    def separates(self) -> bool:
        """Whether the ends can be told from the rest by a threshold, but for a few utterances."""
        return self.rates.total < SEPARATED

    @property
    def usable(self) -> bool:
        """Whether the rule beats having none: never to stop misses every end, so its total is 1."""
        return self.rates.total < 1

    def to_stored(self) -> StoredStop:
        """The form that a weight folder keeps."""
        rates = self.rates
        return StoredStop(rates.threshold, self.min_index, rates.false_stop, rates.missed_stop, self.utterances)


def rates_at(scores: EndScores, threshold: float, min_index: int = StopRule().min_index) -> Rates:
    """The rates of one threshold, under the rule of ``StopRule.stops``."""
    false_stop = float((scores.lowest_inside(min_index) < threshold).mean())
    missed_stop = float((scores.reachable_ends(min_index) >= threshold).mean())
    return Rates(threshold, false_stop, missed_stop)


def calibrate(scores: EndScores, min_index: int = StopRule().min_index) -> Calibration:
    """Choose the threshold with the smallest sum of both rates.

    The sum is constant between two neighbouring values of the scores. Of all stretches with the smallest sum the widest, as a ratio,
    is taken, and the geometric mean of its two ends: as far from a false stop as from a missed one. Rounded to four digits.
    """
    lowest, ends = scores.lowest_inside(min_index), scores.reachable_ends(min_index)
    values = np.unique(np.concatenate([lowest, ends]).clip(min=_FLOOR))
    values = values[np.isfinite(values)]
    if not len(values):
        raise UserError(f"no utterance is longer than {min_index} frames: expected some to calibrate on; use longer speech")
    edges = np.concatenate([[values[0] / _OUTSIDE**2], values, [values[-1] * _OUTSIDE**2]])
    # Between edges i and i + 1: what is at or below edge i stops, what is at or above edge i + 1 does not.
    false_stops = np.searchsorted(np.sort(lowest), edges[:-1], side="right")
    missed = len(ends) - np.searchsorted(np.sort(ends), edges[:-1], side="right")
    low, high = max(_stretches(false_stops + missed), key=lambda stretch: edges[stretch[1]] / edges[stretch[0]])
    threshold = _rounded(math.sqrt(edges[low] * edges[high]), edges[low], edges[high])
    table = tuple(rates_at(scores, candidate, min_index) for candidate in sorted({*TABLE_THRESHOLDS, threshold}))
    return Calibration(rates_at(scores, threshold, min_index), min_index, len(ends), table)


def _stretches(errors: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """First and last edge of every run of intervals with the fewest errors."""
    best = np.concatenate([[False], errors == errors.min(), [False]]).astype(np.int8)
    steps = np.diff(best)
    yield from zip(np.flatnonzero(steps == 1).tolist(), np.flatnonzero(steps == -1).tolist(), strict=True)


def _rounded(value: float, low: float, high: float) -> float:
    rounded = float(f"{value:.4g}")
    return rounded if low < rounded <= high else value


@torch.no_grad()
def end_scores(lm: KalleLM, batches: Iterable[LMBatch]) -> EndScores:
    """One teacher-forced pass over ``batches``. UserError when a prediction isn't a number."""
    inside: list[FloatArray] = []
    at_end: list[float] = []
    for batch in batches:
        prediction = lm(batch.to(lm.device))
        divergence = prediction.kl_to(DiagGaussian.end(prediction.mean)).mean(dim=-1).double().cpu().numpy()
        for row, length in zip(divergence, batch.latent_lengths.tolist(), strict=True):
            inside.append(row[:length])
            at_end.append(float(row[length]))
    if not all(np.isfinite(values).all() for values in (*inside, np.array(at_end))):
        raise UserError(
            "the language model predicts NaN or infinity on this speech: expected numbers; check the weights, or compute in float32"
        )
    return EndScores(tuple(inside), np.array(at_end))


def held_out(model: str | Path, lm: KalleLM, latents: str | Path, split: str = "valid", seed: int = 0) -> LatentDataset:
    """The utterances of ``split`` in the latent folder ``latents``, with the tokenizer of the weight folder ``model``.

    Latents are drawn with noise that depends on ``seed`` and the utterance only. UserError for an incomplete folder, an unknown or
    empty split, and latents of another Flow-VAE.
    """
    try:
        from kalle.data.latents.shards import read_info
        from kalle.data.loading.datasets import LatentDataset, SpeakerConfig
    except ModuleNotFoundError as error:
        raise UserError(f"reading latents needs {error.name}, which is not installed: run {install_command('train')}") from None
    theirs, ours = read_info(latents)["encoder_hash"], weights_hash(FlowVAE.from_pretrained(model).encoder)
    if theirs != ours:
        raise UserError(
            f"the latents in '{latents}' come from another Flow-VAE: got encoder {theirs[:12]}, expected {ours[:12]} as in '{model}'; "
            f"run `kalle encode flowvae={model} …` into a new folder"
        )
    speaker = None if lm.speaker_encoder is None else SpeakerConfig()
    return LatentDataset(latents, split, load_tokenizer(model), seed=seed, speaker=speaker)


def batches_of(dataset: LatentDataset, max_positions: int = DEFAULT_MAX_POSITIONS) -> list[Callable[[], LMBatch]]:
    """Every utterance of ``dataset`` once, in batches of at most ``max_positions`` positions where no single one is longer."""
    from kalle.data.loading.samplers import BudgetBatchSampler, Sample

    texts, audio = dataset.text_lengths, dataset.audio_lengths
    plan = BudgetBatchSampler(texts, audio, max_positions=max(max_positions, int((texts + audio).max())), shuffle=False)

    def load(indices: Sequence[int]) -> Callable[[], LMBatch]:
        return lambda: dataset[[Sample(epoch=0, item=index) for index in indices]]

    return [load(indices) for indices in plan(0)]


@dataclass(frozen=True)
class FreeRunning:
    """Endings and lengths of texts that were spoken freely with a stop rule."""

    stop_reasons: Counter[str]
    duration_ratio: float
    """Median of generated over recorded length."""

    @property
    def no_end_rate(self) -> float:
        """Share that did not end by itself."""
        return 1 - self.stop_reasons["end"] / self.stop_reasons.total()


def speak_freely(kalle: Kalle, texts: Sequence[str], frames: Sequence[int], stop: StopRule) -> FreeRunning:
    """Speak each of ``texts`` once, without retries, with its index as the seed; ``frames`` are the recorded lengths."""
    assert len(texts) == len(frames) > 0, (len(texts), len(frames))
    speeches = [kalle.synthesize(text, seed=seed, stop=stop, retries=0) for seed, text in enumerate(texts)]
    ratios = [speech.frames / recorded for speech, recorded in zip(speeches, frames, strict=True)]
    return FreeRunning(Counter(speech.stop_reason for speech in speeches), float(np.median(ratios)))


@dataclass(frozen=True)
class ConfidenceCalibration:
    """How sure the model is of texts that it knows how to speak, and of such that it cannot."""

    good: NDArray[np.float64]
    """Confidence of each text."""
    bad: NDArray[np.float64]
    """That of the same texts with random ids in place of their words."""
    temperature: float

    @property
    def low(self) -> float:
        """Below this, speech is doubtful: ``SPREADS`` standard deviations under what good speech has on average."""
        return float(self.good.mean() - SPREADS * self.good.std())

    @property
    def separates(self) -> bool:
        """Whether the threshold finds most of the bad speech and hardly any of the good."""
        return bool((self.bad < self.low).mean() >= 0.5 and (self.good < self.low).mean() <= 0.05)

    def to_stored(self) -> StoredConfidence:
        """The part of it that config.json stores."""
        false_alarms, detected = (float((values < self.low).mean()) for values in (self.good, self.bad))
        return StoredConfidence(self.low, self.temperature, float(self.good.mean()), false_alarms, detected, len(self.good))


def calibrate_confidence(kalle: Kalle, texts: Sequence[str]) -> ConfidenceCalibration:
    """Speak each of ``texts`` in the default voice as it is, and with random ids in place of its words, its index being the seed."""
    good, bad = list[float](), list[float]()
    for seed, text in enumerate(texts):
        request = kalle.resolve(SpeechRequest(text, seed=seed, retries=0, by_sentences=False))
        for values, asked in ((good, request), (bad, _garbled(kalle, request, text))):
            speech = speak(kalle.lm, kalle.flowvae, asked)
            if speech.frames:
                values.append(speech.confidence)
    if not good or not bad:
        raise UserError("no confidence to calibrate: got no speech of any text, expected some; train longer")
    return ConfidenceCalibration(np.array(good), np.array(bad), kalle.temperature)


def _garbled(kalle: Kalle, request: Request, text: str) -> Request:
    """``request`` with random ids in place of those of ``text``."""
    count, after = max(1, len(kalle.tokenizer.encode(text)) - 1), len(BEFORE_SPEECH)
    ids = request.text_ids.clone()
    words = ids[max(1, len(ids) - after - count) : len(ids) - after]
    generator = torch.Generator().manual_seed(purpose_seed(f"kalle calibrate {request.seed}"))
    words.copy_(torch.randint(kalle.tokenizer.special(BEFORE_SPEECH[0]), (len(words),), generator=generator))
    return replace(request, text_ids=ids)


def save_histogram(scores: EndScores, calibration: Calibration, path: str | Path) -> None:
    """Draw where ends and other positions lie into an image file; the format follows the suffix, a UserError for an unknown one."""
    figure = new_figure(960, 540)
    axis = figure.subplots()
    inside = np.concatenate([values[calibration.min_index + 1 :] for values in scores.inside])
    everything = np.concatenate([inside, scores.at_end]).clip(min=_FLOOR)
    bins = np.geomspace(everything.min() / 1.2, everything.max() * 1.2, 60)
    for values, label, colour in (
        (inside, "inside an utterance, all positions", "#9ecae1"),
        (scores.lowest_inside(calibration.min_index), "inside, lowest of each utterance", "#08519c"),
        (scores.at_end, "at the end", "#d94801"),
    ):
        finite = values[np.isfinite(values)].clip(min=_FLOOR)
        axis.hist(finite, bins=bins.tolist(), weights=np.full(len(finite), 100 / len(finite)), alpha=0.65, label=label, color=colour)
    axis.axvline(calibration.rates.threshold, color="black", linestyle="--", label=f"threshold {calibration.rates.threshold:.4g}")
    axis.set(xscale="log", xlabel="divergence from the end distribution, nats per dimension", ylabel="share of positions, %")
    axis.legend(fontsize=8)
    save_figure(figure, path)

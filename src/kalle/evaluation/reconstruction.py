"""Scores a Flow-VAE: recordings through the encoder and the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kalle.audio import Audio, resample, write_audio
from kalle.data.testlist import TestItem
from kalle.errors import UserError
from kalle.evaluation.journal import Journal, score_items
from kalle.evaluation.metric import RATE_HZ, Metric, ScoreItem
from kalle.evaluation.references import RECORDING_SYSTEM, figure_rows
from kalle.evaluation.result import Result, Settings, finish
from kalle.evaluation.scoring import Scores, counted
from kalle.gaussian import DiagGaussian
from kalle.losses.latent_health import latent_health
from kalle.models.flowvae import FlowVAE

MEAN_SYSTEM = "reconstruction"
SAMPLE_SYSTEM = "reconstruction_sample"
HEALTH_ITEMS = 200
"""Posteriors of this many items are kept for the latent health, so that memory does not grow with the list."""


def evaluate_reconstruction(
    flowvae: FlowVAE,
    items: Sequence[TestItem],
    metrics: Sequence[Metric],
    out_dir: str | Path,
    *,
    sample: bool = False,
    seed: int = 0,
    settings: Settings | None = None,
    journal: Journal | None = None,
) -> Result:
    """Encode and decode every recording and compare the two, cropped to the shorter.

    Systems: "recording" (the recording itself, for metrics that need no reference: the ceiling of WER), "reconstruction" (the
    posterior's mean decoded) and, with ``sample``, "reconstruction_sample" (one sample, drawn from ``seed`` and the item's index).
    SIM compares with the recording. Writes wavs/SYSTEM/ID.wav and what ``finish`` writes.
    An unreadable recording is an error row; UserError when all are. ``journal`` as in ``score_items``.
    """
    settings, scores = settings or Settings(), Scores(metrics)
    run = _Run(flowvae, scores, Path(out_dir), sample, seed, settings)

    def score(index: int, item: TestItem) -> None:
        with counted(scores, MEAN_SYSTEM, item):
            run.item(index, item)

    score_items(items, scores, journal, score, "reconstruction", settings.progress)
    config = {"sample": sample, "seed": seed, "device": str(next(flowvae.parameters()).device), "torch_threads": torch.get_num_threads()}
    decoded = {row["id"] for row in scores.rows if row["system"] == MEAN_SYSTEM and "error" not in row}
    healthy = [index for index, item in enumerate(items) if item.id in decoded][:HEALTH_ITEMS]
    extra = {"latent_health": run.health(items, healthy)} if healthy else {}
    shown = figure_rows(items, scores.rows, Path(out_dir), settings.figure_items)
    return finish("reconstruction", scores, config, settings, out_dir, shown, extra=extra)


class _Run:
    """The state of one evaluation: scores, and what is kept for the latent health."""

    def __init__(self, flowvae: FlowVAE, scores: Scores, out_dir: Path, sample: bool, seed: int, settings: Settings) -> None:
        self.flowvae, self.scores, self.out_dir, self.sample, self.seed, self.settings = flowvae, scores, out_dir, sample, seed, settings
        self.posteriors: dict[int, tuple[DiagGaussian, Tensor]] = {}

    def item(self, index: int, item: TestItem) -> None:
        rate_hz = self.flowvae.config.sample_rate
        wav = item.audio(rate_hz)
        posterior, decoded = self._reconstruct(wav, index)
        recording = resample(wav, rate_hz, RATE_HZ)
        if self.settings.score_recordings:
            self.scores.add(RECORDING_SYSTEM, ScoreItem(item.id, recording, item.text, item.language))
        systems = {name: resample(audio, rate_hz, RATE_HZ) for name, audio in decoded.items()}
        for name, audio in systems.items():
            path = self.out_dir / "wavs" / name / f"{item.file_stem}.wav"
            write_audio(path, decoded[name], rate_hz)
            scored = ScoreItem(item.id, audio, item.text, item.language, recording, aligned=True, speaker=recording)
            self.scores.add(name, scored, {"wav": str(path.relative_to(self.out_dir)), "frames": posterior.mean.shape[1]})

    @torch.no_grad()
    def _reconstruct(self, wav: Audio, index: int) -> tuple[DiagGaussian, dict[str, Audio]]:
        weight = next(self.flowvae.parameters())
        posterior, drawn = self._encode(wav, index)
        decoded = {MEAN_SYSTEM: posterior.mean} | ({SAMPLE_SYSTEM: drawn} if self.sample else {})
        if len(self.posteriors) < HEALTH_ITEMS:
            self.posteriors[index] = (DiagGaussian(posterior.mean.float(), posterior.log_std.float()), drawn)
        return posterior, {name: self.flowvae.decode(z.to(weight.dtype))[0].float().cpu().numpy() for name, z in decoded.items()}

    @torch.no_grad()
    def _encode(self, wav: Audio, index: int) -> tuple[DiagGaussian, Tensor]:
        """The posterior (1, T, D) of ``wav`` (S,) and the sample that belongs to item ``index``."""
        weight = next(self.flowvae.parameters())
        hop_length = self.flowvae.config.hop_length
        if len(wav) < hop_length:
            raise UserError(f"too short to encode: got {len(wav)} samples, expected at least one frame of {hop_length}; remove the item")
        posterior = self.flowvae.encode(torch.from_numpy(wav)[None].to(weight.device, weight.dtype))
        return posterior, posterior.sample(generator=torch.Generator().manual_seed(item_seed(self.seed, index)))

    @torch.no_grad()
    def health(self, items: Sequence[TestItem], indices: Sequence[int]) -> dict[str, Any]:
        """``latent_health`` over the frames of the items ``indices``, and quantiles of the posterior's standard deviation.

        What an earlier run or another rank has scored is encoded again.
        """
        kept = [self._posterior(index, items[index]) for index in indices]
        mean, log_std = (torch.cat([getattr(posterior, name)[0] for posterior, _ in kept])[None] for name in ("mean", "log_std"))
        z = torch.cat([drawn[0] for _, drawn in kept])[None]
        posterior = DiagGaussian(mean, log_std)
        # The flow looks along time, so it runs within each utterance.
        weight = next(self.flowvae.parameters())
        z_prior = torch.cat([self.flowvae.to_prior(drawn.to(weight.dtype))[0] for _, drawn in kept])[None]
        values = {name: float(value) for name, value in latent_health(posterior, z, z_prior.float()).items()}
        quantiles = np.quantile(posterior.std.cpu().numpy(), (0.05, 0.5, 0.95))
        return values | dict(zip(("std_p05", "std_p50", "std_p95"), map(float, quantiles), strict=True)) | {"items": len(kept)}

    def _posterior(self, index: int, item: TestItem) -> tuple[DiagGaussian, Tensor]:
        if index in self.posteriors:
            return self.posteriors[index]
        posterior, drawn = self._encode(item.audio(self.flowvae.config.sample_rate), index)
        return DiagGaussian(posterior.mean.float(), posterior.log_std.float()), drawn


def item_seed(seed: int, index: int) -> int:
    """A 31-bit seed that belongs to ``seed`` and an item's 0-based index, so that an item does not depend on the others."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0] >> 1)

"""Mel input of the speaker encoder: level-normalised crops of the target speech."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kalle.errors import UserError
from kalle.models.mel import LogMel, MelConfig

SPEAKER_MEL = MelConfig(sample_rate=16000, n_fft=1024, hop=256, win=1024, n_mels=80, fmin=0.0, fmax=8000.0)
PEAK = 0.95
"""Largest magnitude of a waveform after normalisation."""
CROP_FRAMES = 200
"""Frames of a training crop."""


class SpeakerMel(nn.Module):
    """Waveform to the log-mels the speaker encoder reads.

    The waveform is scaled to a peak of 0.95 before anything is cut from it, and repeated when it is shorter than a crop.
    Silence stays silence.
    """

    def __init__(self, config: MelConfig = SPEAKER_MEL, crop_frames: int = CROP_FRAMES) -> None:
        super().__init__()
        self.mel = LogMel(config)
        self.crop_samples = crop_frames * config.hop

    def prepare(self, wav: Tensor) -> Tensor:
        """``wav`` (S,) peak-normalised, and tiled to ``crop_samples`` when shorter; fp32. UserError when empty, not 1-D or not finite."""
        if wav.dim() != 1 or wav.shape[0] == 0:
            raise UserError(
                f"speaker reference: got shape {tuple(wav.shape)}, expected (samples,) with at least one; give one mono recording"
            )
        wav = wav.float()
        peak = wav.abs().max()
        if not torch.isfinite(peak):
            raise UserError("speaker reference: got a sample that is not finite, expected a waveform in [-1, 1]; re-read the recording")
        if peak > 0:
            wav = wav * (PEAK / peak)
        if wav.shape[0] < self.crop_samples:
            wav = wav.repeat(-(-self.crop_samples // wav.shape[0]))[: self.crop_samples]
        return wav

    def crop(self, wav: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A random crop of ``wav`` (S,) as log-mels (n_mels, crop_frames), its place drawn from ``generator``: for training."""
        prepared = self.prepare(wav)
        start = int(torch.randint(prepared.shape[0] - self.crop_samples + 1, (1,), generator=generator))
        return self.mel(prepared[None, start : start + self.crop_samples])[0]

    def forward(self, wav: Tensor) -> Tensor:
        """The whole of ``wav`` (S,), at least one crop long after tiling, as log-mels (n_mels, frames): for synthesis."""
        return self.mel(self.prepare(wav)[None])[0]

"""Audio while it is being generated."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from kalle.errors import UserError
from kalle.models.flowvae import FlowVAE
from kalle.models.flowvae.streaming import StreamingDecoder
from kalle.models.lm import KalleLM
from kalle.synthesis.row import Frame
from kalle.synthesis.speak import Request, assemble, start, watcher_of
from kalle.synthesis.speech import FloatArray, Speech, SpeechEnding


class SpeechStream(Iterator[FloatArray]):
    """Pieces of one utterance, float32 (n,) at ``sample_rate``, as they become final.

    ``speech`` is what has been yielded so far, a valid result at any moment; exhausted, it is the whole. ``close`` ends
    the stream early, with the stop reason "interrupted". Frames that were generated but not yet yielded are then left out.
    """

    def __init__(self, lm: KalleLM, flowvae: FlowVAE, decoder: StreamingDecoder, request: Request, chunk_frames: int) -> None:
        if chunk_frames < 1:
            raise UserError(f"bad chunk: got {chunk_frames} frames, expected at least 1; raise chunk_frames")
        if request.quirks.decode != "sampled" or request.quirks.truncate_int16:
            raise UserError("a stream decodes the frames as they are drawn: got habits of the release for the audio; synthesize instead")
        self.request = request
        self.sample_rate = flowvae.config.sample_rate
        self._config, self._weight = flowvae.config, next(flowvae.parameters())
        self._decoder, self._state = decoder, decoder.start()
        self._watcher = watcher_of(flowvae, request)
        self._generation, _ = start(lm, request, self._watcher)
        self._chunk_frames = chunk_frames
        self._frames: list[Frame] = []
        self._pieces: list[FloatArray] = []
        self._trimmed_frames = 0
        self._stop_reason: SpeechEnding | None = None
        self._done = False

    @property
    def latency_frames(self) -> int:
        """Frames that must exist beyond a piece before it is final."""
        return self._decoder.latency_frames

    @property
    def speech(self) -> Speech:
        """Everything that was yielded so far, with the frames it was made of."""
        audio = np.concatenate(self._pieces) if self._pieces else np.zeros(0, dtype=np.float32)
        frames = self._frames[: len(audio) // self._config.hop_length]
        reason, config = self._stop_reason or "interrupted", self._config
        return assemble(
            frames, audio, reason, self.request, config.sample_rate, config.latent_dim, self._trimmed_frames, config.frame_rate_hz
        )

    def close(self) -> None:
        """End the stream now."""
        self._done = True

    def __next__(self) -> FloatArray:
        """The next piece of audio."""
        while not self._done:
            piece = self._more()
            if len(piece):
                self._pieces.append(piece)
                return piece
        raise StopIteration

    @torch.no_grad()
    def _more(self) -> FloatArray:
        """Generate one piece's worth of frames and decode what has become final; empty while nothing has."""
        frames = self._pull(self._wanted())
        if self._generation.stop_reason is not None:
            frames = self._trim(frames)
        parts = []
        if frames:
            self._frames += frames
            wav, self._state = self._decoder.push(self._latents(frames), self._state)
            parts.append(wav)
        if self._generation.stop_reason is not None:
            if self._frames:
                parts.append(self._decoder.finish(self._state))
            self._stop_reason, self._done = self._generation.stop_reason, True
        return torch.cat(parts, dim=1)[0].float().cpu().numpy() if parts else np.zeros(0, dtype=np.float32)

    def _wanted(self) -> int:
        """The first piece comes as early as it can: one frame beyond the latency."""
        return self._decoder.latency_frames + 1 if not self._frames else self._chunk_frames

    def _pull(self, count: int) -> list[Frame]:
        frames = []
        for frame in self._generation:
            frames.append(frame)
            if len(frames) == count:
                break
        return frames

    def _trim(self, frames: list[Frame]) -> list[Frame]:
        """Leave out what the watcher found to be stuck, as far as the decoder has not had it yet."""
        kept = None if self._watcher is None else self._watcher.kept_frames
        if kept is None:
            return frames
        spoken = frames[: max(0, kept - len(self._frames))]
        self._trimmed_frames = len(frames) - len(spoken)
        return spoken

    def _latents(self, frames: list[Frame]) -> torch.Tensor:
        return torch.stack([frame.z for frame in frames])[None].to(self._weight.device, self._weight.dtype)

"""Audio while it is being generated."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import torch

from kalle.errors import UserError
from kalle.models.flowvae import FlowVAE
from kalle.models.flowvae.streaming import DecoderState, StreamingDecoder
from kalle.models.lm import KalleLM
from kalle.synthesis.row import Frame
from kalle.synthesis.speak import Request, assemble, start, watcher_of
from kalle.synthesis.speech import FloatArray, Speech, SpeechEnding


class SpeechStream(Iterator[FloatArray]):
    """Pieces of one utterance, float32 (n,) at ``sample_rate``, as they become final.

    ``speech`` is what has been yielded so far, a valid result at any moment; exhausted, it is the whole. ``close`` ends
    the stream early, with the stop reason "interrupted", and so does an exception, an interrupt included. Frames that were
    generated but not yet yielded are then left out.

    Where the model gets stuck (stop reason "repetition" or "silence"), this is known only seconds later, and part of it has been
    yielded: what ``speak`` would have cut. The rest is left out; ``Speech.stuck_seconds`` says how much was heard, as does a warning.
    """

    def __init__(self, lm: KalleLM, flowvae: FlowVAE, decoder: StreamingDecoder, request: Request, chunk_frames: int) -> None:
        if not hasattr(chunk_frames, "__index__") or chunk_frames < 1:
            raise UserError(f"bad chunk: got {chunk_frames!r} frames, expected an integer of at least 1; raise chunk_frames")
        if request.quirks.decode != "sampled" or request.quirks.truncate_int16:
            raise UserError("a stream decodes the frames as they are drawn: got habits of the release for the audio; synthesize instead")
        self.request = request
        self.sample_rate = flowvae.config.sample_rate
        self._config, self._weight = flowvae.config, next(flowvae.parameters())
        self._decoder = decoder
        self._state: DecoderState | None = decoder.start()
        self._watcher = watcher_of(flowvae, request)
        self._generation, _ = start(lm, request, self._watcher)
        self._chunk_frames = int(chunk_frames)
        self._frames: list[Frame] = []
        """Those the decoder has had."""
        self._generated = 0
        self._pieces: list[FloatArray] = []
        self._stop_reason: SpeechEnding | None = None
        self._done = False
        self._busy = threading.Lock()

    @property
    def latency_frames(self) -> int:
        """Frames that must exist beyond a piece before it is final."""
        return self._decoder.latency_frames

    @property
    def speech(self) -> Speech:
        """Everything that was yielded so far, with the frames it was made of."""
        audio = np.concatenate(self._pieces) if self._pieces else np.zeros(0, dtype=np.float32)
        frames, config = self._frames[: len(audio) // self._config.hop_length], self._config
        kept = None if self._stop_reason is None else self._kept_frames()
        trimmed, stuck = (0, 0) if kept is None else (self._generated - len(frames), max(0, len(frames) - kept))
        reason, rate_hz = self._stop_reason or "interrupted", config.frame_rate_hz
        return assemble(frames, audio, reason, self.request, config.sample_rate, config.latent_dim, trimmed, rate_hz, stuck)

    def close(self) -> None:
        """End the stream now and free what the model and the decoder remember; another thread's ``next`` does that when it returns."""
        self._done = True
        self._release()

    def __next__(self) -> FloatArray:
        """The next piece of audio. Whatever it raises ends the stream."""
        try:
            with self._busy:
                while not self._done:
                    piece = self._more()
                    if len(piece):
                        self._pieces.append(piece)
                        return piece
            raise StopIteration
        except BaseException:
            self._done = True
            raise
        finally:
            if self._done:
                self._release()

    def _release(self) -> None:
        """Free the state, unless a ``next`` is at work, which does it itself."""
        if self._busy.acquire(blocking=False):
            try:
                self._generation.close()
                self._state = None
            finally:
                self._busy.release()

    @torch.no_grad()
    def _more(self) -> FloatArray:
        """Generate one piece's worth of frames and decode what has become final; empty while nothing has."""
        assert self._state is not None
        frames, reason = self._pull(self._wanted()), self._generation.stop_reason
        kept = None if reason is None else self._kept_frames()
        if kept is not None:
            frames = frames[: max(0, kept - len(self._frames))]
        parts = []
        if frames:
            self._frames += frames
            wav, self._state = self._decoder.push(self._latents(frames), self._state)
            parts.append(wav)
        if reason is not None:
            if self._frames:
                parts.append(self._rest(self._state, kept))
            self._stop_reason, self._done = reason, True
        return torch.cat(parts, dim=1)[0].float().cpu().numpy() if parts else np.zeros(0, dtype=np.float32)

    def _rest(self, state: DecoderState, kept: int | None) -> torch.Tensor:
        """The samples (1, n) still owed, none of those after ``kept`` frames."""
        rest = self._decoder.finish(state)
        return rest if kept is None else rest[:, : max(0, kept * self._config.hop_length - state.emitted)]

    def _wanted(self) -> int:
        """The first piece comes as early as it can: one frame beyond the latency."""
        return self._decoder.latency_frames + 1 if not self._frames else self._chunk_frames

    def _pull(self, count: int) -> list[Frame]:
        frames = []
        for frame in self._generation:
            frames.append(frame)
            if len(frames) == count:
                break
        self._generated += len(frames)
        return frames

    def _kept_frames(self) -> int | None:
        """How many frames are worth hearing, where the watcher ended the speech."""
        return None if self._watcher is None else self._watcher.kept_frames

    def _latents(self, frames: list[Frame]) -> torch.Tensor:
        return torch.stack([frame.z for frame in frames])[None].to(self._weight.device, self._weight.dtype)

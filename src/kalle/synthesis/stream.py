"""Audio while it is being generated: one request, or the sentences of a long text one after the other."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from kalle.errors import UserError
from kalle.models.flowvae import FlowVAE
from kalle.models.flowvae.streaming import DecoderState, StreamingDecoder
from kalle.models.lm import KalleLM
from kalle.synthesis.generate import FloatArray, Frame, Request
from kalle.synthesis.longform import Fader, LongForm, Part
from kalle.synthesis.options import SpeechRequest
from kalle.synthesis.speech import Speech, SpeechEnding, assemble, check_finite, joined, start, watcher_of

if TYPE_CHECKING:
    from kalle.synthesis.kalle import Kalle


class SpeechStream(Iterator[FloatArray]):
    """Pieces of a text that is being spoken, float32 (n,) at ``sample_rate``, as they become final. See ``Kalle.stream``.

    ``speech`` is what has been yielded so far, a valid result at any moment; exhausted, it is the whole. ``close`` ends
    the stream early, with the stop reason "interrupted", and so does an exception, an interrupt included. A long text is spoken
    sentence by sentence as `LongForm` says it, with its voice, seeds, prompts, fades and pauses.
    """

    def __init__(self, kalle: Kalle, request: SpeechRequest) -> None:
        self._kalle, self._decoder = kalle, kalle.streaming_decoder(request.options.latency_frames)
        self._long = LongForm(kalle, request.text, request.voice, request.options) if kalle.why_by_sentences(request) else None
        self.sample_rate = kalle.sample_rate
        self._parts: list[Part] = []
        self._done = False
        if self._long is None:
            resolved = kalle.resolve(request)
            self.seed = resolved.seed
            self._begin(resolved)
        else:
            self.seed = self._long.seed
            self._begin_sentence(self._long)

    @property
    def latency_frames(self) -> int:
        """Frames that must exist beyond a piece before it is final."""
        return self._decoder.latency_frames

    @property
    def speech(self) -> Speech:
        """Everything that was yielded so far, with the frames it was made of."""
        if self._long is None:
            return self._current.speech
        parts, unfinished = list(self._parts), len(self._parts) < len(self._long)
        if unfinished and (self._yielded or not parts):
            spoken = dataclasses.replace(self._current.speech, audio=np.concatenate([np.zeros(0, dtype=np.float32), *self._yielded]))
            parts.append(dataclasses.replace(self._long.part(len(parts), self._asked, spoken), pause_samples=0))
        return joined(parts, self.seed, self._long.text, self._long.unspoken, interrupted=unfinished)

    def close(self) -> None:
        """End the stream now and free what the model and the decoder remember; another thread's ``next`` does that when it returns."""
        self._done = True
        self._current.close()

    def __next__(self) -> FloatArray:
        """The next piece of audio. Whatever it raises ends the stream."""
        try:
            while not self._done:
                piece = next(self._current, None)
                if self._long is not None and not self._done:
                    piece = self._of_sentence(self._long, piece)
                if piece is None:
                    break
                if len(piece):
                    return piece
            raise StopIteration
        except BaseException:
            self.close()
            raise

    def _begin(self, request: Request) -> None:
        self._current = RequestStream(self._kalle.lm, self._kalle.flowvae, self._decoder, request)
        if self._done:  # closed meanwhile
            self._current.close()

    def _begin_sentence(self, long: LongForm) -> None:
        self._asked = long.request(len(self._parts), self._parts[-1] if self._parts else None)
        self._fader, self._yielded = Fader(long.fade_samples(self.sample_rate)), list[FloatArray]()
        self._begin(self._kalle.resolve(self._asked))

    def _of_sentence(self, long: LongForm, piece: FloatArray | None) -> FloatArray | None:
        """The final audio with ``piece`` of the current sentence; for None its end and the pause after it, and the next one is begun."""
        if len(self._parts) == len(long):
            return None
        said = self._fader.finish() if piece is None else self._fader.push(piece)
        self._yielded.append(said)
        if piece is not None:
            return said
        spoken = dataclasses.replace(self._current.speech, audio=np.concatenate(self._yielded))
        part = long.part(len(self._parts), self._asked, spoken)
        placed = sum(len(each.audio) + each.pause_samples for each in self._parts)
        self._parts.append(dataclasses.replace(part, start_sample=placed))
        if len(self._parts) < len(long):
            self._begin_sentence(long)
        return np.concatenate([said, np.zeros(part.pause_samples, dtype=np.float32)])


class RequestStream(Iterator[FloatArray]):
    """Pieces of one request, float32 (n,), as they become final.

    ``speech`` and ``close`` are as in ``SpeechStream``. Frames that were generated but not yet yielded are left out of an ended stream.

    Where the model gets stuck (stop reason "repetition" or "silence"), this is known only seconds later, and part of it has been
    yielded: what ``speak`` would have cut. The rest is left out; ``Speech.stuck_seconds`` says how much was played, as does a warning.
    """

    def __init__(self, lm: KalleLM, flowvae: FlowVAE, decoder: StreamingDecoder, request: Request) -> None:
        compatibility = request.options.compatibility
        if compatibility.decode != "sampled" or compatibility.truncate_int16:
            raise UserError("a stream decodes the frames as they are drawn: got habits of the release for the audio; synthesize instead")
        self.request = request
        self._config, self._weight = flowvae.config, next(flowvae.parameters())
        self._decoder = decoder
        self._state: DecoderState | None = decoder.start()
        self._watcher = watcher_of(flowvae, request)
        self._generation, _ = start(lm, request, self._watcher)
        self._frames: list[Frame] = []
        """Those the decoder has had."""
        self._generated = 0
        self._pieces: list[FloatArray] = []
        self._stop_reason: SpeechEnding | None = None
        self._done = False
        self._busy = threading.Lock()

    @property
    def speech(self) -> Speech:
        """Everything that was yielded so far, with the frames it was made of."""
        audio = np.concatenate(self._pieces) if self._pieces else np.zeros(0, dtype=np.float32)
        frames = self._frames[: len(audio) // self._config.hop_length]
        kept = None if self._stop_reason is None else self._kept_frames()
        trimmed, stuck = (0, 0) if kept is None else (self._generated - len(frames), max(0, len(frames) - kept))
        reason, end = self._stop_reason or "interrupted", self._generation.end_frame
        return assemble(frames, audio, reason, self.request, self._config, trimmed, stuck, end if reason == "end" else None)

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
        return check_finite(torch.cat(parts, dim=1)[0].float().cpu().numpy()) if parts else np.zeros(0, dtype=np.float32)

    def _rest(self, state: DecoderState, kept: int | None) -> torch.Tensor:
        """The samples (1, n) still owed, none of those after ``kept`` frames."""
        rest = self._decoder.finish(state)
        return rest if kept is None else rest[:, : max(0, kept * self._config.hop_length - state.emitted)]

    def _wanted(self) -> int:
        """The first piece comes as early as it can: one frame beyond the latency."""
        return self.request.options.chunk_frames if self._frames else self._decoder.latency_frames + 1

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

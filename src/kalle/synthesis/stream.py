"""Audio while it is being generated: one request, or the sentences of a long text one after the other.

``RequestAudio`` and ``TextAudio`` turn frames into audio, whoever makes them: the streams here one after the other, a server
(`kalle.serving.engine`) for many texts at once.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from kalle.errors import UserError
from kalle.models.flowvae import FlowVAE
from kalle.models.flowvae.streaming import DecoderState, StreamingDecoder
from kalle.models.lm import KalleLM
from kalle.synthesis.generate import Ending, FloatArray, Frame, Generation, Request, Watcher
from kalle.synthesis.longform import Fader, LongForm, Part
from kalle.synthesis.options import SpeechRequest
from kalle.synthesis.speech import Speech, SpeechEnding, assemble, check_finite, joined, start, watcher_of

if TYPE_CHECKING:
    from kalle.synthesis.kalle import Kalle


class FrameAudio(Protocol):
    """Takes the frames of one request after the other and gives their audio."""

    @property
    def request(self) -> Request:
        """The request whose frames are wanted now."""

    @property
    def watcher(self) -> Watcher | None:
        """The watcher of these frames, if any."""

    @property
    def wanted(self) -> int:
        """How many frames make the next piece."""

    @property
    def done(self) -> bool:
        """Whether the last request has ended."""

    @property
    def speech(self) -> Speech:
        """Everything that was returned so far, with the frames it was made of."""

    def push(self, frames: Sequence[Frame], ending: Ending | None) -> FloatArray:
        """Take the next ``frames`` of ``request``, and its ``ending`` where it is over; returns the samples (n,) that are final now."""

    def close(self) -> None:
        """Free what the decoder remembers: no frame follows."""


class RequestAudio:
    """The audio of one request.

    Where the model gets stuck (stop reason "repetition" or "silence"), this is known only seconds later, and part of it has been
    returned: what ``speak`` would have cut. The rest is left out; ``Speech.stuck_seconds`` says how much was played, as does a warning.
    """

    def __init__(self, flowvae: FlowVAE, decoder: StreamingDecoder, request: Request) -> None:
        compatibility = request.options.compatibility
        if compatibility.decode != "sampled" or compatibility.truncate_int16:
            raise UserError("a stream decodes the frames as they are drawn: got habits of the release for the audio; synthesize instead")
        self.request, self.watcher = request, watcher_of(flowvae, request)
        self._config, self._weight = flowvae.config, next(flowvae.parameters())
        self._decoder = decoder
        self._state: DecoderState | None = decoder.start()
        self.frames: list[Frame] = []
        """Those the decoder has had."""
        self._generated = 0
        self._pieces: list[FloatArray] = []
        self.ending: Ending | None = None

    @property
    def done(self) -> bool:
        """Whether the request has ended."""
        return self.ending is not None

    @property
    def wanted(self) -> int:
        """The first piece comes as early as it can: one frame beyond the latency."""
        return self.request.options.chunk_frames if self.frames else self._decoder.latency_frames + 1

    @property
    def kept_frames(self) -> int | None:
        """How many frames are worth hearing, where the watcher ended the speech."""
        return None if self.watcher is None else self.watcher.kept_frames

    @property
    def speech(self) -> Speech:
        """Everything that was returned so far, with the frames it was made of; those not yet decoded are left out."""
        audio = np.concatenate(self._pieces) if self._pieces else np.zeros(0, dtype=np.float32)
        frames = self.frames[: len(audio) // self._config.hop_length]
        kept = None if self.ending is None else self.kept_frames
        trimmed, stuck = (0, 0) if kept is None else (self._generated - len(frames), max(0, len(frames) - kept))
        reason, end_frame = self.ending or ("interrupted", None)
        stop_reason: SpeechEnding = reason
        return assemble(frames, audio, stop_reason, self.request, self._config, trimmed, stuck, end_frame)

    @torch.no_grad()
    def push(self, frames: Sequence[Frame], ending: Ending | None) -> FloatArray:
        """Take the next frames, and the ending where the request is over; returns the samples that are final now."""
        assert self._state is not None, "frames after the end"
        self._generated += len(frames)
        kept = None if ending is None else self.kept_frames
        if kept is not None:
            frames = frames[: max(0, kept - len(self.frames))]
        parts = []
        if frames:
            self.frames += frames
            wav, self._state = self._decoder.push(self._latents(frames), self._state)
            parts.append(wav)
        if ending is not None and self.frames:
            parts.append(self._rest(self._state, kept))
        piece = check_finite(torch.cat(parts, dim=1)[0].float().cpu().numpy()) if parts else np.zeros(0, dtype=np.float32)
        if len(piece):
            self._pieces.append(piece)
        if ending is not None:
            self.ending, self._state = ending, None
        return piece

    def close(self) -> None:
        """Free what the decoder remembers."""
        self._state = None

    def _rest(self, state: DecoderState, kept: int | None) -> torch.Tensor:
        """The samples (1, n) still owed, none of those after ``kept`` frames."""
        rest = self._decoder.finish(state)
        return rest if kept is None else rest[:, : max(0, kept * self._config.hop_length - state.emitted)]

    def _latents(self, frames: Sequence[Frame]) -> torch.Tensor:
        return torch.stack([frame.z for frame in frames])[None].to(self._weight.device, self._weight.dtype)


class TextAudio:
    """The audio of a whole text, spoken at once or by sentences, with the voice, seeds, prompts, fades and pauses of `LongForm`.

    What was heard can't be taken back: no bad ending is tried again. UserError as ``Kalle.stream`` raises.
    """

    def __init__(self, kalle: Kalle, request: SpeechRequest) -> None:
        self._kalle, self._decoder = kalle, kalle.streaming_decoder(request.options.latency_frames)
        self.latency_frames = self._decoder.latency_frames
        self._long = LongForm(kalle, request.text, request.voice, request.options) if kalle.why_by_sentences(request) else None
        self._parts: list[Part] = []
        if self._long is None:
            self._current = RequestAudio(kalle.flowvae, self._decoder, kalle.resolve(request))
            self.seed = self._current.request.seed
        else:
            self.seed = self._long.seed
            self._begin_sentence(self._long)

    @property
    def request(self) -> Request:
        """The request whose frames are wanted now: the whole text or a sentence."""
        return self._current.request

    @property
    def watcher(self) -> Watcher | None:
        """The watcher of these frames, if any."""
        return self._current.watcher

    @property
    def wanted(self) -> int:
        """How many frames make the next piece."""
        return self._current.wanted

    @property
    def done(self) -> bool:
        """Whether the last sentence has ended."""
        return self._current.done if self._long is None else len(self._parts) == len(self._long)

    @property
    def speech(self) -> Speech:
        """Everything that was returned so far, with the frames it was made of."""
        if self._long is None:
            return self._current.speech
        parts = list(self._parts)
        if not self.done and (self._said or not parts):
            spoken = dataclasses.replace(self._current.speech, audio=np.concatenate([np.zeros(0, dtype=np.float32), *self._said]))
            parts.append(dataclasses.replace(self._long.part(len(parts), self._asked, spoken), pause_samples=0))
        return joined(parts, self.seed, self._long.text, self._long.unspoken, interrupted=not self.done)

    def push(self, frames: Sequence[Frame], ending: Ending | None) -> FloatArray:
        """Take the next frames; at the ``ending`` of a sentence the audio has the pause after it, and ``request`` is the next one."""
        piece = self._current.push(frames, ending)
        if self._long is None:
            return piece
        said = self._fader.push(piece)
        if ending is not None:
            said = np.concatenate([said, self._fader.finish()])
        self._said.append(said)
        return said if ending is None else np.concatenate([said, self._end_sentence(self._long)])

    def close(self) -> None:
        """Free what the decoder remembers."""
        self._current.close()

    def _begin_sentence(self, long: LongForm) -> None:
        self._asked = long.request(len(self._parts), self._parts[-1] if self._parts else None)
        self._fader, self._said = Fader(long.fade_samples(self._kalle.sample_rate)), list[FloatArray]()
        self._current = RequestAudio(self._kalle.flowvae, self._decoder, self._kalle.resolve(self._asked))

    def _end_sentence(self, long: LongForm) -> FloatArray:
        """Keep the sentence as a part and begin the next; returns the pause between them."""
        spoken = dataclasses.replace(self._current.speech, audio=np.concatenate(self._said))
        part = long.part(len(self._parts), self._asked, spoken)
        placed = sum(len(each.audio) + each.pause_samples for each in self._parts)
        self._parts.append(dataclasses.replace(part, start_sample=placed))
        if len(self._parts) < len(long):
            self._begin_sentence(long)
        return np.zeros(part.pause_samples, dtype=np.float32)


class _Stream(Iterator[FloatArray]):
    """Pieces of ``audio`` whose frames ``lm`` makes one request after the other."""

    def __init__(self, lm: KalleLM, audio: FrameAudio) -> None:
        self._lm, self._audio = lm, audio
        self._generation: Generation | None = None
        self._done = False
        self._busy = threading.Lock()
        self._begin()

    @property
    def speech(self) -> Speech:
        """Everything that was yielded so far, with the frames it was made of."""
        return self._audio.speech

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
                        return piece
            raise StopIteration
        except BaseException:
            self._done = True
            raise
        finally:
            if self._done:
                self._release()

    def _begin(self) -> None:
        self._generation, _ = start(self._lm, self._audio.request, self._audio.watcher)

    def _more(self) -> FloatArray:
        """Generate one piece's worth of frames and decode what has become final; empty while nothing has."""
        assert self._generation is not None
        frames, reason = self._pull(self._generation, self._audio.wanted), self._generation.stop_reason
        piece = self._audio.push(frames, None if reason is None else (reason, self._generation.end_frame))
        if self._audio.done:
            self._done = True
        elif reason is not None:
            self._begin()
        return piece

    def _pull(self, generation: Generation, count: int) -> list[Frame]:
        frames = []
        for frame in generation:
            frames.append(frame)
            if len(frames) == count:
                break
        return frames

    def _release(self) -> None:
        """Free the state, unless a ``next`` is at work, which does it itself."""
        if self._busy.acquire(blocking=False):
            try:
                if self._generation is not None:
                    self._generation.close()
                self._audio.close()
            finally:
                self._busy.release()


class SpeechStream(_Stream):
    """Pieces of a text that is being spoken, float32 (n,) at ``sample_rate``, as they become final. See ``Kalle.stream``.

    ``speech`` is what has been yielded so far, a valid result at any moment; exhausted, it is the whole. ``close`` ends
    the stream early, with the stop reason "interrupted", and so does an exception, an interrupt included. A long text is spoken
    sentence by sentence as `LongForm` says it, with its voice, seeds, prompts, fades and pauses.
    """

    def __init__(self, kalle: Kalle, request: SpeechRequest) -> None:
        audio = TextAudio(kalle, request)
        self.sample_rate, self.seed = kalle.sample_rate, audio.seed
        self.latency_frames = audio.latency_frames
        """Frames that must exist beyond a piece before it is final."""
        super().__init__(kalle.lm, audio)


class RequestStream(_Stream):
    """Pieces of one request, float32 (n,), as they become final; ``speech`` and ``close`` are as in ``SpeechStream``."""

    def __init__(self, lm: KalleLM, flowvae: FlowVAE, decoder: StreamingDecoder, request: Request) -> None:
        super().__init__(lm, RequestAudio(flowvae, decoder, request))

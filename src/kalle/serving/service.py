"""The parts that the routes of the API share: the engine, the voices, the limits and the numbers for a monitor."""

# Annotations are evaluated here: FastAPI reads them.
import asyncio
import base64
import binascii
import contextlib
import os
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import anyio
import numpy as np
from anyio import to_thread
from fastapi import Request
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from kalle.errors import UserError
from kalle.evaluation.alignment import WordAligner
from kalle.serving.engine import Engine, EngineLimits, Job
from kalle.serving.handlers import without_folders
from kalle.serving.server import LOOPBACK
from kalle.serving.shapes import ApiError, SentenceTime, SpeechBody, VoiceFields, VoiceId, WordTime
from kalle.serving.voices import STORED, UPLOAD_PREFIX, VoiceChoice, VoiceStore
from kalle.synthesis.options import GenerationOptions, SpeechRequest, check_seed
from kalle.synthesis.speech import Speech
from kalle.synthesis.voice import RANDOM_VOICE, GivenVoice, composed
from kalle.text.frontend import GIVEN_PHONEMES
from kalle.text.languages import detect_language

PORT = 8000
MODELS_OWN = "default"
"""The voice that leaves the choice to the model."""
_POLL_SECONDS = 0.2
_UPLOAD = re.compile(rf"'?\b{UPLOAD_PREFIX}\w+'?")
"""The name of an upload while it is decoded, which says nothing to its sender."""


@dataclass(frozen=True)
class ServeOptions:
    """Address and limits of the API."""

    host: str = LOOPBACK
    port: int = PORT
    """0 takes a free one."""
    voices: Path = Path("voices")
    """Folder of uploaded voices."""
    keys: tuple[str, ...] = ()
    """API keys; without one everybody who reaches the server may use it."""
    names: tuple[str, ...] = ()
    """Names of the model; by default that of its folder."""
    web: bool = False
    """Whether the page is served too, at `PAGE`."""
    max_text: int = 5000
    """Characters of one text."""
    max_upload_bytes: int = 20 * 2**20
    """Of a recording."""
    grace_s: float = 30.0
    """How long requests may go on after SIGTERM."""
    limits: EngineLimits = field(default_factory=EngineLimits)
    stall_s: float = 60.0
    """How long a client may take nothing of its answer."""


def default_voices() -> Path:
    """``$XDG_DATA_HOME/kalle/voices``, by default ``~/.local/share/kalle/voices``: an installed package is not written to."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "kalle" / "voices"


class Service:
    """The engine, the voices and the limits, which the routes share."""

    def __init__(self, engine: Engine, options: ServeOptions, temporary: Path) -> None:
        self.engine, self.kalle, self.options = engine, engine.kalle, options
        self.voices = VoiceStore(engine.kalle, options.voices, temporary)
        self.names = options.names or ("kalle" if self.kalle.folder is None else self.kalle.folder.resolve().name,)
        self.began = int(time.time())
        self.metrics = Metrics(engine)
        self._voice_work = anyio.CapacityLimiter(2)
        self._align = WordAligner()
        self._align_work = anyio.CapacityLimiter(1)

    @property
    def folders(self) -> tuple[Path, ...]:
        """Folders that messages must not name."""
        return (self.options.voices, self.voices.temporary, *(() if self.kalle.folder is None else (self.kalle.folder,)))

    async def request(self, body: VoiceFields, text: str, **options: Any) -> SpeechRequest:
        """``text`` as ``body`` wants it spoken. ApiError and UserError for what cannot be."""
        if len(text) > self.options.max_text:
            raise ApiError(
                400, f"the input is too long: got {len(text)} characters, expected at most {self.options.max_text}; split it", "input"
            )
        seed = secrets.randbelow(2**31) if body.seed is None else check_seed(body.seed)
        chosen = GenerationOptions(seed=seed, temperature=body.temperature, language=body.language, **options)
        voice = await self.in_thread(lambda: self._voice(body), self._voice_work)
        return SpeechRequest(text, voice, chosen)

    async def submit(self, request: SpeechRequest, streamed: bool) -> Job:
        """The job of ``request``. Raises what ``Engine.submit`` does."""
        return await self.in_thread(lambda: self.engine.submit(request, streamed))

    async def in_thread(self, work: Callable[[], Any], limiter: anyio.CapacityLimiter | None = None) -> Any:
        """The result of ``work``, done in another thread; UserErrors name no folder or file of this machine."""
        try:
            return await to_thread.run_sync(work, limiter=limiter)
        except UserError as error:
            raise UserError(_UPLOAD.sub("the recording", without_folders(str(error), self.folders))) from None

    def check_transcript(self, text: str | None) -> None:
        """ApiError for a recording without its words, where the weights need them."""
        if not self.kalle.has_speaker_encoder and not (text or "").strip():
            raise ApiError(400, "a recording without its transcript: got no ref_text, expected the words that are spoken in it", "ref_text")

    def check_model(self, name: str) -> None:
        """ApiError unless this model is served."""
        if name not in self.names:
            raise ApiError(404, f"no such model: got {name!r:.60}, expected {' or '.join(self.names)}", "model", "model_not_found")

    async def check_times(self, body: SpeechBody) -> None:
        """ApiError where ``body`` asks for times of words and no recogniser of its language is installed: before anything is spoken."""
        if body.timestamps != "word":
            return
        try:
            await self.in_thread(lambda: self._align.check(self._language(body, body.input)), self._align_work)
        except UserError as error:
            raise ApiError(400, f"no times of words: {error}; or use timestamps sentence", "timestamps", "aligner_missing") from None

    async def times(self, body: SpeechBody, speech: Speech, request: Request) -> tuple[list[SentenceTime], list[str]]:
        """Where the sentences of ``speech`` are in the audio, in seconds after the change of speed, and their words where asked for.

        The words are those that the model got, numbers in words. Also warnings: a sentence whose words cannot be placed has none. For a
        client of ``request`` that has gone nothing more is placed.
        """
        found: list[SentenceTime] = []
        warnings: list[str] = []
        for text, start_s, end_s, spoken in [
            (part.sentence.spoken, part.start_s, part.end_s, part.speech) for part in speech.parts
        ] or [(speech.text, 0.0, speech.seconds, speech)]:  # fmt: skip
            time = SentenceTime(text=text, start=_after(start_s, body.speed), end=_after(end_s, body.speed))
            if body.timestamps == "word" and not await request.is_disconnected():
                # A sentence at a time, so that those of other requests come between.
                work = partial(self._align, spoken.audio, spoken.sample_rate, _plain(spoken.text), self._language(body, body.input))
                try:
                    heard = await self.in_thread(work, self._align_work)
                except (UserError, RuntimeError, ValueError) as error:  # CTranslate2 has its own limits of a text
                    warnings.append(f"sentence {len(found) + 1} has no times of words: {error}")
                else:
                    time.words = [
                        WordTime(word=at.text, start=_after(start_s + at.start_s, body.speed), end=_after(start_s + at.end_s, body.speed))
                        for at in heard
                    ]
            found.append(time)
        return found, warnings

    def _language(self, body: SpeechBody, text: str) -> str:
        chosen = self.kalle.config.language_of(text, GenerationOptions(language=body.language))
        return chosen or detect_language(_plain(text))

    def _voice(self, body: VoiceFields) -> GivenVoice:
        name = body.voice.id if isinstance(body.voice, VoiceId) else body.voice
        if body.ref_audio is not None:
            if name not in (None, MODELS_OWN):
                raise ApiError(400, f"two voices: got voice {name!r:.60} and ref_audio, expected one of them; leave one out", "voice")
            self.check_transcript(body.ref_text)
            return self.voices.of_bytes(_base64(body.ref_audio, self.options.max_upload_bytes), body.ref_text)
        if body.ref_text is not None:
            raise ApiError(400, "a transcript without its recording: got ref_text alone; send ref_audio too", "ref_text")
        if name == RANDOM_VOICE:
            return RANDOM_VOICE
        if name in (None, MODELS_OWN):
            return None
        name = composed(name)
        if name not in self.voices.names():
            known = ", ".join([*self.voices.names()[:20], RANDOM_VOICE, MODELS_OWN])
            raise ApiError(404, f"no such voice: got {name!r:.60}, expected {known}; see /v1/audio/voices", "voice", "voice_not_found")
        return self.voices.voice(VoiceChoice(STORED, name))


def _base64(content: str, most: int) -> bytes:
    head, mark, rest = content.partition(";base64,")
    data = rest if mark and head.startswith("data:") else content
    if len(data) > 4 * (most // 3 + 1):
        raise ApiError(413, f"the recording is too large: expected at most {most} bytes; send a shorter one", "ref_audio")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(
            400, "bad ref_audio: expected base64 of an audio file; encode the file itself, for no address or path is opened", "ref_audio"
        ) from None


class Metrics:
    """The numbers for Prometheus: those of the engine, and what clients saw."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self._engine = engine
        seconds = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 1, 2, 5, 10, 30, 60, 120, 300)
        self.first_audio = Histogram(
            "kalle_first_audio_seconds", "From a request to its first audio, streamed ones.", buckets=seconds, registry=self.registry
        )
        self.request = Histogram("kalle_request_seconds", "From a request to its end.", buckets=seconds, registry=self.registry)
        self.answers = Counter("kalle_answers", "Answers by path and status.", ["path", "status"], registry=self.registry)
        self.registry.register(cast("Any", self))
        ProcessCollector(registry=self.registry)  # memory, processor time and open files, where the system tells them

    def collect(self) -> Iterator[Any]:
        """The state of the engine."""
        state = self._engine.state
        yield GaugeMetricFamily("kalle_requests_waiting", "Requests that have not begun.", state.waiting)
        yield GaugeMetricFamily("kalle_rows", "Texts in the batch.", state.rows)
        yield CounterMetricFamily("kalle_frames", "Frames made.", state.frames)
        yield CounterMetricFamily("kalle_steps", "Steps of the batch; frames over steps is its mean size.", state.steps)
        yield CounterMetricFamily("kalle_audio_seconds", "Audio handed out.", state.audio_seconds)
        endings = CounterMetricFamily("kalle_requests", "Requests by how they ended.", labels=["ending"])
        for ending, count in state.endings.items():
            endings.add_metric([ending], count)
        yield endings

    def ended(self, job: Job) -> None:
        """Count a request that is over."""
        self.request.observe(time.monotonic() - job.asked_s)
        if job.streamed and job.first_audio_s is not None:
            self.first_audio.observe(job.first_audio_s)


async def audio_of(job: Job) -> AsyncIterator[np.ndarray]:
    """The pieces of ``job`` (n,) as they come; raises its error at the end. Leaving it early cancels the job."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def tell() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens any more
            loop.call_soon_threadsafe(changed.set)

    job.listen(tell)
    try:
        while True:
            await changed.wait()
            changed.clear()
            pieces, last = job.take()
            for piece in pieces:
                yield piece
            if last:
                break
        if job.error is not None:
            raise job.error
    finally:
        job.cancel()


async def whole_of(job: Job, request: Request) -> Speech:
    """The result of ``job``; a client that goes away cancels it."""

    async def watch() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(_POLL_SECONDS)
        job.cancel()

    watching = asyncio.create_task(watch())
    try:
        async for _ in audio_of(job):
            pass
    finally:
        watching.cancel()
    return job.speech


def _after(seconds: float, speed: float) -> float:
    """A time of the speech in audio of another ``speed``, to the millisecond."""
    return round(seconds / speed, 3)


def _plain(text: str) -> str:
    """``text`` without the phonemes that a client wrote into it."""
    return GIVEN_PHONEMES.sub(r"\1", text)


def nothing_spoken(seed: int) -> ApiError:
    """The error for speech that has no frame."""
    return ApiError(500, f"the model ended the speech before its first frame, with seed {seed}; try another seed", code="no_speech")

"""Requests of the page, their jobs, and the one worker that speaks them piece by piece."""

from __future__ import annotations

import secrets
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kalle.audio import Audio, to_pcm16, write_audio
from kalle.errors import UserError
from kalle.serving.voices import VoiceChoice, VoiceStore, check_voice
from kalle.synthesis.generate import Request
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.options import GenerationOptions, SpeechRequest, StopRule
from kalle.synthesis.speech import FloatArray, Speech
from kalle.synthesis.voice import Voice
from kalle.text.prompt import check_text

DEFAULT_MAX_TEXT = 5000


@dataclass(frozen=True)
class PageRequest:
    """One press of "Speak"."""

    text: str
    voice: VoiceChoice = field(default_factory=VoiceChoice)
    seed: int | None = None
    temperature: float | None = None
    max_seconds: float | None = None


def check_request(request: PageRequest, max_text: int, needs_transcript: bool) -> None:
    """Refuse with a UserError what can be seen wrong without the model; ``max_text`` in characters."""
    check_text(request.text, "text")
    if len(request.text) > max_text:
        raise UserError(f"the text is too long: got {len(request.text)} characters, expected at most {max_text}; shorten it")
    check_voice(request.voice, needs_transcript)


class Job:
    """One request and its audio. Made by one thread, read and stopped by others."""

    def __init__(self, request: PageRequest) -> None:
        self.request = request
        self.token = secrets.token_urlsafe(16)
        """Names the audio in its address; whoever doesn't know it can't listen."""
        self.begun = False
        """Whether its turn has come."""
        self.finished = False
        self.path: Path | None = None
        """The result, removed with the job."""
        self._pieces: list[bytes] = []
        self._stopped = threading.Event()

    @property
    def stopped(self) -> bool:
        """Whether the user stopped it."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """Ask the job to end after the piece it is making."""
        self._stopped.set()

    def add(self, audio: NDArray[np.floating]) -> None:
        """Hand out another piece of audio (n,) in [-1, 1]."""
        self._pieces.append(to_pcm16(audio).astype("<i2").tobytes())

    def finish(self) -> None:
        """No more audio comes."""
        self.finished = True

    def pieces(self, start: int) -> tuple[list[bytes], bool]:
        """The pieces from number ``start`` on, little-endian PCM16, and whether they are the last."""
        finished = self.finished  # Read first: a piece added after this is found on the next call.
        return self._pieces[start:], finished


class Jobs:
    """The latest job of every session, in the order of the requests."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()

    def begin(self, session: str, request: PageRequest) -> Job:
        """A new job in the place of the session's former one, which is stopped."""
        with self._lock:
            self._drop(session)
            job = self._jobs[session] = Job(request)
            return job

    def of(self, session: str) -> Job | None:
        """The session's latest job."""
        return self._jobs.get(session)

    def find(self, token: str) -> Job | None:
        """The job whose audio ``token`` names."""
        with self._lock:
            return next((job for job in self._jobs.values() if secrets.compare_digest(job.token.encode(), token.encode())), None)

    def ahead(self, job: Job) -> int:
        """How many unfinished jobs came before ``job``."""
        with self._lock:
            jobs = list(self._jobs.values())
        return sum(not other.finished for other in jobs[: jobs.index(job)]) if job in jobs else 0

    def stop(self, session: str) -> bool:
        """Stop the session's job, at once where it hasn't begun; whether there was one to stop."""
        job = self.of(session)
        if job is None or job.finished:
            return False
        job.stop()
        if not job.begun:
            job.finish()
        return True

    def forget(self, session: str) -> None:
        """Stop and drop the session's job, for its page is closed."""
        with self._lock:
            self._drop(session)

    def _drop(self, session: str) -> None:
        job = self._jobs.pop(session, None)
        if job is not None:
            job.stop()
            job.finish()
            if job.path is not None:
                job.path.unlink(missing_ok=True)


class Stopped(Exception):
    """The user stopped the job."""


@dataclass(frozen=True)
class StoppableRule(StopRule):
    """A stop rule, checked at every frame, that raises ``Stopped`` once the job is stopped."""

    job: Job | None = None

    def stops(self, end_kl: float, index: int, stop_probability: float | None = None) -> bool:
        """As ``StopRule.stops``."""
        if self.job is not None and self.job.stopped:
            raise Stopped
        return super().stops(end_kl, index, stop_probability)


class StoppableKalle(Kalle):
    """The same model for one job: it stops at the next frame once the job is stopped, and keeps the results."""

    def __init__(self, kalle: Kalle, job: Job) -> None:
        # The parts and their caches are shared, so this costs nothing.
        self.__dict__.update(kalle.__dict__)
        self._job = job
        self._results: list[Speech] = []

    def resolve(self, request: SpeechRequest) -> Request:
        """As ``Kalle.resolve``, with a rule that looks at the job."""
        rule = request.options.stop or self.config.stop
        stoppable = StoppableRule(rule.threshold, rule.min_index, self._job, probability=rule.probability)
        return super().resolve(replace(request, options=request.options.changed(stop=stoppable)))

    def speak(self, request: SpeechRequest) -> Speech:
        """As ``Kalle.speak``."""
        speech = super().speak(request)
        self._results.append(speech)
        return speech

    def of_latents(self, latents: FloatArray) -> Speech:
        """The result that has these very ``latents`` (T, D)."""
        return next(speech for speech in self._results if speech.latents is latents)


@dataclass(frozen=True)
class JobProgress:
    """The state of a running job: ``seconds`` of audio exist after ``elapsed_seconds`` of work on ``sentences``."""

    seconds: float
    elapsed_seconds: float
    sentences: int = 1


@dataclass(frozen=True)
class SpokenSentence:
    """One sentence of a result."""

    text: str
    speech: Speech
    """As the model said it; in a longer text its level may have been evened afterwards."""
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class JobResult:
    """The end of a job that made audio."""

    path: Path
    """A WAV file of it."""
    seconds: float
    seed: int
    lines: tuple[SpokenSentence, ...]
    elapsed_seconds: float
    """From the voice being ready to the last piece; making the voice is not in it."""
    stopped: bool
    """Whether the user ended it."""
    unspoken: tuple[str, ...] = ()
    """Parts of the text that are not words."""


@dataclass
class _RunningJob:
    """A job that is being spoken."""

    job: Job
    kalle: StoppableKalle
    started: float = field(default_factory=time.perf_counter)
    audio: list[Audio] = field(default_factory=list)
    lines: list[SpokenSentence] = field(default_factory=list)
    seed: int = 0
    unspoken: tuple[str, ...] = ()

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    @property
    def seconds(self) -> float:
        return sum(map(len, self.audio)) / self.kalle.sample_rate

    def publish(self, audio: Audio, sentences: int = 1) -> JobProgress:
        self.audio.append(audio)
        self.job.add(audio)
        return JobProgress(self.seconds, self.elapsed, sentences)


class Backend:
    """The model, jobs and voices behind one page; a context manager that removes its temporary files."""

    def __init__(self, kalle: Kalle, voices: Path, max_text: int = DEFAULT_MAX_TEXT) -> None:
        """``voices`` is where kept voices go; ``max_text`` in characters."""
        if max_text < 1:
            raise UserError(f"bad limit of the text: got {max_text} characters, expected at least 1; raise --max-text")
        self._temporary = tempfile.TemporaryDirectory(prefix="kalle-web-")
        self.temporary = Path(self._temporary.name)
        """Removed with the backend."""
        self.kalle, self.max_text = kalle, max_text
        self.jobs = Jobs()
        self.voices = VoiceStore(kalle, voices, self.temporary)

    @property
    def folders(self) -> tuple[Path, ...]:
        """Folders that messages on the page must not name."""
        return (self.temporary, self.voices.folder, *(() if self.kalle.folder is None else (self.kalle.folder,)))

    def __enter__(self) -> Backend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the temporary files."""
        self._temporary.cleanup()

    def begin(self, session: str, request: PageRequest) -> Job:
        """Accept a request and stop the session's former one; a UserError when it can't be spoken."""
        check_request(request, self.max_text, not self.kalle.has_speaker_encoder)
        return self.jobs.begin(session, request)

    def speak(self, job: Job) -> Iterator[JobProgress | JobResult]:
        """Make the audio of ``job`` and hand it out through the job. The last value is the result.

        One sentence comes in pieces of a few frames, a longer text sentence by sentence (``kalle.synthesis.longform``). Nothing
        follows when the job was stopped before its first piece. UserError for what the model cannot speak.
        """
        job.begun = True
        try:
            if not job.stopped:
                yield JobProgress(0.0, 0.0)
                yield from self._speak(job)
        finally:
            job.finish()

    def _speak(self, job: Job) -> Iterator[JobProgress | JobResult]:
        from kalle.text.sentences import split_sentences

        voice = self.voices.voice(job.request.voice)
        running = _RunningJob(job, StoppableKalle(self.kalle, job))
        several = len(split_sentences(job.request.text, self.kalle.config.language)) > 1
        stopped = False
        try:
            yield from _say_all(running, voice) if several else _say_one(running, voice)
        except Stopped:
            stopped = True
        if running.seconds:
            yield self._spoken(running, stopped)
        elif not stopped:
            raise UserError(f"the model ended the speech before its first frame: got no audio with seed {running.seed}; try another seed")

    def _spoken(self, running: _RunningJob, stopped: bool) -> JobResult:
        elapsed = running.elapsed
        path = running.job.path = self.temporary / f"kalle-{running.job.token[:8]}.wav"
        write_audio(path, np.concatenate(running.audio), self.kalle.sample_rate)
        return JobResult(path, running.seconds, running.seed, tuple(running.lines), elapsed, stopped, running.unspoken)


def _say_one(running: _RunningJob, voice: Voice | None) -> Iterator[JobProgress]:
    request = running.job.request
    stream = running.kalle.stream(request.text, voice, seed=request.seed, temperature=request.temperature, max_seconds=request.max_seconds)
    running.seed = stream.seed
    try:
        for piece in stream:
            yield running.publish(piece)
    finally:
        speech = stream.speech
        running.lines.append(SpokenSentence(request.text.strip(), speech, speech.warnings))


def _say_all(running: _RunningJob, voice: Voice | None) -> Iterator[JobProgress]:
    from kalle.synthesis.longform import LongForm

    request = running.job.request
    options = GenerationOptions(seed=request.seed, temperature=request.temperature, max_seconds=request.max_seconds)
    form = LongForm(running.kalle, request.text, voice, options)
    running.seed, running.unspoken = form.seed, tuple(gap for _, gap in form.unspoken)
    yield JobProgress(0.0, running.elapsed, len(form))
    for part in form:
        running.lines.append(SpokenSentence(part.speech.text, running.kalle.of_latents(part.speech.latents), part.warnings))
        yield running.publish(part.with_pause, len(form))

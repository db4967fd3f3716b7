"""The page's one worker: takes what was asked for, makes the audio piece by piece and says what came of it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kalle.audio import Audio, write_audio
from kalle.errors import UserError
from kalle.serving.asked import Asked, check_asked
from kalle.serving.attentive import AttentiveKalle, Stopped
from kalle.serving.jobs import Job, Jobs
from kalle.serving.shelf import VoiceShelf
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.speech import Speech
from kalle.synthesis.voice import Voice

DEFAULT_MAX_TEXT = 5000


@dataclass(frozen=True)
class Progress:
    """Where a job is; ``seconds`` of audio exist after ``elapsed_seconds`` of work on ``sentences``."""

    seconds: float
    elapsed_seconds: float
    sentences: int = 1


@dataclass(frozen=True)
class Line:
    """One sentence of a result."""

    text: str
    speech: Speech
    """As the model said it; in a longer text its level may have been evened afterwards."""
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Spoken:
    """The end of a job that made audio."""

    path: Path
    """A WAV file of it."""
    seconds: float
    seed: int
    lines: tuple[Line, ...]
    elapsed_seconds: float
    """From the voice being ready to the last piece; making the voice is not in it."""
    stopped: bool
    """Whether the user ended it."""
    unspoken: tuple[str, ...] = ()
    """Parts of the text that are not words."""


@dataclass
class _Take:
    """A job on its way."""

    job: Job
    kalle: AttentiveKalle
    started: float = field(default_factory=time.perf_counter)
    audio: list[Audio] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    seed: int = 0
    unspoken: tuple[str, ...] = ()

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    @property
    def seconds(self) -> float:
        return sum(map(len, self.audio)) / self.kalle.sample_rate

    def hand_out(self, audio: Audio, sentences: int = 1) -> Progress:
        self.audio.append(audio)
        self.job.add(audio)
        return Progress(self.seconds, self.elapsed, sentences)


class Studio:
    """Everything behind the page for one model; use it as a context, for its temporary files go with it."""

    def __init__(self, kalle: Kalle, voices: Path, max_text: int = DEFAULT_MAX_TEXT) -> None:
        """``voices`` is where kept voices go; ``max_text`` in characters."""
        if max_text < 1:
            raise UserError(f"bad limit of the text: got {max_text} characters, expected at least 1; raise --max-text")
        self._temporary = tempfile.TemporaryDirectory(prefix="kalle-web-")
        self.temporary = Path(self._temporary.name)
        """Everything that goes with the studio."""
        self.kalle, self.max_text = kalle, max_text
        self.jobs = Jobs()
        self.shelf = VoiceShelf(kalle, voices, self.temporary)

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where its files are, for messages that must not tell."""
        return (self.temporary, self.shelf.folder, *(() if self.kalle.folder is None else (self.kalle.folder,)))

    def __enter__(self) -> Studio:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the temporary files."""
        self._temporary.cleanup()

    def begin(self, session: str, asked: Asked) -> Job:
        """Accept a request and stop the session's former one; a UserError when it can't be spoken."""
        check_asked(asked, self.max_text, not self.kalle.has_speaker_encoder)
        return self.jobs.begin(session, asked)

    def speak(self, job: Job) -> Iterator[Progress | Spoken]:
        """Make the audio of ``job`` and hand it out through the job. The last value is the result.

        One sentence comes in pieces of a few frames, a longer text sentence by sentence (``kalle.synthesis.longform``). Nothing
        follows when the job was stopped before its first piece. UserError for what the model cannot speak.
        """
        job.begun = True
        try:
            if not job.stopped:
                yield Progress(0.0, 0.0)
                yield from self._speak(job)
        finally:
            job.finish()

    def _speak(self, job: Job) -> Iterator[Progress | Spoken]:
        from kalle.text.sentences import split_sentences

        voice = self.shelf.voice(job.asked.voice)
        take = _Take(job, AttentiveKalle(self.kalle, job))
        several = len(split_sentences(job.asked.text, self.kalle.config.language)) > 1
        stopped = False
        try:
            yield from _say_all(take, voice) if several else _say_one(take, voice)
        except Stopped:
            stopped = True
        if take.seconds:
            yield self._spoken(take, stopped)
        elif not stopped:
            raise UserError(f"the model ended the speech before its first frame: got no audio with seed {take.seed}; try another seed")

    def _spoken(self, take: _Take, stopped: bool) -> Spoken:
        elapsed = take.elapsed
        path = take.job.path = self.temporary / f"kalle-{take.job.token[:8]}.wav"
        write_audio(path, np.concatenate(take.audio), self.kalle.sample_rate)
        return Spoken(path, take.seconds, take.seed, tuple(take.lines), elapsed, stopped, take.unspoken)


def _say_one(take: _Take, voice: Voice | None) -> Iterator[Progress]:
    asked = take.job.asked
    stream = take.kalle.stream(asked.text, voice, seed=asked.seed, temperature=asked.temperature, max_seconds=asked.max_seconds)
    take.seed = stream.request.seed
    try:
        for piece in stream:
            yield take.hand_out(piece)
    finally:
        speech = stream.speech
        take.lines.append(Line(asked.text.strip(), speech, speech.warnings))


def _say_all(take: _Take, voice: Voice | None) -> Iterator[Progress]:
    from kalle.synthesis.longform import LongForm
    from kalle.synthesis.longform_part import LongFormOptions

    asked = take.job.asked
    options = LongFormOptions(take.kalle.config.language, temperature=asked.temperature, max_seconds=asked.max_seconds)
    form = LongForm(take.kalle, asked.text, voice, seed=asked.seed, options=options)
    take.seed, take.unspoken = form.seed, tuple(gap for _, gap in form.unspoken)
    yield Progress(0.0, take.elapsed, len(form))
    for part in form:
        take.lines.append(Line(part.spoken, take.kalle.of_latents(part.latents), part.warnings))
        yield take.hand_out(part.with_pause, len(form))

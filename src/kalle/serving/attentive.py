"""A model that listens to the stop button while it works."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kalle.serving.jobs import Job
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.request import SpeechRequest
from kalle.synthesis.row import StopRule
from kalle.synthesis.speak import Request
from kalle.synthesis.speech import FloatArray, Speech


class Stopped(Exception):
    """The user has had enough."""


@dataclass(frozen=True)
class StoppableRule(StopRule):
    """A stop rule, asked at every frame, that raises ``Stopped`` once the job is stopped."""

    job: Job | None = None

    def stops(self, end_kl: float, index: int, stop_probability: float | None = None) -> bool:
        """As ``StopRule.stops``."""
        if self.job is not None and self.job.stopped:
            raise Stopped
        return super().stops(end_kl, index, stop_probability)


class AttentiveKalle(Kalle):
    """The same model for one job: it stops at the next frame when the job does, and remembers what it said."""

    def __init__(self, kalle: Kalle, job: Job) -> None:
        # The parts and their caches are shared, so this costs nothing.
        self.__dict__.update(kalle.__dict__)
        self._job = job
        self._said: list[Speech] = []

    def resolve(self, request: SpeechRequest) -> Request:
        """As ``Kalle.resolve``, with a rule that listens."""
        rule = request.stop or self.config.stop
        heard = StoppableRule(rule.threshold, rule.min_index, self._job, probability=rule.probability)
        return super().resolve(replace(request, stop=heard))

    def speak(self, request: SpeechRequest) -> Speech:
        """As ``Kalle.speak``."""
        speech = super().speak(request)
        self._said.append(speech)
        return speech

    def of_latents(self, latents: FloatArray) -> Speech:
        """What was said with these very ``latents`` (T, D)."""
        return next(speech for speech in self._said if speech.latents is latents)

"""Requests in progress: one a browser session, with the audio it has made so far."""

from __future__ import annotations

import secrets
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kalle.audio import to_pcm16
from kalle.serving.asked import Asked


class Job:
    """One request and its audio. Made by one thread, read and stopped by others."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
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
        """Whether the user has had enough."""
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
    """The latest job of every session, in the order they were asked for."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()

    def begin(self, session: str, asked: Asked) -> Job:
        """A new job in the place of the session's former one, which is stopped."""
        with self._lock:
            self._drop(session)
            job = self._jobs[session] = Job(asked)
            return job

    def of(self, session: str) -> Job | None:
        """The session's latest job."""
        return self._jobs.get(session)

    def find(self, token: str) -> Job | None:
        """The job whose audio ``token`` names."""
        with self._lock:
            return next((job for job in self._jobs.values() if secrets.compare_digest(job.token.encode(), token.encode())), None)

    def ahead(self, job: Job) -> int:
        """How many unfinished jobs were asked for before ``job``."""
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
        """Stop and drop the session's job: its page is gone."""
        with self._lock:
            self._drop(session)

    def _drop(self, session: str) -> None:
        job = self._jobs.pop(session, None)
        if job is not None:
            job.stop()
            job.finish()
            if job.path is not None:
                job.path.unlink(missing_ok=True)

"""The engine behind every server: many texts through one model at once, in two threads.

At every turn the first takes one frame of every text that is being spoken, in one batch (`kalle.synthesis.batch`). The second
decodes those frames that make a piece of audio and hands the piece out, while the first goes on. Texts join and leave between
frames, and sentences of a long text queue like texts of their own, so that a long text never takes more than one place and short
ones pass it. What a text sounds like depends neither on the others nor on when they come.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import secrets
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kalle.errors import UserError
from kalle.models.flowvae.streaming import StreamingDecoder
from kalle.synthesis.adapter import Adapter
from kalle.synthesis.batch import DEFAULT_FRAME_BUDGET, BatchedGenerator, BatchEvent
from kalle.synthesis.generate import Ending, FloatArray, Frame, Request, Watcher
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.options import SpeechRequest
from kalle.synthesis.speech import Speech, finish
from kalle.synthesis.stream import FrameAudio, RequestAudio, TextAudio

LOGGER = logging.getLogger(__name__)
WHOLE_CHUNK_FRAMES = 16
"""Frames that are decoded together where nobody waits for the first of them."""
IDLE_SECONDS = 0.05
"""How often jobs are looked at that wait for the decoder alone: one may be cancelled, or late."""
SLOW_RETRY_SECONDS = 10
"""When to come back where clients take their audio too slowly."""
_NOTHING = np.zeros(0, dtype=np.float32)


class ServingError(RuntimeError):
    """A request that could not be served through no fault of its own; the message is for its client."""


class QueueFullError(ServingError):
    """Too many requests wait, or too much audio for clients who take it slowly; after ``retry_after_s`` seconds there may be room."""

    def __init__(self, reason: str, retry_after_s: int) -> None:
        super().__init__(f"too many requests: {reason}, which is the most; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class OverdueError(ServingError):
    """The request took longer than one may."""


class ClosedError(ServingError):
    """The engine was closed before the request was done."""


class EngineError(ServingError):
    """The engine failed while the request was spoken: a bug, or no memory. The next request starts anew."""


@dataclass(frozen=True)
class EngineLimits:
    """How much may be asked of an engine. UserError for a limit that allows nothing."""

    rows: int = 16
    """Texts that are spoken at once."""
    queue: int = 64
    """Texts that may wait for their turn."""
    seconds: float = 300.0
    """Longest that a request may take, its waiting included."""
    frame_budget: int = DEFAULT_FRAME_BUDGET
    """Positions of the language model's cache, rows times the longest."""
    joins: int = 2
    """Texts that may begin in one turn: each is read before the frames of the others, which wait for it."""
    unread_seconds: float = 3600.0
    """Audio that may wait for clients who take it slowly, all of them together; beyond it no request is taken."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise UserError(f"bad limit of the engine: got {field.name} {value}, expected more than 0; raise it")


class Job:
    """One text on its way. The engine's threads make its audio; others read, wait for and cancel it."""

    def __init__(self, audio: FrameAudio, seed: int, streamed: bool, sample_rate: int, deadline: float) -> None:
        self.seed, self.streamed, self.sample_rate = seed, streamed, sample_rate
        self.began = self.finished = self.cancelled = False
        self.error: Exception | None = None
        """Why it ended without a result: a UserError for what the request asked, else a ServingError."""
        self.asked_s = time.monotonic()
        self.first_audio_s: float | None = None
        """Seconds from the request to its first audio."""
        self._audio, self._deadline = audio, deadline
        self._frames: list[Frame] = []
        self._place: tuple[_Group, int] | None = None
        """Where its row is, while it has one."""
        self._ended = self._queued = False
        """Whether it is over, told or about to be; and whether it waits for the decoder, or is there."""
        self._last: BatchEvent | None = None
        """The event that ended its current request, until the decoder has taken it."""
        self._failure: Exception | None = None
        """The failure that the decoder met, until the row is taken out of its batch."""
        self._unread = 0
        """Samples that nobody has taken yet."""
        self._pieces: deque[FloatArray] = deque()
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], None]] = []

    @property
    def speech(self) -> Speech:
        """The result; of a cancelled stream everything that was handed out. To be read once it is finished; raises its error."""
        assert self.finished, "a job that is still being spoken"
        if self.error is not None:
            raise self.error
        return self._audio.speech

    def take(self) -> tuple[list[FloatArray], bool]:
        """The audio (n,) that came since the last call, in pieces, and whether it is the last. An error comes after the last piece."""
        with self._changed:
            pieces = list(self._pieces)
            self._pieces.clear()
            self._unread = 0
            return pieces, self.finished

    def pieces(self) -> Iterator[FloatArray]:
        """The audio as it comes; the whole in one piece where the job is not streamed. Raises the error of the job at its end."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pieces or self.finished)
            pieces, last = self.take()
            yield from pieces
            if last:
                if self.error is not None:
                    raise self.error
                return

    def result(self) -> Speech:
        """Wait for the end and return the result, or raise the error."""
        with self._changed:
            self._changed.wait_for(lambda: self.finished)
        return self.speech

    def cancel(self) -> None:
        """End it: its place is free at the next frame. Harmless once it is finished."""
        self.cancelled = True

    def listen(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` from a thread of the engine at every piece and at the end, and once now."""
        with self._changed:
            self._listeners.append(listener)
        listener()

    def _tell(self, piece: FloatArray = _NOTHING, finished: bool = False, error: Exception | None = None) -> None:
        with self._changed:
            if self.finished:
                return
            if len(piece):
                self._pieces.append(piece)
                self._unread += len(piece)
                if self.first_audio_s is None:
                    self.first_audio_s = time.monotonic() - self.asked_s
            if finished:
                self.error, self.finished = error, True
                try:
                    self._audio.close()
                finally:
                    self._changed.notify_all()
            else:
                self._changed.notify_all()
            listeners = list(self._listeners)
        for listener in listeners:
            listener()


class _WholeAudio:
    """A text as ``Kalle.speak`` gives it, all of it at the end: bad endings are tried again, sentences brought to one level."""

    def __init__(self, kalle: Kalle, request: SpeechRequest, decoder: StreamingDecoder) -> None:
        self._kalle, self._decoder = kalle, decoder
        self._asking = kalle.asking(request)
        self._speech: Speech | None = None
        self._begin(next(self._asking))

    @property
    def request(self) -> Request:
        return self._current.request

    @property
    def watcher(self) -> Watcher | None:
        return self._current.watcher

    @property
    def wanted(self) -> int:
        return max(self._current.wanted, WHOLE_CHUNK_FRAMES)

    @property
    def done(self) -> bool:
        return self._speech is not None

    @property
    def speech(self) -> Speech:
        return self._current.speech if self._speech is None else self._speech

    def push(self, frames: Sequence[Frame], ending: Ending | None) -> FloatArray:
        self._frames += frames
        self._current.push(frames, ending)
        if ending is None:
            return _NOTHING
        try:
            self._begin(self._asking.send(self._spoken(ending)))
        except StopIteration as end:
            self._speech = end.value
            return self.speech.audio
        return _NOTHING

    def close(self) -> None:
        self._current.close()
        self._asking.close()

    def _begin(self, request: Request) -> None:
        self._current, self._frames = RequestAudio(self._kalle.flowvae, self._decoder, request), list[Frame]()

    def _spoken(self, ending: Ending) -> Speech:
        """The speech of the current request; where frames are cut from its end it is decoded anew without them, as ``speak`` does."""
        if self._current.kept_frames is None:
            return self._current.speech
        return finish(self._kalle.flowvae, self._frames, ending[0], self.request, watcher=self.watcher, end_frame=ending[1])


class _Group:
    """The rows of one adapter, or of none, which one batch speaks."""

    def __init__(self, kalle: Kalle, adapter: Adapter | None, frame_budget: int) -> None:
        self.adapter = adapter
        self.generator = BatchedGenerator(kalle.lm if adapter is None else adapter.applied_to(kalle.lm), frame_budget)
        self.jobs: dict[int, Job] = {}

    def add(self, job: Job) -> None:
        request = dataclasses.replace(job._audio.request, adapter=None)
        handle = self.generator.add(request, job._audio.watcher)
        self.jobs[handle], job._place = job, (self, handle)

    def remove(self, job: Job) -> None:
        assert job._place is not None
        group, handle = job._place
        assert group is self
        self.generator.cancel(handle)
        del self.jobs[handle]
        job._place = None


@dataclass(frozen=True)
class EngineState:
    """The state and the totals of an engine, for a monitor."""

    waiting: int
    """Requests that have not begun."""
    rows: int
    """Texts in the batch."""
    frames: int
    """Frames made so far."""
    steps: int
    """Turns of the model so far; frames over steps is the mean size of the batch."""
    audio_seconds: float
    """Audio handed out so far."""
    endings: dict[str, int]
    """How many requests ended how: a stop reason, "cancelled", or the kind of an error."""


class Engine:
    """Speaks texts for any number of threads; a context manager that ends its own two.

    The CPU threads that torch may use are shared out between them, at least one each.

    ``submit`` returns at once with a `Job`. With the same seed a job gives what ``Kalle.synthesize`` (streamed: ``Kalle.stream``) gives,
    up to rounding in a batch. An error of one request ends that one; a failure of the model ends those it was speaking, each with an
    `EngineError`, and the next starts anew.
    """

    def __init__(self, kalle: Kalle, limits: EngineLimits | None = None) -> None:
        self.kalle, self.limits = kalle, limits or EngineLimits()
        decoder = kalle.streaming_decoder()
        exact = decoder.exact_latency_frames
        self._whole_decoder = decoder if decoder.latency_frames == exact else StreamingDecoder(kalle.flowvae, exact)
        self._groups: dict[int, _Group] = {}
        self._jobs: list[Job] = []
        """All that are not finished, in the order of the requests."""
        self._ready: deque[Job] = deque()
        """Those whose next sentence waits for a row."""
        self._told: weakref.WeakSet[Job] = weakref.WeakSet()
        """All that somebody may still read."""
        self._work: deque[Job] = deque()
        """Those that have frames for the decoder."""
        self._over: deque[tuple[Job, Exception | None]] = deque()
        """Jobs that ended and are not told yet."""
        self._lock = threading.Condition()
        self._closing: float | None = None
        self._frames = self._steps = 0
        self._audio_seconds, self._usual_seconds = 0.0, 1.0
        self._endings: Counter[str] = Counter()
        # On CUDA the two take turns, as one thread did before; whether they gain by overlapping there has not been measured.
        self._alone = threading.Lock() if kalle.device.type == "cuda" else contextlib.nullcontext()
        self._speaking = True
        threads = torch.get_num_threads()
        started = threading.Barrier(3)
        self._thread = threading.Thread(target=self._run, args=(max(1, threads // 2), started), name="kalle engine", daemon=True)
        self._decoder = threading.Thread(
            target=self._decode, args=(max(1, threads - threads // 2), started), name="kalle decoder", daemon=True
        )
        self._thread.start()
        self._decoder.start()
        started.wait()
        torch.set_num_threads(threads)  # for the threads that come after

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._closing is None and self._thread.is_alive()

    @property
    def state(self) -> EngineState:
        """Its state now and its totals so far."""
        with self._lock:
            waiting = sum(not job.began for job in self._ready)
            rows = sum(len(group.jobs) for group in list(self._groups.values()))
            return EngineState(waiting, rows, self._frames, self._steps, self._audio_seconds, dict(self._endings))

    def submit(self, request: SpeechRequest, streamed: bool = False) -> Job:
        """Queue ``request``. ``streamed`` hands the audio out in pieces, and tries no bad ending again.

        UserError for what cannot be spoken, guidance and the release's ways of computing among it, for they share no batch;
        QueueFullError and ClosedError.
        """
        self.check_room()  # before the work on the text
        seed = secrets.randbelow(2**31) if request.options.seed is None else request.options.seed
        seeded = SpeechRequest(request.text, request.voice, request.options.changed(seed=seed))
        audio: FrameAudio = TextAudio(self.kalle, seeded) if streamed else _WholeAudio(self.kalle, seeded, self._whole_decoder)
        if audio.request.alone:
            raise UserError("requests share a batch: got guidance or a way of computing of the release, expected neither; leave them out")
        job = Job(audio, seed, streamed, self.kalle.sample_rate, time.monotonic() + self.limits.seconds)
        with self._lock:
            self.check_room()
            self._jobs.append(job)
            self._ready.append(job)
            self._told.add(job)
            self._lock.notify_all()
        return job

    def ahead(self, job: Job) -> int:
        """How many requests that have not begun come before ``job``; 0 once it has."""
        with self._lock:
            waiting = [each for each in self._ready if not each.began]
            return waiting.index(job) if job in waiting else 0

    def close(self, grace_s: float = 0.0) -> None:
        """Take no more requests, let those there are go on for ``grace_s`` seconds, end the others with a ClosedError."""
        with self._lock:
            if self._closing is None:
                self._closing = time.monotonic() + grace_s
            self._lock.notify_all()
        if threading.current_thread() not in (self._thread, self._decoder):
            self._thread.join()
            self._decoder.join()

    def check_room(self) -> None:
        """QueueFullError or ClosedError where no request would be taken now."""
        if not self.alive:
            raise ClosedError("the server is shutting down; try again in a minute")
        with self._lock:
            waiting = sum(not job.began for job in self._ready)
            unread = sum(job._unread for job in self._told if not job.cancelled) / self.kalle.sample_rate
        if waiting >= self.limits.queue:
            raise QueueFullError(f"{waiting} are waiting", max(1, math.ceil(self._usual_seconds * waiting / self.limits.rows)))
        if unread >= self.limits.unread_seconds:
            raise QueueFullError(f"{unread:.0f} s of audio wait for clients to take them", SLOW_RETRY_SECONDS)

    def _run(self, threads: int, started: threading.Barrier) -> None:
        """The thread of the language model, which has as many CPU ``threads``."""
        _use_threads(threads)
        started.wait()
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._jobs or self._closing is not None)
                if self._jobs and not self._ready and not any(job._place for job in self._jobs):
                    self._lock.wait(IDLE_SECONDS)  # all of them are with the decoder
                if self._closing is not None and (not self._jobs or time.monotonic() >= self._closing):
                    break
            try:
                self._turn()
            except Exception as error:
                LOGGER.exception("the engine failed; its requests end, and the next one starts anew")
                self._lose(list(self._jobs), error)
        for job in list(self._jobs):
            self._end(job, ClosedError("the server was shut down before the speech was done; try again in a minute"))
        with self._lock:
            self._speaking = False
            self._lock.notify_all()

    def _decode(self, threads: int, started: threading.Barrier) -> None:
        """The thread of the decoder, which has as many CPU ``threads``: pieces of audio, and the ends of jobs."""
        _use_threads(threads)
        started.wait()
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._over or self._work or not self._speaking)
                if not (self._over or self._work):
                    return
                over = self._over.popleft() if self._over else None
                job = self._next_work() if over is None else over[0]
            try:
                if over is not None:
                    job._tell(finished=True, error=over[1])
                elif not job._ended and job._failure is None:
                    self._decode_piece(job)
            except Exception as error:
                if job._ended:
                    LOGGER.exception("the decoder failed at the end of a text")
                job._failure = error  # its row is the other thread's to take out

    def _next_work(self) -> Job:
        """Whose frames are decoded next: that of somebody who has heard nothing yet comes first."""
        first = next((index for index, job in enumerate(self._work) if job.streamed and job.first_audio_s is None), 0)
        job = self._work[first]
        del self._work[first]
        return job

    def _decode_piece(self, job: Job) -> None:
        """One piece of ``job``, and its ending where nothing is left. Pieces are those of a stream alone, however late the decoder is."""
        wanted = job._audio.wanted
        with self._lock:
            last = job._last
            # A frame that comes with the ending belongs to the last piece.
            more = len(job._frames) > wanted or (len(job._frames) == wanted and (last is None or last.frame is None))
            frames, job._frames = (job._frames[:wanted], job._frames[wanted:]) if more or last is None else (job._frames, [])
            ending = None if more or last is None else last.ending
            if ending is not None:
                job._last = None
        with self._alone:
            piece = job._audio.push(frames, ending)
        wanted = 0 if job._audio.done else job._audio.wanted
        with self._lock:
            self._audio_seconds += len(piece) / job.sample_rate
            job._queued = ending is None and (job._last is not None or len(job._frames) >= wanted)
            if job._queued:
                self._work.append(job)
        job._tell(piece)
        if job._audio.done:
            self._end(job)
        elif ending is not None:
            with self._lock:
                if not job._ended:
                    self._ready.append(job)
                self._lock.notify_all()

    def _turn(self) -> None:
        """One frame of everything that is being spoken."""
        self._sweep()
        self._admit()
        for key, group in list(self._groups.items()):
            if not group.jobs:
                del self._groups[key]
                continue
            try:
                with self._alone:
                    events = group.generator.step()
            except Exception as error:
                LOGGER.exception("the model failed; the texts it was speaking end, and the next one starts anew")
                self._lose(list(group.jobs.values()), error)
                continue
            self._steps += 1
            for event in events:
                self._take(group.jobs[event.handle], event)

    def _sweep(self) -> None:
        """End what was cancelled or takes too long."""
        now = time.monotonic()
        for job in list(self._jobs):
            if job._failure is not None:
                self._fail(job, job._failure)
            elif job.cancelled:
                self._end(job)
            elif now >= job._deadline:
                self._end(job, OverdueError(f"the request took longer than {self.limits.seconds:g} s; shorten the text, or try later"))

    def _admit(self) -> None:
        """Give free rows to the first of those that wait."""
        for _ in range(self.limits.joins):
            with self._lock:
                job = self._ready[0] if self._ready else None
                rows = sum(len(group.jobs) for group in self._groups.values())
            if job is None or rows >= self.limits.rows:
                return
            try:
                adapter = job._audio.request.adapter
                group = self._groups.get(id(adapter))
                if group is None:
                    group = self._groups[id(adapter)] = _Group(self.kalle, adapter, self.limits.frame_budget)
                if not group.generator.has_room(job._audio.request):
                    return
                with self._lock:
                    self._ready.popleft()
                job.began = True
                group.add(job)
            except Exception as error:
                self._fail(job, error)

    def _take(self, job: Job, event: BatchEvent) -> None:
        """Keep the frame of ``event``, and tell the decoder where the frames of ``job`` make a piece."""
        assert job._place is not None
        if event.error is not None:
            self._end(job, event.error)
            return
        if event.ending is not None:
            job._place[0].remove(job)
        with self._lock:
            if event.frame is not None:
                self._frames += 1
                job._frames.append(event.frame)
            if event.ending is not None:
                job._last = event
            if not job._queued and (event.ending is not None or len(job._frames) >= job._audio.wanted):
                job._queued = True
                self._work.append(job)
                self._lock.notify_all()

    def _fail(self, job: Job, error: Exception) -> None:
        """End one ``job``, whose own ``error`` does not touch the others."""
        if not isinstance(error, UserError):
            LOGGER.error("a request failed", exc_info=error)
            error = EngineError("the server failed while it spoke this text; try again")
        self._end(job, error)

    def _lose(self, jobs: Sequence[Job], error: Exception) -> None:
        """End ``jobs`` after a failure of the model; the batches that spoke them cannot be used any more."""
        self._groups = {key: group for key, group in self._groups.items() if not any(job in jobs for job in group.jobs.values())}
        for job in jobs:
            job._place = None
            self._end(job, EngineError(f"the server failed while it spoke this text ({type(error).__name__}); try again"))

    def _end(self, job: Job, error: Exception | None = None) -> None:
        """Free all that ``job`` holds; whoever waits for it is told by the decoder's thread, which may be at work on it."""
        if job._place is not None:
            job._place[0].remove(job)
        how = _ending(job, error)
        with self._lock:
            if job._ended:
                return
            job._ended = True
            self._jobs.remove(job)
            if job in self._ready:
                self._ready.remove(job)
            if error is None and not job.cancelled:
                self._usual_seconds += 0.1 * (time.monotonic() - job.asked_s - self._usual_seconds)
            self._endings[how] += 1
            self._over.append((job, error))
            self._lock.notify_all()


def _use_threads(count: int) -> None:
    """Let torch compute with ``count`` CPU threads in this thread; whoever calls it then restores the number of new threads."""
    torch.get_num_threads()  # a thread takes the number of the process when it first needs one: now, and not after the next line
    torch.set_num_threads(count)


def _ending(job: Job, error: Exception | None) -> str:
    if error is not None:
        return "refused" if isinstance(error, UserError) else type(error).__name__.removesuffix("Error").lower()
    return "cancelled" if job.cancelled else job._audio.speech.stop_reason

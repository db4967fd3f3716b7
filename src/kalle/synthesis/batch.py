"""Many requests through one model at once, each with the very result it has alone."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kalle.errors import UserError, check_type
from kalle.models.flowvae import FlowVAE
from kalle.models.lm import KalleLM, NextFrame
from kalle.models.lm_state import LMState
from kalle.synthesis.generate import Ending, Frame, FrameModel, FrameWatcher, Request, RowSampler, StopReason, check_request, draw_frames
from kalle.synthesis.options import NO_GUIDANCE
from kalle.synthesis.release_compat import ConvertedModels
from kalle.synthesis.speech import (
    Speech,
    allowed_retries,
    finish,
    keep_best,
    log_retry,
    needs_retry,
    retry_request,
    speak,
    start,
    watcher_of,
)

DEFAULT_FRAME_BUDGET = 8192
"""Positions of the cache: eight utterances at the longest cap, or some sixty of ten seconds."""


class RowError(UserError):
    """A row that cannot continue, by its ``handle``; ``reason`` is the message without it."""

    def __init__(self, handle: int, reason: str) -> None:
        super().__init__(f"request {handle} of the batch, counted from 0: {reason}")
        self.handle, self.reason = handle, reason


@dataclass(frozen=True)
class BatchEvent:
    """One step of one row: a ``frame`` of speech or none, and the ``ending`` where the row is over, or the ``error`` that ended it."""

    handle: int
    frame: Frame | None
    ending: Ending | None
    error: UserError | None = None


@dataclass(frozen=True)
class Generated:
    """The result of ``generate`` for one request: its frames, why they ended, and the end frame where there was one."""

    frames: list[Frame]
    stop_reason: StopReason
    end_frame: Frame | None
    generator: torch.Generator
    """Where the request's noise stands after the last draw."""


@dataclass
class _Row:
    """A request in the batch; ``z`` (D,) is its last frame, None until there is one."""

    handle: int
    sampler: RowSampler
    positions: int
    context: tuple[Tensor, Tensor | None, Tensor | None]
    z: Tensor | None = None

    @property
    def last(self) -> Tensor:
        """The frame that is fed back."""
        assert self.z is not None
        return self.z

    def see(self, frame: Frame) -> BatchEvent:
        """Take ``frame``; an error where it is not finite."""
        self.z = frame.z
        try:
            return BatchEvent(self.handle, *self.sampler.see(frame))
        except UserError as error:
            return BatchEvent(self.handle, None, None, error)


class BatchedGenerator:
    """A running batch: requests join when there is room, in the order they came, and leave when they end.

    Use it from one thread; after an exception from ``step`` (memory, say) start anew. Rows times the longest of them (its
    context and its length cap, in positions) stays within ``frame_budget``: this bounds the cache, which is held twice for
    the moment in which rows join or leave. A request beyond the budget runs alone. A row's frames do not depend on the
    others, because its context is read alone, its noise is its own, and its padding is masked.
    """

    def __init__(self, lm: FrameModel, frame_budget: int = DEFAULT_FRAME_BUDGET) -> None:
        self._lm = lm
        self._budget = check_budget(frame_budget)
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []
        self._state: LMState | None = None
        self._added = 0

    @property
    def active(self) -> tuple[int, ...]:
        """Handles in the batch."""
        return tuple(row.handle for row in self._rows)

    @property
    def waiting(self) -> tuple[int, ...]:
        """Handles that have not begun."""
        return tuple(row.handle for row in self._waiting)

    @property
    def positions(self) -> int:
        """The share of the frame budget that is taken: rows times the longest."""
        return len(self._rows) * max((row.positions for row in self._rows), default=0)

    def add(self, request: Request, watcher: FrameWatcher | None = None, generator: torch.Generator | None = None) -> int:
        """Queue ``request`` and return its handle. UserError for a value the loop cannot use, or compatibility that needs another model.

        The noise comes from ``request.noise``, or else from ``generator``, by default one seeded with ``request.seed``.
        """
        if request.options.compatibility.changes_model:
            raise UserError("a batch runs one model: got a request with config_dtype or no_cache, expected neither; speak it alone")
        if request.options.guidance != NO_GUIDANCE:
            raise UserError(f"a batch is not guided: got a request with guidance {request.options.guidance!r}, expected 1; speak it alone")
        if request.adapter is not None:
            raise UserError("a batch runs one model: got a request with an adapter, expected none; `Kalle.synthesize_batch` sorts them")
        check_request(self._lm, request)
        generator = generator or torch.Generator().manual_seed(request.seed)
        sampler = RowSampler(request, self._lm.config.latent_dim, generator, watcher)
        handle, self._added = self._added, self._added + 1
        self._waiting.append(_Row(handle, sampler, request.positions, request.context))
        return handle

    def cancel(self, handle: int) -> bool:
        """Take a request out, with no event for it; False when it had already ended."""
        here = handle in self.active or handle in self.waiting
        self._waiting = deque(row for row in self._waiting if row.handle != handle)
        if handle in self.active:
            self._keep([row.handle != handle for row in self._rows])
        return here

    def has_room(self, request: Request) -> bool:
        """Whether ``request`` would come into the batch at the next step, with those that wait already."""
        return self._fits(request.positions, [*self._rows, *self._waiting])

    @torch.no_grad()
    def step(self) -> list[BatchEvent]:
        """One frame for every row that is or comes into the batch; no events when nothing is left to do.

        A row whose frame is not finite leaves the batch, and its event has the error.
        """
        predictions = []
        if self._state is not None:
            prediction, self._state = self._lm.step(torch.stack([row.last for row in self._rows]), self._state)
            predictions.append(prediction)
        predictions += self._admit()
        if not predictions:
            return []
        frames = draw_frames(NextFrame.cat(predictions), [row.sampler for row in self._rows])
        events = [row.see(frame) for row, frame in zip(self._rows, frames, strict=True)]
        self._keep([event.ending is None and event.error is None for event in events])
        return events

    def _admit(self) -> list[NextFrame]:
        """Read the contexts of the waiting requests there is room for, and put them at the end of the batch."""
        predictions, states = [], [] if self._state is None else [self._state]
        while self._waiting and self._fits(self._waiting[0].positions, self._rows):
            row = self._waiting.popleft()
            text_ids, prompt, speaker = (None if part is None else part.to(self._lm.device) for part in row.context)
            assert text_ids is not None
            prediction, state = self._lm.prefill(text_ids, prompt, speaker)
            self._rows.append(row)
            predictions.append(prediction)
            states.append(state)
        if predictions:
            self._state = LMState.join(states)
        return predictions

    def _fits(self, positions: int, rows: Sequence[_Row]) -> bool:
        longest = max([positions, *(row.positions for row in rows)])
        return not rows or (len(rows) + 1) * longest <= self._budget

    def _keep(self, kept: Sequence[bool]) -> None:
        numbers = [number for number, keep in enumerate(kept) if keep]
        self._rows = [self._rows[number] for number in numbers]
        if self._state is not None:
            self._state = self._state.select(numbers) if numbers else None


def iterate_batch(
    lm: FrameModel,
    requests: Iterable[Request],
    *,
    frame_budget: int = DEFAULT_FRAME_BUDGET,
    watcher: Callable[[Request], FrameWatcher | None] = lambda request: None,
) -> Iterator[tuple[int, Generated]]:
    """Yield (index of the request, what it gave) as each of ``requests`` ends; ``watcher`` makes the watcher of a request.

    UserError before the first frame for a value the loop cannot use; ``RowError`` where a frame is not finite, which ends all rows
    that have not ended: what was yielded before stays the caller's.
    """
    engine = BatchedGenerator(lm, frame_budget)
    generators = []
    for request in requests:
        generators.append(torch.Generator().manual_seed(request.seed))
        engine.add(request, watcher(request), generators[-1])
    return _until_done(engine, generators)


def _until_done(engine: BatchedGenerator, generators: Sequence[torch.Generator]) -> Iterator[tuple[int, Generated]]:
    frames: list[list[Frame]] = [[] for _ in generators]
    while events := engine.step():
        for event in events:
            if event.error is not None:  # the model would give such frames to others too: nothing of this step is kept
                raise RowError(event.handle, str(event.error)) from None
        for event in events:
            if event.frame is not None:
                frames[event.handle].append(event.frame)
            if event.ending is not None:
                done, frames[event.handle] = frames[event.handle], []
                yield event.handle, Generated(done, *event.ending, generators[event.handle])


def generate_batch(
    lm: FrameModel,
    requests: Iterable[Request],
    *,
    frame_budget: int = DEFAULT_FRAME_BUDGET,
    watcher: Callable[[Request], FrameWatcher | None] = lambda request: None,
) -> list[Generated]:
    """The results of ``generate`` for ``requests``, in their order; see ``iterate_batch``. An error loses all of them."""
    done = dict(iterate_batch(lm, requests, frame_budget=frame_budget, watcher=watcher))
    return [done[index] for index in range(len(done))]


def check_budget(frame_budget: int) -> int:
    """``frame_budget`` itself; a UserError unless it allows at least one frame."""
    check_type("frame budget", frame_budget, int | np.integer, "a whole number")
    if frame_budget < 1:
        raise UserError(f"bad frame budget: got {frame_budget}, expected at least 1; a request beyond the budget runs alone")
    return frame_budget


def speak_batch(
    lm: KalleLM,
    flowvae: FlowVAE,
    requests: Sequence[Request],
    frame_budget: int = DEFAULT_FRAME_BUDGET,
    converted: ConvertedModels | None = None,
) -> list[Speech]:
    """The results of ``speak_with_retries`` for ``requests``, in their order.

    A round speaks every request that still needs a try; the next round tries the bad endings again, together.
    ``converted`` is that of ``ReleaseCompatibility.language_model``. UserError before anything is spoken for a value the loop cannot
    use. Where a frame is not finite while they are spoken, the UserError names the request, and all results are lost.
    """
    allowed = [allowed_retries(request) for request in requests]
    converted = {} if converted is None else converted
    check_budget(frame_budget)
    for index, request in enumerate(requests):
        with _named(index):
            start(lm, request, converted=converted)
    tries: list[list[Speech]] = [[] for _ in requests]
    waiting = list(enumerate(requests))
    while waiting:
        for index, speech in _round(lm, flowvae, waiting, frame_budget, converted):
            tries[index].append(speech)
        again = [index for index, _ in waiting if needs_retry(tries[index][-1]) and len(tries[index]) <= allowed[index]]
        waiting = [(index, retry_request(requests[index], len(tries[index]))) for index in again]
        for index, request in waiting:
            log_retry(tries[index][-1], request, len(tries[index]), allowed[index])
    return [keep_best(each) for each in tries]


def _round(
    lm: KalleLM, flowvae: FlowVAE, waiting: Sequence[tuple[int, Request]], frame_budget: int, converted: ConvertedModels
) -> Iterator[tuple[int, Speech]]:
    """One try of each of ``waiting``, (index, request); every row is decoded as it ends, so that its frames need not wait in memory.

    Those of one adapter are spoken together, one adapter after the other; one that is guided, or of another model, comes last, alone.
    """
    groups: dict[int, list[tuple[int, Request]]] = {}
    for index, request in waiting:
        if not request.alone:
            groups.setdefault(id(request.adapter), []).append((index, request))
    for group in groups.values():
        yield from _together(lm, flowvae, group, frame_budget)
    for index, request in waiting:
        if request.alone:
            with _named(index):
                yield index, speak(lm, flowvae, request, converted)


def _together(lm: KalleLM, flowvae: FlowVAE, group: Sequence[tuple[int, Request]], frame_budget: int) -> Iterator[tuple[int, Speech]]:
    """One try of each of ``group``, (index, request) of one adapter or none, in one running batch."""
    adapter = group[0][1].adapter
    plain = [dataclasses.replace(request, adapter=None) for _, request in group]
    watchers = [watcher_of(flowvae, request) for request in plain]
    waiting = iter(watchers)
    adapted = lm if adapter is None else adapter.applied_to(lm)
    try:
        for row, result in iterate_batch(adapted, plain, frame_budget=frame_budget, watcher=lambda _: next(waiting)):
            yield (
                group[row][0],
                finish(flowvae, result.frames, result.stop_reason, plain[row], result.generator, watchers[row], result.end_frame),
            )
    except RowError as error:
        with _named(group[error.handle][0]):
            raise UserError(error.reason) from None


@contextmanager
def _named(index: int) -> Iterator[None]:
    """Say in a UserError of the block which request it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"request {index} of the batch, counted from 0: {error}") from None

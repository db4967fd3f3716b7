"""Many requests through the whole chain together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from kalle.errors import UserError
from kalle.models.flowvae import FlowVAE
from kalle.models.lm import KalleLM
from kalle.synthesis.batching import DEFAULT_FRAME_BUDGET, RowError, check_budget, iterate_batch
from kalle.synthesis.quirks import ConvertedModels
from kalle.synthesis.retry import allowed_retries, keep_best, log_retry, needs_retry, retry_request
from kalle.synthesis.speak import Request, finish, speak, start, watcher_of
from kalle.synthesis.speech import Speech


def speak_batch(
    lm: KalleLM,
    flowvae: FlowVAE,
    requests: Sequence[Request],
    retries: Sequence[int],
    frame_budget: int = DEFAULT_FRAME_BUDGET,
    converted: ConvertedModels | None = None,
) -> list[Speech]:
    """What ``speak_with_retries`` gives for each of ``requests`` with its number of ``retries``, in their order.

    A round speaks every request that still needs a try; the next round tries the bad endings again, together.
    ``converted`` is that of ``ReleaseQuirks.language_model``. UserError before anything is spoken for a value the loop cannot
    use. Where a frame is not finite while they are spoken, the UserError names the request, and all results are lost.
    """
    allowed = [allowed_retries(request, count) for request, count in zip(requests, retries, strict=True)]
    converted = {} if converted is None else converted
    _check(lm, requests, frame_budget, converted)
    tries: list[list[Speech]] = [[] for _ in requests]
    open_ones = list(range(len(requests)))
    while open_ones:
        round_requests = [retry_request(requests[index], len(tries[index])) for index in open_ones]
        for index, speech in _round(lm, flowvae, open_ones, round_requests, frame_budget, converted):
            tries[index].append(speech)
        open_ones = [index for index in open_ones if needs_retry(tries[index][-1]) and len(tries[index]) <= allowed[index]]
        for index in open_ones:
            log_retry(tries[index][-1], retry_request(requests[index], len(tries[index])), len(tries[index]), allowed[index])
    return [keep_best(each) for each in tries]


def _check(lm: KalleLM, requests: Sequence[Request], frame_budget: int, converted: ConvertedModels) -> None:
    """UserError for anything that could not be spoken; it makes the other models that are needed."""
    check_budget(frame_budget)
    for index, request in enumerate(requests):
        try:
            start(lm, request, converted=converted)
        except UserError as error:
            raise _named(index, str(error)) from None


def _round(
    lm: KalleLM,
    flowvae: FlowVAE,
    indices: Iterable[int],
    requests: Sequence[Request],
    frame_budget: int,
    converted: ConvertedModels,
) -> Iterator[tuple[int, Speech]]:
    """One try of each of ``requests``; every row is decoded as it ends, so that its frames need not wait in memory.

    Those of one adapter are spoken together, one adapter after the other; one that is guided, or of another model, comes last, alone.
    """
    numbers = list(indices)
    for together in _groups(requests):
        yield from _together(lm, flowvae, [(numbers[index], requests[index]) for index in together], frame_budget)
    for index in [index for index, request in enumerate(requests) if request.alone]:
        try:
            yield numbers[index], speak(lm, flowvae, requests[index], converted)
        except UserError as error:
            raise _named(numbers[index], str(error)) from None


def _groups(requests: Sequence[Request]) -> list[list[int]]:
    """Indices of the requests that can share a batch, by their adapter, in the order of their first."""
    groups: dict[int, list[int]] = {}
    for index, request in enumerate(requests):
        if not request.alone:
            groups.setdefault(id(request.adapter), []).append(index)
    return list(groups.values())


def _together(lm: KalleLM, flowvae: FlowVAE, group: Sequence[tuple[int, Request]], frame_budget: int) -> Iterator[tuple[int, Speech]]:
    """One try of each of ``group``, (number, request) of one adapter or none, in one running batch."""
    adapter = group[0][1].adapter
    plain = [dataclasses.replace(request, adapter=None) for _, request in group]
    watchers = [watcher_of(flowvae, request) for request in plain]
    waiting = iter(watchers)
    adapted = lm if adapter is None else adapter.applied_to(lm)
    try:
        for row, result in iterate_batch(adapted, plain, frame_budget=frame_budget, watcher=lambda _: next(waiting)):
            yield group[row][0], finish(flowvae, result.frames, result.stop_reason, plain[row], result.generator, watchers[row])
    except RowError as error:
        raise _named(group[error.handle][0], error.reason) from None


def _named(index: int, reason: str) -> UserError:
    return UserError(f"request {index} of the batch, counted from 0: {reason}")

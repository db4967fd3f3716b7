"""Many requests through the whole chain together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from kalle.models.flowvae import FlowVAE
from kalle.models.lm import KalleLM
from kalle.synthesis.batching import DEFAULT_FRAME_BUDGET, iterate_batch
from kalle.synthesis.retry import allowed_retries, keep_best, needs_retry, retry_request
from kalle.synthesis.speak import Request, finish, speak, watcher_of
from kalle.synthesis.speech import Speech


def speak_batch(
    lm: KalleLM, flowvae: FlowVAE, requests: Sequence[Request], retries: Sequence[int], frame_budget: int = DEFAULT_FRAME_BUDGET
) -> list[Speech]:
    """What ``speak_with_retries`` gives for each of ``requests`` with its number of ``retries``, in their order.

    A round speaks every request that still needs a try; the next round tries the bad endings again, together.
    UserError before anything is spoken for a value the loop cannot use.
    """
    allowed = [allowed_retries(request, count) for request, count in zip(requests, retries, strict=True)]
    tries: list[list[Speech]] = [[] for _ in requests]
    open_ones = list(range(len(requests)))
    while open_ones:
        round_requests = [retry_request(requests[index], len(tries[index])) for index in open_ones]
        for index, speech in _round(lm, flowvae, open_ones, round_requests, frame_budget):
            tries[index].append(speech)
        open_ones = [index for index in open_ones if needs_retry(tries[index][-1]) and len(tries[index]) <= allowed[index]]
    return [keep_best(each) for each in tries]


def _round(
    lm: KalleLM, flowvae: FlowVAE, indices: Iterable[int], requests: Sequence[Request], frame_budget: int
) -> Iterator[tuple[int, Speech]]:
    """One try of each of ``requests``; every row is decoded as it ends, so that its frames need not wait in memory.

    One whose quirks need another model is spoken after the others, alone.
    """
    numbers = list(indices)
    together = [index for index, request in enumerate(requests) if not request.quirks.changes_model]
    watchers = [watcher_of(flowvae, requests[index]) for index in together]
    waiting = iter(watchers)
    generated = iterate_batch(lm, [requests[index] for index in together], frame_budget=frame_budget, watcher=lambda _: next(waiting))
    for row, result in generated:
        index = together[row]
        speech = finish(flowvae, result.frames, result.stop_reason, requests[index], result.generator, watchers[row])
        yield numbers[index], speech
    for index in sorted(set(range(len(requests))) - set(together)):
        yield numbers[index], speak(lm, flowvae, requests[index])

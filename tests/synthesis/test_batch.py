from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from speech_requests import request_of

from kalle.errors import UserError
from kalle.models.lm import KalleLM
from kalle.synthesis import Frame, Generation, StopRule
from kalle.synthesis.batch import BatchedGenerator, Generated, RowError, generate_batch, iterate_batch
from kalle.synthesis.generate import Request
from kalle.synthesis.generate import run_row as generate_request
from kalle.synthesis.release_compat import ReleaseCompatibility

DIM, HIDDEN = 8, 64
NEVER = StopRule(threshold=0.0)
AT_ONCE = StopRule(threshold=1e9, min_index=-1)


def request(seed: int, length: int = 6, cap: int = 12, prompt: int = 0, speaker: bool = False, **options) -> Request:
    generator = torch.Generator().manual_seed(1000 + seed)
    return request_of(
        torch.randint(0, 320, (length,), generator=generator),
        cap,
        seed,
        prompt_latents=torch.randn(prompt, DIM, generator=generator) if prompt else None,
        speaker_latent=torch.randn(HIDDEN, generator=generator) if speaker else None,
        **{"stop": NEVER, **options},
    )


def alone(lm: KalleLM, asked: Request) -> tuple[Generation, list[Frame], torch.Generator]:
    generator = torch.Generator().manual_seed(asked.seed)
    generation = generate_request(lm, asked, generator)
    return generation, list(generation), generator


def assert_same_frame(got: Frame, expected: Frame) -> None:
    torch.testing.assert_close(got.z, expected.z, rtol=0, atol=1e-4)
    torch.testing.assert_close(got.distribution.mean, expected.distribution.mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(got.distribution.log_std, expected.distribution.log_std, rtol=0, atol=1e-4)
    assert got.end_kl == pytest.approx(expected.end_kl, abs=1e-4)
    assert not got.z.requires_grad


def assert_as_alone(lm: KalleLM, asked: Request, got: Generated) -> None:
    generation, frames, generator = alone(lm, asked)
    assert (got.stop_reason, len(got.frames)) == (generation.stop_reason, len(frames))
    for one, other in zip(got.frames, frames, strict=True):
        assert_same_frame(one, other)
    assert (got.end_frame is None) == (generation.end_frame is None)
    if got.end_frame is not None:
        assert_same_frame(got.end_frame, generation.end_frame)
    assert torch.equal(got.generator.get_state(), generator.get_state()), "whoever draws on gets the same values"


any_request = st.builds(
    request,
    seed=st.integers(0, 10_000),
    length=st.integers(1, 30),
    cap=st.integers(1, 24),
    prompt=st.sampled_from([0, 0, 1, 5, 17]),
    speaker=st.booleans(),
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
    # The tiny model's end divergences lie between 0.4 and 1.3.
    stop=st.builds(StopRule, threshold=st.sampled_from([0.0, 0.55, 0.6, 0.65, 0.75, 1e9]), min_index=st.integers(-1, 8)),
    compatibility=st.builds(ReleaseCompatibility, drop_last_frame_always=st.booleans(), drop_last_prompt_frame=st.booleans()),
)


@settings(deadline=None, max_examples=12, derandomize=True)
@given(requests=st.lists(any_request, min_size=1, max_size=6), frame_budget=st.sampled_from([1, 60, 200, 10_000]))
def test_a_batch_equals_one_by_one(lm_tiny: KalleLM, requests: list[Request], frame_budget: int) -> None:
    together = generate_batch(lm_tiny, requests, frame_budget=frame_budget)
    assert len(together) == len(requests)
    for asked, got in zip(requests, together, strict=True):
        assert_as_alone(lm_tiny, asked, got)


def test_long_rows_of_every_kind_agree_to_their_last_frame(lm_tiny: KalleLM) -> None:
    requests = [
        request(1, length=40, cap=15),
        request(2, length=3, cap=60),
        request(3, length=9, cap=45, prompt=30, stop=StopRule(0.6, 20)),
        request(4, length=9, cap=30, prompt=4, speaker=True, temperature=0.0),
        request(5, cap=50, noise=torch.randn(50, DIM, generator=torch.Generator().manual_seed(0))),
    ]
    together = generate_batch(lm_tiny, requests)
    assert {got.stop_reason for got in together} == {"end", "max_frames"}
    assert len({len(got.frames) for got in together}) == 5, "the rows end at different times"
    for asked, got in zip(requests, together, strict=True):
        assert_as_alone(lm_tiny, asked, got)


def test_a_batch_equals_the_release(lm_tiny: KalleLM, io: Callable) -> None:
    golden = io("lm_tiny")
    ids, noise, prompt = golden["input_ids"], golden["noise"].reshape(24, DIM), golden["prompt_latents"][0]
    dropping = ReleaseCompatibility(drop_last_frame_always=True)
    requests = [
        request_of(ids, 24, 0, stop=NEVER, noise=noise, compatibility=dropping),
        request_of(ids, 24, 0, stop=StopRule(float(golden["stop_threshold_prompted"])), noise=noise, prompt_latents=prompt),
        request_of(ids, 24, 0, stop=NEVER, noise=noise, prompt_latents=prompt, compatibility=dropping),
        request_of(ids, 24, 0, stop=StopRule(float(golden["guard_threshold_unprompted"])), noise=noise),
    ]
    together = generate_batch(lm_tiny, requests)
    expected = [23, int(golden["stop_length_prompted"]), 23, int(golden["guard_length_unprompted"])]
    assert [len(got.frames) for got in together] == expected
    assert [got.stop_reason for got in together] == ["max_frames", "end", "max_frames", "end"]
    for got, name in ((together[0], "unprompted"), (together[2], "prompted")):
        parameters = torch.stack([torch.cat([f.distribution.mean, f.distribution.log_std]) for f in got.frames], dim=1)[None]
        torch.testing.assert_close(parameters, golden[f"distributions_{name}"], rtol=1e-4, atol=1e-5)


def test_one_row_is_bit_for_bit_what_generate_gives(lm_tiny: KalleLM) -> None:
    asked = request(3, prompt=5, cap=20)
    (got,) = generate_batch(lm_tiny, [asked])
    _, frames, _ = alone(lm_tiny, asked)
    assert all(torch.equal(one.z, other.z) for one, other in zip(got.frames, frames, strict=True))


def test_no_requests_give_nothing(lm_tiny: KalleLM) -> None:
    assert generate_batch(lm_tiny, []) == []
    assert BatchedGenerator(lm_tiny).step() == []


def test_rows_that_end_at_their_first_frame(lm_tiny: KalleLM) -> None:
    requests = [request(1, stop=AT_ONCE), request(2, length=20), request(3, cap=1), request(4, stop=AT_ONCE, length=15)]
    for budget in (1, 10_000):
        together = generate_batch(lm_tiny, requests, frame_budget=budget)
        assert [(len(got.frames), got.stop_reason) for got in together] == [(0, "end"), (12, "max_frames"), (1, "max_frames"), (0, "end")]
        for asked, got in zip(requests, together, strict=True):
            assert_as_alone(lm_tiny, asked, got)


def test_the_order_of_requests_does_not_matter(lm_tiny: KalleLM) -> None:
    requests = [request(seed, length=3 + 5 * seed, cap=20 - 3 * seed, prompt=seed) for seed in range(5)]
    order = [3, 0, 4, 2, 1]
    straight = generate_batch(lm_tiny, requests, frame_budget=150)
    shuffled = generate_batch(lm_tiny, [requests[index] for index in order], frame_budget=150)
    for place, index in enumerate(order):
        assert len(shuffled[place].frames) == len(straight[index].frames)
        for one, other in zip(shuffled[place].frames, straight[index].frames, strict=True):
            assert_same_frame(one, other)


def test_results_come_as_rows_end(lm_tiny: KalleLM) -> None:
    requests = [request(0, cap=9), request(1, cap=3), request(2, cap=6)]
    assert [index for index, _ in iterate_batch(lm_tiny, requests)] == [1, 2, 0]


@pytest.fixture
def cache_sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows, columns) of the cache after each step of the model."""
    seen: list[tuple[int, int]] = []
    step: Callable = KalleLM.step

    def spy(self, z, state):
        prediction, state = step(self, z, state)
        seen.append((state.rows, state.length))
        return prediction, state

    monkeypatch.setattr(KalleLM, "step", spy)
    return seen


def test_the_cache_stays_within_the_budget_and_is_used(lm_tiny: KalleLM, cache_sizes: list[tuple[int, int]]) -> None:
    budget = 120
    requests = [request(seed, length=2 + 7 * (seed % 4), cap=5 + 6 * (seed % 3), prompt=seed % 2) for seed in range(12)]
    engine = BatchedGenerator(lm_tiny, budget)
    handles = [engine.add(asked) for asked in requests]
    begun: list[int] = []
    lengths = {h: len(r.text_ids) + r.max_frames + (0 if r.prompt_latents is None else 1) for h, r in zip(handles, requests, strict=True)}
    while events := engine.step():
        together = [event.handle for event in events]
        begun += [handle for handle in together if handle not in begun]
        assert sum(lengths[handle] for handle in together) <= budget
        assert engine.positions <= budget
    assert begun == handles, "requests are admitted in the order they came"
    assert max(rows * columns for rows, columns in cache_sizes) <= budget
    assert max(rows for rows, _ in cache_sizes) >= 3, "several rows run at once"
    assert engine.positions == 0


@pytest.mark.parametrize(
    ("options", "context"),
    [
        ({}, 6),
        ({"prompt": 5}, 11),
        ({"speaker": True}, 7),
        ({"prompt": 5, "speaker": True, "compatibility": ReleaseCompatibility(drop_last_prompt_frame=True)}, 11),
    ],
)
def test_the_budget_counts_text_prompt_speaker_and_cap(lm_tiny: KalleLM, cache_sizes: list[tuple[int, int]], options, context: int) -> None:
    engine = BatchedGenerator(lm_tiny)
    engine.add(request(0, cap=12, **options))
    engine.step()
    assert engine.positions == context + 12
    run(engine, {})
    assert cache_sizes[-1] == (1, context + 11), "the last frame is not fed back"


def test_finished_rows_leave_the_cache(lm_tiny: KalleLM, cache_sizes: list[tuple[int, int]]) -> None:
    generate_batch(lm_tiny, [request(0, length=30, cap=4), request(1, length=5, cap=8), request(2, length=2, cap=6)])
    assert [rows for rows, _ in cache_sizes] == [3, 3, 3, 2, 2, 1, 1]
    assert [columns for _, columns in cache_sizes] == [31, 32, 33, 9, 10, 11, 12]


def test_a_request_beyond_the_budget_runs_alone(lm_tiny: KalleLM) -> None:
    requests = [request(0, cap=4), request(1, length=50, cap=10), request(2, cap=4), request(3, cap=4)]
    engine = BatchedGenerator(lm_tiny, 40)
    for asked in requests:
        engine.add(asked)
    together = []
    while events := engine.step():
        together.append(tuple(event.handle for event in events))
    assert together == [(0,)] * 4 + [(1,)] * 10 + [(2, 3)] * 4
    assert_as_alone(lm_tiny, requests[1], generate_batch(lm_tiny, requests, frame_budget=40)[1])


def run(engine: BatchedGenerator, frames: dict[int, list[Frame]], steps: int | None = None) -> list[int]:
    """Take ``steps`` steps, or all; returns the handles that ended."""
    ended = []
    while steps is None or steps > 0:
        events = engine.step()
        if not events:
            break
        for event in events:
            if event.frame is not None:
                frames.setdefault(event.handle, []).append(event.frame)
            if event.ending is not None:
                ended.append(event.handle)
        steps = None if steps is None else steps - 1
    return ended


def test_a_cancelled_request_is_gone_and_the_others_do_not_notice(lm_tiny: KalleLM) -> None:
    requests = [request(0, length=30), request(1, length=4), request(2, length=9), request(3, length=9)]
    engine, frames = BatchedGenerator(lm_tiny, 130), {}
    handles = [engine.add(asked) for asked in requests]
    run(engine, frames, steps=3)
    assert (engine.active, engine.waiting) == ((0, 1, 2), (3,))
    assert engine.cancel(handles[0])
    assert engine.cancel(handles[3])
    assert (engine.active, engine.waiting) == ((1, 2), ())
    assert run(engine, frames) == [1, 2]
    assert {handle: len(row) for handle, row in frames.items()} == {0: 3, 1: 12, 2: 12}
    for handle in (1, 2):
        for one, other in zip(frames[handle], alone(lm_tiny, requests[handle])[1], strict=True):
            assert_same_frame(one, other)
    assert not engine.cancel(handles[1]), "it had ended already"


def test_cancelling_the_last_row_empties_the_batch(lm_tiny: KalleLM) -> None:
    engine, frames = BatchedGenerator(lm_tiny), {}
    engine.add(request(0))
    run(engine, frames, steps=2)
    engine.cancel(0)
    assert (engine.active, engine.positions, engine.step()) == ((), 0, [])
    later = request(7, length=3)
    assert run(engine, {}) == []
    handle = engine.add(later)
    run(engine, frames)
    for one, other in zip(frames[handle], alone(lm_tiny, later)[1], strict=True):
        assert_same_frame(one, other)


def test_a_request_may_join_at_any_moment(lm_tiny: KalleLM) -> None:
    requests = [request(0, length=5, cap=20), request(1, length=25, prompt=3), request(2, length=2, speaker=True)]
    engine, frames = BatchedGenerator(lm_tiny), {}
    for asked in requests:
        engine.add(asked)
        run(engine, frames, steps=4)
    run(engine, frames)
    for handle, asked in enumerate(requests):
        for one, other in zip(frames[handle], alone(lm_tiny, asked)[1], strict=True):
            assert_same_frame(one, other)


class After:
    """Ends a row with the frame of one index."""

    def __init__(self, index: int, reason: str = "repetition") -> None:
        self.index, self.reason, self.seen = index, reason, []

    def see(self, frame: Frame, index: int) -> str | None:
        self.seen.append((frame, index))
        return self.reason if index == self.index else None


def test_a_watcher_ends_its_own_row_and_keeps_the_frames_so_far(lm_tiny: KalleLM) -> None:
    requests = [request(0, length=20), request(1), request(2, cap=5), request(3, cap=5), request(4, stop=AT_ONCE)]
    watchers = {0: After(3), 1: After(99), 2: After(4, "silence"), 3: After(9), 4: After(0)}
    together = generate_batch(lm_tiny, requests, watcher=lambda asked: watchers[asked.seed])
    assert [(len(got.frames), got.stop_reason) for got in together] == [
        (4, "repetition"),
        (12, "max_frames"),
        (5, "silence"),
        (5, "max_frames"),
        (0, "end"),
    ]
    for got, watcher in zip(together, watchers.values(), strict=True):
        assert [index for _, index in watcher.seen] == list(range(len(got.frames)))
        assert all(seen is frame for (seen, _), frame in zip(watcher.seen, got.frames, strict=True))
    whole = alone(lm_tiny, requests[0])[1]
    for one, other in zip(together[0].frames, whole[:4], strict=True):
        assert_same_frame(one, other)


def test_a_frame_does_not_keep_the_others_in_memory(lm_tiny: KalleLM) -> None:
    for got in generate_batch(lm_tiny, [request(0), request(1), request(2)]):
        for frame in got.frames:
            assert frame.z.untyped_storage().nbytes() == DIM * 4
            assert frame.distribution.log_std.untyped_storage().nbytes() == DIM * 4


def test_the_callers_gradient_mode_and_random_state_are_untouched(lm_tiny: KalleLM) -> None:
    assert any(parameter.requires_grad for parameter in lm_tiny.parameters())
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for _ in iterate_batch(lm_tiny, [request(0), request(1, cap=3)]):
        assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cap": 0}, "bad max_frames: got 0 frames"),
        ({"noise": torch.zeros(3, 7)}, r"noise has shape \(3, 7\), expected \(12, 8\)"),
        ({"length": 0}, "bad text ids"),
    ],
)
def test_bad_values_are_refused_before_the_first_frame(lm_tiny: KalleLM, options, message: str) -> None:
    with pytest.raises(UserError, match=message):
        iterate_batch(lm_tiny, [request(0), request(1, **options)])
    with pytest.raises(UserError, match="bad frame budget: got 0"):
        BatchedGenerator(lm_tiny, 0)


@pytest.mark.parametrize("habit", ["config_dtype", "no_cache"])
def test_a_request_for_another_model_is_refused(lm_tiny: KalleLM, habit: str) -> None:
    with pytest.raises(UserError, match="a batch runs one model"):
        BatchedGenerator(lm_tiny).add(request(0, compatibility=ReleaseCompatibility(**{habit: True})))


def test_a_row_that_is_not_finite_is_named_and_those_before_it_are_the_callers(lm_tiny: KalleLM) -> None:
    noise = torch.zeros(12, DIM)
    noise[4] = float("nan")
    results = iterate_batch(lm_tiny, [request(0), request(1, cap=3), request(2, noise=noise)])
    assert next(results)[0] == 1
    with pytest.raises(RowError, match="request 2 of the batch, counted from 0: frame 4 overflows") as caught:
        next(results)
    assert (caught.value.handle, caught.value.reason.startswith("frame 4")) == (2, True)

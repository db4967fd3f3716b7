from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch

from kalle.errors import UserError
from kalle.gaussian import DiagGaussian
from kalle.models.lm_batch import LMBatch
from kalle.synthesis import Frame, GenerationOptions, ReleaseCompatibility, StopRule, generate
from kalle.synthesis.release_compat import UncachedLM
from kalle.synthesis.weights import read_weight_folder

DROPPING = GenerationOptions(compatibility=ReleaseCompatibility(drop_last_frame_always=True))


def distributions(frames: list[Frame]) -> torch.Tensor:
    """(1, 2D, T), the layout of the golden files."""
    return torch.stack([torch.cat([frame.distribution.mean, frame.distribution.log_std]) for frame in frames], dim=1)[None]


@pytest.mark.parametrize("prompted", [False, True])
def test_frames_equal_the_release(lm_tiny, io, prompted: bool) -> None:
    golden = io("lm_tiny")
    name = "prompted" if prompted else "unprompted"
    frames = list(
        generate(
            lm_tiny,
            golden["input_ids"],
            golden["prompt_latents"] if prompted else None,
            noise=golden["noise"].reshape(24, 8),
            stop=None,
            options=DROPPING,
        )
    )
    assert len(frames) == 23
    torch.testing.assert_close(distributions(frames), golden[f"distributions_{name}"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor([[frame.end_kl for frame in frames]]), golden[f"end_kl_{name}"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["stop", "guard"])
@pytest.mark.parametrize("prompted", [False, True])
def test_stopping_equals_the_release(lm_tiny, io, prompted: bool, kind: str) -> None:
    golden = io("lm_tiny")
    name = "prompted" if prompted else "unprompted"
    rule = StopRule(threshold=float(golden[f"{kind}_threshold_{name}"]))
    generation = generate(
        lm_tiny, golden["input_ids"], golden["prompt_latents"] if prompted else None, noise=golden["noise"].reshape(24, 8), stop=rule
    )
    frames = list(generation)
    assert len(frames) == int(golden[f"{kind}_length_{name}"])
    assert generation.stop_reason == "end"
    assert generation.end_frame is not None
    assert generation.end_frame.end_kl < rule.threshold


def test_the_guard_is_what_prevents_the_early_stop(lm_tiny, io) -> None:
    golden = io("lm_tiny")
    rule = StopRule(threshold=float(golden["guard_threshold_unprompted"]), min_index=-1)
    assert len(list(generate(lm_tiny, golden["input_ids"], noise=golden["noise"].reshape(24, 8), stop=rule))) <= 3


def test_speaker_frames_equal_the_release(lm_speaker_tiny, io) -> None:
    golden = io("speaker_tiny")
    with torch.no_grad():
        speaker = lm_speaker_tiny.encode_speaker(golden["mels"])
    torch.testing.assert_close(speaker.mean, golden["speaker_mean"], rtol=1e-4, atol=1e-5)
    latent = speaker.sample(golden["speaker_noise"])
    frames = list(
        generate(lm_speaker_tiny, golden["input_ids"], speaker_latent=latent, noise=golden["step_noise"].reshape(12, 8), stop=None)
    )
    torch.testing.assert_close(distributions(frames), golden["distributions"], rtol=1e-4, atol=1e-5)


def test_cached_steps_equal_one_uncached_pass(lm_tiny, io) -> None:
    golden = io("lm_tiny")
    ids, prompt = golden["input_ids"], golden["prompt_latents"]
    frames = list(generate(lm_tiny, ids, prompt, noise=golden["noise"].reshape(24, 8), stop=None))
    latents = torch.cat([prompt, torch.stack([frame.z for frame in frames])[None]], dim=1)
    batch = LMBatch(ids[None], torch.tensor([len(ids)]), latents, torch.tensor([latents.shape[1]]))
    with torch.no_grad():
        everything = lm_tiny(batch)
    rows = slice(prompt.shape[1], prompt.shape[1] + len(frames))
    torch.testing.assert_close(torch.stack([f.distribution.mean for f in frames]), everything.mean[0, rows], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.stack([f.distribution.log_std for f in frames]), everything.log_std[0, rows], rtol=1e-4, atol=1e-5)


def test_a_frame_depends_on_earlier_frames_only(lm_tiny, io) -> None:
    ids = io("lm_tiny")["input_ids"]
    latents = torch.randn(1, 9, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    prediction = lm_tiny(LMBatch(ids[None], torch.tensor([len(ids)]), latents, torch.tensor([9])))
    (gradient,) = torch.autograd.grad(prediction.mean[0, 5].sum() + prediction.log_std[0, 5].sum(), latents)
    touched = gradient[0].abs().sum(dim=1) > 0
    assert touched.tolist() == [True] * 5 + [False] * 4


def test_noise_scale_and_end_divergence_are_what_they_say(lm_tiny, io) -> None:
    golden = io("lm_tiny")
    noise = golden["noise"].reshape(24, 8)
    for temperature in (0.0, 0.5, 1.0):
        for index, frame in enumerate(
            generate(lm_tiny, golden["input_ids"], noise=noise, stop=None, max_frames=3, temperature=temperature)
        ):
            torch.testing.assert_close(frame.z, frame.distribution.mean + temperature * noise[index] * frame.distribution.std)
            end = DiagGaussian(torch.ones(8), torch.ones(8))
            assert frame.end_kl == pytest.approx(float(frame.distribution.kl_to(end).mean()))
            assert frame.z.dtype == frame.distribution.mean.dtype == torch.float32


def test_the_generator_gives_one_draw_a_frame_in_order(lm_tiny, io) -> None:
    ids = io("lm_tiny")["input_ids"]
    reference = torch.Generator().manual_seed(7)
    rows = torch.stack([torch.randn(8, generator=reference) for _ in range(5)])
    torch.manual_seed(1)
    drawn = list(generate(lm_tiny, ids, generator=torch.Generator().manual_seed(7), stop=None, max_frames=5))
    torch.manual_seed(2)
    given = list(generate(lm_tiny, ids, noise=rows, stop=None))
    assert all(torch.equal(a.z, b.z) for a, b in zip(drawn, given, strict=True))


def test_without_noise_or_generator_calls_differ_and_the_global_state_is_untouched(lm_tiny, io) -> None:
    ids = io("lm_tiny")["input_ids"]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = (next(iter(generate(lm_tiny, ids, max_frames=1))) for _ in range(2))
    assert not torch.equal(first.z, second.z)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_cap_is_told_and_drops_nothing_by_default(lm_tiny, io) -> None:
    generation = generate(
        lm_tiny, io("lm_tiny")["input_ids"], generator=torch.Generator().manual_seed(0), stop=StopRule(threshold=0.0), max_frames=6
    )
    assert generation.stop_reason is None
    assert len(list(generation)) == 6
    assert generation.stop_reason == "max_frames"
    assert generation.end_frame is None
    assert next(generation, None) is None
    assert generation.stop_reason == "max_frames"


def test_drop_last_frame_always_drops_it_at_the_cap_and_not_twice_at_the_end(lm_tiny, io) -> None:
    golden = io("lm_tiny")
    noise, ids = golden["noise"].reshape(24, 8), golden["input_ids"]
    kept = list(generate(lm_tiny, ids, noise=noise, stop=None, max_frames=6, options=DROPPING))
    whole = list(generate(lm_tiny, ids, noise=noise, stop=None, max_frames=6))
    assert len(kept) == 5
    assert all(torch.equal(a.z, b.z) for a, b in zip(kept, whole, strict=False))
    rule = StopRule(threshold=float(golden["stop_threshold_unprompted"]))
    assert len(list(generate(lm_tiny, ids, noise=noise, stop=rule, options=DROPPING))) == int(golden["stop_length_unprompted"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "bad temperature: got -1.0"),
        ({"temperature": float("nan")}, "bad temperature: got nan"),
        ({"max_frames": 0}, "bad max_frames: got 0 frames"),
        ({"max_frames": 2.5}, "bad max_frames: got 2.5, expected a whole number"),
        ({"noise": torch.zeros(3, 7)}, r"noise has shape \(3, 7\), expected \(3, 8\)"),
        ({"noise": torch.zeros(3, 8), "max_frames": 4}, r"expected \(4, 8\)"),
    ],
)
def test_bad_values_are_refused_before_the_first_frame(lm_tiny, io, options, message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(lm_tiny, io("lm_tiny")["input_ids"], **options)


class After:
    """A watcher that ends the row at one index."""

    def __init__(self, index: int) -> None:
        self.index, self.seen = index, []

    def see(self, frame: Frame, index: int) -> str | None:
        self.seen.append(index)
        return "silence" if index == self.index else None


def test_a_watcher_sees_every_frame_and_ends_the_speech_with_it(lm_tiny, io) -> None:
    ids, watcher = io("lm_tiny")["input_ids"], After(3)
    generation = generate(lm_tiny, ids, generator=torch.Generator().manual_seed(0), stop=None, max_frames=9, watcher=watcher)
    assert len(list(generation)) == 4
    assert generation.stop_reason == "silence"
    assert watcher.seen == [0, 1, 2, 3]


@pytest.mark.parametrize("uncached", [False, True])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((torch.zeros(0, dtype=torch.int64),), r"bad text ids: got torch.int64 of shape \(0,\)"),
        ((torch.ones(1, 3, dtype=torch.int64),), r"bad text ids: got torch.int64 of shape \(1, 3\)"),
        ((torch.ones(3),), "bad text ids: got torch.float32"),
        ((torch.tensor([5, 320]),), "bad text ids: got 320, expected 0 to 319"),
        ((torch.tensor([-1, 5]),), "bad text ids: got -1, expected 0 to 319"),
        ((torch.tensor([5]), torch.zeros(1, 3, 9)), r"bad prompt latents: got shape \(1, 3, 9\), expected \(1, P, 8\)"),
        ((torch.tensor([5]), torch.zeros(3, 8)), r"bad prompt latents: got shape \(3, 8\)"),
        ((torch.tensor([5]), torch.zeros(2, 3, 8)), r"bad prompt latents: got shape \(2, 3, 8\)"),
        ((torch.tensor([5]), None, torch.zeros(1, 63)), r"bad speaker latent: got shape \(1, 63\), expected \(1, 64\)"),
        ((torch.tensor([5]), None, torch.zeros(64)), r"bad speaker latent: got shape \(64,\)"),
    ],
)
def test_contexts_that_do_not_fit_are_refused_before_the_first_frame(lm_tiny, given, message: str, uncached: bool) -> None:
    with pytest.raises(UserError, match=message):
        generate(UncachedLM(lm_tiny) if uncached else lm_tiny, *given)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_predictions_that_are_not_finite_are_refused(lm_tiny, value: float) -> None:
    broken = copy.deepcopy(lm_tiny)
    with torch.no_grad():
        broken.distribution_linear.bias[3] = value
    with pytest.raises(
        UserError, match=r"predicts values that are not finite at frame 0: expected numbers; load it with dtype float32, or"
    ):
        list(generate(broken, torch.arange(5), max_frames=3))


def test_samples_that_are_not_finite_are_refused(lm_tiny) -> None:
    seeded = torch.Generator().manual_seed(0)
    with pytest.raises(UserError, match=r"frame 0 overflows: got temperature 1e\+39.*lower the temperature"):
        list(generate(lm_tiny, torch.arange(5), generator=seeded, max_frames=3, temperature=1e39))
    noise = torch.zeros(3, 8)
    noise[2, 7] = math.inf
    generation = generate(lm_tiny, torch.arange(5), noise=noise)
    assert next(generation).z.isfinite().all()
    with pytest.raises(UserError, match="frame 2 overflows"):
        list(generation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite(lm_tiny, dtype: torch.dtype) -> None:
    half = copy.deepcopy(lm_tiny)
    half.backbone.to(dtype)
    frames = list(generate(half, torch.arange(5), generator=torch.Generator().manual_seed(0), stop=None, max_frames=20))
    assert len(frames) == 20


@pytest.mark.parametrize("threshold", [math.nan, -0.1, "0.5", None])
def test_bad_thresholds_are_refused(threshold) -> None:
    with pytest.raises(UserError, match="bad stop threshold"):
        StopRule(threshold)
    with pytest.raises(UserError, match="bad min_index of the stop rule"):
        StopRule(0.5, 2.5)


def test_a_bad_threshold_in_a_file_names_the_file(weight_folder: Path) -> None:
    path = weight_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stop": {"threshold": -1.0}}))
    with pytest.raises(UserError, match=f"bad value in '{path}': stop.bad stop threshold: got -1.0"):
        read_weight_folder(weight_folder)

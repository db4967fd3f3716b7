"""Stopping by the probability of a stop head: alone, in a batch, streamed, without a cache; and where the rule is stored."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from speech_requests import request_of

from kalle.checkpoint import write_json
from kalle.errors import UserError
from kalle.models.lm import KalleLM
from kalle.synthesis import StopRule, generate
from kalle.synthesis.batch import generate_batch
from kalle.synthesis.generate import Frame, RowSampler
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.options import DEFAULT_STOP_PROBABILITY, SpeechRequest
from kalle.synthesis.release_compat import UncachedLM
from kalle.synthesis.weights import FolderConfig, StoredStop, read_weight_folder, write_stop

CAP = 30


@pytest.fixture(scope="module")
def headed(lm_tiny: KalleLM) -> KalleLM:
    """The golden model with a head whose probability goes up and down between frames."""
    lm = copy.deepcopy(lm_tiny)
    lm.add_stop_head(torch.Generator().manual_seed(0))
    assert lm.stop_head is not None
    with torch.no_grad():
        lm.stop_head.weight.mul_(3.0)
    return lm.requires_grad_(False)


@pytest.fixture(scope="module")
def kalle_headed(kalle_tiny: Kalle, headed: KalleLM) -> Kalle:
    return Kalle(kalle_tiny.flowvae, headed, kalle_tiny.tokenizer)


def spoken(lm: KalleLM, seed: int, stop: StopRule | None = None) -> tuple[list[Frame], str | None]:
    ids = torch.arange(5, 12 + seed)
    generation = generate(lm, ids, generator=torch.Generator().manual_seed(seed), stop=stop, max_frames=CAP)
    return list(generation), generation.stop_reason


def rule_for(lm: KalleLM, seed: int, index: int) -> StopRule:
    """A rule that ends ``seed`` at ``index`` or where a later frame has as much; above it no frame is the end."""
    probabilities = [frame.stop_probability for frame in spoken(lm, seed)[0]]
    return StopRule(threshold=1e9, min_index=index - 1, probability=probabilities[index])


def test_frames_say_their_probability_and_are_those_of_the_model_without_a_head(lm_tiny: KalleLM, headed: KalleLM) -> None:
    plain, frames = spoken(lm_tiny, 1)[0], spoken(headed, 1)[0]
    assert [frame.stop_probability for frame in plain] == [None] * CAP
    assert all(torch.equal(one.z, other.z) and one.end_kl == other.end_kl for one, other in zip(plain, frames, strict=True))
    values = np.array([frame.stop_probability for frame in frames])
    assert ((values > 0) & (values < 1)).all()
    assert values.std() > 0.01


def test_the_end_is_the_first_frame_that_reaches_the_probability(headed: KalleLM) -> None:
    everything = spoken(headed, 1)[0]
    values = [frame.stop_probability for frame in everything]
    wanted = sorted(values)[-4]
    first = next(index for index, value in enumerate(values) if value >= wanted and index > 3)
    generation = generate(
        headed, torch.arange(5, 13), generator=torch.Generator().manual_seed(1), stop=StopRule(0.0, 3, probability=wanted), max_frames=CAP
    )
    frames = list(generation)
    assert (generation.stop_reason, len(frames)) == ("end", first)
    assert generation.end_frame is not None
    assert generation.end_frame.stop_probability == values[first]
    assert spoken(headed, 1, StopRule(1e9, -1, probability=1.0))[1] == "max_frames", "the divergence has no say"


@pytest.mark.parametrize("index", [0, 9, 17])
def test_every_path_stops_at_the_same_frame(headed: KalleLM, kalle_headed: Kalle, index: int) -> None:
    seeds = [1, 2, 3]
    rules = [rule_for(headed, seed, index) for seed in seeds]
    alone = [spoken(headed, seed, rule) for seed, rule in zip(seeds, rules, strict=True)]
    assert [(len(frames), reason) for frames, reason in alone] == [(index, "end")] * 3
    # The very probability of a frame is no rule for another order of additions.
    near = [StopRule(rule.threshold, rule.min_index, probability=rule.probability - 1e-5) for rule in rules]
    requests = [request_of(torch.arange(5, 12 + seed), CAP, seed, stop=rule) for seed, rule in zip(seeds, near, strict=True)]
    for (frames, reason), got in zip(alone, generate_batch(headed, requests), strict=True):
        assert (got.stop_reason, len(got.frames)) == (reason, len(frames))
        expected = [frame.stop_probability for frame in frames]
        np.testing.assert_allclose([frame.stop_probability for frame in got.frames], expected, atol=1e-5)
    for seed, rule in zip(seeds, near, strict=True):
        assert len(spoken(UncachedLM(headed), seed, rule)[0]) == index  # type: ignore[arg-type]


def test_a_stream_and_a_batch_equal_the_whole(kalle_headed: Kalle) -> None:
    free = kalle_headed.synthesize("Hello there.", seed=3, max_seconds=2.4, stop=StopRule(0.0), retries=0)
    assert free.stop_probability.shape == (30,)
    rule = StopRule(min_index=11, probability=float(free.stop_probability[12]) - 1e-5)
    whole = kalle_headed.synthesize("Hello there.", seed=3, max_seconds=2.4, stop=rule, retries=0)
    assert (whole.stop_reason, whole.frames) == ("end", 12)
    stream = kalle_headed.stream("Hello there.", seed=3, max_seconds=2.4, stop=rule)
    pieces = list(stream)
    np.testing.assert_array_equal(stream.speech.latents, whole.latents)
    np.testing.assert_array_equal(stream.speech.stop_probability, whole.stop_probability)
    np.testing.assert_allclose(np.concatenate(pieces), whole.audio, atol=1e-4)
    request = SpeechRequest("Hello there.", seed=3, max_seconds=2.4, stop=rule, retries=0)
    one, _ = kalle_headed.synthesize_batch([request, SpeechRequest("Another.", seed=4, max_seconds=1.0, stop=rule, retries=0)])
    assert (one.stop_reason, one.frames) == ("end", 12)


def test_a_rule_that_needs_a_head_is_refused_without_one(lm_tiny: KalleLM, kalle_tiny: Kalle) -> None:
    rule = StopRule(probability=0.5)
    message = "no stop head: got a stop rule by probability 0.5, expected one by threshold"
    with pytest.raises(UserError, match=message):
        generate(lm_tiny, torch.arange(5), stop=rule)
    with pytest.raises(UserError, match=message):
        generate(UncachedLM(lm_tiny), torch.arange(5), stop=rule)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        generate_batch(lm_tiny, [request_of(torch.arange(5), 9, 1, stop=rule)])
    for speak in (kalle_tiny.synthesize, kalle_tiny.stream):
        with pytest.raises(UserError, match=message):
            speak("Hello.", stop=rule)
    with pytest.raises(UserError, match=message):
        Kalle(kalle_tiny.flowvae, lm_tiny, kalle_tiny.tokenizer, FolderConfig(rule))


@pytest.mark.parametrize("probability", [0.0, -0.1, 1.01, float("nan"), "high"])
def test_no_probability_is_refused(probability: object) -> None:
    with pytest.raises(UserError, match="bad stop probability"):
        StopRule(probability=probability)  # type: ignore[arg-type]


def test_a_rule_by_probability_counts_as_a_rule() -> None:
    assert StopRule(0.0).never
    assert not StopRule(0.0, probability=0.5).never
    assert not StopRule().never


def test_a_broken_head_is_an_error_at_its_frame(headed: KalleLM) -> None:
    lm = copy.deepcopy(headed)
    assert lm.stop_head is not None
    with torch.no_grad():
        lm.stop_head.bias.fill_(torch.nan)
    prediction, _ = lm.prefill(torch.arange(5)[None])
    with pytest.raises(UserError, match="not finite at frame 0"):
        RowSampler(request_of(torch.arange(5), 9), 8, torch.Generator()).advance(prediction[0])


def with_head(folder: Path, headed: KalleLM) -> Path:
    headed.save_pretrained(folder)
    return folder


def test_the_rule_of_a_folder_goes_by_its_head_where_none_is_stored(weight_folder: Path, headed: KalleLM) -> None:
    assert read_weight_folder(weight_folder).stop == StopRule()
    folder = with_head(weight_folder, headed)
    default = StopRule(probability=DEFAULT_STOP_PROBABILITY)
    assert read_weight_folder(folder).stop == Kalle.from_pretrained(folder, "cpu").config.stop == default
    write_json(folder / "config.json", {"language": "en"})
    assert read_weight_folder(folder).stop == default


def test_a_probability_is_stored_with_the_weights_and_held(weight_folder: Path, headed: KalleLM) -> None:
    folder = with_head(weight_folder, headed)
    write_stop(folder, StoredStop(0.5, 6, probability=0.25))
    assert read_weight_folder(folder).stop == StopRule(0.5, 6, probability=0.25)
    kalle = Kalle.from_pretrained(folder, "cpu")
    assert kalle.resolve(SpeechRequest("Hi.")).stop.probability == 0.25
    write_stop(folder, StoredStop(0.5, 6))
    assert "probability" not in json.loads((folder / "config.json").read_text())["stop"]
    assert read_weight_folder(folder).stop == StopRule(0.5, 6)


def test_a_stored_probability_without_a_head_is_refused(weight_folder: Path) -> None:
    write_stop(weight_folder, StoredStop(probability=0.25))
    with pytest.raises(UserError, match="no stop head"):
        Kalle.from_pretrained(weight_folder, "cpu")

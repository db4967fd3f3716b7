"""Learning one voice: what is learnt, from which sequence, and what stays as it was."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from adapt_tools import TEXT, sweep

import kalle as package
from kalle.adaptation.adapt import (
    NANO_FULL_LR,
    AdaptOptions,
    PromptSequence,
    adapt,
    default_lr,
    learn,
    mean_kl,
    prompt_sequence,
    read_recording,
    schedule,
    trainable,
)
from kalle.errors import UserError
from kalle.gaussian import DiagGaussian
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.options import SpeechRequest
from kalle.synthesis.release_compat import ReleaseCompatibility
from kalle.synthesis.speech import start

QUICK = {"lora": AdaptOptions(steps=30, lr=5e-3), "full": AdaptOptions(mode="full", steps=30, lr=3e-3)}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def sequence(kalle: Kalle) -> PromptSequence:
    return prompt_sequence(kalle, read_recording(kalle, sweep(), TEXT, 0))


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_prompt_is_learnt_and_the_model_left_alone(kalle: Kalle, state: dict[str, torch.Tensor], mode: str) -> None:
    result = adapt(kalle, sweep(), TEXT, options=QUICK[mode], validate=[(sweep(0.5, 170.0), "four")])
    assert result.kl.after < 0.8 * result.kl.before
    assert result.held_out_kl is not None
    assert math.isfinite(result.held_out_kl.after)
    assert len(result.losses) == 30
    assert result.similarity is None
    assert same(kalle.lm.state_dict(), state)
    assert all(weight.grad is None for weight in kalle.lm.parameters())
    assert all(weight.requires_grad for weight in kalle.lm.parameters())


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_seed_decides(kalle: Kalle, mode: str) -> None:
    options = dataclasses.replace(QUICK[mode], steps=4)
    one, again, other = (adapt(kalle, sweep(), TEXT, options=each) for each in (options, options, dataclasses.replace(options, seed=1)))
    assert one.losses == again.losses
    assert one.adapter.digest == again.adapter.digest
    assert one.losses != other.losses


def test_noise_is_fresh_in_every_step(kalle: Kalle) -> None:
    losses = adapt(kalle, sweep(), TEXT, options=AdaptOptions(steps=5, lr=1e-30)).losses
    assert len(set(losses)) == 5


def test_the_end_has_no_part(kalle: Kalle, sequence: PromptSequence, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the end distribution nor the last frame, from which alone it is predicted, changes the loss or what is learnt."""
    options = dataclasses.replace(QUICK["full"], steps=3)
    noise = torch.randn(sequence.noise_shape, generator=torch.Generator().manual_seed(0))
    loss, learnt = sequence.loss(kalle.lm, noise, "prediction_posterior"), learn(kalle.lm, "b", [sequence], options, 1e-3)
    monkeypatch.setattr("kalle.gaussian.END_MEAN", 100.0)
    assert torch.equal(sequence.loss(kalle.lm, noise, "prediction_posterior"), loss)
    assert learn(kalle.lm, "b", [sequence], options, 1e-3).adapter.digest == learnt.adapter.digest
    last, first = noise.clone(), noise.clone()
    last[-1] += 100
    first[0] += 100
    assert torch.equal(sequence.loss(kalle.lm, last, "prediction_posterior"), loss)
    assert not torch.equal(sequence.loss(kalle.lm, first, "prediction_posterior"), loss)


def test_the_loss_is_the_mean_over_the_frames(kalle: Kalle, sequence: PromptSequence) -> None:
    noise = torch.zeros(sequence.noise_shape)
    z = sequence.posterior.mean
    by_hand = []
    for frame in range(len(z)):
        prediction = kalle.lm.predict(sequence.text_ids[None], z[None, :frame])
        by_hand.append(prediction[0].kl_to(sequence.posterior[frame]).mean())
    torch.testing.assert_close(sequence.loss(kalle.lm, noise, "prediction_posterior"), torch.stack(by_hand).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "compatibility",
    [ReleaseCompatibility(), ReleaseCompatibility(tokenise_separately=True), ReleaseCompatibility(drop_last_prompt_frame=True)],
)
def test_the_sequence_is_the_one_that_synthesis_reads(
    kalle: Kalle, compatibility: ReleaseCompatibility, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ids and the number of frames that reach the language model when the voice prompts a text."""
    recording = read_recording(kalle, sweep(), f" {TEXT} ", 0)
    sequence = prompt_sequence(kalle, recording, "four", compatibility)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    prefill = kalle.lm.prefill
    monkeypatch.setattr(kalle.lm, "prefill", lambda ids, prompt, speaker: seen.append((ids, prompt)) or prefill(ids, prompt, speaker))
    generation, _ = start(kalle.lm, kalle.resolve(SpeechRequest("four", recording.voice, seed=0, compatibility=compatibility)))
    next(iter(generation))
    ((ids, prompt),) = seen
    assert torch.equal(ids[0], sequence.text_ids)
    frames = len(recording.posterior.mean) - compatibility.drop_last_prompt_frame
    assert prompt.shape[1] == frames == sequence.noise_shape[0]
    alone = prompt_sequence(kalle, recording, None, compatibility)
    assert len(alone.text_ids) < len(sequence.text_ids)
    assert torch.equal(alone.text_ids[-2:], sequence.text_ids[-2:])


def test_the_prompt_of_the_voice_is_a_draw_from_the_posterior(kalle: Kalle) -> None:
    recording = read_recording(kalle, sweep(), TEXT, 3)
    voice = kalle.voice(sweep(), TEXT, seed=3)
    assert torch.equal(recording.voice.prompt_latents, voice.prompt_latents)
    scaled = (voice.prompt_latents - recording.posterior.mean) / recording.posterior.std
    assert float(scaled.abs().max()) < 6


def test_the_target_text_is_read_too(kalle: Kalle) -> None:
    options = dataclasses.replace(QUICK["lora"], steps=2)
    alone, aimed = (adapt(kalle, sweep(), TEXT, options=options, target_text=text) for text in (None, "four five"))
    assert alone.losses[0] != aimed.losses[0]
    assert aimed.adapter.notes["target_text"] == "four five"


def test_recordings_take_turns(kalle: Kalle) -> None:
    options = AdaptOptions(steps=4, lr=1e-30)
    both = adapt(kalle, [sweep(), sweep(0.4, 300.0)], [TEXT, "four"], options=options)
    one = adapt(kalle, sweep(), TEXT, options=options)
    assert both.losses[0] == one.losses[0]
    assert both.losses[1] != one.losses[1]
    assert both.adapter.notes["texts"] == [TEXT, "four"]
    assert both.voice.text == TEXT
    kls = [adapt(kalle, audio, text, options=options).kl.before for audio, text in ((sweep(), TEXT), (sweep(0.4, 300.0), "four"))]
    assert min(kls) < both.kl.before < max(kls)


def test_a_budget_stops(kalle: Kalle, sequence: PromptSequence) -> None:
    def clock() -> Iterator[float]:
        now = 0.0
        while True:
            yield now
            now += 1.0

    ticks = clock()
    options = AdaptOptions(steps=50, seconds=4.5)
    assert 1 < len(learn(kalle.lm, "b", [sequence], options, 1e-4, clock=lambda: next(ticks)).losses) < 6
    assert len(adapt(kalle, sweep(), TEXT, options=dataclasses.replace(options, seconds=1e-9)).losses) == 1


def test_every_step_is_reported(kalle: Kalle) -> None:
    told = []
    result = adapt(kalle, sweep(), TEXT, options=AdaptOptions(steps=3), report=lambda *values: told.append(values))
    assert [values[:3] for values in told] == [(number + 1, 3, loss) for number, loss in enumerate(result.losses)]


def test_the_schedule() -> None:
    factor = schedule(10, 2)
    assert [factor(step) for step in range(3)] == [0.5, 1.0, 1.0]
    assert factor(6) == pytest.approx(0.5)
    assert factor(9) == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert [factor(step) for step in (10, 11, 500)] == [0.0, 0.0, 0.0]
    falling = [factor(step) for step in range(1, 12)]
    assert falling == sorted(falling, reverse=True)
    assert schedule(3, 3)(2) == 1.0
    assert AdaptOptions(steps=200).warmup_steps == 40


def test_learning_rates() -> None:
    assert default_lr("full", 2048) == default_lr("full", 4096) == pytest.approx(1e-6)
    assert default_lr("full", 256) == default_lr("full", 16) == pytest.approx(NANO_FULL_LR)
    assert 1e-6 < default_lr("full", 1024) < NANO_FULL_LR


def test_what_learns(kalle: Kalle, kalle_with_speaker: Kalle) -> None:
    names = set(trainable(kalle.lm, AdaptOptions(mode="full"))[1])
    assert names == dict(kalle.lm.named_parameters()).keys()
    for mode in ("lora", "full"):
        chosen = trainable(kalle_with_speaker.lm, AdaptOptions(mode=mode))[1]
        assert not [name for name in chosen if "speaker" in name]
        assert any("distribution_linear" in name for name in chosen)


def test_unused_text_tokens_keep_their_embedding(kalle: Kalle, sequence: PromptSequence) -> None:
    learnt = learn(kalle.lm, "b", [sequence], AdaptOptions(mode="full", steps=3, weight_decay=0.1), 1e-2)
    rows = learnt.adapter.tensors["backbone.embed_tokens.weight:rows"]
    assert set(rows.tolist()) == set(sequence.text_ids.tolist())
    assert 0 < learnt.rounding < 1e-3


def test_the_speaker_latent_is_heard(kalle_with_speaker: Kalle) -> None:
    recording = read_recording(kalle_with_speaker, sweep(), TEXT, 0)
    sequence = prompt_sequence(kalle_with_speaker, recording)
    assert sequence.speaker_latent is not None
    other = dataclasses.replace(sequence, speaker_latent=sequence.speaker_latent + 1)
    kls = [mean_kl(kalle_with_speaker.lm, [each], 1, 0, "prediction_posterior") for each in (sequence, other)]
    assert kls[0] != kls[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "bad steps: got 0"),
        ({"lr": -1.0}, "bad learning rate"),
        ({"lr": float("nan")}, "bad learning rate"),
        ({"seconds": 0.0}, "bad seconds"),
        ({"rank": 0}, "bad rank"),
        ({"seed": -1}, "bad seed"),
        ({"mode": "half"}, "adapt.mode: got 'half'"),
        ({"warmup_share": 2.0}, "bad warm-up"),
        ({"weight_decay": -1.0}, "bad weight decay"),
    ],
)
def test_bad_options(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AdaptOptions(**values)


def test_mistakes(kalle: Kalle) -> None:
    with pytest.raises(UserError, match="don't pair: got 2 and 1"):
        adapt(kalle, [sweep(), sweep()], TEXT)
    with pytest.raises(UserError, match="without its transcript"):
        read_recording(kalle, sweep(), None, 0)
    with pytest.raises(UserError, match="prompt text is empty"):
        adapt(kalle, sweep(), " ")
    with pytest.raises(UserError, match="too long: with its text it takes"):
        adapt(kalle, sweep(), "x" * 1020)
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step \d+, expected a number; lower learning_rate"):
        adapt(kalle, sweep(), TEXT, options=AdaptOptions(mode="full", steps=20, lr=1e30))
    short = sweep(0.01)
    with pytest.raises(UserError, match="nothing to learn from"):
        prompt_sequence(kalle, read_recording(kalle, short, "a", 0), None, ReleaseCompatibility(drop_last_prompt_frame=True))


def test_the_package_offers_it() -> None:
    assert package.adapt is adapt
    assert isinstance(DiagGaussian, type)

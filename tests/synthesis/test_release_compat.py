"""Every habit of the release, alone and all together, against what the release itself computed."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from speech_requests import request_of

from kalle.convert.release_format import RELEASED_BACKBONE
from kalle.errors import UserError
from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.synthesis import ReleaseCompatibility, StopRule, Voice, generate
from kalle.synthesis.generate import Request
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.options import SpeechRequest, cap_frames
from kalle.synthesis.release_compat import UncachedLM, configured_dtype
from kalle.synthesis.speech import speak, start
from kalle.synthesis.voice import FLOWVAE_ENCODER
from kalle.synthesis.weights import FolderConfig
from kalle.text.tokenizer import BEFORE_SPEECH, Tokenizer

NEVER = StopRule(threshold=0.0)
PROMPT, TARGET = "prompt", "target"


def with_compatibility(request: Request, compatibility: ReleaseCompatibility) -> Request:
    return dataclasses.replace(request, options=request.options.changed(compatibility=compatibility))


class GoldenTokenizer:
    """Gives the golden data's ids, which no text stands behind: an English one for the texts of one request."""

    vocab_size = 320

    def __init__(self, golden) -> None:
        self._ids = {PROMPT: golden["prompt_ids"].tolist(), TARGET: golden["target_ids"].tolist()}
        self._ids[f"{PROMPT} {TARGET}"] = [*self._ids[PROMPT], 5, *self._ids[TARGET][1:]]
        self._special = dict(zip(BEFORE_SPEECH, golden["special_ids"].tolist(), strict=True))

    def encode(self, text: str, language: str | None = None) -> list[int]:
        return self._ids[text]

    def special(self, name: str) -> int:
        return self._special[name]


def golden_request(golden, kalle: Kalle, compatibility: ReleaseCompatibility) -> Request:
    """The golden data's text, voice and noise as ``Kalle`` resolves them."""
    with torch.no_grad():
        posterior = kalle.flowvae.encode(golden["prompt_wav"][0])
    kept = posterior[:, :-1].sample(golden["prompt_noise"])[0]
    voice = Voice({FLOWVAE_ENCODER: kalle.hashes[FLOWVAE_ENCODER]}, torch.cat([kept, posterior.mean[0, -1:]]), text=PROMPT)
    resolved = kalle.resolve(SpeechRequest(TARGET, voice, seed=0, max_seconds=16 * 0.08, stop=NEVER, compatibility=compatibility))
    noise, again = golden["step_noise"].reshape(-1, 8), golden["decode_noise"][0].T
    frames = len(noise) - compatibility.drop_last_frame_always
    return dataclasses.replace(resolved, noise=noise, decode_noise=torch.cat([again, again[:1]])[:frames])


@pytest.fixture
def golden_kalle(lm_tiny, flowvae_tiny, io) -> Kalle:
    return Kalle(flowvae_tiny, lm_tiny, GoldenTokenizer(io("chain_tiny")))


def test_kalle_in_release_mode_equals_the_release(golden_kalle: Kalle, io) -> None:
    golden = io("chain_tiny")
    request = golden_request(golden, golden_kalle, ReleaseCompatibility.release())
    ids = torch.cat([golden["prompt_ids"], golden["target_ids"][1:], golden["special_ids"]])
    assert torch.equal(request.text_ids, ids)
    speech = speak(golden_kalle.lm, golden_kalle.flowvae, request)
    assert (speech.frames, speech.stop_reason, speech.max_frames) == (15, "max_frames", 16)
    torch.testing.assert_close(torch.from_numpy(speech.means).T, golden["distributions"][0, :8], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(speech.log_std).T, golden["distributions"][0, 8:], rtol=1e-4, atol=1e-5)
    difference = np.abs(speech.pcm16().astype(int) - golden["audio_int16"].numpy().astype(int))
    # The decoder's fp32 rounding, about a third of a 16-bit step, moves samples that lie near the edge of one.
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.1
    rounded = with_compatibility(request, dataclasses.replace(request.options.compatibility, truncate_int16=False))
    audio = speak(golden_kalle.lm, golden_kalle.flowvae, rounded).audio
    np.testing.assert_allclose(audio, golden["audio"][0, 0], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["decode", "drop_last_frame_always", "drop_last_prompt_frame", "tokenise_separately", "truncate_int16"])
def test_each_habit_is_needed_to_equal_the_release(golden_kalle: Kalle, io, name: str) -> None:
    golden = io("chain_tiny")
    ours = dataclasses.replace(ReleaseCompatibility.release(), **{name: getattr(ReleaseCompatibility(), name)})
    pcm16 = speak(golden_kalle.lm, golden_kalle.flowvae, golden_request(golden, golden_kalle, ours)).pcm16()
    reference = golden["audio_int16"].numpy()
    assert len(pcm16) != len(reference) or (pcm16 != reference).mean() > 0.4


@pytest.mark.parametrize("kind", ["prompted", "unprompted"])
@pytest.mark.parametrize("rule", ["stop", "guard"])
def test_the_stop_index_equals_the_release(lm_tiny, flowvae_tiny, io, kind: str, rule: str) -> None:
    golden = io("lm_tiny")
    compatibility = dataclasses.replace(ReleaseCompatibility.release(), drop_last_prompt_frame=False, decode="mean")
    request = request_of(
        golden["input_ids"].reshape(-1),
        24,
        seed=0,
        prompt_latents=golden["prompt_latents"][0] if kind == "prompted" else None,
        stop=StopRule(float(golden[f"{rule}_threshold_{kind}"]), 3),
        compatibility=compatibility,
        noise=golden["noise"].reshape(24, -1),
    )
    speech = speak(lm_tiny, flowvae_tiny, request)
    assert speech.frames == int(golden[f"{rule}_length_{kind}"])
    assert speech.stop_reason == ("end" if speech.frames < 23 else "max_frames")


def test_release_is_every_habit_and_the_default_none() -> None:
    release = ReleaseCompatibility.release()
    assert release.decode == "resample"
    assert all(getattr(release, field.name) != field.default for field in dataclasses.fields(ReleaseCompatibility))
    assert not ReleaseCompatibility().changes_model


def test_hard_coded_stop_sets_the_calibrated_rule_aside_and_yields_to_the_caller(lm_tiny, flowvae_tiny) -> None:
    kalle = Kalle(flowvae_tiny, lm_tiny, Tokenizer.bytes(), FolderConfig(stop=StopRule(9.0, 1)))
    habit = ReleaseCompatibility(hard_coded_stop=True)
    assert kalle.resolve(SpeechRequest("Hi.")).stop == StopRule(9.0, 1)
    assert kalle.resolve(SpeechRequest("Hi.", compatibility=habit)).stop == StopRule(0.5, 3)
    assert kalle.resolve(SpeechRequest("Hi.", compatibility=habit, stop=NEVER)).stop == NEVER


def test_thousand_steps_keep_999_frames_of_any_text_and_yield_to_the_caller(kalle_tiny: Kalle) -> None:
    compatibility = ReleaseCompatibility(thousand_steps=True, drop_last_frame_always=True)
    assert kalle_tiny.resolve(SpeechRequest("Hi.")).max_frames == cap_frames("Hi.", 12.5) < 100
    assert kalle_tiny.resolve(SpeechRequest("Hi.", compatibility=compatibility, max_seconds=0.8)).max_frames == 10
    request = kalle_tiny.resolve(SpeechRequest("Hi.", compatibility=compatibility, stop=NEVER, seed=1))
    assert request.max_frames == 1000
    generation, _ = start(kalle_tiny.lm, request)
    assert (sum(1 for _ in generation), generation.stop_reason) == (999, "max_frames")


def test_no_cache_computes_every_position_again_and_says_the_same(lm_tiny, flowvae_tiny) -> None:
    request = request_of(torch.arange(5, 20), 6, 3, stop=NEVER)
    positions: list[int] = []
    hook = lm_tiny.backbone.layers[0].register_forward_hook(lambda _, args, output: positions.append(args[0].shape[1]))
    cached = speak(lm_tiny, flowvae_tiny, request)
    assert positions == [15, 1, 1, 1, 1, 1]
    positions.clear()
    uncached = speak(lm_tiny, flowvae_tiny, with_compatibility(request, ReleaseCompatibility(no_cache=True)))
    hook.remove()
    assert positions == [15, 16, 17, 18, 19, 20]
    np.testing.assert_allclose(uncached.latents, cached.latents, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(uncached.audio, cached.audio, rtol=1e-4, atol=2e-5)


def half_configured(lm: KalleLM) -> KalleLM:
    """``lm`` with a configuration that names fp16, as the released one does."""
    other = copy.deepcopy(lm)
    other.config = KalleLMConfig({**lm.config.backbone, "dtype": RELEASED_BACKBONE["dtype"]}, lm.config.latent_dim)
    return other


def test_config_dtype_runs_the_backbone_alone_in_half_precision(lm_tiny, flowvae_tiny) -> None:
    lm, habit = half_configured(lm_tiny), ReleaseCompatibility(config_dtype=True)
    half = habit.language_model(lm)
    assert {parameter.dtype for parameter in half.backbone.parameters()} == {torch.float16}
    assert half.backbone.rotary_emb.inv_freq.dtype == torch.float32
    for name in ("audio_linear", "distribution_linear"):
        assert getattr(half, name) is getattr(lm, name), "shared, and so in fp32"
    assert {parameter.dtype for parameter in lm.parameters()} == {torch.float32}, "the given model stays as it was"
    request = request_of(torch.arange(5, 20), 6, 3, stop=NEVER)
    single = speak(lm, flowvae_tiny, request)
    halved = speak(lm, flowvae_tiny, with_compatibility(request, habit))
    difference = np.abs(single.means - halved.means).max()
    assert 1e-5 < difference < 2e-2
    assert habit.language_model(half) is half


def test_config_dtype_without_one_in_the_configuration_is_fp32(lm_tiny) -> None:
    assert ReleaseCompatibility(config_dtype=True).language_model(lm_tiny) is lm_tiny


def test_config_dtype_refuses_weights_that_were_rounded_to_another(lm_tiny) -> None:
    rounded = half_configured(lm_tiny)
    rounded.backbone.bfloat16()
    with pytest.raises(UserError, match="loaded in bfloat16; load them in float32"):
        ReleaseCompatibility(config_dtype=True).language_model(rounded)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [({}, torch.float32), ({"torch_dtype": "bfloat16"}, torch.bfloat16), ({"dtype": "float16"}, torch.float16)],
)
def test_both_spellings_of_the_dtype_are_read(lm_tiny, values: dict[str, str], dtype: torch.dtype) -> None:
    lm = copy.copy(lm_tiny)
    lm.config = dataclasses.replace(lm_tiny.config, backbone={**lm_tiny.config.backbone, **values})
    assert configured_dtype(lm) == dtype
    lm.config = dataclasses.replace(lm_tiny.config, backbone={**lm_tiny.config.backbone, "torch_dtype": "int8"})
    with pytest.raises(UserError, match="bad dtype in the configuration of the backbone: got 'int8'"):
        configured_dtype(lm)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_autocast_around_exp_changes_nothing(device: str) -> None:
    """Why there is no option for it."""
    log_std = torch.linspace(-9, 4, 1000, device=device)
    expected = log_std.exp()
    with torch.autocast(device, dtype=torch.float16):
        assert torch.equal(log_std.exp(), expected)


def test_a_request_with_another_model_may_be_in_a_batch(kalle_tiny: Kalle) -> None:
    compatibility = ReleaseCompatibility(no_cache=True)
    requests = [
        SpeechRequest("One.", seed=1, max_seconds=0.4, stop=NEVER),
        SpeechRequest("Two.", seed=2, max_seconds=0.4, stop=NEVER, compatibility=compatibility),
    ]
    positions: list[int] = []
    hook = kalle_tiny.lm.backbone.layers[0].register_forward_hook(lambda _, args, output: positions.append(args[0].shape[1]))
    together = kalle_tiny.synthesize_batch(requests)
    hook.remove()
    assert positions.count(1) == 4, "the row with a cache"
    assert sum(count > 1 for count in positions) == 1 + 5, "the row without, at every frame"
    alone = [kalle_tiny.speak(request) for request in requests]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.audio, other.audio, atol=1e-4)


def test_an_unknown_decode_is_refused() -> None:
    with pytest.raises(UserError, match="bad decode: got 'bogus', expected one of sampled, resample, mean"):
        ReleaseCompatibility(decode="bogus")


@pytest.mark.parametrize("speaker", [False, True])
@pytest.mark.parametrize("prompt", [0, 6])
@pytest.mark.parametrize("stop", [StopRule(threshold=0.0), StopRule(threshold=0.6, min_index=20)])
def test_free_running_frames_equal_those_with_a_cache(lm_tiny, prompt: int, speaker: bool, stop: StopRule) -> None:
    generator = torch.Generator().manual_seed(prompt)
    ids = torch.randint(0, 320, (11,), generator=generator)
    latents = torch.randn(1, prompt, 8, generator=generator) if prompt else None
    voice = torch.randn(1, 64, generator=generator) if speaker else None
    noise = torch.randn(60, 8, generator=generator)
    cached, uncached = (generate(lm, ids, latents, voice, noise=noise, stop=stop) for lm in (lm_tiny, UncachedLM(lm_tiny)))
    with_cache, without = list(cached), list(uncached)
    assert len(with_cache) == len(without)
    assert cached.stop_reason == uncached.stop_reason == ("max_frames" if stop.threshold == 0 else "end")
    torch.testing.assert_close(torch.stack([f.z for f in without]), torch.stack([f.z for f in with_cache]), rtol=0, atol=1e-4)
    torch.testing.assert_close([f.end_kl for f in without], [f.end_kl for f in with_cache], rtol=0, atol=1e-4)


def test_frames_without_a_cache_equal_the_release(lm_tiny, io) -> None:
    golden = io("lm_tiny")
    frames = list(generate(UncachedLM(lm_tiny), golden["input_ids"], noise=golden["noise"].reshape(24, 8), stop=None))
    parameters = torch.stack([torch.cat([frame.distribution.mean, frame.distribution.log_std]) for frame in frames], dim=1)[None]
    torch.testing.assert_close(parameters[..., :23], golden["distributions_unprompted"], rtol=1e-4, atol=1e-5)


def test_nothing_but_the_frames_is_kept_between_steps(lm_tiny) -> None:
    _, first = UncachedLM(lm_tiny).prefill(torch.arange(5)[None])
    _, second = UncachedLM(lm_tiny).step(torch.zeros(1, 8), first)
    assert first.latents is None
    assert second.latents.shape == (1, 1, 8)

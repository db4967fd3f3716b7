"""Adapters as files, in a Kalle and in voices; and weights that nothing ever changes."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapt_tools import TEXT, sweep
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kalle.adaptation.adapt import Adaptation, AdaptOptions, adapt, learn, prompt_sequence, read_recording
from kalle.errors import UserError
from kalle.seeds import purpose_seed
from kalle.synthesis.adapter import ROWS, Adapter, base_hash, decode_change, encode_changes
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.options import SpeechRequest, StopRule
from kalle.synthesis.release_compat import OURS, ReleaseCompatibility
from kalle.synthesis.speech import Speech
from kalle.synthesis.voice import Voice

OPTIONS = {"lora": AdaptOptions(steps=6, lr=2e-2), "full": AdaptOptions(mode="full", steps=6, lr=1e-2)}
SAY = {"seed": 1, "max_seconds": 0.08, "stop": StopRule(0.0), "retries": 0}


@pytest.fixture(params=["lora", "full"])
def learnt(kalle: Kalle, request: pytest.FixtureRequest) -> Adaptation:
    return adapt(kalle, sweep(), TEXT, options=OPTIONS[request.param])


def weights(kalle: Kalle) -> bytes:
    """The whole state to the bit."""
    digest = hashlib.sha256()
    for name, tensor in kalle.lm.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.digest()


def equal(one: Speech, other: Speech) -> bool:
    return one.latents.shape == other.latents.shape and bool((one.latents == other.latents).all() and (one.audio == other.audio).all())


def test_a_voice_with_an_adapter_speaks_otherwise_and_the_next_as_before(kalle: Kalle, learnt: Adaptation) -> None:
    before, plain = weights(kalle), dataclasses.replace(learnt.voice, adapter=None)
    first = kalle.synthesize("four", plain, **SAY)
    adapted = kalle.synthesize("four", learnt.voice, **SAY)
    assert not equal(adapted, first)
    assert equal(kalle.synthesize("four", plain, **SAY), first)
    assert equal(kalle.synthesize("four", learnt.voice, **SAY), adapted)
    assert weights(kalle) == before


def test_a_kalle_with_an_adapter(kalle: Kalle, learnt: Adaptation, tmp_path: Path) -> None:
    learnt.adapter.save(tmp_path / "a.safetensors")
    plain = dataclasses.replace(learnt.voice, adapter=None)
    first, adapted = (kalle.synthesize("four", voice, **SAY) for voice in (plain, learnt.voice))
    drawn = kalle.synthesize("four", **SAY)
    kalle.adapter = kalle.load_adapter(tmp_path / "a.safetensors")
    assert equal(kalle.synthesize("four", plain, **SAY), adapted)
    assert not equal(kalle.synthesize("four", **SAY), drawn)
    with pytest.raises(UserError, match="the model has an adapter already"):
        adapt(kalle, sweep(), TEXT)
    kalle.adapter = None
    assert equal(kalle.synthesize("four", plain, **SAY), first)


def test_a_file_gives_the_very_model(kalle: Kalle, learnt: Adaptation, tmp_path: Path) -> None:
    """State and speech of what was learnt in memory, of an adapter file and of a voice file are the same to the bit."""
    learnt.adapter.save(tmp_path / "a.safetensors")
    learnt.voice.save(tmp_path / "v.safetensors")
    wanted = learnt.adapter.applied_to(kalle.lm).state_dict()
    adapted = kalle.synthesize("four", learnt.voice, **SAY)
    for adapter in (kalle.load_adapter(tmp_path / "a.safetensors"), kalle.load_voice(tmp_path / "v.safetensors").adapter):
        assert adapter is not None
        state = adapter.applied_to(kalle.lm).state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)
        assert adapter.digest == learnt.adapter.digest
        assert adapter.notes == learnt.adapter.notes
        assert equal(kalle.synthesize("four", dataclasses.replace(learnt.voice, adapter=adapter), **SAY), adapted)
    voice = Voice.load(tmp_path / "v.safetensors")
    assert voice.kind == "prompt + adapter"
    assert torch.equal(voice.prompt_latents, learnt.voice.prompt_latents)


def test_the_model_that_learnt_is_the_one_that_is_stored(kalle: Kalle) -> None:
    """The KL of the next step, measured on the stored adapter, is what training itself would have seen."""
    sequence = prompt_sequence(kalle, read_recording(kalle, sweep(), TEXT, 0))
    for options, tolerance in ((OPTIONS["lora"], 1e-6), (OPTIONS["full"], 1e-3)):
        longer = learn(kalle.lm, "b", [sequence], dataclasses.replace(options, steps=6, warmup_share=1.0), 2e-2)
        again = learn(kalle.lm, "b", [sequence], dataclasses.replace(options, steps=7, warmup_share=6 / 7), 2e-2)
        assert again.losses[:6] == longer.losses
        generator = torch.Generator().manual_seed(purpose_seed("kalle adapt noise 0"))
        noises = [torch.randn(sequence.noise_shape, generator=generator) for _ in range(7)]
        with torch.no_grad():
            loss = float(sequence.loss(longer.adapter.applied_to(kalle.lm), noises[6], "prediction_posterior"))
        assert loss == pytest.approx(again.losses[6], rel=tolerance)


class Interrupting(StopRule):
    """Ctrl-C while frame 20 is looked at."""

    def stops(self, end_kl: float, index: int, stop_probability: float | None = None) -> bool:
        if index == 20:
            raise KeyboardInterrupt
        return False


@pytest.mark.parametrize("end", ["exhausted", "closed", "interrupted"])
def test_a_stream_leaves_no_trace(kalle: Kalle, learnt: Adaptation, end: str) -> None:
    before, plain = weights(kalle), dataclasses.replace(learnt.voice, adapter=None)
    rule = Interrupting() if end == "interrupted" else StopRule(0.0)
    settings = {"seed": 1, "max_seconds": 0.3, "stop": rule, "chunk_frames": 2}
    whole = kalle.synthesize("four", learnt.voice, **{**SAY, "max_seconds": 0.3})
    stream = kalle.stream("four", learnt.voice, **settings)
    other = kalle.stream("four", plain, **{**settings, "stop": StopRule(0.0)})
    next(stream), next(other)
    if end == "exhausted":
        list(stream)
        assert (stream.speech.latents == whole.latents).all()
    elif end == "closed":
        stream.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            list(stream)
    list(other)
    assert equal(kalle.synthesize("four", plain, **SAY), Kalle(kalle.flowvae, kalle.lm, kalle.tokenizer).synthesize("four", plain, **SAY))
    assert weights(kalle) == before


def test_an_exception_inside_a_request_leaves_no_trace(kalle: Kalle, learnt: Adaptation) -> None:
    class Bang(StopRule):
        def stops(self, end_kl: float, index: int, stop_probability: float | None = None) -> bool:
            if index == 2:
                raise RuntimeError("bang")
            return False

    before = weights(kalle)
    request = SpeechRequest("four", learnt.voice, seed=0, max_seconds=0.08, stop=Bang())
    for action in (lambda: kalle.speak(request), lambda: kalle.synthesize_batch([request, "five"])):
        with pytest.raises(RuntimeError, match="bang"):
            action()
        assert weights(kalle) == before


def test_a_batch_of_several_adapters(kalle: Kalle, learnt: Adaptation) -> None:
    other = adapt(kalle, sweep(0.5, 400.0), "five", options=dataclasses.replace(OPTIONS["lora"], seed=1)).voice
    plain, before = dataclasses.replace(learnt.voice, adapter=None), weights(kalle)
    requests = [
        SpeechRequest("six", voice, seed=index, max_seconds=0.1, stop=StopRule(0.0), retries=0, compatibility=compatibility)
        for index, (voice, compatibility) in enumerate(
            [
                (learnt.voice, OURS),
                (plain, OURS),
                (other, OURS),
                (learnt.voice, OURS),
                (plain, OURS),
                (other, ReleaseCompatibility(no_cache=True)),
            ]
        )
    ]
    together = kalle.synthesize_batch(requests)
    for request, speech in zip(requests, together, strict=True):
        alone = kalle.speak(request)
        assert speech.seed == alone.seed
        torch.testing.assert_close(torch.from_numpy(speech.latents), torch.from_numpy(alone.latents), rtol=1e-4, atol=1e-4)
    assert weights(kalle) == before


def test_mapped_weights_are_not_written_through(toy_weights: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "weights"
    shutil.copytree(toy_weights, folder)
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    kalle = Kalle.from_pretrained(folder, "cpu")
    before = weights(kalle)
    for options in OPTIONS.values():
        voice = adapt(kalle, sweep(), TEXT, options=options).voice
        kalle.synthesize("four", voice, **SAY)
    assert weights(kalle) == before
    assert {path: path.read_bytes() for path in files} == files
    assert weights(Kalle.from_pretrained(folder, "cpu")) == before


def test_another_model_is_refused(kalle: Kalle, learnt: Adaptation, tmp_path: Path) -> None:
    learnt.adapter.save(tmp_path / "a.safetensors")
    changed = Kalle(kalle.flowvae, type(kalle.lm)(kalle.lm.config).eval(), kalle.tokenizer)
    message = "the adapter does not fit: it was made for the language model"
    for refused in (
        lambda: changed.load_adapter(tmp_path / "a.safetensors"),
        lambda: changed.synthesize("four", learnt.voice, **SAY),
        lambda: changed.stream("four", learnt.voice),
        lambda: changed.synthesize_batch(["five", SpeechRequest("four", learnt.voice)]),
    ):
        with pytest.raises(UserError, match=message):
            refused()
    changed.adapter = learnt.adapter
    with pytest.raises(UserError, match=message):
        changed.synthesize("four", **SAY)


def test_the_base_is_known_in_half_precision(toy_weights: Path) -> None:
    single, half = (Kalle.from_pretrained(toy_weights, "cpu", dtype) for dtype in ("float32", "bfloat16"))
    assert single.lm_hash == half.lm_hash == base_hash(load_file(toy_weights / "lm" / "model.safetensors"))
    with torch.no_grad():
        half.lm.audio_linear.bias[0] += 1
    assert base_hash(half.lm.state_dict()) != half.lm_hash
    voice = adapt(single, sweep(), TEXT, options=OPTIONS["lora"]).voice
    assert half.synthesize("four", voice, **SAY).frames
    assert adapt(half, sweep(), TEXT, options=OPTIONS["lora"]).kl.after > 0


def test_release_compatibility_keep_the_adapter(kalle: Kalle, learnt: Adaptation) -> None:
    plain = dataclasses.replace(learnt.voice, adapter=None)
    given = {**SAY, "compatibility": ReleaseCompatibility(no_cache=True, config_dtype=True)}
    assert not equal(kalle.synthesize("four", learnt.voice, **given), kalle.synthesize("four", plain, **given))
    assert not kalle._converted


def damaged(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def test_damaged_files(kalle: Kalle, learnt: Adaptation, tmp_path: Path) -> None:
    path, name = tmp_path / "a.safetensors", next(name for name in learnt.adapter.tensors if not name.endswith(ROWS))
    for change, message in (
        (lambda tensors: tensors.pop(name), "stands alone or is misshapen"),
        (lambda tensors: tensors[name].fill_(float("nan")), "NaN or infinite values"),
        (lambda tensors: tensors.clear(), "empty adapter"),
        (lambda tensors: tensors.update(x=torch.zeros(1)), "stands alone or is misshapen"),
    ):
        learnt.adapter.save(path)
        damaged(path, change)
        with pytest.raises(UserError, match=f"a damaged adapter: .*{message}"):
            Adapter.load(path)
    learnt.voice.save(path)
    with pytest.raises(UserError, match="it is a voice: give it as the voice"):
        Adapter.load(path)
    learnt.adapter.save(path)
    with pytest.raises(UserError, match=r"not a voice file.*give it as"):
        Voice.load(path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match="not an adapter file"):
        Adapter.load(path)
    with pytest.raises(UserError, match="adapter file not found"):
        Adapter.load(tmp_path / "none.safetensors")


def test_an_adapter_that_lies_about_its_base(kalle: Kalle, learnt: Adaptation) -> None:
    """The hash fits and the shapes don't, or there is no such layer."""
    tensors = {f"backbone.{name}": tensor for name, tensor in learnt.adapter.tensors.items()}
    exponents = {f"backbone.{name}": value for name, value in learnt.adapter.exponents.items()}
    liar = Adapter(learnt.adapter.kind, kalle.lm_hash, tensors, exponents=exponents)
    with pytest.raises(UserError, match="this model has no such layer"):
        liar.applied_to(kalle.lm)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.floats(-30, 5), st.integers(0, 2**31 - 1))
def test_changes_are_stored_within_their_precision(rows: int, columns: int, power: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    change = torch.randn(rows, columns, generator=generator) * 2**power
    change[torch.rand(rows, generator=generator) < 0.5] = 0
    stored, exponents = encode_changes({"w": change})
    if not change.any():
        assert not stored
        return
    back = decode_change(stored, "w", exponents["w"], change)
    assert float((back - change).abs().max()) <= 2**-11 * float(change.abs().max())
    assert bool(((back - change).abs() <= 2**-11 * change.abs() + 2**-38 * change.abs().max()).all())
    assert (w_rows := stored.get("w" + ROWS)) is None or 2 * len(w_rows) < rows

from __future__ import annotations

import copy
import dataclasses
import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from kalle.audio import read_audio, write_audio
from kalle.checkpoint import read_json, write_json
from kalle.errors import UserError
from kalle.synthesis import ReleaseCompatibility, SpeechRequest, StopRule, Voice
from kalle.synthesis.kalle import Kalle, resolve_dtype
from kalle.synthesis.longform import LongForm
from kalle.synthesis.options import cap_frames, cap_seconds
from kalle.text.tokenizer import prompt_ids

SHORT = {"max_seconds": 0.48, "stop": StopRule(threshold=0.0)}
"""Six frames."""


@pytest.fixture
def recording() -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return (0.1 * torch.randn(8000, generator=generator)).numpy()


def test_the_same_seed_gives_the_same_audio_whatever_torch_does(kalle_tiny: Kalle) -> None:
    torch.manual_seed(1)
    first = kalle_tiny.synthesize("Hello.", seed=5, **SHORT)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = kalle_tiny.synthesize("Hello.", seed=5, **SHORT)
    np.testing.assert_array_equal(first.audio, second.audio)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.abs(first.audio - kalle_tiny.synthesize("Hello.", seed=6, **SHORT).audio).max() > 1e-4


def test_a_drawn_seed_is_reported_and_gives_the_result_again(kalle_tiny: Kalle) -> None:
    speech = kalle_tiny.synthesize("Hello.", **SHORT)
    np.testing.assert_array_equal(kalle_tiny.synthesize("Hello.", seed=speech.seed, **SHORT).audio, speech.audio)
    assert speech.seed != kalle_tiny.synthesize("Hello.", **SHORT).seed


def assert_sounds_like(one: np.ndarray, other: np.ndarray) -> None:
    """Equal but for rounding: weights mapped from a file lie at other addresses, where some processors add in another order."""
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_speech_says_what_it_is(kalle_tiny: Kalle, tmp_path) -> None:
    speech = kalle_tiny.synthesize("Hello.", seed=5, **SHORT)
    assert speech.audio.dtype == np.float32
    assert speech.audio.shape == (6 * 1280,)
    assert np.abs(speech.audio).max() <= 1
    assert (speech.sample_rate, speech.frames, speech.stop_reason, speech.max_frames) == (16000, 6, "max_frames", 6)
    assert speech.seconds == pytest.approx(0.48)
    assert speech.log_std.shape == speech.latents.shape == (6, 8)
    assert speech.end_kl.shape == (6,)
    np.testing.assert_allclose(speech.frame_confidence, 1 / (1 + np.exp(speech.log_std.mean(1))), rtol=1e-6)
    assert 0 < speech.confidence < 1
    speech.save(tmp_path / "out.wav")
    np.testing.assert_allclose(read_audio(tmp_path / "out.wav"), speech.pcm16() / 32768, atol=1e-6)


def test_the_stop_rule_ends_the_speech(kalle_tiny: Kalle) -> None:
    speech = kalle_tiny.synthesize("Hello.", seed=5, stop=StopRule(threshold=1e9, min_index=3))
    assert (speech.frames, speech.stop_reason) == (4, "end")


def test_a_weight_folder_is_loaded_with_its_own_stop_rule(weight_folder, kalle_tiny: Kalle) -> None:
    write_json(
        weight_folder / "config.json", read_json(weight_folder / "config.json") | {"stop": {"threshold": 1e9, "false_stop_rate": 0.1}}
    )
    loaded = Kalle.from_pretrained(weight_folder, device="cpu")
    assert loaded.sample_rate == 16000
    assert loaded.synthesize("Hello.", seed=5).frames == 4
    assert_sounds_like(loaded.synthesize("Hello.", seed=5, **SHORT).audio, kalle_tiny.synthesize("Hello.", seed=5, **SHORT).audio)


def test_a_folder_without_config_has_defaults(weight_folder) -> None:
    (weight_folder / "config.json").unlink()
    assert Kalle.from_pretrained(weight_folder, device="cpu").config.stop == StopRule()


def test_the_prompt_changes_the_speech(kalle_tiny: Kalle, recording: np.ndarray) -> None:
    voice = kalle_tiny.voice(recording, "one two")
    assert voice.prompt_latents is not None
    assert voice.prompt_latents.shape[1] == 8
    assert voice.speaker_latent is None
    prompted = kalle_tiny.synthesize("Hello.", voice, seed=5, **SHORT)
    assert prompted.frames == 6, "the prompt itself is not spoken"
    assert np.abs(prompted.audio - kalle_tiny.synthesize("Hello.", seed=5, **SHORT).audio).max() > 1e-4
    again = kalle_tiny.voice(recording, "one two")
    assert torch.equal(again.prompt_latents, voice.prompt_latents)


def test_a_prompt_file_is_resampled_and_mixed_down(kalle_tiny: Kalle, recording: np.ndarray, tmp_path) -> None:
    write_audio(tmp_path / "a.wav", recording, 8000)
    stereo = np.stack([recording, np.zeros_like(recording)], axis=1)
    soundfile.write(tmp_path / "stereo.wav", stereo, 8000, subtype="FLOAT")
    torch.testing.assert_close(
        kalle_tiny.voice(tmp_path / "stereo.wav", "one").prompt_latents,
        kalle_tiny.voice(recording, "one", sample_rate_hz=8000).prompt_latents,
        rtol=1e-4,
        atol=1e-4,
    )
    assert len(kalle_tiny.voice(tmp_path / "a.wav", "one").prompt_latents) == 13, "one second of audio"
    from_array = kalle_tiny.voice(read_audio(tmp_path / "a.wav", 8000), "one", sample_rate_hz=8000)
    torch.testing.assert_close(from_array.prompt_latents, kalle_tiny.voice(tmp_path / "a.wav", "one").prompt_latents)


def test_release_compatibility_reach_the_tokens(kalle_tiny: Kalle, recording: np.ndarray, monkeypatch) -> None:
    import kalle.synthesis.kalle as module

    seen = []
    monkeypatch.setattr(module, "speak_with_retries", lambda lm, flowvae, request, *_: seen.append(request))
    voice = kalle_tiny.voice(recording, "one two")
    kalle_tiny.synthesize("three", voice, seed=0, compatibility=ReleaseCompatibility.release())
    kalle_tiny.synthesize("three", voice, seed=0)
    assert seen[0].text_ids.tolist() == prompt_ids(kalle_tiny.tokenizer, "three", "one two", tokenise_separately=True).tolist()
    assert seen[1].text_ids.tolist() == prompt_ids(kalle_tiny.tokenizer, "three", "one two").tolist()
    assert seen[0].text_ids.tolist() != seen[1].text_ids.tolist()


def test_a_speaker_encoder_needs_no_transcript(kalle_speaker: Kalle, recording: np.ndarray) -> None:
    voice = kalle_speaker.voice(recording)
    assert voice.prompt_latents is None
    assert voice.speaker_latent.shape == (64,)
    spoken = kalle_speaker.synthesize("Hello.", voice, seed=5, **SHORT)
    other = kalle_speaker.synthesize("Hello.", kalle_speaker.random_voice(1), seed=5, **SHORT)
    assert np.abs(spoken.audio - other.audio).max() > 1e-4
    assert kalle_speaker.voice(recording, "one").prompt_latents is not None


def test_random_voices_belong_to_their_seed(kalle_tiny: Kalle, kalle_speaker: Kalle) -> None:
    assert torch.equal(kalle_speaker.random_voice(3).speaker_latent, kalle_speaker.random_voice(3).speaker_latent)
    assert not torch.equal(kalle_speaker.random_voice(3).speaker_latent, kalle_speaker.random_voice(4).speaker_latent)
    kalle = Kalle(kalle_tiny.flowvae, kalle_tiny.lm, kalle_tiny.tokenizer, type(kalle_tiny.config)(stop=StopRule(threshold=1e9)))
    first, second, other = kalle.random_voice(3), kalle.random_voice(3), kalle.random_voice(4)
    assert first.text
    assert torch.equal(first.prompt_latents, kalle_tiny.random_voice(3).prompt_latents), "a calibrated stop changed the voice"
    assert torch.equal(first.prompt_latents, second.prompt_latents)
    assert not torch.equal(first.prompt_latents, other.prompt_latents)
    kalle.synthesize("Hello.", first, seed=1, max_seconds=0.2)


@pytest.fixture
def narrow(kalle_tiny: Kalle, kalle_speaker: Kalle) -> list[Kalle]:
    """Both models with 50 positions."""
    made = []
    for kalle in (kalle_tiny, kalle_speaker):
        lm = copy.deepcopy(kalle.lm)
        lm.backbone.config = dataclasses.replace(lm.backbone.config, max_position_embeddings=50)
        made.append(Kalle(kalle.flowvae, lm, kalle.tokenizer))
    return made


def test_a_request_gets_the_positions_that_its_text_and_voice_leave(narrow: list[Kalle], recording: np.ndarray) -> None:
    for kalle in narrow:
        voice = kalle.voice(recording, "one")
        request = kalle.resolve(SpeechRequest("Hello.", voice, seed=1))
        assert len(request.prompt_latents) == 6
        speaker = 0 if request.speaker_latent is None else 1
        assert request.max_frames == 50 - len(request.text_ids) - 6 - speaker < cap_frames("Hello.", 12.5)
        assert kalle.resolve(SpeechRequest("Hello.", voice, seed=1, max_seconds=0.4)).max_frames == 5
    plain = narrow[0].resolve(SpeechRequest("Hello.", seed=1, max_seconds=60.0))
    assert plain.max_frames == 50 - len(plain.text_ids)
    with pytest.raises(UserError, match="with its prompt it takes 50 positions, the model reads 50"):
        narrow[0].resolve(SpeechRequest("a" * 47, seed=1))
    assert narrow[0].resolve(SpeechRequest("a" * 46, seed=1)).max_frames == 1


def test_without_a_voice_the_seed_decides_the_speaker(kalle_speaker: Kalle) -> None:
    latents = [kalle_speaker.resolve(SpeechRequest("Hello.", seed=seed)).speaker_latent for seed in (4, 5)]
    assert torch.equal(latents[0], kalle_speaker.random_voice(4).speaker_latent)
    assert torch.equal(latents[1], kalle_speaker.random_voice(5).speaker_latent)
    assert not torch.equal(*latents)


def test_a_cap_that_cuts_because_it_was_asked_for_is_not_tried_again(kalle_tiny: Kalle) -> None:
    stop = StopRule(threshold=1e-9)
    cut, twice = (SpeechRequest("Hi.", seed=5, stop=stop, max_seconds=seconds, retries=1) for seconds in (0.4, cap_seconds("Hi.")))
    assert [len(kalle_tiny.speak(request).attempts) for request in (cut, twice)] == [1, 2]
    assert [len(speech.attempts) for speech in kalle_tiny.synthesize_batch([cut, twice])] == [1, 2]
    with pytest.raises(UserError, match="bad retries: got -1"):
        kalle_tiny.synthesize("Hi.", max_seconds=0.4, retries=-1)


def test_a_name_means_the_stored_voice_and_a_path_the_file(weight_folder, kalle_tiny: Kalle, recording, tmp_path, monkeypatch) -> None:
    stored, other = kalle_tiny.voice(recording, "one two"), kalle_tiny.voice(recording, "three")
    stored.save(weight_folder / "voices" / "anna.safetensors")
    monkeypatch.chdir(tmp_path)
    other.save(tmp_path / "anna")
    other.save(tmp_path / "bert")
    write_json(weight_folder / "config.json", {"format_version": 1, "voice": "anna"})
    kalle = Kalle.from_pretrained(weight_folder, device="cpu")
    assert kalle.default_voice.text == kalle.load_voice("anna").text == "one two"
    assert kalle.load_voice("./anna").text == kalle.load_voice(tmp_path / "anna").text == kalle.load_voice("bert").text == "three"
    with pytest.raises(UserError, match=r"got 'anna\.safetensors', expected a voice file or one of anna"):
        kalle.load_voice("anna.safetensors")


def test_a_voice_that_may_not_be_read_is_told_with_the_reason(weight_folder, kalle_tiny: Kalle, recording, monkeypatch) -> None:
    path = weight_folder / "voices" / "anna.safetensors"
    kalle_tiny.voice(recording, "one two").save(path)
    kalle = Kalle.from_pretrained(weight_folder, device="cpu")

    def forbidden(self: Path, *_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(UserError, match=r"cannot read '.*anna.safetensors': Permission denied"):
        kalle.load_voice("anna")


def test_the_default_voice_is_read_once(weight_folder, kalle_tiny: Kalle, recording: np.ndarray) -> None:
    path = weight_folder / "voices" / "anna.safetensors"
    kalle_tiny.voice(recording, "one two").save(path)
    write_json(weight_folder / "config.json", {"format_version": 1, "voice": "anna"})
    kalle = Kalle.from_pretrained(weight_folder, device="cpu")
    kalle.synthesize("Hello.", seed=5, **SHORT)
    path.unlink()
    assert kalle.synthesize("Hello.", seed=5, **SHORT).frames == 6
    assert LongForm(kalle, "One.").voice is kalle.default_voice
    with pytest.raises(UserError, match=r"got 'anna', expected a voice file; this model has no stored voices"):
        Kalle.from_pretrained(weight_folder, device="cpu").synthesize("Hello.", seed=5, **SHORT)


def test_named_and_default_voices(weight_folder, kalle_tiny: Kalle, recording: np.ndarray) -> None:
    voice = kalle_tiny.voice(recording, "one two")
    voice.save(weight_folder / "voices" / "anna.safetensors")
    write_json(weight_folder / "config.json", {"format_version": 1, "voice": "anna"})
    loaded = Kalle.from_pretrained(weight_folder, device="cpu")
    expected = kalle_tiny.synthesize("Hello.", voice, seed=5, **SHORT).audio
    default = loaded.synthesize("Hello.", seed=5, **SHORT).audio
    assert_sounds_like(default, expected)
    np.testing.assert_array_equal(loaded.synthesize("Hello.", loaded.load_voice("anna"), seed=5, **SHORT).audio, default)
    with pytest.raises(UserError, match="voice file not found"):
        loaded.load_voice("bert")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": " "}, "the text is empty"),
        ({"seed": -1}, "bad seed: got -1"),
        ({"temperature": float("inf")}, "bad temperature: got inf"),
        ({"max_seconds": 0.01}, "bad max_seconds: got 0.01 s, expected at least one frame"),
    ],
)
def test_bad_values(kalle_tiny: Kalle, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        kalle_tiny.synthesize(**{"text": "Hello."} | options)


def test_bad_prompts(kalle_tiny: Kalle, kalle_speaker: Kalle, recording: np.ndarray, tmp_path) -> None:
    with pytest.raises(UserError, match="a prompt without its transcript"):
        kalle_tiny.voice(recording)
    for kalle in (kalle_tiny, kalle_speaker):
        with pytest.raises(UserError, match="the prompt text is empty"):
            kalle.voice(recording, " ")
    with pytest.raises(UserError, match="not found"):
        kalle_tiny.voice(tmp_path / "a.wav", "one")
    for bad in (np.zeros(0), np.zeros((2, 8000)), np.full(8000, np.nan)):
        with pytest.raises(UserError, match="bad prompt audio"):
            kalle_tiny.voice(bad, "one")
    for bad in (recording[:1000], np.zeros(61 * 16000, dtype=np.float32)):
        with pytest.raises(UserError, match="bad prompt length"):
            kalle_tiny.voice(bad, "one")


def test_a_text_beyond_the_context_is_refused(kalle_tiny: Kalle) -> None:
    with pytest.raises(UserError, match=r"too long: with its prompt it takes 131075 positions, the model reads 131072"):
        kalle_tiny.synthesize("a" * 131072, max_seconds=1e4, by_sentences=False)


def test_the_shortest_prompt_has_a_frame(kalle_tiny: Kalle, recording: np.ndarray) -> None:
    assert len(kalle_tiny.voice(recording[:1280], "one").prompt_latents) >= 1


def test_bad_folders(weight_folder, tmp_path) -> None:
    with pytest.raises(UserError, match="no such weight folder"):
        Kalle.from_pretrained(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a weight folder"):
        Kalle.from_pretrained(tmp_path / "empty")
    write_json(weight_folder / "config.json", {"format_version": 99})
    with pytest.raises(UserError, match="format_version 99"):
        Kalle.from_pretrained(weight_folder)
    write_json(weight_folder / "config.json", {"sample_rate": 24000})
    with pytest.raises(UserError, match="24000 Hz"):
        Kalle.from_pretrained(weight_folder)
    write_json(weight_folder / "config.json", {"stop": 0.5})
    with pytest.raises(UserError, match=r"stop is 0\.5"):
        Kalle.from_pretrained(weight_folder)
    (weight_folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer in"):
        Kalle.from_pretrained(weight_folder)


def test_voices_of_another_model_are_refused(kalle_tiny: Kalle, kalle_speaker: Kalle, recording: np.ndarray) -> None:
    with pytest.raises(UserError, match="needs a speaker encoder, which this model lacks"):
        kalle_tiny.synthesize("Hello.", kalle_speaker.random_voice(0))
    stranger = Voice({"flowvae_encoder": "0" * 64}, torch.zeros(3, 8), text="one")
    with pytest.raises(UserError, match="made with the Flow-VAE encoder 000000000000"):
        kalle_tiny.synthesize("Hello.", stranger)


def test_length_cap() -> None:
    assert cap_seconds("x" * 100) == pytest.approx(23)
    assert cap_seconds("字" * 10) == pytest.approx(9)
    assert cap_seconds("12345") == pytest.approx(7.5)
    assert cap_seconds("x" * 10_000) == 80
    assert cap_frames("x", 12.5, 0.48) == 6
    assert cap_frames("x", 12.5) == 40


def test_dtypes() -> None:
    assert resolve_dtype("auto", torch.device("cpu")) is torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert resolve_dtype(torch.float16, torch.device("cpu")) is torch.float16
    with pytest.raises(UserError, match="unknown dtype: got 'int8'"):
        resolve_dtype("int8", torch.device("cpu"))


def test_the_package_is_lazy_and_light() -> None:
    code = (
        "import sys, kalle; assert 'torch' not in sys.modules; assert kalle.__version__\n"
        "from kalle import Kalle, Voice, FlowVAE, KalleLM, DiagGaussian\n"
        "heavy = [name for name in ('lightning', 'hydra', 'omegaconf', 'lhotse', 'matplotlib') if name in sys.modules]\n"
        "assert not heavy, heavy\n"
        "try:\n    kalle.nothing\nexcept AttributeError: pass\nelse: raise SystemExit(3)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kalle.errors import UserError
from kalle.models.backbone import BackboneConfig
from kalle.seeds import sentence_seed
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.longform import LongForm, Part, even_gain_db, loudness_db, rolling_voice, speak_long
from kalle.synthesis.longform_files import PartStore, settings_of, stored_seed
from kalle.synthesis.options import GenerationOptions, SpeechRequest, StopRule, usual_seconds
from kalle.synthesis.speech import Attempt, Speech
from kalle.synthesis.voice import FLOWVAE_ENCODER, Voice

TEXT = "The first sentence is here. The second one follows it.\n\nHere is a new paragraph. It ends with this one."
RATE = 16000


class Scripted:
    """Stands where a model would be: speaks at an even pace, or as ``script`` says for one call."""

    def __init__(self, kalle: Kalle, script: Callable[[int, str, int], dict[str, object]] | None = None) -> None:
        self.kalle, self.script, self.calls = kalle, script or (lambda *_: {}), []

    def __getattr__(self, name: str) -> object:
        return getattr(self.kalle, name)

    def random_voice(self, seed: int) -> Voice:
        return voice_of(self.kalle, 5)

    def speak(self, request: SpeechRequest) -> Speech:
        text, voice, seed = request.text, request.voice, request.options.seed
        said = {"seconds": max(usual_seconds(text), 0.08), "level": 0.1, "stop_reason": "end"} | self.script(len(self.calls), text, seed)
        self.calls.append((text, voice, seed))
        samples = round(float(said["seconds"]) * RATE)
        frames = samples // 1280 + (samples > 0)
        audio = float(said["level"]) * np.sin(np.arange(samples) / 5).astype(np.float32)
        zeros = np.zeros((frames, 8), dtype=np.float32)
        warnings = () if said["stop_reason"] == "end" else ("words may be missing",)
        arrays = dict.fromkeys(("latents", "log_std", "means"), zeros) | dict.fromkeys(("end_kl", "log_likelihood"), zeros[:, 0])
        return Speech(audio, RATE, said["stop_reason"], seed, max_frames=99, warnings=warnings, text=text, **arrays)


def voice_of(kalle: Kalle, frames: int) -> Voice:
    latents = torch.randn(frames, 8, generator=torch.Generator().manual_seed(0))
    return Voice({FLOWVAE_ENCODER: kalle.hashes[FLOWVAE_ENCODER]}, latents, text="Some words before.")


def with_positions(kalle: Kalle, positions: int) -> BackboneConfig:
    return dataclasses.replace(kalle.lm.backbone.config, max_position_embeddings=positions)


@pytest.fixture
def roomy(kalle_tiny: Kalle, monkeypatch) -> Kalle:
    """The tiny model with the positions of a real one; only a scripted model speaks with so many."""
    monkeypatch.setattr(kalle_tiny.lm.backbone, "config", with_positions(kalle_tiny, 4096))
    return kalle_tiny


def spoken(kalle: object, text: str, **options: object) -> list[Part]:
    return list(speak_long(kalle, text, options=GenerationOptions(seed=1, **options)))


def test_parts_follow_each_other_with_pauses_and_make_the_whole(roomy: Kalle) -> None:
    parts = spoken(Scripted(roomy), TEXT, pause_s=0.25, paragraph_pause_s=1.0)
    assert [TEXT[p.sentence.start : p.sentence.end] for p in parts] == [p.speech.text for p in parts]
    assert [p.pause_samples for p in parts] == [4000, 16000, 4000, 0]
    whole = np.concatenate([p.with_pause for p in parts])
    for part in parts:
        assert np.array_equal(whole[part.start_sample : part.start_sample + len(part.audio)], part.audio)
    assert parts[1].start_s == pytest.approx(parts[0].end_s + 0.25)
    assert all(p.audio.dtype == np.float32 and abs(p.audio[0]) < 1e-3 and abs(p.audio[-1]) < 1e-3 for p in parts)


def test_each_sentence_has_a_seed_and_the_same_voice(roomy: Kalle) -> None:
    model = Scripted(roomy)
    spoken(model, TEXT)
    assert [seed for _, _, seed in model.calls] == [sentence_seed(1, index) for index in range(4)]
    assert len({id(voice) for _, voice, _ in model.calls}) == 1
    given_voice = voice_of(roomy, 9)
    list(speak_long(model, TEXT, given_voice, GenerationOptions(seed=1)))
    assert all(voice is given_voice for _, voice, _ in model.calls[4:])


def test_rolling_adds_the_sentence_before_within_the_paragraph(roomy: Kalle) -> None:
    model = Scripted(roomy)
    parts = spoken(model, TEXT, rolling=True)
    voices = [voice for _, voice, _ in model.calls]
    assert [part.rolled for part in parts] == [False, True, False, True]
    assert voices[1].text == f"Some words before. {parts[0].speech.text}"
    assert len(voices[1].prompt_latents) == 5 + len(parts[0].speech.latents)
    assert voices[1].prompt_latents[:5].equal(voices[0].prompt_latents)
    assert not any(part.rolled for part in spoken(Scripted(roomy), TEXT, rolling=True, max_prompt_s=1.0))
    bad = Scripted(roomy, lambda *_: {"stop_reason": "max_frames"})
    assert not any(part.rolled for part in spoken(bad, TEXT, rolling=True))


def test_rolling_stays_within_the_positions(kalle_tiny: Kalle) -> None:
    anchor = voice_of(kalle_tiny, 5)
    long = np.zeros((20, 8), dtype=np.float32)
    limit = kalle_tiny.lm.backbone.config.max_position_embeddings
    assert rolling_voice(kalle_tiny, anchor, long, "a" * limit, "Hi.", GenerationOptions(max_prompt_s=60)) is anchor


def test_a_speaker_voice_rolls_with_the_frames_of_the_sentence_before(kalle_speaker: Kalle) -> None:
    anchor = kalle_speaker.random_voice(3)
    rolled = rolling_voice(kalle_speaker, anchor, np.ones((4, 8), dtype=np.float32), "said", "x", GenerationOptions(max_seconds=0.4))
    assert rolled.text == "said"
    assert rolled.speaker_latent is anchor.speaker_latent
    assert len(rolled.prompt_latents) == 4
    rolled.check_fits(kalle_speaker.hashes)


def test_levels_are_evened_within_limits(roomy: Kalle) -> None:
    levels = [0.1, 0.14, 0.01, 0.1]
    parts = spoken(Scripted(roomy, lambda call, *_: {"level": levels[call]}), TEXT)
    assert [p.gain_db for p in parts] == pytest.approx([0.0, -1.46, 6.0, 0.0], abs=0.05)
    assert loudness_db(parts[1].audio, RATE) == pytest.approx(parts[1].loudness_db + parts[1].gain_db, abs=0.05)
    assert parts[2].loudness_db == pytest.approx(-43.0, abs=0.1)


def test_an_odd_pace_is_tried_once_more(roomy: Kalle) -> None:
    text = " ".join(f"This is the sentence with number {word} in it." for word in ("one", "two", "three", "four", "five"))

    def fast_then(factor: float) -> Callable[[int, str, int], dict[str, object]]:
        return lambda call, words, _: {"seconds": usual_seconds(words) * {3: 0.25, 4: factor}.get(call, 1.0)}

    model = Scripted(roomy, fast_then(1.0))
    parts = spoken(model, text)
    assert [p.tries for p in parts] == [1, 1, 1, 2, 1]
    assert parts[3].speech.seed == sentence_seed(1, 3, 1)
    assert "4.0 times as fast or slow as the others, tried again: now 1.0 times" in parts[3].warnings[0]
    parts = spoken(Scripted(roomy, fast_then(0.2)), text)
    assert parts[3].speech.seed == sentence_seed(1, 3)
    assert "still 4.0 times" in parts[3].warnings[0]


def test_a_bad_ending_is_told_and_the_rest_goes_on(roomy: Kalle) -> None:
    def script(call: int, *_: object) -> dict[str, object]:
        return {1: {"stop_reason": "max_frames"}, 2: {"seconds": 0}}.get(call, {})

    parts = spoken(Scripted(roomy, script), TEXT)
    assert [p.speech.stop_reason for p in parts] == ["end", "max_frames", "end", "end"]
    assert parts[1].warnings == ("words may be missing",)
    assert len(parts[2].audio) == 0
    assert parts[3].start_sample == parts[2].start_sample + parts[2].pause_samples


def test_a_sentence_that_is_too_long_is_cut_and_told(roomy: Kalle) -> None:
    parts = spoken(Scripted(roomy), "word " * 300)
    assert len(parts) > 2
    assert all("too long for one request" in part.warnings[0] for part in parts[:-1])
    assert parts[-1].warnings == ()
    assert [part.pause_samples for part in parts] == [0] * len(parts)
    assert " ".join(part.speech.text for part in parts).split() == ["word"] * 300


def test_normalised_words_are_spoken_and_the_written_kept(roomy: Kalle) -> None:
    pytest.importorskip("inflect")
    (part,) = spoken(Scripted(roomy), "It costs 5 pounds in Привет.", normalise=True)
    assert part.speech.text == "It costs five pounds in Привет."
    assert part.sentence.text == "It costs 5 pounds in Привет."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the text is empty"),
        (" \n", "the text is empty"),
        ("a\x00b", "control character"),
        ("*** 😀", "nothing to speak"),
        ("\ud800", "surrogate"),
    ],
)
def test_what_cannot_be_spoken_is_refused(kalle_tiny: Kalle, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LongForm(Scripted(kalle_tiny), text)


def test_bad_values_are_refused(roomy: Kalle) -> None:
    with pytest.raises(UserError, match="bad pause_s: got -1"):
        GenerationOptions(pause_s=-1)
    with pytest.raises(UserError, match="leaves no room"):
        LongForm(Scripted(roomy), "Hi there.", replace(voice_of(roomy, 5), text="a" * 4090))


@given(st.text(st.sampled_from("ab .!?,\n中文。！😀שلپ1۲—*"), max_size=120))
@settings(max_examples=30, deadline=None)
def test_no_word_of_any_text_is_left_out(kalle_tiny: Kalle, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kalle_tiny.lm.backbone, "config", with_positions(kalle_tiny, 4096))
        if not any(c.isalnum() for c in text):
            with pytest.raises(UserError, match=r"empty|nothing to speak"):
                spoken(Scripted(kalle_tiny), text)
            return
        parts = spoken(Scripted(kalle_tiny), text)
    letters = [c for c in text if c.isalnum()]
    assert [c for part in parts for c in part.speech.text if c.isalnum()] == letters
    assert all(a.start_sample + len(a.audio) <= b.start_sample for a, b in itertools.pairwise(parts))


def test_twenty_thousand_characters(roomy: Kalle) -> None:
    text = "This is a sentence with six words. " * 600
    long = LongForm(Scripted(roomy, lambda *_: {"seconds": 0.1}), text)
    assert sum(1 for _ in long) == len(long) == 600


def test_the_real_chain_resumes_to_the_same_parts(kalle_tiny: Kalle, tmp_path: Path) -> None:
    options = GenerationOptions(seed=5, max_seconds=0.4, rolling=True)
    text = "One two three four. Five six seven eight. Nine ten eleven twelve."

    def long() -> LongForm:
        return LongForm(kalle_tiny, text, voice_of(kalle_tiny, 3), options)

    whole = list(long())
    store = PartStore(tmp_path / "parts", settings_of(long()))
    list(itertools.islice(long().parts(store), 2))
    assert store.count() == 2
    again = list(long().parts(PartStore(tmp_path / "parts", settings_of(long()))))
    assert [part.kept for part in again] == [True, True, False]
    for ours, theirs in zip(again, whole, strict=True):
        assert np.array_equal(ours.audio, theirs.audio)
        assert np.array_equal(ours.speech.latents, theirs.speech.latents)
        assert (ours.speech.text, ours.speech.seed, ours.start_sample, ours.gain_db, ours.rolled, ours.sentence) == (
            theirs.speech.text, theirs.speech.seed, theirs.start_sample, theirs.gain_db, theirs.rolled, theirs.sentence,
        )  # fmt: skip
    assert stored_seed(tmp_path / "parts") == 5


def test_a_part_is_read_back_with_all_of_its_result(roomy: Kalle, tmp_path: Path) -> None:
    long = LongForm(Scripted(roomy), TEXT)
    first = next(iter(long))
    result = {
        "stop": StopRule(0.25, 5, probability=0.75),
        "attempts": (Attempt(3, "silence", 9, kept=False), Attempt(4, "end", 8)),
        "low_confidence": 0.375,
        "stuck_seconds": 0.5,
        "trimmed_seconds": 0.25,
        "end_frame_kl": 0.125,
        "end_frame_probability": 0.875,
        "warnings": ("one", "two"),
    }
    store = PartStore(tmp_path / "parts", settings_of(long))
    store.write(replace(first, speech=replace(first.speech, **result)))
    read = store.read(0, long.sentences[0])
    assert read is not None
    assert {name: getattr(read.speech, name) for name in result} == result


def test_a_part_whose_files_are_damaged_is_spoken_again(roomy: Kalle, tmp_path: Path) -> None:
    model = Scripted(roomy, lambda call, *_: {"seconds": 0} if call == 1 else {})
    long = LongForm(model, TEXT)
    store = PartStore(tmp_path / "parts", settings_of(long))
    parts = list(long.parts(store))
    silent = store.read(1, long.sentences[1])
    assert silent is not None
    assert len(silent.audio) == 0
    assert silent.loudness_db == float("-inf")
    assert store.read(0, replace(long.sentences[0], text="other")) is None
    (tmp_path / "parts" / "00002.wav").unlink()
    assert store.read(2, long.sentences[2]) is None
    assert np.array_equal(store.read(3, long.sentences[3]).audio, parts[3].audio)
    for name in ("00003.wav", "00003.safetensors", "00003.json"):
        path = tmp_path / "parts" / name
        whole = path.read_bytes()
        for damaged in (b"", b"RIFF", b"{}", whole[: len(whole) // 2]):
            path.write_bytes(damaged)
            assert store.read(3, long.sentences[3]) is None, (name, damaged[:4])
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 2}, "another seed"),
        ({"text": TEXT + " More words here."}, "another text"),
        ({"pause_s": 1.0}, "another pause s"),
        ({"voice": 9}, "another voice"),
    ],
)
def test_other_settings_are_noticed(roomy: Kalle, tmp_path: Path, changed: dict[str, object], named: str) -> None:
    model = Scripted(roomy)

    def long(seed: int = 1, text: str = TEXT, voice: int = 5, **options: object) -> LongForm:
        return LongForm(model, text, voice_of(roomy, voice), GenerationOptions(seed=seed, **options))

    list(long().parts(PartStore(tmp_path / "parts", settings_of(long()))))
    with pytest.raises(UserError, match=rf"{named}; .*to begin again"):
        PartStore(tmp_path / "parts", settings_of(long(**changed)))


def test_the_weights_own_temperature_is_a_setting(roomy: Kalle) -> None:
    def temperature(given: float | None) -> object:
        return settings_of(LongForm(Scripted(roomy), TEXT, voice_of(roomy, 5), GenerationOptions(temperature=given)))["temperature"]

    assert temperature(None) == roomy.temperature, "or a text would go on at another one when the weights' own has changed"
    assert temperature(0.3) == 0.3


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    store = PartStore(tmp_path / "parts", {})
    with store.locked(), pytest.raises(UserError, match="another run"), store.locked():
        pass
    assert not (tmp_path / "parts").exists()


def test_loudness_agrees_with_the_standard_up_to_its_weighting() -> None:
    pyloudnorm = pytest.importorskip("pyloudnorm")
    generator = np.random.default_rng(0)
    noise = generator.standard_normal(48000) * np.repeat([0.1, 0.001, 0.05], 16000)
    meter = pyloudnorm.Meter(RATE)
    difference = loudness_db(noise, RATE) - loudness_db(0.5 * noise[:20000], RATE)
    assert difference == pytest.approx(meter.integrated_loudness(noise) - meter.integrated_loudness(0.5 * noise[:20000]), abs=0.3)
    assert loudness_db(np.full(100, 0.1), RATE) == pytest.approx(-20)
    assert loudness_db(np.zeros(9000), RATE) == loudness_db(np.zeros(0), RATE) == float("-inf")


def test_gain_has_limits_and_never_clips() -> None:
    assert even_gain_db(-30, -25, 0.1, 6) == 5
    assert even_gain_db(-40, -25, 0.1, 6) == 6
    assert even_gain_db(-10, -25, 0.9, 6) == -6
    assert even_gain_db(-30, -25, 0.9, 6) == pytest.approx(0.83, abs=0.01)
    assert even_gain_db(-30, -25, 1.0, 6) == 0
    assert even_gain_db(float("-inf"), -25, 0.0, 6) == 0

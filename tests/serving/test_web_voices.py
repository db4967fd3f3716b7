"""Whose voice speaks: recordings, random ones and those that were kept."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from page_calls import HI, pcm, ran

from kalle import decoding
from kalle.audio import read_audio, to_pcm16
from kalle.serving import voices
from kalle.serving.handlers import MODELS_OWN, Handlers
from kalle.serving.voices import RANDOM, RECORDING, STORED, VoiceChoice
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.voice import Voice


def test_a_recording_speaks_with_its_transcript(handlers: Handlers, recording: str, kalle_toy: Kalle) -> None:
    choice = VoiceChoice(RECORDING, recording=recording, transcript=" A tone. ")
    _, views = ran(handlers, replace(HI, voice=choice))
    offline = kalle_toy.synthesize(HI.text, kalle_toy.voice(recording, "A tone."), seed=3, max_seconds=0.5, retries=0)
    np.testing.assert_allclose(pcm(handlers), to_pcm16(offline.audio), atol=1e-4 * 32768)
    assert "your recording" in views[-1].facts
    assert "a short prompt: got 1.50 s" in views[-1].facts


def test_a_kept_random_voice_is_listed_and_is_the_same(handlers: Handlers) -> None:
    choice = VoiceChoice(RANDOM, seed=5)
    before, _ = handlers.sample(choice)
    kept = handlers.keep(choice, "  Lise  Lotte ", " me, for tests ")
    assert kept.name == "Lise Lotte"
    assert handlers.voices() == [MODELS_OWN, "Lise Lotte"]
    stored = Voice.load(handlers.backend.voices.folder / "Lise Lotte.safetensors")
    assert stored.consent == "me, for tests"
    torch.testing.assert_close(stored.prompt_latents, handlers.backend.kalle.random_voice(5).prompt_latents)
    after, message = handlers.sample(VoiceChoice(STORED, "Lise Lotte"))
    assert (after, message) == (before, "")
    _, random = ran(handlers, replace(HI, voice=choice))
    first = pcm(handlers)
    ran(handlers, replace(HI, voice=VoiceChoice(STORED, "Lise Lotte")))
    np.testing.assert_array_equal(first, pcm(handlers))
    assert "random voice 5" in random[-1].facts


@pytest.mark.parametrize(
    ("choice", "name", "message"),
    [
        (VoiceChoice(RANDOM, seed=1), "", "Bad voice name: got &#x27;&#x27;"),
        (VoiceChoice(RANDOM, seed=1), "../up", "Bad voice name"),
        (VoiceChoice(RANDOM, seed=1), "TAKEN", "There is a voice of that name"),
        (VoiceChoice(STORED), "mine", "Nothing to keep"),
        (VoiceChoice(RANDOM), "mine", "No seed"),
    ],
)
def test_voices_that_cannot_be_kept(handlers: Handlers, choice: VoiceChoice, name: str, message: str) -> None:
    assert handlers.keep(VoiceChoice(RANDOM, seed=2), "taken").name == "taken"
    kept = handlers.keep(choice, name)
    assert kept.name is None
    assert message in kept.message
    assert handlers.voices() == [MODELS_OWN, "taken"]


def test_samples_are_made_once_and_are_heard(handlers: Handlers, monkeypatch, recording: str) -> None:
    choices = [VoiceChoice(STORED), VoiceChoice(RANDOM, seed=4), VoiceChoice(RECORDING, recording=recording, transcript="A tone.")]
    paths = [handlers.sample(choice)[0] for choice in choices]
    assert len(set(paths)) == 3
    assert all(np.abs(read_audio(path)).max() > 1e-3 for path in paths)
    monkeypatch.setattr(handlers.backend.kalle.flowvae, "decode", lambda *_: 1 / 0)
    assert [handlers.sample(choice)[0] for choice in choices] == paths


def test_voices_that_cannot_be_used_are_not_offered(handlers: Handlers, caplog) -> None:
    folder = handlers.backend.voices.folder
    folder.mkdir()
    Voice({"flowvae_encoder": "0" * 64}, torch.zeros(3, 4), text="x").save(folder / "other.safetensors")
    (folder / "torn.safetensors").write_bytes(b"no voice")
    assert handlers.keep(VoiceChoice(RANDOM, seed=2), "good").name == "good"
    for _ in range(2):
        assert handlers.voices() == [MODELS_OWN, "good"]
    assert caplog.text.count("is not offered: the voice does not fit") == 1
    assert caplog.text.count("is not offered: not a voice file") == 1
    assert "There is a voice of that name" in handlers.keep(VoiceChoice(RANDOM, seed=2), "torn").message
    # A page that was loaded before may still ask for it.
    path, message = handlers.sample(VoiceChoice(STORED, "other"))
    assert path is None
    assert "The voice does not fit" in message
    Voice.load(folder / "good.safetensors").save(folder / "torn.safetensors")
    assert handlers.voices() == [MODELS_OWN, "good", "torn"]


def test_a_name_that_is_taken_in_between_is_not_overwritten(handlers: Handlers, monkeypatch) -> None:
    store = handlers.backend.voices
    store.folder.mkdir()
    making = store.kalle.random_voice

    def slow(seed: int) -> Voice:
        (store.folder / "mine.safetensors").write_bytes(b"the first one")
        return making(seed)

    monkeypatch.setattr(store.kalle, "random_voice", slow, raising=False)
    kept = handlers.keep(VoiceChoice(RANDOM, seed=77), "mine")
    assert kept.name is None
    assert "There is a voice of that name" in kept.message
    assert [path.name for path in store.folder.iterdir()] == ["mine.safetensors"]
    assert (store.folder / "mine.safetensors").read_bytes() == b"the first one"


def test_a_voice_that_cannot_be_put_in_place_leaves_nothing(handlers: Handlers, monkeypatch) -> None:
    replacing = os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(target).suffix == ".safetensors":
            raise OSError(errno.EACCES, "Permission denied")
        replacing(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    kept = handlers.keep(VoiceChoice(RANDOM, seed=2), "mine")
    assert "Cannot write &#x27;mine.safetensors&#x27;: Permission denied" in kept.message
    assert list(handlers.backend.voices.folder.iterdir()) == []


def test_hours_in_a_small_file_are_refused(handlers: Handlers, tmp_path: Path) -> None:
    path = tmp_path / "long.flac"
    soundfile.write(path, np.zeros(16000 * 600, np.int16), 16000)
    choice = VoiceChoice(RECORDING, recording=str(path), transcript="Hours.")
    for message in (handlers.uploaded(str(path)), handlers.sample(choice)[1], ran(handlers, replace(HI, voice=choice))[1][-1].message):
        assert "Too long: got 600.00 s of audio" in message
        assert "expected at most 60 s" in message


def test_a_recording_is_decoded_once(handlers: Handlers, recording: str, monkeypatch) -> None:
    calls: list[Path] = []
    decode = voices.load_mono
    monkeypatch.setattr(voices, "load_mono", lambda path, longest: calls.append(path) or decode(path, longest))
    assert "1.5 s of audio at 16000 Hz" in handlers.uploaded(recording)
    choice = VoiceChoice(RECORDING, recording=recording, transcript="A tone.")
    _, views = ran(handlers, replace(HI, voice=choice))
    assert "a short prompt: got 1.50 s" in views[-1].facts
    assert len(calls) == 1


def test_a_decoder_that_dies_is_a_bad_recording(handlers: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "me.ogg"
    soundfile.write(path, 0.3 * np.sin(np.arange(24000) / 10), 16000)

    def died(*_: object) -> None:
        raise EOFError

    monkeypatch.setattr(decoding._Decoder, "ask", died)
    said = handlers.uploaded(str(path))
    assert "Unreadable audio: " in said
    assert "the decoder" in said
    monkeypatch.undo()
    assert "can be read" in handlers.uploaded(str(path)), "the next upload is fine"


def test_a_bad_upload_is_said_at_once(handlers: Handlers, tmp_path: Path) -> None:
    (tmp_path / "notes.wav").write_text("no audio")
    assert "Unreadable audio" in handlers.uploaded(str(tmp_path / "notes.wav"))
    soundfile.write(tmp_path / "cut.wav", np.zeros(32000), 16000)
    os.truncate(tmp_path / "cut.wav", 32044)
    assert "Cut short: got 1.00 s of " in handlers.uploaded(str(tmp_path / "cut.wav"))
    assert handlers.uploaded(None) == ""
    assert "load the page again" in handlers.uploaded({"path": "x"})


def test_messages_do_not_tell_where_files_are(handlers: Handlers) -> None:
    backend = handlers.backend
    upload = backend.temporary / "page" / "0a1b" / "my voice.wav"
    upload.parent.mkdir(parents=True)
    upload.write_text("no audio")
    _, message = handlers.sample(VoiceChoice(RECORDING, recording=str(upload), transcript="x"))
    assert "Unreadable audio: &#x27;my voice.wav&#x27; (" in message
    backend.voices.folder.mkdir()
    (backend.voices.folder / "torn.safetensors").write_bytes(b"no voice")
    _, stored = handlers.sample(VoiceChoice(STORED, "torn"))
    assert "Not a voice file: &#x27;torn.safetensors&#x27;" in stored
    backend.voices.folder = upload
    kept = handlers.keep(VoiceChoice(RANDOM, seed=2), "mine").message
    assert "Cannot write" in kept
    for shown in (message, stored, kept):
        assert str(backend.temporary) not in shown
        assert str(backend.voices.folder.parent) not in shown
    # What the user typed stays, even where it looks like a path.
    assert "got &#x27;/etc/x&#x27;" in handlers.keep(VoiceChoice(RANDOM, seed=2), "/etc/x").message

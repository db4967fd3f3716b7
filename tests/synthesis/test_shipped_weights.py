"""The model that ships, on texts that earlier versions babbled on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from kalle.checkpoint import shipped_folder
from kalle.cli.main import main
from kalle.synthesis.kalle import Kalle

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shipped_folder() is None, reason="no weights ship with this checkout")]
TEN_SENTENCES = (
    "The weather is going to be fine tomorrow. She told him that he was a good friend. The children like to go to school. "
    "He opened the door and looked into the room. It is not easy to find a good answer. They have been living here for ten years. "
    "The old man walked slowly down the street. There was a strange noise in the kitchen. He spent all of his money on a new car. "
    "The doctor said that she would be all right."
)


@pytest.fixture(scope="module")
def kalle() -> Kalle:
    return Kalle.from_pretrained("kalle-nano", "cpu")


def test_ten_sentences_are_all_spoken_however_it_is_asked_for(kalle: Kalle, tmp_path: Path) -> None:
    """Streamed or synthesized at once they were 13 s of babble that ended as "end"."""
    spoken = kalle.synthesize(TEN_SENTENCES, seed=3)
    assert len(spoken.parts) == 10
    assert spoken.seconds > 20
    stream = kalle.stream(TEN_SENTENCES, seed=3)
    heard = np.concatenate(list(stream))
    assert [part.speech.text for part in stream.speech.parts] == [part.speech.text for part in spoken.parts]
    assert len(heard) > 20 * kalle.sample_rate
    for once, streamed in zip(spoken.parts, stream.speech.parts, strict=True):
        if once.tries == 1:
            np.testing.assert_array_equal(once.speech.latents, streamed.speech.latents)
    assert main(["say", TEN_SENTENCES, "--model", "kalle-nano", "--device", "cpu", "--seed", "3", "-o", str(tmp_path / "a.wav"), "-q"]) == 0
    said, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    np.testing.assert_array_equal(said, spoken.pcm16())


def test_half_a_transcript_is_warned_about_and_speech_without_its_words_is_no_ordinary_end(kalle: Kalle, tmp_path: Path, caplog) -> None:
    """A prompt whose transcript lacks its second sentence gave half a second of speech, which ended as "end" without a word."""
    prompt = kalle.synthesize("They have been living here for ten years. The old man walked slowly down the street.", seed=5)
    prompt.save(tmp_path / "p.wav")
    voice = kalle.voice(tmp_path / "p.wav", "They have been living here for ten years.")
    assert "the transcript may lack words of the recording" in caplog.text
    speech = kalle.synthesize("The children like to go to school.", voice, seed=1)
    assert speech.seconds > 0.9 or speech.stop_reason == "too_short"

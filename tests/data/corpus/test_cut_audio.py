"""The audio of cuts in any format is what lhotse reads by itself, and a crash of the decoder costs one cut."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse.audio.backend import LibsndfileBackend, audio_backend
from lhotse.cut import Cut

from kalle import decoding
from kalle.data.corpus.cuts import load_audio, make_cut
from kalle.data.corpus.measures import measure
from kalle.errors import UserError

RATE_HZ = 16000
FORMATS = [("wav", "WAV", "PCM_16"), ("flac", "FLAC", "PCM_16"), ("ogg", "OGG", "VORBIS"), ("opus", "OGG", "OPUS"), ("mp3", "MP3", None)]


def recorded(folder: Path, suffix: str, kind: str, subtype: str | None, rate_hz: int = RATE_HZ, channels: int = 1) -> Path:
    noise = np.random.default_rng(5).normal(0, 0.1, (3 * rate_hz, channels)).cumsum(axis=0)
    soundfile.write(folder / f"a.{suffix}", noise / np.abs(noise).max(), rate_hz, format=kind, subtype=subtype)
    return folder / f"a.{suffix}"


def cut_of(path: Path, wanted_hz: int = RATE_HZ, start_samples: int = 0, seconds: float | None = None) -> Cut:
    info = soundfile.info(path)
    return make_cut("a", str(path), info.samplerate, info.frames, wanted_hz, "words", "ann", "en", "", start_samples, seconds)


def by_lhotse(cut: Cut) -> np.ndarray:
    with audio_backend(LibsndfileBackend()):
        return np.asarray(cut.load_audio()[0])


@pytest.mark.parametrize(("suffix", "kind", "subtype"), FORMATS)
def test_whole_part_and_another_rate_are_as_lhotse_reads_them(tmp_path: Path, suffix: str, kind: str, subtype: str | None) -> None:
    path = recorded(tmp_path, suffix, kind, subtype)
    for cut in (cut_of(path), cut_of(path, 0 or RATE_HZ, 7001, 0.777), cut_of(path, 24000), cut_of(path, 24000, 5000, 1.25)):
        np.testing.assert_array_equal(load_audio(cut, int(cut.sampling_rate)), by_lhotse(cut))
    quicker = cut_of(path).perturb_speed(1.1)
    np.testing.assert_array_equal(load_audio(quicker, RATE_HZ), by_lhotse(quicker))


def test_a_part_beyond_the_end_is_an_error_and_a_file_of_other_length_too(tmp_path: Path) -> None:
    path = recorded(tmp_path, "ogg", "OGG", "VORBIS")
    info = soundfile.info(path)
    claimed = make_cut("a", str(path), RATE_HZ, 10 * info.frames, RATE_HZ, "words", "ann", "en", "", 5 * info.frames, 2.0)
    with pytest.raises(UserError, match="unreadable audio: cut 'a'"):
        load_audio(claimed, RATE_HZ)


def test_a_decoder_that_dies_costs_one_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = cut_of(recorded(tmp_path, "opus", "OGG", "OPUS", 48000))
    whole = load_audio(cut, RATE_HZ)
    real = decoding._Decoder.blocks

    def dying(decoder: decoding._Decoder, channels: int) -> object:
        assert decoder._process is not None
        os.kill(decoder._process.pid, signal.SIGKILL)
        decoder._process.wait()
        return real(decoder, channels)

    with monkeypatch.context() as patch:
        patch.setattr(decoding._Decoder, "blocks", dying)
        found = measure(cut)
    assert "unreadable audio" in (found.problem or "")
    assert "the decoder crashed: SIGKILL" in (found.problem or "")
    np.testing.assert_array_equal(load_audio(cut, RATE_HZ), whole)


def test_one_process_decodes_all_cuts(tmp_path: Path) -> None:
    cut = cut_of(recorded(tmp_path, "mp3", "MP3", None))
    load_audio(cut, RATE_HZ)
    process = decoding._decoder._process
    assert process is not None
    for start in range(0, 20000, 5000):
        load_audio(cut_of(Path(cut.recording.sources[0].source), RATE_HZ, start, 0.5), RATE_HZ)
    assert decoding._decoder._process is process

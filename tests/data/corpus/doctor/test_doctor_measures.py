"""The measures of sound and text, each against a case whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kalle.audio import resample
from kalle.data.corpus.measures import (
    BANDS,
    MeasuredItem,
    Measures,
    flat_share,
    letters_and_signs,
    loudness_lufs,
    mixed_word,
    odd_characters,
    script_counts,
    silence,
    spectrum,
)
from kalle.data.corpus.quality import pace, scores

RATE_HZ = 16000


def burst(seconds: float, level: float = 0.1, seed: int = 0) -> np.ndarray:
    return (level * np.random.default_rng(seed).standard_normal(round(seconds * RATE_HZ))).astype(np.float32)


@given(leading=st.integers(0, 150), pause=st.integers(10, 150), trailing=st.integers(0, 150), noise_db=st.sampled_from([-200, -70, -50]))
@settings(max_examples=25, deadline=None)
def test_silences_are_found_to_a_frame_or_two(leading: int, pause: int, trailing: int, noise_db: float) -> None:
    parts = [np.zeros(160 * leading), burst(0.8), np.zeros(160 * pause), burst(0.7, seed=1), np.zeros(160 * trailing)]
    audio = np.concatenate(parts)
    audio = (audio + 10 ** (noise_db / 20) * np.random.default_rng(2).standard_normal(len(audio))).astype(np.float32)
    found = silence(audio, RATE_HZ)
    assert found.leading_s == pytest.approx(leading / 100, abs=0.021)
    assert found.pause_s == pytest.approx(pause / 100, abs=0.021)
    assert found.trailing_s == pytest.approx(trailing / 100, abs=0.021)
    assert found.inner_share == pytest.approx(pause / (150 + pause), abs=0.02)


def test_a_click_does_not_end_a_silence_and_nothing_is_all_silence() -> None:
    audio = np.concatenate([np.zeros(16000), burst(1.0)]).astype(np.float32)
    audio[8000:8100] = 0.5
    assert silence(audio, RATE_HZ).leading_s == pytest.approx(1.0, abs=0.02)
    assert silence(np.zeros(16000, np.float32), RATE_HZ).leading_s == 1.0


@pytest.mark.parametrize("seconds", [0.45, 3.0])
def test_loudness_is_that_of_pyloudnorm(seconds: float) -> None:
    pyloudnorm = pytest.importorskip("pyloudnorm")
    audio = burst(seconds) * np.linspace(0.1, 1, round(seconds * RATE_HZ), dtype=np.float32)
    assert loudness_lufs(audio, RATE_HZ) == pytest.approx(pyloudnorm.Meter(RATE_HZ).integrated_loudness(audio.astype(np.float64)), abs=0.1)


def test_loudness_of_very_short_and_of_silent_audio() -> None:
    assert loudness_lufs(burst(0.1), RATE_HZ) == pytest.approx(loudness_lufs(burst(2.0), RATE_HZ), abs=1.0)
    assert loudness_lufs(np.zeros(16000, np.float32), RATE_HZ) == float("-inf")


def test_flat_tops_count_at_full_scale_and_below_but_peaks_do_not() -> None:
    time = np.arange(16000) / RATE_HZ
    wave = (0.9 * np.sin(2 * np.pi * 100 * time)).astype(np.float32) * np.linspace(0.5, 1, 16000, dtype=np.float32)
    assert flat_share(wave) < 1e-3
    assert flat_share(np.clip(2 * wave, -1, 1)) > 0.3
    assert flat_share(0.5 * np.clip(2 * wave, -1, 1)) > 0.3


@pytest.mark.parametrize("rate_hz", [8000, 11025, 12000])
def test_bandwidth_is_that_of_the_rate_the_audio_once_had(rate_hz: int) -> None:
    # Rounded to 16 bits, as files are.
    narrow = np.rint(resample(resample(burst(2.0), RATE_HZ, rate_hz), rate_hz, RATE_HZ) * 32767) / 32767
    found = spectrum(narrow.astype(np.float32), RATE_HZ)
    assert found.bandwidth_hz == pytest.approx(rate_hz / 2, rel=0.05)
    assert len(found.bands_db) == BANDS
    assert max(found.bands_db) > -3
    assert spectrum(burst(2.0), RATE_HZ).bandwidth_hz == 8000


def test_bandwidth_of_silence_is_none() -> None:
    assert spectrum(np.zeros(4000, np.float32), RATE_HZ).bandwidth_hz == 0


@pytest.mark.parametrize(
    ("text", "counts"),
    [("Hi, you 2!", (6, 0)), ("你好 world", (5, 2)), ("かな漢字", (0, 4)), ("été", (3, 0)), ("…", (0, 0)), ("नमस्ते", (4, 0))],
)
def test_what_is_spoken_is_counted(text: str, counts: tuple[int, int]) -> None:
    assert letters_and_signs(text) == counts


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("plain, even “quoted” text – with 50 % don't", None),
        ("naïve façade, Ærø", None),
        ("bad \ufffd sign", "replacement character (a decoding error) U+FFFD"),
        ("bell\x07", "control character U+0007"),
        ("zero\u200bwidth", "invisible character U+200B"),
        ("caf\u00c3\u00a9", "'\u00c3\u00a9' looks like UTF-8 read as Latin-1"),
        ("a <i>b</i>", "markup '<i>'"),
        ("rock &amp; roll", "markup '&amp;'"),
        ("[laughs] well", "markup '[laughs]'"),
        ("AT&T; 3 < 4 > 2", "markup '&T;'"),
    ],
)
def test_odd_characters(text: str, found: str | None) -> None:
    assert odd_characters(text) == found


def test_mixed_words_are_those_of_two_alphabets() -> None:
    assert mixed_word("a m\u043erning") == "m\u043erning"
    assert mixed_word("我用app看 ひらカタ漢字 Ångström rock'n'roll Москва OK") is None
    assert script_counts("我 a ж") == {"CJK": 1, "LATIN": 1, "CYRILLIC": 1}


def item(number: int, text: str, seconds: float) -> MeasuredItem:
    return MeasuredItem(f"i{number}", "train", text, "a", "en", RATE_HZ, Measures(seconds=seconds))


def test_pace_counts_signs_where_there_are_most() -> None:
    assert pace(item(0, "abcdef", 2.0)) == (3.0, "letters")
    assert pace(item(0, "你好世界", 2.0)) == (2.0, "signs")


def test_short_texts_may_be_slower_and_less_even_than_long_ones() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 200, 400)
    seconds = (0.4 + 0.06 * lengths) * np.exp(generator.normal(0, 0.1 + 0.4 / lengths))
    items = [item(n, "a" * int(length), float(value)) for n, (length, value) in enumerate(zip(lengths, seconds, strict=True))]
    z, _ = scores(items)
    assert (np.abs(z) > 5).mean() < 0.01
    items[7] = item(7, "a" * 150, 1.5)
    z, times = scores(items)
    assert z[7] > 5
    assert times[7] == pytest.approx((0.4 + 0.06 * 150) / 1.5, rel=0.25)

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import soundfile

from kalle.data.corpus.cuts import load_audio
from kalle.data.latents.encode import JoinConfig, Utterance, joined_utterances, singles
from kalle.errors import UserError

MakeCuts = Callable[..., list[Any]]
CONFIG = JoinConfig(passes=2, min_seconds=0.3, max_seconds=1.0, gap_seconds=(0.05, 0.1), seed=3)


def facts(utterances: list[Utterance]) -> list[tuple[object, ...]]:
    return [(u.id, [cut.id for cut in u.cuts], u.gaps_samples) for u in utterances]


def test_joinings_depend_on_the_seed_alone(make_cuts: MakeCuts) -> None:
    cuts = make_cuts([2000 + 300 * n for n in range(12)])
    reference = facts(joined_utterances(cuts, CONFIG, 16000))
    shuffled = random.Random(1).sample(cuts, len(cuts))
    assert facts(joined_utterances(shuffled, CONFIG, 16000)) == reference
    other = JoinConfig(passes=2, min_seconds=0.3, max_seconds=1.0, gap_seconds=(0.05, 0.1), seed=4)
    assert facts(joined_utterances(cuts, other, 16000)) != reference
    assert joined_utterances(cuts, JoinConfig(), 16000) == []


def test_passes_differ_and_the_first_does_not_depend_on_their_number(make_cuts: MakeCuts) -> None:
    cuts = make_cuts([2000 + 300 * n for n in range(12)])
    both = facts(joined_utterances(cuts, CONFIG, 16000))
    first = facts(joined_utterances(cuts, JoinConfig(passes=1, min_seconds=0.3, max_seconds=1.0, gap_seconds=(0.05, 0.1), seed=3), 16000))
    assert both[: len(first)] == first
    assert [members for _, members, _ in both[len(first) :]] != [members for _, members, _ in first]
    assert len({name for name, _, _ in both}) == len(both)


def test_joined_utterance(make_cuts: MakeCuts) -> None:
    cuts = make_cuts([1600 + 160 * n for n in range(20)])
    utterances = joined_utterances(cuts, CONFIG, 16000)
    assert utterances
    for utterance in utterances:
        audio = utterance.audio(16000)
        assert len(utterance.cuts) > 1
        assert len(audio) <= 16000
        assert {cut.supervisions[0].speaker for cut in utterance.cuts} == {utterance.speaker}
        assert utterance.text == " ".join(cut.supervisions[0].text for cut in utterance.cuts)
        assert all(800 <= gap <= 1600 for gap in utterance.gaps_samples)
        first, second = (load_audio(cut, 16000) for cut in utterance.cuts[:2])
        gap = utterance.gaps_samples[0]
        assert np.array_equal(audio[: len(first)], first)
        assert not audio[len(first) : len(first) + gap].any()
        assert np.array_equal(audio[len(first) + gap : len(first) + gap + len(second)], second)
    members = [cut.id for utterance in utterances if utterance.id.startswith("joined-0") for cut in utterance.cuts]
    assert len(set(members)) == len(members), "a pass uses a cut at most once"


def test_singles_keep_everything(make_cuts: MakeCuts) -> None:
    (utterance,) = singles(make_cuts([4000]))
    assert (utterance.id, utterance.text, utterance.speaker, utterance.language) == ("c000", "text word", "a", "en")
    assert len(utterance.audio(16000)) == 4000


def test_audio_is_resampled_and_mono(make_cuts: MakeCuts) -> None:
    (cut,) = make_cuts([24000], rate_hz=48000)
    audio = load_audio(cut, 16000)
    assert audio.shape == (8000,)
    assert audio.dtype == np.float32
    path = cut.recording.sources[0].source
    expected = 0.3 * np.sin(2 * np.pi * (150 + 300 * np.arange(8000) / 16000) * np.arange(8000) / 16000)
    assert np.abs(audio - expected)[200:-200].max() < 1e-2
    soundfile.write(path, np.full(24000, np.nan), 48000, subtype="FLOAT")
    with pytest.raises(UserError, match=r"cut 'c000'.*NaN or infinite"):
        load_audio(cut, 16000)
    cut.recording.sources[0].source = path + ".gone"
    with pytest.raises(UserError, match="unreadable audio: cut 'c000'") as caught:
        load_audio(cut, 16000)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [{"passes": -1}, {"max_seconds": 0}, {"min_seconds": 20.0}, {"gap_seconds": (0.3, 0.1)}])
def test_bad_join_config(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="join: got"):
        JoinConfig(**values)

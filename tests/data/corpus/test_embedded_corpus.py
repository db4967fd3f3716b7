from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest
import soundfile

from kalle.data.corpus.cuts import load_cuts
from kalle.data.corpus.items import PrepareOptions, SplitPolicy, normalised, word_count
from kalle.data.corpus.lists import embedded_folder, read_embedded
from kalle.data.corpus.prepare import prepare_corpus

CORPUS = Path(__file__).parents[3] / "recipes" / "quickstart" / "corpus"


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [json.loads(line) for line in (CORPUS / "transcripts.jsonl").read_text(encoding="utf-8").splitlines()]


def test_it_is_found_and_small() -> None:
    assert embedded_folder() == CORPUS
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 10_000_000


def test_all_558_prompts_are_kept_or_accounted_for(rows: list[dict]) -> None:
    rejected = [json.loads(line) for line in (CORPUS / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    sounds = [row for row in rejected if row["reason"] != "missing" and not row["id"].startswith("silence")]
    assert len(rows) + len(sounds) == 558
    assert len(rows) == 551
    assert all(row["detail"].split("says")[1].strip()[1] in "[<" for row in sounds)


def test_listing_and_audio_are_the_same_files(rows: list[dict]) -> None:
    assert sorted(row["audio"] for row in rows) == sorted(path.relative_to(CORPUS).as_posix() for path in (CORPUS / "audio").rglob("*.*"))
    for row in rows:
        info = soundfile.info(CORPUS / row["audio"])
        assert (info.samplerate, info.channels) == (16000, 1), row["id"]
        assert row["duration"] == pytest.approx(info.frames / 16000, abs=1e-4), row["id"]


def test_split_is_the_rule_and_no_text_sits_on_two_sides(rows: list[dict]) -> None:
    policy = SplitPolicy(**json.loads((CORPUS / "build.json").read_text())["split"])
    sides = defaultdict(set)
    for row in rows:
        sides[normalised(row["text"])].add(row["split"])
        assert row["split"] == policy.assign(row["text"])
    assert len(sides) < len(rows)
    assert all(len(splits) == 1 for splits in sides.values())


def test_enough_is_held_out_and_most_is_left_for_training(rows: list[dict]) -> None:
    scored = [row for row in rows if row["split"] == "test" and word_count(row["text"]) >= 4]
    minutes = {split: sum(row["duration"] for row in rows if row["split"] == split) / 60 for split in ("train", "valid", "test")}
    assert len(scored) >= 60
    assert sum(row["split"] == "valid" for row in rows) >= 25
    assert minutes["train"] > 0.75 * sum(minutes.values())


def test_attribution_and_licence_lie_beside_it() -> None:
    attribution = (CORPUS / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for fact in ("Allison Smith", "CC-BY-SA-3.0", "creativecommons.org/licenses/by-sa/3.0", "Changes:"):
        assert fact in attribution
    assert "THE WORK IS" in (CORPUS / "LICENSE").read_text(encoding="utf-8")


def test_texts_hold_no_remarks(rows: list[dict]) -> None:
    assert not [row["text"] for row in rows if set(row["text"]) & set("[]<>()")]
    assert all(normalised(row["text"]) for row in rows)


def test_cuts_load_at_16_khz_with_the_promised_samples(tmp_path: Path) -> None:
    prepared = prepare_corpus(read_embedded(CORPUS), tmp_path, PrepareOptions(max_seconds=120.0))
    assert prepared.report["kept"] == 551
    assert prepared.report["rejected_by_reason"] == {"missing": 1, "not speech": 17}
    assert prepared.report["converted_to_flac"] == 0
    cuts = load_cuts(tmp_path, "valid") + load_cuts(tmp_path, "test")[:20]
    for cut in cuts:
        assert cut.sampling_rate == 16000
        assert cut.load_audio().shape == (1, cut.num_samples), cut.id

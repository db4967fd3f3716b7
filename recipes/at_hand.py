"""Lay the embedded recordings out as the data that recipes of evaluation read, to try them without it: one speaker, telephone prompts.

python recipes/at_hand.py seed_tts    runs/at_hand/seedtts_testset --items 10
python recipes/at_hand.py librispeech runs/at_hand/test-clean --items 10
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import soundfile

from kalle.audio import read_audio
from kalle.cli.stages import recipe_main
from kalle.errors import UserError
from kalle.evaluation.test_list import TestItem, read_test_list
from kalle.files import write_atomic

CORPUS = Path(__file__).resolve().parent / "quickstart" / "corpus" / "transcripts.jsonl"
CHAPTER = Path("61") / "70968"
"""The folder of LibriSpeech's form that the recordings lie in."""
RATE_HZ = 16000
CHINESE = ("今天天气很好，我们去公园吧。", "他说：“这是一本书。”", "绿绿绿绿的叶子，红红红红的花。", "八百标兵奔北坡，炮兵并排北边跑。")
"""Texts for the Chinese lists: the recordings are English, so only the form is that of the real ones."""


def sentences(items: int, shortest_s: float) -> list[TestItem]:
    """The first ``items`` recordings of the test split of six words and more and at least ``shortest_s`` seconds. UserError for too few."""
    found = [item for item in read_test_list(CORPUS, min_words=6).items if (item.duration_s or 0) >= shortest_s]
    if not 0 < items <= len(found):
        raise UserError(f"items: got {items}, expected 1 to {len(found)}, the recordings of {shortest_s} s and more; correct --items")
    return found[:items]


def seed_tts(out: Path, items: int) -> None:
    """OUT/en/meta.lst, OUT/zh/meta.lst and OUT/zh/hardcase.lst: every recording speaks the text of the next one."""
    chosen = sentences(items, 2.0)
    names = [f"prompt-wavs/{item.file_stem}.wav" for item in chosen]
    for language in ("en", "zh"):
        for name, item in zip(names, chosen, strict=True):
            _write(out / language / name, item)
    english, chinese = [], []
    for index, item in enumerate(chosen):
        after = chosen[(index + 1) % items]
        english.append(f"{item.file_stem}-{after.file_stem}|{item.text}|{names[index]}|{after.text}")
        text = CHINESE[index % len(CHINESE)]
        chinese.append(f"{index:08d}-{index + 1:08d}|{CHINESE[0]}|{names[index]}|{text}|{names[(index + 1) % items]}")
    write_atomic(out / "en" / "meta.lst", "\n".join(english) + "\n")
    write_atomic(out / "zh" / "meta.lst", "\n".join(chinese) + "\n")
    write_atomic(out / "zh" / "hardcase.lst", "\n".join(line.rsplit("|", 1)[0] for line in chinese) + "\n")


def librispeech(out: Path, items: int) -> None:
    """OUT/61/70968/*.flac and transcripts in capitals without marks; OUT/pairs.lst, where each recording is the prompt of the next one."""
    folder, lines, pairs = out / CHAPTER, [], []
    chosen = sentences(items, 4.0)
    for index, item in enumerate(chosen):
        _write(folder / f"61-70968-{index:04d}.flac", item)
        words = "".join(mark for mark in item.text.upper().replace("-", " ") if mark.isalnum() or mark in " '")
        lines.append(f"61-70968-{index:04d} {' '.join(words.split())}")
        after = (index + 1) % items
        facts = [(f"61-70968-{number:04d}", f"{chosen[number].duration_s:.3f}", chosen[number].text) for number in (index, after)]
        pairs.append("\t".join(field for fact in facts for field in fact))
    write_atomic(folder / "61-70968.trans.txt", "\n".join(lines) + "\n")
    write_atomic(out / "pairs.lst", "\n".join(pairs) + "\n")


def _write(path: Path, item: TestItem) -> None:
    assert item.audio_path is not None, "the corpus has recordings"
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, read_audio(item.audio_path, RATE_HZ), RATE_HZ)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("seed_tts", "librispeech"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--items", type=int, default=10)
    given = parser.parse_args()
    make = {"seed_tts": seed_tts, "librispeech": librispeech}[given.kind]
    sys.exit(recipe_main(lambda: make(given.out, given.items), given.out))

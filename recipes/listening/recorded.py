"""Copy the recordings of a test list as a system of a listening test, and its prompts as the references of SMOS.

    python recipes/listening/recorded.py list.jsonl runs/listening

writes OUT/recordings/ID.wav and OUT/references/ID.wav. Items without a recording or without a prompt get no file, and are counted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kalle.audio import write_audio
from kalle.cli.stages import recipe_main
from kalle.evaluation.test_list import TestListConfig, read_test_list

RATE_HZ = 16000


def copy(given: argparse.Namespace) -> None:
    """Write the two folders, and say how many files each has."""
    items = read_test_list(TestListConfig(given.list, min_words=0, limit=given.items)).items
    for folder, having in (("recordings", lambda item: item.audio_path), ("references", lambda item: item.prompt_path)):
        found = [item for item in items if having(item) is not None]
        for item in found:
            audio = item.audio(RATE_HZ) if folder == "recordings" else item.prompt_audio(RATE_HZ)
            write_audio(given.out / folder / f"{item.file_stem}.wav", audio, RATE_HZ)
        print(f"{len(found)} of {len(items)} items in {given.out / folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--items", type=int, help="the first so many items")
    given = parser.parse_args()
    sys.exit(recipe_main(lambda: copy(given), given.out))

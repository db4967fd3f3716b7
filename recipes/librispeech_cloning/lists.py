"""Test lists from LibriSpeech's own folders (SPEAKER/CHAPTER/*.trans.txt beside *.flac): recordings, continuations, pairs of sentences.

    python recipes/librispeech_cloning/lists.py recordings   LibriSpeech/test-clean list.jsonl
    python recipes/librispeech_cloning/lists.py continuation LibriSpeech/test-clean list.jsonl
    python recipes/librispeech_cloning/lists.py cross        LibriSpeech/test-clean list.jsonl --pairs pairs.lst

`continuation` cuts each utterance of 4 to 10 s behind the last word that ends within the first 3 s, where a recogniser hears that end;
these words and that audio are the prompt, the other words are to be spoken. `cross` reads lines of six fields that tabs separate: id,
seconds and text of the prompt, then of the sentence (the public list of 1,127 pairs is one).
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import soundfile

from kalle.audio import read_audio, write_audio
from kalle.cli.stages import recipe_main
from kalle.errors import UserError
from kalle.files import write_atomic

RATE_HZ = 16000
PROMPT_S = 3.0
SHORTEST_S, LONGEST_S = 4.0, 10.0
Row = dict[str, Any]


def utterances(root: Path) -> Iterator[Row]:
    """Rows of a test list (id, audio, text, speaker, language, duration) in the order of their ids. UserError where there are none.

    LibriSpeech prints its texts in capitals; they are lower-cased, for a model would spell them.
    """
    found = 0
    for transcripts in sorted(root.rglob("*.trans.txt")):
        for line in transcripts.read_text(encoding="utf-8").splitlines():
            name, _, text = line.partition(" ")
            audio = transcripts.parent / f"{name}.flac"
            if not audio.is_file():
                raise UserError(f"recording not found: expected '{audio}' for a line of '{transcripts}'; complete the download")
            found += 1
            facts = {"speaker": name.split("-")[0], "language": "en", "duration": soundfile.info(audio).duration}
            yield {"id": name, "audio": str(audio.resolve()), "text": text.lower()} | facts
    if not found:
        raise UserError(f"no utterances: got no *.trans.txt below '{root}', expected LibriSpeech's folder test-clean; check the path")


def continuations(root: Path, out: Path, model: str = "auto") -> Iterator[Row]:
    """The utterances of a usual length, cut; the prompts are written beside the list ``out``."""
    cutter = Cutter(model)
    for row in utterances(root):
        if not SHORTEST_S <= row["duration"] <= LONGEST_S:
            continue
        audio = read_audio(Path(row["audio"]), RATE_HZ)
        words = row["text"].split()
        count, end_s = cutter.cut(audio, len(words))
        if not 0 < count < len(words):
            continue  # no word ends within the time, or all do
        prompt, rest = (out.parent / folder / f"{row['id']}.wav" for folder in ("prompts", "rests"))
        cut = round(end_s * RATE_HZ)
        write_audio(prompt, audio[:cut], RATE_HZ)
        write_audio(rest, audio[cut:], RATE_HZ)
        spoken = {"prompt_text": " ".join(words[:count]), "prompt_audio": str(prompt.resolve()), "text": " ".join(words[count:])}
        yield row | spoken | {"audio": str(rest.resolve()), "duration": (len(audio) - cut) / RATE_HZ}


class Cutter:
    """Finds the last word that ends within ``PROMPT_S`` by the word times of a small Whisper."""

    def __init__(self, model: str = "auto") -> None:
        from faster_whisper import WhisperModel

        from kalle.evaluation.asr import find_asr_model

        self._model = WhisperModel(str(find_asr_model(model).path), device="cpu", compute_type="int8", local_files_only=True)
        self._model.logger.setLevel(logging.WARNING)  # else lines for every utterance

    def cut(self, audio: Any, words: int) -> tuple[int, float]:
        """How many of the ``words`` end in time, and when the last of them does; (0, 0) where the recogniser counts other words."""
        segments, _ = self._model.transcribe(audio, language="en", beam_size=1, temperature=0.0, word_timestamps=True)
        heard = [word for segment in segments for word in segment.words or ()]
        ends = [float(word.end) for word in heard]
        if len(ends) != words:
            return 0, 0.0
        within = [end for end in ends if end <= PROMPT_S]
        return (len(within), within[-1]) if within else (0, 0.0)


def pairs(root: Path, listed: Path) -> Iterator[Row]:
    """The pairs of the list, by the recordings of ``root``. UserError for a line of another form or a recording that is missing."""
    known = {row["id"]: row for row in utterances(root)}
    for number, line in enumerate(listed.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        fields = line.split("\t")
        if len(fields) != 6:
            raise UserError(f"line {number} of '{listed}': got {len(fields)} fields, expected 6 separated by tabs; correct the line")
        prompt, _, prompt_text, spoken, _, text = fields
        missing = [name for name in (prompt, spoken) if name not in known]
        if missing:
            raise UserError(f"line {number} of '{listed}': '{missing[0]}' is not below '{root}'; give the folder test-clean, whole")
        yield known[spoken] | {"text": text, "prompt_text": prompt_text, "prompt_audio": known[prompt]["audio"]}


def arguments_of(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("recordings", "continuation", "cross"))
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", type=Path, help="the list of pairs, for cross")
    return parser.parse_args(words)


def make(given: argparse.Namespace) -> None:
    """Write the list, and say how many items it has."""
    if given.kind == "cross" and given.pairs is None:
        raise UserError("cross: got no list of pairs, expected --pairs FILE; add it")
    if given.kind == "continuation" and given.out.is_file():
        return  # its prompts lie beside it
    made = {"recordings": lambda: utterances(given.data), "continuation": lambda: continuations(given.data, given.out)}
    rows = list(pairs(given.data, given.pairs) if given.kind == "cross" else made[given.kind]())
    if not rows:
        raise UserError(f"empty list: no utterance below '{given.data}' suits {given.kind}; check the folder")
    write_atomic(given.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{len(rows)} items in {given.out}")


if __name__ == "__main__":
    given = arguments_of()
    sys.exit(recipe_main(lambda: make(given), given.out))

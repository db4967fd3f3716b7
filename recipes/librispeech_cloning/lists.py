"""Test lists from LibriSpeech's own folders (SPEAKER/CHAPTER/*.trans.txt beside *.flac): recordings, continuations, pairs of sentences.

    python recipes/librispeech_cloning/lists.py recordings   LibriSpeech/test-clean list.jsonl
    python recipes/librispeech_cloning/lists.py continuation LibriSpeech/test-clean list.jsonl
    python recipes/librispeech_cloning/lists.py cross        LibriSpeech/test-clean list.jsonl --pairs pairs.lst

`continuation` cuts each utterance of 4 to 10 s behind the last word that ends within the first 3 s, where a recogniser hears that end;
these words and that audio are the prompt, the other words are to be spoken. Utterances that are left out are counted by reason, on the
screen and, with the recogniser, in list.left_out.json beside the list. `cross` reads lines of six fields that tabs separate: id,
seconds and text of the prompt, then of the sentence (the public list of 1,127 pairs is one).
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.metadata
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import soundfile

from kalle.audio import read_audio, write_audio
from kalle.checkpoint import write_json
from kalle.cli.stages import recipe_main
from kalle.errors import UserError
from kalle.extras import require
from kalle.files import read_lines, write_atomic

RATE_HZ = 16000
PROMPT_S = 3.0
SHORTEST_S, LONGEST_S = 4.0, 10.0
COMPUTE_TYPE = "int8"
"""In which the recogniser that cuts computes."""
Row = dict[str, Any]


def utterances(root: Path) -> Iterator[Row]:
    """Rows of a test list (id, audio, text, speaker, language, duration) in the order of their ids. UserError where there are none.

    LibriSpeech prints its texts in capitals; they are lower-cased, for a model would spell them.
    """
    found = 0
    for transcripts in sorted(root.rglob("*.trans.txt")):
        for line in filter(None, read_lines(transcripts)):
            name, _, text = line.partition(" ")
            audio = transcripts.parent / f"{name}.flac"
            if not audio.is_file():
                raise UserError(f"recording not found: expected '{audio}' for a line of '{transcripts}'; complete the download")
            found += 1
            facts = {"speaker": name.split("-")[0], "language": "en", "duration": soundfile.info(audio).duration}
            yield {"id": name, "audio": str(audio.resolve()), "text": text.lower()} | facts
    if not found:
        raise UserError(f"no utterances: got no *.trans.txt below '{root}', expected LibriSpeech's folder test-clean; check the path")


def continuations(root: Path, out: Path, cutter: Cutter, left_out: Counter[str]) -> Iterator[Row]:
    """The utterances of a usual length, cut; the prompts are written beside the list ``out``. ``left_out`` counts the others by reason."""
    for row in utterances(root):
        if not SHORTEST_S <= row["duration"] <= LONGEST_S:
            left_out[f"shorter than {SHORTEST_S:g} s or longer than {LONGEST_S:g} s"] += 1
            continue
        audio = read_audio(Path(row["audio"]), RATE_HZ)
        words = row["text"].split()
        try:
            count, end_s = cutter.cut(audio, len(words))
        except NoCutError as reason:
            left_out[str(reason)] += 1
            continue
        prompt, rest = (out.parent / folder / f"{row['id']}.wav" for folder in ("prompts", "rests"))
        cut = round(end_s * RATE_HZ)
        write_audio(prompt, audio[:cut], RATE_HZ)
        write_audio(rest, audio[cut:], RATE_HZ)
        spoken = {"prompt_text": " ".join(words[:count]), "prompt_audio": str(prompt.resolve()), "text": " ".join(words[count:])}
        yield row | spoken | {"audio": str(rest.resolve()), "duration": (len(audio) - cut) / RATE_HZ}


class NoCutError(Exception):
    """There is no place to cut an utterance; the message says why."""


class Cutter:
    """Finds the last word that ends within ``PROMPT_S`` by the word times of a small Whisper."""

    def __init__(self, model: str = "auto") -> None:
        require("faster_whisper", "eval", "a list of continuations")
        from faster_whisper import WhisperModel

        from kalle.evaluation.asr import WEIGHTS, find_asr_model

        folder = find_asr_model(model)
        with (folder.path / WEIGHTS).open("rb") as weights:
            digest = hashlib.file_digest(weights, "sha256").hexdigest()
        versions = {package: importlib.metadata.version(package) for package in ("faster-whisper", "ctranslate2")}
        self.described = {"model": folder.name, "weights_sha256": digest[:16], "compute_type": COMPUTE_TYPE} | versions
        self._model = WhisperModel(str(folder.path), device="cpu", compute_type=COMPUTE_TYPE, local_files_only=True)
        self._model.logger.setLevel(logging.WARNING)  # else lines for every utterance

    def cut(self, audio: Any, words: int) -> tuple[int, float]:
        """How many of the ``words`` in ``audio`` (S,) end in time, at least one and not all, and the second in which the last of them ends.

        NoCutError where there is no such place, or where the recogniser hears another number of words: whose end it is, is then not known.
        """
        segments, _ = self._model.transcribe(audio, language="en", beam_size=1, temperature=0.0, word_timestamps=True)
        ends = [float(word.end) for segment in segments for word in segment.words or ()]
        if len(ends) != words:
            raise NoCutError("the recogniser heard another number of words than the transcript has")
        within = [end for end in ends if end <= PROMPT_S]
        if not 0 < len(within) < words:
            raise NoCutError(f"{'all words end' if within else 'no word ends'} within {PROMPT_S:g} s")
        return len(within), within[-1]


def pairs(root: Path, listed: Path) -> Iterator[Row]:
    """The pairs of the list, by the recordings of ``root``. UserError for a line of another form or a recording that is missing."""
    known = {row["id"]: row for row in utterances(root)}
    with listed.open(encoding="utf-8", newline="") as file:
        table = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        for fields in table:
            if not any(field.strip() for field in fields):
                continue
            if len(fields) != 6:
                raise UserError(
                    f"line {table.line_num} of '{listed}': got {len(fields)} fields, expected 6 separated by tabs; correct the line"
                )
            prompt, _, prompt_text, spoken, _, text = fields
            missing = [name for name in (prompt, spoken) if name not in known]
            if missing:
                raise UserError(
                    f"line {table.line_num} of '{listed}': '{missing[0]}' is not below '{root}'; give the folder test-clean, whole"
                )
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
    cutter, left_out = Cutter() if given.kind == "continuation" else None, Counter[str]()
    if cutter is not None:
        rows = list(continuations(given.data, given.out, cutter, left_out))
    else:
        rows = list(pairs(given.data, given.pairs) if given.kind == "cross" else utterances(given.data))
    for reason, count in left_out.most_common():
        print(f"left out: {count}, {reason}")
    if not rows:
        raise UserError(f"empty list: no utterance below '{given.data}' suits {given.kind}; check the folder")
    if cutter is not None:
        facts = {"items": len(rows), "left_out": dict(left_out.most_common()), "cut_by": cutter.described}
        write_json(given.out.with_suffix(".left_out.json"), facts)
    write_atomic(given.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{len(rows)} items in {given.out}")


if __name__ == "__main__":
    given = arguments_of()
    sys.exit(recipe_main(lambda: make(given), given.out))

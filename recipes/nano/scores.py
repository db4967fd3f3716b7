"""Scores the weights: `kalle evaluate` on unseen items, texts of all lengths, voices, size and memory. One JSON, one table."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from corpora import LANGUAGES, STRANGERS, SYNTHETIC, present
from curves import draw_curves
from lengths import texts_of_all_lengths
from report import write_report
from score_lengths import judged, seconds_per_character, summarised
from similarity import VoiceScores

from kalle.checkpoint import CONFIG_NAME, read_json, write_json
from kalle.cli.stages import Stages, override
from kalle.errors import UserError
from kalle.evaluation.test_list import choose_prompt, read_test_list
from kalle.files import read_jsonl, write_atomic

HERE = Path(__file__).resolve().parent
SPECTROGRAMS = 5
SIMILARITY_TEXTS = 20
MEMORY_TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps until the evening."
TRAININGS = ("flowvae", "flowvae2", "lm-short", "lm")


def evaluations(given: argparse.Namespace, weights: Path, out: Path) -> dict[str, list[str]]:
    """The words behind `kalle evaluate` for every score that it gives, by the name of its folder under ``out``."""
    corpora: Path = given.corpora
    tests = corpora.parent / "test"
    seeds = f"synthesis.seeds=[{','.join(map(str, given.score_seeds))}]"
    common = [f"model={weights}", f"metrics.wer.model={given.asr}", f"device={given.device}"]
    limited = [*common, f"testset.limit={given.items}"]
    drawn = f"figure_items={SPECTROGRAMS}"
    prompt = choose_prompt(read_test_list(corpora / "en" / "cuts_valid.jsonl.gz").items)
    voice = [override("synthesis.prompt_audio", prompt.audio_path)]
    found = {
        "synthetic": ["kind=synthesis", f"testset={tests / SYNTHETIC / 'cuts_test.jsonl.gz'}", *limited, seeds, drawn],
        "harvard": ["kind=synthesis", f"testset={out / 'harvard.jsonl'}", *limited, seeds, "~metrics.sim", "figure_items=0"],
        "recorded": ["kind=synthesis", f"testset={corpora / 'en' / 'cuts_test.jsonl.gz'}", *limited, seeds, drawn, *voice],
        "lengths": ["kind=synthesis", f"testset={out / 'lengths.jsonl'}", "testset.min_words=1", *common, "~metrics.sim", "figure_items=0"],
    }
    heard = [corpora / name for name in LANGUAGES if name in present(corpora)] + [
        tests / name for name in (SYNTHETIC, STRANGERS) if (tests / name).is_dir()
    ]
    for folder in heard:
        run = ["kind=reconstruction", f"testset={folder / 'cuts_test.jsonl.gz'}", *limited, drawn]
        found[f"reconstruction-{folder.name}"] = run
    return {name: [*words, f"out={out / name}"] for name, words in found.items()}


def evaluate(stages: Stages, given: argparse.Namespace, weights: Path) -> str:
    """Run every score of ``weights`` and write ``given.out``/evaluation; returns the table.

    Stages carry the number of items in their names, so that another number is another stage; what `kalle evaluate` has scored it keeps.
    """
    out: Path = given.out / "evaluation"
    out.mkdir(parents=True, exist_ok=True)
    unseen = read_test_list(given.corpora.parent / "test" / SYNTHETIC, min_words=1).items
    texts = texts_of_all_lengths([item.text for item in unseen], given.lengths)
    write_atomic(out / "lengths.jsonl", "".join(json.dumps(item) + "\n" for item in texts))
    sentences = (HERE / "harvard.txt").read_text(encoding="utf-8").splitlines()
    harvard = [{"id": f"harvard-{index:02d}", "text": text} for index, text in enumerate(sentences, 1)]
    write_atomic(out / "harvard.jsonl", "".join(json.dumps(item) + "\n" for item in harvard))
    temperature = read_json(weights / CONFIG_NAME).get("temperature", 1.0)
    tag = f"{weights} at temperature {temperature} {given.items} {given.lengths} {given.score_seeds} {given.asr}"
    for name, words in evaluations(given, weights, out).items():
        stages.command(f"score {name} of {tag}", "evaluate", *words)
    stages.run(f"score lengths again of {tag}", lambda: _score_lengths(out, seconds_per_character(unseen)))
    count = min(SIMILARITY_TEXTS, given.items)
    stages.run(f"score voices of {tag}", lambda: _score_voices(out, given, weights, count))
    stages.run(f"score size of {tag}", lambda: write_json(out / "size.json", size_and_memory(weights, out / "memory.wav")))
    curves = draw_curves([given.out / name for name in TRAININGS], out / "curves")
    compute = given.out / "compute.json"
    return write_report(out, given, read_json(compute) if compute.is_file() else None, curves, LANGUAGES)


def _score_lengths(out: Path, pace: float) -> None:
    rows = read_jsonl(out / "lengths" / "items.jsonl")
    spoken = [row for row in rows if row["system"] == "synthesis" and "error" not in row]
    verdicts = [judged(row, pace) for row in spoken]
    write_atomic(out / "lengths.items.jsonl", "".join(json.dumps(verdict) + "\n" for verdict in verdicts))
    write_json(out / "lengths.json", {"seconds_per_character": pace, "failed": len(rows) - len(spoken), "rates": summarised(verdicts)})


def _score_voices(out: Path, given: argparse.Namespace, weights: Path, count: int) -> None:
    voices = VoiceScores(weights, given.corpora, count, given.device, given.score_seeds[0], given.asr)
    write_json(out / "voices.json", voices.built_in())
    if (given.corpora.parent / "test" / STRANGERS).is_dir():
        write_json(out / "strangers.json", voices.strangers())


def size_and_memory(weights: Path, wav: Path) -> dict[str, Any]:
    """Bytes of all files and of the largest one, and the peak memory of `kalle say` with them, on a CPU."""
    sizes = [path.stat().st_size for path in weights.rglob("*") if path.is_file()]
    words = [sys.executable, str(HERE / "say_memory.py"), str(weights), MEMORY_TEXT, str(wav)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"'{' '.join(words)}' ended with exit code {done.returncode}: {done.stderr.strip()[-500:]}; mend that first")
    return {"bytes": sum(sizes), "largest_file_bytes": max(sizes), "peak_memory_bytes": int(done.stdout.split()[-1])}

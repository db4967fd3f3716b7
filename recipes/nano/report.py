"""One JSON and one table of what was aimed at and what was reached."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpora import STRANGERS, SYNTHETIC
from score_lengths import lengths_table
from similarity import margins_table
from voices import DEFAULT

from kalle.checkpoint import read_json, write_json
from kalle.files import write_atomic

MB = 1e6


@dataclass(frozen=True)
class Goal:
    """One line of the table. ``at_most`` or ``at_least`` is the target; with neither the number is only reported."""

    name: str
    path: tuple[str, ...]
    """Where the number stands in the summary."""
    at_most: float | None = None
    at_least: float | None = None
    form: str = ".3f"
    scale: float = 1.0
    """The number is divided by it."""

    @property
    def target(self) -> str:
        """The target, for people."""
        if self.at_most is not None:
            return f"<= {self.at_most:{self.form}}"
        return "-" if self.at_least is None else f">= {self.at_least:{self.form}}"

    def reached(self, value: float) -> bool | None:
        """Whether ``value`` (scaled) meets the target; None without one."""
        if self.at_most is not None:
            return value <= self.at_most
        return None if self.at_least is None else value >= self.at_least


def _speech(kind: str, system: str, name: str) -> tuple[str, ...]:
    return ("speech", kind, system, name, "value")


GOALS = (
    Goal("weights, MB", ("size", "bytes"), at_most=40.0, form=".1f", scale=MB),
    Goal("largest file, MB", ("size", "largest_file_bytes"), at_most=25.0, form=".1f", scale=MB),
    Goal("peak memory of `kalle say`, MB", ("size", "peak_memory_bytes"), at_most=700.0, form=".0f", scale=MB),
    Goal("WER, unseen sentences spoken by the teacher", _speech("synthetic", "recording", "wer_corpus")),
    Goal("WER, the same texts in the default voice", _speech("synthetic", "synthesis", "wer_corpus")),
    Goal("... times the teacher's", ("times_teacher",), at_most=1.6, form=".2f"),
    Goal("... similarity to the speaker", _speech("synthetic", "synthesis", "sim")),
    Goal("... real-time factor", _speech("synthetic", "synthesis", "rtf")),
    Goal("WER, Harvard sentences in the default voice", _speech("harvard", "synthesis", "wer_corpus"), at_most=0.07),
    Goal("WER, unseen English recordings", _speech("recorded", "recording", "wer_corpus")),
    Goal("WER, the same texts in that voice", _speech("recorded", "synthesis", "wer_corpus"), at_most=0.3),
    Goal("... similarity to the speaker", _speech("recorded", "synthesis", "sim")),
    Goal("1 to 60 words: no end", ("lengths", "rates", "all", "no_end", "value"), at_most=0.005, form=".1%"),
    Goal("1 to 60 words: last word missing", ("lengths", "rates", "all", "last_word_missing", "value"), at_most=0.04, form=".1%"),
    Goal("1 to 60 words: repetition", ("lengths", "rates", "all", "repetition", "value"), at_most=0.01, form=".1%"),
    Goal("rise of the WER by the Flow-VAE, default voice", ("rise", SYNTHETIC), at_most=0.005),
    Goal("... blends that training did not hear", ("rise", STRANGERS), at_most=0.015),
    Goal("... English recordings", ("rise", "en"), at_most=0.015),
    Goal("PESQ-WB, default voice", _speech(f"reconstruction-{SYNTHETIC}", "reconstruction", "pesq_wb"), at_least=2.4),
    Goal("STOI of the same", _speech(f"reconstruction-{SYNTHETIC}", "reconstruction", "stoi"), at_least=0.94),
    Goal("PESQ-WB, English recordings", _speech("reconstruction-en", "reconstruction", "pesq_wb"), at_least=1.8),
    Goal("STOI of the same", _speech("reconstruction-en", "reconstruction", "stoi"), at_least=0.9),
    Goal("WER of the worst built-in voice but the default one", ("worst_voice_wer",), at_most=0.1),
    Goal("mean WER of a cloned stranger", ("strangers_wer",), at_most=0.12),
    Goal("mean similarity of a cloned stranger", ("strangers_own",), at_least=0.8),
    Goal("... mean margin over the nearest other", ("strangers_margin",), at_least=0.1),
)
"""What these weights are to reach."""
RECONSTRUCTION = ("wer_corpus", "pesq_wb", "stoi", "sim", "mel_l1")


def found(summary: Mapping[str, Any], path: Sequence[str]) -> float | None:
    """The number at ``path``; None where something on the way is missing."""
    value: Any = summary
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return None if value is None else float(value)


def write_report(
    out: Path, given: argparse.Namespace, compute: Mapping[str, Any] | None, curves: Sequence[Path], languages: Sequence[str]
) -> str:
    """Put what lies in ``out`` into ``out``/summary.json and summary.md; returns the Markdown."""
    kinds = sorted(path.parent.name for path in out.glob("*/results.json"))
    summary: dict[str, Any] = {
        "speech": {kind: read_json(out / kind / "results.json")["summary"] for kind in kinds},
        "counts": {kind: read_json(out / kind / "results.json")["counts"] for kind in kinds},
        **{name: read_json(out / f"{name}.json") for name in ("lengths", "voices", "size")},
        "seeds": given.score_seeds,
        "recogniser": given.asr,
        "compute": compute,
    }
    summary["rise"] = {name: _rise(summary["speech"], f"reconstruction-{name}") for name in (SYNTHETIC, STRANGERS, "en")}
    before, after = (found(summary["speech"], ("synthetic", system, "wer_corpus", "value")) for system in ("recording", "synthesis"))
    summary["times_teacher"] = after / before if before and after is not None else None
    strangers = out / "strangers.json"
    summary["strangers"] = read_json(strangers) if strangers.is_file() else {}
    others = [row["wer"] for name, row in summary["voices"].items() if name != DEFAULT]
    summary["worst_voice_wer"] = max(others) if others else None
    for key in ("wer", "own", "margin"):
        values = [row[key] for row in summary["strangers"].values() if row[key] is not None]
        summary[f"strangers_{key}"] = sum(values) / len(values) if values else None
    summary["goals"] = [_goal(goal, summary) for goal in GOALS]
    write_json(out / "summary.json", summary)
    parts = [
        goals_table(summary),
        reconstruction_table(summary["speech"], languages),
        lengths_table(summary["lengths"]["rates"]),
        margins_table(summary["voices"]),
        margins_table(summary["strangers"]),
        _pictures(out, kinds, curves),
    ]
    text = "\n\n".join("\n".join(part) for part in parts if part)
    write_atomic(out / "summary.md", text + "\n")
    return text


def _goal(goal: Goal, summary: Mapping[str, Any]) -> dict[str, Any]:
    value = found(summary, goal.path)
    scaled = None if value is None else value / goal.scale
    return {"name": goal.name, "target": goal.target, "value": scaled, "reached": None if scaled is None else goal.reached(scaled)}


def goals_table(summary: Mapping[str, Any]) -> list[str]:
    """Target and what was reached, with the 95% interval where there is one."""
    lines = ["| | target | reached | |", "|---|---|---|---|"]
    for goal in GOALS:
        row = _goal(goal, summary)
        value = "-" if row["value"] is None else f"{row['value']:{goal.form}}"
        mark = {True: "yes", False: "no", None: ""}[row["reached"]]
        lines.append(f"| {goal.name} | {row['target']} | {value}{_interval(goal, summary)} | {mark} |")
    return lines


def _interval(goal: Goal, summary: Mapping[str, Any]) -> str:
    around: Any = summary
    for key in goal.path[:-1]:
        around = around.get(key) if isinstance(around, Mapping) else None
    bounds = around.get("interval") if isinstance(around, Mapping) else None
    return "" if not bounds else f" [{bounds[0] / goal.scale:{goal.form}}, {bounds[1] / goal.scale:{goal.form}}]"


def _rise(speech: Mapping[str, Any], kind: str) -> float | None:
    """By how much the Flow-VAE raises the word error rate of the recordings of ``kind``."""
    before, after = (found(speech, (kind, system, "wer_corpus", "value")) for system in ("recording", "reconstruction"))
    return None if before is None or after is None else after - before


def reconstruction_table(speech: Mapping[str, Any], languages: Sequence[str]) -> list[str]:
    """The Flow-VAE alone: its scores by corpus, and how much it adds to the word error rate of the recordings."""
    head = "| Flow-VAE, unseen recordings | WER of them | " + " | ".join(RECONSTRUCTION) + " | rise of the WER |"
    lines = [head, "|---" * (len(RECONSTRUCTION) + 3) + "|"]
    for kind in speech:
        name = kind.removeprefix("reconstruction-")
        if name == kind:
            continue
        before = found(speech, (kind, "recording", "wer_corpus", "value"))
        values = [found(speech, (kind, "reconstruction", metric, "value")) for metric in RECONSTRUCTION]
        rise = _rise(speech, kind)
        label = f"{name} (recorded)" if name in languages else f"{name} (synthetic)"
        lines.append(f"| {label} | " + " | ".join("-" if value is None else f"{value:.3f}" for value in (before, *values, rise)) + " |")
    return lines


def _pictures(out: Path, kinds: Sequence[str], curves: Sequence[Path]) -> list[str]:
    spectrograms = [
        f"- spectrograms beside the recordings: {out / kind / 'figure.png'}" for kind in kinds if (out / kind / "figure.png").is_file()
    ]
    return [*spectrograms, *(f"- training curves: {path}" for path in curves)]

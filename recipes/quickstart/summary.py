"""The quickstart's tables: what the finished weights say in their own voice, in a cloned one, and in that after tuning."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kalle.checkpoint import read_json, write_json
from kalle.data.loading.datamodules import LMDataModule
from kalle.data.loading.datasets import SpeakerConfig
from kalle.evaluation.probe import LMProbe, probe
from kalle.files import read_jsonl
from kalle.models.lm import KalleLM
from kalle.text.tokenizer import Tokenizer

PROBE_POSITIONS = 2000
SPOKEN = ("wer_corpus", "wer_utt_mean", "sim", "duration_ratio", "no_end_rate", "early_stop_rate")
SCORED = ("default", "before", "after")
"""Folders of the scored runs: the model's own voice, the cloned one, and that one tuned."""
HEARD = 6
"""Texts whose transcripts are shown."""


def probe_of(weights: Path, latents: Path, seed: int) -> LMProbe:
    """What the language model of ``weights`` makes of the test split of ``latents``."""
    lm = KalleLM.from_pretrained(weights)
    speaker = None if lm.config.speaker is None else SpeakerConfig()
    data = LMDataModule(latents, Tokenizer.load(weights / "tokenizer"), PROBE_POSITIONS, seed=seed, speaker=speaker, cache=True)
    return probe(lm, list(data.test_dataloader()), seed=seed)


def write_summary(out: Path, model: Path, seed: int, seconds: Mapping[str, float]) -> str:
    """Write ``out``/summary.json and summary.md; returns the Markdown. ``seconds`` is the wall time of every stage before this."""
    started = time.monotonic()
    probes = [probe_of(weights, out / "latents", seed) for weights in (model, out / "lm/weights")]
    scores = {name: read_json(out / name / "results.json") for name in SCORED}
    rows = [*_speech_rows(scores), *_learning_rows(*probes)]
    seconds = {**seconds, "summary": round(time.monotonic() - started, 1)}
    text = "\n".join([*table(rows), "", *heard_table(out), *_footer(out, scores, seconds)])
    speech = {name: result["summary"] for name, result in scores.items()}
    write_json(out / "summary.json", {"rows": rows, "seconds": seconds, "speech": speech})
    (out / "summary.md").write_text(text + "\n", encoding="utf-8")
    return text


def _speech_rows(scores: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    summaries = {name: result["summary"] for name, result in scores.items()}
    return [
        {
            "number": f"{name}, unseen texts",
            "recordings": _value(summaries["before"], "recording", name),
            # The recordings are another speaker's than the model's own voice.
            **{run: None if (run, name) == ("default", "sim") else _value(summaries[run], "synthesis", name) for run in SCORED},
        }
        for name in SPOKEN
        if _value(summaries["before"], "synthesis", name) is not None
    ]


def heard_table(out: Path) -> list[str]:
    """What the recogniser heard of the first texts, beside them, as Markdown; nothing where there was no recogniser."""
    heard: dict[str, dict[str, str]] = {}
    for name in SCORED:
        for row in read_jsonl(out / name / "items.jsonl"):
            if row.get("system") == "synthesis" and "transcript" in row:
                heard.setdefault(row["text"], {})[name] = row["transcript"]
    if not heard:
        return []
    lines = [
        f"| {text} | " + " | ".join(found.get(name, "-").replace("|", "/") or "-" for name in SCORED) + " |"
        for text, found in list(heard.items())[:HEARD]
    ]
    return ["| text | heard, default voice | heard, cloned voice | heard, cloned and tuned |", "|---|---|---|---|", *lines, ""]


def _learning_rows(before: LMProbe, after: LMProbe) -> list[dict[str, Any]]:
    found = {
        "KL per dimension (nats), unseen texts": (before.frame_kl, after.frame_kl),
        "... as a share of the best constant's": (before.share_of_constant, after.share_of_constant),
        "... rise with shuffled texts": (before.shuffled_rise, after.shuffled_rise),
        "end KL per dimension (nats)": (before.end_kl, after.end_kl),
    }
    return [{"number": name, "recordings": None, "default": None, "before": one, "after": other} for name, (one, other) in found.items()]


def _value(summary: Mapping[str, Any], system: str, name: str) -> float | None:
    found = summary.get(system, {}).get(name)
    return None if found is None else float(found["value"])


def table(rows: list[dict[str, Any]]) -> list[str]:
    """``rows`` as Markdown."""
    head = ["| on the test split | default voice | cloned voice | cloned voice, tuned | recordings |", "|---|---|---|---|---|"]
    cells = (*SCORED, "recordings")
    return head + [f"| {row['number']} | " + " | ".join(_cell(row[name]) for name in cells) + " |" for row in rows]


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _footer(out: Path, scores: Mapping[str, Mapping[str, Any]], seconds: Mapping[str, float]) -> list[str]:
    counts = [result["counts"]["synthesis"] for result in scores.values()]
    ends = ", ".join(f"{count.get('stop_reasons', {}).get('end', 0)} of {count['items']}" for count in counts)
    stages = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    return [
        f"Ended by themselves: {ends}. Wall time {sum(seconds.values()) / 60:.1f} min (seconds: {stages}).",
        "",
        f"- {out / 'speech'}: four sentences in the model's own voice, in made-up ones, in the cloned one, and in that one tuned",
        f"- {', '.join(str(out / name) for name in SCORED)}: spoken test texts, figure.png",
        f"- weights that speak in that voice: {out / 'lm/weights'}",
    ]


if __name__ == "__main__":
    raise SystemExit("run.py writes the summary")

"""The quickstart's one table: what the finished weights could do before they were tuned, and after."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kalle.checkpoint import read_json, write_json
from kalle.data.loading.datamodules import LMDataModule
from kalle.data.loading.datasets import SpeakerConfig
from kalle.evaluation.probe import LMProbe, probe
from kalle.models.lm import KalleLM
from kalle.text.tokenizer import Tokenizer

PROBE_POSITIONS = 2000
SPOKEN = ("wer_corpus", "wer_utt_mean", "sim", "duration_ratio", "no_end_rate", "early_stop_rate")


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
    scores = [read_json(out / name / "results.json") for name in ("before", "after")]
    rows = [*_speech_rows(scores), *_learning_rows(*probes)]
    seconds = {**seconds, "summary": round(time.monotonic() - started, 1)}
    text = "\n".join([*table(rows), "", *_footer(out, scores, seconds)])
    write_json(out / "summary.json", {"rows": rows, "seconds": seconds, "speech": [result["summary"] for result in scores]})
    (out / "summary.md").write_text(text + "\n", encoding="utf-8")
    return text


def _speech_rows(scores: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    before, after = (result["summary"] for result in scores)
    return [
        {
            "number": f"{name}, unseen texts",
            "recordings": _value(before, "recording", name),
            "before": _value(before, "synthesis", name),
            "after": _value(after, "synthesis", name),
        }
        for name in SPOKEN
        if _value(before, "synthesis", name) is not None
    ]


def _learning_rows(before: LMProbe, after: LMProbe) -> list[dict[str, Any]]:
    found = {
        "KL per dimension (nats), unseen texts": (before.frame_kl, after.frame_kl),
        "... as a share of the best constant's": (before.share_of_constant, after.share_of_constant),
        "... rise with shuffled texts": (before.shuffled_rise, after.shuffled_rise),
        "end KL per dimension (nats)": (before.end_kl, after.end_kl),
    }
    return [{"number": name, "recordings": None, "before": one, "after": other} for name, (one, other) in found.items()]


def _value(summary: Mapping[str, Any], system: str, name: str) -> float | None:
    found = summary.get(system, {}).get(name)
    return None if found is None else float(found["value"])


def table(rows: list[dict[str, Any]]) -> list[str]:
    """``rows`` as Markdown."""
    head = ["| on the test split | recordings | before | after tuning |", "|---|---|---|---|"]
    cells = ("recordings", "before", "after")
    return head + [f"| {row['number']} | " + " | ".join(_cell(row[name]) for name in cells) + " |" for row in rows]


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _footer(out: Path, scores: list[Mapping[str, Any]], seconds: Mapping[str, float]) -> list[str]:
    counts = [result["counts"]["synthesis"] for result in scores]
    ends = " and ".join(f"{count.get('stop_reasons', {}).get('end', 0)} of {count['items']}" for count in counts)
    stages = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    return [
        f"Ended by themselves, before and after: {ends}. Wall time {sum(seconds.values()) / 60:.1f} min (seconds: {stages}).",
        "",
        f"- {out / 'speech'}: the four sentences in the model's own voice, in the corpus speaker's, and tuned",
        f"- {out / 'before'}, {out / 'after'}: spoken test texts, figure.png",
        f"- weights that speak in that voice: {out / 'lm/weights'}",
    ]


if __name__ == "__main__":
    raise SystemExit("run.py writes the summary")

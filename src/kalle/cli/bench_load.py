"""``kalle bench load``: many clients on `kalle serve`, each answer compared with the same text spoken alone."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kalle.cli.main import interruptible
from kalle.errors import UserError

if TYPE_CHECKING:
    from kalle.serving.load import LoadReport

FRAMES_TARGET, AUDIO_TARGET, FIRST_AUDIO_TARGET_S = 3.0, 1.8, 0.6
"""The aims on two cores: both rates over those of one request at a time, and the 95th percentile at a rate of requests."""

MOMENTS = ("second_quarter", "last_quarter", "most")


def load(
    model: Annotated[
        Path | None, typer.Option(help="Weight folder; by default kalle-nano. With --url, the one that is served there.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="A server on this machine that runs without keys; by default one is started.", metavar="URL")
    ] = None,
    clients: Annotated[int, typer.Option(min=1, help="Clients at once.")] = 64,
    seconds: Annotated[float, typer.Option(help="How long they begin new requests.")] = 120.0,
    alone_seconds: Annotated[float, typer.Option(help="How long one client does, before.")] = 30.0,
    rate: Annotated[float, typer.Option(help="Streamed requests a second, after.")] = 2.0,
    rate_seconds: Annotated[float, typer.Option(help="How long they come.")] = 30.0,
    requests: Annotated[int, typer.Option(min=2, help="Different requests, streamed and whole ones.")] = 72,
    rows: Annotated[int, typer.Option(min=1, help="Texts that the started server speaks at once.")] = 16,
    device: Annotated[str, typer.Option(help="Of the started server. On others than cpu, samples are not compared.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Also write the report to this JSON file, and a page beside it (.md).")] = None,
) -> None:
    """Serve many clients at once: what is lost, cut or mixed up, memory, first audio, and throughput against one at a time."""
    with interruptible(), contextlib.ExitStack() as stack:
        from kalle.extras import require

        for module in ("fastapi", "uvicorn", "prometheus_client", "av"):
            require(module, "serve", "the server")
        import torch

        from kalle.cli.bench_common import machine, warn_of_load
        from kalle.cli.speaking import load_model, model_folder
        from kalle.extras import checkout_commit
        from kalle.serving.load import LoadBench, LoadPlan, server_process

        logging.getLogger("httpx").setLevel(logging.WARNING)  # a line a request
        plan = LoadPlan(clients, seconds, alone_seconds, rate, rate_seconds, requests)
        facts = machine(torch.device("cpu")) | {"commit": checkout_commit(), "command": shlex.join(["kalle", *sys.argv[1:]]), "rows": rows}
        warn_of_load(facts["load"])
        kalle = load_model(model, "cpu")
        if url is None:
            voices = stack.enter_context(tempfile.TemporaryDirectory(prefix="kalle-voices-"))
            flags = ["--model", str(model_folder(model)), "--device", device, "--voices", voices, "--rows", str(rows)]
            url = stack.enter_context(server_process([*flags, "--queue", str(max(64, clients)), "--timeout", str(plan.timeout_s)]))
        report = LoadBench(url, kalle, plan, typer.echo, compare=device == "cpu").run()
        found = {"machine": facts, "plan": asdict(plan), **summary(report)}
        typer.echo(page(found))
        if out is not None:
            from kalle.files import write_atomic

            write_atomic(out, (json.dumps(found, indent=2) + "\n").encode())
            write_atomic(out.with_suffix(".md"), (page(found) + "\n").encode())
        if report.problems:
            raise UserError(f"answers that are not what was asked for: {dict(report.problems)}; the log of the server may say why")


def summary(report: LoadReport) -> dict[str, Any]:
    """The report as JSON has it: rows, ratios, problems, memory every few seconds."""
    at_rate = report.phases[2].row()["first_audio_seconds"]
    return {
        "rows": [phase.row() for phase in report.phases],
        "frames_ratio": report.frames_ratio,
        "audio_ratio": report.audio_ratio,
        "first_audio_p95_at_rate": None if at_rate is None else at_rate["p95"],
        "problems": dict(report.problems),
        "memory": None if report.memory_bytes is None else dict(zip(MOMENTS, report.memory_bytes, strict=True)),
        "samples": [asdict(sample) for sample in report.samples],
    }


def page(found: Mapping[str, Any]) -> str:
    """The report in Markdown."""
    facts = found["machine"]
    lines = [
        f"`{facts['command']}`  ",
        ", ".join(f"{name} {facts[name]}" for name in ("kalle", "commit", "torch", "device", "threads", "load")),
        "",
    ]
    lines += [
        "| | answers | LM frames/s | rows | audio s/s | first audio p50, p95 | request p50, p95 | clients' CPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        rates = f"{row['frames_per_second']:.0f} | {row['mean_rows']:.1f} | {row['audio_seconds_per_second']:.2f}"
        times = f"{_pair(row['first_audio_seconds'])} | {_pair(row['request_seconds'])}"
        lines.append(f"| {row['name']} | {row['answers']} | {rates} | {times} | {100 * row['client_cpu_share']:.0f}% |")
    answers, compared = (sum(row[name] for row in found["rows"]) for name in ("answers", "compared"))
    largest = max((row["max_difference"] for row in found["rows"] if row["max_difference"] is not None), default=None)
    lines += [
        "",
        f"- answers that were lost, cut or mixed up: {sum(found['problems'].values())} of {answers} {found['problems'] or ''}".rstrip(),
    ]
    if largest is not None:
        lines.append(f"- {compared} lossless ones differ from the speech alone by at most {largest:.1e}")
    late = found["first_audio_p95_at_rate"]
    for words, value, target, met in (
        (
            "LM frames a second over one at a time",
            found["frames_ratio"],
            f"at least {FRAMES_TARGET:g}",
            _reached(found["frames_ratio"], FRAMES_TARGET),
        ),
        (
            "audio a second over one at a time",
            found["audio_ratio"],
            f"at least {AUDIO_TARGET:g}",
            _reached(found["audio_ratio"], AUDIO_TARGET),
        ),
        (
            "p95 of the first audio at a rate, in s",
            late,
            f"at most {FIRST_AUDIO_TARGET_S:g}",
            late is not None and late <= FIRST_AUDIO_TARGET_S,
        ),
    ):
        told = "not measured" if value is None else f"{value:.2f} (aim: {target}; {'met' if met else 'missed'})"
        lines.append(f"- {words}: {told}")
    if found["memory"] is not None:
        before, after, most = (f"{found['memory'][name] / 2**20:.0f} MiB" for name in MOMENTS)
        lines.append(f"- memory of the server: {before} in the second quarter of the run, {after} in the last, at most {most}")
    return "\n".join(lines)


def _pair(values: Mapping[str, float] | None) -> str:
    return "" if values is None else f"{values['p50']:.2f} s, {values['p95']:.2f} s"


def _reached(ratio: float | None, target: float) -> bool:
    return ratio is not None and ratio >= target

"""``kalle bench train``: step time, frames a second, share of the machine's arithmetic, memory, and the loader alone."""

from __future__ import annotations

import logging
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kalle.cli.interrupts import interruptible
from kalle.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kalle.training.throughput import Rival

STAGES = ("lm", "flowvae")


@dataclass(frozen=True)
class Row:
    """One way to train, in numbers."""

    name: str
    precision: str
    step_milliseconds: float
    frames_per_second: float
    speedup: float
    """Frames a second over the first row's."""
    padding_share: float
    utilisation: float
    """Model operations a second over those of matrix products in the same precision, measured in the same run."""
    peak_bytes: int


def train(
    stage: Annotated[str, typer.Argument(help="lm or flowvae.")],
    size: Annotated[str, typer.Option(help="Random weights of this configuration: nano, small or full.")] = "nano",
    data: Annotated[Path | None, typer.Option(help="Latent or corpus folder; without one, random speech of usual lengths is made.")] = None,
    positions: Annotated[int, typer.Option(min=64, help="lm: positions in a batch.")] = 2000,
    batch: Annotated[int, typer.Option(min=1, help="flowvae: crops in a batch.")] = 8,
    segment_frames: Annotated[int, typer.Option(min=1, help="flowvae: latent frames of a crop.")] = 12,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of a turn.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each way to train, one after the other.")] = 3,
    compiled: Annotated[bool, typer.Option("--compile", help="Also with torch.compile.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Loader processes.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; by default what torch takes.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the rows and the machine to this JSON file.")] = None,
) -> None:
    """Time training steps against a plain Lightning loop (padded, fp32) in the same run, and the loader alone."""
    if stage not in STAGES:
        raise UserError(f"kalle bench train: got '{stage}', expected {' or '.join(STAGES)}")
    with interruptible(), tempfile.TemporaryDirectory() as folder:
        import torch

        from kalle.checkpoint import resolve_device
        from kalle.cli import bench_train_rivals as rivals

        _quiet()
        if threads is not None:
            torch.set_num_threads(threads)
        resolved = resolve_device(device)
        if stage == "lm":
            contest = rivals.lm_contest(size, data, Path(folder), positions, workers, resolved, compiled)
        else:
            contest = rivals.flowvae_contest(size, data, Path(folder), batch, segment_frames, workers, resolved, compiled)
        rows = _run(contest, resolved, steps, rounds)
        for line in _lines(rows):
            typer.echo(line)
        loader = contest.loader_speed()
        needed = max(row.frames_per_second for row in rows)
        alone = loader.frames_per_second / contest.samples_per_frame
        typer.echo(f"loader alone ({workers} workers): {alone:.0f} frames/s, {alone / needed:.1f} x the fastest training")
        if out is not None:
            _write(out, contest, rows, loader, resolved, threads)


def _run(contest: Any, device: Any, steps: int, rounds: int) -> list[Row]:
    from kalle.evaluation.benchmark import PeakMemory
    from kalle.training.throughput import race

    peaks: dict[str, int] = {}

    @contextmanager
    def watch(rival: Rival) -> Iterator[None]:
        with PeakMemory(device) as memory:
            yield
        peaks[rival.name] = max(peaks.get(rival.name, 0), memory.bytes)

    race(contest.rivals, device, steps=steps, rounds=rounds, warmup=contest.warmup, frames=contest.frames, watch=watch)
    return [_row(rival, contest, peaks[rival.name], device) for rival in contest.rivals]


def _row(rival: Rival, contest: Any, peak_bytes: int, device: Any) -> Row:
    import torch

    from kalle.training.throughput import matmul_flops_per_second

    half = rival.precision.startswith("bf16")
    roof = matmul_flops_per_second(device, torch.bfloat16 if half else torch.float32)
    return Row(
        name=rival.name,
        precision=rival.precision,
        step_milliseconds=1000 * rival.step_seconds,
        frames_per_second=rival.frames_per_second,
        speedup=rival.frames_per_second / contest.rivals[0].frames_per_second,
        padding_share=rival.padding_share,
        utilisation=rival.frames_per_second * contest.flops_per_frame / roof,
        peak_bytes=peak_bytes,
    )


def _lines(rows: list[Row]) -> list[str]:
    head = f"{'way to train':<28}{'step':>10}{'frames/s':>10}{'x plain':>9}{'padding':>9}{'of peak':>9}{'memory':>10}"
    return [head] + [
        f"{row.name:<28}{row.step_milliseconds:>7.0f} ms{row.frames_per_second:>10.0f}{row.speedup:>9.2f}{row.padding_share:>9.1%}"
        f"{row.utilisation:>9.1%}{row.peak_bytes / 2**20:>7.0f} MB"
        for row in rows
    ]


def _write(out: Path, contest: Any, rows: list[Row], loader: Any, device: Any, threads: int | None) -> None:
    import torch

    from kalle.cli.bench import cpu_name, write

    facts = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": threads or torch.get_num_threads(),
        "parameters": contest.parameters,
        "flops_per_frame": contest.flops_per_frame,
        "loader": asdict(loader),
    }
    write(out, facts, [asdict(row) for row in rows])


def _quiet() -> None:
    import warnings

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")

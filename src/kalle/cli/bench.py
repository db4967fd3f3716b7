"""`kalle bench`: measure speed and memory on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kalle.cli.bench_train import train
from kalle.cli.main import interruptible
from kalle.errors import UserError

if TYPE_CHECKING:
    from kalle.evaluation.benchmark import Timing
    from kalle.models.flowvae import FlowVAE
    from kalle.models.lm import KalleLM

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Measure speed and memory on this machine.", rich_markup_mode=None)
_MEGABYTE = 2**20


class Size(StrEnum):
    """Configurations that can be filled with random weights."""

    full = "full"
    small = "small"
    nano = "nano"


app.command()(train)


@app.callback()
def bench() -> None:
    """Measure speed and memory on this machine."""


@app.command()
def synthesis(
    model: Annotated[Path | None, typer.Option(help="Weight folder; leave it out to give --size.")] = None,
    size: Annotated[Size | None, typer.Option(help="Random weights of this configuration: the same work, no meaning.")] = None,
    seconds: Annotated[list[float], typer.Option(help="Length of speech; repeatable.")] = [4.0, 10.0],  # noqa: B006 (typer copies it)
    uncached: Annotated[bool, typer.Option(help="Also the release's algorithm: no cache, the whole prefix for every frame.")] = True,
    batch: Annotated[list[int] | None, typer.Option(help="Also this many requests at once; repeatable.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the backbone: auto, float32, bfloat16 or float16.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; by default what torch takes.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the rows and the machine to this JSON file.")] = None,
) -> None:
    """Time and memory of each step of synthesis, in one run on the same weights and noise."""
    with interruptible():
        check(model, size, seconds, batch or [])
        import torch

        from kalle.checkpoint import resolve_device
        from kalle.evaluation.benchmark import BenchPlan, bench_synthesis, timing_row
        from kalle.synthesis.kalle import resolve_dtype

        if threads is not None:
            torch.set_num_threads(threads)
        resolved = resolve_device(device)
        precision = resolve_dtype(dtype, resolved)
        lm, flowvae = load(model, size, resolved, precision)
        typer.echo(heading(resolved, precision, lm))
        plan = BenchPlan(seconds=tuple(seconds), uncached=uncached, batch_sizes=tuple(batch or ()))
        rows = bench_synthesis(lm, flowvae, plan, lambda timing: typer.echo(line(timing)))
        if out is not None:
            write(out, machine(resolved, precision, lm), [timing_row(row) for row in rows])


@app.command()
def streaming(
    model: Annotated[Path | None, typer.Option(help="Weight folder; leave it out to give --size.")] = None,
    size: Annotated[Size | None, typer.Option(help="Random weights of this configuration.")] = None,
    chunk: Annotated[list[int], typer.Option(help="Frames a push; repeatable.")] = [1, 2, 4, 8, 16],  # noqa: B006 (typer copies it)
    latency: Annotated[list[int] | None, typer.Option(help="Frames; repeatable; by default the decoder's own.")] = None,
    frames: Annotated[int, typer.Option(help="Length of the utterance.")] = 50,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; by default what torch takes.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the rows to this JSON file.")] = None,
) -> None:
    """Decoding in pushes over decoding at once: time, operations, memory held, and the largest difference of a sample."""
    with interruptible():
        check(model, size, [1.0], chunk)
        if frames < 1:
            raise UserError(f"bad --frames: got {frames}, expected at least 1")
        import torch

        from kalle.checkpoint import resolve_device
        from kalle.evaluation.benchmark import latency_errors, stream_costs

        if threads is not None:
            torch.set_num_threads(threads)
        flowvae = load_flowvae(model, size, resolve_device(device))
        weight = next(flowvae.parameters())
        z = torch.randn(1, frames, flowvae.config.latent_dim, generator=torch.Generator().manual_seed(0)).to(weight)
        rows = []
        typer.echo(f"{'latency':>8}{'push':>6}{'time':>8}{'FLOPs':>8}{'state':>10}{'difference':>12}  ratios to decoding at once")
        for cost in stream_costs(flowvae, z, chunk, tuple(latency or (None,))):
            (error,) = latency_errors(flowvae, z, [cost.latency_frames], cost.chunk_frames)
            kilobytes = f"{cost.state_bytes / 1024:.0f} kB"
            typer.echo(
                f"{cost.latency_frames:>8}{cost.chunk_frames:>6}{cost.time_ratio:>8.2f}{cost.flop_ratio:>8.2f}{kilobytes:>10}{error.max_error:>12.1e}"
            )
            rows.append(asdict(cost) | {"max_error": error.max_error, "level": error.level})
        if out is not None:
            write(out, {"torch": torch.__version__, "threads": torch.get_num_threads(), "frames": frames}, rows)


def check(model: Path | None, size: Size | None, seconds: list[float], batch: list[int]) -> None:
    """Refuse what cannot be measured, before weights are made."""
    if (model is None) == (size is None):
        got = "neither" if model is None else "both"
        raise UserError(f"what to measure: got {got} --model and --size, expected one of them; give a weight folder or a size")
    if not seconds or min(seconds) <= 0:
        raise UserError(f"bad --seconds: got {seconds}, expected lengths above 0")
    if batch and min(batch) < 1:
        raise UserError(f"bad --batch: got {batch}, expected sizes of at least 1")


def load(model: Path | None, size: Size | None, device: Any, dtype: Any) -> tuple[KalleLM, FlowVAE]:
    """The two models, read from ``model`` or made from the configuration ``size``."""
    from kalle.models.lm import KalleLM

    flowvae = load_flowvae(model, size, device)
    if model is not None:
        return KalleLM.from_pretrained(model, device, dtype), flowvae
    import torch

    lm = KalleLM(configuration("lm", size))
    torch.nn.Module.to(lm.backbone, dtype)
    return lm.to(device).eval(), flowvae


def load_flowvae(model: Path | None, size: Size | None, device: Any) -> FlowVAE:
    """The Flow-VAE, read from ``model`` or made from the configuration ``size``."""
    from kalle.models.flowvae import FlowVAE

    if model is not None:
        return FlowVAE.from_pretrained(model, device)
    import torch

    torch.manual_seed(0)
    return FlowVAE(configuration("flowvae", size)).to(device).eval()


def configuration(part: str, size: Size | None) -> Any:
    """The configuration object of ``part``, "lm" or "flowvae"."""
    from hydra.utils import instantiate

    from kalle.cli.hydra_entry import compose

    assert size is not None
    return instantiate(compose(f"train_{part}", [f"{part}={size.value}"])[part], _convert_="all")


def heading(device: Any, dtype: Any, lm: KalleLM) -> str:
    """The heading of the table: what is measured, where, and the columns."""
    facts = ", ".join(f"{name} {value}" for name, value in machine(device, dtype, lm).items())
    return f"{facts}\n{'step':<46}{'speech':>9}{'wall':>10}{'RTF':>8}{'peak':>10}  RTF = wall seconds / seconds of speech"


def machine(device: Any, dtype: Any, lm: KalleLM) -> dict[str, Any]:
    """The facts that a timing depends on."""
    import torch

    from kalle import __version__
    from kalle.extras import cpu_name

    return {
        "kalle": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "backbone": str(dtype).removeprefix("torch."),
        "lm_parameters": sum(weight.numel() for weight in lm.parameters()),
    }


def line(timing: Timing) -> str:
    """One row of the table."""
    memory = timing.peak_bytes / _MEGABYTE
    text = f"{timing.step:<46}{timing.speech_seconds:>7.2f} s{timing.wall_seconds:>8.2f} s{timing.rtf:>8.3f}{memory:>7.0f} MB"
    if timing.peak_since_start:
        text += "  (peak since the process began)"
    if timing.first_audio_seconds is not None:
        text += f"  first audio {timing.first_audio_seconds:.2f} s"
    if timing.difference is not None:
        text += f"  max difference {timing.difference:.1e}"
    return text


def write(path: Path, facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """The rows and the machine as JSON."""
    from kalle.files import write_atomic

    write_atomic(path, (json.dumps({"machine": facts, "rows": rows}, indent=2) + "\n").encode())

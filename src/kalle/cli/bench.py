"""`kalle bench`: measure speed and memory on this machine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kalle.cli.bench_common import Size, configuration, machine, warn_of_load, write
from kalle.cli.bench_load import load
from kalle.cli.bench_train import train
from kalle.cli.main import interruptible
from kalle.errors import UserError

if TYPE_CHECKING:
    from kalle.evaluation.benchmark import BackboneForm, DecoderForm, Timing
    from kalle.models.flowvae import FlowVAE
    from kalle.models.lm import KalleLM

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Measure speed and memory on this machine.", rich_markup_mode=None)
_MEGABYTE = 2**20
ENGINES = {"float32": 4, "bfloat16": 2, "float16": 2, "half": 2, "int8": 1 + 4 / 32, "graph": 2}
"""Ways to compute the language model, and the bytes of a weight in each; half is the faster of the 16-bit types, graph bfloat16 replayed as
a CUDA graph."""
CROSSOVER_WIDTHS = [384, 512, 640, 768, 1024]
ENGINE_HELP = f"Compute the language model so: {', '.join(ENGINES)}; repeatable, the first is the baseline. By default those that run here."


app.command()(train)
app.command()(load)


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
    engine: Annotated[list[str] | None, typer.Option("--engine", "--dtype", help=ENGINE_HELP)] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; by default what torch takes.")] = None,
    minutes: Annotated[float, typer.Option(help="Leave out what is not measured by then.")] = 10.0,
    out: Annotated[
        Path | None, typer.Option(help="Also write the rows and the machine to this JSON file, and a table beside it (.md).")
    ] = None,
) -> None:
    """Time and memory of each step of synthesis, in one run on the same weights and noise, beside the limits of this machine."""
    with interruptible():
        check(model, size, seconds, batch or [])
        import torch

        from kalle.checkpoint import resolve_device
        from kalle.evaluation.benchmark import BenchPlan, SynthesisBench, timing_row
        from kalle.evaluation.limits import measure_limits

        if threads is not None:
            torch.set_num_threads(threads)
        resolved = resolve_device(device)
        facts = machine(resolved)
        warn_of_load(facts["load"])
        engines, decoders = speech_engines(model, size, resolved, engine or []), decoder_forms(model, size, resolved)
        limits = measure_limits(resolved, ("float32", "bfloat16", "float16") if resolved.type == "cuda" else ("float32", "bfloat16"))
        facts |= {"read_bytes_per_second": limits.read_bytes_per_second, "flop_per_second": dict(limits.flop_per_second)}
        typer.echo(heading(facts))
        plan = BenchPlan(tuple(seconds), uncached=uncached, batch_sizes=tuple(batch or ()), minutes=minutes)
        bench = SynthesisBench(engines, decoders, plan, limits, lambda timing: typer.echo(line(timing)))
        bench.run()
        for name in bench.left_out:
            typer.echo(f"left out after {minutes:g} minutes: {name}")
        if out is not None:
            write(out, facts, [timing_row(row) for row in bench.rows])
            write_table(out.with_suffix(".md"), facts, bench.rows)


@app.command()
def compute(
    size: Annotated[Size, typer.Option(help="The configuration.")] = Size.full,
    seconds: Annotated[float, typer.Option(help="Length of speech.")] = 10.0,
    text: Annotated[int, typer.Option(min=1, help="Positions of text, which the paper's counting leaves out.")] = 32,
    out: Annotated[Path | None, typer.Option(help="Also write the rows to this JSON file.")] = None,
) -> None:
    """The arithmetic of speaking in the paper's counting (table 4: no cache, no text, multiply-accumulates) and as it is done here."""
    with interruptible():
        from kalle.evaluation.limits import paper_counting, true_counting

        lm, flowvae = configuration("lm", size), configuration("flowvae", size)
        frames = round(seconds * flowvae.frame_rate_hz)
        if frames < 1:
            raise UserError(f"bad --seconds: got {seconds}, expected at least one frame of {1 / flowvae.frame_rate_hz:g} s")
        rows = [paper_counting(lm, flowvae, frames), true_counting(lm, flowvae, frames, text)]
        typer.echo(f"{'counting':<10}{'language model':>16}{'decoder':>12}{'together':>12}  for {seconds:g} s, in units of 10^9")
        for row in rows:
            typer.echo(f"{row.counting:<10}{row.lm / 1e9:>16,.0f}{row.decoder / 1e9:>12,.0f}{row.total / 1e9:>12,.0f}  {row.unit}")
        if out is not None:
            write(out, {"size": size.value, "seconds": seconds, "frames": frames, "text_positions": text}, [asdict(row) for row in rows])


@app.command()
def crossover(
    hidden: Annotated[list[int], typer.Option(min=64, help="Widths of backbones, multiples of 64; repeatable.")] = CROSSOVER_WIDTHS,
    rows: Annotated[list[int], typer.Option(min=1, help="Texts at once; repeatable.")] = [1, 4],  # noqa: B006 (typer copies it)
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each, behind 100 positions.")] = 8,
    out: Annotated[Path | None, typer.Option(help="Also write the rows to this JSON file.")] = None,
) -> None:
    """From which size on 8-bit weights gain: CPU time of a step with one thread, in fp32 and with 8 bits, of random backbones."""
    with interruptible():
        import torch

        from kalle.evaluation.benchmark import step_seconds
        from kalle.models.backbone import Backbone, BackboneConfig
        from kalle.models.int8 import Int8Backbone, require_engine
        from kalle.models.int8_weights import quantised_backbone

        require_engine()
        torch.set_num_threads(1)
        if odd := [width for width in hidden if width % 64]:
            raise UserError(f"--hidden: got {odd[0]}, expected a multiple of 64; correct it")
        found = []
        typer.echo(f"{'values in layers':>18}{'rows':>6}{'fp32':>12}{'8 bits':>12}{'gain':>8}  CPU time of a step with one thread")
        for width in hidden:
            heads = width // 64
            config = BackboneConfig(300, width, width * 8 // 3 // 64 * 64, max(6, min(12, heads)), heads, heads, 64)
            fp32 = Backbone(config).eval()
            int8 = Int8Backbone(config, dict(quantised_backbone(config, fp32.state_dict())), threads=1)
            for count in rows:
                times = [step_seconds(backbone, count, steps) for backbone in (fp32, int8)]
                row = {"layer_parameters": config.layer_parameters, "rows": count, "fp32_seconds": times[0], "int8_seconds": times[1]}
                found.append(row)
                told = f"{1000 * times[0]:>9.2f} ms{1000 * times[1]:>9.2f} ms{times[0] / times[1]:>8.2f}"
                typer.echo(f"{config.layer_parameters / 1e6:>16.0f} M{count:>6}{told}")
        if out is not None:
            write(out, {"torch": torch.__version__, "threads": 1, "steps": steps}, found)


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


def speech_engines(model: Path | None, size: Size | None, device: Any, names: list[str]) -> list[BackboneForm]:
    """The engines called ``names``, by default those that run here; their weights are read from ``model`` or random of ``size``.

    UserError for a name that is not known or cannot run here.
    """
    import functools

    from kalle.evaluation.benchmark import BackboneForm
    from kalle.models.int8 import require_engine

    cuda = device.type == "cuda"
    if not names and cuda:
        names = ["bfloat16"]
    elif not names:
        names = ["float32", "bfloat16"]
        try:
            require_engine()
            names.append("int8")
        except UserError as error:
            typer.echo(f"not measured: int8, for {error}", err=True)
    for name in names:
        if name not in ENGINES or (name == "graph" and not cuda) or (name == "int8" and cuda):
            raise UserError(
                f"--engine: got '{name}' on {device.type}, expected {', '.join(ENGINES)}, graph on CUDA and int8 on the CPU only"
            )
    if "int8" in names:
        require_engine()
    base = functools.cache(lambda: random_lm(size))
    return [BackboneForm(name, library(name), functools.partial(load_lm, model, base, device, name), ENGINES[name]) for name in names]


def library(engine: str) -> str:
    """The library that computes ``engine``, with its version."""
    import importlib.metadata

    package, kind = (
        ("onnxruntime", "int8 block 32") if engine == "int8" else ("torch", "bfloat16 CUDA graph" if engine == "graph" else engine)
    )
    return f"{package} {importlib.metadata.version(package)} {kind}"


def load_lm(model: Path | None, base: Callable[[], KalleLM], device: Any, engine: str) -> KalleLM:
    """The language model for ``engine``, read from ``model`` or else made of the random fp32 weights that ``base`` keeps."""
    import torch

    from kalle.models.half_precision import HALF, fastest_half, pad_products
    from kalle.models.int8 import Int8Backbone
    from kalle.models.int8_weights import is_quantised, quantised_backbone
    from kalle.models.lm import KalleLM
    from kalle.models.static_cache import StaticBackbone
    from kalle.synthesis.release_compat import in_dtype

    dtype = fastest_half(device) if engine == HALF else torch.bfloat16 if engine == "graph" else getattr(torch, engine, torch.float32)
    if model is not None:
        return KalleLM.from_pretrained(model, device, dtype, "int8" if engine == "int8" else None, engine == "graph")
    lm = base()
    config = lm.backbone.config
    if engine == "int8":
        int8 = KalleLM(lm.config, Int8Backbone(config, dict(quantised_backbone(config, lm.backbone.state_dict()))))
        int8.load_state_dict({name: tensor for name, tensor in lm.state_dict().items() if not is_quantised(name)})
        return int8.eval()
    other = in_dtype(lm, dtype)
    if engine == "graph":
        other = KalleLM(lm.config, StaticBackbone(config, graph=True))
        other.load_state_dict(lm.state_dict())
        torch.nn.Module.to(other.backbone, dtype)
    pad_products(other.backbone)
    # A copy where the device is another, so that the weights it is made of stay on the CPU for the next engine.
    return other if device.type == "cpu" else copy.deepcopy(other).to(device).eval()


def random_lm(size: Size | None) -> KalleLM:
    """Random fp32 weights of the configuration ``size`` on the CPU."""
    import torch

    from kalle.models.lm import KalleLM

    torch.manual_seed(0)
    return KalleLM(configuration("lm", size)).eval().requires_grad_(False)


def decoder_forms(model: Path | None, size: Size | None, device: Any) -> list[DecoderForm]:
    """The decoder as it was trained; on a CPU the paper's prepared for inference too, in fp32 and in bf16."""
    import torch

    from kalle.evaluation.benchmark import DecoderForm
    from kalle.models.flowvae import BigVGANConfig

    def load(dtype: torch.dtype | None = None) -> FlowVAE:
        flowvae = load_flowvae(model, size, device)
        return flowvae if dtype is None else flowvae.prepare_inference(dtype)

    forms = [DecoderForm("trained form", library("float32"), load)]
    config = configuration("flowvae", size) if model is None else load().config
    if device.type == "cpu" and isinstance(config.decoder, BigVGANConfig):
        forms.append(DecoderForm("inference form", library("float32"), lambda: load(torch.float32)))
        forms.append(DecoderForm("inference form, bf16", library("bfloat16"), lambda: load(torch.bfloat16), "bfloat16"))
    return forms


def load_flowvae(model: Path | None, size: Size | None, device: Any) -> FlowVAE:
    """The Flow-VAE, read from ``model`` or made from the configuration ``size``."""
    from kalle.models.flowvae import FlowVAE

    if model is not None:
        return FlowVAE.from_pretrained(model, device)
    import torch

    torch.manual_seed(0)
    return FlowVAE(configuration("flowvae", size)).to(device).eval()


def heading(facts: Mapping[str, Any]) -> str:
    """The heading of the table: what is measured, where, and the columns."""
    told = ", ".join(f"{name} {value}" for name, value in facts.items() if isinstance(value, str | int))
    peaks = ", ".join(f"{name} {value / 1e9:.0f} GFLOP/s" for name, value in facts["flop_per_second"].items())
    return (
        f"{told}\nreads {facts['read_bytes_per_second'] / 1e9:.1f} GB/s, {peaks}\n"
        f"{'step':<44}{'speech':>9}{'wall':>10}{'limit':>10}{'RTF':>8}{'peak':>10}  RTF = wall seconds / seconds of speech"
    )


def line(timing: Timing) -> str:
    """One row of the table."""
    memory = timing.peak_bytes / _MEGABYTE
    times = f"{timing.speech_seconds:>7.2f} s{timing.wall_seconds:>8.2f} s{timing.limit_seconds:>8.2f} s{timing.rtf:>8.3f}"
    return f"{timing.step:<44}{times}{memory:>7.0f} MB  " + "; ".join([timing.library, *notes(timing)])


def notes(timing: Timing) -> list[str]:
    """The rest of what a row says."""
    found = [f"{ratio:.2f} x {name}" for name, ratio in timing.ratios.items()]
    if timing.peak_since_start:
        found.append("peak since the process began")
    if timing.first_audio_seconds is not None:
        found.append(f"first audio {timing.first_audio_seconds:.2f} s")
    if timing.difference is not None:
        found.append(f"max difference {timing.difference:.1e}")
    if timing.divergence_mean is not None and timing.divergence_99 is not None:
        found.append(f"KL {timing.divergence_mean:.1e}, 99th percentile {timing.divergence_99:.1e}")
    return found


def write_table(path: Path, facts: Mapping[str, Any], rows: Sequence[Timing]) -> None:
    """The same as a table in Markdown."""
    from kalle.files import write_atomic

    told = heading(facts).splitlines()[:2]
    table = ["| step | by | seconds | limit | RTF | peak | |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        times = f"{row.wall_seconds:.2f} | {row.limit_seconds:.2f} ({row.limited_by}) | {row.rtf:.3f}"
        step = f"{row.step}, {row.speech_seconds:g} s"
        table.append(f"| {step} | {row.library} | {times} | {row.peak_bytes / 1e9:.1f} GB | {'; '.join(notes(row))} |")
    write_atomic(path, ("\n".join(["  \n".join(told), "", *table]) + "\n").encode())

"""`kalle export`: a weight folder in 16 bits, in files small enough to ship."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kalle.cli.main import interruptible
from kalle.cli.speaking import renamed
from kalle.errors import UserError

if TYPE_CHECKING:
    from kalle.synthesis.export import Exported

BYTES_PER_MB = 1_000_000


class HalfDtype(StrEnum):
    """The 16-bit type of the weights."""

    float16 = "float16"
    bfloat16 = "bfloat16"


def export(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Weight folder, or a hub id OWNER/NAME.")],
    out: Annotated[Path, typer.Option("--out", metavar="DST", help="The weight folder to write; a card that is there stays.")],
    dtype: Annotated[
        HalfDtype, typer.Option(help="Of the weights; statistics, and what it does not suit, stay float32.")
    ] = HalfDtype.float16,
    max_shard_mb: Annotated[float, typer.Option(help="Most megabytes (10^6 bytes) in a weight file.")] = 15.0,
    language: Annotated[str | None, typer.Option(help="Store this default language, an ISO 639-1 code.")] = None,
    voice: Annotated[str | None, typer.Option(metavar="NAME", help="Store this default voice, one of voices/.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="Store this scale of the standard deviations as the default.")] = None,
    longest_seconds: Annotated[
        float | None,
        typer.Option(help="Store how much speech the weights keep up in one request; `kalle say` speaks longer texts in parts."),
    ] = None,
) -> None:
    """Copy a weight folder with its weights in 16 bits and in files of a bounded size. It speaks as before, in fp32 on a CPU."""
    with interruptible(), renamed({"max_bytes": "--max-shard-mb"}):
        if not max_shard_mb > 0:
            raise UserError(f"bad size: got --max-shard-mb {max_shard_mb:g}, expected more than 0; leave it out for 15")
        if longest_seconds is not None and not 0 < longest_seconds < float("inf"):
            raise UserError(f"bad length: got --longest-seconds {longest_seconds:g}, expected a finite one above 0; leave it out for any")
        from kalle.synthesis.options import checked_language

        language = checked_language(language)
        from kalle.synthesis.export import HALF_DTYPES, export_folder
        from kalle.synthesis.weights import resolve_weights

        limit = int(max_shard_mb * BYTES_PER_MB)
        result = export_folder(resolve_weights(source), out, HALF_DTYPES[dtype.value], limit, language, voice, temperature, longest_seconds)
        typer.echo("\n".join(export_lines(result, out, dtype.value)))
        for warning in warnings(result, out):
            typer.echo(f"warning: {warning}", err=True)


def export_lines(result: Exported, out: Path, dtype: str) -> list[str]:
    """The files that were written, one fact a line."""
    lines = [f"wrote {out}: {dtype}, {result.bytes / BYTES_PER_MB:.2f} MB"]
    for name, part in result.parts.items():
        files = f"{part.files} file{'s' if part.files > 1 else ''}"
        error = "nothing to round"
        if part.rounding.where is not None:
            error = f"largest rounding error {part.rounding.error:.2g} of the standard deviation of its tensor ({part.rounding.where})"
        lines.append(f"{name}: {part.bytes / BYTES_PER_MB:.2f} MB in {files}, {error}")
        if part.rounding.kept:
            lines.append(f"{name}: {len(part.rounding.kept)} tensors keep their precision: {', '.join(part.rounding.kept[:5])}")
    if result.voices:
        lines.append(f"voices, bound to the rounded encoders: {', '.join(result.voices)}")
    return lines


def warnings(result: Exported, out: Path) -> list[str]:
    """Parts that were not exported, and files that are still missing."""
    lines = [f"the voice {name} was left out: {reason}" for name, reason in result.voices_left_out.items()]
    if result.left_out:
        lines.append(f"left out, no part of a weight folder: {', '.join(f'{name}/' for name in result.left_out)}")
    if result.default_voice is not None and result.default_voice not in result.voices:
        lines.append(
            f"the default voice {result.default_voice} is not there; until it is, ask for another with --voice; make it with "
            f"`kalle voices create --model {out} --name {result.default_voice}`"
        )
    return lines

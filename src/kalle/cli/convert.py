"""``kalle convert``: released weights into a weight folder and back, and the tokenizer from Llama 3's file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kalle.cli.main import interruptible
from kalle.cli.speaking import renamed

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode=None)
_PARAMETERS = ("out", "flowvae", "flowvae_config", "lm", "lm_config", "tokenizer")
_NAMED = {f"{name}={end}": f"--{name.replace('_', '-')}{' ' * len(end)}{end}" for end in ("'", "") for name in _PARAMETERS}
"""Parameters that the library's messages name, and the flags they have here."""


@app.command()
def release(
    out: Annotated[Path, typer.Option("--out", help="the weight folder to write, or one to add a missing part to")],
    flowvae: Annotated[Path | None, typer.Option(help="the released flowvae.pt")] = None,
    flowvae_config: Annotated[Path | None, typer.Option(help="the JSON published with it")] = None,
    lm: Annotated[Path | None, typer.Option(help="the released model.pt")] = None,
    lm_config: Annotated[Path | None, typer.Option(help="its Llama configuration (JSON); the released one when left out")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="the folder with tokenizer.json")] = None,
) -> None:
    """Turn released files into a weight folder; any part alone works."""
    from kalle.convert.release import convert_release

    with interruptible(), renamed(_NAMED):
        convert_release(out, flowvae, flowvae_config, lm, lm_config, tokenizer)
    typer.echo(str(out))


@app.command("to-release")
def to_release(
    folder: Annotated[Path, typer.Argument(metavar="NAME", help="the weight folder")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="the folder to write")],
) -> None:
    """Write a weight folder in the released format."""
    from kalle.convert.release import convert_to_release

    with interruptible(), renamed(_NAMED):
        convert_to_release(folder, out)
    typer.echo(str(out))


@app.command()
def quantize(
    folder: Annotated[str, typer.Argument(metavar="NAME", help="the weight folder, kalle-nano, or a hub id OWNER/NAME")],
) -> None:
    """Make the 8-bit weights of a weight folder now, beside its own, as --quantize int8 does at its first use."""
    from kalle.models.int8_weights import FILE_NAME, int8_tensors
    from kalle.models.lm import quantisable
    from kalle.synthesis.weights import resolve_weights

    with interruptible():
        part, config = quantisable(resolve_weights(folder))
        int8_tensors(part, config)
    typer.echo(str(part / FILE_NAME))


@app.command()
def tokenizer(
    model: Annotated[Path, typer.Argument(metavar="TOKENIZER_MODEL", help="Llama 3's tokenizer.model")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="the tokenizer folder to write")],
) -> None:
    """Build the tokenizer folder of KALL-E from Llama 3's tokenizer.model."""
    from kalle.errors import UserError
    from kalle.files import atomic_folder
    from kalle.text.tokenizer import TOKENIZER_NAME, llama3_tokenizer

    if (out / TOKENIZER_NAME).exists():
        raise UserError(f"already there: got '{out / TOKENIZER_NAME}', expected a new folder; remove it or choose another --out")
    with interruptible():
        built = llama3_tokenizer(model)
        with atomic_folder(out.absolute()) as staging:
            built.save(staging)
    typer.echo(str(out))

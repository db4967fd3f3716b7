"""`kalle web`: a page for the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kalle.cli.main import interruptible
from kalle.cli.speaking import FolderOption, QuantizeOption, load_model
from kalle.errors import UserError

LONGEST_PORT = 65535


def web(
    model: FolderOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets the network in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 7860,
    share: Annotated[bool, typer.Option("--share", help="Ask Gradio for a public address, through its servers.")] = False,
    voices: Annotated[Path | None, typer.Option(help="Folder of kept voices; by default voices/ of the weights, or here.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the backbone: auto, float32, bfloat16, float16 or half (the faster of them).")] = "auto",
    quantize: QuantizeOption = "none",
    max_text: Annotated[int, typer.Option(help="Most characters in one text.")] = 5000,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """A page for the browser to speak and keep voices; on this machine only unless told otherwise."""
    with interruptible("interrupted before the page was there; run the same command again"):
        run_web(model, host, port, share, voices, device, dtype, max_text, open_, quantize)


def run_web(
    model: Path | None,
    host: str,
    port: int,
    share: bool = False,
    voices: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_text: int = 5000,
    open_browser: bool = False,
    quantize: str = "none",
) -> None:
    """Load ``model``, or for None the default one, and serve the page until Ctrl-C.

    A UserError for every mistake, before the model is loaded where it can be.
    """
    check_options(host, port, max_text)
    from kalle.serving.server import WebOptions, serve

    serve(load_model(model, device, dtype, quantize), WebOptions(host, port, share, voices, max_text, open_browser))


def check_options(host: str, port: int, max_text: int) -> None:
    """A UserError for what can be seen without a model: no Gradio, a bad limit, an address that can't be listened on."""
    from kalle.serving.server import listenable_port, require_gradio

    require_gradio()
    if not 0 <= port <= LONGEST_PORT:
        raise UserError(f"bad port: got {port}, expected 0 to {LONGEST_PORT}; choose another --port")
    if max_text < 1:
        raise UserError(f"bad limit of the text: got {max_text} characters, expected at least 1; raise --max-text")
    listenable_port(host, port)

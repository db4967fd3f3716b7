"""`kalle serve`: the HTTP API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kalle.cli.main import interruptible
from kalle.cli.speaking import FolderOption, QuantizeOption, load_model
from kalle.cli.web import LONGEST_PORT
from kalle.errors import UserError
from kalle.files import lines_of


def serve(
    model: FolderOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on; elsewhere than on this machine it takes --api-keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    api_keys: Annotated[
        Path | None, typer.Option("--api-keys", metavar="FILE", help="File of keys, one a line; clients send one as bearer token.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Let whoever reaches the address use it, without a key.")] = False,
    web: Annotated[bool, typer.Option("--web", help="Serve the page of `kalle web` too, at /web; takes no keys.")] = False,
    voices: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of uploaded voices.", show_default="~/.local/share/kalle/voices")
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option("--name", help="Name of the model in the API; may be repeated.", show_default="its folder's")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the backbone: auto, float32, bfloat16 or float16.", hidden=True)] = "auto",
    quantize: QuantizeOption = "none",
    rows: Annotated[int, typer.Option(help="Texts that are spoken at once.")] = 16,
    queue: Annotated[int, typer.Option(help="Requests that may wait; more are answered with 429.")] = 64,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 300.0,
    grace: Annotated[float, typer.Option(help="Seconds that requests may go on after SIGTERM.")] = 30.0,
    max_text: Annotated[int, typer.Option(help="Most characters in one text.")] = 5000,
    max_upload: Annotated[int, typer.Option(help="Most MiB of a recording.")] = 20,
) -> None:
    """Serve speech over HTTP as OpenAI's API does: many requests at once, streamed or whole. See docs/how-to/serve.md."""
    with interruptible("interrupted before the server was there; run the same command again"):
        from kalle.extras import require

        for module in ("fastapi", "uvicorn", "prometheus_client"):
            require(module, "serve", "the server")
        from kalle.serving.engine import EngineLimits
        from kalle.serving.http import serve_api
        from kalle.serving.server import is_loopback, listenable_port, require_gradio
        from kalle.serving.service import ServeOptions, default_voices

        keys = read_keys(api_keys)
        if not is_loopback(host) and not keys and not insecure:
            raise UserError(f"no key for a server that others reach: got --host {host}, expected --api-keys FILE or --insecure")
        if web:
            require_gradio()
            if keys:
                raise UserError("the page asks for no key: got --web and --api-keys, expected one of them; run `kalle web` beside it")
        if not 0 <= port <= LONGEST_PORT:
            raise UserError(f"bad port: got {port}, expected 0 to {LONGEST_PORT}; choose another --port")
        if max_text < 1 or max_upload < 1:
            raise UserError(f"bad limit: got --max-text {max_text} and --max-upload {max_upload}, expected at least 1; raise it")
        options = ServeOptions(
            host, port, voices or default_voices(), keys, tuple(name or ()), web, max_text, max_upload * 2**20, grace,
            EngineLimits(rows, queue, timeout, frame_budget=512 * rows),
        )  # fmt: skip
        listenable_port(host, port)
        serve_api(load_model(model, device, dtype, quantize), options)


def read_keys(path: Path | None) -> tuple[str, ...]:
    """The keys in the file ``path``, one a line; UserError where there is none, or one that a header cannot hold."""
    if path is None:
        return ()
    try:
        lines = lines_of(path.read_bytes().decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the keys in '{path}': {error}; check --api-keys") from None
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise UserError(f"no key in '{path}': expected one a line; write one, such as the output of `openssl rand -hex 32`")
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise UserError(f"a bad key in '{path}': expected ASCII without spaces; replace it")
    return keys

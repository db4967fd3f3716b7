"""The web page with the released files in ckpt/, which are converted once."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kalle.cli.main import script_main

CKPT = Path(__file__).resolve().parents[1] / "ckpt"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; the release's own page has none, listens on every address and opens a public tunnel."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=Path, help="weight folder (default: the released files in ckpt/, converted once to ckpt/kalle-release)"
    )
    parser.add_argument("--ckpt", type=Path, default=CKPT, help="folder of the released files")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0, as in the release, lets the network in")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on; 0 takes a free one")
    parser.add_argument("--share", action="store_true", help="ask Gradio for a public address, as the release does unasked")
    parser.add_argument("--voices", type=Path, help="folder of kept voices (default: voices/ in the weight folder)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", help="of the backbone: auto, float32, bfloat16 or float16")
    parser.add_argument("--max-text", type=int, default=5000, help="most characters in one text")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    return parser.parse_args(arguments)


def run(arguments: list[str] | None = None) -> None:
    """Serve the page; a UserError for every mistake."""
    given = parse(arguments)
    from kalle.cli.web import check_options, run_web
    from kalle.convert.release import release_folder

    check_options(given.host, given.port, given.max_text)
    model = given.model or release_folder(given.ckpt)
    run_web(model, given.host, given.port, given.share, given.voices, given.device, given.dtype, given.max_text, open_browser=given.open)


def main(arguments: list[str] | None = None) -> int:
    """Run the script and return its exit code, as ``script_main`` describes."""
    return script_main(lambda: run(arguments), "interrupted before the page was there; run the same command again")


if __name__ == "__main__":
    sys.exit(main())

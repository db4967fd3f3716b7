"""How much test-time training is enough: the paper's figure 6 for any weights and any voice. See README.md beside this file.

    python recipes/adapt/run.py --model WEIGHTS --audio anna.wav --text "What Anna says." --out runs/adapt

For every number of steps the voice is learnt anew, with a schedule of its own that ends at zero, as `kalle adapt --steps N` does.
A finished point is not computed again when the recipe is run again with the same arguments.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from curve import Curve, Settings
from figure import draw

from kalle.checkpoint import read_json, write_json
from kalle.errors import UserError
from kalle.files import write_atomic

logger = logging.getLogger("adapt")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="weight folder")
    parser.add_argument("--audio", required=True, help="recording of the speaker to learn")
    parser.add_argument("--text", required=True, help="what is said in it, word for word")
    parser.add_argument("--validate", help="another recording of the speaker")
    parser.add_argument("--validate-text", help="what is said in that one")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 25, 50, 100, 200, 400])
    parser.add_argument("--modes", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--lr", type=float, nargs="+", default=[], help="peak learning rate of each mode; by default kalle's own")
    parser.add_argument("--texts", type=int, default=5, help="texts to speak at every point, at most 20; 0 measures the KL alone")
    parser.add_argument("--language", default="en", choices=("en", "zh"), help="of the texts to speak")
    parser.add_argument("--asr", help="recogniser for the error rate: a CTranslate2 Whisper folder, base, tiny.en or auto")
    parser.add_argument("--out", type=Path, default=Path("runs/adapt"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    return parser.parse_args(arguments)


def settings_of(given: argparse.Namespace) -> Settings:
    """The command line as the curve wants it; a UserError for values that don't go together."""
    if (given.validate is None) != (given.validate_text is None):
        raise UserError("--validate and --validate-text belong together: got one of them, expected both or none; give both")
    if given.lr and len(given.lr) != len(given.modes):
        raise UserError(f"--lr: got {len(given.lr)} rates for {len(given.modes)} modes, expected one for each; change it")
    rates = dict(zip(given.modes, given.lr or [None] * len(given.modes), strict=True))
    validate = None if given.validate is None else (given.validate, given.validate_text)
    return Settings(
        given.model, given.audio, given.text, validate, tuple(given.steps), rates, given.texts, given.language, given.asr, given.seed,
        given.device,
    )  # fmt: skip


def run(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        settings = settings_of(given)
        path = given.out / "curve.json"
        kept = read_json(path) if path.is_file() else {"settings": settings.as_json(), "points": {}}
        if kept["settings"] != settings.as_json():
            raise UserError(f"'{given.out}' holds another curve: got {kept['settings']}, asked for other settings; use another --out")
        curve = Curve(settings, kept)
        for point in curve.points():
            kept["points"] |= point
            write_json(path, kept)
        table = curve.table()
        write_atomic(given.out / "curve.md", table + "\n")
        draw(kept, given.out / "curve.png")
        logger.info("\n%s\n\nfigure: %s", table, given.out / "curve.png")
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted; run the same command again to continue\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run())

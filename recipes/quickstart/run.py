"""The whole chain on the embedded corpus: train, encode, train, speak, score. See README.md beside this file.

    python recipes/quickstart/run.py --minutes 15 --out runs/quickstart

Every stage is an ordinary `kalle` command, shown before it runs; a finished stage is skipped when the recipe is run
again, an interrupted one continues.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from summary import write_summary

from kalle.checkpoint import read_json, write_json
from kalle.cli.main import dispatch
from kalle.errors import UserError

HERE = Path(__file__).resolve().parent
logger = logging.getLogger("quickstart")

SENTENCES = (
    "Please hold while I try to connect your call.",
    "You have five new messages.",
    "The number you have dialed is not in service.",
    "Thank you for calling, goodbye.",
)


@dataclass(frozen=True)
class Budget:
    """Optimizer steps for a number of minutes on two CPU cores.

    Steps and not seconds end a stage, so that the result is a function of the seed and the minutes asked for, whatever
    the machine; a slower one takes longer. The rates are those measured for README.md.
    """

    minutes: float
    overhead_minutes: float = 5.0
    flowvae_share: float = 0.4
    flowvae_steps_per_minute: float = 240.0
    lm_steps_per_minute: float = 320.0

    @property
    def _training_minutes(self) -> float:
        return max(0.05, self.minutes - self.overhead_minutes)

    @property
    def flowvae_steps(self) -> int:
        """Updates of the Flow-VAE."""
        return max(2, round(self._training_minutes * self.flowvae_share * self.flowvae_steps_per_minute))

    @property
    def lm_steps(self) -> int:
        """Updates of the language model."""
        return max(2, round(self._training_minutes * (1 - self.flowvae_share) * self.lm_steps_per_minute))


class Stages:
    """Runs stages in order, once each, and remembers what is done and how long it took."""

    def __init__(self, out: Path, settings: dict[str, object]) -> None:
        self.path = out / "stages.json"
        self.state: dict[str, dict[str, object]] = read_json(self.path) if self.path.is_file() else {}
        before = self.state.setdefault("settings", settings)
        if before != settings:
            raise UserError(f"'{out}' holds a quickstart with {before}, asked for is {settings}; use another --out or delete it")

    def run(self, name: str, action: Callable[[], object]) -> None:
        """Run ``action`` unless stage ``name`` is done."""
        if name in self.state:
            logger.info("[%s] done before, in %.0f s", name, self.state[name]["seconds"])
            return
        started = time.monotonic()
        action()
        self.state[name] = {"seconds": round(time.monotonic() - started, 1)}
        write_json(self.path, self.state)

    def command(self, name: str, *arguments: str) -> None:
        """Run a `kalle` command as a stage."""

        def action() -> None:
            logger.info("[%s] kalle %s", name, shlex.join(arguments))
            code = dispatch(arguments)
            if code:
                sys.exit(code)

        self.run(name, action)

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of every finished stage."""
        return {name: float(value["seconds"]) for name, value in self.state.items() if name != "settings"}  # type: ignore[arg-type]


def quickstart(out: Path, budget: Budget, seed: int, asr: str, extra: list[str], items: int | None) -> None:
    """Run every stage; ``extra`` are overrides for both trainings (used by the test to make it small)."""
    out.mkdir(parents=True, exist_ok=True)
    stages = Stages(out, {"minutes": budget.minutes, "seed": seed})
    corpus, flowvae, latents, model = (str(out / name) for name in ("corpus", "flowvae/weights", "latents", "lm/weights"))
    common = [f"seed={seed}", *extra]
    stages.command("prepare", "prepare", "embedded", "--corpus", str(HERE / "corpus"), "--out", corpus)
    flowvae_run = [
        "experiment=quickstart_flowvae",
        f"data.corpus={corpus}",
        f"out={out / 'flowvae'}",
        f"trainer.max_steps={budget.flowvae_steps}",
    ]
    stages.command("train flowvae", "train", "flowvae", *flowvae_run, *common)
    stages.command("encode", "encode", f"flowvae={flowvae}", f"corpus={corpus}", f"out={latents}", "join.passes=3")
    lm_run = [
        "experiment=quickstart_lm",
        f"data.latents={latents}",
        f"flowvae={flowvae}",
        f"out={out / 'lm'}",
        f"trainer.max_steps={budget.lm_steps}",
    ]
    stages.command("train lm", "train", "lm", *lm_run, *common)
    for index, sentence in enumerate(SENTENCES):
        stages.command(
            f"say {index}", "say", sentence, "-o", str(out / f"speech/sentence{index}.wav"), "--model", model, "--seed", str(seed + index)
        )
    scoring = [f"testset={corpus}/cuts_test.jsonl.gz", f"metrics.wer.model={asr}", *([f"testset.limit={items}"] if items else [])]
    stages.command("score reconstruction", "evaluate", "kind=reconstruction", f"model={flowvae}", f"out={out / 'reconstruction'}", *scoring)
    synthesis = [f"model={model}", f"out={out / 'synthesis'}", "score_recordings=false"]
    stages.command("score synthesis", "evaluate", "kind=synthesis", *synthesis, *scoring)
    summary = write_summary(out, seed, stages.seconds)
    logger.info("\n%s", summary)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15, help="wall time to aim at on two CPU cores; more gets better")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--asr", default="auto", help="recogniser for the WER: a CTranslate2 Whisper folder, base, tiny.en or auto")
    parser.add_argument("--items", type=int, default=None, help="score this many test items only")
    parser.add_argument("--override", action="append", default=[], help="a Hydra override for both trainings")
    return parser.parse_args(arguments)


def run(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        quickstart(given.out, Budget(given.minutes), given.seed, given.asr, given.override, given.items)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted; run the same command again to continue\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run())

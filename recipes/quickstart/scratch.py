"""The whole chain from random weights on the embedded corpus: train, encode, train, speak, score. See README.md beside this file.

    python recipes/quickstart/scratch.py --minutes 15 --out runs/quickstart-scratch

Every stage is an ordinary `kalle` command, shown before it runs; a finished stage is skipped when the recipe is run
again, an interrupted one continues.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from scratch_summary import write_summary

from kalle.cli.stages import Stages, recipe_main
from kalle.errors import UserError
from kalle.evaluation.asr import find_asr_model

HERE = Path(__file__).resolve().parent
logger = logging.getLogger("quickstart")

OVERHEAD_MINUTES = 6.0
"""Encoding, speaking and scoring, whose length does not depend on the training."""
FLOWVAE_SHARE = 0.4
FLOWVAE_STEPS_PER_MINUTE, LM_STEPS_PER_MINUTE = 240.0, 320.0
"""Rates of the hardware of README.md, rounded down."""

SENTENCES = (
    "Please hold while I try to connect your call.",
    "You have five new messages.",
    "The number you have dialed is not in service.",
    "Thank you for calling, goodbye.",
)


@dataclass(frozen=True)
class Budget:
    """Optimizer steps of the two trainings."""

    flowvae_steps: int
    lm_steps: int

    @classmethod
    def for_minutes(cls, minutes: float) -> Budget:
        """The steps that ``minutes`` of wall time hold on two CPU cores; a UserError when there is no time to train.

        Steps and not seconds end a stage, so that the result is a function of the seed and the minutes asked for,
        whatever the machine; a slower one takes longer.
        """
        training = minutes - OVERHEAD_MINUTES
        if not 1 <= training < float("inf"):
            raise UserError(
                f"minutes: got {minutes:g}, expected at least {OVERHEAD_MINUTES + 1:g} ({OVERHEAD_MINUTES:g} go to encoding and scoring)"
            )
        flowvae = training * FLOWVAE_SHARE * FLOWVAE_STEPS_PER_MINUTE
        return cls(round(flowvae), round(training * (1 - FLOWVAE_SHARE) * LM_STEPS_PER_MINUTE))


def quickstart(out: Path, budget: Budget, given: argparse.Namespace) -> None:
    """Run every stage; ``given.override`` goes to both trainings."""
    settings = {"steps": [budget.flowvae_steps, budget.lm_steps], "seed": given.seed, "override": given.override}
    stages = Stages(out, {**settings, "asr": given.asr, "items": given.items})
    common = [f"seed={given.seed}", *given.override]
    corpus, flowvae, latents, model = (str(out / name) for name in ("corpus", "flowvae/weights", "latents", "lm/weights"))
    stages.command("prepare", "prepare", "embedded", "--corpus", str(HERE / "corpus"), "--out", corpus)
    run = ["experiment=quickstart_flowvae", f"data.corpus={corpus}", f"out={out / 'flowvae'}", f"trainer.max_steps={budget.flowvae_steps}"]
    stages.command("train flowvae", "train", "flowvae", *run, *common)
    stages.command("encode", "encode", f"flowvae={flowvae}", f"corpus={corpus}", f"out={latents}", "join.passes=3")
    run = ["experiment=quickstart_lm", f"data.latents={latents}", f"flowvae={flowvae}", f"trainer.max_steps={budget.lm_steps}"]
    stages.command("train lm", "train", "lm", *run, f"out={out / 'lm'}", *common)
    for index, sentence in enumerate(SENTENCES):
        spoken = str(out / f"speech/sentence{index}.wav")
        stages.command(f"say {index}", "say", sentence, "-o", spoken, "--model", model, "--seed", str(given.seed + index))
    scoring = [
        f"testset={corpus}/cuts_test.jsonl.gz",
        f"metrics.wer.model={given.asr}",
        *([f"testset.limit={given.items}"] if given.items else []),
    ]
    if not recogniser_found(given.asr):
        logger.warning(
            "no speech recogniser '%s' is installed, so there will be no WER; `kalle evaluate` says which packages bring one", given.asr
        )
        scoring = [scoring[0], *scoring[2:], "~metrics.wer"]
    run = [f"model={flowvae}", f"out={out / 'reconstruction'}"]
    stages.command("score reconstruction", "evaluate", "kind=reconstruction", *run, *scoring)
    run = [f"model={model}", f"out={out / 'synthesis'}", "score_recordings=false"]
    stages.command("score synthesis", "evaluate", "kind=synthesis", *run, *scoring)
    logger.info("\n%s", write_summary(out, given.seed, stages.seconds))


def recogniser_found(model: str) -> bool:
    """Whether ``model`` can be had here."""
    try:
        find_asr_model(model)
    except UserError:
        return False
    return True


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15, help="wall time to aim at on two CPU cores; more gets better")
    parser.add_argument("--steps", type=int, nargs=2, metavar=("FLOWVAE", "LM"), help="optimizer steps instead of minutes")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart-scratch"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--asr", default="auto", help="recogniser for the WER: a CTranslate2 Whisper folder, base, tiny.en or auto")
    parser.add_argument("--items", type=int, default=None, help="score this many test items only")
    parser.add_argument("--override", action="append", default=[], help="a Hydra override for both trainings")
    return parser.parse_args(arguments)


def run(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = parse(arguments)

    def work() -> None:
        budget = Budget(*given.steps) if given.steps else Budget.for_minutes(given.minutes)
        given.out.mkdir(parents=True, exist_ok=True)
        quickstart(given.out, budget, given)

    return recipe_main(work, given.out)


if __name__ == "__main__":
    sys.exit(run())

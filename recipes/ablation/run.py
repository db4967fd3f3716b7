"""One change at a time at nano scale, every variant measured the same way. See README.md beside this file.

    python recipes/ablation/run.py --out runs/ablation

Every step is an ordinary `kalle` command, shown before it runs; finished ones are skipped when the recipe is run again. ``--only`` takes
names of variants.py.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from variants import BASE, CODECS, MODELS, TEMPERATURES, Codec, Model

from kalle.checkpoint import read_json, write_json
from kalle.cli.stages import Stages
from kalle.errors import UserError
from kalle.files import write_atomic

logger = logging.getLogger("ablation")


class Ablation:
    """The folders and stages of one run of the recipe."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.out = given, given.out
        settings = {"steps": given.steps, "seed": given.seed, "items": given.items, "threads": given.threads, "corpus": str(given.corpus)}
        self.stages = Stages(given.out, settings)
        self.results: dict[str, dict[str, Any]] = {"codecs": {}, "models": {}, "temperatures": {}}
        self.common = [f"seed={given.seed}", f"threads={given.threads}", "logger=csv"]

    def prepare(self) -> None:
        """The embedded corpus, or the one that was given."""
        if self.given.corpus is None:
            self.stages.command("prepare", "prepare", "embedded", "--out", str(self.out / "corpus"))

    @property
    def corpus(self) -> Path:
        """The prepared corpus."""
        return self.given.corpus or self.out / "corpus"

    def codec(self, codec: Codec) -> None:
        """Train a Flow-VAE, score its reconstructions and encode."""
        folder = self.out / "flowvae" / codec.name
        run = ["experiment=quickstart_flowvae", f"data.corpus={self.corpus}", f"out={folder}", f"trainer.max_steps={self.given.steps[0]}"]
        quiet = ["trainer.val_check_interval=100000", "callbacks.media=null"]
        self.stages.command(f"train flowvae {codec.name}", "train", "flowvae", *run, *quiet, *self.common, *codec.overrides)
        weights, scores = folder / "weights", folder / "scores"
        metrics = ["~metrics.wer", "~metrics.sim", "~metrics.pesq_nb"]
        run = [
            "kind=reconstruction",
            f"model={weights}",
            f"testset={self.corpus}/cuts_test.jsonl.gz",
            f"out={scores}",
            "score_recordings=false",
        ]
        self.stages.command(f"score flowvae {codec.name}", "evaluate", *run, *self._limit(), *metrics)
        latents = self.out / "latents" / codec.name
        self.stages.command(
            f"encode {codec.name}", "encode", f"flowvae={weights}", f"corpus={self.corpus}", f"out={latents}", "join.passes=1"
        )
        from measure import reconstruction_row

        self.results["codecs"][codec.name] = {"question": codec.question, **reconstruction_row(scores)}

    def model(self, model: Model) -> None:
        """Train a language model, measure what it learnt, and let it speak."""
        codec = next(codec for codec in CODECS if codec.name == model.codec)
        folder, latents = self.out / "lm" / model.name, self.out / "latents" / codec.name
        flowvae = self.out / "flowvae" / codec.name / "weights"
        run = ["experiment=quickstart_lm", f"data.latents={latents}", f"flowvae={flowvae}", f"out={folder}"]
        quiet = [f"trainer.max_steps={self.given.steps[1]}", "trainer.val_check_interval=100000", "callbacks.media=null"]
        overrides = [*codec.lm_overrides, *model.overrides]
        self.stages.command(f"train lm {model.name}", "train", "lm", *run, *quiet, *self.common, *overrides)
        self.stages.run(f"measure {model.name}", lambda: self._measure(model, latents))
        self._speak(model.name, folder / "weights", folder / "speech", 1.0)
        from measure import speaking_row

        row = read_json(folder / "measured.json")
        self.results["models"][model.name] = {"question": model.question, **row, **speaking_row(folder / "speech")}

    def temperature(self, value: float) -> None:
        """Let the base model speak at another temperature."""
        folder = self.out / "temperature" / str(value)
        self._speak(f"temperature {value}", self.out / "lm" / BASE / "weights", folder, value)
        from measure import speaking_row

        self.results["temperatures"][str(value)] = speaking_row(folder)

    def _measure(self, model: Model, latents: Path) -> None:
        from measure import measure_lm

        direction = "posterior_prediction" if model.name == "posterior_prediction" else "prediction_posterior"
        folder = self.out / "lm" / model.name
        write_json(folder / "measured.json", measure_lm(folder / "weights", latents, self.corpus, direction, self.given.seed))

    def _speak(self, name: str, weights: Path, out: Path, temperature: float) -> None:
        run = ["kind=synthesis", f"model={weights}", f"testset={self.corpus}/cuts_test.jsonl.gz", f"out={out}", "score_recordings=false"]
        more = [f"synthesis.temperature={temperature}", f"metrics.wer.model={self.given.asr}"]
        self.stages.command(f"speak {name}", "evaluate", *run, *self._limit(), *more)

    def _limit(self) -> list[str]:
        return [] if self.given.items is None else [f"testset.limit={self.given.items}"]


def ablation(given: argparse.Namespace) -> str:
    """Run every variant that was asked for; returns the tables."""
    run = Ablation(given)
    known = {variant.name for variant in (*CODECS, *MODELS)}
    unknown = sorted(set(given.only) - known)
    if unknown:
        raise UserError(f"--only: got {', '.join(unknown)}, expected names of {', '.join(sorted(known))}; correct it")
    models = [model for model in MODELS if not given.only or model.name in given.only]
    needed = {model.codec for model in models}
    run.prepare()
    for codec in CODECS:
        if codec.name in needed:
            run.codec(codec)
    for model in models:
        run.model(model)
    if any(model.name == BASE for model in models):
        for value in TEMPERATURES:
            run.temperature(value)
    from measure import tables

    text = tables(run.results)
    write_json(given.out / "results.json", {**run.results, "seconds": run.stages.seconds})
    write_atomic(given.out / "results.md", text + "\n")
    return text


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--corpus", type=Path, default=None, help="a prepared corpus instead of the embedded one")
    parser.add_argument(
        "--steps", type=int, nargs=2, metavar=("FLOWVAE", "LM"), default=[400, 500], help="optimizer steps of each training"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--items", type=int, default=20, help="score this many test items only")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; sums in another order are another run")
    parser.add_argument("--asr", default="auto", help="recogniser: a CTranslate2 Whisper folder, base, tiny.en or auto")
    parser.add_argument("--only", nargs="*", default=[], help="names of language models in variants.py")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    import torch

    torch.set_num_threads(given.threads)
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        logger.info("\n%s", ablation(given))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted; run the same command again to continue\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

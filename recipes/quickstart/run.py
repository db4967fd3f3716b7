"""Speak with finished weights, make up and clone voices, tune the model to one, and score all of it. See README.md beside this file.

    python recipes/quickstart/run.py --minutes 10 --out runs/quickstart

Every stage is an ordinary `kalle` command, shown before it runs; a finished stage is skipped when the recipe is run again, an interrupted
one continues. scratch.py beside this file trains both models from random weights instead.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from summary import write_summary

from kalle.checkpoint import part_folder, read_json, write_json
from kalle.cli.main import dispatch
from kalle.cli.stages import Stages, override, recipe_main
from kalle.errors import UserError
from kalle.evaluation.asr import find_asr_model
from kalle.evaluation.test_list import TestItem, choose_prompt, read_test_list

HERE = Path(__file__).resolve().parent
MODEL = HERE.parents[1] / "ckpt" / "kalle-nano"
logger = logging.getLogger("quickstart")

OVERHEAD_MINUTES = 6.0
"""Speaking, encoding and scoring three times, whose length does not depend on the training."""
LM_STEPS_PER_MINUTE = 50.0
"""Low for two CPU cores, so that a busy machine keeps to the minutes too."""
ITEMS = 24
"""Test texts that are scored unless told otherwise; recognition takes most of the time."""
VOICE = "corpus-speaker"
SECONDS = {"prepare": 6, "speak": 2, "random voice": 2, "clone": 2, "score default": 60, "score before": 70, "encode": 50, "train lm": 150,
           "stop rule": 10, "voice": 2, "speak tuned": 2, "score after": 60}  # fmt: skip
"""That a stage may take on two CPU cores, for the time that is left."""

SENTENCES = (
    "Please hold while I try to connect your call.",
    "You have five new messages.",
    "The number you have dialed is not in service.",
    "Thank you for calling, goodbye.",
)


def steps_for(minutes: float) -> int:
    """The optimizer steps that ``minutes`` of wall time hold on two CPU cores; a UserError when there is no time to train.

    Steps and not seconds end the training, so that the result is a function of the seed and the minutes asked for, whatever the machine.
    """
    training = minutes - OVERHEAD_MINUTES
    if not 1 <= training < float("inf"):
        raise UserError(
            f"minutes: got {minutes:g}, expected at least {OVERHEAD_MINUTES + 1:g} ({OVERHEAD_MINUTES:g} go to encoding and scoring)"
        )
    return round(training * LM_STEPS_PER_MINUTE)


class Quickstart:
    """The folders and stages of one run."""

    def __init__(self, given: argparse.Namespace, steps: int) -> None:
        self.given, self.out, self.steps, self.model = given, given.out, steps, str(given.model)
        described = read_json(part_folder(given.model, "lm") / "config.json")
        self.hears_speakers = described.get("speaker") is not None
        self.width = int(described["backbone"]["hidden_size"])
        settings = {"model": self.model, "steps": steps, "seed": given.seed, "override": given.override}
        seconds = {**SECONDS, "train lm": 60 * steps / LM_STEPS_PER_MINUTE}
        numbered = {"speak", "random voice", "clone", "speak tuned"}
        expected = {
            f"{name} {index}" if name in numbered else name: wanted
            for name, wanted in seconds.items()
            for index in range(len(SENTENCES) if name in numbered else 1)
        }
        self.stages = Stages(self.out, {**settings, "asr": given.asr, "items": given.items}, expected)
        self.corpus, self.latents, self.tuned = (self.out / name for name in ("corpus", "latents", "lm/weights"))

    def run(self) -> str:
        """All stages; returns the table."""
        self.stages.command("prepare", "prepare", "embedded", "--corpus", str(HERE / "corpus"), "--out", str(self.corpus))
        prompt = choose_prompt(read_test_list(self.corpus / "cuts_valid.jsonl.gz").items)
        self.say("speak", self.model)
        self.say("random voice", self.model, "--voice", "random")
        self.say("clone", self.model, *self.prompted(prompt))
        self.score("default", self.model)
        self.score("before", self.model, prompt)
        self.tune()
        self.stages.run("stop rule", self.keep_stop_rule)
        self.stages.run("voice", lambda: self.store_voice(prompt))
        self.say("speak tuned", str(self.tuned))
        self.score("after", str(self.tuned), prompt)
        return write_summary(self.out, self.given.model, self.given.seed, self.stages.seconds)

    def prompted(self, prompt: TestItem) -> list[str]:
        """The options of `kalle say` for the voice of ``prompt``.

        By ear where the model has a speaker encoder: a model of this size that continues a recording loses the text (README.md).
        """
        audio = ["--prompt-audio", str(prompt.audio_path)]
        return audio if self.hears_speakers else [*audio, "--prompt-text", prompt.text]

    def say(self, name: str, model: str, *voice: str) -> None:
        """Every sentence, into speech/NAME-N.wav."""
        for index, sentence in enumerate(SENTENCES):
            spoken = str(self.out / "speech" / f"{name.replace(' ', '-')}-{index}.wav")
            seed = str(self.given.seed + index)
            self.stages.command(f"{name} {index}", "say", sentence, "-o", spoken, "--model", model, "--seed", seed, *voice)

    def tune(self) -> None:
        """Encode the corpus with the model's Flow-VAE and train its language model further on it."""
        mels = ["speaker_mels=true"] if self.hears_speakers else []
        run = [f"corpus={self.corpus}", f"out={self.latents}", "join.passes=2", *mels]
        self.stages.command("encode", "encode", f"flowvae={self.model}", *run)
        listening = ["data=lm_speaker", f"data.speaker.latent_dim={self.width}"] if self.hears_speakers else []
        run = ["experiment=quickstart_tune_lm", f"init={self.model}", f"tokenizer.folder={self.model}/tokenizer", *listening]
        run += [f"data.latents={self.latents}", f"flowvae={self.model}", f"out={self.out / 'lm'}", f"trainer.max_steps={self.steps}"]
        self.stages.command("train lm", "train", "lm", *run, f"seed={self.given.seed}", *self.given.override)

    def keep_stop_rule(self) -> None:
        """Measure the tuned model's stop rule; where that gives none to use, it keeps the one of the weights it comes from."""
        start, tuned = Path(self.model) / "config.json", self.tuned / "config.json"
        known: dict[str, Any] = read_json(start) if start.is_file() else {}
        write_json(tuned, read_json(tuned) | {key: known[key] for key in ("stop", "language", "temperature", "text") if key in known})
        try:
            dispatch(["calibrate", str(self.tuned), "--latents", str(self.latents)])
        except UserError as error:
            logger.warning("%s", error)

    def store_voice(self, prompt: TestItem) -> None:
        """Keep the voice of ``prompt`` with the tuned weights, as the one they speak in."""
        about = ["--licence", "CC-BY-SA-3.0", "--description", "The speaker of the embedded corpus"]
        text = [] if self.hears_speakers else ["--text", prompt.text]
        voice = ["--audio", str(prompt.audio_path), *text, "--name", VOICE, "--language", prompt.language, "--force"]
        dispatch(["voices", "create", "--model", str(self.tuned), *voice, *about])
        path = self.tuned / "config.json"
        write_json(path, read_json(path) | {"voice": VOICE})

    def score(self, name: str, model: str, prompt: TestItem | None = None) -> None:
        """Speak and score the test split in the voice of ``prompt``, or in the model's own."""
        scoring = [f"metrics.wer.model={self.given.asr}"]
        if not recogniser_found(self.given.asr):
            logger.warning("no speech recogniser '%s' is installed, so there will be no WER", self.given.asr)
            scoring = ["~metrics.wer"]
        if self.given.items:
            scoring.append(f"testset.limit={self.given.items}")
        voice = [] if prompt is None else [override("synthesis.prompt_audio", prompt.audio_path)]
        if prompt is not None and not self.hears_speakers:
            voice.append(override("synthesis.prompt_text", prompt.text))
        ceiling = f"score_recordings={'true' if name == 'before' else 'false'}"
        run = [f"model={model}", f"testset={self.corpus}/cuts_test.jsonl.gz", f"out={self.out / name}", ceiling]
        self.stages.command(f"score {name}", "evaluate", "kind=synthesis", *run, *voice, *scoring)


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
    parser.add_argument("--model", type=Path, default=MODEL, help="weight folder to start from; by default ckpt/kalle-nano")
    parser.add_argument("--minutes", type=float, default=10, help="wall time to aim at on two CPU cores")
    parser.add_argument("--steps", type=int, help="optimizer steps instead of minutes")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--asr", default="auto", help="recogniser for the WER: a CTranslate2 Whisper folder, base, tiny.en or auto")
    parser.add_argument("--items", type=int, default=ITEMS, help="score this many test items; 0 scores all")
    parser.add_argument("--override", action="append", default=[], help="a Hydra override for the training")
    return parser.parse_args(arguments)


def run(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = parse(arguments)

    def work() -> None:
        steps = steps_for(given.minutes) if given.steps is None else given.steps
        if not (given.model / "lm").is_dir():
            raise UserError(
                f"no weights: got '{given.model}', expected a weight folder; give one with --model, or train from nothing with "
                "`make quickstart-scratch`"
            )
        given.out.mkdir(parents=True, exist_ok=True)
        logger.info("\n%s", Quickstart(given, steps).run())

    return recipe_main(work, given.out)


if __name__ == "__main__":
    sys.exit(run())

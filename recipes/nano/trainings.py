"""Both models of the recipe: the Flow-VAE, its decoder once more on frozen latents, and the language model."""

from __future__ import annotations

import argparse
import logging
import shutil
from pathlib import Path

from corpora import NAMES, SYNTHETIC, TEACHERS, present

from kalle.checkpoint import CONFIG_NAME, part_folder, read_json, write_json
from kalle.cli.main import dispatch
from kalle.cli.stages import Stages
from kalle.errors import UserError
from kalle.models.flowvae import FlowVAE, FlowVAEConfig

logger = logging.getLogger("nano")

READ = ("en", *TEACHERS)
"""Corpora of the language model, which reads English alone; the Flow-VAE hears the other languages too."""
JOINS = ("join.passes=2", "join.min_seconds=1", "join.max_seconds=14", "join.gap_seconds=[0.16,0.16]")
"""Joins of two to about six utterances beside the single ones: the synthetic corpus has about two seconds each."""
EQUAL_LENGTHS = ("batch_size=8", "shard_size=1500")
"""Synthetic utterances, and so their joins with gaps of whole frames, have some 200 lengths together, and those of one length are encoded
together: oneDNN compiles the encoder's convolutions anew for every length and number of utterances that its cache of 1,024 has not."""
SHORT_FIRST = 0.4
"""Share of the language model's steps on short utterances alone, in which there is least to lose the thread of."""
SHORT = ("data.drop_longer_than=160", "scheduler.final_ratio=0.3")
"""Some five seconds with their text; and no end of the learning, for another training follows."""
LONGEST_SECONDS = "8"
"""What these weights keep up in one request: some twenty words (the table by length in README.md), where joins are of 14 s at most."""
CONFIDENCE_TEXTS = "48"
"""Texts that are spoken, well and badly, to measure below which confidence speech is doubtful."""
DECODER = "nano_flowvae_decoder"
"""The experiment of the decoder's training with noise and harmonics; the encoder stays the one that the latents come from."""


class Training:
    """Folders and stages of the trainings; a number of steps of zero takes the part from ``continue_from``."""

    def __init__(self, stages: Stages, given: argparse.Namespace) -> None:
        self.stages, self.given, self.out = stages, given, given.out
        self.start: Path | None = given.continue_from
        self.flowvae_steps, self.decoder_steps, self.lm_steps = given.steps
        if self.start is None and 0 in (self.flowvae_steps, self.lm_steps):
            raise UserError(
                f"--steps: got {given.steps} without weights to start from, expected more than 0 for FLOWVAE and LM; change them"
            )
        if self.start is not None and not (self.start / "lm").is_dir():
            raise UserError(f"--continue-from: got '{self.start}', expected a weight folder with flowvae/, lm/ and tokenizer/; correct it")
        self.common = [f"seed={given.seed}", f"device={given.device}", "logger=csv", *given.override]
        # What a package withheld is not there; a run whose corpora are to be made yet names all.
        self.corpora = [given.corpora / name for name in present(given.corpora) or NAMES]
        self.read = [corpus for corpus in self.corpora if corpus.name in READ]
        self.latents = [self.out / "latents" / corpus.name for corpus in self.read]

    @property
    def flowvae(self) -> Path:
        """Weights whose encoder makes the latents."""
        return self.out / "flowvae/weights" if self.flowvae_steps else self._started()

    @property
    def decoder(self) -> Path:
        """The same with the decoder trained further."""
        return self.out / "flowvae2/weights" if self.decoder_steps else self.flowvae

    @property
    def lm(self) -> Path:
        """Weights of the language model, with its tokenizer."""
        return self.out / "lm/weights" if self.lm_steps else self._started()

    def _started(self) -> Path:
        assert self.start is not None, "checked at the beginning"
        return self.start

    def run(self) -> None:
        """Every training, and what lies between."""
        if self.flowvae_steps:
            start = [] if self.start is None else [f"init={self.start}", *self._energy(self.start)]
            self._train_flowvae("flowvae", "nano_flowvae", self.flowvae_steps, *start)
        if self.decoder_steps:
            fuller = self.out / "flowvae-sources"
            self.stages.run("sources", lambda: FlowVAE.from_pretrained(self.flowvae).with_sources().save_pretrained(fuller))
            self._train_flowvae("flowvae2", DECODER, self.decoder_steps, f"init={fuller}")
        for corpus, latents in zip(self.read, self.latents, strict=True):
            run = [f"flowvae={self.flowvae}", f"corpus={corpus}", f"out={latents}", f"device={self.given.device}"]
            self.stages.command(f"encode {corpus.name}", "encode", *run, "speaker_mels=true", *JOINS, *EQUAL_LENGTHS)
        if self.lm_steps:
            self._train_lm()

    def _train_lm(self) -> None:
        """Short utterances first, then all; a continuation has learnt to read and takes all at once."""
        short = 0 if self.start is not None else round(self.lm_steps * SHORT_FIRST)
        start = [] if self.start is None else [f"init={self.start}"]
        run = ["train", "lm", f"experiment={self.given.lm}", f"data.latents={_listed(self.latents)}", f"flowvae={self.decoder}"]
        if short:
            first = self.out / "lm-short"
            self.stages.command("train lm short", *run, f"out={first}", f"trainer.max_steps={short}", *SHORT, *self.common)
            start = [f"init={first / 'weights'}"]
        whole = [f"out={self.out / 'lm'}", f"trainer.max_steps={self.lm_steps - short}", *start, *self.common]
        self.stages.command("train lm", *run, *whole)

    def _energy(self, start: Path) -> list[str]:
        """The energy distance where the decoder of ``start`` has noise, which mel losses alone would drive out."""
        path = part_folder(start, "flowvae") / CONFIG_NAME
        return ["objective.energy_weight=3.0"] if FlowVAEConfig.from_dict(read_json(path), str(path)).has_noise else []

    def _train_flowvae(self, name: str, experiment: str, steps: int, *more: str) -> None:
        run = [f"experiment={experiment}", f"data.corpus={_listed(self.corpora)}", f"out={self.out / name}", f"trainer.max_steps={steps}"]
        self.stages.command(f"train {name}", "train", "flowvae", *run, *more, *self.common)

    def finish(self, shipped: Path) -> None:
        """One folder of all parts with a measured stop rule, and its export in 16 bit to ``shipped``."""
        weights = self.out / "weights"
        self.stages.run("assemble", lambda: self.assemble(weights))
        self.stages.run("calibrate", lambda: self._calibrate(weights))
        export = [str(weights), "--out", str(shipped), "--dtype", "float16", "--max-shard-mb", "15"]
        export += ["--language", "en", "--longest-seconds", LONGEST_SECONDS]
        self.stages.command("export", "export", *export)
        if self.given.temperature is not None:
            # No part of the stage, which is done once: another temperature is taken without another export, which would lose the voices.
            config = shipped / CONFIG_NAME
            write_json(config, read_json(config) | {"temperature": self.given.temperature})

    def assemble(self, weights: Path) -> None:
        """Put the parts into the folder ``weights``."""
        shutil.rmtree(weights, ignore_errors=True)
        parts = {"flowvae": part_folder(self.decoder, "flowvae"), "lm": part_folder(self.lm, "lm"), "tokenizer": self.lm / "tokenizer"}
        for name, source in parts.items():
            shutil.copytree(source, weights / name)
        # A continuation reads texts as its start does; a stored voice belongs to the encoders it was made with, which may have trained on.
        stored = None if self.start is None else self.start / CONFIG_NAME
        known = read_json(stored) if stored is not None and stored.is_file() else {}
        values = {key: known[key] for key in ("temperature", "text") if key in known} | read_json(self.lm / CONFIG_NAME)
        write_json(weights / CONFIG_NAME, {key: value for key, value in values.items() if key != "voice"})

    def _calibrate(self, weights: Path) -> None:
        latents = str(self.out / "latents" / SYNTHETIC)
        try:
            words = ["--latents", latents, "--confidence", CONFIDENCE_TEXTS, "--plot", str(self.out / "calibration.png")]
            dispatch(["calibrate", str(weights), *words])
        except UserError as error:
            logger.warning("%s", error)


def _listed(folders: list[Path]) -> str:
    return "[" + ",".join(map(str, folders)) + "]"

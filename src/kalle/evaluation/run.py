"""One evaluation from a configuration to a report: ``evaluate(config)``, for notebooks, tests and the command alike."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from kalle.checkpoint import CONFIG_NAME, PART_NAMES, part_folder, read_json, weight_files, weight_folder
from kalle.data.shared_work import OthersUnfinished, RankJournals, rank_device, share_of_process
from kalle.errors import UserError
from kalle.evaluation.metrics import PESQ, STOI, DurationRatio, MelDistance, Metric
from kalle.evaluation.pool import MetricCard, ScoringPool, twin_rules, worker_count
from kalle.evaluation.protocols import (
    WAV_SUFFIXES,
    SpeakingConfig,
    WavFolder,
    evaluate_reconstruction,
    evaluate_synthesis,
    evaluate_wavs,
    known_recordings,
    wav_folder,
    without_files,
)
from kalle.evaluation.report import Result, Settings, versions
from kalle.evaluation.similarity import Similarity
from kalle.evaluation.test_list import TestItem, TestList, TestListConfig, read_test_list
from kalle.evaluation.word_errors import WER
from kalle.extras import checkout_commit, cpu_name
from kalle.files import check_writable, fingerprint, output_folder
from kalle.models.flowvae import FlowVAE
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.voice import SUFFIX as VOICE_SUFFIX
from kalle.synthesis.voice import VOICES_FOLDER, Voice
from kalle.synthesis.weights import TOKENIZER_FOLDER, resolve_weights
from kalle.text.tokenizer import PHONEMES_NAME, TOKENIZER_NAME

logger = logging.getLogger(__name__)
Kind = Literal["reconstruction", "synthesis", "wavs"]
Resume = Literal["auto", "never"]
Resampling = Literal["soxr", "fft"]
MetricsFor = Callable[[Sequence[str]], Sequence[Metric]]
"""Builds the metrics for a list in these two-letter languages."""
SETTINGS = tuple(setting.name for setting in dataclasses.fields(Settings))
DIGEST_DIGITS = 16
"""Digits of the digest of the weights that a report holds, as many as of the weights of a metric."""
SUMMARY_KEYS = frozenset({"out", "device", "metrics", "rank", "world_size", "resume", "workers", "check", "testset", *SETTINGS})
"""Settings that decide no row of an item, and those whose effect is told by the items and the metrics themselves."""


def standard_metrics(languages: Sequence[str] = ("en",)) -> list[Metric]:
    """The metrics of `kalle evaluate` unless told otherwise; UserError for a package or a recogniser that is missing."""
    return [WER(languages=languages), Similarity(), STOI(), PESQ("wb"), PESQ("nb"), MelDistance(), DurationRatio()]


@dataclass(frozen=True)
class ReconstructionConfig:
    """Options of kind "reconstruction"."""

    sample: bool = False
    """Score a sample of the posterior too, beside its mean."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Settings):
    """Everything that one evaluation depends on."""

    kind: Kind
    """"reconstruction": recordings through the Flow-VAE; "synthesis": texts spoken; "wavs": a folder scored without a model."""
    testset: TestListConfig
    out: str | Path
    """Folder for results.json, items.jsonl, report.md, figure.png and the wavs."""
    model: str | Path | None = None
    """Weight folder, for reconstruction and synthesis."""
    wavs: str | Path | None = None
    """Folder with ID.wav, for kind "wavs"."""
    resampling: Resampling = "soxr"
    """Kind "wavs": how audio of another rate becomes 16 kHz; "fft" is scipy.signal.resample, as the Seed-TTS protocol does it."""
    aligned: bool = False
    """Kind "wavs": whether the wavs run in step with the recordings, as a codec's do."""
    metrics: Sequence[Metric] | MetricsFor = standard_metrics
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    synthesis: SpeakingConfig = field(default_factory=SpeakingConfig)
    device: str = "auto"
    dtype: str = "auto"
    """Of the language model's backbone."""
    quantize: str = "none"
    """8-bit weights of the backbone, on a CPU: int8, auto or none."""
    rank: int | None = None
    """This process's part, 0 <= rank < world_size; None: what torchrun or SLURM say, else all of it."""
    world_size: int | None = None
    resume: Resume = "auto"
    """"never" scores this rank's items again, even those that were scored before with the same model, list and settings."""
    workers: int | None = 0
    """Processes that score beside this one; 0: none, None: one a core where the list is long enough. A script that asks for some needs
    the guard ``if __name__ == "__main__"``, for they are started anew."""
    check: bool = False
    """Stop once the list is read, its files are looked for and the metrics and the weights are loaded, and say so: nothing is scored or
    written. Wavs, prompts or recordings that no item has are a UserError; of those that some items lack a warning tells the number."""

    def __post_init__(self) -> None:
        for name, given in (("out", self.out), ("model", self.model), ("wavs", self.wavs)):
            if given == "" or not isinstance(given, str | Path | None) or (given is None and name == "out"):
                raise UserError(f"{name}: got {given!r}, expected a path; give one, as {name}=DIR")
        for name, choices in (("kind", get_args(Kind)), ("resume", get_args(Resume)), ("resampling", get_args(Resampling))):
            if getattr(self, name) not in choices:
                raise UserError(f"{name}: got '{getattr(self, name)}', expected one of {', '.join(choices)}; correct it")
        if self.source is None:
            needed = "wavs" if self.kind == "wavs" else "model"
            raise UserError(f"kind={self.kind}: got no {needed}, expected {needed}=DIR; add it")

    @property
    def source(self) -> str | Path | None:
        """The folder that is scored: of wavs, or of weights."""
        return self.wavs if self.kind == "wavs" else self.model


def evaluate(config: EvaluateConfig) -> Result | None:
    """Score this rank's share of what ``config`` describes, and write the report once all items are scored.

    Returns the result; None when items of other ranks are not scored yet, and with ``config.check``. What is missing (list, wavs, metrics,
    weights) is a UserError before anything is computed.
    """
    test_list = read_test_list(config.testset)
    if config.kind == "wavs":
        wav_folder(config.wavs or "")
    languages = sorted({item.language for item in test_list.items})
    if config.check:
        check_writable(Path(config.out) / "results.json")
        logger.info("%s", _everything_is_there(config, languages, test_list))
        return None
    share = share_of_process(config.rank, config.world_size)
    out, digest = Path(config.out), _source_digest(config)
    context = {"context": _context(config, test_list, digest)}
    settings = Settings(**{f.name: getattr(config, f.name) for f in dataclasses.fields(Settings)} | context)
    try:
        with output_folder(out), _pool(config, languages, len(test_list.items) // share.world_size) as pool:
            mark = fingerprint(_facts(config, test_list, pool.cards, digest))
            with RankJournals(out, mark, share, len(test_list.items), resume=config.resume == "auto") as journal:
                return _score(config, test_list.items, pool, settings, journal)
    except OthersUnfinished as unfinished:
        logger.info("%s", unfinished)
        return None


def _everything_is_there(config: EvaluateConfig, languages: Sequence[str], test_list: TestList) -> str:
    """Load what ``config`` needs, in this process, and say so in a line. UserError for the first that is missing."""
    with _pool(dataclasses.replace(config, workers=0), languages, 0) as pool:
        known_recordings(config.recordings, pool.cards)
        names = ", ".join(metric.name for metric in pool.cards) or "none"
    if config.model is not None and config.kind == "reconstruction":
        FlowVAE.from_pretrained(config.model, rank_device(config.device))
    elif config.model is not None and config.kind == "synthesis":
        _speaker(config)
    _check_files(config, test_list)
    return f"all is there: {len(test_list.items)} items of '{test_list.source}', {config.kind} of '{config.source}', metrics {names}"


def _check_files(config: EvaluateConfig, test_list: TestList) -> None:
    """A UserError where all items lack a file that they need, a warning where some do."""
    items, wavs = test_list.items, None
    if config.kind == "wavs":
        wavs = WavFolder(config.wavs or "", items)
        wavs.check()
    prompts = config.synthesis.prompts if config.kind == "synthesis" else "none"
    for name, lacking in without_files(items, prompts, wavs, config.kind == "reconstruction").items():
        text = f"no {name} for {len(lacking)} of {len(items)} items of '{test_list.source}', the first '{lacking[0].id}'"
        if len(lacking) == len(items):
            raise UserError(f"{text}: expected one file for each; correct the list or its paths")
        logger.warning("%s: each gets an error row; correct the list or its paths", text)


def _pool(config: EvaluateConfig, languages: Sequence[str], items: int) -> ScoringPool:
    """Metrics that are given as objects are scored in this process, for another one could not make them."""
    given = config.metrics
    if not callable(given):
        if config.workers:
            raise UserError(f"workers: got {config.workers} and metrics that exist already; give a function that makes them, or workers=0")
        return ScoringPool(lambda: given)
    return ScoringPool(partial(given, languages), worker_count(config.workers, items))


def _score(config: EvaluateConfig, items: Sequence[TestItem], pool: ScoringPool, settings: Settings, journal: RankJournals) -> Result:
    if config.kind == "wavs":
        assert config.wavs is not None
        return evaluate_wavs(
            config.wavs, items, pool, config.out, aligned=config.aligned, fft=config.resampling == "fft", settings=settings, journal=journal
        )
    assert config.model is not None
    device = rank_device(config.device)
    if config.kind == "reconstruction":
        flowvae, options = FlowVAE.from_pretrained(config.model, device), config.reconstruction
        return evaluate_reconstruction(
            flowvae, items, pool, config.out, sample=options.sample, seed=options.seed, settings=settings, journal=journal
        )
    kalle, voice = _speaker(config)
    return evaluate_synthesis(kalle, items, pool, config.out, config=config.synthesis, voice=voice, settings=settings, journal=journal)


def _speaker(config: EvaluateConfig) -> tuple[Kalle, Voice | None]:
    """The model that speaks, and the voice of ``synthesis.prompt_audio`` where there is one."""
    assert config.model is not None
    kalle, speaking = Kalle.from_pretrained(config.model, str(rank_device(config.device)), config.dtype, config.quantize), config.synthesis
    return kalle, None if speaking.prompt_audio is None else kalle.voice(speaking.prompt_audio, speaking.prompt_text)


def _context(config: EvaluateConfig, test_list: TestList, digest: str | None) -> dict[str, Any]:
    """Facts on the list, the model and this machine, for the report; ``digest`` as ``_source_digest``.

    The machine is no part of what a continued run has to share, so a report names the one that wrote it; rows of synthesis name theirs.
    """
    testset = {key: value for key, value in asdict(config.testset).items() if key != "path"}
    model = {"model": None if config.model is None else str(config.model)}
    if config.kind != "wavs":
        model["weights_sha256"] = None if digest is None else digest[:DIGEST_DIGITS]
    listed = {"testset": str(test_list.source), **testset, "left_out": test_list.left_out}
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    machine = {"cpu": cpu_name(), "cpus": os.cpu_count(), "gpus": gpus, "commit": checkout_commit()}
    return {**config.context, **model, **listed, **machine}


def _source_digest(config: EvaluateConfig) -> str | None:
    """The digest of the wavs or weights that are scored, fetched or converted where their name asks for it; None for no folder."""
    if config.kind == "wavs":
        assert config.wavs is not None
        return audio_digest(config.wavs)
    assert config.model is not None
    folder = resolve_weights(config.model) if config.kind == "synthesis" else weight_folder(config.model)
    return weights_digest(folder) if folder.is_dir() else None


def _facts(config: EvaluateConfig, test_list: TestList, metrics: Sequence[MetricCard], digest: str | None) -> dict[str, Any]:
    """All that decides the row of an item; ``digest`` as ``_source_digest``."""
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in SUMMARY_KEYS}
    settings |= {"reconstruction": asdict(config.reconstruction), "synthesis": asdict(config.synthesis)}
    items = [{key: value for key, value in asdict(item).items() if key != "loader"} for item in test_list.items]
    described = {metric.name: dict(metric.describe()) for metric in metrics}
    scored = {"score_recordings": config.score_recordings, "metrics": described}
    scored["numbers"] = [rule.name for metric in metrics for rule in [*metric.aggregates, *twin_rules(metric)]]
    return {"settings": settings, **scored, "items": items, "source": digest, "versions": versions()}


def weights_digest(folder: str | Path) -> str:
    """SHA-256 (hex) of the names and contents of the files of a weight folder that its speech depends on.

    They are config.json, configuration and tensors of each part, the tokenizer, and the default voice. Read-mes, licences, other voices,
    stored 8-bit weights and whatever else lies there change nothing. UserError for a folder without any part, and for an index of shards
    that is none.
    """
    root = Path(folder)
    files = [root / CONFIG_NAME, *(root / TOKENIZER_FOLDER / name for name in (TOKENIZER_NAME, PHONEMES_NAME))]
    lacking: list[UserError] = []
    for part in PART_NAMES:
        try:
            place = part_folder(root, part)
        except UserError as error:  # a Flow-VAE alone is enough for reconstruction
            lacking.append(error)
            continue
        files += [place / CONFIG_NAME, *weight_files(place)]
    if len(lacking) == len(PART_NAMES):
        raise lacking[0]
    voice = read_json(root / CONFIG_NAME).get("voice") if (root / CONFIG_NAME).is_file() else None
    files += [root / VOICES_FOLDER / f"{voice}{VOICE_SUFFIX}"] if isinstance(voice, str) else []
    return _digest(root, files)


def audio_digest(folder: str | Path) -> str:
    """SHA-256 (hex) of the names and contents of all files of audio under ``folder``."""
    return _digest(Path(folder), [path for path in Path(folder).rglob("*") if path.suffix.lower() in WAV_SUFFIXES])


def _digest(root: Path, files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted({path for path in files if path.is_file()}):
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(root).as_posix()} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()

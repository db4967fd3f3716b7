"""The three protocols: reconstructions through the Flow-VAE, texts that are spoken, and a folder of any wavs."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from kalle.audio import Audio, load_mono, resample, write_audio
from kalle.checkpoint import device_name
from kalle.data.shared_work import RankJournals
from kalle.errors import UserError
from kalle.evaluation.comparison import read_run
from kalle.evaluation.figures import FigureRow
from kalle.evaluation.intelligibility import JUDGED
from kalle.evaluation.metrics import RATE_HZ, Aggregate, Metric, ScoreItem
from kalle.evaluation.pool import MetricCard, ScoringPool, as_pool, card, twin_rules
from kalle.evaluation.report import Result, Settings, finish, versions
from kalle.evaluation.scoring import DIGEST, Row, Scores, counted, score_items
from kalle.evaluation.test_list import LONGEST_RECORDING_S, TestItem, read_scored
from kalle.files import is_file
from kalle.gaussian import DiagGaussian
from kalle.losses.latent import latent_health
from kalle.models.flowvae import FlowVAE
from kalle.seeds import item_seed
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.options import GenerationOptions
from kalle.synthesis.speech import Speech
from kalle.synthesis.voice import Voice

RECORDING_SYSTEM, SYNTHESIS_SYSTEM, WAVS_SYSTEM = "recording", "synthesis", "wavs"
MEAN_SYSTEM, SAMPLE_SYSTEM = "reconstruction", "reconstruction_sample"
Prompts = Literal["none", "list", "speaker"]
HEALTH_ITEMS = 200
"""Posteriors of this many items are kept for the latent health, so that memory does not grow with the list."""
EARLY_STOP_RATIO = 0.5
"""A synthesis that ended by itself in less than this share of the recording's time counts as stopped early."""
WAV_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")


@dataclass(frozen=True)
class References:
    """Audio at 16 kHz, mono float32 (S,); None where the list has none or it could not be read."""

    recording: Audio | None
    speaker: Audio | None

    def score_item(self, item: TestItem, audio: Audio, aligned: bool = False, rate_hz: int = RATE_HZ) -> ScoreItem:
        """``audio``, made at ``rate_hz``, with these references, for the metrics."""
        return ScoreItem(item.id, audio, item.text, item.language, self.recording, aligned, self.speaker, rate_hz)


def read_references(scores: Scores, item: TestItem, voice: TestItem | None, score_recording: bool) -> References:
    """Read the recording and the voice's recording of ``item``, and score the recording itself as the ceiling where that is configured.

    The voice is the item's prompt, else the recording of ``voice``. A file that is missing or unreadable becomes an error row of
    the system "recording", and its reference None.
    """
    speaker = None
    recording, stored_hz = None, RATE_HZ
    try:
        speaker = item.prompt_audio(RATE_HZ) if item.prompt_path is not None else voice.audio(RATE_HZ) if voice is not None else None
        if item.audio_path is not None:
            recording, stored_hz = item.recording(RATE_HZ)
    except UserError as error:
        scores.fail(RECORDING_SYSTEM, item, error)
        return References(None, speaker)
    references = References(recording, speaker)
    if recording is not None and score_recording:
        scored = ScoreItem(item.id, recording, item.text, item.language, speaker=speaker, rate_hz=stored_hz)
        scores.add_recording(RECORDING_SYSTEM, scored)
    return references


def known_recordings(result: str | Path | None, metrics: Sequence[Metric | MetricCard]) -> dict[str, Row]:
    """The rows of the recordings in an earlier ``result``, by their digest; they hold what ``metrics`` would measure again.

    UserError where that result was measured by other metrics or versions, or lacks a number of these, and as ``read_run``.
    """
    if result is None:
        return {}
    run = read_run(result, RECORDING_SYSTEM)
    told = {metric.name: dict(card(metric).describe()) for metric in metrics}
    now = {"metrics": json.loads(json.dumps(told, default=str)), "versions": versions()}
    other = [f"{name} ({run.data.get(name)}, {value})" for name, value in now.items() if run.data.get(name) != value]
    rules = [rule.name for metric in metrics for rule in [*metric.aggregates, *twin_rules(metric)]]
    lacking = [name for name in rules if name not in run.data["columns"]]
    other += [f"numbers that it lacks ({', '.join(lacking)})"] if lacking else []
    if other:
        raise UserError(
            f"recordings: '{result}' was scored otherwise: it differs in {'; '.join(other)}; leave recordings out, or score it again"
        )
    rows = [
        {key: value for key, value in row.items() if key not in JUDGED} for row in run.rows if not {"error", "metric_errors"} & row.keys()
    ]
    return {row[DIGEST]: row for row in rows if DIGEST in row}


def figure_rows(items: Sequence[TestItem], rows: Sequence[Row], folder: Path, limit: int) -> list[FigureRow]:
    """The first ``limit`` items that have a wav under ``folder``, each with its recording (where there is one) and the systems' audio.

    Read from disk, for another process may have made them. Of an item that was spoken several times the first is shown.
    """
    wavs: dict[str, dict[str, Path]] = {}
    for row in rows:
        if row.get("wav") is not None:
            wavs.setdefault(row["id"], {}).setdefault(row["system"], folder / row["wav"])
    shown = [item for item in items if item.id in wavs][:limit]
    return [
        FigureRow(item.text, {**_recording(item), **{system: read_scored(path, RATE_HZ)[0] for system, path in wavs[item.id].items()}})
        for item in shown
    ]


def _recording(item: TestItem) -> dict[str, Audio]:
    try:
        return {} if item.audio_path is None else {RECORDING_SYSTEM: item.audio(RATE_HZ)}
    except UserError:  # its row says so
        return {}


def without_files(items: Sequence[TestItem], prompts: Prompts, wavs: WavFolder | None, reconstruction: bool) -> dict[str, list[TestItem]]:
    """The items that lack a file, each of which gets an error row, by what it is: wav, prompt, recording. None lacks nothing.

    Reconstruction needs a recording of each item and no prompts. Other kinds read whatever the list names, as ``read_references`` does,
    and what ``prompts`` asks for; those that speak nothing pass "none".
    """
    found: dict[str, list[TestItem]] = {"wav": [], "prompt": [], "recording": []}
    for item, other in zip(items, other_recordings(items), strict=True):
        has_prompt = prompts != "list" if item.prompt_path is None else is_file(item.prompt_path)
        if prompts == "speaker":
            has_prompt = has_prompt and other is not None and _has_recording(other)
        elif item.prompt_path is None and other is not None:  # what the speech is compared with
            has_prompt = has_prompt and _has_recording(other)
        found["wav"] += [item] if wavs is not None and not wavs.has(item) else []
        found["prompt"] += [item] if not (reconstruction or has_prompt) else []
        found["recording"] += [item] if (reconstruction or item.audio_path is not None) and not _has_recording(item) else []
    return {name: lacking for name, lacking in found.items() if lacking}


def _has_recording(item: TestItem) -> bool:
    return item.audio_path is not None and is_file(item.audio_path)


def other_recordings(items: Sequence[TestItem]) -> list[TestItem | None]:
    """For every item the next one (cyclically) of the same speaker with a recording; None when there is no other.

    Unprompted synthesis and the recordings themselves are then compared with the same utterance, one that neither of them speaks.
    An item without a speaker has none.
    """
    by_speaker: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        if item.speaker is not None and item.audio_path is not None:
            by_speaker.setdefault(item.speaker, []).append(index)
    found: list[TestItem | None] = []
    for index, item in enumerate(items):
        same = [other for other in by_speaker.get(item.speaker or "", []) if other != index]
        following = next((other for other in same if other > index), same[0] if same else None)
        found.append(None if following is None else items[following])
    return found


def evaluate_reconstruction(
    flowvae: FlowVAE,
    items: Sequence[TestItem],
    metrics: Sequence[Metric] | ScoringPool,
    out_dir: str | Path,
    *,
    sample: bool = False,
    seed: int = 0,
    settings: Settings | None = None,
    journal: RankJournals | None = None,
) -> Result:
    """Encode and decode every recording and compare the two, cropped to the shorter.

    Systems: "recording" (the recording itself, for metrics that need no reference: the ceiling of WER), "reconstruction" (the
    posterior's mean decoded) and, with ``sample``, "reconstruction_sample" (one sample, drawn from ``seed`` and the item's index).
    SIM compares with the recording. Writes wavs/SYSTEM/ID.wav and what ``finish`` writes.
    An unreadable recording is an error row; UserError when all are. ``journal`` as in ``score_items``.
    """
    pool = as_pool(metrics)
    settings = settings or Settings()
    scores = Scores(pool.cards, known_recordings(settings.recordings, pool.cards))
    run = _ReconstructionRun(flowvae, scores, Path(out_dir), sample, seed, settings)

    def score(index: int, item: TestItem) -> None:
        with counted(scores, MEAN_SYSTEM, item):
            run.item(index, item)

    score_items(items, scores, pool, journal, score, "reconstruction", settings.progress)
    config = {"sample": sample, "seed": seed, "device": str(next(flowvae.parameters()).device), "torch_threads": torch.get_num_threads()}
    decoded = {row["id"] for row in scores.rows if row["system"] == MEAN_SYSTEM and "error" not in row}
    healthy = [index for index, item in enumerate(items) if item.id in decoded][:HEALTH_ITEMS]
    extra = {"latent_health": run.health(items, healthy)} if healthy else {}
    shown = figure_rows(items, scores.rows, Path(out_dir), settings.figure_items)
    return finish("reconstruction", scores, config, settings, out_dir, shown, extra=extra)


class _ReconstructionRun:
    """The state of one evaluation: scores, and what is kept for the latent health."""

    def __init__(self, flowvae: FlowVAE, scores: Scores, out_dir: Path, sample: bool, seed: int, settings: Settings) -> None:
        self.flowvae, self.scores, self.out_dir, self.sample, self.seed, self.settings = flowvae, scores, out_dir, sample, seed, settings
        self.posteriors: dict[int, tuple[DiagGaussian, Tensor]] = {}

    def item(self, index: int, item: TestItem) -> None:
        rate_hz = self.flowvae.config.sample_rate
        wav, stored_hz = item.recording(rate_hz)
        posterior, decoded = self._reconstruct(wav, index)
        recording = resample(wav, rate_hz, RATE_HZ)
        if self.settings.score_recordings:
            self.scores.add_recording(RECORDING_SYSTEM, ScoreItem(item.id, recording, item.text, item.language, rate_hz=stored_hz))
        systems = {name: resample(audio, rate_hz, RATE_HZ) for name, audio in decoded.items()}
        for name, audio in systems.items():
            path = self.out_dir / "wavs" / name / f"{item.file_stem}.wav"
            write_audio(path, decoded[name], rate_hz)
            scored = ScoreItem(item.id, audio, item.text, item.language, recording, True, recording, rate_hz)
            self.scores.add(name, scored, {"wav": str(path.relative_to(self.out_dir)), "frames": posterior.mean.shape[1]})

    @torch.no_grad()
    def _reconstruct(self, wav: Audio, index: int) -> tuple[DiagGaussian, dict[str, Audio]]:
        weight = next(self.flowvae.parameters())
        posterior, drawn = self._encode(wav, index)
        decoded = {MEAN_SYSTEM: posterior.mean} | ({SAMPLE_SYSTEM: drawn} if self.sample else {})
        if len(self.posteriors) < HEALTH_ITEMS:
            self.posteriors[index] = (DiagGaussian(posterior.mean.float(), posterior.log_std.float()), drawn)
        return posterior, {name: self.flowvae.decode(z.to(weight.dtype))[0].float().cpu().numpy() for name, z in decoded.items()}

    @torch.no_grad()
    def _encode(self, wav: Audio, index: int) -> tuple[DiagGaussian, Tensor]:
        """The posterior (1, T, D) of ``wav`` (S,) and the sample that belongs to item ``index``."""
        weight = next(self.flowvae.parameters())
        hop_length = self.flowvae.config.hop_length
        if len(wav) < hop_length:
            raise UserError(f"too short to encode: got {len(wav)} samples, expected at least one frame of {hop_length}; remove the item")
        posterior = self.flowvae.encode(torch.from_numpy(wav)[None].to(weight.device, weight.dtype))
        return posterior, posterior.sample(generator=torch.Generator().manual_seed(item_seed(self.seed, index)))

    @torch.no_grad()
    def health(self, items: Sequence[TestItem], indices: Sequence[int]) -> dict[str, Any]:
        """``latent_health`` over the frames of the items ``indices``, and quantiles of the posterior's standard deviation.

        What an earlier run or another rank has scored is encoded again.
        """
        kept = [self._posterior(index, items[index]) for index in indices]
        mean, log_std = (torch.cat([getattr(posterior, name)[0] for posterior, _ in kept])[None] for name in ("mean", "log_std"))
        z = torch.cat([drawn[0] for _, drawn in kept])[None]
        posterior = DiagGaussian(mean, log_std)
        # The flow looks along time, so it runs within each utterance.
        weight = next(self.flowvae.parameters())
        z_prior = torch.cat([self.flowvae.to_prior(drawn.to(weight.dtype))[0] for _, drawn in kept])[None]
        values = {name: float(value) for name, value in latent_health(posterior, z, z_prior.float()).items()}
        quantiles = np.quantile(posterior.std.cpu().numpy(), (0.05, 0.5, 0.95))
        return values | dict(zip(("std_p05", "std_p50", "std_p95"), map(float, quantiles), strict=True)) | {"items": len(kept)}

    def _posterior(self, index: int, item: TestItem) -> tuple[DiagGaussian, Tensor]:
        if index in self.posteriors:
            return self.posteriors[index]
        posterior, drawn = self._encode(item.audio(self.flowvae.config.sample_rate), index)
        return DiagGaussian(posterior.mean.float(), posterior.log_std.float()), drawn


SYNTHESIS_RULES = (
    Aggregate("no_end_rate", "no_end", lower_is_better=True),
    Aggregate("rtf", "synthesis_s", "audio_s", lower_is_better=True),
)
RTF_NOTE = "rtf = synthesis wall seconds (text to waveform, voice already made) / seconds of audio, summed over items, one at a time"


def rtf_note(rows: Sequence[Row]) -> str:
    """The formula of ``rtf`` and the hardware it was measured on, which ranks and continued runs need not share."""
    timed = Counter(row["processor"] for row in rows if row.get("processor") is not None)
    names = [name if len(timed) == 1 else f"{name} ({count} rows)" for name, count in timed.items()]
    return RTF_NOTE + (f"; on {', '.join(names)}" if names else "")


@dataclass(frozen=True)
class SpeakingConfig:
    """Options of kind "synthesis"."""

    prompts: Prompts = "none"
    """"none": the model's own or random voice; "list": the prompt of each line (Seed-TTS cloning); "speaker": another utterance of the
    same speaker in the list."""
    seeds: tuple[int, ...] = (0,)
    """Every item is spoken once for each; its own seed follows from it and the item's index."""
    options: GenerationOptions = field(default_factory=GenerationOptions)
    """Everything else; its seed is set for each item."""
    prompt_audio: str | Path | None = None
    """A recording whose voice speaks all items, with prompts "none"."""
    prompt_text: str | None = None
    """The words that are spoken in ``prompt_audio``."""

    def __post_init__(self) -> None:
        if self.prompt_text is not None and self.prompt_audio is None:
            raise UserError("synthesis.prompt_text: got a transcript and no recording, expected synthesis.prompt_audio=FILE too; add it")
        object.__setattr__(self, "seeds", tuple(self.seeds))
        if self.prompts not in get_args(Prompts):
            raise UserError(f"prompts: got '{self.prompts}', expected one of {', '.join(get_args(Prompts))}; correct the configuration")
        if self.options.seed is not None:
            raise UserError(f"options.seed: got {self.options.seed}, expected none here, for every item has a seed of its own; set seeds")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"seeds: got {list(self.seeds)}, expected at least one and none twice; correct the configuration")


def evaluate_synthesis(
    kalle: Kalle,
    items: Sequence[TestItem],
    metrics: Sequence[Metric] | ScoringPool,
    out_dir: str | Path,
    *,
    config: SpeakingConfig | None = None,
    voice: Voice | None = None,
    settings: Settings | None = None,
    journal: RankJournals | None = None,
) -> Result:
    """Speak every text and score it: WER against the text, SIM to the prompt, or to another recording of the speaker when unprompted.

    Systems: "recording" (the ceiling, where the list has recordings) and "synthesis". ``voice`` speaks all items when ``config.prompts`` is
    "none". Beside the metrics: stop reasons, no-end rate (ran into the length cap), early-stop rate, RTF. Writes wavs/synthesis/ID.wav
    and what ``finish`` writes. A text that cannot be spoken with one seed is an error row of that seed, and a prompt that is missing one of
    each seed; UserError when all items fail. ``journal`` as in ``score_items``.
    """
    pool = as_pool(metrics)
    config, settings = config or SpeakingConfig(), settings or Settings()
    scores = Scores(pool.cards, known_recordings(settings.recordings, pool.cards))
    if voice is not None and config.prompts != "none":
        raise UserError(f"a voice and prompts={config.prompts}: got both, expected one; use prompts=none with a voice")
    run = _SynthesisRun(kalle, scores, Path(out_dir), config, voice, settings)
    others = other_recordings(items)
    score_items(items, scores, pool, journal, lambda index, item: run.item(index, item, others[index]), SYNTHESIS_SYSTEM, settings.progress)
    described = {
        **{name: value for name, value in asdict(config).items() if name != "options"},
        "options": asdict(kalle.filled_in(config.options)) | {"seed": None},
        "voice_given": voice is not None,
        "device": str(kalle.device),
        "torch_threads": torch.get_num_threads(),
    }
    shown = figure_rows(items, scores.rows, Path(out_dir), settings.figure_items)
    return finish("synthesis", scores, described, settings, out_dir, shown, SYNTHESIS_RULES, [rtf_note(scores.rows)])


class _SynthesisRun:
    """The state of one evaluation."""

    def __init__(
        self, kalle: Kalle, scores: Scores, out_dir: Path, config: SpeakingConfig, voice: Voice | None, settings: Settings
    ) -> None:
        self.kalle, self.scores, self.out_dir, self.config, self.voice, self.settings = kalle, scores, out_dir, config, voice, settings
        self.processor = device_name(kalle.device)

    def item(self, index: int, item: TestItem, other: TestItem | None) -> None:
        references = read_references(self.scores, item, other, self.settings.score_recordings)
        rows: list[Row] = [{"seed": seed} for seed in self.config.seeds]
        with counted(self.scores, SYNTHESIS_SYSTEM, item, rows):
            voice = self._voice(item, other)
            for row in rows:
                with counted(self.scores, SYNTHESIS_SYSTEM, item, [row]):
                    self._speak(item, references, voice, row["seed"], index)

    def _voice(self, item: TestItem, other: TestItem | None) -> Voice | None:
        if self.config.prompts == "none":
            return self.voice
        if self.config.prompts == "list":
            return self.kalle.voice(item.prompt_audio(self.kalle.sample_rate), item.prompt_text)
        if other is None:
            raise UserError(f"no prompt for '{item.id}': expected another recording of its speaker in the list; use prompts=none or list")
        return self.kalle.voice(other.audio(self.kalle.sample_rate), other.text)

    def _speak(self, item: TestItem, references: References, voice: Voice | None, seed: int, index: int) -> None:
        start_s = time.perf_counter()
        speech = self.kalle.synthesize(item.text, voice, options=self.config.options.changed(seed=item_seed(seed, index)))
        seconds = time.perf_counter() - start_s
        audio = resample(speech.audio, speech.sample_rate, RATE_HZ)
        columns = self._columns(item, speech, references, seed, seconds)
        self.scores.add(SYNTHESIS_SYSTEM, references.score_item(item, audio, rate_hz=speech.sample_rate), columns)

    def _columns(self, item: TestItem, speech: Speech, references: References, seed: int, seconds: float) -> Row:
        columns: dict[str, Any] = {
            "seed": seed,
            "request_seed": speech.seed,
            "frames": speech.frames,
            "synthesis_s": seconds,
            "processor": self.processor,
            "stop_reason": speech.stop_reason,
            "no_end": float(speech.stop_reason != "end"),
            "wav": None,
        }
        if references.recording is not None:
            ratio = speech.seconds / (len(references.recording) / RATE_HZ)
            columns["early_stop"] = float(speech.stop_reason in ("end", "too_short") and ratio < EARLY_STOP_RATIO)
        if len(speech.audio):
            suffix = f".seed{seed}" if len(self.config.seeds) > 1 else ""
            path = self.out_dir / "wavs" / SYNTHESIS_SYSTEM / f"{item.file_stem}{suffix}.wav"
            write_audio(path, speech.audio, speech.sample_rate)
            columns["wav"] = str(path.relative_to(self.out_dir))
        return columns


def evaluate_wavs(
    folder: str | Path,
    items: Sequence[TestItem],
    metrics: Sequence[Metric] | ScoringPool,
    out_dir: str | Path,
    *,
    aligned: bool = False,
    fft: bool = False,
    settings: Settings | None = None,
    journal: RankJournals | None = None,
) -> Result:
    """Score the file of every item below ``folder``, as ``WavFolder`` finds it; ``fft`` resamples as ``read_wav`` says.

    ``aligned`` says that the wavs run in step with the recordings, as a codec's do: STOI, PESQ and log-mel L1 are then measured. Systems:
    "recording" (the ceiling) and "wavs". A wav that is missing is an error row and never silently dropped; UserError when the folder is
    missing or no item could be scored. Writes what ``finish`` writes. ``journal`` as in ``score_items``.
    """
    pool = as_pool(metrics)
    files, settings = WavFolder(folder, items), settings or Settings()
    scores = Scores(pool.cards, known_recordings(settings.recordings, pool.cards))
    files.check()
    others = other_recordings(items)

    def score(index: int, item: TestItem) -> None:
        references = read_references(scores, item, others[index], settings.score_recordings)
        with counted(scores, WAVS_SYSTEM, item):
            path = files.path(item)
            audio, rate_hz = read_wav(path, fft)
            scores.add(WAVS_SYSTEM, references.score_item(item, audio, aligned, rate_hz), {"wav": str(path)})

    score_items(items, scores, pool, journal, score, WAVS_SYSTEM, settings.progress)
    # Paths of the wavs are as the user gave them, relative to the working directory and not to the results.
    shown = figure_rows(items, scores.rows, Path(), settings.figure_items)
    described = {"folder": str(folder), "aligned": aligned, "resampling": "fft" if fft else "soxr"}
    return finish("wavs", scores, described, settings, out_dir, shown, notes=files.notes())


def wav_folder(folder: str | Path) -> Path:
    """``folder``; a UserError when there is none."""
    if not Path(folder).is_dir():
        raise UserError(f"folder of wavs not found: got '{folder}', expected a folder with ID.wav for the list's ids; check the path")
    return Path(folder)


class WavFolder:
    """The audio files below a folder, by the ids of a test list.

    The file of an item is, in this order: its id as a path below the folder (``a/b.wav``), its id with "_" for "/", or the only file
    anywhere below the folder that has the last part of its id as its name, where no other item has that. A suffix of audio in the id is
    not needed and any of ``WAV_SUFFIXES`` will do. UserError for a folder that is not there.
    """

    def __init__(self, folder: str | Path, items: Sequence[TestItem]) -> None:
        self.folder = wav_folder(folder)
        self._items, self._last = items, Counter(_stem(item).name for item in items)
        self._paths: dict[str, Path] = {}
        self._names: dict[str, list[Path]] = {}
        ranks = {suffix: rank for rank, suffix in enumerate(WAV_SUFFIXES)}
        found = [path for path in self.folder.rglob("*") if path.suffix.lower() in ranks and path.is_file()]
        for path in sorted(found, key=lambda path: (ranks[path.suffix.lower()], str(path))):
            stem = path.relative_to(self.folder).with_suffix("").as_posix()
            if self._paths.setdefault(stem, path) == path:
                self._names.setdefault(path.stem, []).append(path)

    def check(self) -> None:
        """UserError where no item has a file."""
        if self._items and not any(self.has(item) for item in self._items):
            self.found(self._items[0])  # names the files where there are several
            wanted, count = f"{self._items[0].file_stem}.wav", len(self._items)
            raise UserError(f"no wav to score: got none of {count} in '{self.folder}', expected files such as {wanted}; check the folder")

    def has(self, item: TestItem) -> bool:
        """Whether there is one file of ``item``: not none, and not several of its name."""
        return self._quietly(item) is not None

    def found(self, item: TestItem) -> Path | None:
        """The file of ``item``; None when there is none. UserError where several have its name."""
        stem = _stem(item)
        path = self._paths.get(stem.as_posix().lstrip("/")) or self._paths.get(item.file_stem)
        if path is not None:
            return path
        same = self._names.get(stem.name, []) if self._last[stem.name] == 1 else []
        if len(same) > 1:
            names = ", ".join(f"'{path.relative_to(self.folder)}'" for path in same[:3])
            raise UserError(
                f"which wav is '{item.id}'? {len(same)} files below '{self.folder}' have its name ({names}); use ids with folders"
            )
        return same[0] if same else None

    def path(self, item: TestItem) -> Path:
        """The file of ``item``; a UserError when there is none."""
        found = self.found(item)
        if found is None:
            wanted = self.folder / f"{item.file_stem}.wav"
            raise UserError(f"wav not found: expected '{wanted}'; synthesise it or remove the line from the list")
        return found

    def notes(self) -> list[str]:
        """How many files belong to no item, where there are any."""
        used = {self._quietly(item) for item in self._items}
        extra = sum(path not in used for path in self._paths.values())
        return [f"{extra} audio files below '{self.folder}' belong to no item of the list and were not scored"] if extra else []

    def _quietly(self, item: TestItem) -> Path | None:
        try:
            return self.found(item)
        except UserError:  # its row says so
            return None


def _stem(item: TestItem) -> PurePosixPath:
    """The id as a path without a suffix of audio; "a.b" is a name, "a.wav" a file."""
    wanted = PurePosixPath(item.id.replace("\\", "/"))
    return wanted.with_suffix("") if wanted.suffix.lower() in WAV_SUFFIXES else wanted


def read_wav(path: Path, fft: bool = False) -> tuple[Audio, int]:
    """Audio to score as mono float32 (S,) at 16 kHz, and the rate in Hz at which it is stored; errors as `read_scored`.

    ``fft``: another rate is resampled by scipy.signal.resample over the whole file, as the Seed-TTS protocol does; else by soxr.
    """
    audio, rate_hz = load_mono(path, LONGEST_RECORDING_S)
    if fft and rate_hz != RATE_HZ:
        from scipy.signal import resample as fft_resample

        return np.asarray(fft_resample(audio, int(len(audio) * RATE_HZ / rate_hz)), dtype=np.float32), rate_hz
    return resample(audio, rate_hz, RATE_HZ), rate_hz

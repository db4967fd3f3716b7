"""Scores synthesis: texts through ``Kalle.synthesize``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from kalle.audio import resample, write_audio
from kalle.data.testlist import TestItem
from kalle.errors import UserError
from kalle.evaluation.journal import Journal, score_items
from kalle.evaluation.metric import RATE_HZ, Aggregate, Metric
from kalle.evaluation.reconstruction import item_seed
from kalle.evaluation.references import References, figure_rows, other_recordings, read_references
from kalle.evaluation.result import Result, Settings, finish
from kalle.evaluation.scoring import Row, Scores, counted
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.speech import Speech
from kalle.synthesis.voice import Voice

SYSTEM = "synthesis"
Prompts = Literal["none", "list", "speaker"]
EARLY_STOP_RATIO = 0.5
"""A synthesis that ended by itself in less than this share of the recording's time counts as stopped early."""
RULES = (
    Aggregate("no_end_rate", "no_end", lower_is_better=True),
    Aggregate("early_stop_rate", "early_stop", lower_is_better=True),
    Aggregate("rtf", "synthesis_s", "audio_s", lower_is_better=True),
)
RTF_NOTE = "rtf = synthesis wall seconds (text to waveform, voice already made) / seconds of audio, summed over items, one at a time"


@dataclass(frozen=True)
class SpeakingConfig:
    """How the texts of a list are spoken."""

    prompts: Prompts = "none"
    """"none": the model's own or random voice; "list": the prompt of each line (Seed-TTS cloning); "speaker": another utterance of the
    same speaker in the list."""
    seeds: tuple[int, ...] = (0,)
    """Every item is spoken once for each; its own seed follows from it and the item's index."""
    temperature: float | None = None
    """None: the weights' own."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", tuple(self.seeds))
        if self.prompts not in get_args(Prompts):
            raise UserError(f"prompts: got '{self.prompts}', expected one of {', '.join(get_args(Prompts))}; correct the configuration")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"seeds: got {list(self.seeds)}, expected at least one and none twice; correct the configuration")


def evaluate_synthesis(
    kalle: Kalle,
    items: Sequence[TestItem],
    metrics: Sequence[Metric],
    out_dir: str | Path,
    *,
    config: SpeakingConfig | None = None,
    voice: Voice | None = None,
    settings: Settings | None = None,
    journal: Journal | None = None,
) -> Result:
    """Speak every text and score it: WER against the text, SIM to the prompt, or to another recording of the speaker when unprompted.

    Systems: "recording" (the ceiling, where the list has recordings) and "synthesis". ``voice`` speaks all items when ``config.prompts`` is
    "none". Beside the metrics: stop reasons, no-end rate (ran into the length cap), early-stop rate, RTF. Writes wavs/synthesis/ID.wav
    and what ``finish`` writes. A prompt that is missing is an error row; UserError when all items fail. ``journal`` as in ``score_items``.
    """
    config, settings, scores = config or SpeakingConfig(), settings or Settings(), Scores(metrics)
    if voice is not None and config.prompts != "none":
        raise UserError(f"a voice and prompts={config.prompts}: got both, expected one; use prompts=none with a voice")
    run = _Run(kalle, scores, Path(out_dir), config, voice, settings)
    others = other_recordings(items)
    score_items(items, scores, journal, lambda index, item: run.item(index, item, others[index]), SYSTEM, settings.progress)
    described = {
        **asdict(config),
        "temperature": kalle.temperature if config.temperature is None else config.temperature,
        "voice_given": voice is not None,
        "device": str(kalle.device),
        "torch_threads": torch.get_num_threads(),
    }
    shown = figure_rows(items, scores.rows, Path(out_dir), settings.figure_items)
    return finish("synthesis", scores, described, settings, out_dir, shown, RULES, [RTF_NOTE])


class _Run:
    """The state of one evaluation."""

    def __init__(
        self, kalle: Kalle, scores: Scores, out_dir: Path, config: SpeakingConfig, voice: Voice | None, settings: Settings
    ) -> None:
        self.kalle, self.scores, self.out_dir, self.config, self.voice, self.settings = kalle, scores, out_dir, config, voice, settings

    def item(self, index: int, item: TestItem, other: TestItem | None) -> None:
        references = read_references(self.scores, item, other, self.settings.score_recordings)
        with counted(self.scores, SYSTEM, item):
            voice = self._voice(item, other)
            for seed in self.config.seeds:
                self._speak(item, references, voice, seed, index)

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
        speech = self.kalle.synthesize(item.text, voice, seed=item_seed(seed, index), temperature=self.config.temperature)
        seconds = time.perf_counter() - start_s
        audio = resample(speech.audio, speech.sample_rate, RATE_HZ)
        self.scores.add(SYSTEM, references.score_item(item, audio), self._columns(item, speech, references, seed, seconds))

    def _columns(self, item: TestItem, speech: Speech, references: References, seed: int, seconds: float) -> Row:
        columns: dict[str, Any] = {
            "seed": seed,
            "request_seed": speech.seed,
            "frames": speech.frames,
            "synthesis_s": seconds,
            "stop_reason": speech.stop_reason,
            "no_end": float(speech.stop_reason != "end"),
            "wav": None,
        }
        if references.recording is not None:
            ratio = speech.seconds / (len(references.recording) / RATE_HZ)
            columns["early_stop"] = float(speech.stop_reason == "end" and ratio < EARLY_STOP_RATIO)
        if len(speech.audio):
            suffix = f".seed{seed}" if len(self.config.seeds) > 1 else ""
            path = self.out_dir / "wavs" / SYSTEM / f"{item.file_stem}{suffix}.wav"
            write_audio(path, speech.audio, speech.sample_rate)
            columns["wav"] = str(path.relative_to(self.out_dir))
        return columns

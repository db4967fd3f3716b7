"""Speech to text with faster-whisper, under decodings that have names."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from kalle.audio import Audio
from kalle.errors import UserError
from kalle.evaluation.asr_models import find_asr_model
from kalle.evaluation.metric import RATE_HZ

WINDOW_SAMPLES = 30 * RATE_HZ
DECODINGS: Mapping[str, int] = {"protocol": 1, "beam5": 5}
"""Beam of each decoding. "protocol" is the Seed-TTS one; both: temperature 0 without fallback, no VAD, no timestamps, one 30 s window."""


class Transcriber(Protocol):
    """Audio to text."""

    def __call__(self, audio: Audio, language: str) -> str:
        """Transcript of mono float32 (S,) at 16 kHz in a two-letter ``language``."""
        ...

    def describe(self) -> Mapping[str, object]:
        """Model, version and settings."""
        ...


class FasterWhisper:
    """A CTranslate2 Whisper.

    ``model``: a folder, the name of a packaged model, or "auto" (see ``find_asr_model``); ``languages`` it must speak.
    ``threads``: CPU threads, 0 for the library's own choice. ``compute_type``: CTranslate2's, "int8" or "float32".
    Audio beyond 30 s is cut off, as the protocol's single window does. UserError for an unknown decoding or a model that
    is missing or does not load.
    """

    def __init__(
        self,
        model: str | Path = "auto",
        decoding: str = "protocol",
        compute_type: str = "int8",
        device: str = "cpu",
        threads: int = 0,
        languages: Iterable[str] = ("en",),
        cache_dir: str | Path | None = None,
    ) -> None:
        if decoding not in DECODINGS:
            raise UserError(f"unknown decoding: got '{decoding}', expected one of {', '.join(DECODINGS)}; correct the configuration")
        if importlib.util.find_spec("faster_whisper") is None:
            raise UserError("WER needs the package faster-whisper; pip install 'kalle-tts[eval]', or leave the metric out")
        from faster_whisper import WhisperModel

        folder = find_asr_model(model, languages, cache_dir)
        self.model_name, self.decoding, self.compute_type = folder.name, decoding, compute_type
        torch_threads = torch.get_num_threads()
        try:
            options: dict[str, Any] = {"device": device, "compute_type": compute_type, "cpu_threads": threads}
            self._model: Any = WhisperModel(str(folder.path), local_files_only=True, **options)
        except (RuntimeError, ValueError, OSError) as error:
            problem = f"speech recogniser '{folder.path}' does not load on {device} as {compute_type}: {_one_line(error)}"
            raise UserError(f"{problem}; choose another device, compute_type or folder") from None
        finally:
            torch.set_num_threads(torch_threads)  # CTranslate2 sets the OpenMP threads of the whole process
        self._model.logger.setLevel(logging.WARNING)  # else a line for every utterance

    def __call__(self, audio: Audio, language: str) -> str:
        """Transcript of mono float32 (S,) at 16 kHz; "" for no samples. UserError for a language the model does not speak."""
        if language != "en" and not self._model.model.is_multilingual:
            raise UserError(f"speech recogniser '{self.model_name}' is English only: got '{language}'; use model=base or a folder")
        if len(audio) == 0:
            return ""
        segments, _ = self._model.transcribe(
            np.ascontiguousarray(audio[:WINDOW_SAMPLES], dtype=np.float32),
            language=language,
            task="transcribe",
            beam_size=DECODINGS[self.decoding],
            temperature=0.0,
            condition_on_previous_text=False,
            without_timestamps=True,
            compression_ratio_threshold=None,
            log_prob_threshold=None,
            no_speech_threshold=None,
            vad_filter=False,
        )
        return "".join(segment.text for segment in segments).strip()

    def describe(self) -> Mapping[str, object]:
        """Model, decoding and versions."""
        packages = ("faster-whisper", "ctranslate2")
        versions = {package: importlib.metadata.version(package) for package in packages}
        return {"model": self.model_name, "decoding": self.decoding, "compute_type": self.compute_type, **versions}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

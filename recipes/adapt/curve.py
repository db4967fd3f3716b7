"""The points of the curve: learn, measure, speak, listen."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kalle.adaptation.adapt import AdaptOptions, adapt, embedding, read_recording
from kalle.audio import Audio, resample
from kalle.evaluation.metrics import RATE_HZ
from kalle.evaluation.similarity import CHECK_TEXTS, SpeakerEmbedder, speaker_embedder
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.speech import Speech
from kalle.synthesis.voice import Voice

logger = logging.getLogger("adapt")
COLUMNS = {
    "kl": "KL, recording",
    "kl_other": "KL, another recording",
    "sim": "SIM to the recording",
    "sim_other": "SIM to another recording",
    "cer": "CER",
    "ended": "ended by itself",
    "seconds": "mean seconds",
}


@dataclass(frozen=True)
class Settings:
    """What is asked for; see ``run.py --help``."""

    model: str
    audio: str
    text: str
    validate: tuple[str, str] | None
    steps: tuple[int, ...]
    rates: Mapping[str, float | None]
    texts: int
    language: str
    asr: str | None
    seed: int
    device: str

    def as_json(self) -> dict[str, Any]:
        """Everything that decides a point; how many there are is not among it."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        return {name: value for name, value in values.items() if name not in ("steps", "device")}


class Curve:
    """Computes the points that ``kept`` lacks; a point is {"MODE STEPS": measured}."""

    def __init__(self, settings: Settings, kept: Mapping[str, Any]) -> None:
        self.settings, self.kept = settings, kept
        self.texts = CHECK_TEXTS[settings.language][: settings.texts]
        self.names = [f"{mode} {steps}" for mode in settings.rates for steps in settings.steps]

    def points(self) -> Iterator[dict[str, Any]]:
        """Each missing point, and first the ceiling: what the speaker's own recordings reach."""
        missing = [name for name in self.names if name not in self.kept["points"]]
        if not missing:
            return
        kalle = Kalle.from_pretrained(self.settings.model, self.settings.device)
        embedder = speaker_embedder("ge2e") if self.texts else None
        if "ceiling" not in self.kept["points"]:
            yield {"ceiling": self._ceiling(kalle, embedder)}
        for name in missing:
            mode, steps = name.split()
            point = self._point(kalle, embedder, mode, int(steps))
            logger.info("%s: %s", name, " ".join(f"{key}={value:.3f}" for key, value in point.items() if value is not None))
            yield {name: point}

    def _point(self, kalle: Kalle, embedder: SpeakerEmbedder | None, mode: str, steps: int) -> dict[str, float | None]:
        settings = self.settings
        options = AdaptOptions(mode=mode, steps=max(steps, 1), lr=settings.rates[mode], seed=settings.seed)  # type: ignore[arg-type]
        validate = [] if settings.validate is None else [settings.validate]
        result = adapt(kalle, settings.audio, settings.text, options=options, validate=validate)
        end = "after" if steps else "before"
        point = {"kl": getattr(result.kl, end), "kl_other": None if result.held_out_kl is None else getattr(result.held_out_kl, end)}
        voice = result.voice if steps else dataclasses.replace(result.voice, adapter=None)
        return point | (self._heard(kalle, embedder, voice) if embedder is not None else {})

    def _heard(self, kalle: Kalle, embedder: SpeakerEmbedder, voice: Voice) -> dict[str, float | None]:
        spoken = [kalle.synthesize(text, voice, seed=self.settings.seed + index) for index, text in enumerate(self.texts)]
        own, other = self._recordings(kalle)
        return {
            "sim": _similarity(embedder, [each.audio for each in spoken], own, kalle.sample_rate),
            "sim_other": None if other is None else _similarity(embedder, [each.audio for each in spoken], other, kalle.sample_rate),
            "cer": None if self.settings.asr is None else self._errors(spoken),
            "ended": float(np.mean([each.stop_reason == "end" for each in spoken])),
            "seconds": float(np.mean([each.seconds for each in spoken])),
        }

    def _recordings(self, kalle: Kalle) -> tuple[Audio, Audio | None]:
        settings = self.settings
        own = read_recording(kalle, settings.audio, settings.text, settings.seed).audio
        return own, None if settings.validate is None else read_recording(kalle, *settings.validate, settings.seed).audio

    def _ceiling(self, kalle: Kalle, embedder: SpeakerEmbedder | None) -> dict[str, float | None]:
        """Similarity of the recording as the decoder says it, and of the other recording, to the recording."""
        if embedder is None:
            return {}
        recording = read_recording(kalle, self.settings.audio, self.settings.text, self.settings.seed)
        said = kalle.flowvae.decode(recording.posterior.mean[None].to(kalle.device))[0].detach().float().cpu().numpy()
        own, other = self._recordings(kalle)
        return {
            "sim_reconstruction": _similarity(embedder, [said], own, kalle.sample_rate),
            "sim_other_recording": None if other is None else _similarity(embedder, [other], own, kalle.sample_rate),
        }

    def _errors(self, spoken: Sequence[Speech]) -> float:
        """Character errors over characters, spaces left out, after the Seed-TTS normalisation."""
        import jiwer

        from kalle.evaluation.asr import FasterWhisper
        from kalle.evaluation.word_errors import normaliser

        language, tokens = self.settings.language, normaliser("seed_tts")
        hear = FasterWhisper(self.settings.asr or "auto", languages=(language,), threads=1)
        heard = [hear(resample(each.audio, each.sample_rate, RATE_HZ), language) for each in spoken]
        pairs = [("".join(tokens(text, language)), "".join(tokens(words, language))) for text, words in zip(self.texts, heard, strict=True)]
        return float(jiwer.cer([text for text, _ in pairs], [words for _, words in pairs]))

    def table(self) -> str:
        """The points that were asked for, in Markdown."""
        points = self.kept["points"]
        shown = [key for key in COLUMNS if any(points[name].get(key) is not None for name in self.names)]
        lines = ["| steps | " + " | ".join(COLUMNS[key] for key in shown) + " |", "|---" * (len(shown) + 1) + "|"]
        lines += [f"| {name} | " + " | ".join(f"{points[name][key]:.3f}" for key in shown) + " |" for name in self.names]
        ceiling = ", ".join(f"{key} {value:.3f}" for key, value in points.get("ceiling", {}).items() if value is not None)
        return "\n".join([*lines, *([f"\nCeiling: {ceiling}."] if ceiling else [])])


def _similarity(embedder: SpeakerEmbedder, audios: Sequence[Audio], recording: Audio, rate_hz: int) -> float:
    """Mean cosine; NaN where nothing has a voice."""
    wanted = embedding(embedder, recording, rate_hz)
    heard = [found for found in (embedding(embedder, audio, rate_hz) for audio in audios) if found is not None]
    return float("nan") if wanted is None or not heard else float(np.mean([found @ wanted for found in heard]))

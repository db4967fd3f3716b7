"""Scores that listen to the audio alone: predicted mean opinion scores, and the emotion that is heard."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kalle.errors import UserError
from kalle.evaluation.asr import funasr_model, funasr_sha256, missing_model, state_sha256
from kalle.evaluation.metrics import RATE_HZ, MetricError, ScoreItem, Value, declared
from kalle.extras import require

LEAST_SAMPLES = RATE_HZ // 10


def audible(name: str, item: ScoreItem) -> torch.Tensor:
    """The audio as (1, S); MetricError for silence or less than 0.1 s."""
    if len(item.audio) < LEAST_SAMPLES or not item.audio.any():
        raise MetricError(f"{name}: no speech to judge in {len(item.audio)} samples")
    return torch.from_numpy(np.ascontiguousarray(item.audio))[None]


class DistillMOS:
    """DistillMOS (Stahl and Gamper, arXiv 2502.05356), whose weights come with the package; 1 to 5."""

    name = "distillmos"
    needs: frozenset[str] = frozenset()
    aggregates = (declared("distillmos"),)

    def __init__(self, device: str = "cpu") -> None:
        require("distillmos", "mos", "the metric distillmos")
        from distillmos import ConvTransformerSQAModel

        self._device = device
        with contextlib.redirect_stdout(io.StringIO()):  # it prints where its weights lie
            self._model: Any = ConvTransformerSQAModel().to(device).eval()

    @torch.no_grad()
    def __call__(self, item: ScoreItem) -> dict[str, Value]:
        """``distillmos``, the mean over windows of 7.7 s. MetricError for silence."""
        return {"distillmos": float(self._model(audible("DistillMOS", item).to(self._device)))}

    def describe(self) -> Mapping[str, object]:
        """Model and the hash of its weights."""
        return {"model": "DistillMOS variant 7", "weights_sha256": state_sha256(self._model)}


class DNSMOS:
    """DNSMOS P.835 (Reddy et al., arXiv 2110.01763) by the package speechmos, which holds the weights; 1 to 5.

    Windows of 9.01 s every second, shorter audio repeated: up to 2 s at the end of longer audio are not heard.
    """

    name = "dnsmos"
    needs: frozenset[str] = frozenset()
    aggregates = (declared("dnsmos_ovrl"), declared("dnsmos_sig"), declared("dnsmos_bak"))

    def __init__(self) -> None:
        for module in ("speechmos", "librosa", "onnxruntime"):
            require(module, "mos", "the metric dnsmos")
        import speechmos

        (folder,) = speechmos.__path__
        weights = Path(folder) / "dnsmos_models" / "sig_bak_ovr.onnx"
        self._sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]

    def __call__(self, item: ScoreItem) -> dict[str, Value]:
        """``dnsmos_ovrl``, ``dnsmos_sig``, ``dnsmos_bak``. MetricError for silence."""
        from speechmos import dnsmos

        audio = np.clip(audible("DNSMOS", item)[0].numpy(), -1, 1)
        found = dnsmos.run(audio, sr=RATE_HZ)
        return {f"dnsmos_{short}": float(found[f"{short}_mos"]) for short in ("ovrl", "sig", "bak")}

    def describe(self) -> Mapping[str, object]:
        """Model and the hash of its weights."""
        return {"model": "DNSMOS P.835", "weights_sha256": self._sha256}


class UTMOS:
    """UTMOS22 strong (Saeki et al., arXiv 2204.02152), one learner, by the package utmos-pytorch; 1 to 5.

    ``weights``: the file of its state (``*.pt``). Each utterance is scored alone, for padding shifts the score.
    """

    name = "utmos"
    needs: frozenset[str] = frozenset()
    aggregates = (declared("utmos"),)

    def __init__(self, weights: str | Path | None = None, device: str = "cpu") -> None:
        get = "python -c 'from utmos_pytorch.utils import download_utmos_ckpt; print(download_utmos_ckpt())'"
        require("utmos_pytorch", "mos", "the metric utmos")
        if weights is None or not Path(weights).is_file():
            raise UserError(f"no weights of UTMOS: got weights={weights}, expected a file; get it with `{get}` and give it as weights=FILE")
        from utmos_pytorch import UTMOSScoreTorch

        self._device = device
        try:
            self._model: Any = UTMOSScoreTorch(str(weights), device)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise missing_model("UTMOS", weights, get, error) from None
        given = torch.load(weights, map_location="cpu", weights_only=True).keys()
        # Weight normalisation is folded in once the file is read, so compare with a model that has none folded.
        from utmos_pytorch.utmos_torch import UTMOSModel

        expected = UTMOSModel().state_dict().keys()
        if given != expected:
            raise UserError(f"not the weights of UTMOS22 strong: '{weights}' {_difference(expected, given)}; get them with `{get}`")

    def __call__(self, item: ScoreItem) -> dict[str, Value]:
        """``utmos``. MetricError for silence."""
        return {"utmos": float(self._model.score(audible("UTMOS", item).to(self._device)))}

    def describe(self) -> Mapping[str, object]:
        """Model and the hash of its weights."""
        return {"model": "UTMOS22 strong", "weights_sha256": state_sha256(self._model)}


def _difference(expected: Any, given: Any) -> str:
    missing, extra = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    return f"lacks {len(missing)} tensors ({', '.join(missing[:3])}) and has {len(extra)} others ({', '.join(extra[:3])})"


EMOTIONS = ("angry", "disgusted", "fearful", "happy", "neutral", "other", "sad", "surprised", "unknown")
"""The nine classes of emotion2vec+, in its order."""


class Emotion2Vec:
    """emotion2vec+ (Ma et al., arXiv 2312.15185) by FunASR: how much each of nine emotions is heard in the audio.

    ``model``: a folder, or an id of FunASR's hub. The intended emotion of an item is the part of its id before the first "_" or "/".
    """

    name = "emotion"
    needs: frozenset[str] = frozenset()
    aggregates = (declared("emotion"),)

    def __init__(self, model: str | Path = "iic/emotion2vec_plus_large", device: str = "cpu", classifier: Any = None) -> None:
        """``classifier`` stands for the model: audio (S,) to a score for each of ``EMOTIONS``."""
        self.model_name = str(model)
        self._classifier = classifier if classifier is not None else _Emotions(model, device)

    def __call__(self, item: ScoreItem) -> dict[str, Value]:
        """``emotion`` (the score of the intended one), ``emotion_heard`` (the highest) and ``emotion_NAME`` for each of the nine."""
        scores = dict(zip(EMOTIONS, self._classifier(audible("emotion2vec", item)[0].numpy()), strict=True))
        columns: dict[str, Value] = {f"emotion_{name}": float(score) for name, score in scores.items()}
        columns["emotion_heard"] = max(scores, key=lambda name: float(scores[name]))
        intended = intended_emotion(item.id)
        if intended is None:
            raise MetricError(f"emotion: the id '{item.id}' begins with none of {', '.join(EMOTIONS)}", columns)
        return columns | {"emotion": float(scores[intended])}

    def describe(self) -> Mapping[str, object]:
        """Model, the hash of its weights, and classes; of a ``classifier`` that was given the hash is its ``weights_sha256``, if any."""
        weights = getattr(self._classifier, "weights_sha256", None)
        stated = {} if weights is None else {"weights_sha256": weights}
        return {"model": self.model_name, **stated, "classes": list(EMOTIONS)}


class _Emotions:
    """FunASR's classifier as a function."""

    def __init__(self, model: str | Path, device: str) -> None:
        self._model = funasr_model("emotion classifier", model, device)
        self.weights_sha256 = funasr_sha256(self._model).get("weights_sha256")

    def __call__(self, audio: Any) -> list[float]:
        (result,) = self._model.generate(audio, granularity="utterance", extract_embedding=False)
        named = {_english(label): float(score) for label, score in zip(result["labels"], result["scores"], strict=True)}
        return [named[name] for name in EMOTIONS]


def _english(label: str) -> str:
    """ "生气/angry" as "angry", "<unk>" as "unknown"."""
    name = label.rsplit("/", 1)[-1]
    return "unknown" if name == "<unk>" else name


def intended_emotion(identifier: str) -> str | None:
    """The emotion that an id begins with ("sad_03", "sad/03"), one of ``EMOTIONS``; None for another."""
    first = identifier.replace("/", "_").split("_")[0]
    return first if first in EMOTIONS else None


def emotion_matrix(rows: Sequence[Mapping[str, Any]], shown: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Mean scores (heard, intended) of the emotions ``shown``, each column summing to 1, and counts of the highest score.

    Rows are those of ``Emotion2Vec``. A column without items is 0. UserError when no row has scores.
    """
    means, counts = np.zeros((len(shown), len(shown))), np.zeros((len(shown), len(shown)), dtype=np.int64)
    items = np.zeros(len(shown))
    for row in rows:
        intended = intended_emotion(str(row["id"]))
        if intended not in shown or f"emotion_{intended}" not in row:
            continue
        column = shown.index(intended)
        scores = np.array([row[f"emotion_{name}"] for name in shown], dtype=np.float64)
        means[:, column] += scores / max(scores.sum(), 1e-12)
        counts[int(scores.argmax()), column] += 1
        items[column] += 1
    if not items.any():
        raise UserError("no emotions: got rows without scores, expected those of an evaluation with the metric emotion; score again")
    return means / np.maximum(items, 1), counts

"""Speaker similarity: cosines between speaker embeddings of whole utterances, of one item and of one voice over many texts."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kalle.audio import Audio, resample, rms_dbfs
from kalle.errors import UserError
from kalle.evaluation.asr import pretrained, state_sha256
from kalle.evaluation.metrics import RATE_HZ, SPEAKER, MetricError, ScoreItem, Value, declared
from kalle.extras import require
from kalle.progress import progress_bar
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.voice import Voice

LEVEL_DBFS = -30.0
MIN_SAMPLES = RATE_HZ // 10
REMEMBERED = 64
"""Embeddings that ``Similarity`` keeps."""


class SpeakerEmbedder(Protocol):
    """Audio to a vector that stands for the voice."""

    def __call__(self, audio: Audio) -> NDArray[np.float32]:
        """Embedding (E,) of mono float32 (S,) at 16 kHz."""
        ...

    def describe(self) -> Mapping[str, object]:
        """Model and version."""
        ...


class GE2E:
    """Resemblyzer's GE2E encoder (Wan et al., arXiv 1710.10467), whose weights come with the package.

    Its input is a linear mel spectrogram, so loudness matters: audio is scaled to -30 dBFS first. Resemblyzer's own
    preprocessing, which also cuts silences with a voice detector, is not applied: whole utterances are compared.
    """

    def __init__(self, device: str = "cpu") -> None:
        require("resemblyzer", "eval", "speaker similarity with ge2e (metrics.sim)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated imports inside resemblyzer and webrtcvad
            from resemblyzer import VoiceEncoder

        from torchaudio.transforms import MelSpectrogram

        self._encoder = VoiceEncoder(device, verbose=False)
        options: dict[str, Any] = {"n_fft": 400, "hop_length": 160, "n_mels": 40, "pad_mode": "constant"}
        self._mel = MelSpectrogram(RATE_HZ, mel_scale="slaney", norm="slaney", **options)

    @torch.no_grad()
    def __call__(self, audio: Audio) -> NDArray[np.float32]:
        """Embedding (256,) of unit length. MetricError for silence or less than 0.1 s.

        What ``embed_utterance`` gives, with torchaudio's mel spectrogram for librosa's, which takes seconds to load.
        """
        level = rms_dbfs(audio) if len(audio) >= MIN_SAMPLES else float("-inf")
        if not np.isfinite(level):
            raise MetricError(f"no voice to embed: {len(audio)} samples, {level} dBFS")
        waves, mels = self._encoder.compute_partial_slices(len(audio), rate=1.3, min_coverage=0.75)
        wav = torch.from_numpy(audio * np.float32(10 ** ((LEVEL_DBFS - level) / 20)))
        wav = torch.nn.functional.pad(wav, (0, max(0, waves[-1].stop - len(audio))))
        mel = self._mel(wav).T
        partial = self._encoder(torch.stack([mel[part] for part in mels]).to(self._encoder.device)).mean(dim=0)
        return np.asarray((partial / partial.norm()).cpu(), dtype=np.float32)

    def describe(self) -> Mapping[str, object]:
        """Model, the hash of its weights and version."""
        return {"model": "ge2e", "weights_sha256": state_sha256(self._encoder), "Resemblyzer": importlib.metadata.version("Resemblyzer")}


class XVector:
    """A speaker network of transformers with an x-vector head, such as microsoft/wavlm-base-plus-sv, by folder or hub id."""

    def __init__(self, checkpoint: str | Path = "microsoft/wavlm-base-plus-sv", device: str = "cpu") -> None:
        require("transformers", "eval", "speaker similarity with xvector (metrics.sim)")
        from transformers import AutoFeatureExtractor, AutoModelForAudioXVector

        self.name, self._device = str(checkpoint), device
        self._features: Any = pretrained("speaker model", AutoFeatureExtractor, checkpoint)
        self._model: Any = pretrained("speaker model", AutoModelForAudioXVector, checkpoint, dtype=torch.float32).to(device).eval()

    @torch.no_grad()
    def __call__(self, audio: Audio) -> NDArray[np.float32]:
        """Embedding (E,) of mono float32 (S,) at 16 kHz. MetricError for silence or less than 0.1 s."""
        if len(audio) < MIN_SAMPLES or not audio.any():
            raise MetricError(f"no voice to embed in {len(audio)} samples")
        inputs = self._features(audio, sampling_rate=RATE_HZ, return_tensors="pt").input_values.to(self._device)
        return np.asarray(self._model(inputs).embeddings[0].cpu(), dtype=np.float32)

    def describe(self) -> Mapping[str, object]:
        """Model, the hash of its weights and version."""
        version = importlib.metadata.version("transformers")
        return {"model": f"xvector {self.name}", "weights_sha256": state_sha256(self._model), "transformers": version}


def _wavlm(checkpoint: str | Path | None, device: str) -> SpeakerEmbedder:
    from kalle.evaluation.wavlm_sv import GET, WavLMSpeaker

    if checkpoint is None:
        raise UserError(
            f"speaker similarity 'wavlm' needs metrics.sim.checkpoint=FILE, the network of the Seed-TTS protocol: get it from {GET}"
        )
    return WavLMSpeaker(checkpoint, device)


EMBEDDERS: Mapping[str, tuple[Callable[[str | Path | None, str], SpeakerEmbedder], str]] = {
    "ge2e": (lambda checkpoint, device: GE2E(device), "package Resemblyzer, which holds the weights"),
    "wavlm": (_wavlm, "the Seed-TTS protocol's network, from checkpoint=FILE"),
    "xvector": (lambda checkpoint, device: XVector(checkpoint or "microsoft/wavlm-base-plus-sv", device), "checkpoint=FOLDER or hub id"),
}
"""Speaker networks by name, and where their weights come from."""


def speaker_embedder(model: str, device: str = "cpu", checkpoint: str | Path | None = None) -> SpeakerEmbedder:
    """The embedder called ``model``; a UserError names the models there are and what a missing one would need."""
    if model not in EMBEDDERS:
        known = "; ".join(f"{name} ({source})" for name, (_, source) in EMBEDDERS.items())
        raise UserError(f"unknown speaker model: got '{model}', expected one of {known}; correct the configuration")
    return EMBEDDERS[model][0](checkpoint, device)


class Similarity:
    """Cosine between the embeddings of the audio and of its prompt (or another recording of the speaker), mean over items.

    What was embedded lately is not embedded again: a recording is scored itself and is the reference of others.
    """

    name = "sim"
    needs = frozenset({SPEAKER})
    aggregates = (declared("sim"),)

    def __init__(
        self, model: str = "ge2e", embedder: SpeakerEmbedder | None = None, device: str = "cpu", checkpoint: str | Path | None = None
    ) -> None:
        """``embedder``, else the one that ``speaker_embedder`` makes of the rest."""
        self.embedder = embedder if embedder is not None else speaker_embedder(model, device, checkpoint)
        self._known: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()

    def _embedding(self, audio: Audio) -> NDArray[np.float32]:
        key = hashlib.sha1(np.ascontiguousarray(audio).tobytes(), usedforsecurity=False).digest()
        if key not in self._known:
            self._known[key] = self.embedder(audio)
        self._known.move_to_end(key)
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return self._known[key]

    def __call__(self, item: ScoreItem) -> dict[str, Value]:
        """``sim`` in [-1, 1]."""
        assert item.speaker is not None, f"'{item.id}' has no speaker reference"
        one, other = self._embedding(item.speaker), self._embedding(item.audio)
        return {"sim": float(np.dot(one, other) / (np.linalg.norm(one) * np.linalg.norm(other)))}

    def describe(self) -> Mapping[str, object]:
        """Name the embedder, for the report."""
        return self.embedder.describe()


CHECK_TEXTS: Mapping[str, tuple[str, ...]] = {
    "en": (
        "Thank you for calling, please hold the line.",
        "The train to the coast leaves at half past nine.",
        "She put the letters back into the wooden box.",
        "Nobody had expected the river to rise so quickly.",
        "We bought bread, cheese and a bottle of milk.",
        "His answer was shorter than the question.",
        "Turn left at the bridge and walk along the canal.",
        "The museum is closed on the first day of the week.",
        "A small dog slept under the kitchen table.",
        "They painted the old door a bright shade of green.",
        "Please enter your number, followed by the pound key.",
        "The children were singing when the lights went out.",
        "Most of the seats in the hall were already taken.",
        "It rained for three days and then the sun came back.",
        "My grandfather repaired clocks for fifty years.",
        "There is a letter for you on the desk.",
        "The ship had left the harbour before midnight.",
        "He carried the heavy basket up the stairs.",
        "Our neighbours grow tomatoes behind the house.",
        "The last bus was late again this evening.",
    ),
    "zh": (
        "感谢您的来电，请稍候。",
        "去海边的火车九点半出发。",
        "她把信放回了木盒子里。",
        "没有人想到河水涨得这么快。",
        "我们买了面包、奶酪和一瓶牛奶。",
        "他的回答比问题还短。",
        "在桥边左转，然后沿着运河走。",
        "博物馆每周的第一天闭馆。",
        "一只小狗睡在厨房的桌子下面。",
        "他们把旧门漆成了明亮的绿色。",
        "请输入您的号码，然后按井号键。",
        "灯灭的时候，孩子们正在唱歌。",
        "大厅里的座位大多已经有人了。",
        "雨下了三天，然后太阳又出来了。",
        "我的爷爷修了五十年的钟表。",
        "桌子上有一封给你的信。",
        "轮船在午夜之前已经离开了港口。",
        "他提着沉重的篮子上了楼梯。",
        "我们的邻居在屋后种西红柿。",
        "今天晚上最后一班公共汽车又晚点了。",
    ),
}
"""Texts that a voice is checked with, by language."""


@dataclass(frozen=True)
class VoiceSimilarity:
    """Cosines in [-1, 1] between embeddings of whole utterances. N texts that gave audio."""

    among: float
    """Mean over all pairs of the N results; NaN for fewer than two."""
    among_lowest: float
    """The lowest of those pairs."""
    to_prompt: float | None
    """Mean over the results of the cosine to the voice's prompt as the decoder says it; None for a voice without a prompt, NaN where that
    gives no usable audio."""
    to_others: Mapping[str, float]
    """The contrast: mean over all pairs of a result and one of another voice's, by its name; compare it with ``among``."""
    texts: int
    """N."""
    failed: int
    """Texts that gave silence or less than a tenth of a second."""
    stop_reasons: Mapping[str, int]
    embedder: Mapping[str, object]


@dataclass(frozen=True)
class _Spoken:
    embeddings: NDArray[np.float64]
    """(N, E), unit length."""
    failed: int
    stop_reasons: dict[str, int]


def check_texts(language: str | None, count: int) -> tuple[str, ...]:
    """The first ``count`` texts for ``language``; a UserError for a count there is not."""
    texts = CHECK_TEXTS.get(language or "en", CHECK_TEXTS["en"])
    if not 2 <= count <= len(texts):
        raise UserError(f"bad number of texts: got {count}, expected 2 to {len(texts)}; change it")
    return texts[:count]


def voice_similarity(
    kalle: Kalle,
    voice: Voice,
    embedder: SpeakerEmbedder,
    *,
    texts: Sequence[str] | None = None,
    others: Mapping[str, Voice] | None = None,
    seed: int = 0,
    temperature: float | None = None,
    progress: bool = True,
) -> VoiceSimilarity:
    """Speak each text in ``voice`` with a seed of its own (``seed`` + index) and compare the results' voices.

    ``others`` speak the same texts, for contrast: without it a high number might only say that the embedder hears everything
    alike. ``texts`` defaults to all of ``CHECK_TEXTS`` in the voice's language. UserError when no text gave a voice.
    """
    chosen = tuple(texts) if texts is not None else CHECK_TEXTS.get(voice.language or "en", CHECK_TEXTS["en"])
    with progress_bar(progress) as bar:
        spoken = _speak(kalle, voice, embedder, bar.track(list(enumerate(chosen)), description="voice"), seed, temperature)
        contrast = {
            name: _speak(kalle, other, embedder, bar.track(list(enumerate(chosen)), description=name), seed, temperature)
            for name, other in (others or {}).items()
        }
    if not len(spoken.embeddings):
        raise UserError(f"no voice to compare: got silence or nothing from all {len(chosen)} texts; check the model with `kalle say`")
    pairs = (spoken.embeddings @ spoken.embeddings.T)[np.triu_indices(len(spoken.embeddings), 1)]
    return VoiceSimilarity(
        among=float(pairs.mean()) if len(pairs) else float("nan"),
        among_lowest=float(pairs.min()) if len(pairs) else float("nan"),
        to_prompt=_to_prompt(kalle, voice, embedder, spoken),
        to_others={name: _across(spoken, other) for name, other in contrast.items()},
        texts=len(spoken.embeddings),
        failed=spoken.failed,
        stop_reasons=spoken.stop_reasons,
        embedder=embedder.describe(),
    )


@torch.no_grad()
def prompt_audio(kalle: Kalle, voice: Voice) -> Audio | None:
    """The prompt of ``voice`` as the decoder says it, (S,); None where there is no prompt."""
    if voice.prompt_latents is None:
        return None
    weight = next(kalle.flowvae.parameters())
    return kalle.flowvae.decode(voice.prompt_latents[None].to(weight.device, weight.dtype))[0].float().cpu().numpy()


def _speak(
    kalle: Kalle, voice: Voice, embedder: SpeakerEmbedder, texts: Iterable[tuple[int, str]], seed: int, temperature: float | None
) -> _Spoken:
    embeddings, failed, reasons = [], 0, dict[str, int]()
    for index, text in texts:
        speech = kalle.synthesize(text, voice, seed=seed + index, temperature=temperature)
        reasons[speech.stop_reason] = reasons.get(speech.stop_reason, 0) + 1
        try:
            embeddings.append(_embed(embedder, speech.audio, speech.sample_rate))
        except MetricError:
            failed += 1
    return _Spoken(np.stack(embeddings) if embeddings else np.zeros((0, 1)), failed, reasons)


def _embed(embedder: SpeakerEmbedder, audio: Audio, rate_hz: int) -> NDArray[np.float64]:
    embedding = np.asarray(embedder(resample(audio, rate_hz, RATE_HZ)), dtype=np.float64)
    return embedding / np.linalg.norm(embedding)


def _to_prompt(kalle: Kalle, voice: Voice, embedder: SpeakerEmbedder, spoken: _Spoken) -> float | None:
    prompt = prompt_audio(kalle, voice)
    if prompt is None:
        return None
    try:
        return float((spoken.embeddings @ _embed(embedder, prompt, kalle.sample_rate)).mean())
    except MetricError:  # a prompt of silence has no voice
        return float("nan")


def _across(spoken: _Spoken, other: _Spoken) -> float:
    """Mean cosine of all pairs of a result and one of another voice's; NaN when that gave nothing."""
    return float((spoken.embeddings @ other.embeddings.T).mean()) if len(other.embeddings) else float("nan")

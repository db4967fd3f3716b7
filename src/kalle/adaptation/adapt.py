"""Test-time training of one voice: from a recording to an adapter, in a few hundred steps on a model that shares the memory of another."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from kalle.audio import Audio, resample
from kalle.checkpoint import check_fields
from kalle.errors import UserError
from kalle.evaluation.metrics import RATE_HZ, MetricError
from kalle.evaluation.similarity import SpeakerEmbedder
from kalle.gaussian import DiagGaussian
from kalle.losses.latent import Direction, directed_kl
from kalle.models.lm import KalleLM
from kalle.models.lora import linear_layers, low_rank_layers, new_factors, with_low_rank, with_weights
from kalle.seeds import purpose_seed
from kalle.synthesis.adapter import LORA_A, LORA_B, SPEAKER_PARTS, Adapter
from kalle.synthesis.generate import Request
from kalle.synthesis.options import GenerationOptions, SpeechRequest, check_seed
from kalle.synthesis.release_compat import OURS, ReleaseCompatibility
from kalle.synthesis.voice import Voice
from kalle.synthesis.voicing import prompt_posterior, prompt_samples, voice_of_samples
from kalle.text.tokenizer import prompt_ids

if TYPE_CHECKING:
    from kalle.evaluation.similarity import SpeakerEmbedder
    from kalle.models.lm import KalleLM
    from kalle.synthesis.kalle import Kalle


@dataclass(frozen=True, eq=False)
class Recording:
    """One utterance of the speaker and its transcript. S samples, T frames of D dimensions."""

    audio: Audio
    """(S,) at the model's rate."""
    posterior: DiagGaussian
    """(T, D), the Flow-VAE's."""
    voice: Voice
    """The voice that ``Kalle.voice`` makes of it."""


@dataclass(frozen=True, eq=False)
class PromptSequence:
    """The input and the targets of the language model for a recording: L ids, T frames of D dimensions, width H."""

    text_ids: Tensor
    """(L,) int64"""
    posterior: DiagGaussian
    """(T, D): the frames that the model reads of the prompt."""
    speaker_latent: Tensor | None
    """(H,)"""

    def loss(self, lm: KalleLM, noise: Tensor, direction: Direction) -> Tensor:
        """Mean KL over the prompt's frames, in nats per dimension; the end that the model predicts after them has no part in it.

        ``noise`` (T, D) draws the frames that the model reads. ``lm`` may carry gradients.
        """
        device = lm.device
        posterior = self.posterior.to(device)
        z = posterior.sample(noise)
        speaker = None if self.speaker_latent is None else self.speaker_latent.to(device)[None]
        prediction = lm.predict_all(self.text_ids.to(device)[None], z[None], speaker)
        return directed_kl(prediction[0, :-1], posterior, direction).mean()

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of the noise that ``loss`` wants."""
        return tuple(self.posterior.mean.shape)


def read_recording(
    kalle: Kalle, audio: str | Path | NDArray[np.floating], text: str, seed: int, language: str | None = None, rate_hz: int | None = None
) -> Recording:
    """Read ``audio`` with its transcript ``text`` as ``Kalle.voice`` does, doubts in the log included; UserError as there."""
    if not isinstance(text, str):
        raise UserError("a recording without its transcript: got no text, expected the words that are spoken in it; give (text)")
    samples = prompt_samples(kalle, audio, text, rate_hz)
    voice = voice_of_samples(kalle, samples, text, seed=seed, language=language)
    return Recording(samples, prompt_posterior(kalle, torch.from_numpy(samples)), voice)


def prompt_sequence(
    kalle: Kalle, recording: Recording, target_text: str | None = None, compatibility: ReleaseCompatibility = OURS
) -> PromptSequence:
    """The sequence of a request in which ``recording`` prompts ``target_text``; without one, the transcript is all there is to read.

    The ids, the speaker latent and the choice of the frames that are read come from the code that resolves requests, ``compatibility``
    (tokenise_separately, drop_last_prompt_frame) included. UserError for what could not be spoken, or no frame to learn from.
    """
    voice, options = recording.voice, GenerationOptions(seed=0, by_sentences=False, compatibility=compatibility)
    if target_text is not None:
        request = kalle.resolve(SpeechRequest(target_text, voice, options))
    else:
        assert voice.text is not None
        ids = prompt_ids(kalle.tokenizer, kalle.config.transcript(voice.text), tokenise_separately=compatibility.tokenise_separately)
        request = Request(ids, 1, options, voice.prompt_latents, voice.speaker_latent)
    heard = request.context[1]
    frames = 0 if heard is None else heard.shape[1]
    used, limit = len(request.text_ids) + frames + 1, int(kalle.lm.backbone.config.max_position_embeddings)
    if not frames:
        raise UserError("nothing to learn from: the recording has no frame besides the one that is left out; give a longer one")
    if used > limit:
        raise UserError(f"the recording is too long: with its text it takes {used} positions, the model reads {limit}; cut it")
    return PromptSequence(request.text_ids, recording.posterior[:frames], request.speaker_latent)


def fixed_noise(sequence: PromptSequence, draws: int, seed: int) -> list[Tensor]:
    """``draws`` times standard normal noise (T, D), the same for the same seed: what two models are compared with."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(sequence.noise_shape, generator=generator) for _ in range(draws)]


@torch.no_grad()
def mean_kl(lm: KalleLM, sequences: Sequence[PromptSequence], draws: int, seed: int, direction: Direction) -> float:
    """KL in nats per dimension, the mean over the frames of all ``sequences``, each read with ``draws`` fixed noises."""
    total, frames = 0.0, 0
    for sequence in sequences:
        losses = [float(sequence.loss(lm, noise, direction)) for noise in fixed_noise(sequence, draws, seed)]
        total += sum(losses) / draws * sequence.noise_shape[0]
        frames += sequence.noise_shape[0]
    return total / frames


Reporter = Callable[[int, int, float, float], None]
"""Told after every step: how many are made, of how many, the loss in nats per dimension, the seconds since the first began."""


Mode = Literal["lora", "full"]
DEFAULT_STEPS = 200
"""The paper's N: there the error rate is lowest, while similarity still rises."""
DEFAULT_RANK = 8
WARMUP_SHARE = 0.2
"""Share of the steps; the authors' scripts have the same."""
PAPER_WIDTH, PAPER_LR = 2048, 1e-6
NANO_WIDTH = 256
NANO_FULL_LR, NANO_LORA_LR = 1e-4, 3e-4


@dataclass(frozen=True)
class AdaptOptions:
    """Adam with decoupled weight decay, batches of one utterance, warm-up and a cosine to zero (KALL-E paper, test-time training).

    A UserError for a value that makes no sense.
    """

    mode: Mode = "lora"
    """"lora": low-rank factors beside every linear layer; "full": all weights, as in the paper. The speaker encoder is frozen in both."""
    rank: int = DEFAULT_RANK
    """Of the factors; "lora" only."""
    alpha: float | None = None
    """The product of the factors is scaled by alpha / rank; None is 2 * rank."""
    steps: int = DEFAULT_STEPS
    lr: float | None = None
    """Peak learning rate; None is ``default_lr``."""
    weight_decay: float = 0.01
    """Decoupled, as in AdamW, and not for the text embedding: Adam's own would move every row of it that no text has used."""
    warmup_share: float = WARMUP_SHARE
    """Share of the steps in which the learning rate rises."""
    seconds: float | None = None
    """Wall time after which no further step is begun."""
    direction: Direction = "prediction_posterior"
    """Of the KL divergence, as in training."""
    seed: int = 0
    """Of the noise of every step, the start of the factors, and the one draw of the voice's prompt."""

    def __post_init__(self) -> None:
        check_fields(self, "adapt")
        check_seed(self.seed)
        _positive("steps", self.steps)
        _positive("rank", self.rank)
        for name, value in (("learning rate", self.lr), ("seconds", self.seconds), ("alpha", self.alpha)):
            if value is not None:
                _positive(name, value)
        if not 0 <= self.weight_decay < float("inf"):
            raise UserError(f"bad weight decay: got {self.weight_decay}, expected 0 or more; change it")
        if not 0 <= self.warmup_share <= 1:
            raise UserError(f"bad warm-up: got a share of {self.warmup_share}, expected 0 to 1; change it")

    @property
    def scale(self) -> float:
        """Multiplies the product of the factors."""
        return (2.0 * self.rank if self.alpha is None else self.alpha) / self.rank

    @property
    def warmup_steps(self) -> int:
        """Steps in which the learning rate rises."""
        return round(self.warmup_share * self.steps)


def default_lr(mode: Mode, width: int) -> float:
    """The peak learning rate for a language model of this hidden size.

    "full": the paper's 1e-6 at 2048 and above; at 256 and below what was measured there (docs/how-to/adapt.md); a power of width between
    the two. "lora": measured at 256; elsewhere the same multiple of "full", not measured.
    """
    power = math.log(NANO_FULL_LR / PAPER_LR) / math.log(PAPER_WIDTH / NANO_WIDTH)
    full = PAPER_LR * (PAPER_WIDTH / min(max(width, NANO_WIDTH), PAPER_WIDTH)) ** power
    return full if mode == "full" else full * NANO_LORA_LR / NANO_FULL_LR


def schedule(steps: int, warmup_steps: int) -> Callable[[int], float]:
    """Factor of the learning rate at step 0 to ``steps`` - 1: a linear rise to 1 over ``warmup_steps``, then a half cosine.

    It would be 0 at ``steps`` and stays so. (The authors' own, a cosine of 0.6 times the steps, rises again after its end.)
    """

    def factor(step: int) -> float:
        if step >= steps:
            return 0.0
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))

    return factor


def _positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise UserError(f"bad {name}: got {value!r}, expected more than 0; change it")


TEXT_EMBEDDING = "backbone.embed_tokens.weight"


@dataclass(frozen=True)
class Learnt:
    """The result of a run: the adapter, and the loss of every step in nats per dimension."""

    adapter: Adapter
    losses: tuple[float, ...]
    seconds: float
    rounding: float
    """Norm of what storing the change lost, over the norm of the change; 0 for low-rank factors, which are stored as they are."""


def learn(
    lm: KalleLM,
    base: str,
    sequences: Sequence[PromptSequence],
    options: AdaptOptions,
    lr: float,
    report: Reporter | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Learnt:
    """Learn ``sequences``, one a step in turn, each with fresh noise; ``lm``, whose hash is ``base``, is not touched.

    The noise is a function of the seed. At least one step is made; none is begun once ``options.seconds`` have passed on ``clock``.
    UserError when a loss is not finite.
    """
    view, parameters = trainable(lm, options)
    losses, seconds = _steps(view, parameters, sequences, options, lr, report, clock)
    if options.mode == "lora":
        factors = {
            name: (parameters[name + LORA_A].detach().cpu(), parameters[name + LORA_B].detach().cpu())
            for name in (key.removesuffix(LORA_A) for key in parameters if key.endswith(LORA_A))
        }
        return Learnt(Adapter.of_factors(base, factors, options.scale), losses, seconds, 0.0)
    return _full(lm, base, parameters, losses, seconds)


def trainable(lm: KalleLM, options: AdaptOptions) -> tuple[KalleLM, dict[str, nn.Parameter]]:
    """A model over the memory of ``lm`` and, by name, those of its parameters that learn: factors, or fp32 copies of all weights."""
    if options.mode == "lora":
        layers = linear_layers(lm, SPEAKER_PARTS)
        generator = torch.Generator().manual_seed(purpose_seed(f"kalle adapt factors {options.seed}"))
        view = with_low_rank(lm, new_factors(layers, options.rank, generator), options.scale)
        chosen: dict[str, nn.Parameter] = {}
        for name, layer in low_rank_layers(view):
            chosen |= {name + LORA_A: layer.lora_a, name + LORA_B: layer.lora_b}
    else:
        copies = {
            name: weight.detach().to(torch.float32, copy=True)
            for name, weight in lm.named_parameters()
            if not name.startswith(SPEAKER_PARTS)
        }
        view = with_weights(lm, copies)
        chosen = {name: weight for name, weight in view.named_parameters() if name in copies}
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return view.eval(), chosen


def _steps(
    view: KalleLM,
    parameters: Mapping[str, nn.Parameter],
    sequences: Sequence[PromptSequence],
    options: AdaptOptions,
    lr: float,
    report: Reporter | None,
    clock: Callable[[], float],
) -> tuple[tuple[float, ...], float]:
    optimizer = _optimizer(parameters, lr, options.weight_decay)
    scheduler = LambdaLR(optimizer, schedule(options.steps, options.warmup_steps))
    generator = torch.Generator().manual_seed(purpose_seed(f"kalle adapt noise {options.seed}"))
    losses: list[float] = []
    started = clock()
    while len(losses) < options.steps and not _spent(losses, clock() - started, options.seconds):
        sequence = sequences[len(losses) % len(sequences)]
        noise = torch.randn(sequence.noise_shape, generator=generator)
        with torch.enable_grad():
            loss = sequence.loss(view, noise, options.direction)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise UserError(f"the loss is {losses[-1]} at step {len(losses)}, expected a number; lower learning_rate (it was {lr:g})")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        optimizer.step()
        scheduler.step()
        if report is not None:
            report(len(losses), options.steps, losses[-1], clock() - started)
    return tuple(losses), clock() - started


def _spent(losses: Sequence[float], seconds: float, budget: float | None) -> bool:
    return bool(losses) and budget is not None and seconds >= budget


def _optimizer(parameters: Mapping[str, nn.Parameter], lr: float, weight_decay: float) -> AdamW:
    decayed = [parameter for name, parameter in parameters.items() if name != TEXT_EMBEDDING]
    left = [parameter for name, parameter in parameters.items() if name == TEXT_EMBEDDING]
    groups = [{"params": decayed, "weight_decay": weight_decay}, *([{"params": left, "weight_decay": 0.0}] if left else [])]
    return AdamW(groups, lr=lr)


def _full(lm: KalleLM, base: str, parameters: Mapping[str, nn.Parameter], losses: tuple[float, ...], seconds: float) -> Learnt:
    before = dict(lm.named_parameters())
    changes = {name: (value.detach() - before[name].detach().float()).cpu() for name, value in parameters.items()}
    adapter = Adapter.of_changes(base, changes)
    lost = made = 0.0
    for name, change in changes.items():
        kept = adapter.change(name, change) if name in adapter.exponents else torch.zeros_like(change)
        lost, made = lost + _power(kept - change), made + _power(change)
    return Learnt(adapter, losses, seconds, math.sqrt(lost / made) if made else 0.0)


def _power(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


LOGGER = logging.getLogger(__name__)
KL_DRAWS = 4
"""Fixed noises with which a divergence is measured."""
AudioSource = str | Path | NDArray[np.floating]


@dataclass(frozen=True)
class BeforeAfter:
    """A number of the model as it was, and with the adapter as it is stored."""

    before: float
    after: float


@dataclass(frozen=True, eq=False)
class Adaptation:
    """The result of ``adapt``."""

    adapter: Adapter
    voice: Voice
    """The first recording's voice, with the adapter."""
    losses: tuple[float, ...]
    """Loss of every step, in nats per dimension, each with its own noise and so not quite comparable."""
    kl: BeforeAfter
    """Of the training recordings, in nats per dimension, with the same noise before and after."""
    held_out_kl: BeforeAfter | None
    """Of the recordings that were not: the honest number."""
    similarity: BeforeAfter | None
    """Mean cosine of spoken texts to the first recording; None where there was no embedder."""
    held_out_similarity: BeforeAfter | None
    seconds: float
    """Wall time of the steps."""

    @property
    def report(self) -> dict[str, Any]:
        """Everything as JSON values; a number that is not finite is None."""
        return {**self.adapter.notes, "size_bytes": self.adapter.size_bytes, "losses": list(self.losses)}


def adapt(
    kalle: Kalle,
    audio: AudioSource | Sequence[AudioSource],
    text: str | Sequence[str],
    *,
    options: AdaptOptions | None = None,
    target_text: str | None = None,
    validate: Sequence[tuple[AudioSource, str]] = (),
    language: str | None = None,
    sample_rate_hz: int | None = None,
    compatibility: ReleaseCompatibility = OURS,
    embedder: SpeakerEmbedder | None = None,
    texts: Sequence[str] = (),
    report: Reporter | None = None,
) -> Adaptation:
    """Learn the voice of ``audio``, in which ``text`` is said; ``kalle`` and its weights stay as they are to the bit.

    Several recordings of one speaker, each with its transcript, take turns. The context is the transcript alone, so that the adapter serves
    any text; with ``target_text`` it is the transcript and that text, as in the paper, which adapts anew for each sentence.
    ``compatibility`` is that which the voice will be spoken with. ``validate`` are other recordings of the speaker, with their
    transcripts, to measure on.
    With an ``embedder`` the ``texts`` are spoken before and after and compared with the speaker. UserError for unusable recordings.
    """
    options = options or AdaptOptions()
    if kalle.adapter is not None:
        raise UserError("the model has an adapter already: expected none; set kalle.adapter to None first")
    recordings = [read_recording(kalle, *pair, options.seed, language, sample_rate_hz) for pair in _pairs(audio, text)]
    others = [read_recording(kalle, *pair, options.seed, language, sample_rate_hz) for pair in validate]
    sequences = [prompt_sequence(kalle, each, target_text, compatibility) for each in recordings]
    held_out = [prompt_sequence(kalle, each, None, compatibility) for each in others]
    lr = options.lr or default_lr(options.mode, kalle.lm.hidden_size)
    learnt = learn(kalle.lm, kalle.lm_hash, sequences, options, lr, report)
    adapted = learnt.adapter.applied_to(kalle.lm)
    kl = _kls(kalle.lm, adapted, sequences, options)
    held_out_kl = _kls(kalle.lm, adapted, held_out, options) if held_out else None
    voice = recordings[0].voice
    similarity, held_out_similarity = (None, None)
    if embedder is not None and texts:
        similarity, held_out_similarity = _similarities(kalle, voice, learnt.adapter, recordings, others, texts, embedder)
    notes = {
        **_notes(options, lr, recordings, target_text, compatibility),
        "steps_made": len(learnt.losses),
        "seconds": round(learnt.seconds, 2),
        "rounding": learnt.rounding,
        "kl": _json(kl),
        "held_out_kl": _json(held_out_kl),
        "similarity": _json(similarity),
        "held_out_similarity": _json(held_out_similarity),
        "embedder": None if embedder is None else dict(embedder.describe()),
    }
    adapter = dataclasses.replace(learnt.adapter, notes=notes)
    spoken = dataclasses.replace(voice, adapter=adapter)
    return Adaptation(adapter, spoken, learnt.losses, kl, held_out_kl, similarity, held_out_similarity, learnt.seconds)


def _pairs(audio: AudioSource | Sequence[AudioSource], text: str | Sequence[str]) -> list[tuple[AudioSource, str]]:
    audios: list[AudioSource] = list(audio) if isinstance(audio, list | tuple) else [audio]  # type: ignore[list-item]
    texts = [text] if isinstance(text, str) else list(text)
    if len(audios) != len(texts) or not audios:
        raise UserError(f"recordings and transcripts don't pair: got {len(audios)} and {len(texts)}, expected a text for each")
    return list(zip(audios, texts, strict=True))


def _kls(lm: KalleLM, adapted: KalleLM, sequences: Sequence[PromptSequence], options: AdaptOptions) -> BeforeAfter:
    seed = purpose_seed(f"kalle adapt measure {options.seed}")
    return BeforeAfter(*(mean_kl(model, sequences, KL_DRAWS, seed, options.direction) for model in (lm, adapted)))


def _similarities(
    kalle: Kalle,
    voice: Voice,
    adapter: Adapter,
    recordings: Sequence[Recording],
    others: Sequence[Recording],
    texts: Sequence[str],
    embedder: SpeakerEmbedder,
) -> tuple[BeforeAfter, BeforeAfter | None]:
    audios = [recordings[0].audio, *(each.audio for each in others)]
    before, after = (
        [each.mean for each in spoken_similarity(kalle, dataclasses.replace(voice, adapter=each), audios, texts, embedder)]
        for each in (None, adapter)
    )
    held_out = BeforeAfter(float(np.mean(before[1:])), float(np.mean(after[1:]))) if others else None
    return BeforeAfter(before[0], after[0]), held_out


def _notes(
    options: AdaptOptions, lr: float, recordings: Sequence[Recording], target_text: str | None, compatibility: ReleaseCompatibility
) -> dict[str, Any]:
    from kalle import __version__

    return {
        "kalle": __version__,
        **dataclasses.asdict(options),
        "lr": lr,
        "texts": [each.voice.text for each in recordings],
        "seconds_of_speech": [round(each.voice.seconds or 0.0, 3) for each in recordings],
        "target_text": target_text,
        "compatibility": None if compatibility == OURS else dataclasses.asdict(compatibility),
    }


def _json(pair: BeforeAfter | None) -> dict[str, float | None] | None:
    if pair is None:
        return None
    return {name: value if math.isfinite(value) else None for name, value in dataclasses.asdict(pair).items()}


@dataclass(frozen=True)
class SpokenSimilarity:
    """Cosine of the speaker embeddings of spoken texts and a recording of the speaker."""

    mean: float
    """NaN where no text gave a voice."""
    texts: int
    """How many gave one."""
    failed: int
    """How many gave silence, or next to nothing."""


def spoken_similarity(
    kalle: Kalle, voice: Voice, recordings: Sequence[Audio], texts: Sequence[str], embedder: SpeakerEmbedder, seed: int = 0
) -> list[SpokenSimilarity]:
    """Speak ``texts`` in ``voice``, text i with the seed ``seed`` + i, and compare them with each of ``recordings`` (S,) of the speaker.

    The recordings are at the model's rate. UserError for a text that can't be spoken.
    """
    spoken = [embedding(embedder, kalle.synthesize(text, voice, seed=seed + i).audio, kalle.sample_rate) for i, text in enumerate(texts)]
    heard = [each for each in spoken if each is not None]
    found = []
    for recording in recordings:
        wanted = embedding(embedder, recording, kalle.sample_rate)
        mean = float(np.mean([each @ wanted for each in heard])) if heard and wanted is not None else float("nan")
        found.append(SpokenSimilarity(mean, len(heard), len(texts) - len(heard)))
    return found


def embedding(embedder: SpeakerEmbedder, audio: Audio, rate_hz: int) -> np.ndarray | None:
    """The speaker embedding (E,) of ``audio``, of unit length; None where it has no voice."""
    try:
        found = np.asarray(embedder(resample(audio, rate_hz, RATE_HZ)), dtype=np.float64)
    except MetricError:
        return None
    return found / np.linalg.norm(found)

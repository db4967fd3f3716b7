"""How a voice is made: from a recording, which is checked first, or from a seed."""

from __future__ import annotations

import logging
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from kalle.audio import Audio, clipped_share, load_mono, resample, rms_dbfs
from kalle.errors import UserError
from kalle.gaussian import DiagGaussian
from kalle.models.speaker import SpeakerMel
from kalle.seeds import purpose_seed
from kalle.synthesis.generate import generate
from kalle.synthesis.options import StopRule, check_seed
from kalle.synthesis.voice import FLOWVAE_ENCODER, RANDOM, RECORDING, SPEAKER_ENCODER, Voice
from kalle.text.tokenizer import check_text, prompt_ids

if TYPE_CHECKING:
    from kalle.synthesis.kalle import Kalle

LOGGER = logging.getLogger(__name__)
LONGEST_PROMPT_SECONDS = 60.0
SILENT_DBFS = -60.0
"""A recording below this level is refused: it has nothing of a voice in it."""
QUIET_DBFS = -45.0
LARGEST_PEAK = 8.0
"""Float recordings may overshoot 1 a little; unscaled integers are far above."""
GOOD_SECONDS = (2.0, 20.0)
"""Shorter prompts say little of a voice, longer ones cost positions and time for every sentence."""
LETTERS_A_SECOND = (3.0, 26.0)
"""Outside this a transcript hardly belongs to the recording: 203 studio recordings of more than 2 s had 7 to 18, pauses
included."""
LETTERS_A_SECOND_OF_SPEECH = 11.0
"""Below this a transcript hardly has all words of the recording: 129 studio recordings with more than ``PACED_SECONDS`` of speech, pauses
not counted, had at least 11.2."""
PACED_SECONDS = 2.5
SPEECH_BELOW_LOUDEST_DB = 35.0
NOISE_FLATNESS = 0.3
"""Spectral flatness (geometric over arithmetic mean of the average power spectrum): white noise has 1, studio recordings at most 0.12."""
CLIPPED_SHARE = 0.001
_IDEOGRAPH_LETTERS, _DIGIT_LETTERS = 3.5, 4.0
_WINDOW = 512
RANDOM_VOICE_TEXTS = {
    "en": "The sun came up slowly over the quiet harbour, and the first boats went out.",
    "zh": "太阳慢慢升起，安静的港口里，第一批小船出发了。",
}
"""The text that a random voice speaks once, by language, to become its prompt."""
RANDOM_VOICE_STOP = StopRule(threshold=0.5, min_index=3)
"""The rule that ends it: the release's own, written out here, for a rule calibrated later must not change old voices."""
RANDOM_VOICE_SECONDS = 12.0
"""Its length cap, twice the time that slow speech of those sentences takes."""


def prompt_samples(kalle: Kalle, audio: str | Path | NDArray[np.floating], text: str | None, sample_rate_hz: int | None = None) -> Audio:
    """The recording of a voice, (S,) at the model's rate; a UserError where no voice can be made of it.

    What makes it doubtful (``prompt_warnings``) is logged, a line each.
    """
    if text is None and not kalle.has_speaker_encoder:
        raise UserError(
            "a prompt without its transcript: got audio and no text, but this model has no speaker encoder; "
            "give the words that are spoken in it (text)"
        )
    if text is not None:
        check_text(text, "prompt text")
    samples, rate_hz = _waveform(kalle, audio, sample_rate_hz)
    check_prompt(samples, kalle.sample_rate, kalle.flowvae.config.hop_length)
    for warning in prompt_warnings(samples, kalle.sample_rate, text, rate_hz):
        LOGGER.warning("%s", warning)
    return samples


def voice_of_samples(kalle: Kalle, samples: Audio, text: str | None, *, seed: int = 0, **notes: Any) -> Voice:
    """The voice of a recording that ``prompt_samples`` read; ``notes`` are other fields of `Voice`."""
    wav = torch.from_numpy(samples)
    bound = {}
    prompt = speaker = None
    seed = check_seed(seed)
    if text is not None:
        prompt, bound[FLOWVAE_ENCODER] = _prompt_latents(kalle, wav, seed), kalle.hashes[FLOWVAE_ENCODER]
    if kalle.has_speaker_encoder:
        speaker, bound[SPEAKER_ENCODER] = _speaker_latent(kalle, wav), kalle.hashes[SPEAKER_ENCODER]
    seconds = len(samples) / kalle.sample_rate
    drawn = None if prompt is None else seed
    return Voice(bound, prompt, speaker, text, source=RECORDING, seed=drawn, seconds=seconds, **notes)


def random_voice(kalle: Kalle, seed: int) -> Voice:
    """The voice that belongs to ``seed``; see ``Kalle.random_voice``.

    A function of the weights, the tokenizer, the folder's language and the seed: neither the folder's default voice nor
    its stop rule, whatever calibration makes of it, takes part. UserError for a bad seed, or when nothing was spoken.
    """
    return latent_voice(kalle, seed) if kalle.has_speaker_encoder else spoken_voice(kalle, seed)


def latent_voice(kalle: Kalle, seed: int) -> Voice:
    """The voice whose speaker latent (H,) is a draw from N(0, I) that ``seed`` decides; for models with a speaker encoder."""
    seed = check_seed(seed)
    latent = torch.randn(kalle.lm.hidden_size, generator=_generator("speaker latent", seed), dtype=torch.float32)
    bound = {SPEAKER_ENCODER: kalle.hashes[SPEAKER_ENCODER]}
    return Voice(bound, speaker_latent=latent, language=kalle.config.language, source=RANDOM, seed=seed)


@torch.no_grad()
def spoken_voice(kalle: Kalle, seed: int) -> Voice:
    """The voice in which a fixed sentence was spoken once, with noise that ``seed`` decides; for models without a speaker encoder."""
    seed = check_seed(seed)
    text, frame_rate_hz = random_voice_text(kalle.config.language), kalle.flowvae.config.frame_rate_hz
    generation = generate(
        kalle.lm,
        prompt_ids(kalle.tokenizer, text),
        generator=_generator("random voice", seed),
        stop=RANDOM_VOICE_STOP,
        max_frames=int(RANDOM_VOICE_SECONDS * frame_rate_hz),
    )
    frames = [frame.z.float().cpu() for frame in generation]
    if not frames:
        raise UserError(f"random voice {seed} said nothing: got 0 frames, expected a sentence; try another seed")
    if generation.stop_reason != "end":
        LOGGER.warning("random voice %d did not end by itself (%s) and may be unclear; try another seed", seed, generation.stop_reason)
    bound = {FLOWVAE_ENCODER: kalle.hashes[FLOWVAE_ENCODER]}
    seconds = len(frames) / frame_rate_hz
    return Voice(bound, torch.stack(frames), text=text, language=kalle.config.language, source=RANDOM, seed=seed, seconds=seconds)


def check_voice(kalle: Kalle, voice: Voice) -> None:
    """UserError unless ``voice`` was made with this model's encoders and its tensors have this model's widths."""
    voice.check_fits(kalle.hashes, kalle.lm.config.latent_dim, kalle.lm.hidden_size)
    if voice.adapter is not None:
        voice.adapter.check_fits(kalle.lm_hash)


def random_voice_text(language: str | None) -> str:
    """The fixed sentence that a random voice says once."""
    return RANDOM_VOICE_TEXTS.get(language or "en", RANDOM_VOICE_TEXTS["en"])


def _waveform(kalle: Kalle, audio: str | Path | NDArray[np.floating], sample_rate_hz: int | None) -> tuple[Audio, int]:
    """Mono samples (S,) at the model's rate, and the rate they were recorded at."""
    if isinstance(audio, str | Path):
        mono, rate_hz = load_mono(audio, LONGEST_PROMPT_SECONDS)
        return resample(mono, rate_hz, kalle.sample_rate), rate_hz
    try:
        wav, rate_hz = np.asarray(audio, dtype=np.float32), sample_rate_hz or kalle.sample_rate
    except (TypeError, ValueError):
        raise UserError(f"bad prompt audio: got {audio!r:.60}, expected a path or finite mono samples (S,); correct it") from None
    if wav.ndim != 1 or not wav.size or not np.isfinite(wav).all():
        raise UserError(
            f"bad prompt audio: got an array of shape {wav.shape} with {int((~np.isfinite(wav)).sum())} NaN or infinite values, "
            "expected finite mono samples (S,); average its channels, check the array"
        )
    return resample(wav, rate_hz, kalle.sample_rate), rate_hz


@torch.no_grad()
def prompt_posterior(kalle: Kalle, wav: torch.Tensor) -> DiagGaussian:
    """The Flow-VAE's posterior (P, D), fp32 on the CPU, of a recording (S,)."""
    weight = next(kalle.flowvae.parameters())
    return kalle.flowvae.encode(wav[None].to(weight.device, weight.dtype))[0].to("cpu", torch.float32)


def _prompt_latents(kalle: Kalle, wav: torch.Tensor, seed: int) -> torch.Tensor:
    return prompt_posterior(kalle, wav).sample(generator=_generator("prompt posterior", seed)).contiguous()


def _generator(purpose: str, seed: int) -> torch.Generator:
    """The noise of a voice: ``seed`` itself is that of the frames of speech, which must not be the same values."""
    return torch.Generator().manual_seed(purpose_seed(f"kalle {purpose} {seed}"))


@torch.no_grad()
def _speaker_latent(kalle: Kalle, wav: torch.Tensor) -> torch.Tensor:
    mel = SpeakerMel()(wav)
    return kalle.lm.encode_speaker(mel[None].to(kalle.device)).mean[0].float().cpu()


def check_prompt(wav: Audio, sample_rate_hz: int, shortest_samples: int) -> None:
    """A UserError for a recording (S,) that no voice can be made of: a length outside the bounds, silence, unscaled integers."""
    seconds = len(wav) / sample_rate_hz
    if not shortest_samples <= len(wav) <= LONGEST_PROMPT_SECONDS * sample_rate_hz:
        raise UserError(
            f"bad prompt length: got {seconds:.2f} s of audio, expected {shortest_samples / sample_rate_hz:g} to "
            f"{LONGEST_PROMPT_SECONDS:g} s; record or cut it again"
        )
    peak = float(np.abs(wav).max())
    if peak > LARGEST_PEAK:
        raise UserError(f"bad prompt audio: got samples up to {peak:.0f}, expected -1 to 1; divide integers by their full scale")
    level = rms_dbfs(wav)
    if level < SILENT_DBFS:
        spoken = "digital silence" if np.isneginf(level) else f"{level:.0f} dBFS"
        raise UserError(f"a silent prompt: got {spoken}, expected speech above {SILENT_DBFS:g} dBFS; record it louder")


def prompt_warnings(wav: Audio, sample_rate_hz: int, text: str | None = None, source_rate_hz: int | None = None) -> list[str]:
    """One line for each thing that makes a usable recording (S,) a doubtful voice, with numbers.

    ``text`` is its transcript, ``source_rate_hz`` the rate it was recorded at, where that is known.
    """
    seconds, level = len(wav) / sample_rate_hz, rms_dbfs(wav)
    found = []
    if seconds < GOOD_SECONDS[0]:
        found.append(f"a short prompt: got {seconds:.2f} s, {GOOD_SECONDS[0]:g} to {GOOD_SECONDS[1]:g} s tell more of a voice")
    if seconds > GOOD_SECONDS[1]:
        found.append(f"a long prompt: got {seconds:.2f} s, each sentence is spoken slower for it; {GOOD_SECONDS[1]:g} s are enough")
    if level < QUIET_DBFS:
        found.append(f"a quiet prompt: got {level:.0f} dBFS, expected speech above {QUIET_DBFS:g} dBFS")
    clipped = clipped_share(wav)
    if clipped > CLIPPED_SHARE:
        found.append(f"a clipped prompt: {clipped:.1%} of its samples are cut off at full scale")
    flatness = spectral_flatness(wav)
    if flatness > NOISE_FLATNESS:
        found.append(f"the prompt sounds like noise: spectral flatness {flatness:.2f}, speech has less than {NOISE_FLATNESS:g}")
    if source_rate_hz is not None and source_rate_hz < sample_rate_hz:
        found.append(f"a narrow prompt: recorded at {source_rate_hz} Hz for a model of {sample_rate_hz} Hz, the voice may sound dull")
    return found + ([] if text is None else _pace_warnings(text, seconds, speech_seconds(wav, sample_rate_hz)))


def spectral_flatness(wav: Audio) -> float:
    """Geometric over arithmetic mean of the power spectrum of (S,), averaged over windows: 1 for white noise, near 0 for tones."""
    padded = np.pad(wav, (0, max(0, _WINDOW - len(wav))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[:: _WINDOW // 2] * np.hanning(_WINDOW)
    power = (np.abs(np.fft.rfft(frames)) ** 2).mean(axis=0)[1:]
    return float(np.exp(np.log(power + np.finfo(np.float64).tiny).mean()) / (power.mean() + np.finfo(np.float64).tiny))


def letters(text: str) -> float:
    """How many letters ``text`` is worth in time: an ideograph, kana or hangul stands for a syllable, a digit for a word."""
    return sum(_letters(character) for character in text)


def _letters(character: str) -> float:
    if character.isdigit():
        return _DIGIT_LETTERS
    if not character.isalpha():
        return 0.5
    wide = unicodedata.category(character) == "Lo" and unicodedata.east_asian_width(character) in "WF"
    return _IDEOGRAPH_LETTERS if wide else 1.0


def speech_seconds(wav: Audio, sample_rate_hz: int) -> float:
    """Seconds of (S,) that are no pause: blocks of 40 ms that are neither silent nor far below the loudest."""
    size = max(1, round(0.04 * sample_rate_hz))
    blocks = np.pad(wav, (0, -len(wav) % size)).reshape(-1, size).astype(np.float64)
    level_db = 10 * np.log10((blocks**2).mean(axis=1) + np.finfo(np.float64).tiny)
    return float((level_db > max(SILENT_DBFS, level_db.max() - SPEECH_BELOW_LOUDEST_DB)).sum() * size / sample_rate_hz)


def _pace_warnings(text: str, seconds: float, speech_s: float) -> list[str]:
    said, (slowest, fastest) = letters(text), LETTERS_A_SECOND
    # A word or two between pauses is slow by nature.
    if said / seconds > fastest or (said / seconds < slowest and seconds > GOOD_SECONDS[0]):
        return [
            f"the transcript may not belong to the recording: {said:.0f} letters in {seconds:.2f} s are {said / seconds:.1f} a second, "
            f"speech has {slowest:g} to {fastest:g}; a wrong transcript is spoken along or swallows words"
        ]
    if speech_s > PACED_SECONDS and said / speech_s < LETTERS_A_SECOND_OF_SPEECH:
        return [
            f"the transcript may lack words of the recording: {said:.0f} letters in {speech_s:.2f} s of speech are {said / speech_s:.1f} a "
            f"second, speech has at least {LETTERS_A_SECOND_OF_SPEECH:g}; what is missing is swallowed from the texts"
        ]
    return []

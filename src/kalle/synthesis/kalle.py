"""Text in, speech out."""

from __future__ import annotations

import logging
import secrets
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from kalle.audio import read_audio, resample
from kalle.checkpoint import resolve_device, weights_hash
from kalle.errors import UserError
from kalle.models.flowvae import FlowVAE
from kalle.models.lm import KalleLM
from kalle.models.speaker import SpeakerMel
from kalle.synthesis.folder import VOICES_FOLDER, FolderConfig, load_tokenizer, read_folder
from kalle.synthesis.length import cap_frames
from kalle.synthesis.quirks import ReleaseQuirks
from kalle.synthesis.sampling import StopRule
from kalle.synthesis.speak import Request, speak
from kalle.synthesis.voice import FLOWVAE_ENCODER, SPEAKER_ENCODER, Voice
from kalle.text.prompt import check_text, prompt_ids
from kalle.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from kalle.synthesis.speech import Speech

Setting = TypeVar("Setting")
LOGGER = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LONGEST_PROMPT_SECONDS = 60.0
RANDOM_VOICE_TEXTS = {
    "en": "The sun came up slowly over the quiet harbour, and the first boats went out.",
    "zh": "太阳慢慢升起，安静的港口里，第一批小船出发了。",
}
"""What a random voice says once, by language, to be heard again as its prompt."""


class Kalle:
    """A language model, a Flow-VAE and a tokenizer that belong together."""

    def __init__(
        self, flowvae: FlowVAE, lm: KalleLM, tokenizer: Tokenizer, config: FolderConfig | None = None, folder: Path | None = None
    ) -> None:
        """Put loaded parts together; a UserError when they don't fit. ``folder`` is where named voices are looked up."""
        self.flowvae, self.lm, self.tokenizer = flowvae, lm, tokenizer
        self.config = config or FolderConfig()
        self.folder = folder
        self._check_parts()

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto") -> Kalle:
        """Load the weight folder ``folder`` (see docs/architecture.md).

        ``device`` "auto" is CUDA where there is one. ``dtype`` is that of the language model's backbone: "auto" is fp32 on
        the CPU and bfloat16 on CUDA; its heads and the Flow-VAE are fp32 always. UserError for anything that isn't there.
        """
        resolved = resolve_device(device)
        precision = resolve_dtype(dtype, resolved)
        config = read_folder(folder)
        flowvae, lm = FlowVAE.from_pretrained(folder, resolved), KalleLM.from_pretrained(folder, resolved, precision)
        return cls(flowvae, lm, load_tokenizer(folder), config, Path(folder))

    @property
    def sample_rate(self) -> int:
        """Samples per second of all audio in and out."""
        return self.flowvae.config.sample_rate

    @property
    def device(self) -> torch.device:
        """Where the language model is."""
        return self.lm.device

    @property
    def has_speaker_encoder(self) -> bool:
        """Whether a voice can be made from audio alone, without a transcript."""
        return self.lm.speaker_encoder is not None

    @cached_property
    def hashes(self) -> dict[str, str]:
        """What voices bind to: the hash of each encoder of this model."""
        found = {FLOWVAE_ENCODER: weights_hash(self.flowvae.encoder)}
        if self.lm.speaker_encoder is not None:
            found[SPEAKER_ENCODER] = weights_hash(torch.nn.ModuleList([self.lm.speaker_encoder, self.lm.speaker_projection]))
        return found

    def voice(
        self,
        audio: str | Path | NDArray[np.floating],
        text: str | None = None,
        *,
        sample_rate_hz: int | None = None,
        seed: int = 0,
        language: str | None = None,
        licence: str | None = None,
        consent: str | None = None,
    ) -> Voice:
        """Make a voice from a recording, a file or an array (S,) at ``sample_rate_hz`` (the model's own by default).

        With its transcript ``text`` the recording becomes the prompt, its latents drawn once with ``seed``; with a
        speaker encoder it gives a speaker latent (the mean), and the transcript may be missing. UserError for
        unusable audio, or for a missing transcript the model cannot do without.
        """
        if text is None and not self.has_speaker_encoder:
            raise UserError(
                "a prompt without its transcript: got audio and no text, but this model has no speaker encoder; "
                "give the words that are spoken in it (--prompt-text)"
            )
        if text is not None:
            check_text(text, "prompt text")
        wav = torch.from_numpy(self._waveform(audio, sample_rate_hz))
        bound = {}
        prompt = speaker = None
        if text is not None:
            prompt, bound[FLOWVAE_ENCODER] = self._prompt_latents(wav, seed), self.hashes[FLOWVAE_ENCODER]
        if self.has_speaker_encoder:
            speaker, bound[SPEAKER_ENCODER] = self._speaker_latent(wav), self.hashes[SPEAKER_ENCODER]
        return Voice(bound, prompt, speaker, text, language, licence, consent)

    def random_voice(self, seed: int) -> Voice:
        """The voice that belongs to ``seed``, the same every time for these weights.

        With a speaker encoder it is a speaker latent drawn from N(0, I); without one, a fixed sentence is
        spoken once with that seed and kept as the prompt.
        """
        check_seed(seed)
        if self.has_speaker_encoder:
            latent = torch.randn(self.lm.hidden_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
            return Voice({SPEAKER_ENCODER: self.hashes[SPEAKER_ENCODER]}, speaker_latent=latent, language=self.config.language)
        text = RANDOM_VOICE_TEXTS.get(self.config.language or "en", RANDOM_VOICE_TEXTS["en"])
        speech = speak(self.lm, self.flowvae, self._request(text, None, seed, 1.0, None, self.config.stop, ReleaseQuirks()))
        if speech.stop_reason != "end":
            LOGGER.warning("random voice %d ran into its length cap of %.1f s and may be unclear; try another seed", seed, speech.seconds)
        bound = {FLOWVAE_ENCODER: self.hashes[FLOWVAE_ENCODER]}
        return Voice(bound, torch.from_numpy(speech.latents), text=text, language=self.config.language)

    def load_voice(self, name: str | Path) -> Voice:
        """The voice in the file ``name``, or the one of that name in the weight folder's voices/; UserError when it doesn't fit."""
        path = Path(name)
        if not path.is_file() and self.folder is not None and path.suffix != ".safetensors":
            path = self.folder / VOICES_FOLDER / f"{name}.safetensors"
        voice = Voice.load(path)
        voice.check_fits(self.hashes)
        return voice

    def synthesize(
        self,
        text: str,
        voice: Voice | None = None,
        *,
        seed: int | None = None,
        temperature: float = 1.0,
        max_seconds: float | None = None,
        stop: StopRule | None = None,
        quirks: ReleaseQuirks | None = None,
    ) -> Speech:
        """Speak ``text``.

        Without ``voice`` the folder's default voice speaks, or without one the model makes up a voice. Without ``seed``
        one is drawn; ``Speech.seed`` tells it. ``temperature`` scales the standard deviations. ``max_seconds``
        caps the length, by default at what slow speech of the text does not reach; ``Speech.stop_reason`` tells whether
        it did. ``stop`` defaults to the rule stored with the weights. UserError for empty text, a voice that doesn't fit
        and bad values.
        """
        seed = secrets.randbelow(2**31) if seed is None else check_seed(seed)
        if voice is None and self.config.voice is not None:
            voice = self.load_voice(self.config.voice)
        if voice is not None:
            voice.check_fits(self.hashes)
        elif self.has_speaker_encoder:
            voice = self.random_voice(seed)
        request = self._request(text, voice, seed, temperature, max_seconds, stop or self.config.stop, quirks or ReleaseQuirks())
        return speak(self.lm, self.flowvae, request)

    def _request(
        self,
        text: str,
        voice: Voice | None,
        seed: int,
        temperature: float,
        max_seconds: float | None,
        stop: StopRule,
        quirks: ReleaseQuirks,
    ) -> Request:
        prompt = None if voice is None else voice.prompt_latents
        prompt_text = None if voice is None or prompt is None else voice.text
        ids = prompt_ids(self.tokenizer, text, prompt_text, quirks.tokenise_separately)
        speaker = None if voice is None else voice.speaker_latent
        cap = cap_frames(text, self.flowvae.config.frame_rate_hz, max_seconds)
        used = len(ids) + (0 if prompt is None else len(prompt)) + (0 if speaker is None else 1)
        cap = min(cap, self._free_positions(used))
        return Request(ids, cap, seed, prompt, speaker, temperature, stop, quirks)

    def _free_positions(self, used: int) -> int:
        limit = int(self.lm.backbone.config.max_position_embeddings)
        if used >= limit:
            raise UserError(f"the text is too long: with its prompt it takes {used} positions, the model reads {limit}; split the text")
        return limit - used

    def _waveform(self, audio: str | Path | NDArray[np.floating], sample_rate_hz: int | None) -> NDArray[np.float32]:
        if isinstance(audio, str | Path):
            wav = read_audio(audio, self.sample_rate)
        else:
            wav = np.asarray(audio, dtype=np.float32)
            if wav.ndim != 1 or not wav.size or not np.isfinite(wav).all():
                raise UserError(f"bad prompt audio: got an array of shape {wav.shape}, expected finite mono samples (S,); check the array")
            wav = resample(wav, sample_rate_hz or self.sample_rate, self.sample_rate)
        seconds = len(wav) / self.sample_rate
        if not self.flowvae.config.hop_length <= len(wav) <= LONGEST_PROMPT_SECONDS * self.sample_rate:
            shortest = self.flowvae.config.hop_length / self.sample_rate
            raise UserError(
                f"bad prompt length: got {seconds:.2f} s of audio, expected {shortest:g} to {LONGEST_PROMPT_SECONDS:g} s; "
                "record or cut it again"
            )
        return wav

    @torch.no_grad()
    def _prompt_latents(self, wav: torch.Tensor, seed: int) -> torch.Tensor:
        weight = next(self.flowvae.parameters())
        posterior = self.flowvae.encode(wav[None].to(weight.device, weight.dtype))
        return posterior.sample(generator=torch.Generator().manual_seed(check_seed(seed)))[0].cpu().contiguous()

    @torch.no_grad()
    def _speaker_latent(self, wav: torch.Tensor) -> torch.Tensor:
        mel = SpeakerMel()(wav)
        return self.lm.encode_speaker(mel[None].to(self.device)).mean[0].float().cpu()

    def _check_parts(self) -> None:
        if self.lm.config.latent_dim != self.flowvae.config.latent_dim:
            raise UserError(
                f"the parts don't fit: the language model has {self.lm.config.latent_dim} latent dimensions, the Flow-VAE "
                f"{self.flowvae.config.latent_dim}; use parts that were made together"
            )
        if self.tokenizer.vocab_size > self.lm.vocab_size:
            raise UserError(
                f"the tokenizer doesn't fit: it has {self.tokenizer.vocab_size} ids, the language model {self.lm.vocab_size}; "
                "use the tokenizer of these weights"
            )
        if self.config.sample_rate not in (None, self.sample_rate):
            raise UserError(
                f"the weight folder contradicts itself: config.json says {self.config.sample_rate} Hz, the Flow-VAE "
                f"{self.sample_rate} Hz; mend sample_rate in config.json"
            )


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """``"auto"`` is fp32 on the CPU and bfloat16 elsewhere; a name becomes its dtype, a UserError for an unknown one."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise UserError(f"unknown dtype: got '{dtype}', expected auto, {', '.join(DTYPES)}")
    return found


def check_seed(seed: int) -> int:
    """``seed`` itself; a UserError unless it is a non-negative 63-bit integer."""
    if not 0 <= seed < 2**63:
        raise UserError(f"bad seed: got {seed}, expected an integer from 0 to 2**63 - 1; leave it out to draw one")
    return seed

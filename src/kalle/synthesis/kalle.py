"""Text in, speech out."""

from __future__ import annotations

import logging
import math
import secrets
import threading
from collections.abc import Generator, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray

from kalle.checkpoint import resolve_device, weights_hash
from kalle.errors import UserError, check_type
from kalle.models.flowvae import FlowVAE
from kalle.models.flowvae.streaming import StreamingDecoder
from kalle.models.half_precision import HALF, fastest_half
from kalle.models.int8 import Int8Backbone, require_engine
from kalle.models.lm import KalleLM, compile_layers, quantisable
from kalle.synthesis.adapter import Adapter, base_hash
from kalle.synthesis.batch import DEFAULT_FRAME_BUDGET, speak_batch
from kalle.synthesis.generate import Request
from kalle.synthesis.longform import LongForm, why_by_sentences
from kalle.synthesis.options import (
    LONGEST_SECONDS,
    NO_GUIDANCE,
    GenerationOptions,
    SpeechRequest,
    cap_frames,
    check_seed,
    default_stop,
    usual_seconds,
)
from kalle.synthesis.release_compat import OURS, RELEASED_STEPS, ConvertedModels
from kalle.synthesis.speech import Speech, attempts, speak_with_retries
from kalle.synthesis.stream import SpeechStream
from kalle.synthesis.voice import FLOWVAE_ENCODER, SPEAKER_ENCODER, GivenVoice, Voice, find_voice
from kalle.synthesis.voicing import check_voice, prompt_samples, random_voice, voice_of_samples
from kalle.synthesis.weights import SHIPPED, FolderConfig, load_tokenizer, read_weight_folder, resolve_weights
from kalle.text.phonemes import PhonemeTokenizer
from kalle.text.tokenizer import Tokenizer, check_text, prompt_ids

logger = logging.getLogger(__name__)
QUANTIZE_FROM = 8_000_000
"""Values in the layers of the backbone from which quantize "auto" takes 8 bits: the smallest size at which the gain was measured
(docs/results/speed.md)."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Kalle:
    """A language model, a Flow-VAE and a tokenizer that belong together.

    Their weights are fixed: ``hashes``, the streaming decoder and a copy in the release's precision are made once and kept.
    After changing a weight make a new Kalle. An adapter changes none: requests that have one are spoken by another
    model over the same memory.
    """

    adapter: Adapter | None = None
    """Applied to every request whose voice has no adapter of its own; random voices are made without it. Assign ``load_adapter(FILE)``."""

    def __init__(
        self, flowvae: FlowVAE, lm: KalleLM, tokenizer: Tokenizer, config: FolderConfig | None = None, folder: Path | None = None
    ) -> None:
        """Put loaded parts together; a UserError when they don't fit. ``folder`` is where named voices are looked up."""
        self.flowvae, self.lm, self.tokenizer = flowvae, lm, tokenizer
        config = config or FolderConfig(default_stop(lm.config.stop_head))
        self.config = replace(config, given_phonemes=isinstance(tokenizer, PhonemeTokenizer))
        self.folder = folder
        self._converted: ConvertedModels = {}
        self._decoder: tuple[int | None, StreamingDecoder] | None = None
        self._lock = threading.Lock()
        self._check_parts()

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | Path = SHIPPED,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        quantize: str | None = None,
        compile: bool = False,
        graph: bool = False,
        decoder_dtype: str | torch.dtype = "float32",
    ) -> Kalle:
        """Load a weight folder (see docs/architecture.md), one with the released files, a hub id OWNER/NAME, or kalle-nano, which ships.

        Released files are converted beside themselves the first time; what a hub id names is fetched the first time.
        ``device`` "auto" is CUDA where there is one. ``dtype`` is that of the language model's backbone: "auto" is fp32 on
        the CPU and bfloat16 on CUDA, "half" the faster 16-bit type, measured at load on a CPU; its heads and the Flow-VAE's encoder are
        fp32 always. UserError for anything that isn't there.
        ``quantize`` "int8" computes the backbone with 8-bit weights on the CPU, by onnxruntime (extra ``fast``); they are made once and
        kept beside the others. "auto" does so where the model is large enough to gain and this machine can, and logs what it took.
        A model with 8-bit weights takes no adapter. ``compile`` runs the layers of the backbone through torch.compile, which takes from
        seconds to minutes at the first texts and needs a C++ compiler; 8-bit weights are not compiled. ``graph`` replays every step of the
        language model as a CUDA graph, recorded anew where a batch or a length outgrows a buffer (`kalle.models.static_cache`).
        On the CPU the paper's decoder is prepared for inference (``FlowVAE.prepare_inference``); ``decoder_dtype`` "bfloat16" computes its
        convolutions in bf16.
        On the CPU the weights are the mapped files: while they are in use, replace a file by a rename, never overwrite it in place.
        """
        check_type("compile", compile, bool, "True or False")
        resolved = resolve_device(device)
        precision = resolve_dtype(dtype, resolved)
        if str(decoder_dtype).removeprefix("torch.") not in ("float32", "bfloat16"):
            raise UserError(f"unknown decoder_dtype: got '{decoder_dtype}', expected float32 or bfloat16; correct it")
        decoder_precision = DTYPES[str(decoder_dtype).removeprefix("torch.")]
        check_quantize(quantize, dtype)
        folder = resolve_weights(folder_or_hub_id)
        config = read_weight_folder(folder)
        chosen = resolve_quantize(quantize, folder, resolved, dtype)
        try:
            lm = KalleLM.from_pretrained(folder, resolved, precision, chosen, graph)
        except UserError as error:
            if quantize != "auto" or chosen is None:
                raise
            logger.info("the language model computes with its own weights (torch) after all: %s", error)
            chosen, lm = None, KalleLM.from_pretrained(folder, resolved, precision)
        if compile and chosen is None:
            compile_layers(lm)
        # Last, for 8-bit weights need twice their size while they are prepared.
        flowvae = FlowVAE.from_pretrained(folder, resolved)
        if resolved.type == "cpu" or decoder_precision != torch.float32:
            flowvae.prepare_inference(decoder_precision)
        return cls(flowvae, lm, load_tokenizer(folder), config, folder)

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
        """Hash of each encoder of this model, computed once; voices bind to them."""
        found = {FLOWVAE_ENCODER: weights_hash(self.flowvae.encoder)}
        if self.lm.speaker_encoder is not None:
            found[SPEAKER_ENCODER] = weights_hash(torch.nn.ModuleList([self.lm.speaker_encoder, self.lm.speaker_projection]))
        return found

    @cached_property
    def lm_hash(self) -> str:
        """``base_hash`` of the language model, computed once; adapters bind to it. UserError for 8-bit weights, which take none."""
        if isinstance(self.lm.backbone, Int8Backbone):
            raise UserError("8-bit weights take no adapter: got quantize int8 and an adapter; load the model without quantize")
        return base_hash(self.lm.state_dict())

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
        unusable audio, a bad rate or seed, or for a missing transcript the model cannot do without.
        """
        if sample_rate_hz is not None and not (isinstance(sample_rate_hz, Real) and 0 < sample_rate_hz < math.inf):
            raise UserError(f"bad sample rate: got {sample_rate_hz!r} Hz, expected more than 0; leave it out for {self.sample_rate} Hz")
        seed = check_seed(seed)
        samples = prompt_samples(self, audio, text, sample_rate_hz)
        return voice_of_samples(self, samples, text, seed=seed, language=language, licence=licence, consent=consent)

    def random_voice(self, seed: int) -> Voice:
        """The voice that belongs to ``seed``, the same every time for these weights.

        With a speaker encoder it is a speaker latent drawn from N(0, I); without one, a fixed sentence is
        spoken once with that seed and kept as the prompt. Neither the folder's default voice nor its stop rule takes part,
        so a later calibration changes no voice; on another device or in another dtype it is close, not equal.
        """
        return random_voice(self, check_seed(seed))

    def load_voice(self, name: str | Path) -> Voice:
        """The voice of that name in the weight folder's voices/, or the one in a file, where ``name`` is a path (``find_voice``).

        UserError when there is none, or it doesn't fit.
        """
        voice = Voice.load(find_voice(self.folder, name))
        check_voice(self, voice)
        return voice

    def load_adapter(self, path: str | Path) -> Adapter:
        """The adapter of `kalle adapt` (a file) or `kalle train lm lora=default` (a file or weights/adapter).

        It is for ``adapter``, or with ``dataclasses.replace`` for a voice's.

        UserError when it is missing, damaged, or made for another language model.
        """
        adapter = Adapter.load(path)
        adapter.check_fits(self.lm_hash)
        return adapter

    @cached_property
    def default_voice(self) -> Voice | None:
        """The weight folder's default voice, read once; None where it names none. UserError when it is missing or doesn't fit."""
        return None if self.config.voice is None else self.load_voice(self.config.voice)

    @property
    def temperature(self) -> float:
        """The temperature of requests that name none: the weight folder's, or else 1."""
        return 1.0 if self.config.temperature is None else self.config.temperature

    def synthesize(self, text: str, voice: GivenVoice = None, *, options: GenerationOptions | None = None, **fields: Any) -> Speech:
        """Speak ``text`` with ``options``, any of which may be given by its name: ``synthesize(text, seed=7, temperature=0.8)``.

        `GenerationOptions` explains them. Without ``voice`` the folder's default voice speaks, or without one the model makes up a voice;
        "random" asks for the ``random_voice`` of the seed whatever the folder says. The length is capped
        by default at what slow speech of the text does not reach; ``Speech.stop_reason`` tells whether it did. A text that is longer
        than one request of these weights may be is spoken sentence by sentence (`LongForm`), and ``Speech.parts`` holds each.
        UserError for empty text, a voice that doesn't fit and bad values.
        """
        return self.speak(SpeechRequest(text, voice, options, **fields))

    def speak(self, request: SpeechRequest) -> Speech:
        """``synthesize`` for a whole request."""
        if self.why_by_sentences(request) is not None:
            return LongForm(self, request.text, request.voice, request.options).speech()
        return speak_with_retries(self.lm, self.flowvae, self.resolve(request), self._converted)

    def asking(self, request: SpeechRequest) -> Generator[Request, Speech, Speech]:
        """``speak`` for whoever makes the frames: yields each request to be spoken once, is sent its speech, returns the result.

        UserError as ``speak`` raises, at the first request or when a sentence's turn comes.
        """
        if self.why_by_sentences(request) is None:
            return (yield from attempts(self.resolve(request)))
        sentences = LongForm(self, request.text, request.voice, request.options).asking()
        try:
            asked = next(sentences)
            while True:
                asked = sentences.send((yield from attempts(self.resolve(asked))))
        except StopIteration as end:
            return cast("Speech", end.value)

    def synthesize_batch(self, requests: Iterable[SpeechRequest | str], *, frame_budget: int = DEFAULT_FRAME_BUDGET) -> list[Speech]:
        """Speak all ``requests`` together, each as ``speak`` would alone (a plain text takes the defaults), in their order.

        Finished ones make room for those that wait. ``frame_budget`` bounds the memory: positions of text, prompt and
        speech that the language model holds at once, counted as rows times the longest. Bad endings are tried again
        together, after the others; texts that are spoken by sentences come last, one after the other. UserError before anything is
        spoken for a request that cannot be.
        """
        if isinstance(requests, str | bytes | SpeechRequest | Mapping):
            raise UserError(f"not a batch: got one {type(requests).__name__}, expected a list of requests or texts; put it into a list")
        check_type("batch", requests, Iterable, "a list of requests or texts")
        given = [each if isinstance(each, SpeechRequest) else SpeechRequest(each) for each in requests]
        long = {
            index: LongForm(self, request.text, request.voice, request.options)
            for index, request in enumerate(given)
            if self.why_by_sentences(request) is not None
        }
        resolved = [self.resolve(request) for index, request in enumerate(given) if index not in long]
        spoken = iter(speak_batch(self.lm, self.flowvae, resolved, frame_budget, self._converted))
        return [long[index].speech() if index in long else next(spoken) for index in range(len(given))]

    def stream(self, text: str, voice: GivenVoice = None, *, options: GenerationOptions | None = None, **fields: Any) -> SpeechStream:
        """Speak ``text`` as ``synthesize`` does and yield audio, float32 (n,), while the frames are being generated.

        The pieces put together equal ``synthesize`` with the same seed and ``retries=0``, within the decoder's tolerance at
        ``latency_frames``. In a long text a stream leaves the level of the sentences as it is, and tries none of an odd pace again.
        A piece holds ``chunk_frames`` frames; the first comes once ``latency_frames`` + 1 are there. What was heard can't be taken
        back: a bad ending is not tried again, and speech that turns out to be stuck is cut only as far as it has not been yielded
        (``Speech.stuck_seconds`` says how much was).
        """
        return SpeechStream(self, SpeechRequest(text, voice, options, **fields))

    def streaming_decoder(self, latency_frames: int | None = None) -> StreamingDecoder:
        """The decoder for streams of this latency, kept for the next stream. It shares the weights that ``from_pretrained`` prepares."""
        with self._lock:
            if self._decoder is None or self._decoder[0] != latency_frames:
                self._decoder = (latency_frames, StreamingDecoder(self.flowvae, latency_frames))
            return self._decoder[1]

    def why_by_sentences(self, request: SpeechRequest) -> str | None:
        """Why ``request`` is spoken sentence by sentence; None when it is spoken at once."""
        undecided = request.options.by_sentences is None
        words = self.config.words(request.text, request.options)[0] if undecided else request.text
        return why_by_sentences(words, request.options, self.config.longest_seconds)

    def filled_in(self, options: GenerationOptions) -> GenerationOptions:
        """``options`` with what the weights say where the user says nothing; a seed is drawn where there is none."""
        return options.changed(
            seed=secrets.randbelow(2**31) if options.seed is None else options.seed,
            temperature=self.temperature if options.temperature is None else options.temperature,
            stop=options.stop_rule(self.config.stop),
        )

    def resolve(self, request: SpeechRequest) -> Request:
        """Ids, tensors and numbers of ``request``, spoken at once, for these weights; a UserError for what they cannot speak."""
        check_text(request.text, "text")
        options = self.filled_in(request.options)
        assert options.seed is not None
        text, warnings = self.config.words(request.text, options)
        _check_length(text, options.max_seconds)
        voice = self._chosen(request.voice, options.seed)
        prompt = None if voice is None else voice.prompt_latents
        prompt_text = None if voice is None or prompt is None or voice.text is None else self.config.transcript(voice.text)
        language = self.config.language_of(text, options)
        ids = prompt_ids(self.tokenizer, text, prompt_text, options.compatibility.tokenise_separately, language)
        warnings += self._spelled(text, language)
        speaker = None if voice is None else voice.speaker_latent
        cap = cap_frames(text, self.flowvae.config.frame_rate_hz, options.max_seconds)
        if options.compatibility.thousand_steps and options.max_seconds is None:
            cap = RELEASED_STEPS
        used = len(ids) + (0 if prompt is None else len(prompt)) + (0 if speaker is None else 1)
        cap = min(cap, self._free_positions(used))
        adapter = self._adapter(voice)
        low = None if adapter is not None else self._low_confidence(options)
        return Request(ids, cap, options, prompt, speaker, adapter=adapter, text=text, low_confidence=low, warnings=warnings)

    def _low_confidence(self, options: GenerationOptions) -> float | None:
        """Below which confidence speech is doubtful; None where the calibration does not hold for ``options``."""
        stored = self.config.confidence
        if stored is None or options.guidance != NO_GUIDANCE or options.compatibility != OURS or not options.watch:
            return None
        return stored.low if options.temperature == stored.temperature else None

    def _spelled(self, text: str, language: str | None) -> tuple[str, ...]:
        """A warning that names the words without known phonemes."""
        words = self.tokenizer.unknown_words(text, language) if isinstance(self.tokenizer, PhonemeTokenizer) else []
        if not words:
            return ()
        named = ", ".join(dict.fromkeys(words))
        return (f"spoken from their letters, for the lexicon lacks them: {named}; [{words[0]}](/phonemes/) gives the sounds of a word",)

    def _chosen(self, voice: GivenVoice, seed: int) -> Voice | None:
        """The voice to speak in; None where the model makes one up while it speaks."""
        if isinstance(voice, str):
            return self.random_voice(seed)
        voice = voice or self.default_voice
        if voice is not None:
            check_voice(self, voice)
            return voice
        return self.random_voice(seed) if self.has_speaker_encoder else None

    def _adapter(self, voice: Voice | None) -> Adapter | None:
        if voice is not None and voice.adapter is not None:
            return voice.adapter
        if self.adapter is not None:
            self.adapter.check_fits(self.lm_hash)
        return self.adapter

    def _free_positions(self, used: int) -> int:
        limit = int(self.lm.backbone.config.max_position_embeddings)
        if used >= limit:
            raise UserError(f"the text is too long: with its prompt it takes {used} positions, the model reads {limit}; split the text")
        return limit - used

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
        self.config.stop.check(self.lm.config.stop_head)
        if self.config.sample_rate not in (None, self.sample_rate):
            raise UserError(
                f"the weight folder contradicts itself: config.json says {self.config.sample_rate} Hz, the Flow-VAE "
                f"{self.sample_rate} Hz; correct sample_rate in config.json"
            )


def _check_length(text: str, max_seconds: float | None) -> None:
    """A UserError for a text that takes longer at the usual pace than one request may: ``LONGEST_SECONDS``, or ``max_seconds`` if more."""
    needed, allowed = usual_seconds(text), max(LONGEST_SECONDS, max_seconds or 0.0)
    if needed > allowed + 1e-6:
        raise UserError(
            f"the text is too long for one request: got about {needed:.0f} s of speech, expected at most {allowed:g} s; leave out "
            f"by_sentences=False, so that it is spoken sentence by sentence, or allow it with max_seconds={math.ceil(needed)}"
        )


def check_quantize(quantize: str | None, dtype: str | torch.dtype) -> None:
    """UserError for a ``quantize`` that is none of "int8", "auto" and "none", or a ``dtype`` that 8-bit weights leave without effect."""
    if quantize not in (None, "none", "int8", "auto"):
        raise UserError(f"unknown quantize: got {quantize!r}, expected int8, auto or none; correct it")
    if quantize == "int8" and dtype not in ("auto", "float32", torch.float32):
        raise UserError(f"8-bit weights are computed with fp32 around them: got dtype {dtype} and quantize int8; leave dtype out")


def resolve_quantize(quantize: str | None, folder: Path, device: torch.device, dtype: str | torch.dtype = "auto") -> Literal["int8"] | None:
    """ "int8" where ``quantize`` asks for it, or is "auto" and the language model in ``folder`` gains by it; None otherwise.

    For "auto" a line of the log says which was taken and why.
    """
    if quantize != "auto":
        return "int8" if quantize == "int8" else None
    reason = _why_not_int8(folder, device, dtype)
    if reason is None:
        logger.info("the language model computes with 8-bit weights (onnxruntime)")
        return "int8"
    logger.info("the language model computes with its own weights (torch): %s", reason)
    return None


def _why_not_int8(folder: Path, device: torch.device, dtype: str | torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"8-bit weights are for the CPU, and this is {device.type}"
    if dtype not in ("auto", "float32", torch.float32):
        return f"a dtype was asked for, {dtype}"
    try:
        values = quantisable(folder)[1].layer_parameters
        if values < QUANTIZE_FROM:
            return f"{values / 1e6:.0f} million values in its layers are too few to gain, 8 bits are taken from {QUANTIZE_FROM / 1e6:.0f}"
        require_engine()
    except UserError as error:
        return str(error)
    return None


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """``"auto"`` is fp32 on the CPU and bfloat16 elsewhere, "half" what `fastest_half` finds; a name becomes its dtype.

    UserError for an unknown one.
    """
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype == HALF:
        return fastest_half(device)
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise UserError(f"unknown dtype: got '{dtype}', expected auto, {HALF}, {', '.join(DTYPES)}; choose one")
    return found

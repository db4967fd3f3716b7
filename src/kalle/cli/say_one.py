"""One request of `kalle say`: spoken at once, written whole."""

from __future__ import annotations

import io
import itertools
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from kalle.cli.say_text import wordless
from kalle.errors import UserError

if TYPE_CHECKING:
    from kalle.synthesis.kalle import Kalle
    from kalle.synthesis.quirks import ReleaseQuirks
    from kalle.synthesis.speech import Speech
    from kalle.synthesis.voice import GivenVoice

STDOUT = Path("-")
DEFAULT_STEM, DEFAULT_SUFFIX = "speech", ".wav"


def parts_folder(output: Path) -> Path:
    """Where the sentences of a long text for ``output`` are kept until all are there."""
    return output.with_name(output.name + ".parts")


def free_output(long: bool, folder: Path = Path()) -> Path:
    """The file for speech that was given none: speech.wav in ``folder``, or speech-2.wav and so on, the first that is not there.

    A ``long`` text takes one whose sentences are there, because a run was interrupted, so that the same command goes on; no other may.
    """
    names = (f"{DEFAULT_STEM}{'' if number == 1 else f'-{number}'}{DEFAULT_SUFFIX}" for number in itertools.count(1))
    return next(path for path in map(folder.joinpath, names) if not path.exists() and (long or not parts_folder(path).exists()))


def check_output(output: Path) -> None:
    """A UserError unless ``output`` can be written, by its suffix; - is standard output."""
    from kalle.audio import WRITABLE

    kinds = " or ".join(WRITABLE)
    if output != STDOUT and output.suffix.lower() not in WRITABLE:
        raise UserError(f"cannot write '{output}': got the suffix '{output.suffix}', expected {kinds}; rename the output")


def speak_to_file(
    kalle: Kalle,
    text: str,
    output: Path,
    voice: GivenVoice,
    seed: int | None = None,
    temperature: float | None = None,
    max_seconds: float | None = None,
    quirks: ReleaseQuirks | None = None,
    retries: int = 1,
    guidance: float = 1.0,
    *,
    plot: Path | None = None,
    written: str | None = None,
) -> Speech:
    """Speak ``text`` into ``output`` and print what came of it; a UserError, and no file, when nothing was spoken.

    ``plot`` is a picture to draw beside; ``written`` is the text before normalisation.
    """
    started = time.perf_counter()
    speech = kalle.synthesize(
        text, voice, seed=seed, temperature=temperature, max_seconds=max_seconds, quirks=quirks, retries=retries, guidance=guidance
    )
    elapsed = time.perf_counter() - started
    if not speech.frames:
        raise UserError(
            f"the model ended the speech before its first frame: got 0 frames with seed {speech.seed}, expected some; try another --seed"
        )
    if output == STDOUT:
        write_standard_output(wav_bytes(speech))
    else:
        speech.save(output)
    lines = [report(speech, output, elapsed), *(f"warning: {warning}" for warning in wordless(text))]
    if written is not None and text != written:
        lines.append(f"spoken as: {text}")
    typer.echo("\n".join(lines), err=output == STDOUT)
    if plot is not None:
        from kalle.evaluation.figures import save_speech_figure

        save_speech_figure(speech, plot)
        typer.echo(f"plot: {plot}", err=output == STDOUT)
    return speech


def report(speech: Speech, output: Path, elapsed_seconds: float) -> str:
    """What `kalle say` prints, one fact a line; ``elapsed_seconds`` covers synthesis without loading and writing."""
    endings = {
        "end": "end (the model ended the speech)",
        "max_frames": f"max_frames (cut at the length cap of {speech.max_frames} frames; allow more seconds or try another --seed)",
    }
    tries = ", ".join(f"seed {attempt.seed}: {attempt.stop_reason}" + (" (kept)" if attempt.kept else "") for attempt in speech.attempts)
    return "\n".join(
        [
            f"wrote {'to standard output' if output == STDOUT else output}",
            f"audio: {speech.seconds:.2f} s at {speech.sample_rate} Hz ({speech.frames} frames)",
            f"RTF = synthesis / audio = {elapsed_seconds:.2f} s / {speech.seconds:.2f} s = {elapsed_seconds / speech.seconds:.3f}",
            f"stop reason: {endings.get(speech.stop_reason, f'{speech.stop_reason} (try another --seed)')}",
            f"seed: {speech.seed}",
            f"confidence: {speech.confidence:.3f}",
            *([f"attempts: {len(speech.attempts)} ({tries})"] if len(speech.attempts) > 1 else []),
            *(f"warning: {warning}" for warning in speech.warnings),
        ]
    )


def wav_bytes(speech: Speech) -> bytes:
    """A 16-bit WAV file of ``speech``."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, speech.pcm16(), speech.sample_rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def write_standard_output(content: bytes) -> None:
    """Write ``content`` to standard output; a UserError on a terminal, which it would garble."""
    if sys.stdout.isatty():
        raise UserError("audio on a terminal: got -o -, expected a pipe or a file; redirect the output")
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()

"""`kalle say`: speak a text into a file."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kalle.cli.interrupts import interruptible
from kalle.errors import UserError

if TYPE_CHECKING:
    from kalle.synthesis.kalle import Kalle
    from kalle.synthesis.speech import Speech
    from kalle.synthesis.voice import Voice

DEFAULT_MODEL = Path("ckpt/kalle-release")
STDIN = "-"


def say(
    text: Annotated[str, typer.Argument(help="What to say; - reads it from standard input.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Audio file to write, .wav or .flac.")],
    model: Annotated[Path, typer.Option(help="Weight folder.")] = DEFAULT_MODEL,
    prompt_audio: Annotated[Path | None, typer.Option(help="Recording whose voice to speak in.")] = None,
    prompt_text: Annotated[str | None, typer.Option(help="What is said in the recording, word for word.")] = None,
    voice: Annotated[str | None, typer.Option(help="Voice file, or the name of one in the weight folder.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same speech; without one it is drawn and printed.")] = None,
    temperature: Annotated[float, typer.Option(help="Scale of the standard deviations; 1 is the model's own spread.")] = 1.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the backbone: auto, float32, bfloat16 or float16.")] = "auto",
    max_seconds: Annotated[float | None, typer.Option(help="Length cap; by default what slow speech of the text does not reach.")] = None,
) -> None:
    """Speak a text into a file, in a voice that the model makes up, a recording's or a stored one."""
    with interruptible():
        spoken = read_text(text)
        check_request(spoken, output, prompt_audio, prompt_text, voice)
        from kalle.synthesis.kalle import Kalle

        kalle = Kalle.from_pretrained(model, device, dtype)
        chosen = choose_voice(kalle, prompt_audio, prompt_text, voice)
        speak_to_file(kalle, spoken, output, chosen, seed, temperature, max_seconds)


def speak_to_file(
    kalle: Kalle,
    text: str,
    output: Path,
    voice: Voice | None,
    seed: int | None = None,
    temperature: float = 1.0,
    max_seconds: float | None = None,
) -> Speech:
    """Speak ``text`` into ``output`` and print what came of it; a UserError, and no file, when nothing was spoken."""
    started = time.perf_counter()
    speech = kalle.synthesize(text, voice, seed=seed, temperature=temperature, max_seconds=max_seconds)
    elapsed = time.perf_counter() - started
    if not speech.frames:
        raise UserError(
            f"the model ended the speech before its first frame: got 0 frames with seed {speech.seed}, expected some; try another --seed"
        )
    speech.save(output)
    typer.echo(report(speech, output, elapsed))
    return speech


def report(speech: Speech, output: Path, elapsed_seconds: float) -> str:
    """What `kalle say` prints, one fact a line; ``elapsed_seconds`` covers synthesis without loading and writing."""
    ending = {"end": "end (the model ended the speech)"}.get(
        speech.stop_reason,
        f"{speech.stop_reason} (cut at the length cap of {speech.max_frames} frames; allow more seconds or try another --seed)",
    )
    return "\n".join(
        [
            f"wrote {output}",
            f"audio: {speech.seconds:.2f} s at {speech.sample_rate} Hz ({speech.frames} frames)",
            f"RTF = synthesis / audio = {elapsed_seconds:.2f} s / {speech.seconds:.2f} s = {elapsed_seconds / speech.seconds:.3f}",
            f"stop reason: {ending}",
            f"seed: {speech.seed}",
        ]
    )


def read_text(text: str) -> str:
    """``text`` itself, or standard input when it is ``-``; a UserError when that is not UTF-8."""
    if text != STDIN:
        return text
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8: {error.reason} at byte {error.start}; convert the text") from None


def check_request(text: str, output: Path, prompt_audio: Path | None, prompt_text: str | None, voice: str | None) -> None:
    """Refuse what needs no model to be seen wrong, before one is loaded."""
    from kalle.audio import WRITABLE
    from kalle.text.prompt import check_text

    check_text(text, "text")
    if output.suffix.lower() not in WRITABLE:
        raise UserError(f"cannot write '{output}': got the suffix '{output.suffix}', expected {' or '.join(WRITABLE)}; rename the output")
    if voice is not None and (prompt_audio is not None or prompt_text is not None):
        raise UserError(f"two voices: got --voice '{voice}' and a prompt, expected one of them; leave one out")
    if prompt_text is not None and prompt_audio is None:
        raise UserError("a transcript without its recording: got --prompt-text and no --prompt-audio, expected both; give the recording")
    if prompt_audio is not None and not prompt_audio.is_file():
        raise UserError(f"audio file not found: got '{prompt_audio}', expected a recording; check --prompt-audio")


def choose_voice(kalle: Kalle, prompt_audio: Path | None, prompt_text: str | None, voice: str | None) -> Voice | None:
    """The voice asked for; None leaves it to the model."""
    if voice is not None:
        return kalle.load_voice(voice)
    return None if prompt_audio is None else kalle.voice(prompt_audio, prompt_text)

"""`kalle stream`: speak a text and play it while it is being made."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from kalle.cli.audio_output import GrowingWav, Pipe, PipedPlayer, Sink, Sinks
from kalle.cli.main import INTERRUPTED
from kalle.cli.speaking import (
    STREAM_FLAGS,
    AdapterOption,
    DecoderDtypeOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    PromptAudioOption,
    PromptTextOption,
    QuantizeOption,
    VoiceOption,
    check_before_loading,
    choose_voice,
    load_model,
    read_text,
    speaks,
    wordless,
)
from kalle.errors import UserError

if TYPE_CHECKING:
    from kalle.synthesis.options import GenerationOptions
    from kalle.synthesis.speech import Speech
    from kalle.synthesis.stream import SpeechStream

STDOUT = "-"
SUFFIX = ".wav"


class Container(StrEnum):
    """Bytes for standard output."""

    wav = "wav"
    raw = "raw"


@speaks(STREAM_FLAGS)
def stream(
    text: Annotated[str, typer.Argument(help="What to say; - reads it from standard input.")],
    output: Annotated[str | None, typer.Option("--output", "-o", metavar="FILE", help="WAV file; - is standard output.")] = None,
    model: ModelOption = None,
    prompt_audio: PromptAudioOption = None,
    prompt_text: PromptTextOption = None,
    voice: VoiceOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    decoder_dtype: DecoderDtypeOption = "float32",
    quantize: QuantizeOption = "none",
    play: Annotated[bool, typer.Option("--play", help="Play it as it comes.")] = False,
    container: Annotated[Container, typer.Option("--format", help="Of standard output: a WAV, or raw 16-bit.")] = Container.wav,
    *,
    options: GenerationOptions,
) -> None:
    """Speak a text into a file, a pipe or the loudspeaker while it is being generated. Reports on standard error.

    A text that is long for the weights is spoken sentence by sentence, as `kalle say` does. Ctrl-C keeps the audio that is finished,
    as a valid file, and leaves with 130.
    """
    written = read_text(text)
    check_stream_output(output, play)
    check_before_loading(written, prompt_audio, prompt_text, voice, output)
    kalle = load_model(model, device, dtype, quantize, decoder_dtype)
    chosen = choose_voice(kalle, prompt_audio, prompt_text, voice, adapter)
    started = time.perf_counter()
    speaking = kalle.stream(written, chosen, options=options)
    code = Delivery(speaking, written, output, play, container is Container.raw, started).run()
    if code:
        raise typer.Exit(code)


def check_stream_output(output: str | None, play: bool) -> None:
    """Refuse an output that can't take a stream, before a model is loaded."""
    if output is None and not play:
        raise UserError("nowhere to speak to: got no --output and no --play, expected a file, - or --play; give one")
    if output not in (None, STDOUT) and Path(str(output)).suffix.lower() != SUFFIX:
        raise UserError(f"cannot stream into '{output}': expected a {SUFFIX} file or -; `kalle say` writes other kinds")
    if output == STDOUT and sys.stdout.isatty():
        raise UserError("standard output is a terminal: expected a pipe or a file for the audio; redirect it, or use --play")


@dataclass
class Delivery:
    """One stream on its way out."""

    stream: SpeechStream
    text: str
    output: str | None
    play: bool
    raw: bool
    started: float
    """Time of the request (``time.perf_counter``)."""
    first_s: float | None = None
    """Seconds until the first piece was there."""
    spent_s: float = 0.0
    """Seconds spent on making audio, without those spent on handing it over."""
    samples: int = 0
    """Samples that were handed over."""

    def run(self) -> int:
        """Deliver and report; returns the exit code: 0, also when the reader of the pipe has had enough, or 130 after Ctrl-C."""
        player, sinks = self._open()
        interrupted, failure = False, None
        try:
            with Sinks(*sinks) as sink:
                self._deliver(sink)
        except KeyboardInterrupt:
            interrupted = True
        except BrokenPipeError:
            return 0
        except UserError as error:
            failure = error
        finally:
            self.stream.close()
            if player is not None:
                player.close(wait=not interrupted)
        # An interrupt may have come inside a write: the file knows best what it got.
        self.samples = next((sink.samples for sink in sinks if isinstance(sink, GrowingWav)), self.samples)
        speech = self.stream.speech
        if failure is not None:
            failure.args = (f"{failure}; kept {self._kept()}, seed: {speech.seed}", *failure.args[1:])
            raise failure
        if not self.samples and not interrupted:
            raise UserError(f"the model ended the speech before its first frame: got 0 frames with seed {speech.seed}, try another --seed")
        typer.echo(self.report(speech, interrupted, player), err=True)
        if self.output is None and player is not None and player.failure is not None:
            raise UserError(f"the audio could not be played and was not kept: {player.failure}, expected a sound device; give -o FILE too")
        return INTERRUPTED if interrupted else 0

    def _kept(self) -> str:
        """Report the file that a failed stream leaves; played or piped audio leaves none."""
        if not self.samples:
            return "nothing"
        where = "delivered" if self.output in (None, STDOUT) else f"in {self.output}"
        return f"{self.samples / self.stream.sample_rate:.2f} s {where}"

    def _open(self) -> tuple[PipedPlayer | None, list[Sink]]:
        rate_hz, sinks = self.stream.sample_rate, list[Sink]()
        player = PipedPlayer(rate_hz) if self.play else None
        if self.output == STDOUT:
            sinks.append(Pipe(sys.stdout.fileno(), rate_hz, self.raw))
        elif self.output is not None:
            sinks.append(GrowingWav(Path(self.output), rate_hz))
        return player, [*sinks, *([] if player is None else [_Played(player)])]

    def _deliver(self, sink: Sinks) -> None:
        from kalle.audio import to_pcm16

        before = self.started
        for piece in self.stream:
            now = time.perf_counter()
            self.spent_s += now - before
            self.first_s = now - self.started if self.first_s is None else self.first_s
            sink.write(to_pcm16(piece))
            self.samples += len(piece)
            before = time.perf_counter()

    def report(self, speech: Speech, interrupted: bool, player: PipedPlayer | None) -> str:
        """The output at the end, one fact a line."""
        rate_hz = self.stream.sample_rate
        seconds = self.samples / rate_hz
        lines = [f"{'interrupted: kept' if interrupted else 'audio:'} {seconds:.2f} s at {rate_hz} Hz"]
        if self.output not in (None, STDOUT):
            lines.insert(0, f"wrote {self.output}" if self.samples else f"{self.output} was not written: nothing was finished yet")
        if self.first_s is not None and seconds:
            lines.append(f"first audio after {self.first_s:.2f} s (latency {self.stream.latency_frames} frames)")
            lines.append(f"RTF = synthesis / audio = {self.spent_s:.2f} s / {seconds:.2f} s = {self.spent_s / seconds:.3f}")
        if player is not None:
            lines.append(f"played with {player.name}" if player.failure is None else f"could not play it: {player.failure}")
        reason = "interrupted" if interrupted else speech.stop_reason
        warnings = [f"warning: {warning}" for warning in (*wordless(self.text), *speech.warnings)]
        return "\n".join([*lines, f"stop reason: {reason}", f"seed: {speech.seed}", *warnings])


class _Played:
    """A player as a sink; the delivery closes it, for an interrupt must not wait for what was not heard yet."""

    def __init__(self, player: PipedPlayer) -> None:
        self._player = player

    def write(self, samples: NDArray[np.int16]) -> None:
        """Hand over (n,) samples."""
        self._player.write(samples)

    def close(self) -> None:
        """Left to the delivery."""

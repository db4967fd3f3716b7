"""Shared parts of the commands that speak: the model, the voice, the text, and a flag for each generation option."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kalle.cli.main import interruptible
from kalle.convert import CONVERTED
from kalle.errors import UserError
from kalle.files import refuse_other_formats, text_of

if TYPE_CHECKING:
    from kalle.synthesis.kalle import Kalle
    from kalle.synthesis.voice import GivenVoice

STDIN = "-"
DEFAULT_MODEL = "the released weights in ckpt/, else kalle-nano, which ships"
ModelOption = Annotated[str | None, typer.Option(help="Weight folder, kalle-nano, or a hub id OWNER/NAME.", show_default=DEFAULT_MODEL)]
FolderOption = Annotated[
    Path | None, typer.Option("--model", metavar="DIR", help="Weight folder, or kalle-nano.", show_default=DEFAULT_MODEL)
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DtypeOption = Annotated[
    str, typer.Option(help="Of the backbone: auto, float32, bfloat16, float16 or half (the faster of them).", hidden=True)
]
DecoderDtypeOption = Annotated[
    str,
    typer.Option(help="Of the convolutions of the paper's decoder: float32, or bfloat16 where the CPU is faster in it.", hidden=True),
]
QuantizeOption = Annotated[
    str, typer.Option(help="8-bit weights on a CPU: int8, none, or auto where the model is large enough to gain (extra fast).")
]
PromptAudioOption = Annotated[Path | None, typer.Option(help="Recording whose voice to speak in.")]
PromptTextOption = Annotated[str | None, typer.Option(help="What is said in the recording, word for word.")]
VoiceOption = Annotated[
    str | None,
    typer.Option(
        help="Voice file, the name of one in the weight folder, or random for the made-up voice of --seed.",
        show_default="the model's own, or a made-up one",
    ),
]
AdapterOption = Annotated[
    Path | None,
    typer.Option(
        help="Adapter of `kalle adapt` or `kalle train lm lora=default`; used instead of one inside the voice.", metavar="FILE", hidden=True
    ),
]

TemperatureOption = Annotated[
    float | None,
    typer.Option(help="Scale of the standard deviations; 1 is the model's own spread.", show_default="the weights' own, else 1"),
]
FLAGS: Mapping[str, Any] = {
    "seed": Annotated[int | None, typer.Option(help="The same seed gives the same speech; without one it is drawn and printed.")],
    "temperature": TemperatureOption,
    "guidance": Annotated[
        float | None,
        typer.Option(
            help="1 is the model's own prediction, more follows the text more closely; twice the work.", show_default="1", hidden=True
        ),
    ],
    "max_seconds": Annotated[
        float | None, typer.Option(help="Length cap, of each sentence in a long text; by default what slow speech does not reach.")
    ],
    "language": Annotated[
        str | None,
        typer.Option(help="ISO 639-1 code of the text; by default the weights' own where it is in its script, else guessed from that."),
    ],
    "normalise": Annotated[
        bool | None,
        typer.Option(
            "--normalise/--no-normalise",
            help="Numbers, dates and abbreviations in words (en, zh).",
            show_default="as the weights need it",
        ),
    ],
    "by_sentences": Annotated[
        bool | None, typer.Option("--by-sentences/--at-once", help="Speak sentence by sentence.", show_default="where the text is long")
    ],
    "pause_s": Annotated[
        float | None,
        typer.Option("--pause", help="Seconds of silence between the sentences of a long text.", show_default="0.3", hidden=True),
    ],
    "paragraph_pause_s": Annotated[
        float | None,
        typer.Option(
            "--paragraph-pause", help="Seconds of silence between the paragraphs of a long text.", show_default="0.8", hidden=True
        ),
    ],
    "rolling": Annotated[
        bool | None,
        typer.Option(
            "--rolling/--no-rolling", help="Prompt each sentence of a long text with the one before, too.", show_default="no", hidden=True
        ),
    ],
}
"""Field of `GenerationOptions` -> the flag of every command that speaks."""
SAY_FLAGS: Mapping[str, Any] = {
    **FLAGS,
    "retries": Annotated[
        int | None, typer.Option(min=0, help="How often a bad ending is tried again with another seed.", show_default="1", hidden=True)
    ],
}
STREAM_FLAGS: Mapping[str, Any] = {
    **FLAGS,
    "latency_frames": Annotated[
        int | None, typer.Option("--latency", metavar="FRAMES", help="Frames to wait before one is final.", show_default="near exact")
    ],
    "chunk_frames": Annotated[int | None, typer.Option("--chunk", metavar="FRAMES", help="Frames in a piece of audio.", show_default="8")],
}
_NAMED = (
    {
        "by_sentences=False": "--at-once",
        "latency_frames": "--latency",
        "chunk_frames": "--chunk",
        "pause_s": "--pause",
        "paragraph_pause_s": "--paragraph-pause",
    }
    | {name: f"--{name.replace('_', '-')}" for name in ("max_seconds", "by_sentences", "max_frames")}
    | {"(text)": "(--prompt-text)", "(restart)": "(--restart)"}
)
"""Parameters that the library's messages name, and the flags they have here."""


def speaks(flags: Mapping[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the ``flags`` of generation options: it receives what was given as ``options``.

    Ctrl-C is one line, and messages of the library name flags. A flag without a value leaves the option at its default.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapped(**given: Any) -> None:
            from kalle.synthesis.options import GenerationOptions

            with interruptible(), renamed(_NAMED):
                chosen = {name: value for name in flags if (value := given.pop(name)) is not None}
                command(**given, options=GenerationOptions(**chosen))

        parameters = [
            each.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=eval(each.annotation, command.__globals__))
            for each in inspect.signature(command).parameters.values()
            if each.name != "options"
        ]
        parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=flags[name]) for name in flags]
        wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {each.name: each.annotation for each in parameters}
        return wrapped

    return decorate


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """In a UserError of the block, replace each parameter that the library names, a key of ``names``, by the command's flag."""
    try:
        yield
    except UserError as error:
        pattern = re.compile("|".join(rf"(?<![\w-]){re.escape(name)}(?!\w)" for name in names))
        error.args = (pattern.sub(lambda found: names[found[0]], str(error)), *error.args[1:])
        raise


def model_folder(model: str | Path | None, *, quiet: bool = False) -> Path:
    """The weight folder of --model; for None the default, and a line on standard error where that is the small model that ships.

    A path that is no folder is returned as it is, for its reader to refuse. UserError where there is no default.
    """
    from kalle import checkpoint
    from kalle.synthesis.weights import CKPT, default_weights, resolve_weights

    if model is None:
        folder = default_weights()
        if folder == checkpoint.shipped_folder() and not quiet:
            better = "`kalle download` fetches the full-size released weights, --model takes your own"
            typer.echo(f"model: {checkpoint.SHIPPED}, the small one that ships with kalle; {better}", err=True)
        return folder
    # Where there is no ckpt/ that folder looks like a hub id.
    return resolve_weights(Path(model) if Path(model) == CKPT / CONVERTED else model)


def load_model(model: str | Path | None, device: str, dtype: str = "auto", quantize: str = "none", decoder_dtype: str = "float32") -> Kalle:
    """The whole model of --model."""
    folder = model_folder(model)
    from kalle.synthesis.kalle import Kalle

    return Kalle.from_pretrained(folder, device, dtype, quantize, decoder_dtype=decoder_dtype)


def check_before_loading(
    text: str, prompt_audio: Path | None, prompt_text: str | None, voice: str | None, output: str | Path | None = None
) -> None:
    """Refuse what needs no model to be seen wrong, before one is loaded."""
    from kalle.text.tokenizer import check_text

    check_text(text, "text")
    if voice is not None and (prompt_audio is not None or prompt_text is not None):
        raise UserError(f"two voices: got --voice '{voice}' and a prompt, expected one of them; leave one out")
    if prompt_text is not None and prompt_audio is None:
        raise UserError("a transcript without its recording: got --prompt-text and no --prompt-audio, expected both; give the recording")
    if prompt_audio is not None and not prompt_audio.is_file():
        raise UserError(f"audio file not found: got '{prompt_audio}', expected a recording; check --prompt-audio")
    if prompt_audio is not None and output is not None and Path(output).exists() and prompt_audio.samefile(output):
        raise UserError(f"the output would replace the prompt: got '{prompt_audio}' twice, expected two files; choose another --output")


def choose_voice(
    kalle: Kalle, prompt_audio: Path | None, prompt_text: str | None, voice: str | None, adapter: Path | None = None
) -> GivenVoice:
    """The requested voice, with ``adapter`` instead of its own; None leaves it to the weight folder and the model, "random" to the seed.

    Without a voice ``kalle`` takes the adapter for whatever voice the model chooses.
    """
    from kalle.synthesis.voice import RANDOM_VOICE

    chosen: GivenVoice = None
    if voice == RANDOM_VOICE:
        chosen = RANDOM_VOICE
    elif voice is not None:
        chosen = kalle.load_voice(voice)
    elif prompt_audio is not None:
        chosen = kalle.voice(prompt_audio, prompt_text)
    if adapter is None:
        return chosen
    kalle.adapter = kalle.load_adapter(adapter)
    return chosen if chosen is None or isinstance(chosen, str) else dataclasses.replace(chosen, adapter=kalle.adapter)


def read_text(text: str | None, text_file: Path | None = None) -> str:
    """``text`` itself or the content of ``text_file``, from standard input where that is ``-``.

    A UserError for none or both, for a file that is missing, and for what is not UTF-8.
    """
    if (text is None) == (text_file is None):
        got = "none" if text is None else "TEXT and --text-file"
        raise UserError(f"what to say: got {got}, expected either TEXT or --text-file FILE; give one")
    if text_file is None or str(text_file) == STDIN:
        return _standard_input() if text in (None, STDIN) else str(text)
    try:
        content = text_file.read_bytes()
        refuse_other_formats(text_file, content)
        return text_of(content).replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError:
        raise UserError(f"text file not found: got '{text_file}', expected a file of UTF-8 text; check --text-file") from None
    except IsADirectoryError:
        raise UserError(f"not a text file: '{text_file}' is a folder, expected a file of UTF-8 text; check --text-file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"'{text_file}' is not UTF-8: {error.reason} at byte {error.start}; convert the text") from None


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8: {error.reason} at byte {error.start}; convert the text") from None


def wordless(text: str) -> list[str]:
    """The warning about a text, such as lone emoji, of which a long text would leave everything out; none for any other."""
    from kalle.text.languages import has_words

    return [] if has_words(text) else ["nothing in the text is a letter or number"]

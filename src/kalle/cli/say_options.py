"""The options of `kalle say`, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

VOICE_HELP = "Voice file, the name of one in the weight folder, or random for the made-up voice of --seed."
VOICE_DEFAULT = "the model's own, or a made-up one"
TextArgument = Annotated[str | None, typer.Argument(help="What to say; - reads it from standard input.")]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="File to write, .wav or .flac; - is WAV on standard output.", show_default="a new speech.wav"),
]
PromptAudioOption = Annotated[Path | None, typer.Option(help="Recording whose voice to speak in.")]
PromptTextOption = Annotated[str | None, typer.Option(help="What is said in the recording, word for word.")]
VoiceOption = Annotated[str | None, typer.Option(help=VOICE_HELP, show_default=VOICE_DEFAULT)]
AdapterOption = Annotated[
    Path | None,
    typer.Option(help="Adapter of `kalle adapt` or `kalle train lm lora=default`; used instead of one inside the voice.", metavar="FILE"),
]
SeedOption = Annotated[int | None, typer.Option(help="The same seed gives the same speech; without one it is drawn and printed.")]
TemperatureOption = Annotated[
    float | None,
    typer.Option(help="Scale of the standard deviations; 1 is the model's own spread.", show_default="the weights' own, else 1"),
]
GuidanceOption = Annotated[float, typer.Option(help="1 is the model's own prediction, more follows the text more closely; twice the work.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DtypeOption = Annotated[str, typer.Option(help="Of the backbone: auto, float32, bfloat16 or float16.")]
MaxSecondsOption = Annotated[
    float | None, typer.Option(help="Length cap, of each sentence in a long text; by default what slow speech does not reach.")
]
TextFileOption = Annotated[Path | None, typer.Option(help="File with what to say, - for standard input; sentence by sentence, resumable.")]
RetriesOption = Annotated[int, typer.Option(min=0, help="How often a bad ending is tried again with another seed.")]
ReleaseExactOption = Annotated[
    bool, typer.Option("--release-exact", help="Do everything as the release does, its oddities included; slower.")
]
NormaliseOption = Annotated[bool, typer.Option("--normalise/--no-normalise", help="Numbers, dates and abbreviations in words (en, zh).")]
LanguageOption = Annotated[
    str | None,
    typer.Option(help="ISO 639-1 code of the text; by default the weights' own where it is in its script, else guessed from that."),
]
ShowTextOption = Annotated[bool, typer.Option("--show-text", help="Show the text as it would be spoken, and speak nothing.")]
PlotOption = Annotated[Path | None, typer.Option(help="Picture of waveform, mel, spread and end divergence to write; short texts only.")]
SrtOption = Annotated[bool, typer.Option("--srt", help="Write subtitles beside the output; speaks sentence by sentence.")]
PauseOption = Annotated[float, typer.Option(help="Seconds of silence between the sentences of a long text.")]
ParagraphPauseOption = Annotated[float, typer.Option(help="Seconds of silence between the paragraphs of a long text.")]
RollingOption = Annotated[
    bool, typer.Option("--rolling/--no-rolling", help="Prompt each sentence of a long text with the one before, too.")
]
RestartOption = Annotated[bool, typer.Option("--restart", help="Begin a long text again, and forget the sentences of the last run.")]
KeepPartsOption = Annotated[bool, typer.Option("--keep-parts", help="Keep the folder with the sentences of a long text.")]

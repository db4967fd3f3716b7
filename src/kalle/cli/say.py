"""`kalle say`: speak a text into a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from kalle.cli.interrupts import interruptible
from kalle.cli.model_option import ModelOption, load_model, model_folder
from kalle.cli.say_one import DEFAULT_STEM, DEFAULT_SUFFIX, check_output, free_output, report, speak_to_file
from kalle.cli.say_options import (
    AdapterOption,
    DeviceOption,
    DtypeOption,
    GuidanceOption,
    KeepPartsOption,
    LanguageOption,
    MaxSecondsOption,
    NormaliseOption,
    OutputOption,
    ParagraphPauseOption,
    PauseOption,
    PlotOption,
    PromptAudioOption,
    PromptTextOption,
    ReleaseExactOption,
    RestartOption,
    RetriesOption,
    RollingOption,
    SeedOption,
    ShowTextOption,
    SrtOption,
    TemperatureOption,
    TextArgument,
    TextFileOption,
    VoiceOption,
)
from kalle.cli.say_text import STDIN, choose_language, read_text, show_text
from kalle.errors import UserError

if TYPE_CHECKING:
    from kalle.synthesis.kalle import Kalle
    from kalle.synthesis.longform_part import LongFormOptions
    from kalle.synthesis.voice import GivenVoice

__all__ = ["check_request", "choose_voice", "read_text", "report", "say", "speak_to_file"]
PAUSE_S, PARAGRAPH_PAUSE_S = 0.3, 0.8


def say(
    text: TextArgument = None,
    output: OutputOption = None,
    model: ModelOption = None,
    prompt_audio: PromptAudioOption = None,
    prompt_text: PromptTextOption = None,
    voice: VoiceOption = None,
    seed: SeedOption = None,
    temperature: TemperatureOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    max_seconds: MaxSecondsOption = None,
    text_file: TextFileOption = None,
    retries: RetriesOption = 1,
    release_exact: ReleaseExactOption = False,
    normalise: NormaliseOption = False,
    language: LanguageOption = None,
    show_text: ShowTextOption = False,
    plot: PlotOption = None,
    srt: SrtOption = False,
    pause: PauseOption = PAUSE_S,
    paragraph_pause: ParagraphPauseOption = PARAGRAPH_PAUSE_S,
    rolling: RollingOption = False,
    restart: RestartOption = False,
    keep_parts: KeepPartsOption = False,
    adapter: AdapterOption = None,
    guidance: GuidanceOption = 1.0,
) -> None:
    """Speak a text into a file, in the model's own voice or one that it makes up, a recording's or a stored one.

    A text of over 25 s, or of more than the weights keep up, of --text-file or with --srt is spoken by sentences; interrupted, it goes on.
    """
    with interruptible():
        written, language = read_text(text, text_file), choose_language(language)
        if show_text:
            return _show(written, language, normalise, None if model is None else Path(model))
        check_request(written, output or Path(DEFAULT_STEM + DEFAULT_SUFFIX), prompt_audio, prompt_text, voice)
        folder = model_folder(model)
        from kalle.cli.say_long import speak_long_to_file
        from kalle.synthesis.longform_part import LongFormOptions
        from kalle.synthesis.quirks import ReleaseQuirks

        language = language or _usual_language(written, folder)
        quirks = ReleaseQuirks.release() if release_exact else None
        options = LongFormOptions(
            language, normalise, pause, paragraph_pause, rolling=rolling,
            temperature=temperature, max_seconds=max_seconds, quirks=quirks, retries=retries, guidance=guidance,
        )  # fmt: skip
        words, why = plan(written, language, normalise, _longest_seconds(folder), from_file=text_file is not None, srt=srt)
        output = free_output(long=why is not None) if output is None else output
        check_files(output, long=why is not None, plot=plot, srt=srt)
        # The quirk of the precision rounds the weights itself, from fp32.
        kalle = load_model(folder, device, "float32" if release_exact and dtype == "auto" else dtype)
        chosen = adapted(kalle, choose_voice(kalle, prompt_audio, prompt_text, voice), adapter)
        if why is None:
            tell_without_effect(options, restart, keep_parts)
            single = (seed, temperature, max_seconds, quirks, retries, guidance)
            speak_to_file(kalle, words, output, chosen, *single, plot=plot, written=written)
            return
        speak_long_to_file(kalle, written, output, chosen, seed, options, why=why, srt=srt, restart=restart, keep_parts=keep_parts)


def plan(
    text: str, language: str | None, normalise: bool, longest_seconds: float | None, *, from_file: bool, srt: bool
) -> tuple[str, str | None]:
    """The words of a single request, and why the text is spoken sentence by sentence instead; None when it isn't.

    ``longest_seconds`` of speech at the usual pace are what the weights keep up; None for any length that one request allows.
    """
    from kalle.synthesis.longform_prompt import fits_one_request

    words = text
    if normalise and not (from_file or srt):
        from kalle.text.normalise import normalise as in_words

        result = in_words(text, language)
        words = result.text
        for warning in result.warnings:
            typer.echo(f"warning: {warning}", err=True)
    why = None
    if from_file:
        why = "it comes from a file"
    elif srt:
        why = "subtitles need the time of each"
    elif not fits_one_request(words):
        why = "it is too long for one request"
    elif not fits_one_request(words, longest_seconds):
        why = f"these weights keep up {longest_seconds:g} s in one request"
    return words, why


def tell_without_effect(options: LongFormOptions, restart: bool, keep_parts: bool) -> None:
    """Name on standard error what was given that only a text spoken sentence by sentence heeds."""
    given = {
        "--pause": options.pause_s != PAUSE_S,
        "--paragraph-pause": options.paragraph_pause_s != PARAGRAPH_PAUSE_S,
        "--rolling": options.rolling,
        "--restart": restart,
        "--keep-parts": keep_parts,
    }
    idle = ", ".join(option for option, differs in given.items() if differs)
    if idle:
        typer.echo(f"warning: without effect on a text that is spoken in one request: {idle}", err=True)


def check_request(text: str, output: Path, prompt_audio: Path | None, prompt_text: str | None, voice: str | None) -> None:
    """Refuse what needs no model to be seen wrong, before one is loaded."""
    from kalle.text.prompt import check_text

    check_text(text, "text")
    check_output(output)
    if voice is not None and (prompt_audio is not None or prompt_text is not None):
        raise UserError(f"two voices: got --voice '{voice}' and a prompt, expected one of them; leave one out")
    if prompt_text is not None and prompt_audio is None:
        raise UserError("a transcript without its recording: got --prompt-text and no --prompt-audio, expected both; give the recording")
    if prompt_audio is not None and not prompt_audio.is_file():
        raise UserError(f"audio file not found: got '{prompt_audio}', expected a recording; check --prompt-audio")


def check_files(output: Path, long: bool, plot: Path | None, srt: bool) -> None:
    """Refuse files that this kind of synthesis does not write."""
    if plot is not None and long:
        raise UserError("--plot draws a single request: got a text that is spoken sentence by sentence, expected a short one")
    if plot is not None:
        from kalle.evaluation.figures import check_image_path, new_figure

        check_image_path(plot)
        new_figure(100, 100)  # says so now where matplotlib is missing, not after the speech
    if srt and str(output) == STDIN:
        raise UserError("--srt writes beside the output: got standard output, expected a file; give -o FILE.wav")


def choose_voice(kalle: Kalle, prompt_audio: Path | None, prompt_text: str | None, voice: str | None) -> GivenVoice:
    """The voice asked for; None leaves it to the weight folder and the model, "random" to the seed."""
    from kalle.synthesis.voice import RANDOM_VOICE

    if voice == RANDOM_VOICE:
        return RANDOM_VOICE
    if voice is not None:
        return kalle.load_voice(voice)
    return None if prompt_audio is None else kalle.voice(prompt_audio, prompt_text)


def adapted(kalle: Kalle, voice: GivenVoice, adapter: Path | None) -> GivenVoice:
    """``voice`` with the adapter in a file instead of its own; without a voice ``kalle`` takes it for whatever voice the model chooses."""
    if adapter is None:
        return voice
    kalle.adapter = kalle.load_adapter(adapter)
    return voice if voice is None or isinstance(voice, str) else dataclasses.replace(voice, adapter=kalle.adapter)


def _longest_seconds(folder: Path | None) -> float | None:
    """What the weights in ``folder`` say that they keep up in one request."""
    from kalle.synthesis.folder import read_folder

    return read_folder(folder).longest_seconds if folder is not None and folder.is_dir() else None


def _usual_language(text: str, folder: Path | None) -> str | None:
    """The language that the weights in ``folder`` name as theirs, unless ``text`` has another's script; None leaves it to be guessed."""
    from kalle.synthesis.folder import read_folder
    from kalle.text.languages import language_in_its_script

    usual = read_folder(folder).language if folder is not None and folder.is_dir() else None
    return None if usual is None else language_in_its_script(text, usual)


def _show(text: str, language: str | None, normalise: bool, folder: Path | None) -> None:
    from kalle.text.prompt import check_text

    check_text(text, "text")
    typer.echo(show_text(text, language or _usual_language(text, folder), normalise, _longest_seconds(folder)))

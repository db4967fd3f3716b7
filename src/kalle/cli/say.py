"""`kalle say`: speak a text into a file, at once or sentence by sentence, continuing where an earlier run was interrupted."""

from __future__ import annotations

import io
import itertools
import json
import logging
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kalle.cli.main import INTERRUPTED
from kalle.cli.speaking import (
    SAY_FLAGS,
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
    model_folder,
    read_text,
    speaks,
    wordless,
)
from kalle.errors import UserError

if TYPE_CHECKING:
    from kalle.synthesis.kalle import Kalle
    from kalle.synthesis.longform import LongForm, Part
    from kalle.synthesis.longform_files import PartStore
    from kalle.synthesis.options import GenerationOptions
    from kalle.synthesis.speech import Speech
    from kalle.synthesis.voice import GivenVoice
    from kalle.synthesis.weights import FolderConfig

STDOUT = Path("-")
DEFAULT_STEM, DEFAULT_SUFFIX = "speech", ".wav"


@speaks(SAY_FLAGS)
def say(
    text: Annotated[str | None, typer.Argument(help="What to say; - reads it from standard input.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File to write: .wav, .flac, .mp3, .opus, .ogg; - is WAV on standard output.",
            show_default="a new speech.wav",
        ),
    ] = None,
    model: ModelOption = None,
    prompt_audio: PromptAudioOption = None,
    prompt_text: PromptTextOption = None,
    voice: VoiceOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    decoder_dtype: DecoderDtypeOption = "float32",
    quantize: QuantizeOption = "none",
    text_file: Annotated[
        Path | None, typer.Option(help="File with what to say, - for standard input; sentence by sentence, resumable.")
    ] = None,
    release_exact: Annotated[
        bool, typer.Option("--release-exact", help="Do everything as the release does, its oddities included; slower.")
    ] = False,
    show_text: Annotated[bool, typer.Option("--show-text", help="Show the text as it would be spoken, and speak nothing.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Figure of waveform, mel, spread and end divergence to write; short texts only.")
    ] = None,
    srt: Annotated[bool, typer.Option("--srt", help="Write subtitles beside the output; speaks sentence by sentence.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin a long text again, and forget the sentences of the last run.", hidden=True)
    ] = False,
    keep_parts: Annotated[
        bool, typer.Option("--keep-parts", help="Keep the folder with the sentences of a long text.", hidden=True)
    ] = False,
    play: Annotated[bool, typer.Option("--play", help="Play it when it is done; without -o no file is kept.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors alone.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what came of it as one JSON object.")] = False,
    *,
    options: GenerationOptions,
) -> None:
    """Speak a text into a file, in the model's own voice or one that it makes up, a recording's or a stored one.

    A text of over 25 s, or of more than the weights keep up, of --text-file or with --srt is spoken by sentences; resumable.
    """
    written = read_text(text, text_file)
    if release_exact:
        from kalle.synthesis.release_compat import ReleaseCompatibility

        options = options.changed(compatibility=ReleaseCompatibility.release())
    if show_text:
        facts = text_facts(written, options, model_folder(model), from_file=text_file is not None, srt=srt)
        return typer.echo(json.dumps(facts, ensure_ascii=False) if as_json else shown_text(facts))
    check_say_output(output or Path(DEFAULT_STEM + DEFAULT_SUFFIX))
    if play and output == STDOUT:
        raise UserError("two places to hear it: got -o - and --play, expected one of them; leave one out")
    check_before_loading(written, prompt_audio, prompt_text, voice, output)
    folder = model_folder(model, quiet=quiet)
    why = why_long(written, options, _config(folder), from_file=text_file is not None, srt=srt)
    with _place(output, play, long=why is not None) as place, _warnings_off(quiet):
        told = Told(place, output is not None or not play, play, quiet, as_json)
        check_files(place, long=why is not None, plot=plot, srt=srt)
        # The precision of the release is rounded to from fp32.
        kalle = load_model(folder, device, "float32" if release_exact and dtype == "auto" else dtype, quantize, decoder_dtype)
        chosen = choose_voice(kalle, prompt_audio, prompt_text, voice, adapter)
        if why is None:
            tell_without_effect(options, restart, keep_parts)
            speak_to_file(kalle, written, told, chosen, options, plot=plot)
        else:
            speak_long_to_file(kalle, written, told, chosen, options, why=why, srt=srt, restart=restart, keep_parts=keep_parts)
    return None


@dataclass(frozen=True)
class Told:
    """Where the audio goes, and how much is said of it."""

    output: Path
    """``STDOUT`` is standard output, which then has the audio alone."""
    kept: bool = True
    """Whether the file stays; one that is only played does not."""
    play: bool = False
    quiet: bool = False
    as_json: bool = False

    def notice(self, line: str) -> None:
        """Say ``line`` on standard error while the work goes on."""
        if not self.quiet:
            typer.echo(line, err=True)

    def result(self, lines: Iterable[str], facts: Mapping[str, Any]) -> None:
        """Say what came of it, as ``lines`` or as the JSON of ``facts``, and play it if requested."""
        if self.as_json:
            typer.echo(
                json.dumps({"output": str(self.output) if self.kept else None, **facts}, ensure_ascii=False), err=self.output == STDOUT
            )
        elif not self.quiet:
            typer.echo("\n".join(lines), err=self.output == STDOUT)
        if self.play:
            from kalle.cli.audio_output import play_any

            outcome, played = play_any(self.output)
            if not (played or self.kept):
                raise UserError(f"the audio could not be played and was not kept: {outcome}; give -o FILE, too")
            self.notice(outcome if played else f"{outcome}; the audio is in {self.output}")

    @property
    def wrote(self) -> str:
        """The line that names the file."""
        if self.output == STDOUT:
            return "wrote to standard output"
        return f"wrote {self.output}" if self.kept else "spoken, and not kept"


@contextmanager
def _warnings_off(quiet: bool) -> Iterator[None]:
    """Keep the library's warnings from the log, where ``quiet``."""
    logger = logging.getLogger("kalle")
    former = logger.level
    logger.setLevel(logging.ERROR if quiet else former)
    try:
        yield
    finally:
        logger.setLevel(former)


@contextmanager
def _place(output: Path | None, play: bool, long: bool) -> Iterator[Path]:
    """The file to write: ``output``, or a free one, or a temporary one where speech is only to be played."""
    if output is not None or not play:
        yield free_output(long) if output is None else output
        return
    with tempfile.TemporaryDirectory(prefix="kalle-") as folder:
        yield Path(folder) / (DEFAULT_STEM + DEFAULT_SUFFIX)


def why_long(text: str, options: GenerationOptions, config: FolderConfig, *, from_file: bool, srt: bool) -> str | None:
    """Why ``text`` is spoken sentence by sentence; None when it is spoken at once."""
    from kalle.synthesis.longform import why_by_sentences

    if from_file:
        return "it comes from a file"
    if srt:
        return "subtitles need the time of each"
    return why_by_sentences(config.words(text, options)[0], options, config.longest_seconds)


def tell_without_effect(options: GenerationOptions, restart: bool, keep_parts: bool) -> None:
    """Name on standard error what was given that only a text spoken sentence by sentence heeds."""
    usual = type(options)()
    fields = {"pause_s": "--pause", "paragraph_pause_s": "--paragraph-pause", "rolling": "--rolling"}
    given = {flag: getattr(options, name) != getattr(usual, name) for name, flag in fields.items()}
    given |= {"--restart": restart, "--keep-parts": keep_parts}
    idle = ", ".join(option for option, differs in given.items() if differs)
    if idle:
        typer.echo(f"warning: without effect on a text that is spoken in one request: {idle}", err=True)


def check_say_output(output: Path) -> None:
    """A UserError unless ``output`` can be written, by its suffix; - is standard output."""
    from kalle.audio import writable_kind

    if output != STDOUT:
        writable_kind(output)


def check_files(output: Path, long: bool, plot: Path | None, srt: bool) -> None:
    """Refuse files that this kind of synthesis does not write."""
    if plot is not None and long:
        raise UserError("--plot draws a single request: got a text that is spoken sentence by sentence, expected a short one")
    if plot is not None:
        from kalle.evaluation.figures import check_image_path, new_figure

        check_image_path(plot)
        new_figure(100, 100)  # says so now where matplotlib is missing, not after the speech
    if srt and output == STDOUT:
        raise UserError("--srt writes beside the output: got standard output, expected a file; give -o FILE.wav")


def subtitle_path(output: Path) -> Path:
    """The .srt beside ``output`` with its name; OUTPUT.srt where the former belongs to another file, such as a film or another format."""
    from kalle.audio import WRITABLE

    plain = output.with_suffix(".srt")
    others = [output.with_suffix(suffix) for suffix in WRITABLE if suffix != output.suffix]
    ours = output.exists() and not any(other.exists() for other in others)
    return plain if ours or not plain.exists() else output.with_name(f"{output.name}.srt")


def parts_folder(output: Path) -> Path:
    """Where the sentences of a long text for ``output`` are kept until all are there."""
    return output.with_name(output.name + ".parts")


def free_output(long: bool, folder: Path = Path()) -> Path:
    """The file for speech that was given none: speech.wav in ``folder``, or speech-2.wav and so on, the first that is not there.

    A ``long`` text takes one whose sentences are there, because a run was interrupted, so that the same command continues; no other may.
    """
    names = (f"{DEFAULT_STEM}{'' if number == 1 else f'-{number}'}{DEFAULT_SUFFIX}" for number in itertools.count(1))
    return next(path for path in map(folder.joinpath, names) if not path.exists() and (long or not parts_folder(path).exists()))


def speak_to_file(
    kalle: Kalle, text: str, told: Told, voice: GivenVoice, options: GenerationOptions, *, plot: Path | None = None
) -> Speech:
    """Speak ``text`` at once into the output of ``told`` and print what came of it; a UserError, and no file, when nothing was spoken.

    ``plot`` is a figure to write too.
    """
    started = time.perf_counter()
    speech = kalle.synthesize(text, voice, options=options.changed(by_sentences=False))
    elapsed = time.perf_counter() - started
    if not speech.frames:
        raise UserError(
            f"the model ended the speech before its first frame: got 0 frames with seed {speech.seed}, expected some; try another --seed"
        )
    if told.output == STDOUT:
        write_standard_output(wav_bytes(speech))
    else:
        speech.save(told.output)
    lines = [told.wrote, *say_lines(speech, elapsed), *(f"warning: {warning}" for warning in wordless(text))]
    if text != speech.text:
        lines.append(f"spoken as: {speech.text}")
    told.result(lines, speech_facts(speech, elapsed))
    if plot is not None:
        from kalle.evaluation.figures import save_speech_figure

        save_speech_figure(speech, plot)
        if not (told.quiet or told.as_json):
            typer.echo(f"plot: {plot}", err=told.output == STDOUT)
    return speech


def speech_facts(speech: Speech, elapsed_seconds: float) -> dict[str, Any]:
    """Return what --json prints of speech that was spoken at once."""
    attempts = [{"seed": each.seed, "stop_reason": each.stop_reason, "frames": each.frames, "kept": each.kept} for each in speech.attempts]
    return {
        "text": speech.text,
        "seconds": round(speech.seconds, 3),
        "sample_rate": speech.sample_rate,
        "frames": speech.frames,
        "stop_reason": speech.stop_reason,
        "seed": speech.seed,
        "confidence": round(speech.confidence, 4),
        "doubtful": speech.doubtful,
        "elapsed_seconds": round(elapsed_seconds, 3),
        "attempts": attempts,
        "warnings": list(speech.warnings),
    }


def say_lines(speech: Speech, elapsed_seconds: float) -> list[str]:
    """Return what `kalle say` prints of speech that was spoken at once, a fact a line; ``elapsed_seconds`` are those of synthesis."""
    endings = {
        "end": "end (the model ended the speech)",
        "max_frames": f"max_frames (cut at the length cap of {speech.max_frames} frames; allow more seconds or try another --seed)",
    }
    tries = ", ".join(f"seed {attempt.seed}: {attempt.stop_reason}" + (" (kept)" if attempt.kept else "") for attempt in speech.attempts)
    return [
        f"audio: {speech.seconds:.2f} s at {speech.sample_rate} Hz ({speech.frames} frames)",
        f"RTF = synthesis / audio = {elapsed_seconds:.2f} s / {speech.seconds:.2f} s = {elapsed_seconds / speech.seconds:.3f}",
        f"stop reason: {endings.get(speech.stop_reason, f'{speech.stop_reason} (try another --seed)')}",
        f"seed: {speech.seed}",
        f"confidence: {speech.confidence:.3f}",
        *([f"attempts: {len(speech.attempts)} ({tries})"] if len(speech.attempts) > 1 else []),
        *(f"warning: {warning}" for warning in speech.warnings),
    ]


def wav_bytes(speech: Speech) -> bytes:
    """A 16-bit WAV file of ``speech``."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, speech.pcm16(), speech.sample_rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def write_standard_output(content: bytes) -> None:
    """Write ``content`` to standard output; a UserError on a terminal, which it would garble."""
    _refuse_terminal()
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()


def _refuse_terminal() -> None:
    if sys.stdout.isatty():
        raise UserError("audio on a terminal: got -o -, expected a pipe or a file; redirect the output")


@dataclass
class LongResult:
    """The result of a run over a long text; its parts hold neither audio nor frames, so that a book fits in memory."""

    parts: list[Part] = field(default_factory=list)
    samples: int = 0
    elapsed_s: float = 0.0
    """Time that synthesis took in this run."""
    fresh_s: float = 0.0
    """Seconds of audio that were spoken in this run, pauses not included."""


def speak_long_to_file(
    kalle: Kalle,
    text: str,
    told: Told,
    voice: GivenVoice,
    options: GenerationOptions,
    *,
    why: str,
    srt: bool = False,
    restart: bool = False,
    keep_parts: bool = False,
) -> LongResult:
    """Speak ``text`` into the output of ``told`` and print what came of it; ``why`` says why sentence by sentence.

    The sentences go to a folder beside the output first, and from there on if a run was interrupted with the same text, voice, weights,
    seed and options; a UserError when they differ. Without a seed that run's is taken. Ctrl-C leaves with exit code 130.
    """
    from kalle.files import output_folder, write_atomic
    from kalle.synthesis.longform import LongForm
    from kalle.synthesis.longform_files import PartStore, settings_of, stored_seed

    output = told.output
    if output == STDOUT:
        return _long_to_standard_output(LongForm(kalle, text, voice, options), told, why)
    subtitles_to = subtitle_path(output) if srt else None
    with output_folder(output.parent):
        folder = parts_folder(output)
        _check_folder(folder, restart)
        seed = stored_seed(folder) if options.seed is None else options.seed
        long = LongForm(kalle, text, voice, options.changed(seed=seed))
        store = PartStore(folder, settings_of(long))
        try:
            with store.locked():
                spoken = _write(long, output, store, told, why)
                if subtitles_to is not None:
                    write_atomic(subtitles_to, subtitles(spoken.parts))
                if not keep_parts:
                    store.remove()
        except KeyboardInterrupt:
            kept = f"{store.count()} of {len(long)} sentences are kept in '{folder}'"
            typer.echo(f"error: interrupted; {kept}; run the same command again to continue", err=True)
            raise typer.Exit(INTERRUPTED) from None
    lines = [told.wrote, *([] if subtitles_to is None else [f"subtitles: {subtitles_to}"])]
    told.result(
        [*lines, *long_report(long, spoken)], long_facts(long, spoken) | {"subtitles": None if subtitles_to is None else str(subtitles_to)}
    )
    return spoken


def long_facts(long: LongForm, spoken: LongResult) -> dict[str, Any]:
    """Return what --json prints of a text that was spoken by sentences."""
    sentences = [
        {
            "text": part.sentence.spoken,
            "spoken": part.speech.text,
            "start_s": round(part.start_s, 3),
            "end_s": round(part.end_s, 3),
            "stop_reason": part.speech.stop_reason,
            "seed": part.speech.seed,
            "confidence": round(part.speech.confidence, 4) if part.speech.frames else None,
            "tries": part.tries,
            "warnings": list(part.warnings),
        }
        for part in spoken.parts
    ]
    return {
        "text": long.text,
        "seconds": round(spoken.samples / long.kalle.sample_rate, 3),
        "sample_rate": long.kalle.sample_rate,
        "seed": long.seed,
        "elapsed_seconds": round(spoken.elapsed_s, 3),
        "sentences": sentences,
        "unspoken": [gap for _, gap in long.unspoken],
    }


def subtitles(parts: list[Part]) -> str:
    """SubRip text of what was spoken, as written and when; a sentence of which nothing was spoken has no time and no subtitle."""
    from kalle.synthesis.longform_files import Cue, srt

    return srt(Cue(part.sentence.spoken, part.start_s, part.end_s) for part in _audible(parts))


def long_report(long: LongForm, spoken: LongResult) -> Iterator[str]:
    """The output for a long text, one fact a line."""
    from kalle.synthesis.longform import shortened

    parts, rate_hz = spoken.parts, long.kalle.sample_rate
    kept = sum(part.kept for part in parts)
    paragraphs = sum(part.sentence.ends_paragraph for part in parts)
    earlier = f", {kept} of them by an earlier run" if kept else ""
    yield f"audio: {spoken.samples / rate_hz:.2f} s at {rate_hz} Hz ({len(parts)} sentences, {paragraphs} paragraphs{earlier})"
    if spoken.fresh_s:
        ratio = spoken.elapsed_s / spoken.fresh_s
        of = f"({len(parts) - kept} sentences, no pauses)"
        yield f"RTF = synthesis / audio = {spoken.elapsed_s:.2f} s / {spoken.fresh_s:.2f} s = {ratio:.3f} {of}"
    reasons = Counter(part.speech.stop_reason for part in parts)
    yield "stop reasons: " + ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    yield f"seed: {long.seed}"
    yield f"confidence: {statistics.mean(part.speech.confidence if part.speech.frames else 0.0 for part in parts):.3f}"
    if long.options.rolling:
        yield f"prompted by the sentence before, too: {sum(part.rolled for part in parts)} of {len(parts)} sentences"
    again = sum(part.tries > 1 for part in parts)
    yield f"spoken more than once: {again} of {len(parts)} sentences"
    audible = _audible(parts)
    if audible:
        before, after = [part.loudness_db for part in audible], [part.loudness_db + part.gain_db for part in audible]
        spread = [statistics.pstdev(levels) for levels in (before, after)]
        yield f"loudness: {statistics.median(after):.1f} dBFS, standard deviation {spread[0]:.2f} dB evened to {spread[1]:.2f} dB"
    for part in parts:
        for warning in part.warnings:
            yield f"warning: sentence {part.index + 1} at {part.start_s:.1f} s ({part.short}): {warning}"
    for place, gap in long.unspoken:
        yield f"not spoken: {shortened(gap)} at character {place + 1}, without a letter or number"


def _write(long: LongForm, output: Path, store: PartStore | None, told: Told, why: str) -> LongResult:
    from kalle.audio import audio_writer
    from kalle.progress import progress_bar

    spoken = LongResult()
    told.notice(f"speaking {len(long)} sentences one by one, as {why}")
    with audio_writer(output, long.kalle.sample_rate) as append, progress_bar(not told.quiet) as bar:
        task = bar.add_task("sentences", total=len(long))
        parts = long.parts(store)
        while True:
            started = time.perf_counter()
            part = next(parts, None)
            if part is None:
                break
            if not part.kept:
                spoken.elapsed_s += time.perf_counter() - started
                spoken.fresh_s += part.speech.seconds
            append(part.with_pause)
            spoken.samples += len(part.audio) + part.pause_samples
            spoken.parts.append(_light(part))
            bar.advance(task)
        if not _audible(spoken.parts):
            raise UserError(
                f"nothing was spoken: got 0 frames for each sentence with seed {long.seed}, expected speech; try another --seed"
            )
    return spoken


def _light(part: Part) -> Part:
    """``part`` with views of one number for its audio and means, which keep only their shape."""
    import numpy as np

    speech, zero = part.speech, np.float32(0)
    small = replace(speech, audio=np.broadcast_to(zero, speech.audio.shape), means=np.broadcast_to(zero, speech.means.shape))
    return replace(part, speech=small)


def _audible(parts: list[Part]) -> list[Part]:
    import math

    return [part for part in parts if len(part.audio) and math.isfinite(part.loudness_db)]


def _long_to_standard_output(long: LongForm, told: Told, why: str) -> LongResult:
    """All of it into a temporary file first: a WAV begins with its length."""
    _refuse_terminal()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        spoken = _write(long, path, None, told, why)
        with path.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
        sys.stdout.buffer.flush()
    told.result([told.wrote, *long_report(long, spoken)], long_facts(long, spoken))
    return spoken


def _check_folder(folder: Path, restart: bool) -> None:
    """Refuse a folder of somebody else's; empty it for ``restart``."""
    from kalle.synthesis.longform_files import SETTINGS_NAME

    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / SETTINGS_NAME).is_file()):
        raise UserError(
            f"'{folder}' is in the way: expected no such path, or the sentences of an earlier run; remove it or choose another output"
        )
    if restart:
        shutil.rmtree(folder)


def _config(folder: Path | None) -> FolderConfig:
    """The settings for speaking that ``folder`` stores; the defaults where there is no folder."""
    from kalle.synthesis.weights import FolderConfig, read_weight_folder

    return FolderConfig() if folder is None else read_weight_folder(folder)


def text_facts(text: str, options: GenerationOptions, folder: Path | None, *, from_file: bool = False, srt: bool = False) -> dict[str, Any]:
    """``text`` as written, and each request of it as the weights in ``folder`` get it, with its place; loads no model."""
    from kalle.synthesis.options import fits_one_request
    from kalle.text.languages import Sentence, detect_language, split_sentences, unspoken
    from kalle.text.tokenizer import check_text

    check_text(text, "text")
    config = _config(folder)
    language = config.language_of(text, options)
    why = why_long(text, options, config, from_file=from_file, srt=srt)
    options = options.changed(language=language)
    if why is None:
        start = len(text) - len(text.lstrip())
        sentences = [Sentence(text.strip(), start, start + len(text.strip()), ends_paragraph=True)]
    else:
        sentences = split_sentences(text, language, lambda piece: fits_one_request(config.words(piece, options)[0], config.longest_seconds))
    requests = []
    for sentence in sentences:
        words, warnings = config.words(sentence.text, options)
        requests.append(
            {
                "start": sentence.start,
                "end": sentence.end,
                "text": sentence.spoken,
                "spoken": " ".join(words.split()),
                "warnings": [*warnings, *(["too long for one request, cut after these words"] if sentence.cut else [])],
                "ends_paragraph": sentence.ends_paragraph,
            }
        )
    return {
        "text": text,
        "language": language or detect_language(text),
        "language_guessed": language is None,
        "normalise": config.given_phonemes if options.normalise is None else options.normalise,
        "by_sentences": why,
        "requests": requests,
        "not_spoken": [{"start": place, "text": gap} for place, gap in unspoken(text, sentences)],
    }


def shown_text(facts: Mapping[str, Any]) -> str:
    """``text_facts`` for people."""
    requests = facts["requests"]
    lines = ["original:", facts["text"].strip("\n"), ""]
    lines += [f"language: {facts['language']}" + (" (guessed)" if facts["language_guessed"] else "")]
    lines += [f"normalisation: {'on (--no-normalise)' if facts['normalise'] else 'off (--normalise)'}"]
    why = facts["by_sentences"]
    lines += ["spoken: at once" if why is None else f"spoken: in {len(requests)} sentences, for {why}"]
    for number, request in enumerate(requests, start=1):
        lines.append(f"{number:4} [{request['start']}:{request['end']}] {request['text']}")
        lines += [f"     -> {request['spoken']}"] if request["spoken"] != request["text"] else []
        lines += [f"     warning: {warning}" for warning in request["warnings"]]
        lines += ["     (paragraph)"] if request["ends_paragraph"] and number < len(requests) else []
    lines += [f"not spoken: {gap['text']!r} at character {gap['start'] + 1}" for gap in facts["not_spoken"]]
    return "\n".join(lines)

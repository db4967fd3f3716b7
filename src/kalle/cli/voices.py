"""``kalle voices``: make, list, show, play and check voices."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kalle.cli.main import interruptible
from kalle.cli.speaking import DeviceOption, FolderOption, TemperatureOption, load_model, model_folder, renamed
from kalle.errors import UserError

if TYPE_CHECKING:
    from kalle.evaluation.similarity import VoiceSimilarity
    from kalle.synthesis.adapter import Adapter
    from kalle.synthesis.voice import Binding, StoredVoice, Voice

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode=None)

Out = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="FILE", help="Voice file to write; by default voices/NAME of the model, or NAME here for the one that ships."
    ),
]
Name = Annotated[str | None, typer.Option(help="What to call it; `kalle say --voice NAME` finds it in the weight folder.")]
Description = Annotated[str | None, typer.Option(help="A line for people.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite a voice that is there already.")]
Given = Annotated[str, typer.Argument(metavar="VOICE", help="Voice file, or the name of one in the weight folder.")]
PLAY_TEXTS = {"en": "Hello. This is what I sound like.", "zh": "你好，这是我的声音。"}
UNKNOWN = "-"
PIPE_WIDTH = 200
"""Columns of a table that no terminal will show."""
CHECK_OTHERS = 2
"""Random voices that `kalle voices check` compares with."""


@app.command()
def create(
    audio: Annotated[Path, typer.Option(metavar="FILE", help="Recording of the voice, best 2 to 20 seconds.")],
    text: Annotated[str | None, typer.Option(help="What is said in it, word for word; only a speaker encoder does without.")] = None,
    model: FolderOption = None,
    out: Out = None,
    name: Name = None,
    language: Annotated[str | None, typer.Option(help="ISO 639-1 code of what is said.")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of the recording.")] = None,
    consent: Annotated[str | None, typer.Option(help="What the speaker agreed to.")] = None,
    description: Description = None,
    seed: Annotated[int, typer.Option(help="Of the one draw of the prompt latents.")] = 0,
    force: Force = False,
    device: DeviceOption = "auto",
) -> None:
    """Make a voice from a recording."""
    with interruptible(), renamed({"(text)": "(--text)"}):
        named = chosen_name(name, out, audio.stem)
        from kalle.synthesis.options import checked_language

        language = checked_language(language)
        folder = model_folder(model)
        path = target(folder, out, named, force)
        if not audio.is_file():
            raise UserError(f"audio file not found: got '{audio}', expected a recording; check --audio")
        kalle = load_model(folder, device)
        voice = kalle.voice(audio, text, seed=seed, language=language or kalle.config.language, licence=licence, consent=consent)
        keep(voice, path, named, description, force)


@app.command()
def random(
    seed: Annotated[int, typer.Option(help="The same seed gives the same voice, with these weights, for ever.")],
    model: FolderOption = None,
    out: Out = None,
    name: Name = None,
    description: Description = None,
    force: Force = False,
    device: DeviceOption = "auto",
) -> None:
    """Make up a voice and keep it."""
    with interruptible():
        named = chosen_name(name, out, f"random-{seed}")
        folder = model_folder(model)
        path = target(folder, out, named, force)
        keep(load_model(folder, device).random_voice(seed), path, named, description, force)


@app.command("list")
def list_voices(
    files: Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", help="Voice files; the stored ones if none.")] = None,
    model: FolderOption = None,
) -> None:
    """Show every voice of a weight folder, damaged ones included."""
    from kalle.synthesis.voice import stored_voices, voice_files

    with interruptible():
        folder = model_folder(model)
        binding, problem = binding_of(folder)
        if problem is not None and not files:
            raise UserError(problem)
        paths = files or voice_files(folder)
        if not paths:
            typer.echo(
                f"no voices in '{folder}'; make one with `kalle voices create --audio FILE --text TEXT` or `kalle voices random --seed N`"
            )
            return
        print_table(stored_voices(paths, binding), default_voice(folder), binding is not None)


@app.command()
def show(voice: Given, model: FolderOption = None) -> None:
    """Print everything a voice file says, and whether it fits the weights."""
    from kalle.synthesis.voice import Voice, find_voice

    with interruptible():
        folder = model_folder(model)
        path = find_voice(folder, voice)
        binding, problem = binding_of(folder)
        typer.echo("\n".join(description_lines(Voice.load(path), path, folder, binding, problem)))


@app.command()
def play(
    voice: Given,
    model: FolderOption = None,
    text: Annotated[str | None, typer.Option(help="What to say.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Keep the audio here: .wav, .flac, .mp3, .opus, .ogg.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same speech.")] = 0,
    silent: Annotated[bool, typer.Option("--no-play", help="Only write the file.")] = False,
    device: DeviceOption = "auto",
) -> None:
    """Speak a short text in a voice and play it."""
    from kalle.cli.audio_output import play_any
    from kalle.cli.say import check_say_output
    from kalle.synthesis.voice import find_voice
    from kalle.text.tokenizer import check_text

    with interruptible():
        folder = model_folder(model)
        path = find_voice(folder, voice)
        check_text("-" if text is None else text, "text")
        if output is not None:
            check_say_output(output)
        kalle = load_model(folder, device)
        chosen = kalle.load_voice(path)
        spoken = text if text is not None else PLAY_TEXTS.get(chosen.language or "en", PLAY_TEXTS["en"])
        speech = kalle.synthesize(spoken, chosen, seed=seed)
        if not speech.frames:
            raise UserError(f"the voice said nothing: got 0 frames with seed {seed}, expected some; try another --seed")
        file = output or Path(tempfile.mkdtemp(prefix="kalle-")) / f"{path.stem}.wav"
        speech.save(file)
        typer.echo(f"spoke {speech.seconds:.2f} s with seed {seed} into {file}, stop reason: {speech.stop_reason}")
        if not silent:
            outcome, played = play_any(file)
            typer.echo(outcome if played else f"{outcome}; the audio is in {file}")


@app.command()
def check(
    voice: Annotated[str | None, typer.Argument(metavar="[VOICE]", help="As for show; without one, the random voice of --seed.")] = None,
    model: FolderOption = None,
    texts: Annotated[int, typer.Option(help="How many texts to speak.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the first text; the next ones count up from it.")] = 0,
    temperature: TemperatureOption = None,
    others: Annotated[int, typer.Option(help="Random voices to compare with.")] = CHECK_OTHERS,
    device: DeviceOption = "auto",
) -> None:
    """Measure whether a voice stays the same across texts."""
    from kalle.evaluation.similarity import check_texts, speaker_embedder, voice_similarity
    from kalle.synthesis.voice import find_voice

    with interruptible():
        folder = model_folder(model)
        path = None if voice is None else find_voice(folder, voice)
        embedder = speaker_embedder("ge2e")
        kalle = load_model(folder, device)
        chosen = kalle.random_voice(seed) if path is None else kalle.load_voice(path)
        contrast = {f"random voice {number}": kalle.random_voice(number) for number in range(seed + 1, seed + 1 + others)}
        said = check_texts(chosen.language, texts)
        result = voice_similarity(kalle, chosen, embedder, texts=said, others=contrast, seed=seed, temperature=temperature)
        typer.echo("\n".join(similarity_lines(voice or f"random voice {seed}", result)))


def target(model: Path, out: Path | None, name: str, force: bool) -> Path:
    """The file to write; a UserError for a bad name, or when it exists and may not be overwritten."""
    from kalle.checkpoint import in_package
    from kalle.synthesis.voice import SUFFIX, named_file, voice_path

    path = voice_path(model, name) if out is None else out
    if out is None:
        path = Path(path.name) if in_package(model) else path  # found there by its name, too
        path = named_file(path.parent, path.stem) or path  # an accent may be written otherwise there
    if path.suffix != SUFFIX:
        raise UserError(f"cannot write '{path}': got the suffix '{path.suffix}', expected {SUFFIX}; rename the voice file")
    if path.exists() and not force:
        raise taken(path)
    return path


def taken(path: Path) -> UserError:
    """The error for a voice that is there already."""
    return UserError(f"the voice '{path}' exists: expected a new one; choose another --name or --out, or overwrite it with --force")


def chosen_name(name: str | None, out: Path | None, default: str) -> str:
    """``name``, or what the file is called, or ``default``; a UserError for an empty one."""
    if name is not None and not name.strip():
        raise UserError(f"bad voice name: got {name!r}, expected some letters or digits; choose another --name or leave it out")
    return name or (out.stem if out is not None else default)


def keep(voice: Voice, path: Path, name: str, description: str | None, force: bool) -> None:
    """Save ``voice`` under its name and say so; without ``force`` a UserError when somebody made that file meanwhile."""
    named = dataclasses.replace(voice, name=name, description=description)
    if force:
        named.save(path)
    else:
        _save_new(named, path)
    length = "" if voice.seconds is None else f", {voice.seconds:.2f} s"
    typer.echo(f"wrote {path} ({voice.kind}{length})")


def _save_new(voice: Voice, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with renamed({str(temporary): str(path)}):
            voice.save(temporary)
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise taken(path) from None
        except OSError:  # a file system without hard links
            if path.exists():
                raise taken(path) from None
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def binding_of(model: Path) -> tuple[Binding | None, str | None]:
    """The hashes that voices must fit in ``model``, or None and the reason why they are not known."""
    from kalle.synthesis.voice import Binding

    try:
        return Binding.of_folder(model), None
    except UserError as error:
        return None, str(error)


def default_voice(model: Path) -> str | None:
    """The name of the folder's default voice; None also where the folder can't be read."""
    from kalle.synthesis.weights import read_weight_folder

    try:
        return read_weight_folder(model).voice
    except UserError:
        return None


def print_table(voices: Iterable[StoredVoice], default: str | None, compared: bool = True) -> None:
    """The list of voices on standard output; ``compared`` says whether there was a model to compare them with."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for heading in ("name", "language", "kind", "source", "seconds", "fits", "licence"):
        table.add_column(heading, overflow="fold")
    for stored in voices:
        table.add_row(*_row(stored, stored.name == default, compared))
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, markup=False, highlight=False).print(table)


def _row(stored: StoredVoice, default: bool, compared: bool) -> tuple[str, ...]:
    name = f"{stored.name} (default)" if default else stored.name
    voice = stored.voice
    if voice is None:
        return (name, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, f"damaged: {stored.problem}", UNKNOWN)
    seconds = UNKNOWN if voice.seconds is None else f"{voice.seconds:.1f}"
    fits = ("yes" if compared else "not known") if stored.problem is None else f"no: {stored.problem}"
    return (name, voice.language or UNKNOWN, voice.kind, _source(voice), seconds, fits, voice.licence or UNKNOWN)


def _source(voice: Voice) -> str:
    if voice.source == "random":
        return f"random {voice.seed}"
    return voice.source or UNKNOWN


def description_lines(voice: Voice, path: Path, model: Path, binding: Binding | None, problem: str | None) -> list[str]:
    """Everything ``voice`` says, a fact a line; ``problem`` is why ``binding`` is missing."""
    lines = [f"file: {path}", f"kind: {voice.kind}"]
    for name in ("name", "description", "source", "seed", "language", "text", "licence", "consent"):
        value = getattr(voice, name)
        lines.append(f"{name}: {UNKNOWN if value is None else value}")
    lines.append(f"seconds: {UNKNOWN if voice.seconds is None else f'{voice.seconds:.2f}'}")
    if voice.prompt_latents is not None:
        lines.append(f"prompt latents: {voice.prompt_latents.shape[0]} frames of {voice.prompt_latents.shape[1]} dimensions")
    if voice.speaker_latent is not None:
        lines.append(f"speaker latent: {voice.speaker_latent.shape[0]} dimensions")
    if voice.adapter is not None:
        lines += [f"adapter: {voice.adapter.description}", *adapter_lines(voice.adapter)]
    lines += [f"bound to {name}: {value}" for name, value in voice.bound_to.items()]
    if binding is None:
        return [*lines, f"fits: not known ({problem})"]
    reason = binding.problem(voice)
    return [*lines, f"fits {model}: {'yes' if reason is None else f'no: {reason}'}"]


def adapter_lines(adapter: Adapter) -> list[str]:
    """How an adapter was made and what that did, as its file says."""
    notes, lines = adapter.notes, []
    if "lr" in notes:
        lines.append(
            f"adapter made with: learning rate {notes['lr']:g}, seed {notes.get('seed')}, on {len(notes.get('texts', []))} recording(s)"
        )
    if notes.get("target_text"):
        lines.append(f"adapter made for the text: {notes['target_text']}")
    named = {
        "kl": "KL of the recording",
        "held_out_kl": "KL of another recording",
        "similarity": "similarity to the recording",
        "held_out_similarity": "similarity to another recording",
    }
    for name, words in named.items():
        if notes.get(name) is not None:
            before, after = (UNKNOWN if value is None else f"{value:.3f}" for value in (notes[name][end] for end in ("before", "after")))
            lines.append(f"{words}: {before} before, {after} with the adapter")
    return lines


def similarity_lines(name: str, result: VoiceSimilarity) -> list[str]:
    """The output of `kalle voices check`; every number is a cosine between speaker embeddings."""
    embedder = " ".join(str(value) for value in result.embedder.values())
    endings = ", ".join(f"{reason} {count}" for reason, count in sorted(result.stop_reasons.items()))
    lines = [
        f"voice: {name}",
        f"texts: {result.texts} spoken ({endings}), {result.failed} without usable audio",
        f"similarity among them: {result.among:.3f} (mean cosine of all pairs; lowest {result.among_lowest:.3f}; {embedder})",
    ]
    if result.to_prompt is not None:
        lines.append(f"similarity to the voice's prompt: {_cosine(result.to_prompt)}")
    lines += [f"contrast, similarity to {other}: {_cosine(cosine)}" for other, cosine in result.to_others.items()]
    return lines


def _cosine(value: float) -> str:
    return "it gave no usable audio" if math.isnan(value) else f"{value:.3f}"

"""A long text of `kalle say`: sentence by sentence into one file, going on where an earlier run was interrupted."""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import typer

from kalle.audio import audio_writer
from kalle.cli.main import INTERRUPTED
from kalle.cli.say_one import STDOUT, parts_folder
from kalle.errors import UserError
from kalle.files import output_folder, write_atomic
from kalle.progress import progress_bar
from kalle.synthesis.longform import LongForm
from kalle.synthesis.longform_part import LongFormOptions, Part
from kalle.synthesis.longform_store import SETTINGS_NAME, PartStore, settings_of, stored_seed
from kalle.synthesis.subtitles import Cue, srt

if TYPE_CHECKING:
    from kalle.synthesis.kalle import Kalle
    from kalle.synthesis.voice import GivenVoice


@dataclass
class Spoken:
    """What a run came to; its parts hold neither audio nor frames, so that a book fits in memory."""

    parts: list[Part] = field(default_factory=list)
    samples: int = 0
    elapsed_s: float = 0.0
    """Time that synthesis took in this run."""
    fresh_s: float = 0.0
    """Seconds of audio that were spoken in this run, pauses not included."""


def speak_long_to_file(
    kalle: Kalle,
    text: str,
    output: Path,
    voice: GivenVoice,
    seed: int | None,
    options: LongFormOptions,
    *,
    why: str,
    srt: bool = False,
    restart: bool = False,
    keep_parts: bool = False,
) -> Spoken:
    """Speak ``text`` into ``output`` and print what came of it; ``why`` says why sentence by sentence.

    The sentences go to a folder beside the output first, and from there on if a run was interrupted with the same text, voice, weights,
    seed and options; a UserError when they differ. Without ``seed`` that run's is taken. Ctrl-C leaves with exit code 130.
    """
    if output == STDOUT:
        return _to_standard_output(LongForm(kalle, text, voice, seed=seed, options=options), why)
    with output_folder(output.parent):
        folder = parts_folder(output)
        _check_folder(folder, restart)
        long = LongForm(kalle, text, voice, seed=stored_seed(folder) if seed is None else seed, options=options)
        store = PartStore(folder, settings_of(long))
        try:
            with store.locked():
                spoken = _write(long, output, store, why)
                if srt:
                    write_atomic(output.with_suffix(".srt"), subtitles(spoken.parts))
                if not keep_parts:
                    store.remove()
        except KeyboardInterrupt:
            kept = f"{store.count()} of {len(long)} sentences are kept in '{folder}'"
            typer.echo(f"error: interrupted; {kept}; run the same command again to go on", err=True)
            raise typer.Exit(INTERRUPTED) from None
    lines = [f"wrote {output}", *([f"subtitles: {output.with_suffix('.srt')}"] if srt else [])]
    typer.echo("\n".join([*lines, *report(long, spoken)]))
    return spoken


def subtitles(parts: list[Part]) -> str:
    """SubRip text of what was spoken, as written and when; a sentence of which nothing was spoken has no time and no subtitle."""
    return srt(Cue(part.sentence.spoken, part.start_s, part.end_s) for part in _heard(parts))


def report(long: LongForm, spoken: Spoken) -> Iterator[str]:
    """What is printed of a long text, one fact a line."""
    parts, rate_hz = spoken.parts, spoken.parts[0].sample_rate
    kept = sum(part.kept for part in parts)
    paragraphs = sum(part.sentence.ends_paragraph for part in parts)
    earlier = f", {kept} of them by an earlier run" if kept else ""
    yield f"audio: {spoken.samples / rate_hz:.2f} s at {rate_hz} Hz ({len(parts)} sentences, {paragraphs} paragraphs{earlier})"
    if spoken.fresh_s:
        ratio = spoken.elapsed_s / spoken.fresh_s
        of = f"({len(parts) - kept} sentences, no pauses)"
        yield f"RTF = synthesis / audio = {spoken.elapsed_s:.2f} s / {spoken.fresh_s:.2f} s = {ratio:.3f} {of}"
    yield "stop reasons: " + ", ".join(f"{count} {reason}" for reason, count in Counter(part.stop_reason for part in parts).most_common())
    yield f"seed: {long.seed}"
    yield f"confidence: {statistics.mean(part.confidence for part in parts):.3f}"
    if long.options.rolling:
        yield f"prompted by the sentence before, too: {sum(part.rolled for part in parts)} of {len(parts)} sentences"
    again = sum(part.tries > 1 for part in parts)
    yield f"spoken more than once: {again} of {len(parts)} sentences"
    heard = _heard(parts)
    if heard:
        before, after = [part.loudness_db for part in heard], [part.loudness_db + part.gain_db for part in heard]
        spread = [statistics.pstdev(levels) for levels in (before, after)]
        yield f"loudness: {statistics.median(after):.1f} dBFS, standard deviation {spread[0]:.2f} dB evened to {spread[1]:.2f} dB"
    for part in parts:
        for warning in part.warnings:
            yield f"warning: sentence {part.index + 1} at {part.start_s:.1f} s ({_short(part.sentence.spoken)}): {warning}"
    for place, gap in long.unspoken:
        yield f"not spoken: {_short(gap)} at character {place + 1}, without a letter or number"


def _write(long: LongForm, output: Path, store: PartStore | None, why: str) -> Spoken:
    spoken = Spoken()
    typer.echo(f"speaking {len(long)} sentences one by one, as {why}", err=True)
    with audio_writer(output, long.kalle.sample_rate) as append, progress_bar() as bar:
        task = bar.add_task("sentences", total=len(long))
        parts = long.parts(store)
        while True:
            started = time.perf_counter()
            part = next(parts, None)
            if part is None:
                break
            if not part.kept:
                spoken.elapsed_s += time.perf_counter() - started
                spoken.fresh_s += len(part.audio) / part.sample_rate
            append(part.with_pause)
            spoken.samples += len(part.audio) + part.pause_samples
            spoken.parts.append(_light(part))
            bar.advance(task)
        if not _heard(spoken.parts):
            raise UserError(
                f"nothing was spoken: got 0 frames for each sentence with seed {long.seed}, expected speech; try another --seed"
            )
    return spoken


def _light(part: Part) -> Part:
    """``part`` with one sample for its audio's length kept as a view, and no frames."""
    empty = np.broadcast_to(np.float32(0), part.audio.shape)
    return replace(part, audio=empty, latents=part.latents[:0].copy())


def _heard(parts: list[Part]) -> list[Part]:
    return [part for part in parts if len(part.audio) and np.isfinite(part.loudness_db)]


def _to_standard_output(long: LongForm, why: str) -> Spoken:
    """All of it into a temporary file first: a WAV begins with its length."""
    if sys.stdout.isatty():
        raise UserError("audio on a terminal: got -o -, expected a pipe or a file; redirect the output")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        spoken = _write(long, path, None, why)
        with path.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
        sys.stdout.buffer.flush()
    typer.echo("\n".join(["wrote to standard output", *report(long, spoken)]), err=True)
    return spoken


def _check_folder(folder: Path, restart: bool) -> None:
    """Refuse a folder of somebody else's; empty it for ``restart``."""
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / SETTINGS_NAME).is_file()):
        raise UserError(
            f"'{folder}' is in the way: expected no such path, or the sentences of an earlier run; remove it or choose another output"
        )
    if restart:
        shutil.rmtree(folder)


def _short(text: str, longest: int = 30) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= longest else line[: longest - 1] + "…")

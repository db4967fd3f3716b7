"""How voices are shown on a terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kalle.evaluation.similarity import VoiceSimilarity
    from kalle.synthesis.adapter import Adapter
    from kalle.synthesis.voice import Voice
    from kalle.synthesis.voice_store import Binding, StoredVoice

UNKNOWN = "-"
PIPE_WIDTH = 200
"""Columns of a table that no terminal will show."""


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
    """What `kalle voices check` prints; every number is a cosine between speaker embeddings."""
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

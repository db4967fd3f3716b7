"""One self-contained HTML page of a result, or of two systems side by side: tables, charts, and items to listen to, without a network."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import soundfile
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from numpy.typing import NDArray

from kalle.audio import Audio, read_audio
from kalle.errors import UserError
from kalle.evaluation.comparison import CEILING, Comparison, GateCheck, Run, named_apart, notes
from kalle.evaluation.intelligibility import Edit, Tokens, length_curve, row_alignment, sound_classes, sound_confusions, word_table
from kalle.evaluation.metrics import RATE_HZ
from kalle.evaluation.opinion import EMOTIONS, emotion_matrix, intended_emotion
from kalle.evaluation.word_errors import NORMALISERS
from kalle.files import is_file, write_atomic
from kalle.models.mel import LogMel, MelConfig

ASSETS = Path(__file__).parent / "assets"
COLOURS = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3")
HISTOGRAMS = 8
BUCKETS = 20
WORDS = 15
"""Words in each table of errors."""
MEL_RANGE = 8.0
"""Natural-log magnitudes below the loudest that the colours of a spectrogram span."""
IMAGE_QUALITY = 60
MP3_LEVEL = 0.8
"""libsndfile's compression level of the embedded audio, 0 to 1: about 4 kB a second."""
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 480, 220, 44, 34


@dataclass(frozen=True)
class PageOptions:
    """The choices of a page: what it shows, and how it holds the audio."""

    items: int = 20
    """Items to listen to: those with most errors, or those that differ most."""
    link_audio: bool = False
    """Link the wavs, relative to the page, in place of holding them: a small page that has to stay beside them."""
    audio_cap_mb: float = 4.0
    """Megabytes (10^6) of embedded audio; the page says how many items came after it was reached, and so have none."""


def write_page(
    path: str | Path,
    runs: Sequence[Run],
    comparisons: Sequence[Comparison] = (),
    checks: Sequence[GateCheck] = (),
    options: PageOptions | None = None,
) -> None:
    """Write ``page_html`` to ``path``, whole or not at all."""
    write_atomic(Path(path), page_html(runs, comparisons, checks, options, Path(path).parent))


def page_html(
    runs: Sequence[Run],
    comparisons: Sequence[Comparison] = (),
    checks: Sequence[GateCheck] = (),
    options: PageOptions | None = None,
    folder: Path | None = None,
) -> str:
    """The page of ``runs``: the systems of one result, or one of each of several results together with their ``comparisons``.

    ``folder`` is where the page will lie, for the links to the audio. Texts of the results are escaped, and the page asks for nothing from
    anywhere: its content policy allows data and files beside it alone. UserError where no run is given.
    """
    if not runs:
        raise UserError("nothing to show: got no run, expected at least one")
    page = _Page(
        list(runs) if len({run.name for run in runs}) == len(runs) else named_apart(runs), comparisons, options or PageOptions(), folder
    )
    environment = Environment(
        loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html").render(page.variables(), checks=checks)


def runs_of(data: Mapping[str, Any], folder: Path) -> list[Run]:
    """A run for each system of one results.json (``data``), named after the system, the recordings last."""
    systems = dict.fromkeys(row["system"] for row in data["rows"])
    ordered = sorted(systems, key=lambda system: system == CEILING)
    return [Run(system, folder, system, [row for row in data["rows"] if row["system"] == system], data) for system in ordered]


class _Page:
    """Collects what the template shows."""

    def __init__(self, runs: Sequence[Run], comparisons: Sequence[Comparison], options: PageOptions, folder: Path | None) -> None:
        self.runs, self.comparisons, self.options, self.folder = runs, comparisons, options, folder
        self.tokens = tokens_of(runs[0].data.get("metrics", {}).values())
        self.left_bytes = options.audio_cap_mb * 1e6
        self.without_audio = 0

    def variables(self) -> dict[str, Any]:
        data = self.runs[0].data
        names = " and ".join(run.name for run in self.runs if run.system != CEILING or len(self.runs) == 1)
        items, words = list(self.items()), list(self.words())
        confusions = [(run.name, title, _shaded(matrix)) for run in self.runs for title, matrix in _confusions(run)]
        confusions += [(own["name"], "Sounds heard for sounds", own["sounds"]) for own in words if own["sounds"] is not None]
        return {
            "title": f"{names} compared" if self.comparisons else f"Evaluation: {data.get('kind', '')}",
            "legend": [(run.name, COLOURS[index % len(COLOURS)]) for index, run in enumerate(self.runs)],
            "summary": self.summary(),
            "systems": [run.name for run in self.runs],
            "counts": [_counts(run) for run in self.runs],
            "comparisons": [(comparison, notes(comparison)) for comparison in self.comparisons],
            "histograms": list(self.histograms()),
            "curve": self.curve(),
            "words": words,
            "confusions": confusions,
            "items": items,
            "without_audio": self.without_audio,
            "cap_mb": self.options.audio_cap_mb,
            "facts": [(run.name, _facts(run)) for run in self._results()],
        }

    def _results(self) -> list[Run]:
        """One run of each results.json."""
        return list({id(run.data): run for run in reversed(self.runs)}.values())[::-1]

    def summary(self) -> list[dict[str, Any]]:
        """A row a metric, with a cell a system."""
        found = [run.data.get("summary", {}).get(run.system, {}) for run in self.runs]
        rows = []
        for name in dict.fromkeys(name for estimates in found for name in estimates):
            cells = [_estimate(estimates.get(name)) for estimates in found]
            better = {True: "lower", False: "higher"}.get(self.runs[0].data.get("lower_is_better", {}).get(name), "")  # type: ignore[arg-type]
            rows.append({"name": name, "better": better, "unit": self.runs[0].data.get("units", {}).get(name, ""), "cells": cells})
        return rows

    def histograms(self) -> Iterator[tuple[str, Markup]]:
        """A chart for each metric that is a mean of different values."""
        names = list(dict.fromkeys(name for run in self.runs for name in run.data.get("columns", {})))
        shown = 0
        for name in names:
            columns = [run.data["columns"].get(name, ()) for run in self.runs]
            values = [_column(run, own[0]) if len(own) == 1 else [] for run, own in zip(self.runs, columns, strict=True)]
            together = {round(value, 9) for own in values for value in own}
            if shown < HISTOGRAMS and len(together) > 2:
                shown += 1
                yield name, histogram(values)

    def curve(self) -> Markup | None:
        """Word errors against the length of the text."""
        points = [[(p.first, p.last, p.wer.value, p.wer.interval) for p in length_curve(run.rows)] for run in self.runs]
        return length_chart(points) if any(len(own) > 1 for own in points) else None

    def words(self) -> Iterator[dict[str, Any]]:
        """The errors by word of every run, and by class of sound where the front end is there and the texts are English."""
        for run in self.runs:
            english = all(row.get("language", "en") == "en" for row in run.rows)
            found = [edits for row in run.rows if (edits := row_alignment(row, self.tokens)) is not None]
            table = word_table(found, WORDS)
            if table.words or table.inserted:
                reader = self.reader if english else None
                classes = [] if reader is None else sound_classes(found, reader)
                sounds = None if reader is None else _shaded(_sounds(*sound_confusions(found, reader)))
                yield {"name": run.name, "table": table, "classes": classes, "sounds": sounds}

    @cached_property
    def reader(self) -> Any:
        """A function that reads an English word as phonemes; None without the front end."""
        from kalle.text.phonemes import PhonemeTokenizer

        try:
            tokenizer = PhonemeTokenizer.create()
        except UserError:
            return None
        return lambda word: "".join(piece.phonemes or "" for piece in tokenizer.pieces(word, "en"))

    def items(self) -> Iterator[dict[str, Any]]:
        """The items to listen to, each with its rows in every run."""
        by_item = [run.by_item() for run in self.runs]
        for item in self._chosen():
            rows = [(index, run, found[item]) for index, (run, found) in enumerate(zip(self.runs, by_item, strict=True)) if item in found]
            text = next(row["text"] for _, _, own in rows for row in own)
            shown = [self._shown(index, run, max(own, key=_errors)) for index, run, own in rows]
            yield {"id": item, "text": text, "rows": shown}

    def _chosen(self) -> list[str]:
        run, wanted = self.runs[0], self.options.items
        order = sorted(run.by_item().items(), key=lambda pair: -max(map(_errors, pair[1])))
        worst = [item for item, _ in order]
        if self.comparisons:
            one = self.comparisons[0].difference("wer_corpus", "wer_utt_mean") or next(iter(self.comparisons[0].differences), None)
            worst = list(dict.fromkeys([*([item.id for item in one.largest] if one is not None else []), *worst]))
        return worst[:wanted]

    def _shown(self, index: int, run: Run, row: Mapping[str, Any]) -> dict[str, Any]:
        path = _wav(run, row)
        audio = None if path is None else _read(path)
        numbers = [
            (name, f"{row[own[0]]:.3g}")
            for name, own in run.data.get("columns", {}).items()
            if len(own) == 1 and _is_number(row.get(own[0]))
        ]
        edits = row_alignment(row, self.tokens)
        return {
            "name": run.name,
            "colour": COLOURS[index % len(COLOURS)],
            "seed": row.get("seed"),
            "stop": row.get("stop_reason"),
            "error": row.get("error"),
            "numbers": numbers,
            "edits": None if edits is None else [_marked(edit) for edit in edits],
            "audio": None if audio is None or path is None else self._audio(path, audio),
            "image": None if audio is None else _image(audio),
        }

    def _audio(self, path: Path, audio: Audio) -> str | None:
        if self.options.link_audio:
            return quote(os.path.relpath(path, self.folder or Path.cwd()).replace(os.sep, "/"))
        data = _data_uri("audio/mpeg", _mp3(audio))
        if len(data) > self.left_bytes:
            self.without_audio += 1
            return None
        self.left_bytes -= len(data)
        return data


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _errors(row: Mapping[str, Any]) -> float:
    """How badly a row went, for the order of the items: a failure above all, then words that were not understood."""
    if "error" in row:
        return float("inf")
    return float(row.get("wer", row.get("mel_l1", 0.0)))


def tokens_of(described: Iterable[Mapping[str, Any]]) -> Tokens:
    """The normaliser of the unsuffixed WER columns, from what the metrics say of themselves."""
    names = [name for metric in described for name in metric.get("normalisers", ())]
    return NORMALISERS.get(names[0] if names else "", NORMALISERS["kalle_authors"])


def _counts(run: Run) -> dict[str, Any]:
    failed = [row for row in run.rows if "error" in row]
    seeds = max(map(len, run.by_item().values()))
    config = run.data.get("config", {})
    skipped = config.get("left_out") or {}
    errors: dict[str, int] = {}
    for row in run.rows:
        for metric in row.get("metric_errors", {}):
            errors[metric] = errors.get(metric, 0) + 1
    return {
        "name": run.name if seeds == 1 else f"{run.name} ({seeds} seeds an item)",
        "evaluated": len(run.rows) - len(failed),
        "failed": len(failed),
        "skipped": sum(skipped.values()),
        "why": "; ".join(f"{reason}: {count}" for reason, count in skipped.items()),
        "unscored": "; ".join(f"{metric}: {count}" for metric, count in errors.items()),
    }


def _facts(run: Run) -> list[tuple[str, str]]:
    """Models, settings, versions and notes, in words."""
    data = run.data
    facts = [(f"metric {name}", _pairs(described)) for name, described in data.get("metrics", {}).items()]
    facts += [("settings", _pairs(data.get("config", {}))), ("versions", _pairs(data.get("versions", {})))]
    return facts + [("note", str(note)) for note in data.get("notes", ())]


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _estimate(value: Mapping[str, Any] | None) -> dict[str, str]:
    if not value:
        return {"mean": "–", "interval": ""}
    interval = value.get("interval")
    return {"mean": f"{value['value']:.3f}", "interval": "{:.3f} to {:.3f}".format(*interval) if interval else ""}


def _column(run: Run, column: str) -> list[float]:
    return [float(row[column]) for row in run.rows if _is_number(row.get(column))]


def _marked(edit: Edit) -> dict[str, str]:
    return {"kind": edit.kind, "word": edit.word, "heard": edit.heard}


def _confusions(run: Run) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """By title ``true`` and ``predicted`` labels and ``values``, a row for each predicted label: of the metric ``emotion``."""
    labels = [name for name in EMOTIONS if any(intended_emotion(row["id"]) == name and f"emotion_{name}" in row for row in run.rows)]
    if labels:
        means, counts = emotion_matrix(run.rows, labels)
        yield (
            "Emotion, mean score",
            {"true": labels, "predicted": labels, "values": means, "unit": "mean probability; a column sums to 1"},
        )
        yield "Emotion, highest score", {"true": labels, "predicted": labels, "values": counts, "unit": "items"}


def _sounds(names: Sequence[str], counts: NDArray[np.int64]) -> dict[str, Any]:
    """``sound_confusions`` as shares of each sound that was to be said; the last column is of those that were added."""
    shares = counts / np.maximum(1, counts.sum(axis=0))
    said = [f"{name} ({count})" for name, count in zip(names, counts.sum(axis=0), strict=True)]
    return {
        "true": said,
        "predicted": names,
        "values": shares,
        "unit": "a column sums to 1; in brackets the sounds of the texts, and those added",
    }


def _shaded(matrix: Mapping[str, Any]) -> dict[str, Any]:
    values = np.asarray(matrix["values"], dtype=np.float64)
    top = float(values.max(initial=0.0)) or 1.0
    rows = [
        (label, [(f"{value:.2g}" if value < 1 else f"{value:g}", round(float(value) / top, 3)) for value in line])
        for label, line in zip(matrix["predicted"], values, strict=True)
    ]
    return {"true": matrix["true"], "rows": rows, "unit": matrix.get("unit", "")}


def _wav(run: Run, row: Mapping[str, Any]) -> Path | None:
    """The audio of ``row``: relative to the results, or to the working directory as paths that a user gave are."""
    wav = row.get("wav")
    return next((path for path in (run.folder / wav, Path(wav)) if is_file(path)), None) if wav else None


def _read(path: Path) -> Audio | None:
    try:
        return read_audio(path, RATE_HZ)
    except UserError:  # gone or damaged since it was scored; the page shows the rest
        return None


def _mp3(audio: Audio) -> bytes:
    """Mono MP3 at 16 kHz, which every browser plays."""
    buffer = io.BytesIO()
    soundfile.write(buffer, audio, RATE_HZ, format="MP3", subtype="MPEG_LAYER_III", compression_level=MP3_LEVEL)
    return buffer.getvalue()


def _image(audio: Audio) -> str | None:
    """The log-mel spectrogram as a JPEG; None for audio too short for a frame."""
    from matplotlib import colormaps
    from PIL import Image

    config = MelConfig(sample_rate=RATE_HZ)
    if len(audio) < config.n_fft:
        return None
    mel = LogMel(config)(torch.from_numpy(audio.copy())[None])[0].numpy()
    shades = np.clip((mel - mel.max()) / MEL_RANGE + 1, 0, 1)
    pixels = (colormaps["magma"](shades[::-1])[..., :3] * 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=IMAGE_QUALITY)
    return _data_uri("image/jpeg", buffer.getvalue())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def histogram(values: Sequence[Sequence[float]]) -> Markup:
    """Shares of items over `BUCKETS` equal ranges, as steps in one colour a system."""
    low, high = (function([value for own in values for value in own]) for function in (min, max))
    edges = np.linspace(low, high, BUCKETS + 1)
    shares = [np.histogram(own, edges)[0] / max(1, len(own)) for own in values]
    top = max(float(share.max()) for share in shares) or 1.0
    parts = []
    for index, share in enumerate(shares):
        if not len(values[index]):
            continue
        xs, ys = np.repeat(_x(edges, low, high), 2), np.concatenate([[0], np.repeat(share, 2), [0]])
        colour = COLOURS[index % len(COLOURS)]
        parts.append(_path(zip(xs, _y(ys, top), strict=True), colour, f'fill="{colour}" fill-opacity="0.15"'))
    return _chart(parts, [(edge, f"{edge:.3g}") for edge in (low, (low + high) / 2, high)], low, high, top, "share of items")


def length_chart(points: Sequence[Sequence[tuple[int, int, float, tuple[float, float] | None]]]) -> Markup:
    """Word error rate with its interval for each range of words, at equal distances; a point is (first, last, rate, interval)."""
    ranges = sorted({first for own in points for first, *_ in own})
    lasts = {first: max(last for own in points for start, last, *_ in own if start == first) for first in ranges}
    top = max((interval or (0, rate))[1] for own in points for _, _, rate, interval in own) or 1.0
    high, parts = max(1, len(ranges) - 1), []
    for index, own in enumerate(points):
        colour = COLOURS[index % len(COLOURS)]
        x = _x(np.array([ranges.index(first) for first, *_ in own], dtype=np.float64), -0.2, high + 0.2) + 5 * index
        parts.append(_path(zip(x, _y(np.array([rate for _, _, rate, _ in own]), top), strict=True), colour, 'fill="none"'))
        for at, (_, _, rate, interval) in zip(x, own, strict=True):
            low_y, high_y = _y(np.array(interval or (rate, rate)), top)
            parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{low_y:.1f}" y2="{high_y:.1f}" stroke="{colour}"/>')
            parts.append(f'<circle cx="{at:.1f}" cy="{_y(np.array([rate]), top)[0]:.1f}" r="3.5" fill="{colour}"/>')
    ticks = [(index, f"{first}" if first == lasts[first] else f"{first}–{lasts[first]}") for index, first in enumerate(ranges)]
    return _chart(parts, ticks, -0.2, high + 0.2, top, "errors per word")


def _x(values: Any, low: float, high: float) -> Any:
    return _LEFT + (values - low) / ((high - low) or 1.0) * (_WIDTH - _LEFT - 16)


def _y(values: Any, top: float) -> Any:
    return _HEIGHT - _BOTTOM - values / top * (_HEIGHT - _BOTTOM - 18)


def _path(points: Any, colour: str, more: str) -> str:
    return f'<path d="M{" L".join(f"{x:.1f} {y:.1f}" for x, y in points)}" stroke="{colour}" stroke-width="1.6" {more}/>'


def _chart(parts: Sequence[str], ticks: Sequence[tuple[float, str]], low: float, high: float, top: float, label: str) -> Markup:
    """``parts`` in a frame with ``ticks`` below and 0, half and ``top`` at the left; ``label`` names the left axis."""
    lines = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">']
    for share in (0.0, 0.5, 1.0):
        y = float(_y(share * top, top))
        lines.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        lines.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{share * top:.2g}</text>')
    lines += [f'<text x="{_x(at, low, high):.1f}" y="{_HEIGHT - 14}" text-anchor="middle">{escape(said)}</text>' for at, said in ticks]
    lines.append(f'<text x="{_LEFT}" y="12">{escape(label)}</text>')
    return Markup("".join([*lines, *parts, "</svg>"]))

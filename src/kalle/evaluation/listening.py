"""Listening tests: a blinded page for naturalness (MOS) or likeness of the speaker (SMOS), and the scores of what listeners send back."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray

from kalle.audio import load_mono, rms_dbfs, write_audio
from kalle.errors import UserError
from kalle.evaluation.comparison import RESULTS_NAME, read_run, some
from kalle.files import is_file, parse_json, write_atomic

ASSETS = Path(__file__).parent / "assets"
Kind = Literal["mos", "smos"]
SCALE = tuple(half / 2 for half in range(2, 11))
"""1 to 5 in half points."""
LABELS: Mapping[str, Mapping[float, str]] = {
    "mos": {5: "excellent", 4: "good", 3: "fair", 2: "poor", 1: "bad"},
    "smos": {5: "surely the same", 4: "probably the same", 3: "undecided", 2: "probably different", 1: "surely different"},
}
QUESTIONS: Mapping[str, str] = {
    "mos": "How natural does this speech sound? Judge the speech alone, not its words or the quality of the microphone.",
    "smos": "How much does the speaker of the sample sound like that of the reference? Judge the voice, not the words or the quality.",
}
LEVEL_DBFS = -26.0
"""Root mean square of every stimulus; a peak never exceeds 1, so a very spiky one stays below."""
SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus")
COLUMNS = ("test", "kind", "listener", "stimulus", "score", "position", "plays", "rated_at")
"""Of the CSV that the page exports."""
RESAMPLES = 2000
Table = NDArray[np.float64]


@dataclass(frozen=True)
class ListeningConfig:
    """A test before it is made."""

    systems: Mapping[str, str | Path]
    """Name -> folder of ID.wav, or a folder that `kalle evaluate` wrote; two or more, or one for absolute scores."""
    out: str | Path
    """Gets page/ (for the listeners) and key.json (not for them: it says which stimulus is whose)."""
    kind: Kind = "mos"
    items: int | None = None
    """Items of each system, drawn from ``seed`` among those that all systems have; None is all."""
    seed: int = 0
    """Of the draw of items, the names of the stimuli, and together with a listener's name of the order."""
    references: str | Path | None = None
    """For "smos": folder with ID.wav, the recording to compare each item with."""
    title: str = "Listening test"
    same_level: bool = True
    """Bring every stimulus to `LEVEL_DBFS`; otherwise louder may count as better."""


def make(config: ListeningConfig) -> dict[str, Any]:
    """Write the page and the key of a test, and return the key: test, kind, seed, systems, items, and system and item of each stimulus.

    Stimuli are mono FLAC under names that tell nothing; every listener rates all of them once, in an order of their own. UserError for a
    system without audio, for systems that share no item, and for "smos" without the references.
    """
    if config.kind not in get_args(Kind):
        raise UserError(f"kind: got '{config.kind}', expected one of {', '.join(get_args(Kind))}")
    if (config.kind == "smos") != (config.references is not None):
        raise UserError(f"kind={config.kind}: got references {config.references}, expected some for smos and none for mos")
    found = {name: stimuli(folder) for name, folder in config.systems.items()}
    references = stimuli(config.references) if config.references is not None else None
    items = _drawn(found if references is None else {**found, "the references": references}, config.items, config.seed)
    page = Path(config.out) / "page"
    if (page / "index.html").exists():
        raise UserError(f"'{config.out}' holds a test already: expected another folder, for ratings of one do not fit the other")
    key: dict[str, Any] = {"kind": config.kind, "seed": config.seed, "title": config.title, "systems": list(found), "items": items}
    key["stimuli"] = {_blind(config.seed, name, item): {"system": name, "item": item} for name in found for item in items}
    key["test"] = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    trials = []
    for stimulus, whose in sorted(key["stimuli"].items()):
        trial = {"stimulus": stimulus, "audio": _copied(found[whose["system"]][whose["item"]], page, stimulus, config.same_level)}
        # Trials of one item are kept apart in the order, so the page must know which belong together, and no more.
        trial["group"] = _blind(config.seed, "group", whose["item"])
        if references is not None:
            name = _blind(config.seed, "reference", whose["item"])
            trial["reference"] = _copied(references[whose["item"]], page, name, config.same_level)
        trials.append(trial)
    # Without the seed, from which the hidden names could be guessed.
    data = {name: key[name] for name in ("test", "kind")} | {"trials": trials, "columns": COLUMNS, "scale": SCALE}
    environment = Environment(
        loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    labels = [(score, LABELS[config.kind].get(score, "")) for score in SCALE]
    html = environment.get_template("listening.html").render(
        title=config.title, question=QUESTIONS[config.kind], labels=labels, data=data, reference=references is not None
    )
    write_atomic(Path(config.out) / "key.json", json.dumps(key, indent=2, ensure_ascii=False) + "\n")
    write_atomic(page / "index.html", html)
    return key


def stimuli(folder: str | Path) -> dict[str, Path]:
    """The audio of each item in ``folder``: of a result of `kalle evaluate` the first of each item, else files named after their item."""
    root = Path(folder)
    if (root / RESULTS_NAME).is_file():
        found: dict[str, Path] = {}
        for row in read_run(root).rows:
            paths = [root / row["wav"], Path(row["wav"])] if row.get("wav") else []
            for path in (path for path in paths if is_file(path)):
                found.setdefault(row["id"], path)
    else:
        files = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
        found = {path.relative_to(root).with_suffix("").as_posix(): path for path in files}
        if len(found) < len(files):
            raise UserError(f"'{folder}' has one item in two formats: expected one file an item; remove the other")
    if not found:
        raise UserError(f"no audio in '{folder}': expected ID.wav for each item, or a folder that `kalle evaluate` wrote; check the path")
    return found


def _drawn(found: Mapping[str, Mapping[str, Path]], count: int | None, seed: int) -> list[str]:
    shared = sorted(set.intersection(*(set(paths) for paths in found.values())))
    if not shared or (count is not None and not 0 < count <= len(shared)):
        sizes = ", ".join(f"{name} has {len(paths)}" for name, paths in found.items())
        wanted = "at least one" if count is None else f"{count}"
        raise UserError(
            f"items: got {len(shared)} that all share ({sizes}), expected {wanted}; give folders of the same items, or fewer items"
        )
    if count is None:
        return shared
    return sorted(shared[index] for index in np.random.default_rng(seed).choice(len(shared), count, replace=False))


def _blind(seed: int, *words: str) -> str:
    return hashlib.sha256(json.dumps([seed, *words]).encode()).hexdigest()[:16]


def _copied(source: Path, page: Path, name: str, same_level: bool) -> str:
    """Copy ``source`` to the page under ``name``; returns its address there."""
    address = f"audio/{name}.flac"
    if not (page / address).exists():
        audio, rate_hz = load_mono(source)
        level = rms_dbfs(audio)
        if same_level and np.isfinite(level):
            audio = audio * np.float32(min(10 ** ((LEVEL_DBFS - level) / 20), 1 / max(float(np.abs(audio).max()), 1e-9)))
        write_audio(page / address, audio, rate_hz)
    return address


@dataclass(frozen=True)
class SystemScore:
    """The ratings that listeners gave one system.

    ``mean`` is over all ratings, ``interval`` its 95% interval over resampled listeners and items together (both vary), ``half`` the usual
    1.96 standard errors of independent ratings, which published tables state as "±" and which is too narrow where a listener rates many.
    ``normalised`` and its interval are the same after each listener's ratings were shifted and scaled to the mean and spread of all: it
    takes away who is generous and who is strict.
    """

    system: str
    ratings: int
    mean: float
    interval: tuple[float, float]
    half: float
    normalised: float
    normalised_interval: tuple[float, float]


@dataclass(frozen=True)
class ListeningScore:
    """The outcome of a test."""

    test: str
    kind: str
    listeners: Sequence[str]
    systems: Sequence[SystemScore]
    differences: Sequence[Mapping[str, Any]]
    """Every other system minus the first: ``system``, ``difference`` and its 95% ``interval``, over resampled listeners and items."""
    missing: int
    """Ratings that listeners left out."""
    repeated: int
    """Ratings that a later one of the same listener replaced."""


def score(key: str | Path | Mapping[str, Any], ratings: Sequence[str | Path], seed: int = 0) -> ListeningScore:
    """The scores of every system from the CSV files that listeners sent, with the key of the test (key.json or its content).

    UserError for a file of another test, for a stimulus that the test does not have, and for a score that is off the scale.
    """
    if not isinstance(key, Mapping):
        key = _read_key(Path(key))
    given, repeated = _read_ratings(key, [Path(path) for path in ratings])
    listeners = sorted({listener for listener, _ in given})
    systems, items = list(key["systems"]), list(key["items"])
    table = np.full((len(systems), len(listeners), len(items)), np.nan)
    for (listener, stimulus), value in given.items():
        whose = key["stimuli"][stimulus]
        table[systems.index(whose["system"]), listeners.index(listener), items.index(whose["item"])] = value
    normal = normalised(table)
    drawn = resampled([table, normal], seed)
    found = []
    for index, system in enumerate(systems):
        own = table[index][np.isfinite(table[index])]
        if not len(own):
            raise UserError(f"no ratings of {system}: expected at least one; add the files of more listeners")
        half = float(1.96 * own.std(ddof=1) / np.sqrt(len(own))) if len(own) > 1 else float("nan")
        intervals = [interval(values[:, index]) for values in drawn]
        means = float(own.mean()), float(np.nanmean(normal[index]))
        found.append(SystemScore(system, len(own), means[0], intervals[0], half, means[1], intervals[1]))
    differences = [
        {"system": system, "difference": found[index].mean - found[0].mean, "interval": interval(drawn[0][:, index] - drawn[0][:, 0])}
        for index, system in enumerate(systems)
        if index
    ]
    return ListeningScore(key["test"], key["kind"], listeners, found, differences, int(np.isnan(table).sum()), repeated)


def normalised(table: Table) -> Table:
    """(systems, listeners, items) with each listener's ratings at the mean and the standard deviation of all; NaN stays.

    A listener who gave one score alone gets the mean of all.
    """
    mean, spread = np.nanmean(table), np.nanstd(table)
    own_mean, own_spread = np.nanmean(table, axis=(0, 2), keepdims=True), np.nanstd(table, axis=(0, 2), keepdims=True)
    return np.asarray((table - own_mean) / np.where(own_spread > 0, own_spread, 1.0) * spread + mean)


def resampled(tables: Sequence[Table], seed: int, resamples: int = RESAMPLES) -> list[Table]:
    """(resamples, systems) means of each table over listeners and items drawn with replacement, the same for all tables and systems."""
    generator = np.random.default_rng(seed)
    _, listeners, items = tables[0].shape
    drawn: list[list[Table]] = [[] for _ in tables]
    for _ in range(resamples):
        chosen = np.ix_(np.arange(tables[0].shape[0]), generator.integers(listeners, size=listeners), generator.integers(items, size=items))
        for values, table in zip(drawn, tables, strict=True):
            part = table[chosen]
            present = np.isfinite(part)
            count = present.sum(axis=(1, 2))
            values.append(np.where(present, part, 0).sum(axis=(1, 2)) / np.where(count > 0, count, np.nan))
    return [np.array(values) for values in drawn]


def interval(values: Table) -> tuple[float, float]:
    """The 95% percentile interval of resampled means."""
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def _read_key(path: Path) -> Mapping[str, Any]:
    try:
        key = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"no key: '{path}' cannot be read ({error}); give the key.json that `kalle listening make` wrote") from None
    if not {"test", "kind", "systems", "items", "stimuli"} <= key.keys():
        raise UserError(f"not a key: '{path}' lacks its entries; give the key.json that `kalle listening make` wrote")
    return key


def _read_ratings(key: Mapping[str, Any], paths: Sequence[Path]) -> tuple[dict[tuple[str, str], float], int]:
    """The last rating by (listener, stimulus), and how many earlier ones it replaced."""
    rows = [row for path in paths for row in _read_csv(path)]
    if not rows:
        raise UserError("no ratings: expected the CSV files that listeners sent; give at least one")
    for path, row in rows:
        if row["test"] != key["test"]:
            raise UserError(f"'{path}' is of another test: got {row['test']}, expected {key['test']}; give the key of that test")
        if row["stimulus"] not in key["stimuli"]:
            raise UserError(f"'{path}' rates what is not in the test: got {row['stimulus']}; give the file as the page exported it")
    given: dict[tuple[str, str], float] = {}
    for path, row in sorted(rows, key=lambda pair: pair[1]["rated_at"]):
        try:
            value = float(row["score"])
        except ValueError:
            value = float("nan")
        if value not in SCALE:
            raise UserError(f"'{path}': got the score '{row['score']}', expected one of {some([f'{s:g}' for s in SCALE], len(SCALE))}")
        given[row["listener"], row["stimulus"]] = value
    return given, len(rows) - len(given)


def _read_csv(path: Path) -> list[tuple[Path, dict[str, str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows, names = list(reader), set(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read the ratings '{path}' ({error}); give the CSV file that the page exported") from None
    if not set(COLUMNS) <= names or any(None in row.values() for row in rows):
        raise UserError(f"not ratings: '{path}' lacks columns or cells of {', '.join(COLUMNS)}; give the CSV file that the page exported")
    return [(path, row) for row in rows]


def as_json(found: ListeningScore) -> dict[str, Any]:
    """All of it as JSON's types."""
    return asdict(found)


def markdown(found: ListeningScore) -> str:
    """A table: a row a system; then the differences from the first, and how it was counted."""
    name = found.kind.upper()
    lines = [f"| system | ratings | {name} | 95% interval | ± of independent ratings | {name}, listeners normalised | 95% interval |"]
    lines.append("|---|---|---|---|---|---|---|")
    for s in found.systems:
        cells = [
            s.system,
            s.ratings,
            f"{s.mean:.2f}",
            _range(s.interval),
            f"{s.half:.2f}",
            f"{s.normalised:.2f}",
            _range(s.normalised_interval),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines.append("")
    lines += [
        f"- {d['system']} minus {found.systems[0].system}: {d['difference']:+.2f} [{_range(d['interval'])}]" for d in found.differences
    ]
    lines.append(f"- {len(found.listeners)} listeners; {found.missing} ratings missing, {found.repeated} replaced by a later one")
    lines.append(f"- intervals from {RESAMPLES} resamples of listeners and items; normalised: every listener at the mean and spread of all")
    return "\n".join(lines) + "\n"


def _range(interval: tuple[float, float]) -> str:
    return "{:.2f} to {:.2f}".format(*interval)

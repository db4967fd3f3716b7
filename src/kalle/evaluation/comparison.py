"""Results of `kalle evaluate` compared item by item: a paired bootstrap of every number, and a gate for releasing weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kalle.errors import UserError
from kalle.files import parse_json

RESULTS_NAME = "results.json"
CEILING = "recording"
"""The system that is no candidate: the list's own recordings."""
LEVEL = 0.05
"""A difference is called shown where its p-value, corrected for the number of metrics, is below this; intervals hold one minus it."""
PROTOCOL = ("prompts", "aligned", "min_words", "language", "resampling")
"""Settings of a run that decide what its numbers mean; a voice, a temperature and seeds are what is compared."""
NO_PART_OF_A_METRIC = frozenset({"device", "threads", "workers", "cpu_threads", "batch_size"})
NAMED = 5
"""Names in a message, of a list that may be long."""
BLOCK = 2**20
"""Resampled items held in memory at once."""
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """One system of one results.json; ``rows`` are those of that system."""

    name: str
    folder: Path
    system: str
    rows: Sequence[Mapping[str, Any]]
    data: Mapping[str, Any]
    """All that the file holds."""

    def by_item(self) -> dict[str, list[Mapping[str, Any]]]:
        """The rows of each item, one for each seed, in the order of the list."""
        return rows_by_item(self.rows)

    def values(self, columns: Sequence[str]) -> dict[str, tuple[float, ...]]:
        """``item_means`` of the rows."""
        return item_means(self.rows, columns)

    def failed(self) -> list[str]:
        """Items of which not one seed could be made or read."""
        return [item for item, rows in self.by_item().items() if all("error" in row for row in rows)]

    def failed_seeds(self) -> list[str]:
        """Items of which some seeds, and not all, could not be made or read."""
        return [item for item, rows in self.by_item().items() if 0 < sum("error" in row for row in rows) < len(rows)]


def rows_by_item(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of one system by the id of their item, in order of first appearance."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["id"], []).append(row)
    return found


def item_means(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """For every item the mean over its seeds of each of ``columns``; items without a row of finite numbers in all are left out.

    Summaries and comparisons resample these, for the seeds of an item are no independent items.
    """
    found = {}
    for item, own in rows_by_item(rows).items():
        complete = [[row[column] for column in columns] for row in own if all(_is_finite(row.get(column)) for column in columns)]
        if complete:
            found[item] = tuple(np.mean(np.asarray(complete, dtype=np.float64), axis=0).tolist())
    return found


def _is_finite(value: object) -> bool:
    """Whether ``value`` is a number that a mean can hold; JSON has numbers of any size, and Python writes NaN."""
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        return False


def read_run(path: str | Path, system: str | None = None) -> Run:
    """The result in the folder, or the results.json, ``path``; ``system`` None is the first that is not the recordings themselves.

    UserError for a file that is missing, damaged, or of another program, for a system that it lacks, and for items that it holds twice.
    """
    file = Path(path) / RESULTS_NAME if Path(path).is_dir() else Path(path)
    try:
        data = parse_json(file.read_bytes())
    except OSError:
        raise UserError(f"no result: got '{path}', expected a folder that `kalle evaluate` wrote, or its {RESULTS_NAME}") from None
    except ValueError as error:
        raise UserError(f"damaged result: '{file}' is not JSON ({error}); run the evaluation again") from None
    rows, columns = data.get("rows"), data.get("columns")
    named = isinstance(rows, list) and all(
        isinstance(row, dict) and {str} == {type(row.get(key)) for key in ("id", "system")} for row in rows
    )
    if not named or not isinstance(columns, dict) or not all(isinstance(names, list) for names in columns.values()):
        raise UserError(
            f"not a result of this version: '{file}' lacks rows or columns; run the same `kalle evaluate` again, scores are kept"
        )
    systems: list[str] = list(dict.fromkeys(row["system"] for row in data["rows"]))
    chosen = system if system is not None else next((name for name in systems if name != CEILING), None)
    if chosen is None or chosen not in systems:
        raise UserError(f"no such system in '{file}': got {chosen}, expected one of {', '.join(systems) or 'none'}; give another system")
    rows = [row for row in data["rows"] if row["system"] == chosen]
    twice = [item for (item, _), count in Counter((row["id"], str(row.get("seed"))) for row in rows).items() if count > 1]
    if twice:
        raise UserError(f"repeated items in '{file}': got {some(twice)} more than once with one seed, expected each once; score it again")
    return Run(file.resolve().parent.name if file.name == RESULTS_NAME else file.stem, file.parent, chosen, rows, data)


@dataclass(frozen=True)
class ItemDifference:
    """One item under one metric; ``difference`` is ``b`` minus ``a``."""

    id: str
    a: float
    b: float
    difference: float


@dataclass(frozen=True)
class Difference:
    """One number of both runs over the ``items`` that both have; ``difference`` is ``b`` minus ``a``.

    ``interval`` is the 95% percentile interval of the difference over resampled items, ``p`` two-sided and recentred (see
    ``paired_bootstrap``), ``p_holm`` corrected for the number of metrics (Holm 1979). All three are None below two items.
    """

    metric: str
    lower_is_better: bool | None
    items: int
    a: float
    b: float
    difference: float
    interval: tuple[float, float] | None
    p: float | None
    p_holm: float | None
    largest: Sequence[ItemDifference]
    only_a: Sequence[str] = ()
    """Items of both runs that have this number in ``a`` alone, and so no part in the comparison."""
    only_b: Sequence[str] = ()

    @property
    def worse_by(self) -> float:
        """The difference in the direction that is worse; negative for an improvement."""
        return self.difference if self.lower_is_better else -self.difference

    @property
    def verdict(self) -> str:
        """ "better", "worse" or "different" (a metric without a direction) for ``b``; "not shown" where the items do not tell."""
        if self.p_holm is None or self.p_holm >= LEVEL:
            return "not shown"
        if self.lower_is_better is None:
            return "different"
        return "worse" if self.worse_by > 0 else "better"


@dataclass(frozen=True)
class Pairing:
    """Which items of two runs were compared; every list holds ids."""

    matched: int
    only_a: Sequence[str]
    only_b: Sequence[str]
    failed_a: Sequence[str]
    """In both lists, but not one seed of it could be made or read in ``a``."""
    failed_b: Sequence[str]
    seeds_a: int
    seeds_b: int
    """Most seeds of an item; they are averaged before items are compared."""
    failed_seeds_a: Sequence[str] = ()
    """Items that are compared by fewer seeds than were spoken, because some could not be made or read."""
    failed_seeds_b: Sequence[str] = ()


@dataclass(frozen=True)
class Comparison:
    """Run ``b`` against run ``a``, item by item."""

    a: str
    b: str
    pairing: Pairing
    differences: Sequence[Difference]
    left_out: Sequence[str]
    """Metrics that only one of both has, or that share no item."""
    disagreements: Sequence[str]
    """The differences between the protocols, recognisers or normalisers; not empty only with ``force``."""
    resamples: int
    seed: int

    def difference(self, *metrics: str) -> Difference | None:
        """The first of ``metrics`` that was compared."""
        found = {difference.metric: difference for difference in self.differences}
        return next((found[metric] for metric in metrics if metric in found), None)


def compare(
    first: str | Path | Run,
    *others: str | Path | Run,
    system: str | None = None,
    resamples: int = 10_000,
    seed: int = 0,
    largest: int = 10,
    force: bool = False,
) -> list[Comparison]:
    """Each of ``others`` against ``first``, by every number that both have, on the items that both have.

    A run is a folder that `kalle evaluate` wrote, its results.json, or a ``Run``; ``system`` as in ``read_run``. Items are matched by id
    and the seeds of an item averaged. ``largest`` items of each metric with the largest differences are kept.

    UserError where the runs share no item, and where protocol, recogniser, normaliser, model of a metric or texts differ, which makes
    numbers incomparable; ``force`` compares them all the same, and the result says what differs.
    """
    if not others:
        raise UserError("nothing to compare with: got one run, expected at least two")
    if resamples < 1:
        raise UserError(f"resamples: got {resamples}, expected at least 1")
    runs = named_apart([run if isinstance(run, Run) else read_run(run, system) for run in (first, *others)])
    return [_compared(runs[0], other, resamples, seed, largest, force) for other in runs[1:]]


def named_apart(runs: Sequence[Run]) -> list[Run]:
    """``runs`` with names that tell them apart: the folder, with its parent's name where two are equal, else with a number."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{run.folder.resolve().parent.name}/{run.name}" for run in runs]
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names, 1)]
    return [Run(name, run.folder, run.system, run.rows, run.data) for name, run in zip(names, runs, strict=True)]


def _compared(a: Run, b: Run, resamples: int, seed: int, largest: int, force: bool) -> Comparison:
    found = disagreements(a, b)
    if found and not force:
        raise UserError(
            f"not comparable: {a.name} and {b.name} differ in {'; '.join(found)}; score both alike, or compare them all the same with force"
        )
    paired = pairing(a, b)
    if not paired.matched:
        raise UserError(f"nothing to compare: {a.name} and {b.name} share no item id; score both on the same list")
    names = [name for name in a.data["columns"] if name in b.data["columns"]]
    differences = [d for name in names if (d := _difference(name, a, b, resamples, seed, largest)) is not None]
    compared = {difference.metric for difference in differences}
    every = dict.fromkeys([*a.data["columns"], *b.data["columns"]])
    measured = [name for name in every if any(name in run.data.get("summary", {}).get(run.system, {}) for run in (a, b))]
    left_out = [name for name in measured if name not in compared]
    return Comparison(a.name, b.name, paired, _corrected(differences), left_out, found, resamples, seed)


def disagreements(a: Run, b: Run) -> list[str]:
    """The facts that make the numbers of two runs incomparable."""
    found = []
    kinds = [run.data.get("kind") for run in (a, b)]
    if kinds[0] != kinds[1] and "reconstruction" in kinds:
        found.append(f"kind ({kinds[0]}, {kinds[1]})")
    settings = [run.data.get("config", {}) for run in (a, b)]
    found += [f"{key} ({x}, {y})" for key, x, y in _unequal(*settings) if key in PROTOCOL]
    metrics = [run.data.get("metrics", {}) for run in (a, b)]
    for name in metrics[0].keys() & metrics[1].keys():
        # What one of them does not tell was measured by another version, which may have heard otherwise.
        told = dict.fromkeys([*metrics[0][name], *metrics[1][name]], "not told")
        found += [f"metrics.{name}.{key} ({x}, {y})" for key, x, y in _unequal(told | metrics[0][name], told | metrics[1][name])]
    texts = [{row["id"]: row.get("text") for row in run.rows} for run in (a, b)]
    other = [item for item in texts[0] if item in texts[1] and texts[0][item] != texts[1][item]]
    if other:
        found.append(f"the texts of {len(other)} items ({some(other)})")
    return sorted(found)


def _unequal(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in sorted((a.keys() & b.keys()) - NO_PART_OF_A_METRIC):
        if a[key] != b[key]:
            yield key, a[key], b[key]


def some(names: Sequence[str], most: int = NAMED) -> str:
    """``names`` in one line, the rest counted."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def pairing(a: Run, b: Run) -> Pairing:
    """Which items both runs have, which only one has, and which failed in one."""
    items_a, items_b = a.by_item(), b.by_item()
    both = [item for item in items_a if item in items_b]
    failed_a, failed_b = ([item for item in run.failed() if item in set(both)] for run in (a, b))
    failed = {*failed_a, *failed_b}
    return Pairing(
        matched=sum(item not in failed for item in both),
        only_a=[item for item in items_a if item not in items_b],
        only_b=[item for item in items_b if item not in items_a],
        failed_a=failed_a,
        failed_b=failed_b,
        seeds_a=max(map(len, items_a.values())),
        seeds_b=max(map(len, items_b.values())),
        failed_seeds_a=[item for item in a.failed_seeds() if item in items_b],
        failed_seeds_b=[item for item in b.failed_seeds() if item in items_a],
    )


def _difference(name: str, a: Run, b: Run, resamples: int, seed: int, largest: int) -> Difference | None:
    values_a, values_b = a.values(a.data["columns"][name]), b.values(b.data["columns"][name])
    items = [item for item in values_a if item in values_b]
    table_a, table_b = np.array([values_a[item] for item in items]), np.array([values_b[item] for item in items])
    if not items or (table_a.shape[1] == 2 and min(table_a[:, 1].sum(), table_b[:, 1].sum()) <= 0):
        return None
    made = a.by_item().keys() & b.by_item().keys() - {*a.failed(), *b.failed()}
    interval, p = paired_bootstrap(table_a, table_b, resamples, seed)
    total_a, total_b = float(_rates(table_a.sum(axis=0))), float(_rates(table_b.sum(axis=0)))
    if table_a.shape[1] == 1:
        total_a, total_b = total_a / len(items), total_b / len(items)
    return Difference(
        metric=name,
        lower_is_better=a.data.get("lower_is_better", {}).get(name),
        items=len(items),
        a=total_a,
        b=total_b,
        difference=total_b - total_a,
        interval=interval,
        p=p,
        p_holm=p,
        largest=_largest(items, _rates(table_a), _rates(table_b), largest),
        only_a=[item for item in values_a if item in made and item not in values_b],
        only_b=[item for item in values_b if item in made and item not in values_a],
    )


def _rates(table: Values) -> Values:
    """The one column of (..., 1), or the quotient of the two of (..., 2); NaN where the divisor is 0."""
    if table.shape[-1] == 1:
        return table[..., 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(table[..., 1] > 0, table[..., 0] / table[..., 1], np.nan)


def _largest(items: Sequence[str], a: Values, b: Values, count: int) -> list[ItemDifference]:
    size = np.nan_to_num(np.abs(b - a))
    order = [index for index in np.argsort(-size, kind="stable")[:count] if size[index] > 0]
    return [ItemDifference(items[index], float(a[index]), float(b[index]), float(b[index] - a[index])) for index in order]


def paired_bootstrap(a: Values, b: Values, resamples: int = 10_000, seed: int = 0) -> tuple[tuple[float, float] | None, float | None]:
    """95% interval of the difference ``b`` - ``a``, and its two-sided p-value, over items drawn with replacement (both runs alike).

    ``a``, ``b``: (items, 1), whose means are compared, or (items, 2), whose quotients of sums are, such as errors over words. The interval
    is the percentile interval. The p-value is the share of resampled differences that lie as far from the observed one as that lies from 0
    (Efron and Tibshirani 1993, chapter 16: the bootstrap distribution shifted to the null hypothesis), never below 1 / (resamples + 1).
    Below two items both are None. Resamples whose divisors sum to 0 are left out; where none is left, both are None.
    """
    assert a.shape == b.shape, f"got {a.shape} and {b.shape}"
    items, generator = len(a), np.random.default_rng(seed)
    if items < 2:
        return None, None
    tables = np.concatenate([a, b], axis=1)
    observed = _resampled(tables.mean(axis=0)[None])[0]
    drawn = []
    for start in range(0, resamples, block := max(1, BLOCK // items)):
        index = generator.integers(items, size=(min(block, resamples - start), items))
        drawn.append(_resampled(np.stack([column[index].mean(axis=1) for column in tables.T], axis=1)))
    differences = np.concatenate(drawn)
    differences = differences[np.isfinite(differences)]
    if not len(differences):
        return None, None
    low, high = np.percentile(differences, [100 * LEVEL / 2, 100 * (1 - LEVEL / 2)])
    # Rounding makes equal numbers differ in their last digits; a run against itself must have p = 1.
    rounding = 1e-12 * max(1.0, abs(observed))
    extreme = int(np.count_nonzero(np.abs(differences - observed) >= abs(observed) - rounding))
    return (float(low), float(high)), (1 + extreme) / (1 + len(differences))


def _resampled(means: Values) -> Values:
    half = means.shape[1] // 2
    return _rates(means[:, half:]) - _rates(means[:, :half])


def _corrected(differences: Sequence[Difference]) -> list[Difference]:
    """With ``p_holm``: the k-th smallest p-value of m times m - k + 1, never below a smaller one's (Holm 1979)."""
    order = sorted((d for d in differences if d.p is not None), key=lambda d: d.p or 0.0)
    corrected: dict[str, float] = {}
    highest = 0.0
    for rank, difference in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * (difference.p or 0.0)))
        corrected[difference.metric] = highest
    return [Difference(**{**vars(d), "p_holm": corrected.get(d.metric)}) for d in differences]


@dataclass(frozen=True)
class GateRules:
    """When new weights may replace old ones."""

    wer_margin: float | None = None
    """None: fails where WER is shown to be worse (the 95% interval lies above 0). A number, in errors per word: passes only where WER is
    shown not to rise by more, for few items show nothing."""
    sim_drop: float | None = 0.01
    """Speaker similarity may fall by this much, on average; None does not ask for it."""


@dataclass(frozen=True)
class GateCheck:
    """One rule of the gate and its outcome, in words."""

    rule: str
    passed: bool
    found: str


def gate(comparison: Comparison, rules: GateRules | None = None, of: str = "") -> list[GateCheck]:
    """The outcome of every rule for run ``b``; a number that is missing fails, for a gate that measured nothing must not open.

    ``of`` names the set of items in front of each rule: "veto" for the real voices.
    """
    rules, failed = rules or GateRules(), comparison.pairing.failed_b
    lost = [*comparison.pairing.only_a, *(item for item in failed if item not in comparison.pairing.failed_a)]
    checks = [GateCheck("every item is there", not lost, _counted(lost, "missing or failed"))]
    numbers = [comparison.difference("wer_corpus", "wer_utt_mean"), comparison.difference("sim") if rules.sim_drop is not None else None]
    unscored = list(dict.fromkeys(item for number in numbers if number is not None for item in number.only_a))
    unscored += [item for item in comparison.pairing.failed_seeds_b if item not in comparison.pairing.failed_seeds_a]
    checks.append(
        GateCheck("every item is scored", not unscored, _counted(unscored, "without a number that was measured before, or a seed"))
    )
    checks.append(_wer_check(comparison.difference("wer_corpus", "wer_utt_mean"), rules.wer_margin))
    if rules.sim_drop is not None:
        sim = comparison.difference("sim")
        rule = f"speaker similarity falls by at most {rules.sim_drop:g}"
        passed = sim is not None and sim.difference >= -rules.sim_drop - 1e-12
        checks.append(GateCheck(rule, passed, _said(sim) if sim is not None else "sim was not measured in both"))
    return [GateCheck(f"{of}: {check.rule}" if of else check.rule, check.passed, check.found) for check in checks]


def _counted(items: Sequence[str], said: str) -> str:
    return f"{len(items)} {said}" + (f": {some(items)}" if items else "")


def _wer_check(wer: Difference | None, margin: float | None) -> GateCheck:
    rule = "WER is not shown to be worse" if margin is None else f"WER is shown to rise by no more than {margin:g}"
    if wer is None or wer.interval is None:
        return GateCheck(rule, False, "no WER of two items or more in both")
    return GateCheck(rule, wer.interval[0] <= 0 if margin is None else wer.interval[1] <= margin, _said(wer))


def _said(difference: Difference) -> str:
    interval = "" if difference.interval is None else " [{:+.4f}, {:+.4f}]".format(*difference.interval)
    return f"{difference.metric} {difference.a:.4f} -> {difference.b:.4f}, {difference.difference:+.4f}{interval}, {difference.items} items"


def as_json(comparisons: Sequence[Comparison], checks: Sequence[GateCheck] = ()) -> dict[str, Any]:
    """All of it as JSON's types."""
    found = [asdict(c) | {"differences": [asdict(d) | {"verdict": d.verdict} for d in c.differences]} for c in comparisons]
    passed = {"passed": all(check.passed for check in checks), "checks": [asdict(check) for check in checks]} if checks else None
    return {"comparisons": found, "gate": passed}


def notes(comparison: Comparison) -> list[str]:
    """Notes beside the numbers: items that were not compared, and what differs."""
    paired, a, b = comparison.pairing, comparison.a, comparison.b
    lines = [
        f"{paired.matched} items compared; intervals and p-values from {comparison.resamples} resamples of items, seed {comparison.seed}"
    ]
    if max(paired.seeds_a, paired.seeds_b) > 1:
        lines.append(f"seeds averaged for each item: {paired.seeds_a} in {a}, {paired.seeds_b} in {b}")
    for said, items in (
        (f"only in {a}", paired.only_a),
        (f"only in {b}", paired.only_b),
        (f"failed in {a}", paired.failed_a),
        (f"failed in {b}", paired.failed_b),
        (f"failed with some of their seeds in {a}", paired.failed_seeds_a),
        (f"failed with some of their seeds in {b}", paired.failed_seeds_b),
        *((f"have {', '.join(metrics)} in {run} alone", items) for run, items, metrics in _unmeasured(comparison)),
    ):
        lines += [f"{len(items)} items {said}: {some(items)}"] if items else []
    lines += [f"not compared, one run lacks them: {', '.join(comparison.left_out)}"] if comparison.left_out else []
    lines += [f"compared although they differ in {fact}" for fact in comparison.disagreements]
    return lines


def _unmeasured(comparison: Comparison) -> Iterator[tuple[str, tuple[str, ...], list[str]]]:
    """By run and items, the metrics that these items have in this run alone."""
    for run, side in ((comparison.a, "only_a"), (comparison.b, "only_b")):
        found: dict[tuple[str, ...], list[str]] = {}
        for difference in comparison.differences:
            found.setdefault(tuple(getattr(difference, side)), []).append(difference.metric)
        yield from ((run, items, metrics) for items, metrics in found.items() if items)


def markdown(comparisons: Sequence[Comparison], checks: Sequence[GateCheck] = (), texts: Mapping[str, str] | None = None) -> str:
    """Tables for a page: a row a metric, the items that differ most in WER or else in the first metric, and the gate."""
    lines = []
    for comparison in comparisons:
        lines += [f"# {_cell(comparison.b)} against {_cell(comparison.a)}", ""]
        lines += ["| metric | items | a | b | b - a | 95% interval | p | p, Holm | b is |", "|---|---|---|---|---|---|---|---|---|"]
        for d in comparison.differences:
            interval = "–" if d.interval is None else "{:+.4f} to {:+.4f}".format(*d.interval)
            cells = [d.metric, d.items, f"{d.a:.4f}", f"{d.b:.4f}", f"{d.difference:+.4f}", interval, _p(d.p), _p(d.p_holm), d.verdict]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        lines += ["", *(f"- {_cell(note)}" for note in notes(comparison)), ""]
        shown = comparison.difference("wer_corpus") or next(iter(comparison.differences), None)
        if shown is not None and shown.largest:
            lines += [f"Largest differences in {shown.metric}:", "", "| item | a | b | b - a | text |", "|---|---|---|---|---|"]
            for item in shown.largest:
                text = _cell((texts or {}).get(item.id, ""))
                lines.append(f"| {_cell(item.id)} | {item.a:.3f} | {item.b:.3f} | {item.difference:+.3f} | {text} |")
            lines.append("")
    if checks:
        lines += [f"# Gate: {'passed' if all(check.passed for check in checks) else 'failed'}", ""]
        lines += [f"- {'pass' if check.passed else 'FAIL'}: {_cell(check.rule)} ({_cell(check.found)})" for check in checks]
    return "\n".join(lines).rstrip() + "\n"


def _cell(text: str) -> str:
    """``text`` without what would end a cell or a line of a Markdown table, or start markup."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def _p(p: float | None) -> str:
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def terminal(comparisons: Sequence[Comparison], checks: Sequence[GateCheck] = ()) -> str:
    """The same for a terminal of 80 columns."""
    lines = []
    for comparison in comparisons:
        lines.append(f"{comparison.b} (b) against {comparison.a} (a)")
        width = max([len(d.metric) for d in comparison.differences] + [len("metric")])
        lines.append(f"{'metric':<{width}}{'a':>7}{'b':>7}{'b - a':>8}{'95% interval':>18}{'p':>8} b is")
        for d in comparison.differences:
            interval = "–" if d.interval is None else "{:+.3f} to {:+.3f}".format(*d.interval)
            lines.append(f"{d.metric:<{width}}{d.a:>7.3f}{d.b:>7.3f}{d.difference:>+8.3f} {interval:>17}{_p(d.p):>8} {d.verdict}")
        lines += ["", *(f"note: {note}" for note in notes(comparison)), ""]
    lines += [f"gate: {'pass' if check.passed else 'FAIL'}: {check.rule} ({check.found})" for check in checks]
    return "\n".join(lines).rstrip()

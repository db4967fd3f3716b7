"""Score weights by every recipe of evaluation that runs with what packages hold, and write the page of their scores.

    python recipes/evaluate_all.py ckpt/kalle-nano runs/all --page docs/results/kalle-nano.md
    python recipes/evaluate_all.py ckpt/kalle-nano runs/all --against FOLDER --page docs/results/kalle-nano.md

The embedded recordings stand for the public sets (`at_hand.py`), and small models for those of the protocols, so no number is comparable
with a published one. With --against, other weights speak the same lists and `kalle compare` compares the two, item by item. What was scored
is kept: run it again after an interruption. OUT/listening holds a blinded page on which people rate the same speech, where two systems or
recordings of its sentences are there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from at_hand import CHAPTER, librispeech, seed_tts

from kalle.cli.stages import Stages, recipe_main
from kalle.errors import UserError
from kalle.evaluation.comparison import Comparison, GateRules, compare, gate, notes
from kalle.evaluation.listening import ListeningConfig, make
from kalle.evaluation.run import weights_digest
from kalle.files import write_atomic

LISTENED = ("cross_sentence", "seed_tts_en")
"""The first of these that was run is what people listen to; the list of the other has no recordings of its sentences."""
HERE = Path(__file__).resolve().parent
SPOKEN = ("wer_utt_mean", "wer_corpus", "sim", "distillmos", "no_end_rate", "early_stop_rate", "repetition_rate")
COPIED = ("stoi", "pesq_wb", "pesq_nb", "sim", "distillmos", "mcd", "mel_l1")
ADAPT_STEPS = 50
"""With more, small weights predict another recording of the speaker worse (recipes/adapt)."""
NOT_RUN = """- [seed_tts_eval](../../recipes/seed_tts_eval/README.md) zh and hard: no weights here speak Chinese.
- [emotion](../../recipes/emotion/README.md): no package holds the weights of emotion2vec+.
- Whisper-large-v3, Paraformer, WavLM-large and UTMOS, the models of the protocols: no package holds theirs."""


@dataclass(frozen=True)
class Recipe:
    """A recipe with the words that its run.sh takes for weights and an output folder, and the numbers that its table shows."""

    name: str
    title: str
    arguments: Callable[[Path, Path, Path], list[str]]
    """(data, weights, out) to the arguments of run.sh."""
    metrics: tuple[str, ...]
    folder: str


RECIPES = (
    Recipe(
        "seed_tts_en",
        "Cloning, as the Seed-TTS test set",
        lambda data, model, out: ["en", str(data / "seedtts_testset"), f"model={model}", str(out)],
        SPOKEN,
        "seed_tts_eval",
    ),
    Recipe(
        "seed_tts_adapted",
        f"The same with test-time training, {ADAPT_STEPS} steps",
        lambda data, model, out: ["en", str(data / "seedtts_testset"), f"adapt={model}", str(out)],
        SPOKEN,
        "seed_tts_eval",
    ),
    Recipe(
        "continuation",
        "Continuation of three seconds",
        lambda data, model, out: ["continuation", str(data / "test-clean"), str(model), str(out)],
        SPOKEN,
        "librispeech_cloning",
    ),
    Recipe(
        "cross_sentence",
        "Another sentence of the same speaker",
        lambda data, model, out: ["cross", str(data / "test-clean"), str(model), str(out)],
        SPOKEN,
        "librispeech_cloning",
    ),
    Recipe(
        "reconstruction",
        "The Flow-VAE alone",
        lambda data, model, out: [str(data / "test-clean"), str(model), str(out)],
        COPIED,
        "librispeech_reconstruction",
    ),
    Recipe(
        "stress",
        "Texts that synthesis fails on, in the default voice",
        lambda data, model, out: [f"model={model}", str(out)],
        SPOKEN,
        "stress",
    ),
)


def score(recipe: Recipe, data: Path, model: Path, out: Path, seeds: int, known: Path | None) -> None:
    """Run ``recipe``; the scores of the recordings are those of the result in ``known``."""
    words = ["bash", str(HERE / recipe.folder / "run.sh"), *recipe.arguments(data, model, out)]
    words += [f"synthesis.seeds={list(range(seeds))}"] if recipe.metrics is SPOKEN else []
    words += [f"recordings={known}"] if known is not None else []
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    told = {"AT_HAND": "1", "PAIRS": str(data / "test-clean" / "pairs.lst"), "STEPS": str(ADAPT_STEPS), "PATH": path}
    done = subprocess.run(words, env=os.environ | told, check=False)
    if done.returncode:
        raise UserError(f"recipe '{recipe.name}' ended with exit code {done.returncode}; see above, then run it again")


def table(recipe: Recipe, result: dict[str, Any]) -> Iterator[str]:
    """The means of ``recipe`` as Markdown, a row a system."""
    names = [name for name in recipe.metrics if any(name in estimates for estimates in result["summary"].values())]
    yield "| system | items | failed | " + " | ".join(names) + " |"
    yield "|---" * (3 + len(names)) + "|"
    for system, estimates in result["summary"].items():
        counts = result["counts"][system]
        spoken = f"{counts['items']}" + (f" x {counts['seeds']} seeds" if counts["seeds"] > 1 else "")
        yield f"| {system} | {spoken} | {counts['errors']} | " + " | ".join(cell(estimates.get(name)) for name in names) + " |"


def cell(estimate: dict[str, Any] | None) -> str:
    """A mean with its interval."""
    if estimate is None:
        return "–"
    return f"{estimate['value']:.3f}" + ("" if estimate["interval"] is None else " [{:.3f}, {:.3f}]".format(*estimate["interval"]))


def compared(recipe: Recipe, comparison: Comparison) -> Iterator[str]:
    """The differences in the numbers that the table of ``recipe`` shows."""
    yield "| metric | before | now | difference | 95% interval | p, Holm | now is |"
    yield "|---|---|---|---|---|---|---|"
    for d in comparison.differences:
        if d.metric in recipe.metrics:
            interval = "–" if d.interval is None else "{:+.3f} to {:+.3f}".format(*d.interval)
            p = "–" if d.p_holm is None else f"{d.p_holm:.3f}"
            yield f"| `{d.metric}` | {d.a:.3f} | {d.b:.3f} | {d.difference:+.3f} | {interval} | {p} | {d.verdict} |"
    yield ""
    yield "; ".join(notes(comparison)) + "."


def listened(out: Path, data: Path, results: dict[str, dict[str, dict[str, Any]]]) -> dict[str, Path]:
    """The folders that a listening test compares, by name: what each weights said in one recipe, and recordings of the same sentences."""
    chosen = next((name for name in LISTENED if name in results["new"]), None)
    systems = {name: out / name / chosen for name, found in results.items() if chosen is not None and chosen in found}
    return systems | ({"recording": data / "test-clean" / CHAPTER} if chosen == "cross_sentence" else {})


def hardware() -> str:
    """The processor and how many of its cores there are."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor() or platform.machine()}"


def commit() -> str:
    """The commit of this checkout, and whether it was changed since."""
    words = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude", "*"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def page(results: dict[str, dict[str, Any]], comparisons: dict[str, Comparison], facts: dict[str, str], command: str) -> str:
    """All of it as one page of the documentation."""
    stated = ", ".join(f"{name} {value}" for name, value in facts.items())
    first = next(iter(results.values()))
    models = {name: described.get("model") for name, described in first["metrics"].items() if described.get("model")}
    lines = [
        "# kalle-nano by every recipe",
        "",
        "Written by one command, and again by it for other weights:",
        "",
        "```bash",
        command,
        "```",
        "",
    ]
    lines += [
        f"{stated}; models: {', '.join(f'{name} {model}' for name, model in models.items())}. Means with 95% bootstrap intervals.",
        "The lists are embedded telephone prompts of one speaker and the models are small ones that packages hold, so no number here is",
        "comparable with a published one, and the recordings' own row shows how much is the recogniser's. Times are not measured here.",
    ]
    for recipe in (recipe for recipe in RECIPES if recipe.name in results):
        lines += ["", f"## {recipe.title}", "", f"[recipes/{recipe.folder}](../../recipes/{recipe.folder}/README.md)", ""]
        lines += table(recipe, results[recipe.name])
        stress = Path(str(results[recipe.name]["out"])) / "stress.md"
        lines += ["", stress.read_text(encoding="utf-8").rstrip()] if stress.is_file() else []
        if recipe.name in comparisons:
            lines += ["", "Against the weights before:", "", *compared(recipe, comparisons[recipe.name])]
    if "seed_tts_en" in comparisons:
        checks = gate(comparisons["seed_tts_en"], GateRules())
        lines += [
            "",
            "## May they replace the weights before?",
            "",
            "`kalle compare --gate` on the cloning list, recordings of a real voice:",
            "",
        ]
        lines += [f"- {'pass' if check.passed else 'FAIL'}: {check.rule} ({check.found})" for check in checks]
    lines += ["", "## Not run", ""]
    for recipe in (recipe for recipe in RECIPES if recipe.name not in results):
        lines += [f"- [{recipe.folder}](../../recipes/{recipe.folder}/README.md), {recipe.title}: left out this time (`--recipes`)."]
    return "\n".join([*lines, NOT_RUN, ""])


def work(given: argparse.Namespace) -> None:
    """Score, compare, and write the page."""
    out: Path = given.out
    weights = {"new": given.model.resolve()} | ({"old": given.against.resolve()} if given.against else {})
    digests = {name: weights_digest(folder)[:12] for name, folder in weights.items()}
    stages = Stages(out, {"weights": digests, "items": given.items, "seeds": given.seeds})
    data = (out / "data").resolve()
    stages.run("data", lambda: (seed_tts(data / "seedtts_testset", given.items), librispeech(data / "test-clean", given.items)))
    results: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in weights}
    wanted = {"new": given.recipes, "old": [name for name in given.recipes if name in given.against_recipes]}
    for recipe in RECIPES:
        for name, model in ((name, model) for name, model in weights.items() if recipe.name in wanted[name]):
            folder, first = ((out / system / recipe.name).resolve() for system in (name, "new"))
            known = first if name != "new" and "recording" in results["new"][recipe.name]["summary"] else None  # a list may have none
            stages.run(f"{recipe.name}, {name}", partial(score, recipe, data, model, folder, given.seeds, known))
            results[name][recipe.name] = json.loads((folder / "results.json").read_text()) | {"out": folder}
    systems = listened(out, data, results)
    test = out / "listening" / "-".join(systems)
    if len(systems) > 1:
        stages.run(f"listening test, {', '.join(systems)}", lambda: make(ListeningConfig(systems, test)))
    comparisons: dict[str, Comparison] = {}
    for name in results.get("old", {}):
        (comparisons[name],) = compare(out / "old" / name, out / "new" / name)
    facts = {"weights": digests["new"], "commit": commit(), "on": hardware()}
    facts |= {"against weights": digests["old"]} if "old" in weights else {}
    shown = f"python recipes/evaluate_all.py {given.model} {given.out}"
    shown += " --against OLD" if given.against else ""
    names = [recipe.name for recipe in RECIPES]
    shown += f" --recipes {' '.join(given.recipes)}" if given.recipes != names else ""
    shown += f" --against-recipes {' '.join(given.against_recipes)}" if given.against and given.against_recipes != names else ""
    text = page(results["new"], comparisons, facts, f"{shown} --items {given.items} --seeds {given.seeds} --page {given.page or 'FILE'}")
    write_atomic(out / "page.md", text)
    if given.page is not None:
        write_atomic(given.page, text)
    rated = f"; to rate: {test / 'page' / 'index.html'} (recipes/listening)" if len(systems) > 1 else ""
    print(f"wrote {given.page or out / 'page.md'}; to listen to: {out}/new/*/report.html{rated}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="weight folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path, help="the weights before")
    names = [recipe.name for recipe in RECIPES]
    parser.add_argument("--recipes", nargs="+", choices=names, default=names, help="some of the recipes")
    parser.add_argument("--against-recipes", nargs="+", choices=names, default=names, help="those that the weights before speak, too")
    parser.add_argument("--items", type=int, default=10, help="recordings of each list")
    parser.add_argument("--seeds", type=int, default=3, help="times that each text is spoken")
    parser.add_argument("--page", type=Path, help="also write the page here")
    given = parser.parse_args()
    sys.exit(recipe_main(lambda: work(given), given.out))

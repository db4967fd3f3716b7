"""`kalle compare`: results of `kalle evaluate` item by item, and the gate for releasing weights."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from kalle.errors import UserError


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="A B [C...]", help="Folders that `kalle evaluate` wrote; each is compared with A.")],
    gate: Annotated[
        bool, typer.Option("--gate", help="Exit code 1 unless B may replace A: no item lost, WER not shown to be worse, similarity kept.")
    ] = False,
    veto: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A B", help="The same two systems on a set of real voices, where the rules must hold as well."),
    ] = None,
    sim_drop: Annotated[float, typer.Option(min=0, help="Speaker similarity may fall by this much.")] = 0.01,
    no_sim: Annotated[bool, typer.Option("--no-sim", help="The gate does not ask for speaker similarity; --veto does.")] = False,
    wer_margin: Annotated[
        float | None,
        typer.Option(min=0, help="Pass only where WER is shown to rise by no more; without it, fail where it is shown to rise."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for compare.json and compare.md.")] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page that opens from the disk: tables, charts, both systems to listen to.")
    ] = None,
    link_audio: Annotated[bool, typer.Option("--link-audio", help="The page links the wavs in place of holding them.")] = False,
    system: Annotated[str | None, typer.Option(help="The system of each run; its first besides the recordings unless given.")] = None,
    largest: Annotated[int, typer.Option(min=0, help="Items with the largest differences that are listed.")] = 10,
    resamples: Annotated[int, typer.Option(min=1, help="Bootstrap resamples.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Of the resamples.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Compare runs of different protocols, recognisers or normalisers.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Compare runs by paired bootstrap: difference, 95% interval and p-value of every metric, on the items that both have."""
    from kalle.evaluation import comparison as comparing
    from kalle.files import write_atomic

    if gate and len(runs) != 2:
        raise UserError(f"--gate: got {len(runs)} runs, expected two, the old weights' and the new; give two")
    if veto is not None and not gate:
        raise UserError("--veto: got it without --gate, expected both; add --gate")
    try:
        opened = comparing.named_apart([comparing.read_run(run, system) for run in runs])
        compared = partial(comparing.compare, system=system, resamples=resamples, seed=seed, largest=largest, force=force)
        found, real = compared(*opened), compared(*veto) if veto is not None else []
    except UserError as error:
        raise UserError(str(error).replace("with force", "with --force")) from None
    checks = []
    if gate:
        checks = comparing.gate(found[0], comparing.GateRules(wer_margin, None if no_sim else sim_drop))
    for each in real:
        checks += comparing.gate(each, comparing.GateRules(wer_margin, sim_drop), of="veto")
    result = comparing.as_json([*found, *real], checks)
    if out is not None:
        texts = {row["id"]: row["text"] for run in opened for row in run.rows}
        write_atomic(out / "compare.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        write_atomic(out / "compare.md", comparing.markdown([*found, *real], checks, texts))
    if html is not None:
        from kalle.evaluation.report_page import PageOptions, write_page

        write_page(html, opened, [*found, *real], checks, PageOptions(link_audio=link_audio))
    typer.echo(json.dumps(result, ensure_ascii=False) if as_json else comparing.terminal([*found, *real], checks))
    return int(not all(check.passed for check in checks))

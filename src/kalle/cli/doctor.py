"""`kalle doctor`: the mistakes that users really meet, checked on this machine, each with its remedy."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from kalle.cli.main import interruptible
from kalle.errors import UserError

CKPT = Path("ckpt")
ENOUGH_DISK_BYTES = 1e9
CONVERSION_BYTES = 6e9
READ_FORMATS = ("WAV", "FLAC", "OGG", "MP3")
TEST_TEXT, TEST_SECONDS = "Yes.", 0.4
MARKS = {"ok": "ok", "note": "note", "problem": "PROBLEM"}


@dataclass(frozen=True)
class Fact:
    """One fact of this machine."""

    section: str
    name: str
    value: str
    status: Literal["ok", "note", "problem"] = "ok"
    """"note" needs nothing to be done before kalle speaks, "problem" needs its remedy."""
    remedy: str | None = None


def doctor(
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="Weight folder; else all under ckpt/, and kalle-nano.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out reading all weights and speaking with them.")] = False,
) -> None:
    """Check versions, extras, device, weights, audio and disk; exit code 0 when speaking works, 1 otherwise. Needs no network."""
    with interruptible():
        facts, able = examine_machine(model, quick)
        typer.echo(_as_json(facts, able) if as_json else _as_text(facts, able))
    raise typer.Exit(0 if able else 1)


def examine_machine(model: Path | None, quick: bool, ckpt: Path = CKPT) -> tuple[list[Fact], bool]:
    """All facts, and whether speaking works: the core packages, and one weight folder or released files to convert."""
    packages = _checked("versions", version_facts)
    weights = _checked("weights", lambda: weight_facts(model, ckpt, quick))
    rest = [
        fact
        for section, check in (
            ("extras", extra_facts),
            ("device", device_facts),
            ("audio", audio_facts),
            ("disk", lambda: disk_facts(model or ckpt)),
        )
        for fact in _checked(section, check)
    ]
    speaks = any(fact.status != "problem" for fact in weights)
    return [*packages, *weights, *rest], speaks and all(fact.status != "problem" for fact in packages)


def _checked(section: str, check: Callable[[], Iterable[Fact]]) -> list[Fact]:
    """The facts that ``check`` yields; an exception becomes a problem too, for a broken package may raise anything."""
    facts: list[Fact] = []
    try:
        facts.extend(check())
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        facts.append(Fact(section, "check failed", reason, "problem", "reinstall the package that the message names"))
    return facts


def version_facts() -> Iterator[Fact]:
    """Python, kalle and the packages of the core."""
    from kalle import __version__
    from kalle.extras import requirements

    yield Fact("versions", "kalle", f"{__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    bad = list(_unmet(requirements().get("", [])))
    for name, problem in bad:
        yield Fact("versions", name, problem, "problem", f"pip install '{problem.partition('expected ')[2] or name}'")
    import torch

    yield Fact("versions", "torch", f"{torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores")


def _unmet(needed: Iterable[object]) -> Iterator[tuple[str, str]]:
    from packaging.requirements import Requirement

    for requirement in needed:
        assert isinstance(requirement, Requirement)
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield requirement.name, f"missing, expected {requirement.name}{requirement.specifier}"
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            yield requirement.name, f"{version}, expected {requirement.name}{requirement.specifier}"


def extra_facts() -> Iterator[Fact]:
    """The installed packages of each optional part."""
    from kalle.extras import FOR_DEVELOPERS, install_command, requirements

    for extra, needed in requirements().items():
        if not extra or extra in FOR_DEVELOPERS:
            continue
        bad = dict(_unmet(needed))
        if not bad:
            yield Fact("extras", extra, "installed")
        elif len(bad) == len(needed):
            yield Fact("extras", extra, "not installed", "note", install_command(extra))
        else:
            yield Fact("extras", extra, f"incomplete: {'; '.join(bad.values())}", "note", install_command(extra))


def device_facts() -> Iterator[Fact]:
    """The CUDA device, or why a GPU with a driver is not used."""
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield Fact("device", f"cuda:{index}", f"{properties.name}, {properties.total_memory / 1e9:.1f} GB, CUDA {torch.version.cuda}")
    elif shutil.which("nvidia-smi") is not None:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU only"
        remedy = "install the torch build that fits the driver (pytorch.org/get-started), or update the driver"
        yield Fact("device", "cuda", f"there is an NVIDIA driver, but torch does not see a GPU ({built}); the CPU speaks", "note", remedy)
    else:
        yield Fact("device", "cuda", "none; the CPU speaks")


def weight_facts(model: Path | None, ckpt: Path, quick: bool) -> Iterator[Fact]:
    """Each weight folder: whether it loads, is finite and speaks."""
    from kalle import checkpoint
    from kalle.convert.release import holds_release, release_folder

    shipped = checkpoint.shipped_folder()
    model = None if model is None else checkpoint.weight_folder(model)
    folders = [] if model is not None else [path for path in sorted(ckpt.glob("*/")) if (path / "lm").is_dir()]
    if model is not None and ((model / "lm").is_dir() or not _released(model)):
        folders = [model]
    elif shipped is not None and model is None and shipped.resolve() not in {path.resolve() for path in folders}:
        folders.append(shipped)
    source = model or ckpt
    if _released(source) and not (source / "kalle-release").is_dir():
        if holds_release(source):
            yield Fact("weights", "released files", f"in '{source}', converted when they first speak", "note")
        else:
            try:
                release_folder(source)
            except UserError as error:
                yield Fact("weights", "released files", str(error), "problem", f"kalle download --out '{source}'")
    for folder in folders:
        yield _folder_fact(folder, quick)
    if not folders and not _released(source):
        yield Fact("weights", str(ckpt), "none found", "problem", "`kalle download` fetches the released weights, --model takes your own")


def _released(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("flowvae.pt", "model.pt"))


def _folder_fact(folder: Path, quick: bool) -> Fact:
    from kalle.synthesis.kalle import Kalle

    remedy = "fetch, convert or export these weights again"
    try:
        kalle = Kalle.from_pretrained(folder, "cpu")
        parameters = [*kalle.flowvae.named_parameters(), *kalle.lm.named_parameters()]
        value = f"{sum(weight.numel() for _, weight in parameters) / 1e6:.1f} M parameters, stops at {kalle.config.stop.threshold:g}"
        if quick:
            return Fact("weights", folder.name, f"{value}; not read to the end")
        broken = [name for name, weight in parameters if not bool(weight.isfinite().all())]
        if broken:
            return Fact("weights", folder.name, f"{len(broken)} tensors are not finite, the first is {broken[0]}", "problem", remedy)
        speech = kalle.synthesize(TEST_TEXT, seed=0, max_seconds=TEST_SECONDS, retries=0)
    except UserError as error:
        return Fact("weights", folder.name, str(error), "problem", remedy)
    return Fact("weights", folder.name, f"{value}; spoke {speech.seconds:.2f} s")


def audio_facts() -> Iterator[Fact]:
    """Formats of recordings that can be read, and players."""
    import soundfile

    from kalle.cli.audio_output import available_players

    missing = [name for name in READ_FORMATS if name not in soundfile.available_formats()]
    if missing:
        yield Fact("audio", "codecs", f"libsndfile cannot read {', '.join(missing)}", "note", "pip install -U soundfile")
    else:
        yield Fact("audio", "codecs", f"libsndfile {soundfile.__libsndfile_version__} reads {', '.join(READ_FORMATS)}")
    found = [player.name for player in available_players()]
    yield Fact("audio", "players", ", ".join(found) or "none; only `--play` and `kalle voices play` need one")


def disk_facts(folder: Path) -> Iterator[Fact]:
    """Room and the right to write: where weights go, in the user's cache, and for temporary files."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for name, wanted in (("weights", folder), ("cache", cache), ("temporary files", Path(tempfile.gettempdir()))):
        there = next(path for path in (wanted.absolute(), *wanted.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        value = f"{free / 1e9:.1f} GB free at {there}"
        if not os.access(there, os.W_OK):
            yield Fact("disk", name, f"{value}, not writable", "note", f"change the permissions of {there}, or work in another folder")
        elif free < ENOUGH_DISK_BYTES:
            needed = f"make room; converting the released weights needs {CONVERSION_BYTES / 1e9:.0f} GB"
            yield Fact("disk", name, value, "note", needed)
        else:
            yield Fact("disk", name, value)


def _as_text(facts: list[Fact], able: bool) -> str:
    lines: list[str] = []
    for section in dict.fromkeys(fact.section for fact in facts):
        lines += ["", section, *(f"  {MARKS[fact.status]:<8} {fact.name}: {fact.value}" for fact in facts if fact.section == section)]
    remedies = [f"  {fact.name}: {fact.remedy}" for fact in facts if fact.remedy is not None]
    lines += ["", "what to do, where you need it", *remedies] if remedies else []
    return "\n".join([*lines[1:], "", f"speaking works: {'yes' if able else 'no'}"])


def _as_json(facts: list[Fact], able: bool) -> str:
    return json.dumps({"speaking_works": able, "findings": [asdict(fact) for fact in facts]}, indent=2, ensure_ascii=False)

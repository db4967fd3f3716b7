"""The weights: which are there, whether they are whole and fit together, and whether this machine can hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kalle.cli.doctor_findings import Finding, gigabytes
from kalle.convert import CONVERTED
from kalle.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from kalle.synthesis.row import StopRule

RELEASED = ("flowvae.pt", "model.pt")
NO_WEIGHTS = "fetch the released ones with `kalle download`, train some (make quickstart), or give --model DIR"
SPEAKING_BYTES = 4
"""Of a parameter in memory: the CPU speaks in fp32."""


def weight_folders(ckpt: Path, model: Path | None, shipped: Path | None = None) -> list[Path]:
    """The folders to look at: ``model`` or what was converted in it.

    Without ``model`` every folder under ``ckpt`` that holds a part, and ``shipped``, the model that ships.
    """
    if model is not None:
        if released_folder(ckpt, model) is not None:
            return []
        converted = model / CONVERTED
        return [converted if converted.is_dir() and not (model / "lm").is_dir() else model]
    found = sorted(path for path in ckpt.glob("*/") if any((path / part).is_dir() for part in ("flowvae", "lm")))
    known = {path.resolve() for path in found}
    return found if shipped is None or shipped.resolve() in known else [*found, shipped]


def found_findings(ckpt: Path, model: Path | None, shipped: Path | None = None) -> Iterator[Finding]:
    """The released files that wait for conversion, or that there is nothing to look at."""
    released = released_folder(ckpt, model)
    if released is not None:
        yield _released(released)
    elif model is None and not weight_folders(ckpt, None, shipped):
        yield Finding("weights", str(ckpt), f"no weight folder and no released files under '{ckpt}'", "problem", NO_WEIGHTS)


def released_folder(ckpt: Path, model: Path | None) -> Path | None:
    """The folder whose released files are not converted yet, ``model`` or ``ckpt``; None where there are none."""
    folder = ckpt if model is None else model.parent if model.name == CONVERTED and not model.is_dir() else model
    if (folder / "lm").is_dir() or (folder / CONVERTED).is_dir():
        return None
    return folder if any((folder / name).is_file() for name in RELEASED) else None


def _released(folder: Path) -> Finding:
    """Whether the released files in ``folder`` can be converted when they are first spoken with."""
    from kalle.convert.pickles import check_pytorch
    from kalle.convert.release import find_tokenizer
    from kalle.text.tokenizer import TOKENIZER_NAME

    name, remedy = f"{folder.name} speaking", f"kalle download --out '{folder}'"
    missing = [name for name in RELEASED if not (folder / name).is_file()]
    missing += [] if find_tokenizer(folder) is not None else [f"a folder with {TOKENIZER_NAME}"]
    if missing:
        value = f"no: the released files in '{folder}' lack {' and '.join(missing)}"
        return Finding("weights", name, value, "problem", f"{remedy}, or put what is missing there by hand")
    try:
        for file in RELEASED:
            check_pytorch(folder / file)
    except UserError as error:
        return Finding("weights", name, f"no: {error}", "problem", remedy)
    return Finding("weights", name, f"yes: {' and '.join(RELEASED)} in '{folder}', converted at first use", "note")


def folder_findings(folder: Path) -> list[Finding]:
    """Everything about one weight folder; the last finding says whether it can speak."""
    findings, parameters = [], 0
    for part in ("flowvae", "lm"):
        finding, count = _part(folder, part)
        findings.append(finding)
        parameters += count
    whole = all(finding.status == "ok" for finding in findings)
    if whole:
        findings += [*_voices(folder), _memory(folder, parameters)]
    return [*findings, _speaking(folder, whole)]


def speaks(findings: list[Finding]) -> bool:
    """Whether one of the folders can speak."""
    return any(finding.name.endswith(" speaking") and finding.status != "problem" for finding in findings)


def _part(folder: Path, part: str) -> tuple[Finding, int]:
    """One part, and how many parameters it has."""
    from kalle.checkpoint import mismatches, part_folder, weight_files

    name = f"{folder.name}/{part}"
    try:
        path = part_folder(folder, part)
        files = weight_files(path)
        got, dtypes = _headers(files)
        wrong = mismatches(_expected(path, part), got)
    except UserError as error:
        return Finding("weights", name, str(error), "problem", "fetch, convert or export this part again"), 0
    count = sum(tensor.numel() for tensor in got.values())
    size = sum(file.stat().st_size for file in files)
    value = f"{count / 1e6:.1f} M parameters in {len(got)} tensors, {'/'.join(sorted(dtypes))}, {gigabytes(size)}"
    value += f" in {len(files)} files" if len(files) > 1 else ""
    if wrong:
        value = f"{value}; {len(wrong)} tensors do not fit its config.json: {'; '.join(wrong[:3])}"
        return Finding("weights", name, value, "problem", "use the configuration the weights were made with"), 0
    return Finding("weights", name, value), count


def _headers(files: Mapping[Path, frozenset[str] | None]) -> tuple[dict[str, Tensor], set[str]]:
    """Of all files of a part (``weight_files``) together."""
    from kalle.checkpoint import require_names

    shapes: dict[str, Tensor] = {}
    kinds: set[str] = set()
    for path, names in files.items():
        got, dtypes = _header(path)
        require_names(path, names, got)
        shapes |= got if names is None else {name: got[name] for name in names}
        kinds |= dtypes
    return shapes, kinds


def _header(path: Path) -> tuple[dict[str, Tensor], set[str]]:
    """Shapes, as tensors without memory, and dtypes of a weight file; only its header is read."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            # Counters, such as batch-norm's, are integers; of fractions the kind does not matter, for loading turns them into the model's.
            kinds = {name: torch.float32 if "F" in value.get_dtype() else torch.int64 for name, value in slices.items()}
            shapes = {name: torch.empty(value.get_shape(), dtype=kinds[name], device="meta") for name, value in slices.items()}
            return shapes, {value.get_dtype() for value in slices.values()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"not a readable safetensors file: '{path}' ({error}); fetch or convert it again") from None


def _expected(path: Path, part: str) -> dict[str, Tensor]:
    """The state that the part's config.json describes, without memory."""
    import torch

    from kalle.checkpoint import CONFIG_NAME, read_json
    from kalle.models.flowvae import FlowVAE, FlowVAEConfig
    from kalle.models.lm import KalleLM, KalleLMConfig

    values, source = read_json(path / CONFIG_NAME), str(path / CONFIG_NAME)
    with torch.device("meta"):
        if part == "flowvae":
            return FlowVAE(FlowVAEConfig.from_dict(values, source)).state_dict()
        return KalleLM(KalleLMConfig.from_dict(values, source)).state_dict()


def _voices(folder: Path) -> Iterator[Finding]:
    from kalle.synthesis.voice_store import Binding, stored_voices, voice_files

    binding = Binding.of_folder(folder)
    hashes = ", ".join(f"{name} {value[:12]}" for name, value in binding.hashes.items())
    yield Finding("weights", f"{folder.name} hashes", hashes)
    voices = stored_voices(voice_files(folder), binding)
    bad = [voice for voice in voices if voice.problem is not None]
    if bad:
        value = f"{len(voices)}, of which {len(bad)} can't be used: {', '.join(voice.name for voice in bad[:5])}"
        yield Finding("weights", f"{folder.name} voices", value, "note", f"see `kalle voices list --model {folder}`")
    else:
        yield Finding("weights", f"{folder.name} voices", str(len(voices)))


def _memory(folder: Path, parameters: int) -> Finding:
    from kalle.cli.doctor_machine import available_memory

    needed, free = parameters * SPEAKING_BYTES, available_memory()
    value = f"{gigabytes(needed)} of weights in fp32" + ("" if free is None else f", {gigabytes(free)} available")
    if free is not None and needed > free:
        return Finding("weights", f"{folder.name} memory", value, "note", "close other programs or use a machine with more memory")
    return Finding("weights", f"{folder.name} memory", value)


def _speaking(folder: Path, whole: bool) -> Finding:
    """Whether the folder can speak: both parts, a tokenizer, a configuration, all fitting; and its stop rule."""
    from kalle.checkpoint import CONFIG_NAME, read_json
    from kalle.synthesis.folder import load_tokenizer, read_folder

    name = f"{folder.name} speaking"
    if not whole:
        return Finding("weights", name, "no: a part is missing or broken", "problem", NO_WEIGHTS)
    try:
        config, tokenizer = read_folder(folder), load_tokenizer(folder)
        problem = _fits(folder, tokenizer.vocab_size, config.sample_rate, config.stop)
    except UserError as error:
        return Finding("weights", name, str(error), "problem", "mend what the message names")
    if problem is not None:
        return Finding("weights", name, problem, "problem", "use parts and a tokenizer that were made together")
    stored = read_json(folder / CONFIG_NAME).get("stop") if (folder / CONFIG_NAME).is_file() else None
    rule = f"stop threshold {config.stop.threshold:g}"
    if config.stop.probability is not None:
        rule = f"stop probability {config.stop.probability:g}"
    if stored is None and config.stop.probability is not None:
        return Finding("weights", name, f"yes, {rule} (of the stop head)")
    if stored is None:
        return Finding("weights", name, f"yes, {rule} (not calibrated)", "note", f"kalle calibrate --help; it measures one for '{folder}'")
    rates = {key: stored[key] for key in ("false_stop_rate", "missed_stop_rate") if stored.get(key) is not None}
    told = ", ".join(f"{key.replace('_', ' ')} {value:.1%}" for key, value in rates.items())
    return Finding("weights", name, f"yes, {rule} ({f'calibrated: {told}' if told else 'set by hand'})")


def _fits(folder: Path, vocabulary: int, sample_rate: int | None, stop: StopRule) -> str | None:
    """What contradicts what between the parts; None when they fit."""
    from kalle.checkpoint import CONFIG_NAME, part_folder, read_json
    from kalle.models.flowvae import FlowVAEConfig
    from kalle.models.lm import KalleLMConfig

    flowvae = FlowVAEConfig.from_dict(read_json(part_folder(folder, "flowvae") / CONFIG_NAME))
    lm = KalleLMConfig.from_dict(read_json(part_folder(folder, "lm") / CONFIG_NAME))
    if flowvae.latent_dim != lm.latent_dim:
        return f"no: the language model has {lm.latent_dim} latent dimensions, the Flow-VAE {flowvae.latent_dim}"
    if vocabulary > int(lm.backbone["vocab_size"]):
        return f"no: the tokenizer has {vocabulary} ids, the language model {lm.backbone['vocab_size']}"
    if stop.probability is not None and not lm.stop_head:
        return f"no: config.json stops by probability {stop.probability:g} but the language model has no stop head"
    if sample_rate not in (None, flowvae.sample_rate):
        return f"no: config.json says {sample_rate} Hz, the Flow-VAE {flowvae.sample_rate} Hz"
    return None

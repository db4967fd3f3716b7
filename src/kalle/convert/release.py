"""Released weights to a weight folder and back, every tensor accounted for and unchanged.

Released format: ``flowvae.pt`` = {"generator": tensors} beside a JSON, ``model.pt`` = tensors, and a tokenizer folder.
No module is built with real weights: names and shapes are compared with a module without storage.
"""

from __future__ import annotations

import logging
import pickle
import re
import shutil
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kalle.checkpoint import (
    CONFIG_NAME,
    FORMAT_VERSION,
    WEIGHTS_NAME,
    first_of,
    read_json,
    read_weights,
    require_finite,
    require_fit,
    write_json,
    write_tensors,
)
from kalle.convert import CONVERTED
from kalle.convert.release_format import (
    LM_EMBEDDING,
    LM_HEAD,
    RELEASED_BACKBONE,
    flowvae_config,
    flowvae_names,
    lm_config,
    lm_names,
    released_flowvae_config,
    released_flowvae_names,
    released_lm_names,
)
from kalle.errors import UserError
from kalle.files import LFS_POINTER, atomic_folder, unwritable
from kalle.models.flowvae import BigVGANConfig, FlowVAE, FlowVAEConfig
from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.text.tokenizer import TOKENIZER_NAME, Tokenizer

logger = logging.getLogger(__name__)

GENERATOR = "generator"
_ZIP, _PICKLE = b"PK", b"\x80"
"""How files of torch.save begin, today's and those before 1.6."""


def read_pickle(path: Path) -> Mapping[str, Any]:
    """The dict that ``torch.save`` wrote to ``path``, tensors mapped from the file rather than read into memory.

    A UserError when it is missing, unreadable, or holds anything but tensors and plain values: such a pickle could run code.
    """
    check_pytorch(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "truncated" in str(error):
            raise _cut_off(path) from None
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"'{found[1]}'" if found else "other objects"
        raise UserError(
            f"refused '{path}': its pickle asks for {what}, expected tensors only; loading it could run code, "
            "so get the weights from a source you trust"
        ) from None
    except (EOFError, struct.error):
        raise _cut_off(path) from None
    except OSError:
        raise
    except Exception as error:  # damaged or foreign files fail in many ways: KeyError, RuntimeError
        reason = re.split(r"(?<=[.!?]) |\n", str(error))[0] or type(error).__name__
        raise UserError(f"not a readable PyTorch file: '{path}' ({reason}); fetch it again") from None
    if not isinstance(value, Mapping):
        raise UserError(f"not the released format: '{path}' holds a {type(value).__name__}, expected a dict; give the published file")
    return value


def check_pytorch(path: Path) -> None:
    """A UserError when ``path`` is missing, or its first and last bytes are not those of a file of ``torch.save``; no more is looked at."""
    if not path.is_file():
        raise UserError(f"file not found: got '{path}', expected a released .pt file; check the path")
    with path.open("rb") as file:
        head = file.read(len(LFS_POINTER))
    if head.startswith(LFS_POINTER):
        raise UserError(
            f"not a PyTorch file: '{path}' only points to one, for the real file is stored with LFS; run `git lfs pull` where it comes "
            "from, or `kalle download`"
        )
    if head.startswith(_ZIP) and not zipfile.is_zipfile(path):
        raise _cut_off(path)
    if not head.startswith((_ZIP, _PICKLE)):
        raise UserError(
            f"not a PyTorch file: '{path}' begins with {head[:12]!r}, expected what torch.save writes; get the file again, for one with "
            "`kalle download`"
        )


def _cut_off(path: Path) -> UserError:
    return UserError(f"not a readable PyTorch file: '{path}' is cut off, expected the whole file; fetch it again with `kalle download`")


def only_tensors(values: Mapping[str, Any], source: str | Path) -> dict[str, Tensor]:
    """``values`` as plain dense tensors; a UserError lists the entries that are something else."""
    wrong = [
        f"{name} ({type(value).__name__})"
        for name, value in values.items()
        if not (isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided)
    ]
    if wrong:
        raise UserError(
            f"not the released format: '{source}' holds {len(wrong)} entries that are no dense tensors: {first_of(wrong)}; "
            "give the published file"
        )
    return {name: value.detach() for name, value in values.items()}


def released_tensors(content: Mapping[str, Any], expected: Iterable[str], source: str | Path) -> dict[str, Tensor]:
    """The dense tensors of ``content`` under the release's names, some of which are ``expected``.

    Understood is what trainers wrap a state dict in: one under a key, as the release itself has it ("generator") or a checkpoint does
    ("state_dict", "ema"), names that begin with the path of a module (DataParallel's "module.", a LightningModule's attribute, an averaged
    copy's "ema_model.") or contain torch.compile's "_orig_mod.", and weight norm as a parametrization. What is taken off and left
    out is logged. UserError when ``content`` holds something else.
    """
    wanted = frozenset(expected)
    state, where = _state_dict(content, wanted)
    tensors = only_tensors(state, source)
    plain = {_plain(name): tensor for name, tensor in tensors.items()}
    prefixes = {begins for name in plain if (begins := _begins(name, wanted)) is not None} | {""}
    prefix = max(sorted(prefixes, key=len), key=lambda prefix: sum(prefix + name in plain for name in wanted))
    kept = {name.removeprefix(prefix): tensor for name, tensor in plain.items() if name.startswith(prefix)}
    others = [name for name in plain if not name.startswith(prefix)]
    beside = [str(key) for key in content if where and key != where]
    if prefix or plain.keys() != tensors.keys() or (where and where != GENERATOR):
        logger.info("'%s': %d tensors under '%s%s'", source, len(kept), f"{where}: " if where else "", prefix)
    if others or beside:
        logger.warning("'%s' holds more than the model, left out: %s", source, first_of([*beside, *others]))
    return kept


def _state_dict(content: Mapping[str, Any], wanted: Collection[str]) -> tuple[Mapping[str, Any], str]:
    """``content``, or the mapping inside it that has most of the ``wanted`` names, and its key."""
    if any(isinstance(value, Tensor) for value in content.values()):
        return content, ""
    inside = {str(key): value for key, value in content.items() if isinstance(value, Mapping) and value}
    if not inside:
        return content, ""
    # The first of equals in this order: a checkpoint with an average beside its weights is taken by its weights.
    order = sorted(inside, key=lambda key: (key not in (GENERATOR, "state_dict", "model", "module"), key))

    key = max(order, key=lambda key: sum(_begins(_plain(str(name)), wanted) is not None for name in inside[key]))
    return inside[key], key


def _plain(name: str) -> str:
    """``name`` in the release's spelling of weight norm, without the module that torch.compile puts around another."""
    name = ".".join(part for part in name.split(".") if part != "_orig_mod")
    for ours, released in (("original0", "weight_g"), ("original1", "weight_v")):
        name = name.removesuffix(f"parametrizations.weight.{ours}") + (released if name.endswith(f"parametrizations.weight.{ours}") else "")
    return name


def _begins(name: str, wanted: Collection[str]) -> str | None:
    """The prefix before a ``wanted`` name at the end of ``name``; None when there is none."""
    parts = name.split(".")
    starts = (count for count in range(len(parts)) if ".".join(parts[count:]) in wanted)
    return next(("".join(part + "." for part in parts[:count]) for count in starts), None)


def write_pickle(path: Path, value: Mapping[str, Any]) -> None:
    """``torch.save`` to ``path``; UserError when the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.save(value, path)
    except RuntimeError as error:
        raise unwritable(path, str(error).splitlines()[0]) from None


RELEASE_NAME = "release.json"
"""Beside a converted part: what the release says and our configuration does not."""
FLOWVAE, LM, TOKENIZER = "flowvae", "lm", "tokenizer"
PARTS = (FLOWVAE, LM, TOKENIZER)
RELEASED_FLOWVAE, RELEASED_LM = ("flowvae.pt", "flowvae.json"), ("model.pt", "lm.json")
"""Weights and configuration as ``convert_to_release`` names them."""
_RELEASED_WEIGHTS = (RELEASED_FLOWVAE[0], RELEASED_LM[0])

_log = logging.getLogger(__name__)


def convert_release(
    out: Path,
    flowvae: Path | None,
    flowvae_config: Path | None,
    lm: Path | None,
    lm_config: Path | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Write the weight folder ``out`` from released files; any part alone, and a part may be added to an existing folder.

    ``flowvae`` needs its JSON ``flowvae_config``; ``lm_config`` defaults to the released configuration. Values and dtypes
    are kept. A UserError lists every tensor missing, superfluous or misshapen; on any failure ``out`` is as it was.
    """
    out = out.absolute()
    given = {FLOWVAE: flowvae, LM: lm, TOKENIZER: tokenizer}
    _check_request(given, flowvae_config, lm_config)
    before = _existing(out, [part for part in PARTS if given[part] is not None])
    with atomic_folder(out) as staging:
        if flowvae is not None and flowvae_config is not None:
            _convert_flowvae(flowvae, flowvae_config, staging / FLOWVAE)
        if lm is not None:
            _convert_lm(lm, lm_config, staging / LM)
        if tokenizer is not None:
            _copy_tokenizer(tokenizer, staging / TOKENIZER)
        write_json(staging / CONFIG_NAME, _folder_config(before, staging, out))


def convert_to_release(folder: Path, out: Path) -> None:
    """Write the parts of the weight folder ``folder`` in the released format to the new folder ``out``.

    A UserError when ``folder`` holds no part, a part has no released counterpart (an iSTFT decoder, normalised latents),
    a tensor does not fit, or ``out`` holds something already.
    """
    folder, out = folder.absolute(), out.absolute()
    parts = [part for part in PARTS if (folder / part).is_dir()]
    if not parts:
        raise UserError(f"not a weight folder: got '{folder}', expected a folder with {', '.join(PARTS)} or some of them; check the path")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"already there: got out='{out}', expected a folder that is empty or does not exist; choose another name")
    with atomic_folder(out) as staging:
        if FLOWVAE in parts:
            _release_flowvae(folder / FLOWVAE, *(staging / name for name in RELEASED_FLOWVAE))
        if LM in parts:
            _release_lm(folder / LM, *(staging / name for name in RELEASED_LM))
        if TOKENIZER in parts:
            _copy_tokenizer(folder / TOKENIZER, staging / TOKENIZER)


def _check_request(given: Mapping[str, Path | None], flowvae_config: Path | None, lm_config: Path | None) -> None:
    if not any(given.values()):
        raise UserError("nothing to convert: got no file, expected flowvae= with flowvae_config=, lm= or tokenizer=")
    if (given[FLOWVAE] is None) != (flowvae_config is None):
        have, lack = ("flowvae_config=", "flowvae=") if given[FLOWVAE] is None else ("flowvae=", "flowvae_config=")
        raise UserError(f"{lack} is missing: got {have} alone, expected both; give the .pt and the JSON published with it")
    if given[LM] is None and lm_config is not None:
        raise UserError(f"lm= is missing: got lm_config='{lm_config}' alone; give the model.pt it belongs to")


def _existing(out: Path, adding: list[str]) -> dict[str, Any]:
    """The config.json of ``out``; a UserError when it is no weight folder or has one of the parts ``adding``."""
    if not out.exists():
        return {}
    if not out.is_dir():
        raise UserError(f"not a folder: got out='{out}', expected a new folder or a weight folder; choose another name")
    present = [part for part in PARTS if (out / part).exists()]
    taken = [part for part in adding if part in present]
    if taken:
        raise UserError(f"already there: '{out}' has {', '.join(taken)}; remove it or choose another folder")
    config = out / CONFIG_NAME
    if not present and not config.is_file() and any(out.iterdir()):
        raise UserError(
            f"not a weight folder: got out='{out}' with other files in it, expected a new or a weight folder; choose another name"
        )
    return read_json(config) if config.is_file() else {}


def _folder_config(before: Mapping[str, Any], staging: Path, out: Path) -> dict[str, Any]:
    """The folder's own config.json, after checking that the parts fit each other."""
    where = {part: root / part for root in (out, staging) for part in PARTS if (root / part).is_dir()}
    paths = {part: where[part] / CONFIG_NAME for part in (FLOWVAE, LM) if part in where}
    configs = {part: read_json(path) for part, path in paths.items() if path.is_file()}
    if len(configs) == 2 and configs[FLOWVAE]["latent_dim"] != configs[LM]["latent_dim"]:
        raise UserError(
            f"the parts do not fit: the Flow-VAE has latent_dim {configs[FLOWVAE]['latent_dim']}, the language model "
            f"{configs[LM]['latent_dim']}; give two that were trained together"
        )
    if LM in configs and TOKENIZER in where:
        have, need = configs[LM]["backbone"]["vocab_size"], Tokenizer.load(where[TOKENIZER]).vocab_size
        if need > have:
            raise UserError(
                f"the parts do not fit: the tokenizer has {need} ids, the language model {have}; give the tokenizer of these weights"
            )
    after = {**before, "format_version": FORMAT_VERSION, "parts": [part for part in PARTS if part in where]}
    if FLOWVAE in configs:
        after["sample_rate"] = configs[FLOWVAE]["sample_rate"]
    return after


def _convert_flowvae(weights: Path, config_path: Path, folder: Path) -> None:
    values = read_json(config_path)
    config = flowvae_config(values, config_path)
    expected = _flowvae_shapes(config)
    stages, blocks = _flowvae_sizes(config)
    names = released_flowvae_names(expected, stages, blocks)
    tensors = released_tensors(read_pickle(weights), names.values(), weights)
    remedy = f"give the JSON of these weights, not '{config_path}'"
    require_fit({names[name]: shape for name, shape in expected.items()}, tensors, weights, remedy)
    require_finite(tensors, weights)
    assert flowvae_names(tensors, stages, blocks) == {released: ours for ours, released in names.items()}
    write_tensors(folder / WEIGHTS_NAME, {ours: tensors[released] for ours, released in names.items()})
    write_json(folder / CONFIG_NAME, config.to_dict())
    write_json(folder / RELEASE_NAME, {"config": values})


def _convert_lm(weights: Path, config_path: Path | None, folder: Path) -> None:
    values = dict(RELEASED_BACKBONE) if config_path is None else read_json(config_path)
    tensors = released_tensors(read_pickle(weights), (LM_EMBEDDING, LM_HEAD), weights)
    config = lm_config(values, tensors, config_path or "the released configuration")
    head = tensors.pop(LM_HEAD, None)
    expected = _lm_shapes(config)
    names = released_lm_names(expected)
    remedy = "give their own configuration as lm_config=" + ("" if config_path is None else f", not '{config_path}'")
    require_fit({names[name]: shape for name, shape in expected.items()}, tensors, weights, remedy)
    if head is not None and not _same_bits(head, tensors[LM_EMBEDDING]):
        raise UserError(
            f"not tied: in '{weights}' {LM_HEAD} differs from {LM_EMBEDDING}, expected the same values; "
            "KALL-E has tied embeddings, give its model.pt"
        )
    require_finite(tensors, weights)
    assert lm_names(tensors) == {released: ours for ours, released in names.items()}
    write_tensors(folder / WEIGHTS_NAME, {ours: tensors[released] for ours, released in names.items()})
    write_json(folder / CONFIG_NAME, config.to_dict())
    write_json(folder / RELEASE_NAME, {"lm_head": head is not None, "config": None if config_path is None else values})


def _release_flowvae(folder: Path, weights: Path, config_path: Path) -> None:
    config = FlowVAEConfig.from_dict(read_json(folder / CONFIG_NAME), str(folder / CONFIG_NAME))
    values = _recorded(folder).get("config")
    if values is None:
        values = released_flowvae_config(config, folder)
    elif flowvae_config(values, folder / RELEASE_NAME) != config:
        raise UserError(f"'{folder / RELEASE_NAME}' contradicts {CONFIG_NAME}, expected the same model; remove the one that is wrong")
    tensors = read_weights(folder)
    require_fit(_flowvae_shapes(config), tensors, folder, "convert or train it again")
    require_finite(tensors, folder)
    names = released_flowvae_names(tensors, *_flowvae_sizes(config), source=str(folder))
    write_pickle(weights, {GENERATOR: {released: tensors[ours] for ours, released in names.items()}})
    write_json(config_path, values)


def _release_lm(folder: Path, weights: Path, config_path: Path) -> None:
    config = KalleLMConfig.from_dict(read_json(folder / CONFIG_NAME), str(folder / CONFIG_NAME))
    if config.normalise_latents:
        raise UserError(f"no released format for '{folder}': the release cannot hold normalise_latents, expected a model without it")
    tensors = read_weights(folder)
    require_fit(_lm_shapes(config), tensors, folder, "convert or train it again")
    require_finite(tensors, folder)
    recorded = _recorded(folder)
    released = {theirs: tensors[ours] for ours, theirs in released_lm_names(tensors, source=str(folder)).items()}
    if recorded.get("lm_head", True):
        released[LM_HEAD] = released[LM_EMBEDDING]
    write_pickle(weights, released)
    write_json(config_path, recorded.get("config") or config.backbone)


def _copy_tokenizer(source: Path, target: Path) -> None:
    if not source.is_dir():
        raise UserError(f"no such tokenizer folder: got '{source}', expected a folder with {TOKENIZER_NAME}; check the path")
    files = sorted(path for path in source.iterdir() if path.is_file())
    if not any(path.name == TOKENIZER_NAME for path in files):
        found = ", ".join(path.name for path in files) or "nothing"
        raise UserError(
            f"no {TOKENIZER_NAME} in '{source}': found {found}; build one from Llama 3's tokenizer.model with `kalle convert tokenizer`"
        )
    Tokenizer.load(source)
    target.mkdir(parents=True)
    for path in files:
        shutil.copyfile(path, target / path.name)
    folders = sorted(path.name for path in source.iterdir() if path.is_dir())
    if folders:
        _log.warning("%d folders inside '%s' are no part of a tokenizer and were not copied: %s", len(folders), source, ", ".join(folders))


def _recorded(folder: Path) -> dict[str, Any]:
    path = folder / RELEASE_NAME
    return read_json(path) if path.is_file() else {}


def _flowvae_shapes(config: FlowVAEConfig) -> dict[str, Tensor]:
    """Names and shapes without storage."""
    with torch.device("meta"):
        return FlowVAE(config).state_dict()


def _lm_shapes(config: KalleLMConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return KalleLM(config).state_dict()


def _flowvae_sizes(config: FlowVAEConfig) -> tuple[int, int]:
    """Encoder stages and blocks per decoder stage, which the released numbering depends on."""
    assert isinstance(config.decoder, BigVGANConfig), config.decoder
    return len(config.encoder.strides), len(config.decoder.block_kernel_sizes)


def _same_bits(first: Tensor, second: Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    if first.data_ptr() == second.data_ptr() and first.stride() == second.stride():
        return True
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def holds_release(folder: Path) -> bool:
    """Whether ``folder`` has the released weights, or what was converted from them."""
    return (folder / CONVERTED).is_dir() or all((folder / name).is_file() for name in _RELEASED_WEIGHTS)


def release_folder(ckpt: Path) -> Path:
    """``ckpt``/kalle-release, converted now from ``ckpt``/{flowvae.pt, model.pt} and a tokenizer folder if it isn't there.

    ``flowvae.json`` and ``lm.json`` in ``ckpt`` override the released configurations. UserError for missing files.
    """
    out = ckpt / CONVERTED
    if out.is_dir():
        return out
    missing = [name for name in _RELEASED_WEIGHTS if not (ckpt / name).is_file()]
    tokenizer = find_tokenizer(ckpt)
    if missing or tokenizer is None:
        lacking = ", ".join([*missing, *([f"a folder with {TOKENIZER_NAME}"] if tokenizer is None else [])])
        raise UserError(
            f"no weights: '{ckpt}' lacks {lacking}; fetch the released files with `kalle download --out '{ckpt}'`, put them there by hand, "
            "or give a weight folder (model)"
        )
    _log.info("converting the released files in %s to %s (once)", ckpt, out)
    _convert(ckpt, tokenizer, out)
    return out


def find_tokenizer(ckpt: Path) -> Path | None:
    """The folder with a tokenizer.json: ``ckpt``/tokenizer, else the first by name of its other folders, else ``ckpt`` itself."""
    others = sorted(path for path in ckpt.glob("*/") if path.name != CONVERTED)
    return next((path for path in (ckpt / "tokenizer", *others, ckpt) if (path / TOKENIZER_NAME).is_file()), None)


def _convert(ckpt: Path, tokenizer: Path, out: Path) -> None:
    (flowvae, flowvae_json), (lm, lm_json) = RELEASED_FLOWVAE, RELEASED_LM
    lm_config = ckpt / lm_json if (ckpt / lm_json).is_file() else None
    with tempfile.TemporaryDirectory() as temporary:
        flowvae_config = ckpt / flowvae_json
        if not flowvae_config.is_file():
            flowvae_config = Path(temporary) / flowvae_json
            write_json(flowvae_config, released_flowvae_config(FlowVAEConfig(), flowvae_config))
        convert_release(
            flowvae=ckpt / flowvae, flowvae_config=flowvae_config, lm=ckpt / lm, lm_config=lm_config, tokenizer=tokenizer, out=out
        )

"""Released weights to a weight folder and back, every tensor accounted for and unchanged.

Released format: ``flowvae.pt`` = {"generator": tensors} beside a JSON, ``model.pt`` = tensors, and a tokenizer folder.
No module is built with real weights: names and shapes are compared with a module without storage.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kalle.checkpoint import (
    CONFIG_NAME,
    FORMAT_VERSION,
    WEIGHTS_NAME,
    read_json,
    read_weights,
    require_finite,
    require_fit,
    write_json,
    write_tensors,
)
from kalle.convert import CONVERTED
from kalle.convert.pickles import GENERATOR, read_pickle, released_tensors, write_pickle
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
from kalle.files import atomic_folder
from kalle.models.flowvae import BigVGANConfig, FlowVAE, FlowVAEConfig
from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.text.tokenizer import TOKENIZER_NAME, Tokenizer

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
        raise UserError(f"already there: got --out '{out}', expected a folder that is empty or does not exist; choose another name")
    with atomic_folder(out) as staging:
        if FLOWVAE in parts:
            _release_flowvae(folder / FLOWVAE, *(staging / name for name in RELEASED_FLOWVAE))
        if LM in parts:
            _release_lm(folder / LM, *(staging / name for name in RELEASED_LM))
        if TOKENIZER in parts:
            _copy_tokenizer(folder / TOKENIZER, staging / TOKENIZER)


def _check_request(given: Mapping[str, Path | None], flowvae_config: Path | None, lm_config: Path | None) -> None:
    if not any(given.values()):
        raise UserError("nothing to convert: got no file, expected --flowvae with --flowvae-config, --lm or --tokenizer")
    if (given[FLOWVAE] is None) != (flowvae_config is None):
        have, lack = ("--flowvae-config", "--flowvae") if given[FLOWVAE] is None else ("--flowvae", "--flowvae-config")
        raise UserError(f"{lack} is missing: got {have} alone, expected both; give the .pt and the JSON published with it")
    if given[LM] is None and lm_config is not None:
        raise UserError(f"--lm is missing: got --lm-config '{lm_config}' alone; give the model.pt it belongs to")


def _existing(out: Path, adding: list[str]) -> dict[str, Any]:
    """The config.json of ``out``; a UserError when it is no weight folder or has one of the parts ``adding``."""
    if not out.exists():
        return {}
    if not out.is_dir():
        raise UserError(f"not a folder: got --out '{out}', expected a new folder or a weight folder; choose another name")
    present = [part for part in PARTS if (out / part).exists()]
    taken = [part for part in adding if part in present]
    if taken:
        raise UserError(f"already there: '{out}' has {', '.join(taken)}; remove it or choose another --out")
    config = out / CONFIG_NAME
    if not present and not config.is_file() and any(out.iterdir()):
        raise UserError(
            f"not a weight folder: got --out '{out}' with other files in it, expected a new or a weight folder; choose another name"
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
    remedy = "give their own configuration with --lm-config" + ("" if config_path is None else f", not '{config_path}'")
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
            "or give a weight folder with --model"
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

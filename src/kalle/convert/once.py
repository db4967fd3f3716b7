"""Released files beside each other in one folder, converted the first time they are needed."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from kalle.checkpoint import write_json
from kalle.convert import CONVERTED
from kalle.convert.config import released_flowvae_config
from kalle.convert.release import RELEASED_FLOWVAE, RELEASED_LM, convert_release
from kalle.errors import UserError
from kalle.models.flowvae import FlowVAEConfig
from kalle.text.tokenizer import TOKENIZER_NAME

FLOWVAE, FLOWVAE_CONFIG = RELEASED_FLOWVAE
LM, LM_CONFIG = RELEASED_LM
_log = logging.getLogger(__name__)


def holds_release(folder: Path) -> bool:
    """Whether ``folder`` has the released weights, or what was converted from them."""
    return (folder / CONVERTED).is_dir() or all((folder / name).is_file() for name in (FLOWVAE, LM))


def release_folder(ckpt: Path) -> Path:
    """``ckpt``/kalle-release, converted now from ``ckpt``/{flowvae.pt, model.pt} and a tokenizer folder if it isn't there.

    ``flowvae.json`` and ``lm.json`` in ``ckpt`` override the released configurations. UserError for missing files.
    """
    out = ckpt / CONVERTED
    if out.is_dir():
        return out
    missing = [name for name in (FLOWVAE, LM) if not (ckpt / name).is_file()]
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
    lm_config = ckpt / LM_CONFIG if (ckpt / LM_CONFIG).is_file() else None
    with tempfile.TemporaryDirectory() as temporary:
        flowvae_config = ckpt / FLOWVAE_CONFIG
        if not flowvae_config.is_file():
            flowvae_config = Path(temporary) / FLOWVAE_CONFIG
            write_json(flowvae_config, released_flowvae_config(FlowVAEConfig(), flowvae_config))
        convert_release(
            flowvae=ckpt / FLOWVAE, flowvae_config=flowvae_config, lm=ckpt / LM, lm_config=lm_config, tokenizer=tokenizer, out=out
        )

"""What the tests of recipes share."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Protocol

import pytest

ROOT = Path(__file__).parents[2]


class Recipe(Protocol):
    """Imports a module of a recipe."""

    def __call__(self, folder: str, module: str) -> ModuleType: ...


@pytest.fixture
def recipe() -> Iterator[Recipe]:
    """Imports recipes/FOLDER/MODULE.py as the recipe itself would; another recipe may have a module of the same name, so none stays."""
    before, path = set(sys.modules), list(sys.path)

    def load(folder: str, module: str) -> ModuleType:
        where = str(ROOT / "recipes" / folder)
        if where not in sys.path:
            sys.path.insert(0, where)
        return importlib.import_module(module)

    yield load
    recipes = str(ROOT / "recipes") + os.sep
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(recipes):
            del sys.modules[name]
    sys.path[:] = path


@pytest.fixture(scope="session")
def nano_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained weights of nano size with a speaker encoder; their stop rule ends after six frames what would never end by itself."""
    import torch
    from hydra.utils import instantiate

    from kalle.checkpoint import write_json
    from kalle.cli.hydra_entry import compose
    from kalle.models.flowvae import FlowVAE
    from kalle.models.lm import KalleLM
    from kalle.text.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("nano") / "weights"
    lm = compose("train_lm", ["out=o", "data.latents=l", "lm=nano_speaker", "tokenizer=bytes", "data=lm_speaker"]).lm
    flowvae = compose("train_flowvae", ["out=o", "data.corpus=c", "flowvae=nano"]).flowvae
    torch.manual_seed(0)
    FlowVAE(instantiate(flowvae, _convert_="all")).save_pretrained(folder)
    KalleLM(instantiate(lm, _convert_="all")).save_pretrained(folder)
    Tokenizer.bytes().save(folder / "tokenizer")
    parts = {"format_version": 1, "parts": ["flowvae", "lm", "tokenizer"], "sample_rate": 16000}
    write_json(folder / "config.json", parts | {"stop": {"threshold": 1000.0, "min_index": 5}})
    return folder

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning
import pytest
from torch.utils.data import DataLoader

from kalle.models.lm_batch import LMBatch, WaveBatch


def fit(module: lightning.LightningModule, batches: Sequence[WaveBatch | LMBatch], steps: int, **options: Any) -> lightning.Trainer:
    """Train ``module`` for ``steps`` updates over ``batches``, in order and again from the first, without files."""
    valid = options.pop("valid", None)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_steps=steps, max_epochs=-1, accelerator="cpu", num_sanity_val_steps=0, **{**quiet, **options})
    loader = DataLoader(list(batches), batch_size=None, collate_fn=lambda batch: batch)
    trainer.fit(module, loader, None if valid is None else DataLoader(list(valid), batch_size=None, collate_fn=lambda batch: batch))
    return trainer


@pytest.fixture(name="fit")
def fit_fixture() -> Callable[..., lightning.Trainer]:
    return fit

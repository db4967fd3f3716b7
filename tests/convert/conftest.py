from __future__ import annotations

from pathlib import Path

import pytest

from kalle.text.tokenizer import Tokenizer


@pytest.fixture
def tokenizer_folder(tmp_path) -> Path:
    folder = tmp_path / "released tokenizer"
    Tokenizer.bytes().save(folder)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 131072}')
    return folder

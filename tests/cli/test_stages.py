"""What recipes are made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kalle.cli.hydra_entry import compose
from kalle.cli.stages import override, recipe_main


@pytest.mark.parametrize("text", ["plain", 'Don\'t, say "that": {a} [b] $x', "a\\b", "a\\'b", "ends in \\", "\\\\", "x=y; ~z (q)", "''"])
def test_any_text_survives_hydra(text: str) -> None:
    assert compose("evaluate", [override("synthesis.prompt_text", text)]).synthesis.prompt_text == text


def test_too_little_gpu_memory_in_a_recipe_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has 8 GiB. Try an ALLOCATOR.")

    assert recipe_main(work, tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has 8 GiB; ask for less")
    assert error.count("\n") == 1

"""What recipes are made of."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from kalle.cli.hydra_entry import compose
from kalle.cli.stages import Stages, override, recipe_main


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


def test_a_stage_says_how_many_are_left_and_for_how_long(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    stages = Stages(tmp_path, {}, {"first": 60, "second": 60, "third": 240})
    stages.run("first", lambda: None)
    assert "stage 1 of 3, about 6 min left" in caplog.text
    stages.seconds["first"] = 240.0  # it took three minutes more than expected: the rest will be slower, too
    stages.run("second", lambda: None)
    assert "stage 2 of 3, about 10 min left" in caplog.text
    stages.run("beside", lambda: None)
    assert "beside" not in caplog.text, "a stage that no plan has"

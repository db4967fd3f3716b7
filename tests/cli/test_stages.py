"""What recipes are made of."""

from __future__ import annotations

import pytest

from kalle.cli.hydra_entry import compose
from kalle.cli.stages import override


@pytest.mark.parametrize("text", ["plain", 'Don\'t, say "that": {a} [b] $x', "a\\b", "a\\'b", "ends in \\", "\\\\", "x=y; ~z (q)", "''"])
def test_any_text_survives_hydra(text: str) -> None:
    assert compose("evaluate", [override("synthesis.prompt_text", text)]).synthesis.prompt_text == text

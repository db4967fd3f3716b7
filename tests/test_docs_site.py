"""The docs site, assembled but not built."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/docs_site.py, writing elsewhere."""
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "scripts" / "docs_site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SOURCE", tmp_path / "docs")
    return module


def test_every_page_has_a_place_in_the_navigation(site: ModuleType) -> None:
    site.assemble()
    assert (site.SOURCE / "recipes" / "seed_tts_eval.md").is_file()
    assert site.unlisted() == []
    (site.SOURCE / "recipes" / "new.md").write_text("# New")
    assert site.unlisted() == ["recipes/new.md"]

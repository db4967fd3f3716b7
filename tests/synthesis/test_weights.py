"""Which weights a name means: a folder, released files, or a repository that is fetched once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from hub_server import REPOSITORY, Hub, serve, use_as_default
from kalle.errors import UserError
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.weights import resolve_weights
from kalle.text.tokenizer import Tokenizer

REFERENCE = Path(__file__).parents[1] / "reference"
RELEASED = {"flowvae_tiny.pt": "flowvae.pt", "flowvae_tiny.json": "flowvae.json", "lm_tiny.pt": "model.pt", "lm_tiny.json": "lm.json"}


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    """The golden weights under the released names."""
    folder = tmp_path / "ckpt"
    folder.mkdir()
    for source, target in RELEASED.items():
        shutil.copy(REFERENCE / source, folder / target)
    Tokenizer.bytes().save(folder / "tokenizer")
    return folder


def read(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(ckpt: Path, monkeypatch) -> Iterator[Hub]:
    with serve(read(ckpt)) as running:
        use_as_default(monkeypatch, running.endpoint)
        yield running


def test_a_weight_folder_is_itself_and_released_files_are_converted_once(ckpt: Path, weight_folder: Path, caplog) -> None:
    caplog.set_level("INFO")
    assert resolve_weights(weight_folder) == resolve_weights(str(weight_folder)) == weight_folder
    converted = resolve_weights(str(ckpt))
    assert converted == ckpt / "kalle-release"
    assert caplog.text.count("converting the released files") == 1
    assert resolve_weights(ckpt) == converted
    assert caplog.text.count("converting the released files") == 1
    assert Kalle.from_pretrained(converted, "cpu").synthesize("Hi.", seed=1, max_seconds=0.4).frames


def test_the_converted_folder_may_be_named_before_it_is_there(ckpt: Path) -> None:
    assert resolve_weights(ckpt / "kalle-release") == ckpt / "kalle-release"
    assert (ckpt / "kalle-release" / "lm" / "model.safetensors").is_file()
    assert resolve_weights(ckpt / "none" / "kalle-release") == ckpt / "none" / "kalle-release"


def test_a_hub_id_is_fetched_and_converted_once(hub: Hub, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = resolve_weights(REPOSITORY, cache=cache)
    assert folder == cache / "main" / "kalle-release"
    assert Kalle.from_pretrained(folder, "cpu").sample_rate == 16000
    hub.requests.clear()
    assert resolve_weights(REPOSITORY, cache=cache, local_files_only=True) == folder
    assert resolve_weights(REPOSITORY, cache=cache) == folder
    assert hub.requests == []
    assert resolve_weights(REPOSITORY, "v2", cache=cache) == cache / "v2" / "kalle-release"


def test_a_repository_in_our_format_needs_no_conversion(weight_folder: Path, tmp_path: Path, monkeypatch) -> None:
    with serve(read(weight_folder)) as running:
        use_as_default(monkeypatch, running.endpoint)
        folder = resolve_weights(REPOSITORY, cache=tmp_path / "cache")
    assert folder == tmp_path / "cache" / "main"
    assert Kalle.from_pretrained(folder, "cpu").sample_rate == 16000


def test_a_download_that_was_not_finished_goes_on(hub: Hub, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = resolve_weights(REPOSITORY, cache=cache)
    shutil.rmtree(folder)
    (cache / "main" / "model.pt").unlink()
    hub.requests.clear()
    assert resolve_weights(REPOSITORY, cache=cache) == folder
    assert hub.fetched() == ["model.pt"]


def test_the_cache_is_the_hub_s_own(hub: Hub, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    assert resolve_weights(REPOSITORY).is_relative_to(tmp_path / "assets")


def test_without_leave_to_ask_the_hub(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="got 'somebody/tiny' with local_files_only, but it was never fetched"):
        resolve_weights(REPOSITORY, cache=tmp_path / "cache", local_files_only=True)
    assert hub.requests == []


def test_paths_are_never_asked_for(hub: Hub, ckpt: Path, monkeypatch) -> None:
    monkeypatch.chdir(ckpt.parent)
    for name in ("ckpt/none", "none", "./none/none", "../none", "/none/none", "a/b/c", "~/x", Path("somebody/tiny")):
        assert resolve_weights(name) == Path(name)
    assert hub.requests == []

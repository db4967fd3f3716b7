"""The recipe serve_cluster on a local Ray cluster of two replicas, one of which is killed while it speaks."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import numpy as np
import pytest

from kalle.synthesis.kalle import Kalle

ray = pytest.importorskip("ray")
pytest.importorskip("fastapi")
from ray import serve  # noqa: E402

RECIPE = Path(__file__).parents[2] / "recipes" / "serve_cluster" / "cluster.py"
SPEECH = "/v1/audio/speech"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kalle_serve_cluster", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kalle_serve_cluster"] = module
    spec.loader.exec_module(module)
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(module)  # the replicas cannot import it by name
    return module


@pytest.fixture(scope="module")
def url(recipe: ModuleType, toy_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    ray.init(num_cpus=3, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        port = 18437
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        voices = tmp_path_factory.mktemp("voices")
        # toy weights never stop: lengths are what the cap says, so every answer takes the same work
        options = recipe.Options(model=str(toy_weights), voices=str(voices), insecure=True, replicas=2, rows=4)
        serve.run(recipe.build(options), name="kalle", route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def replicas() -> list[Any]:
    """The actors of the replicas that hold a model."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return [
        ray.get_actor(each["name"], namespace=each["namespace"]) for each in named if "REPLICA" in each["name"] and "model#" in each["name"]
    ]


def model_name(url: str) -> str:
    return httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]


def body(url: str, seed: int, **more: Any) -> dict[str, Any]:
    return {
        "model": model_name(url),
        "input": f"Number {seed} of many.",
        "voice": "default",
        "seed": seed,
        "response_format": "pcm",
        **more,
    }


def test_the_api_is_that_of_one_machine(url: str, toy_weights: Path) -> None:
    answer = httpx.post(url + SPEECH, json=body(url, 5), timeout=300)
    assert answer.status_code == 200
    assert answer.headers["x-seed"] == "5"
    alone = Kalle.from_pretrained(toy_weights, "cpu").synthesize("Number 5 of many.", seed=5)
    spoken = np.frombuffer(answer.content, "<i2") / 2**15
    assert len(spoken) == len(alone.audio)
    assert np.abs(spoken - np.clip(alone.audio, -1, 1)).max() < 1e-4 + 1 / 2**15
    assert httpx.post(url + SPEECH, json=body(url, 5, pitch=2), timeout=60).status_code == 400
    with httpx.stream("POST", url + SPEECH, json=body(url, 6, stream_format="sse"), timeout=300) as events:
        kinds = [json.loads(line[6:])["type"] for line in events.iter_lines() if line.startswith("data: ")]
    assert kinds[-1] == "speech.audio.done"
    assert set(kinds[:-1]) == {"speech.audio.delta"}
    assert httpx.post(url + SPEECH, content=b"x" * (30 * 2**20), timeout=60).status_code == 413


def test_a_killed_replica_loses_no_whole_answer_and_ends_its_streams(url: str) -> None:
    seeds = list(range(20, 36))
    bodies = {seed: body(url, seed) for seed in seeds}
    expected = {seed: httpx.post(url + SPEECH, json=bodies[seed], timeout=300).content for seed in seeds}

    def ask(seed: int) -> httpx.Response:
        return httpx.post(url + SPEECH, json=bodies[seed], timeout=600)

    def follow(seed: int) -> list[str]:
        with httpx.stream("POST", url + SPEECH, json={**bodies[seed], "stream_format": "sse"}, timeout=600) as events:
            assert events.status_code == 200
            return [json.loads(line[6:])["type"] for line in events.iter_lines() if line.startswith("data: ")]

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        asked = {seed: pool.submit(ask, seed) for seed in seeds}
        streams = [pool.submit(follow, seed) for seed in seeds[:6]]
        time.sleep(1.0)
        ray.kill(replicas()[0])
        answers = {seed: future.result() for seed, future in asked.items()}
        endings = [future.result()[-1] for future in streams]
    assert {answer.status_code for answer in answers.values()} == {200}
    for seed, answer in answers.items():
        difference = np.frombuffer(answer.content, "<i2").astype(int) - np.frombuffer(expected[seed], "<i2")
        assert np.abs(difference).max() <= 4  # 1e-4 of full scale: rows beside it round differently
    assert set(endings) <= {"speech.audio.done", "error"}
    assert httpx.get(f"{url}/health", timeout=60).status_code == 200

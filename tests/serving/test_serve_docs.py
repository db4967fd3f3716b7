"""The examples of docs/how-to/serve.md, run against a server with the weights that ship."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import soundfile

from kalle.checkpoint import shipped_folder

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "serve.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"
pytestmark = pytest.mark.slow


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@contextmanager
def serving(voices: Path, *flags: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`kalle serve` in a process of its own, which ends without an error when it is asked to."""
    for module in ("fastapi", "uvicorn", "prometheus_client", "av"):
        pytest.importorskip(module)
    command = [sys.executable, "-m", "kalle", "serve", "--model", str(shipped_folder()), "--device", "cpu", "--port", "0"]
    with subprocess.Popen([*command, "--voices", str(voices), *flags], stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        lines: list[str] = []
        try:
            for line in server.stderr:
                lines.append(line)
                if found := re.search(r"at (http://127\.0\.0\.1:\d+)/v1", line):
                    break
            else:
                pytest.fail("the server did not start: " + "".join(lines))
            yield found[1], server
        finally:
            server.terminate()
            left = server.stderr.read()
    assert server.returncode == 0, left
    assert left.endswith("the server has ended\n")
    assert "Traceback" not in left


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("gradio")
    with serving(tmp_path_factory.mktemp("voices"), "--web") as (found, _):
        yield found


def test_python(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openai")
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("py")
    exec(compile(code.replace(ADDRESS, address), "serve.md", "exec"), {})
    assert soundfile.info("speech.wav").duration > 0.5
    seed, *pieces = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\d+ end", seed)
    assert len(pieces) > 1


def test_curl(address: str, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    soundfile.write(tmp_path / "anna.wav", *soundfile.read(Path(__file__).parents[2] / "docs" / "audio" / "hello.mp3"))
    answers = []
    for block in blocks("bash"):
        for line in block.replace(ADDRESS, address).splitlines():
            if line.startswith("curl"):
                run = subprocess.run(shlex.split(line), cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120)
                answers.append(run.stdout)
    assert soundfile.info(tmp_path / "speech.mp3").duration > 0.5
    assert "speech.audio.done" in (tmp_path / "events.txt").read_text()
    _, _, listed, kept, deleted = answers
    assert '"emma"' in listed
    assert '"Anna"' in kept
    assert '"deleted":true' in deleted


def test_javascript(address: str) -> None:
    if shutil.which("node") is None:
        pytest.skip("no node")
    (code,) = blocks("js")
    command = ["node", "--input-type=module", "-e", code.replace(ADDRESS, address)]
    rate, size = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.split()
    assert rate == "16000"
    assert int(size) > 16000


def test_the_page_is_served_beside_the_api(address: str) -> None:
    page = httpx.get(f"{address}/web/", follow_redirects=True)
    assert page.status_code == 200
    assert "kalle" in page.text
    assert httpx.get(f"{address}/web/kalle/audio/none").status_code == 404
    assert httpx.get(f"{address}/web/", headers={"Host": "evil.example"}).status_code == 403


def test_the_end_lets_a_stream_end(tmp_path: Path) -> None:
    body = {"model": "kalle-nano", "input": "It was a bright cold day. " * 3, "seed": 3, "stream_format": "sse", "response_format": "pcm"}
    with serving(tmp_path) as (address, server), httpx.stream("POST", f"{address}/v1/audio/speech", json=body, timeout=120) as stream:
        lines = (line for line in stream.iter_lines() if line)
        assert "speech.audio.delta" in next(lines)
        server.terminate()
        *_, last = lines
        assert "speech.audio.done" in last


def test_the_end_does_not_wait_for_ever(tmp_path: Path) -> None:
    body = {"model": "kalle-nano", "input": "It was a bright cold day. " * 60, "stream_format": "sse", "response_format": "pcm"}
    with (
        serving(tmp_path, "--grace", "0.5") as (address, server),
        httpx.stream("POST", f"{address}/v1/audio/speech", json=body, timeout=120) as stream,
    ):
        lines = (line for line in stream.iter_lines() if line)
        assert "speech.audio.delta" in next(lines)
        server.terminate()
        *_, last = lines
        assert "shutting_down" in last

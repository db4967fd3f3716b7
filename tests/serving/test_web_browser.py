"""The page in a real browser: what a user types, presses, hears and reads."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kalle.audio import write_audio
from kalle.checkpoint import read_json, write_json

pytestmark = pytest.mark.slow
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TEXT = "Hello there."
ADDRESS = re.compile(r"the page is at (http://127\.0\.0\.1:\d+)/")
WAIT_MS = 60_000


@pytest.fixture(scope="module")
def speaking_weights(toy_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained weights whose stop rule never stops, so that every text is as long as its cap and heard as noise."""
    folder = tmp_path_factory.mktemp("web") / "weights"
    shutil.copytree(toy_weights, folder)
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "stop": {"threshold": 0.0, "min_index": 3}})
    return folder


@pytest.fixture(scope="module")
def address(speaking_weights: Path) -> Iterator[str]:
    """The page, served by `kalle web` in a process of its own, which must leave nothing behind."""
    pytest.importorskip("gradio")
    voices, temporary = speaking_weights.parent / "kept", speaking_weights.parent / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-m", "kalle", "web", "--model", str(speaking_weights), "--port", "0", "--voices", str(voices)]
    with subprocess.Popen(
        [*command, "--device", "cpu", "--max-text", "300"], stderr=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(temporary)}
    ) as server:
        lines: list[str] = []
        try:
            for line in server.stderr:
                lines.append(line)
                if found := ADDRESS.search(line):
                    break
            else:
                pytest.fail("the server did not start: " + "".join(lines))
            yield found[1]
        finally:
            server.terminate()
            left = server.stderr.read()
    assert server.returncode == 0, left
    assert left.endswith("the page has ended\n")
    assert "error" not in left
    assert "Traceback" not in left
    assert not list(temporary.rglob("*.wav")), "sound was left behind"
    assert not list(temporary.glob("kalle-web-*"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("there is no Chromium on the path")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """A fresh session; whatever it asks of anything but the server fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    opened = context.new_page()
    opened.set_default_timeout(WAIT_MS)
    asked: list[str] = []
    errors: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto(address)
    opened.wait_for_selector("#speak")
    yield opened
    context.close()
    assert asked
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not errors


def cap_seconds(page: Any, seconds: float) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Longest sentence in seconds").fill(str(seconds))


def samples(page: Any, url: str) -> np.ndarray:
    """Decode the file at ``url`` in the page."""
    script = """async url => {
        const bytes = await (await fetch(url)).arrayBuffer();
        const audio = await new OfflineAudioContext(1, 1, 16000).decodeAudioData(bytes);
        return Array.from(audio.getChannelData(0));
    }"""
    return np.array(page.evaluate(script, url))


def spoken(page: Any) -> None:
    page.wait_for_selector("#facts dd")


def player(page: Any) -> dict[str, str]:
    return page.evaluate("({...document.querySelector('.kalle-player').dataset})")


def test_text_becomes_sound(page: Any, tmp_path: Path) -> None:
    page.fill("#text textarea", TEXT)
    assert page.inner_text(".kalle-count") == f"{len(TEXT)} of 300 characters"
    cap_seconds(page, 1.5)
    page.locator("#seed input").fill("7")
    page.click("#speak")
    page.wait_for_function("document.querySelector('.kalle-player').dataset.state === 'playing'")
    spoken(page)
    page.wait_for_function("document.querySelector('.kalle-player').dataset.state === 'done'")
    heard = player(page)
    assert int(heard["samples"]) == 24000
    assert float(heard["peak"]) > 1e-3, "silence was played"
    streamed = page.evaluate("async name => Array.from(new Uint8Array(await (await fetch(name)).arrayBuffer()))", heard["address"])
    pcm = np.frombuffer(bytes(streamed), "<i2") / 32768
    with page.expect_download() as saved:
        page.click("#download")
    saved.value.save_as(tmp_path / "saved.wav")
    audio = samples(page, saved.value.url)
    np.testing.assert_allclose(audio, pcm, atol=1e-4)
    assert audio.std() > 1e-3
    assert (tmp_path / "saved.wav").stat().st_size == 44 + 2 * 24000
    facts = page.inner_text("#facts")
    for words in ("1.50 s (150 frames)", "RTF", "max_frames", "the model's own", "7"):
        assert words in facts
    assert page.get_by_role("img", name="mel spectrogram").evaluate("image => image.naturalWidth") > 500


def test_mistakes_are_said_in_the_page(page: Any, tmp_path: Path) -> None:
    page.click("#speak")
    page.wait_for_selector("#message [role=alert]")
    assert "The text is empty" in page.inner_text("#message")
    assert page.inner_text("#speak") == "Speak"
    write_audio(tmp_path / "me.wav", 0.3 * np.sin(np.arange(32000) / 10), 16000)
    page.fill("#text textarea", TEXT)
    page.get_by_label("Recording", exact=True).check()
    page.set_input_files("#recording input[type=file]", tmp_path / "me.wav")
    page.wait_for_selector("#recording button[aria-label=Clear]")
    page.click("#speak")
    page.wait_for_function("document.querySelector('#message').innerText.includes('A recording without its transcript')")
    cap_seconds(page, 0.5)
    page.fill("#transcript textarea", "A long tone.")
    page.click("#speak")
    spoken(page)
    assert "your recording" in page.inner_text("#facts")
    assert not page.query_selector("#message [role=alert]")


def test_numbers_out_of_bounds_are_refused_in_our_words(page: Any) -> None:
    page.fill("#text textarea", TEXT)
    cap_seconds(page, -1)
    page.click("#speak")
    page.wait_for_function("document.querySelector('#message').innerText.includes('Bad longest length: got -1.0')")
    page.get_by_label("Longest sentence in seconds").fill("0.5")
    assert page.locator("#seed input").input_value() == ""
    page.locator("#seed input").fill("1.5")
    page.click("#speak")
    page.wait_for_function("document.querySelector('#message').innerText.includes('Bad seed: got \\'1.5\\'')")
    page.get_by_label("Random voice").check()
    page.fill("#voice-seed input", "five")
    for button, message in (("#listen", "#voice-message"), ("#keep", "#voice-message"), ("#speak", "#message")):
        page.click(button)
        page.wait_for_function(f"document.querySelector('{message}').innerText.includes('Bad seed of the voice: got \\'five\\'')")
        page.get_by_label("Name for this voice").fill("x")
    page.get_by_label("Stored voice").check()
    page.locator("#seed input").fill("-3")
    page.click("#speak")
    page.wait_for_function("document.querySelector('#message').innerText.includes('Bad seed: got -3')")
    seeds = set()
    for _ in range(2):
        page.locator("#seed input").fill("")
        page.click("#speak")
        page.wait_for_selector("#facts dd", state="detached")
        spoken(page)
        seeds.add(page.locator("#facts dt:text-is('Seed') + dd").inner_text())
    assert len(seeds) == 2, "an empty field drew no seed"
    page.get_by_label("Longest sentence in seconds").fill("")
    page.locator("#seed input").fill("3")
    page.click("#speak")
    page.wait_for_selector("#facts dd", state="detached")
    page.wait_for_function("Number(document.querySelector('.kalle-player').dataset.samples) > 0")
    page.click("#stop")
    spoken(page)


def test_a_random_voice_is_kept_and_speaks(page: Any, browser: Any, address: str, speaking_weights: Path) -> None:
    page.get_by_label("Random voice").check()
    page.click("#another")
    page.wait_for_function("document.querySelector('#voice-seed input').value !== ''")
    page.fill("#voice-seed input", "5")
    page.fill("#name input", "Brita")
    page.click("#keep")
    page.wait_for_function("document.querySelector('#stored input')?.value === 'Brita'")
    assert (speaking_weights.parent / "kept" / "Brita.safetensors").is_file()
    page.click("#listen")
    page.wait_for_selector("#sample")
    page.fill("#text textarea", TEXT)
    cap_seconds(page, 0.5)
    page.click("#speak")
    spoken(page)
    assert "Brita" in page.inner_text("#facts")
    other = browser.new_context().new_page()
    other.goto(address)
    other.wait_for_selector("#stored input")
    other.click("#stored input")
    other.get_by_role("option", name="Brita").click()
    assert other.input_value("#stored input") == "Brita"
    other.context.close()


def test_stop_keeps_what_was_made(page: Any) -> None:
    page.fill("#text textarea", " ".join(["Hello there, said the first of them."] * 8))
    page.click("#speak")
    page.wait_for_function("Number(document.querySelector('.kalle-player').dataset.samples) > 0")
    page.click("#stop")
    spoken(page)
    assert "stopped by you" in page.inner_text("#facts")
    assert player(page)["state"] == "stopped"
    assert page.is_enabled("#speak")


def test_stop_ends_the_playback_of_a_result_too(page: Any) -> None:
    page.fill("#text textarea", TEXT)
    cap_seconds(page, 2)
    page.click("#speak")
    spoken(page)
    page.click("#audio button[aria-label=Play]")
    page.wait_for_selector("#audio button[aria-label=Pause]")
    page.click("#stop")
    page.wait_for_selector("#audio button[aria-label=Play]")
    assert player(page)["state"] in ("stopped", "done")


def test_a_bad_upload_is_said_before_anything_is_spoken(page: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.wav").write_text("no audio")
    page.get_by_label("Recording", exact=True).check()
    page.set_input_files("#recording input[type=file]", tmp_path / "notes.wav")
    page.wait_for_function("document.querySelector('#voice-message').innerText.includes('Unreadable audio')")


def test_two_users_are_spoken_to_at_once(page: Any, browser: Any, address: str) -> None:
    other = browser.new_context().new_page()
    other.set_default_timeout(WAIT_MS)
    other.goto(address)
    other.wait_for_selector("#speak")
    page.fill("#text textarea", " ".join(["Hello there, said the first of them."] * 8))
    page.click("#speak")
    page.wait_for_function("Number(document.querySelector('.kalle-player').dataset.samples) > 0")
    other.fill("#text textarea", TEXT)
    cap_seconds(other, 0.5)
    other.click("#speak")
    spoken(other)
    assert "0.50 s" in other.inner_text("#facts")
    page.click("#stop")
    spoken(page)
    other.context.close()


def test_several_texts_are_spoken_and_saved(page: Any, tmp_path: Path) -> None:
    cap_seconds(page, 0.5)
    page.locator("#seed input").fill("7")
    page.get_by_role("tab", name="Several texts").click()
    page.click("#speak-all")
    page.wait_for_function("document.querySelector('#several-message').innerText.includes('only empty lines')")
    page.fill("#lines textarea", "Hello there.\n\nWho <b>is</b> it?")
    page.click("#speak-all")
    page.wait_for_selector("#download-all")
    assert page.locator("#several li").count() == 2
    assert "Who <b>is</b> it?" in page.inner_text("#several")
    for player in page.locator("#several audio").all():
        assert len(samples(page, player.evaluate("sound => sound.src"))) == 8000
    with page.expect_download() as saved:
        page.click("#download-all")
    saved.value.save_as(tmp_path / "all.zip")
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        assert archive.namelist() == ["001.wav", "002.wav", "list.csv"]
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_stop_ends_several_texts_and_leaves_the_page_usable(page: Any) -> None:
    page.get_by_role("tab", name="Several texts").click()
    page.fill("#lines textarea", "\n".join(["Hello there, said the first of them, and the second too."] * 40))
    page.click("#speak-all")
    page.wait_for_function("document.querySelector('#several-message').innerText.includes('of 40 spoken')")
    page.click("#stop")
    page.wait_for_function("document.querySelector('#several-message').innerText.includes('Stopped')")
    page.wait_for_function("!document.querySelector('#message').innerText.includes('Stopping')")
    assert page.is_enabled("#speak-all")
    assert page.is_enabled("#speak")
    assert page.locator("#several li").count() >= 1


def test_what_was_spoken_stays_on_the_page(page: Any) -> None:
    assert not page.is_visible("#history summary")
    cap_seconds(page, 0.5)
    for text in ("Hello there.", "<i>Who</i> is it?"):
        page.fill("#text textarea", text)
        page.click("#speak")
        page.wait_for_function("text => document.querySelector('.kalle-history p')?.textContent === text", arg=text)
    page.click("#history summary")
    entries = page.locator("#history li")
    assert entries.count() == 2
    for entry in entries.all():
        assert len(samples(page, entry.locator("audio").evaluate("sound => sound.src"))) == 8000
        assert "the model's own, seed" in entry.inner_text()
    entries.nth(1).get_by_role("button", name="Use this text").click()
    assert page.input_value("#text textarea") == "Hello there."
    assert page.inner_text(".kalle-count").startswith("12 of")
    with page.expect_download() as saved:
        entries.nth(0).get_by_role("link", name="Download").click()
    assert saved.value.suggested_filename.endswith(".wav")


@pytest.mark.parametrize("source", ["Stored voice", "Recording", "Random voice"])
def test_it_fits_a_phone(page: Any, source: str) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    for place in ("0", "document.body.scrollHeight"):
        page.evaluate(f"window.scrollTo(0, {place})")
        box = page.locator("#speak").bounding_box()
        assert 0 <= box["y"] <= 844 - box["height"], "Speak is in reach wherever one is on the page"
    page.get_by_label(source, exact=True).check()
    page.fill("#text textarea", TEXT)
    cap_seconds(page, 0.5)
    page.click("#speak")
    if source != "Recording":
        spoken(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for name in ("#speak", "#stop", "#listen"):
        page.locator(name).scroll_into_view_if_needed()
        box = page.locator(name).bounding_box()
        assert box["height"] >= 44
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390


def test_the_keyboard_is_enough(page: Any) -> None:
    page.focus("#text textarea")
    page.keyboard.type(TEXT)
    cap_seconds(page, 0.5)
    page.focus("#text textarea")
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "speak":
            break
    assert page.evaluate("document.activeElement.id") == "speak"
    page.keyboard.press("Enter")
    spoken(page)
    unnamed = page.evaluate(
        """[...document.querySelectorAll('button, input:not([type=file]), textarea')].filter(e => e.offsetParent
            && !(e.ariaLabel || e.labels?.length || e.innerText.trim() || e.title || e.closest('label')))
            .map(e => e.outerHTML.slice(0, 200))"""
    )
    assert unnamed == []

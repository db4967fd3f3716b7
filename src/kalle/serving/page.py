"""Which part of the page calls which handler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from kalle.errors import UserError
from kalle.serving.asked import RANDOM, RECORDING, STORED
from kalle.serving.handlers import Handlers, Kept, View, asked_from, choice_from, fresh_seed
from kalle.serving.layout import SpeechParts, VoiceParts, lay_out
from kalle.serving.words import error_html

ASSETS = Path(__file__).parent / "assets"
TITLE = "kalle"
MODEL_QUEUE = "model"
"""Every event that runs the model waits in this one queue, so that one at a time does."""
HUSH = "() => { document.dispatchEvent(new Event('kalle-hush')); }"
CACHE_SWEEP_SECONDS, CACHE_SECONDS = 600, 3600
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Events of the page are nobody's API."""


def build(handlers: Handlers) -> gr.Blocks:
    """The page, ready to launch; it reports to nobody, and its files go after an hour or with the server."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(CACHE_SWEEP_SECONDS, CACHE_SECONDS)) as page:
        voice, speech = lay_out(handlers, (ASSETS / "player.js").read_text(encoding="utf-8"))
        _wire_voice(handlers, voice)
        _wire_speech(handlers, voice, speech)
        page.load(
            lambda: (gr.Dropdown(choices=handlers.voices()), str(fresh_seed())), None, [voice.stored, voice.seed], queue=False, **QUIET
        )
        page.unload(_leaving(handlers))
    return page


def look() -> dict[str, Any]:
    """Theme and style for ``launch``: the system's own fonts, for others would be fetched from elsewhere."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
    theme = gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=fonts, font_mono=["ui-monospace", "monospace"])
    return {"theme": theme, "css": (ASSETS / "page.css").read_text(encoding="utf-8")}


def _wire_voice(handlers: Handlers, voice: VoiceParts) -> None:
    voice.source.change(_groups, voice.source, [*voice.groups, voice.sample], queue=False, **QUIET)
    voice.another.click(lambda: str(fresh_seed()), None, voice.seed, queue=False, **QUIET)

    def listened(*fields: Any) -> tuple[Any, str]:
        try:
            path, message = handlers.sample(choice_from(*fields))
        except UserError as error:
            path, message = None, error_html(str(error))
        return gr.Audio(None if path is None else str(path), visible=path is not None), message

    def kept(name: str, consent: str, *fields: Any) -> list[Any]:
        try:
            result = handlers.keep(choice_from(*fields), name, consent)
        except UserError as error:
            result = Kept(error_html(str(error)), None)
        if result.name is None:
            return [result.message, *[gr.skip()] * 4]
        return [result.message, STORED, gr.Dropdown(choices=handlers.voices(), value=result.name), "", ""]

    model: dict[str, Any] = {
        "concurrency_id": MODEL_QUEUE,
        "concurrency_limit": 1,
        "api_visibility": "private",
        "show_progress_on": voice.message,
    }
    voice.listen.click(listened, voice.choice, [voice.sample, voice.message], **model)
    outputs = [voice.message, voice.source, voice.stored, voice.name, voice.consent]
    voice.keep.click(kept, [voice.name, voice.consent, *voice.choice], outputs, **model)


def _wire_speech(handlers: Handlers, voice: VoiceParts, speech: SpeechParts) -> None:
    view = [speech.message, speech.player, speech.audio, speech.download, speech.facts, speech.figure, speech.speak, speech.stop]

    def begun(request: gr.Request, text: str, seed: str, temperature: float, max_seconds: str, *fields: Any) -> Any:
        try:
            asked = asked_from(text, choice_from(*fields), seed, temperature, max_seconds)
        except UserError as error:
            return _shown(View(error_html(str(error))))
        return _shown(handlers.begin(str(request.session_hash), asked))

    def ran(request: gr.Request) -> Iterator[Any]:
        yield [gr.skip()] * len(view)  # Gradio takes no value at all for an order to empty everything.
        for step in handlers.run(str(request.session_hash)):
            yield _changed(step)

    def stopped(request: gr.Request) -> Any:
        step = handlers.stop(str(request.session_hash))
        return [gr.skip()] * len(view) if step is None else _changed(step)

    asked = [speech.text, *speech.numbers, *voice.choice]
    for press in (speech.speak.click, speech.text.submit):
        press(begun, asked, view, queue=False, js=None, **QUIET).then(
            ran,
            None,
            view,
            concurrency_id=MODEL_QUEUE,
            concurrency_limit=1,
            **QUIET,
        )
    speech.stop.click(stopped, None, view, queue=False, js=HUSH, **QUIET)
    for sound in (speech.audio, voice.sample):
        sound.play(None, js=HUSH, **QUIET)
    speech.text.change(None, speech.text, None, js=(ASSETS / "counter.js").read_text(encoding="utf-8"), **QUIET)


def _shown(view: View) -> list[Any]:
    """``view`` as new states of the components that ``_wire_speech`` lists."""
    path = None if view.audio is None else str(view.audio)
    return [
        view.message,
        view.token,
        gr.Audio(path, visible=path is not None),
        gr.DownloadButton(value=path, visible=path is not None),
        view.facts,
        view.figure,
        gr.Button(interactive=not view.busy),
        gr.Button(interactive=view.busy),
    ]


def _changed(view: View) -> list[Any]:
    """``_shown``, but of a busy page only the message: the rest would be sent and drawn again for nothing."""
    shown = _shown(view)
    return [shown[0], *[gr.skip()] * (len(shown) - 1)] if view.busy else shown


def _groups(source: str) -> list[Any]:
    shown = (source == STORED, source == RECORDING, source == RANDOM, source in (RECORDING, RANDOM))
    return [*(gr.Group(visible=visible) for visible in shown), gr.Audio(None, visible=False)]


def _leaving(handlers: Handlers) -> Callable[[gr.Request], None]:
    def left(request: gr.Request) -> None:
        handlers.leave(str(request.session_hash))

    return left

"""The page: every component in reading order, and which of them calls which handler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import gradio as gr

from kalle.errors import UserError
from kalle.serving.handlers import (
    MODELS_OWN,
    Handlers,
    KeepOutcome,
    SeveralView,
    View,
    choice_from,
    error_html,
    fresh_seed,
    options_from_fields,
    request_from_fields,
)
from kalle.serving.several import MOST_TEXTS
from kalle.serving.voices import RANDOM, RECORDING, STORED

if TYPE_CHECKING:
    from kalle.serving.server import FieldTest

EXAMPLES = {
    "en": ("Hello! This voice is drawn frame by frame.", "The sun came up slowly over the quiet harbour."),
    "zh": ("你好！这个声音是一帧一帧画出来的。", "太阳慢慢升起，港口里很安静。"),
}
"""Texts to try, by the language of the weights."""
SOURCES = (("Stored voice", STORED), ("Recording", RECORDING), ("Random voice", RANDOM))
_PLAYER = (
    '<div class="kalle-player" data-rate="{rate}" data-state="idle" role="group" aria-label="Playback while it is being made">'
    '<span class="time">Nothing to play yet</span><span class="meter" aria-hidden="true"><span></span></span>'
    '<button type="button" disabled>Pause</button></div>'
)

_HISTORY = '<details class="kalle-history" hidden><summary></summary><ol></ol></details>'
"""Filled by history.js, in the browser alone."""


@dataclass(frozen=True)
class VoiceParts:
    """The components that choose a voice."""

    source: gr.Radio
    stored: gr.Dropdown
    recording: gr.Audio
    transcript: gr.Textbox
    seed: gr.Textbox
    another: gr.Button
    listen: gr.Button
    sample: gr.Audio
    name: gr.Textbox
    consent: gr.Textbox
    keep: gr.Button
    message: gr.HTML
    groups: tuple[gr.Group, gr.Group, gr.Group, gr.Group]
    """Shown for a stored voice, a recording, a random voice, and for what can be kept."""

    @property
    def choice(self) -> list[Any]:
        """The fields of ``handlers.choice_from``, in order."""
        return [self.source, self.stored, self.recording, self.transcript, self.seed]


@dataclass(frozen=True)
class SeveralParts:
    """The components that ask for several texts and show them."""

    lines: gr.Textbox
    speak: gr.Button
    message: gr.HTML
    table: gr.HTML
    download: gr.DownloadButton


@dataclass(frozen=True)
class SpeechParts:
    """The components that ask for speech and show it."""

    text: gr.Textbox
    seed: gr.Textbox
    temperature: gr.Slider
    max_seconds: gr.Textbox
    speak: gr.Button
    stop: gr.Button
    message: gr.HTML
    player: gr.HTML
    audio: gr.Audio
    download: gr.DownloadButton
    facts: gr.HTML
    figure: gr.HTML
    several: SeveralParts

    @property
    def numbers(self) -> list[Any]:
        """The last fields of ``handlers.request_from_fields``, in order."""
        return [self.seed, self.temperature, self.max_seconds]


def lay_out(handlers: Handlers, player_js: str) -> tuple[VoiceParts, SpeechParts]:
    """Put every component on the page that is being built."""
    kalle, limit = handlers.backend.kalle, handlers.backend.max_text
    gr.HTML(
        f"<h1>kalle</h1><p>Text to speech at {kalle.sample_rate // 1000} kHz, computed on the {kalle.device.type.upper()}.</p>",
        elem_classes="kalle-head",
    )
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=300):
            with gr.Tabs():
                with gr.Tab("One text"):
                    text = gr.Textbox(label="Text", lines=5, max_lines=14, placeholder="What to say", elem_id="text")
                    gr.HTML(f'<p class="kalle-count" data-limit="{limit}" aria-live="off">0 of {limit} characters</p>', elem_id="count")
                    examples = EXAMPLES.get(kalle.config.language or "en", EXAMPLES["en"])
                    gr.Examples([[example] for example in examples], inputs=text, label="Try one of these", elem_id="examples")
                with gr.Tab("Several texts", elem_id="several-tab"):
                    several = _several()
            voice = _voice(handlers)
            with gr.Accordion("Settings", open=False):
                seed = _number("Seed", "The same seed gives the same speech; empty draws one.", "seed")
                temperature = gr.Slider(0, 1.5, kalle.temperature, step=0.05, label="Temperature", info="1 is the model's own spread.")
                max_seconds = _number("Longest sentence in seconds", "Empty: three times the usual pace.", "max-seconds")
        with gr.Column(scale=6, min_width=300):
            with gr.Row(elem_classes="kalle-actions"):
                speak = gr.Button("Speak", variant="primary", elem_id="speak", min_width=140)
                stop = gr.Button("Stop", variant="stop", elem_id="stop", interactive=False, min_width=100)
            message = gr.HTML(elem_id="message")
            rate = kalle.sample_rate
            player = gr.HTML("", html_template=_PLAYER.replace("{rate}", str(rate)), js_on_load=player_js, elem_id="player")
            audio = gr.Audio(label="Speech", interactive=False, type="filepath", buttons=[], visible=False, elem_id="audio")
            download = gr.DownloadButton("Download WAV", visible=False, elem_id="download", elem_classes="kalle-big")
            facts, figure = gr.HTML(elem_id="facts"), gr.HTML(elem_id="figure")
            gr.HTML(_HISTORY, elem_id="history")
    return voice, SpeechParts(text, seed, temperature, max_seconds, speak, stop, message, player, audio, download, facts, figure, several)


def _several() -> SeveralParts:
    lines = gr.Textbox(
        label=f"Texts, one a line, at most {MOST_TEXTS}",
        lines=6,
        max_lines=20,
        placeholder="What to say\nWhat to say next",
        elem_id="lines",
    )
    speak = gr.Button("Speak all", variant="primary", elem_id="speak-all", elem_classes="kalle-big")
    message, table = gr.HTML(elem_id="several-message"), gr.HTML(elem_id="several")
    download = gr.DownloadButton("Download all (ZIP)", visible=False, elem_id="download-all", elem_classes="kalle-big")
    return SeveralParts(lines, speak, message, table, download)


def _number(label: str, info: str | None, elem_id: str) -> gr.Textbox:
    # Not Gradio's number: it shows 0 where nothing was typed, rounds silently and refuses in an exception's words.
    return gr.Textbox(label=label, info=info, max_lines=1, min_width=140, elem_id=elem_id)


def _voice(handlers: Handlers) -> VoiceParts:
    needs = "needed" if not handlers.backend.kalle.has_speaker_encoder else "optional, keeps the way of speaking too"
    with gr.Group():
        source = gr.Radio(list(SOURCES), value=STORED, label="Voice", elem_id="source")
        with gr.Group() as stored_group:
            stored = gr.Dropdown(handlers.voices(), value=MODELS_OWN, label="Stored voices", elem_id="stored", filterable=True)
        with gr.Group(visible=False) as recording_group:
            recording = gr.Audio(
                sources=["upload", "microphone"],
                type="filepath",
                label="Recording of one voice, 2 to 20 seconds",
                buttons=[],
                elem_id="recording",
            )
            transcript = gr.Textbox(label=f"What is said in it, word for word ({needs})", lines=2, elem_id="transcript")
        with gr.Group(visible=False) as random_group, gr.Row():
            seed = _number("Seed of the voice", None, "voice-seed")
            another = gr.Button("Another one", min_width=120, elem_id="another")
    listen = gr.Button("Listen to this voice", size="md", elem_id="listen", elem_classes="kalle-big")
    sample = gr.Audio(label="Sample of the voice", interactive=False, autoplay=True, buttons=[], visible=False, elem_id="sample")
    with gr.Group(visible=False) as keep_group:
        name = gr.Textbox(label="Name for this voice", max_lines=1, elem_id="name")
        consent = gr.Textbox(label="Who spoke, and what they agreed to (optional, stored with it)", max_lines=1, elem_id="consent")
        keep = gr.Button("Keep this voice", elem_id="keep", elem_classes="kalle-big")
    message = gr.HTML(elem_id="voice-message")
    groups = (stored_group, recording_group, random_group, keep_group)
    return VoiceParts(source, stored, recording, transcript, seed, another, listen, sample, name, consent, keep, message, groups)


ASSETS = Path(__file__).parent / "assets"
TITLE = "kalle"
MODEL_QUEUE = "model"
"""Events that run the model beside the engine, such as making a voice, wait in this one queue, so that one at a time does."""
SILENCE_PLAYER = "() => { document.dispatchEvent(new Event('kalle-silence')); }"
SILENCE_ALL = """() => {
  document.dispatchEvent(new Event('kalle-silence'));
  for (const pause of document.querySelectorAll('#audio button[aria-label="Pause"], #sample button[aria-label="Pause"]')) pause.click();
}"""
CACHE_SWEEP_SECONDS, CACHE_SECONDS = 600, 3600
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Events of the page are no public API."""


def build(handlers: Handlers) -> gr.Blocks:
    """The page, ready to launch; it reports to nobody, and its files go after an hour or with the server."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(CACHE_SWEEP_SECONDS, CACHE_SECONDS)) as page:
        voice, speech = lay_out(handlers, (ASSETS / "player.js").read_text(encoding="utf-8"))
        _wire_voice(handlers, voice)
        _wire_speech(handlers, voice, speech)
        _wire_several(handlers, voice, speech)
        page.load(
            lambda: (gr.Dropdown(choices=handlers.voices()), str(fresh_seed())), None, [voice.stored, voice.seed], queue=False, **QUIET
        )
        page.unload(_leaving(handlers))
    return page


def field_checks(page: gr.Blocks, handlers: Handlers, uploads: Path) -> dict[int, list[FieldTest]]:
    """For every event of ``page`` that calls a function: whether a value that a client sent fits each of its input components.

    Gradio answers others with an exception. Recordings are files below ``uploads``, where Gradio puts what it is sent.
    """

    def test_of(component: Any) -> FieldTest:
        if isinstance(component, gr.Slider):
            return lambda value: _is_number(value) and component.minimum <= value <= component.maximum
        if isinstance(component, gr.Radio):
            return lambda value: value in [choice for _, choice in component.choices]
        if isinstance(component, gr.Dropdown):
            return lambda value: value is None or value in handlers.voices()
        if isinstance(component, gr.Audio):
            return lambda value: value is None or _is_upload(value, uploads)
        if isinstance(component, gr.Dataset):
            return lambda value: type(value) is int and 0 <= value < len(component.samples or [])
        return lambda value: value is None or isinstance(value, str)

    return {number: [test_of(part) for part in event.inputs] for number, event in page.fns.items() if event.fn is not None}


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_upload(value: object, uploads: Path) -> bool:
    path = value.get("path") if isinstance(value, dict) else None
    if not isinstance(path, str) or "\0" in path:
        return False
    found = Path(path).resolve()
    return found.is_relative_to(uploads.resolve()) and found.is_file()


def look() -> dict[str, Any]:
    """Theme and style for ``launch``: the system's own fonts, for others would be fetched from elsewhere."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
    theme = gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=fonts, font_mono=["ui-monospace", "monospace"])
    return {"theme": theme, "css": (ASSETS / "page.css").read_text(encoding="utf-8")}


def _wire_voice(handlers: Handlers, voice: VoiceParts) -> None:
    voice.source.change(_groups, voice.source, [*voice.groups, voice.sample], queue=False, **QUIET)
    for given in (voice.recording.upload, voice.recording.stop_recording, voice.recording.clear):
        given(handlers.uploaded, voice.recording, voice.message, queue=False, api_visibility="private", show_progress_on=voice.message)
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
            result = KeepOutcome(error_html(str(error)), None)
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
            speech_request = request_from_fields(text, choice_from(*fields), seed, temperature, max_seconds)
        except UserError as error:
            return _shown(View(error_html(str(error))))
        return _shown(handlers.begin(str(request.session_hash), speech_request))

    def ran(request: gr.Request) -> Iterator[Any]:
        yield [gr.skip()] * len(view)  # Gradio takes no value at all for an order to empty everything.
        for step in handlers.run(str(request.session_hash)):
            yield _changed(step)

    def stopped(request: gr.Request) -> Any:
        step = handlers.stop(str(request.session_hash))
        return [gr.skip()] * len(view) if step is None else _changed(step)

    fields = [speech.text, *speech.numbers, *voice.choice]
    for press in (speech.speak.click, speech.text.submit):
        speaking = press(begun, fields, view, queue=False, js=None, **QUIET).then(ran, None, view, concurrency_limit=None, **QUIET)
        speaking.then(None, speech.audio, None, js=(ASSETS / "history.js").read_text(encoding="utf-8"), **QUIET)
    speech.stop.click(stopped, None, view, queue=False, js=SILENCE_ALL, **QUIET)
    for sound in (speech.audio, voice.sample):
        sound.play(None, js=SILENCE_PLAYER, **QUIET)
    speech.text.change(None, speech.text, None, js=(ASSETS / "counter.js").read_text(encoding="utf-8"), **QUIET)


def _wire_several(handlers: Handlers, voice: VoiceParts, speech: SpeechParts) -> None:
    parts = speech.several
    view = [parts.message, parts.table, parts.download, parts.speak, speech.speak, speech.stop, speech.message]

    def begun(request: gr.Request, lines: str, seed: str, temperature: float, max_seconds: str, *fields: Any) -> Any:
        try:
            choice, options = choice_from(*fields), options_from_fields(seed, temperature, max_seconds)
        except UserError as error:
            return _shown_several(SeveralView(error_html(str(error))))
        return _shown_several(handlers.begin_several(str(request.session_hash), lines, choice, options))

    def ran(request: gr.Request) -> Iterator[Any]:
        yield [gr.skip()] * len(view)
        for step in handlers.run_several(str(request.session_hash)):
            shown = _shown_several(step)
            yield [shown[0], *[gr.skip()] * (len(shown) - 1)] if step.busy else shown

    fields = [parts.lines, *speech.numbers, *voice.choice]
    parts.speak.click(begun, fields, view, queue=False, js=None, **QUIET).then(ran, None, view, concurrency_limit=None, **QUIET)


def _shown_several(view: SeveralView) -> list[Any]:
    """``view`` as new states of the components that ``_wire_several`` lists."""
    path = None if view.archive is None else str(view.archive)
    return [
        view.message,
        view.table,
        gr.DownloadButton(value=path, visible=path is not None),
        gr.Button(interactive=not view.busy),
        *([gr.skip()] * 3 if view.replaced else [gr.Button(interactive=not view.busy), gr.Button(interactive=view.busy), ""]),
    ]


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
        gr.Button(interactive=view.busy or bool(view.token)),  # it also stops what is being played
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

"""From text ids to speech: the sampling loop, the stop rule, voices and results. The whole chain is ``kalle.Kalle``."""

from kalle.synthesis.adapter import Adapter
from kalle.synthesis.longform import LongForm, LongFormOptions, speak_long
from kalle.synthesis.quirks import ReleaseQuirks
from kalle.synthesis.request import SpeechRequest
from kalle.synthesis.sampling import Frame, Generation, StopRule, generate
from kalle.synthesis.speech import Speech
from kalle.synthesis.stream import SpeechStream
from kalle.synthesis.voice import Voice

__all__ = [
    "Adapter",
    "Frame",
    "Generation",
    "LongForm",
    "LongFormOptions",
    "ReleaseQuirks",
    "Speech",
    "SpeechRequest",
    "SpeechStream",
    "StopRule",
    "Voice",
    "generate",
    "speak_long",
]

"""From text to speech: options of a request, the loop, batches, streams, long texts, voices, results. The whole is ``kalle.Kalle``."""

from kalle.synthesis.adapter import Adapter
from kalle.synthesis.generate import Frame, FrameModel, Generation, generate
from kalle.synthesis.longform import LongForm, Part, speak_long
from kalle.synthesis.options import GenerationOptions, SpeechRequest, StopRule
from kalle.synthesis.release_compat import ReleaseCompatibility
from kalle.synthesis.speech import Speech
from kalle.synthesis.stream import SpeechStream
from kalle.synthesis.voice import Voice

__all__ = [
    "Adapter",
    "Frame",
    "FrameModel",
    "Generation",
    "GenerationOptions",
    "LongForm",
    "Part",
    "ReleaseCompatibility",
    "Speech",
    "SpeechRequest",
    "SpeechStream",
    "StopRule",
    "Voice",
    "generate",
    "speak_long",
]

"""From text ids to speech: the sampling loop, the stop rule, voices and results. The whole chain is ``kalle.Kalle``."""

from kalle.synthesis.quirks import ReleaseQuirks
from kalle.synthesis.sampling import Frame, Generation, StopRule, generate
from kalle.synthesis.speech import Speech
from kalle.synthesis.voice import Voice

__all__ = ["Frame", "Generation", "ReleaseQuirks", "Speech", "StopRule", "Voice", "generate"]

"""From a prepared corpus to shards of latents, or of waveforms: their format, written and read, and their mix."""

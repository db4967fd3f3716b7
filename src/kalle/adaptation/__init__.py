"""Test-time training: a few hundred steps on one recording, kept as a small adapter."""

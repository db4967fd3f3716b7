"""Readers: what users bring becomes a list of source items; nothing is judged by its sound here."""

"""Adapting a language model to one recording."""

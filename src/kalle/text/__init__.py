"""Tokenizers, and the order of tokens in a prompt."""

from kalle.text.tokenizer import Tokenizer, prompt_ids

__all__ = ["Tokenizer", "prompt_ids"]

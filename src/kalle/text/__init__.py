"""Tokenizers, and the order of tokens in a prompt."""

from kalle.text.prompt import prompt_ids
from kalle.text.tokenizer import Tokenizer

__all__ = ["Tokenizer", "prompt_ids"]

"""The Llama 3 tokenizer with KALL-E's tokens, built from Meta's ``tokenizer.model``."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from kalle.errors import UserError
from kalle.text.tokenizer import KALLE_TOKENS, Tokenizer, byte_symbols, special_token

LLAMA3_RANKS = 128_000
LLAMA3_SPECIALS = 256
# The way Llama 3 cuts text before merging, as its own tokenizer.py has it:
# https://github.com/meta-llama/llama-models/blob/main/models/llama3/tokenizer.py
SPLIT_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_NAMED_SPECIALS = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}


def llama3_tokenizer(tokenizer_model: str | Path) -> Tokenizer:
    """Build the tokenizer from ``tokenizer_model``, whose lines are "base64 bytes, space, rank".

    Ids 0..127999 are the ranks of the file, 128000..128255 Llama's special tokens, and the tokens of KALL-E follow.
    A UserError when the file is missing, unreadable or not Llama 3's.
    """
    ranks = read_ranks(Path(tokenizer_model))
    symbols = byte_symbols()
    vocabulary = {spell(piece, symbols): rank for piece, rank in ranks.items()}
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges(ranks, symbols), ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([special_token(name) for name in (*llama3_specials(), *KALLE_TOKENS)])
    return Tokenizer(backend)


def read_ranks(path: Path) -> dict[bytes, int]:
    """The byte sequences of a tiktoken file with their ranks; a UserError when it isn't Llama 3's."""
    if not path.is_file():
        raise UserError(f"file not found: got '{path}', expected the tokenizer.model of Llama 3; check the path")
    try:
        lines = path.read_bytes().splitlines()
        ranks = {base64.b64decode(piece, validate=True): int(rank) for piece, rank in (line.split() for line in lines if line)}
    except (ValueError, binascii.Error):
        raise UserError(
            f"not a tiktoken file: '{path}', expected lines of base64 and a rank; "
            "use the tokenizer.model of Llama 3 (the SentencePiece one of Llama 2 does not fit)"
        ) from None
    if sorted(ranks.values()) != list(range(LLAMA3_RANKS)):
        raise UserError(
            f"not the tokenizer of Llama 3: '{path}' has {len(ranks)} ranks, expected {LLAMA3_RANKS}; use Llama 3's tokenizer.model"
        )
    return ranks


def merges(ranks: dict[bytes, int], symbols: list[str]) -> list[tuple[str, str]]:
    """Every pair of known pieces that makes a known piece, by the rank of the result, then of the parts.

    tiktoken joins whichever neighbours make the piece of lowest rank, and keeps no list of merges; listing all pairs
    in rank order gives a merge-based BPE the same choices.
    """
    found: list[tuple[int, int, int, bytes, bytes]] = []
    for piece, rank in ranks.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ranks and right in ranks:
                found.append((rank, ranks[left], ranks[right], left, right))
    return [(spell(left, symbols), spell(right, symbols)) for _, _, _, left, right in sorted(found)]


def spell(piece: bytes, symbols: list[str]) -> str:
    """``piece`` in the printable characters of a byte-level vocabulary."""
    return "".join(symbols[value] for value in piece)


def llama3_specials() -> list[str]:
    """The names of ids 128000..128255 in Llama 3.2, in order; the unnamed are numbered reserved tokens."""
    reserved = iter(range(LLAMA3_SPECIALS))
    names = (_NAMED_SPECIALS.get(index) for index in range(LLAMA3_SPECIALS))
    return [name or f"<|reserved_special_token_{next(reserved)}|>" for name in names]

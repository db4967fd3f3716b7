"""Text to ids and back, for the Llama 3 vocabulary and for bytes; and the order of tokens before the speech, which nothing else knows."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from torch import Tensor

from kalle.errors import UserError, check_type
from kalle.files import atomic_file

TOKENIZER_NAME = "tokenizer.json"
PHONEMES_NAME = "phonemes.json"
"""Beside tokenizer.json where English is read as phonemes (`kalle.text.phonemes`)."""
BOS = "<|begin_of_text|>"
KALLE_TOKENS = (
    "<|TEXT_GENERATION_START|>",
    "<|TEXT_GENERATION_END|>",
    "<|TEXT_UNDERSTANDING_START|>",
    "<|TEXT_UNDERSTANDING_END|>",
    "<|SPEECH_GENERATION_START|>",
    "<|SPEECH_GENERATION_END|>",
    "<|SPEECH_UNDERSTANDING_START|>",
    "<|SPEECH_UNDERSTANDING_END|>",
)
"""The tokens KALL-E adds to its text vocabulary, in the order of their ids."""
BEFORE_SPEECH = ("<|SPEECH_UNDERSTANDING_END|>", "<|SPEECH_GENERATION_START|>")
"""The two tokens between the text and the first frame; the position of the last one predicts that frame."""

_UNSPEAKABLE = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")
# Characters with neither shape nor width, which str.strip leaves: joiners, direction marks, byte order marks.
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
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


class Tokenizer:
    """A ``tokenizers`` tokenizer whose user text can never become a special token.

    The special tokens are reached by ``special`` alone: text that spells one out is tokenised like any other text,
    so no text can end a prompt or begin speech from inside a sentence.
    """

    def __init__(self, backend: Backend) -> None:
        """Wrap ``backend``; a UserError names the special tokens its vocabulary lacks."""
        missing = [name for name in (BOS, *KALLE_TOKENS) if backend.token_to_id(name) is None]
        if missing:
            raise UserError(
                f"the tokenizer lacks {', '.join(missing)}; expected all {1 + len(KALLE_TOKENS)} special tokens of KALL-E; "
                "use the tokenizer folder of the weights"
            )
        backend.no_padding()
        backend.no_truncation()
        # Despite its name this makes the backend treat the spelling of a special token as text. It is not stored in the file.
        backend.encode_special_tokens = True
        self._backend = backend

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read ``folder``/tokenizer.json; a UserError when it is missing or not a tokenizer."""
        from kalle.checkpoint import weight_folder  # it imports torch

        path = weight_folder(folder) / TOKENIZER_NAME
        if not path.is_file():
            raise UserError(
                f"no tokenizer: got '{folder}', expected a folder with a {TOKENIZER_NAME}; "
                "make one with `kalle convert tokenizer` or copy it from the release"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            for token in content.get("added_tokens", []):
                token["special"] = True  # only tokens marked special are kept out of user text
            backend = Backend.from_str(json.dumps(content))
            phonemes = path.with_name(PHONEMES_NAME)
            if phonemes.is_file():
                from kalle.text.phonemes import PhonemeTokenizer

                return PhonemeTokenizer.from_files(backend, phonemes)
            return cls(backend)
        except UserError:
            raise
        except BaseException as error:
            raise UserError(f"not a tokenizer: '{path}' ({_problem(error)}); fetch or write it again") from None

    @classmethod
    def bytes(cls) -> Tokenizer:
        """UTF-8 bytes as ids 0..255, then the beginning-of-text token and the tokens of KALL-E; no merges."""
        vocabulary = {symbol: value for value, symbol in enumerate(byte_symbols())}
        backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([special_token(name) for name in (BOS, *KALLE_TOKENS)])
        return cls(backend)

    def save(self, folder: str | Path) -> None:
        """Write ``folder``/tokenizer.json, which ``load`` and ``tokenizers.Tokenizer.from_file`` read."""
        with atomic_file(Path(folder) / TOKENIZER_NAME) as temporary:
            self._backend.save(str(temporary), pretty=False)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, so the least number of rows an embedding needs."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    def special(self, name: str) -> int:
        """The id of the special token ``name``, such as ``"<|SPEECH_GENERATION_START|>"``; KeyError for any other text."""
        if name not in (BOS, *KALLE_TOKENS):
            raise KeyError(f"not a special token: {name!r}")
        found = self._backend.token_to_id(name)
        assert found is not None, name
        return int(found)

    def encode(self, text: str, language: str | None = None) -> list[int]:
        """The id of the beginning of text, then those of ``text``; a UserError when it is not valid Unicode.

        ``language`` is an ISO 639-1 code; this tokenizer reads all languages alike.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text is not valid Unicode: got half of a surrogate pair at character {error.start}, "
                "expected text that UTF-8 can hold; read the file with its own encoding"
            ) from None
        begin = self.special(BOS)
        try:
            return [begin, *self._backend.encode(text, add_special_tokens=False).ids]
        except BaseException as error:
            problem = _problem(error)
        raise UserError(f"the tokenizer cannot read the text ({problem}); use the tokenizer folder of the weights as it was released")

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens left out."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))


def _problem(error: BaseException) -> str:
    """In one line, what the Rust side says: it raises bare Exception, and its panics are not even that; an interrupt is raised again."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    return (str(error).splitlines() or [type(error).__name__])[0]


def special_token(name: str) -> AddedToken:
    """``name`` as a special token that swallows no spaces around it."""
    return AddedToken(name, special=True, normalized=False, single_word=False, lstrip=False, rstrip=False)


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte 0..255 in byte-level vocabularies.

    Bytes that print as themselves keep their character, the others take the characters from U+0100 on, in order
    (GPT-2's convention, which ``tokenizers.pre_tokenizers.ByteLevel`` follows).
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = iter(range(256, 512))
    return [chr(value) if value in printable else chr(next(spare)) for value in range(256)]


def prompt_ids(
    tokenizer: Tokenizer, text: str, prompt_text: str | None = None, tokenise_separately: bool = False, language: str | None = None
) -> Tensor:
    """The ids of beginning of text, the transcript of the prompt, the text, and the two tokens before speech: (L,) int64.

    Both texts are stripped, joined by one space and tokenised at once. With ``tokenise_separately`` they are left as
    they are, tokenised each on its own, and their ids joined with nothing in between, as the release does.
    ``language`` (ISO 639-1) is that of both, by default guessed from the script. A UserError when a text is empty.
    """
    check_text(text, "text")
    if prompt_text is not None:
        check_text(prompt_text, "prompt text")
    if tokenise_separately:
        ids = tokenizer.encode(text, language)
        if prompt_text is not None:
            ids = tokenizer.encode(prompt_text, language) + ids[1:]
    else:
        ids = tokenizer.encode(" ".join(part.strip() for part in (prompt_text, text) if part is not None), language)
    return torch.tensor(ids + [tokenizer.special(name) for name in BEFORE_SPEECH], dtype=torch.int64)


def without_text(ids: Tensor) -> Tensor:
    """``ids`` (..., L) of ``prompt_ids`` without their words: beginning of text and the two tokens before speech, (..., 3)."""
    assert ids.shape[-1] > len(BEFORE_SPEECH), f"{ids.shape[-1]} ids hold no prompt"
    return torch.cat([ids[..., :1], ids[..., -len(BEFORE_SPEECH) :]], dim=-1)


def unspeakable(text: str) -> str:
    """The first character of ``text`` that no model reads, in words: half of a surrogate pair, or a control character other than space."""
    found = _UNSPEAKABLE.search(text)
    if found is None:
        return ""
    kind = "half of a surrogate pair" if "\ud800" <= found[0] <= "\udfff" else "a control character"
    return f"{kind} (U+{ord(found[0]):04X} at character {found.start() + 1})"


def check_text(text: str, name: str) -> None:
    """A UserError when ``text`` has nothing to say, is no Unicode, or has a control character other than white space."""
    check_type(name, text, str, "a text")
    found = unspeakable(text)
    if found:
        raise UserError(
            f"the {name} is not valid Unicode text to speak: got {found}, expected words; take it out or read the file as UTF-8"
        )
    if not _INVISIBLE.sub("", text).strip():
        raise UserError(f"the {name} is empty: got {text[:20]!r}, expected words to speak; give a {name}")


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

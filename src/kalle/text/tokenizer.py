"""Text to ids and back: one class for the Llama 3 vocabulary and for bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from kalle.errors import UserError
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


class Tokenizer:
    """A ``tokenizers`` tokenizer whose user text can never become a special token.

    The special tokens are reached by ``special`` alone: text that spells one out is tokenised like any other text,
    so nobody can end a prompt or begin speech from inside a sentence.
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
        path = Path(folder) / TOKENIZER_NAME
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
        except Exception as error:  # the Rust side raises bare Exception
            raise UserError(f"not a tokenizer: '{path}' ({str(error).splitlines()[0]}); fetch or write it again") from None

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
        return [self.special(BOS), *self._backend.encode(text, add_special_tokens=False).ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens left out."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))


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

"""Which words training reads as bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kalle.data.latents.table import Table, Texts, numbered
from kalle.data.loading.datasets import TextForms
from kalle.text.phonemes import PhonemeTokenizer
from kalle.text.tokenizer import Tokenizer, prompt_ids

pytest.importorskip("hibari")
TEXTS = Texts.of(["The children like to go to school.", '"Yes," he said.', "Kubernetes!", "The children like to go to school."])


def table_of(texts: Texts, *languages: str | None) -> Table:
    names, places = numbered(languages)
    zeros = np.zeros(len(texts), np.int32)
    return Table(texts, texts, (None,), zeros, names, places, zeros, zeros, (), {}, {})


TABLE = table_of(TEXTS, "en", None, "en", "en")


def drawn(forms: TextForms, index: int, epochs: int = 200) -> list[tuple[int, ...]]:
    return [tuple(forms.draw(index, 0, epoch, f"item{index}").tolist()) for epoch in range(epochs)]


def test_first_forms_are_what_synthesis_reads() -> None:
    tokenizer = PhonemeTokenizer.create()
    forms = TextForms.of(TABLE, tokenizer)
    rows = forms.first()
    assert [rows.row(index).tolist() for index in range(4)] == [prompt_ids(tokenizer, text).tolist() for text in TEXTS]


def test_draws_depend_on_the_key_alone_and_leave_the_share_as_bytes() -> None:
    tokenizer = PhonemeTokenizer.create(byte_words=0.25, byte_utterances=0.1)
    forms = TextForms.of(TABLE, tokenizer)
    rows = drawn(forms, 0, 400)
    assert rows == drawn(forms, 0, 400)
    assert len(set(rows)) > 50
    whole = tuple(prompt_ids(Tokenizer.bytes(), TEXTS[0]).tolist())
    assert 20 <= rows.count(whole) <= 65
    left = [sum(97 <= value <= 122 for value in row) for row in rows if row != whole]
    assert 0.2 < np.mean(left) / sum(character.isalpha() for character in TEXTS[0]) < 0.3
    assert all(len(row) <= forms.lengths[index] for index in range(4) for row in drawn(forms, index))
    taken = forms.take(np.array([False, True, False, True]))
    assert taken.draw(0, 5, 6).tolist() == forms.draw(1, 5, 6).tolist()
    assert taken.lengths.tolist() == forms.lengths[[1, 3]].tolist()


def test_without_shares_nothing_is_left() -> None:
    forms = TextForms.of(TABLE, PhonemeTokenizer.create(byte_words=0, byte_utterances=0))
    assert drawn(forms, 0, 5) == [tuple(forms.first().row(0).tolist())] * 5


def test_readings_are_kept_for_the_next_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = PhonemeTokenizer.create(cache=tmp_path / "readings")
    before = TextForms.of(TABLE, tokenizer)
    monkeypatch.setattr("kalle.data.loading.datasets._read", lambda *_: pytest.fail("read again"))
    after = TextForms.of(TABLE, tokenizer)
    assert drawn(after, 1) == drawn(before, 1)
    assert after.lengths.tolist() == before.lengths.tolist()


def test_other_languages_are_bytes() -> None:
    texts = Texts.of(["Ciao bella.", "Hello."])
    forms = TextForms.of(table_of(texts, "it", "en"), PhonemeTokenizer.create())
    assert forms.first().row(0).tolist() == prompt_ids(Tokenizer.bytes(), texts[0]).tolist()
    assert forms.first().row(1).tolist() != prompt_ids(Tokenizer.bytes(), texts[1]).tolist()
    assert drawn(forms, 0, 5) == [tuple(forms.first().row(0).tolist())] * 5

"""Which texts the language of a folder of weights is for."""

from __future__ import annotations

import pytest

from kalle.text.languages import language_in_its_script

LATIN, CYRILLIC, HAN, KANA, ARABIC = "Good morning.", "Доброе утро.", "早上好。", "おはよう。", "صباح الخير"


@pytest.mark.parametrize(
    ("language", "its", "others"),
    [
        ("en", [LATIN, "1234", ""], [CYRILLIC, HAN, KANA, ARABIC]),
        ("it", [LATIN], [CYRILLIC]),
        ("ru", [CYRILLIC], [LATIN, HAN]),
        ("uk", [CYRILLIC], [LATIN]),
        ("sr", [CYRILLIC, LATIN], [HAN]),
        ("zh", [HAN], [LATIN, KANA]),
        ("ja", [KANA, HAN], [LATIN]),
        ("fa", [ARABIC], [LATIN]),
    ],
)
def test_a_language_is_for_texts_in_its_script(language: str, its: list[str], others: list[str]) -> None:
    assert [language_in_its_script(text, language) for text in its] == [language] * len(its)
    assert [language_in_its_script(text, language) for text in others] == [None] * len(others)

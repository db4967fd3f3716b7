from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalle.data.corpus.items import SPLITS, SplitPolicy, normalised, word_count
from kalle.errors import UserError

texts = st.text(max_size=60)
WORDS = [f"prompt {i}" for i in range(10)]
EXPECTED = ["train", "test", "train", "train", "train", "train", "train", "train", "valid", "test"]
HALF = SplitPolicy(valid_share=0.3, test_share=0.3, seed=1)


def test_normalised_drops_case_punctuation_and_spaces() -> None:
    assert normalised("  We\u2019re SORRY --- that's \u201call\u201d! ") == "were sorry thats all"
    assert normalised("Pr\u00e9cis") == normalised("Pre\u0301cis") == "pr\u00e9cis"
    assert normalised("\uff11\uff12 \u4f60\u597d\u3002") == "12 \u4f60\u597d"
    assert normalised("... - !") == ""


@given(texts)
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)


@given(texts, st.sampled_from([" ", "!", " ... ", "\n", "  ,  "]))
def test_same_normalised_text_same_split(text: str, noise: str) -> None:
    assert HALF.assign(f"{noise}{text}{noise}") == HALF.assign(text)
    assert HALF.assign(normalised(text)) == HALF.assign(text)


@given(texts, st.integers(0, 5))
def test_split_is_one_of_three_and_stable(text: str, seed: int) -> None:
    policy = SplitPolicy(0.3, 0.3, seed)
    assert policy.assign(text) in SPLITS
    assert policy.assign(text) == SplitPolicy(0.3, 0.3, seed).assign(text)


def test_shares_are_met_and_seeds_differ() -> None:
    words = [f"sentence number {i}" for i in range(4000)]
    policy = SplitPolicy(valid_share=0.1, test_share=0.2)
    counts = {split: sum(policy.assign(text) == split for text in words) for split in SPLITS}
    assert counts["test"] == pytest.approx(800, abs=80)
    assert counts["valid"] == pytest.approx(400, abs=60)
    other = SplitPolicy(valid_share=0.1, test_share=0.2, seed=1)
    assert sum(policy.assign(text) != other.assign(text) for text in words) > 1000


def test_a_known_assignment_never_moves() -> None:
    policy = SplitPolicy(valid_share=0.25, test_share=0.25)
    assert [policy.assign(text) for text in WORDS] == EXPECTED


def test_texts_outside_the_word_limits_use_the_smaller_share() -> None:
    policy = SplitPolicy(valid_share=0.2, test_share=0.7, min_words=2, max_words=3, outside_scale=0.0)
    assert {policy.assign(f"word{i}") for i in range(200)} == {"train"}
    assert {policy.assign(f"a b c d{i}") for i in range(200)} == {"train"}
    assert {policy.assign(f"a b{i}") for i in range(200)} == set(SPLITS)


@pytest.mark.parametrize(("valid", "test"), [(-0.1, 0.1), (0.6, 0.5), (0.0, 1.1), (0.1, float("nan")), (float("nan"), 0.1)])
def test_impossible_shares_are_refused(valid: float, test: float) -> None:
    with pytest.raises(UserError):
        SplitPolicy(valid, test)


@pytest.mark.parametrize(("valid", "test", "parts"), [(0.0, 1.0, {"test"}), (1.0, 0.0, {"valid"}), (0.3, 0.7, {"valid", "test"})])
def test_a_corpus_may_be_for_tests_alone(valid: float, test: float, parts: set[str]) -> None:
    policy = SplitPolicy(valid, test)
    words = [f"sentence number {i}" for i in range(200)]
    assert set(policy.completed(words, [policy.assign(text) for text in words])) == parts


def test_word_count() -> None:
    assert word_count("Don't hang-up, please!") == 4


@pytest.mark.parametrize("count", [3, 4, 5, 10, 20, 40])
def test_every_part_of_a_small_corpus_has_an_item(count: int) -> None:
    policy = SplitPolicy()
    texts = [f"sentence number {n}" for n in range(count)]
    splits = policy.completed(texts, [policy.assign(text) for text in texts])
    assert set(splits) == set(SPLITS)
    assert splits.count("train") >= count - 4
    assert splits == policy.completed(texts, [policy.assign(text) for text in texts])


def test_completing_keeps_copies_of_a_text_together_and_asks_for_no_more_than_a_share() -> None:
    texts = ["One.", "one", "ONE!", "two"]
    splits = SplitPolicy().completed(texts, ["train"] * 4)
    assert len(set(splits[:3])) == 1
    assert set(splits) == {"train", "valid"}
    assert SplitPolicy(0.0, 0.0).completed(texts, ["train"] * 4) == ["train"] * 4
    assert SplitPolicy().completed(["only"], ["train"]) == ["train"]
    assert SplitPolicy().completed(texts, ["train"] * 4, {"valid", "test"}) == ["train"] * 4
    assert "train" in SplitPolicy(0.5, 0.4).completed(["a b", "c d"], ["test", "test"])

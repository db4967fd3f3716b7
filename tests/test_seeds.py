"""The formulas of seeds give today what they once gave: trainings continue, and voices, sentences and scores are found again."""

from __future__ import annotations

from kalle.seeds import derived_seed, item_seed, purpose_seed, sentence_seed, step_seed


def test_seeds_stay_what_they_were() -> None:
    assert derived_seed(0, 1, "a") == 1636031660142018746
    assert step_seed(3, 1, 2, 0, 1) == 119004576150449169
    assert purpose_seed("voice 3") == 874303569
    assert sentence_seed(3, 2, 1) == 21058412116412574
    assert item_seed(0, 7) == 684899372


def test_an_item_and_a_step_have_seeds_of_their_own() -> None:
    assert len({item_seed(seed, index) for seed in range(4) for index in range(50)}) == 200
    assert (
        len({step_seed(seed, step, batch, rank, 1) for seed in range(3) for step in range(5) for batch in range(5) for rank in range(2)})
        == 150
    )

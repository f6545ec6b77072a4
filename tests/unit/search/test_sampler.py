"""The classic evolution step: what it draws from, how far it goes, and that workers never draw the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from starling.config.hyp import Hyp
from starling.search.outcome import SearchFailed
from starling.search.samplers.classic import propose
from starling.search.space import Gene, SettingGene, Space
from tests.searches import CLASSIC

SEED = Hyp(degrees=2.0, mixup=0.1).as_dict()
SEARCHED = CLASSIC.starting_from(SEED).genes
START = {gene.name: SEED[gene.name] for gene in SEARCHED}


def mutant(number: int = 1, study_seed: int = 0, **changes: object) -> dict[str, Any]:
    """Return a proposal from the seed hyp alone."""
    given = {"genes": SEARCHED, "parents": [(0.5, START)], "taken": set(), **changes}
    return propose(number=number, study_seed=study_seed, **given)  # type: ignore[arg-type]


def test_there_are_29_genes_each_a_hyperparameter_and_frozen() -> None:
    assert len(CLASSIC.genes) == 29
    assert {gene.name for gene in CLASSIC.genes} <= {field.name for field in dataclasses.fields(Hyp)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        CLASSIC.genes[0].gain = 2  # type: ignore[misc]


def test_anchors_are_searched_only_if_the_hyp_has_them() -> None:
    assert "anchors" not in {gene.name for gene in SEARCHED}
    assert "anchors" in {gene.name for gene in CLASSIC.starting_from({**SEED, "anchors": 3.0}).genes}


def test_gene_whose_limits_meet_is_not_searched() -> None:
    space = Space((Gene("a", 1, 1, 1), Gene("b", 1, 0, 2)))
    assert space.starting_from({"a": 1.0, "b": 1.0}).names == ("b",)


def test_same_seed_number_and_history_give_the_same_proposal() -> None:
    assert mutant() == mutant()


def test_other_number_or_other_study_seed_gives_another_proposal() -> None:
    proposals = [mutant(n, s) for n in range(1, 20) for s in range(3)]
    assert len({tuple(p.values()) for p in proposals}) == len(proposals)


def test_proposal_that_is_taken_is_drawn_anew() -> None:
    first = mutant()
    second = mutant(taken={tuple(first.values())})
    assert second != first
    assert second == mutant(taken={tuple(first.values())})


def test_mutants_keep_the_limits_and_five_decimals() -> None:
    for number in range(1, 200):
        for gene, value in zip(SEARCHED, mutant(number).values(), strict=True):
            assert gene.lower <= value <= gene.upper
            assert value == round(value, 5)


def test_factors_stay_between_03_and_3_and_gain_0_keeps_the_value() -> None:
    wide = [Gene("a", 50, 0, 1e9), Gene("b", 0, 0, 1e9)]
    factors = []
    for number in range(300):
        values = mutant(number, genes=wide, parents=[(1.0, {"a": 1000.0, "b": 7.0})])
        assert values["b"] == 7.0
        factors.append(values["a"] / 1000)
    assert min(factors) == 0.3
    assert max(factors) == 3.0


def test_four_genes_in_five_are_hit() -> None:
    changed = [
        value != START[gene.name]
        for number in range(1, 300)
        for gene, value in zip(SEARCHED, mutant(number).values(), strict=True)
        if gene.name in ("momentum", "cls", "scale", "obj_pw")
    ]
    assert np.mean(changed) == pytest.approx(0.8, abs=0.04)


def test_parents_are_drawn_by_fitness_above_the_lowest() -> None:
    gene = [Gene("a", 0.01, 0, 1e9)]
    parents = [(0.6, {"a": 300.0}), (0.4, {"a": 200.0}), (0.3, {"a": 100.0})]
    drawn = [round(mutant(n, genes=gene, parents=parents)["a"] / 100) for n in range(1200)]
    shares = [drawn.count(3) / 1200, drawn.count(2) / 1200, drawn.count(1) / 1200]
    assert shares == pytest.approx([0.75, 0.25, 0.0], abs=0.04)


def test_equal_parents_are_drawn_alike() -> None:
    gene = [Gene("a", 0.01, 0, 1e9)]
    drawn = [
        round(mutant(n, genes=gene, parents=[(0.5, {"a": 1.0}), (0.5, {"a": 2.0})])["a"]) for n in range(400)
    ]
    assert drawn.count(1) / 400 == pytest.approx(0.5, abs=0.08)


def test_hyp_that_leaves_nothing_to_change_is_refused() -> None:
    fixed = [Gene("a", 0, 0, 2)]
    with pytest.raises(SearchFailed, match="nothing to change"):
        mutant(genes=fixed, parents=[(0.0, {"a": 1.0})], taken={(1.0,)})


TWO = SettingGene("optimizer", ("SGD", "Adam"))
FIVE = SettingGene("batch_size", (2, 4, 8, 16, 32))


def test_choices_move_to_a_neighbour_in_a_quarter_of_the_mutants() -> None:
    places = [
        FIVE.choices.index(
            mutant(n, settings=[FIVE], parents=[(0.5, {**START, "batch_size": 8})])["batch_size"]
        )
        for n in range(1, 1500)
    ]
    shares = [places.count(place) / len(places) for place in range(5)]
    assert shares[2] == pytest.approx(0.77, abs=0.04)
    assert shares[1] == pytest.approx(shares[3], abs=0.03)
    assert shares[1] > 5 * shares[0] > 0


def test_choices_stop_at_the_ends_of_the_list_and_leave_the_genes_as_they_were() -> None:
    for number in range(1, 200):
        last = mutant(number, settings=[TWO], parents=[(0.5, {**START, "optimizer": "Adam"})])
        assert last.pop("optimizer") in TWO.choices
        assert last == mutant(number)


def test_space_of_settings_alone_is_searched_until_every_choice_is_taken() -> None:
    taken: set[tuple[object, ...]] = {("SGD",)}
    second = mutant(1, genes=[], settings=[TWO], parents=[(0.5, {"optimizer": "SGD"})], taken=taken)
    assert second == {"optimizer": "Adam"}
    with pytest.raises(SearchFailed, match="nothing new"):
        mutant(2, genes=[], settings=[TWO], parents=[(0.5, second)], taken={*taken, ("Adam",)})

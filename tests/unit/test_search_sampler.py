"""The classic evolution step: what it draws from, how far it goes, and that workers never draw the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import optuna
import pytest

from app.config.hyp import Hyp
from app.search.genes import GENES, Gene, genes_of
from app.search.outcome import SearchFailed
from app.search.sampler import EvolutionSampler, propose

SEED = Hyp(degrees=2.0, mixup=0.1).as_dict()
SEARCHED = genes_of(SEED)
START = {gene.name: SEED[gene.name] for gene in SEARCHED}


def mutant(number: int = 1, study_seed: int = 0, **changes: object) -> dict[str, float]:
    """Return a proposal from the seed hyp alone."""
    given = {"genes": SEARCHED, "parents": [(0.5, START)], "taken": set(), **changes}
    return propose(number=number, study_seed=study_seed, **given)  # type: ignore[arg-type]


def test_there_are_29_genes_each_a_hyperparameter_and_frozen() -> None:
    assert len(GENES) == 29
    assert {gene.name for gene in GENES} <= {field.name for field in dataclasses.fields(Hyp)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        GENES[0].gain = 2  # type: ignore[misc]


def test_anchors_are_searched_only_if_the_hyp_has_them() -> None:
    assert "anchors" not in {gene.name for gene in SEARCHED}
    assert "anchors" in {gene.name for gene in genes_of({**SEED, "anchors": 3.0})}


def test_gene_whose_limits_meet_is_not_searched() -> None:
    assert genes_of({"a": 1.0, "b": 1.0}, [Gene("a", 1, 1, 1), Gene("b", 1, 0, 2)])[0].name == "b"


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


def told(values: list[float], study_seed: int = 0) -> optuna.Study:
    """Return a study in memory whose candidates had these fitnesses."""
    study = optuna.create_study(direction="maximize", sampler=EvolutionSampler(SEED, study_seed))
    for value in values:
        study.tell(ask(study), value)
    return study


def ask(study: optuna.Study) -> optuna.Trial:
    """Ask as any user of Optuna would, suggesting gene by gene."""
    trial = study.ask()
    for gene in SEARCHED:
        trial.suggest_float(gene.name, gene.lower, gene.upper)
    return trial


def test_it_is_a_sampler_that_plain_optuna_can_use() -> None:
    study = told([0.1, 0.9, 0.3, 0.2])
    assert study.trials[0].params == START
    parents = [(t.value, t.params) for t in sorted(study.trials, key=lambda t: -t.value)]
    expected = propose(number=4, study_seed=0, genes=SEARCHED, parents=parents, taken=set())
    assert ask(study).params == expected


def test_only_the_five_best_are_parents_and_failures_never_are() -> None:
    fitness = [0.1, 0.9, 0.3, 0.2, 0.5, 0.7, 0.3]
    study = told(fitness)
    study.tell(ask(study), state=optuna.trial.TrialState.FAIL)
    order = [1, 5, 4, 2, 6]  # the earlier of two equals first
    expected = propose(
        number=8,
        study_seed=0,
        genes=SEARCHED,
        parents=[(fitness[n], study.trials[n].params) for n in order],
        taken=set(),
    )
    assert ask(study).params == expected


def test_before_any_has_finished_the_seed_hyp_is_the_parent() -> None:
    study = told([])
    assert ask(study).params == START
    assert ask(study).params == mutant(1)


def test_seed_hyp_outside_the_limits_is_tried_as_it_is() -> None:
    sampler = EvolutionSampler({"lr0": 0.5}, 0)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    trial = optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING)
    trial.number = 0
    space = sampler.infer_relative_search_space(study, trial)
    assert space["lr0"].high == 0.5
    assert sampler.sample_relative(study, trial, space) == {"lr0": 0.5}


def test_unknown_parameter_is_refused(tmp_path: Path) -> None:
    study = told([])
    with pytest.raises(ValueError, match="not a gene"):
        study.ask().suggest_float("colour", 0, 1)

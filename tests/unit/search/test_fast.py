"""The fast sampler: around the seed first, then towards what is good, apart from what others train."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from starling.config.hyp import Hyp
from starling.core.errors import ConfigError
from starling.search.outcome import State
from starling.search.samplers.base import History, Observation
from starling.search.samplers.fast import (
    FastSampler,
    FastSettings,
    density_ratio,
    expected_score,
    normal_scores,
    ranking,
)
from starling.search.samplers.proposer import Proposer, make_sampler
from starling.search.space import SettingGene, Space
from tests.searches import CLASSIC

HYP = Hyp(degrees=2.0).as_dict()
SPACE = CLASSIC.starting_from(HYP)
START = np.array(SPACE.positions(HYP))
MODEL = {"linear": 2.0, "curved": 1.0, "reach": 1.0, "noise": 0.1}


def known(trials: list[FrozenTrial], space: Space = SPACE) -> History:
    """Return what a worker knows of these trials."""
    for number, trial in enumerate(trials):
        trial.number = number
    found = History(space)
    found.update(trials)
    return found


def ended(
    positions: np.ndarray, fitness: float | None, state: TrialState = TrialState.COMPLETE
) -> FrozenTrial:
    """Return a trial at `positions`; a pruned one after 3 epochs, a failed one by its own fault."""
    values = SPACE.at(positions.tolist())
    pruned = {3: fitness} if state is TrialState.PRUNED else {}
    return create_trial(
        state=state,
        value=fitness if state is TrialState.COMPLETE else None,
        params=values,
        distributions=SPACE.distributions(),
        intermediate_values=pruned,
        user_attrs={"ending": str(State.FAILED)} if state is TrialState.FAIL else {},
    )


def test_start_up_draws_stay_around_the_seed_and_change_half_of_the_genes() -> None:
    sampler = FastSampler(SPACE, HYP, 0)
    drawn = np.array([SPACE.positions(sampler.propose(n, known([]))) for n in range(1, 200)])
    moved = np.abs(drawn - START)
    changed = moved > 1e-3
    assert changed.mean() == pytest.approx(0.5, abs=0.03)
    assert np.sqrt((moved**2).mean(axis=0)).max() < 0.2
    assert changed.any(axis=1).all()


def test_ranking_is_finished_by_fitness_then_pruned_by_epochs_then_failed() -> None:
    trials = [
        ended(START, 0.2), ended(START, 0.9, TrialState.PRUNED), ended(START, 0.5),
        ended(START, None, TrialState.FAIL), ended(START, 0.3, TrialState.PRUNED), ended(START, 0.5),
    ]  # fmt: skip
    assert [finding.number for finding in ranking(known(trials))] == [2, 5, 0, 1, 4, 3]
    found = History(SPACE)
    found._pruned = {1: Observation(1, {}, 0.9, 3), 2: Observation(2, {}, 0.1, 9)}
    assert [finding.number for finding in ranking(found)] == [2, 1]


@pytest.mark.parametrize("judge", ["model", "density"])
def test_proposals_move_to_where_the_good_ones_are(judge: str) -> None:
    rng = np.random.default_rng(0)
    scale = SPACE.names.index("scale")
    trials = []
    for _ in range(40):
        positions = np.clip(START + rng.normal(0, 0.1, len(START)), 0, 1)
        trials.append(ended(positions, fitness=float(positions[scale])))
    best = sorted(places_of(trial)[scale] for trial in trials)[-10]
    sampler = FastSampler(SPACE, HYP, 0, FastSettings(judge=judge))  # type: ignore[arg-type]
    proposed = [SPACE.positions(sampler.propose(n, known(trials)))[scale] for n in range(40, 60)]
    assert np.mean(proposed) > best


def places_of(trial: FrozenTrial) -> list[float]:
    """Return where a trial's values lie."""
    return SPACE.positions(trial.params)


def search(objective: Callable[[np.ndarray], float], name: str, seed: int, budget: int = 40) -> float:
    """Return the best that a search of one worker finds."""
    proposer = Proposer.of(name, SPACE, HYP, seed)  # type: ignore[arg-type]
    trials: list[FrozenTrial] = []
    for number in range(budget):
        positions = np.array(SPACE.positions(proposer.propose(number, trials).values))
        trials.append(ended(positions, objective(positions)))
        trials[-1].number = number
    return max(float(trial.value) for trial in trials)


def test_it_finds_more_than_the_classic_step_and_far_more_than_random_where_a_few_genes_matter() -> None:
    found: dict[str, list[float]] = {name: [] for name in ("fast", "classic", "random")}
    for seed in range(20):
        rng = np.random.default_rng(seed)
        weights = rng.lognormal(0, 1.5, len(START))
        goal = np.clip(START + rng.normal(0, 0.25, len(START)), 0, 1)
        gap = float((weights * (START - goal) ** 2).sum())
        for name, best in found.items():  # from 0 at the seed to 1 at the goal
            best.append(
                search(lambda at, w=weights, g=goal, d=gap: 1 - (w * (at - g) ** 2).sum() / d, name, seed)
            )
    means = {name: np.mean(best) for name, best in found.items()}
    assert means["fast"] > means["classic"] + 0.05
    assert means["fast"] > means["random"] + 0.3


@pytest.mark.parametrize("judge", ["model", "density"])
def test_a_proposal_keeps_away_from_what_another_is_training(judge: str) -> None:
    rng = np.random.default_rng(0)
    trials = [
        ended(np.clip(START + rng.normal(0, 0.1, len(START)), 0, 1), float(rng.random())) for _ in range(20)
    ]
    sampler = FastSampler(SPACE, HYP, 0, FastSettings(judge=judge))  # type: ignore[arg-type]
    moved = 0
    for number in range(20, 50):
        alone = np.array(SPACE.positions(sampler.propose(number, known(trials))))
        beside = SPACE.at(
            np.clip(alone + 0.003, 0, 1).tolist()
        )  # not the same values, which are never drawn twice
        running = create_trial(state=TrialState.RUNNING, params=beside, distributions=SPACE.distributions())
        again = np.array(SPACE.positions(sampler.propose(number, known([*trials, running]))))
        moved += np.abs(again - alone).max() > 0.01
    assert moved > 10


def test_search_over_choices_only_tries_them_all() -> None:
    space = Space((), (SettingGene("optimizer", ("SGD", "Adam", "AdamW")),))
    found = History(space)
    found.taken.add(("SGD",))
    sampler = make_sampler("fast", space, {"optimizer": "SGD"}, 0)
    proposed = []
    for number in (1, 2):
        proposed.append(sampler.propose(number, found)["optimizer"])
        found.taken.add((proposed[-1],))
    assert sorted(proposed) == ["Adam", "AdamW"]


def test_density_ratio_is_that_of_two_normal_densities() -> None:
    points = np.array([[0.0], [1.0]])
    ratio = density_ratio(points, np.array([[0.0]]), np.ones(1), np.array([[1.0]]), bandwidth=0.5)
    assert ratio == pytest.approx([2.0, -2.0])  # 1² / (2 · 0.5²)
    alone = density_ratio(points, np.array([[0.0]]), np.ones(1), np.zeros((0, 1)), bandwidth=0.5)
    assert alone == pytest.approx([0.0, -2.0])


def test_expected_score_falls_from_good_to_bad_and_doubt_vanishes_where_others_train() -> None:
    line = np.linspace(-1, 1, 9)[:, None]
    ranked = line[::-1]  # the best at 1
    expected = expected_score(line, ranked, np.zeros((0, 1)), curiosity=0.0, **MODEL)
    assert (np.diff(expected) > 0).all()
    here = np.array([[3.0]])
    assert expected_score(here, ranked, here, curiosity=0.0, **MODEL) == pytest.approx(
        expected_score(here, ranked, np.zeros((0, 1)), curiosity=0.0, **MODEL)
    )
    alone, beside = (
        expected_score(here, ranked, other, curiosity=1.0, **MODEL) for other in (np.zeros((0, 1)), here)
    )
    assert beside < alone


def test_scores_are_those_of_sorted_normal_variates() -> None:
    rng = np.random.default_rng(0)
    sorted_draws = np.sort(rng.standard_normal((40_000, 7)), axis=1)[:, ::-1]
    assert normal_scores(7) == pytest.approx(sorted_draws.mean(axis=0), abs=0.02)


@pytest.mark.parametrize(
    "wrong", [{"startup": 0}, {"share": 0}, {"share": 1.1}, {"spread": -1}, {"noise": 0}, {"curiosity": -1}]
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        FastSettings(**wrong)  # type: ignore[arg-type]


def test_only_the_best_and_the_latest_of_very_many_are_looked_at() -> None:
    rng = np.random.default_rng(0)
    trials = [ended(rng.random(len(START)), float(rng.random())) for _ in range(60)]
    trials[5] = ended(np.array(places_of(trials[5])), 2.0)
    few = FastSampler(SPACE, HYP, 0, FastSettings(most_findings=20))
    ranked = ranking(known(trials))
    kept = {f.number for f in ranked[:10]} | {
        f.number for f in sorted(ranked[10:], key=lambda f: -f.number)[:10]
    }
    assert few.propose(60, known(trials)) == few.propose(60, known_of(trials, kept))


def known_of(trials: list[FrozenTrial], numbers: set[int]) -> History:
    """Return what is known where only these trials had finished."""
    found = known(trials)
    found._finished = {number: finding for number, finding in found._finished.items() if number in numbers}
    return found

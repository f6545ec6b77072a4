"""Trainings cut short, and the best of them once more: what `--prune` and `--finalists` promise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from starling.config.hyp import Hyp
from starling.core.errors import ConfigError, UsageError
from starling.errors import Pruned
from starling.search.outcome import (
    BEST_HYP,
    Candidate,
    CandidateFailed,
    Finished,
    Outcome,
    Report,
    SearchSummary,
    State,
    best_of,
)
from starling.search.pruning import ENOUGH, Halving
from starling.search.samplers.base import History
from starling.search.spec import FRESH_SEEDS, StudyPlan
from starling.search.study import LeasedCandidate, SearchStudy, Turn
from tests.searches import CLASSIC, outcome, run_search, spec

SEED = Hyp().as_dict()
EPOCHS = 30
RUNGS = (4, 12)


def quality(candidate: Candidate) -> float:
    """Return what a candidate is worth: the better, the nearer its lr0 is to 0.02."""
    return 1 - abs(candidate.hyp["lr0"] - 0.02) * 10


def trained(epochs: dict[int, int], after: Callable[[Candidate], float] = quality) -> Any:
    """Return an objective whose fitness rises to `after`, and which notes how many epochs each candidate had."""

    def train(candidate: Candidate, report: Report) -> Outcome:
        for epoch in range(1, EPOCHS + 1):
            epochs[candidate.number] = epoch
            if epoch in candidate.glances:
                report(epoch, quality(candidate) * epoch / EPOCHS)
        return outcome(after(candidate))

    return train


def search(directory: Path, objective: Any, budget: int, **plan: Any) -> SearchSummary:
    """Work on a search alone."""
    about = spec(SEED, budget, seed=7, plan=StudyPlan(epochs=EPOCHS, **plan), sampler="classic")
    return run_search(directory, objective, about)


def join(directory: Path, budget: int = 9, **plan: Any) -> SearchStudy:
    """Open a search as a worker does."""
    return SearchStudy.open_or_create(
        directory, spec(SEED, budget, seed=7, plan=StudyPlan(epochs=EPOCHS, **plan))
    )


def claim(study: SearchStudy) -> LeasedCandidate:
    """LeasedCandidate what must be there."""
    turn = study.ask("w")
    assert isinstance(turn, LeasedCandidate)
    return turn


def reached(values: list[float], epoch: int = 4, finals: list[float] | None = None) -> list[FrozenTrial]:
    """Return trials that have these values at a rung; those that have a final value have finished."""
    trials = []
    for number, value in enumerate(values):
        final = None if finals is None or number >= len(finals) else finals[number]
        state = TrialState.RUNNING if final is None else TrialState.COMPLETE
        trial = create_trial(state=state, value=final, intermediate_values={epoch: value})
        trial.number = number
        trials.append(trial)
    return trials


@pytest.mark.parametrize(
    ("epochs", "rungs"), [(300, (40, 120)), (30, (4, 12)), (10, (1, 4)), (5, (1, 2)), (2, (1,)), (1, ())]
)
def test_rungs_lie_early_and_never_at_the_end(epochs: int, rungs: tuple[int, ...]) -> None:
    assert Halving(epochs).rungs == rungs


FINISHED = [0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.12, 0.22, 0.32]
"""What trainings had at a rung that foretells the end."""
ENDS = [value + 0.1 for value in FINISHED]


def test_training_goes_on_from_a_rung_only_among_the_best_third() -> None:
    trials, halving = reached([*FINISHED, 0.3, 0.6, 0.1], finals=ENDS), Halving(EPOCHS)
    goes_on = [halving.verdict(trials, number, 4) is None for number in (9, 10, 11)]
    assert goes_on == [False, True, False]
    assert "0.3 after 4 of 30 epochs; the best 4 of 12 so far have 0.45 or more" in str(
        halving.verdict(trials, 9, 4)
    )


def test_nothing_ends_early_before_enough_have_shown_that_the_rung_foretells_the_end() -> None:
    few = ENOUGH - 1
    assert Halving(EPOCHS).verdict(reached([*FINISHED[:few], 0.01], finals=ENDS[:few]), few, 4) is None
    assert Halving(EPOCHS).verdict(reached([*FINISHED, 0.01], finals=ENDS), len(FINISHED), 4) is not None


def test_equals_go_on_together() -> None:
    trials = reached([*FINISHED, 0.65], finals=ENDS)
    assert Halving(EPOCHS).verdict(trials, 9, 4) is None


def test_attempts_that_were_lost_are_not_counted_at_a_rung() -> None:
    trials = reached([*FINISHED, 0.5, *[0.9] * 9], finals=ENDS)
    assert Halving(EPOCHS).verdict(trials, 9, 4) is not None
    for trial in trials[10:]:
        trial.state = TrialState.FAIL
    assert Halving(EPOCHS).verdict(trials, 9, 4) is None


def test_rung_that_does_not_foretell_the_end_prunes_nobody() -> None:
    rungs = [0.1 * n for n in range(ENOUGH + 1)]
    agreeing, opposed = [0.5 + value for value in rungs[:-1]], [0.5 - value for value in rungs[:-1]]
    worst = [*rungs[1:], 0.0]
    halving = Halving(EPOCHS)
    assert halving.verdict(reached(worst, finals=agreeing), ENOUGH, 4) is not None
    assert halving.verdict(reached(worst, finals=opposed), ENOUGH, 4) is None
    assert halving.correlation(reached(worst, finals=agreeing[: ENOUGH - 1]), 4) is None


def test_correlation_is_found_although_only_the_better_third_has_finished() -> None:
    random = np.random.default_rng(0)
    early = random.normal(size=3000)
    late = 0.7 * early + np.sqrt(1 - 0.7**2) * random.normal(size=3000)
    best = early > np.quantile(early, 2 / 3)
    order = np.argsort(~best, kind="stable")  # those that finished come first
    trials = reached(early[order].tolist(), finals=late[best].tolist())
    found = Halving(EPOCHS).correlation(trials, 4)
    naive = np.corrcoef(np.argsort(np.argsort(early[best])), np.argsort(np.argsort(late[best])))[0, 1]
    assert naive < 0.5
    assert found == pytest.approx(0.7, abs=0.05)


def test_budget_counts_what_was_trained_and_leaves_less_than_one_training(tmp_path: Path) -> None:
    epochs: dict[int, int] = {}
    summary = search(tmp_path, trained(epochs), budget=20, prune=True)
    cost = sum(epochs.values()) / EPOCHS
    assert summary.progress.spent == pytest.approx(cost)
    assert 19 < cost <= 20
    assert set(epochs.values()) <= {*RUNGS, EPOCHS}
    assert summary.progress.pruned > 0
    assert len(epochs) == summary.progress.pruned + summary.progress.finished > 20


def test_seed_is_trained_to_the_end_however_far_behind_it_is(tmp_path: Path) -> None:
    study = join(tmp_path, budget=20, prune=True)
    slow = claim(study)
    for value, end in zip(sorted(FINISHED), sorted(ENDS), strict=True):
        other = claim(study)
        study.report(other, 4, value)
        study.finish(other, outcome(end))
    study.report(slow, 4, 0.01)
    behind = claim(study)
    with pytest.raises(Pruned):
        study.report(behind, 4, 0.01)


def test_pruned_candidate_keeps_its_curve_and_says_why(tmp_path: Path) -> None:
    search(tmp_path, trained({}), budget=20, prune=True)
    pruned = [attempt for attempt in SearchStudy.read(tmp_path).attempts() if attempt.state is State.PRUNED]
    assert pruned
    for attempt in pruned:
        assert list(attempt.curve) in ([4], [4, 12])
        assert f"after {max(attempt.curve)} of {EPOCHS} epochs" in attempt.reason
        assert attempt.fitness is None


def test_taken_over_candidate_keeps_what_its_first_worker_told(tmp_path: Path) -> None:
    study = join(tmp_path, prune=True)
    first = claim(study)
    study.report(first, 4, 0.125)
    study.fail(first, State.STOPPED, "asked to stop")
    again = claim(study)
    assert again.candidate.resumed
    assert again.is_seed
    assert study.attempts()[again.candidate.number].curve == {4: 0.125}


def test_finalists_are_trained_again_whole_on_the_same_fresh_seeds(tmp_path: Path) -> None:
    epochs: dict[int, int] = {}
    seen: list[Candidate] = []

    def train(candidate: Candidate, report: Report) -> Outcome:
        seen.append(candidate)
        return trained(epochs)(candidate, report)

    search(tmp_path, train, budget=30, prune=True, finalists=3)
    finals = [candidate for candidate in seen if candidate.finalist_of is not None]
    assert len(finals) == 3 * FRESH_SEEDS
    assert finals == seen[-len(finals) :]
    assert sorted(c.train_seed or 0 for c in finals) == [8, 8, 8, 9, 9, 9]
    assert {epochs[candidate.number] for candidate in finals} == {EPOCHS}
    study = SearchStudy.read(tmp_path)
    ranked = sorted((c for c in study.finished() if c.finalist_of is None), key=lambda c: -c.fitness)
    assert {c.finalist_of for c in finals} == {c.number for c in ranked[:3]}
    assert {tuple(c.hyp.items()) for c in finals} == {tuple(c.hyp.items()) for c in ranked[:3]}
    assert 29 < study.progress().spent <= 30


def test_finals_teach_the_samplers_nothing_twice(tmp_path: Path) -> None:
    search(tmp_path, trained({}), budget=20, finalists=2)
    study = SearchStudy.read(tmp_path)
    known = History(CLASSIC.starting_from(study.seed_hyp))
    known.update(study._trials())
    assert len(known.finished) == 20 - 2 * FRESH_SEEDS
    assert len({tuple(values.items()) for _, values in known.best}) == 5


def test_winner_is_who_does_best_on_fresh_seeds(tmp_path: Path) -> None:
    def lucky(candidate: Candidate, report: Report) -> Outcome:
        # What leads in the search falls back the most.
        fresh = 0 if candidate.finalist_of is None else 2 * quality(candidate)
        return outcome(quality(candidate) - fresh)

    summary = search(tmp_path, lucky, budget=20, finalists=2)
    candidates = [c for c in SearchStudy.read(tmp_path).finished() if c.finalist_of is None]
    ranked = sorted(candidates, key=lambda c: -c.fitness)
    assert len(candidates) == 20 - 2 * FRESH_SEEDS
    assert summary.best.number == ranked[1].number
    assert summary.best.judged == pytest.approx(-ranked[1].fitness)
    text = (tmp_path / BEST_HYP).read_text()
    assert text.count("fitness on a fresh seed") == FRESH_SEEDS
    assert f"lr0: {ranked[1].hyp['lr0']:g}" in text


def test_finalist_that_fails_on_a_fresh_seed_is_not_the_winner(tmp_path: Path) -> None:
    def fragile(candidate: Candidate, report: Report) -> Outcome:
        if (
            candidate.finalist_of is not None
            and candidate.train_seed == 9
            and best["number"] == candidate.finalist_of
        ):
            raise CandidateFailed("the loss is nan")
        if candidate.finalist_of is None and quality(candidate) > best["quality"]:
            best.update(number=candidate.number, quality=quality(candidate))
        return outcome(quality(candidate))

    best: dict[str, float] = {"number": -1, "quality": -9.0}
    summary = search(tmp_path, fragile, budget=20, finalists=2)
    assert summary.best.number != best["number"]
    assert 0.0 in next(c for c in SearchStudy.read(tmp_path).finished() if c.number == best["number"]).again


def test_interrupted_final_goes_on_with_its_seed(tmp_path: Path) -> None:
    study = join(tmp_path, budget=20, finalists=2)
    while (mine := claim(study)).candidate.finalist_of is None:
        study.finish(mine, outcome(quality(mine.candidate)))
    study.fail(mine, State.STOPPED, "asked to stop")
    again = claim(study)
    assert (again.candidate.finalist_of, again.candidate.train_seed) == (
        mine.candidate.finalist_of,
        mine.candidate.train_seed,
    )
    assert again.candidate.resumed


def test_finals_wait_until_every_candidate_has_ended(tmp_path: Path) -> None:
    study = join(tmp_path, budget=20, finalists=2)
    claims = [claim(study) for _ in range(16)]
    for mine in claims[1:]:
        study.finish(mine, outcome(quality(mine.candidate)))
    assert study.ask("w") is Turn.WAIT
    study.finish(claims[0], outcome(0.5))
    assert claim(study).candidate.finalist_of is not None


def test_small_search_has_no_finals() -> None:
    plan = StudyPlan(finalists=3)
    assert [plan.finalists_of(budget) for budget in (6, 19, 20, 29, 30, 60)] == [0, 0, 2, 2, 3, 3]


def test_single_finalist_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        StudyPlan(finalists=1)


def test_joining_with_another_plan_is_refused_with_the_difference(tmp_path: Path) -> None:
    join(tmp_path, prune=True)
    with pytest.raises(UsageError, match=r"plan\.prune: True in the study, False here"):
        join(tmp_path)


def test_best_is_the_highest_fitness_where_there_were_no_finals() -> None:
    def finished(number: int, fitness: float, again: tuple[float, ...] = ()) -> Finished:
        return Finished(number=number, hyp={}, fitness=fitness, metrics={}, worker="w", is_seed=False,
                        finalist_of=None, again=again)  # fmt: skip

    assert best_of([finished(0, 0.3), finished(1, 0.5), finished(2, 0.5)]).number == 1
    assert (
        best_of([finished(0, 0.6), finished(1, 0.5, (0.4, 0.2)), finished(2, 0.4, (0.35, 0.35))]).number == 2
    )

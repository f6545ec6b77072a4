"""What a search needs of a sampler: every one passes the same tests.

A sampler joins by its name in the choices of `--sampler` and its class in `starling.search.samplers.proposer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.trial import FrozenTrial, TrialState, create_trial

from starling.config.hyp import Hyp
from starling.core.errors import ConfigError
from starling.core.settings.train import DEFAULT_SAMPLER, SAMPLERS, Sampler
from starling.search.outcome import State
from starling.search.samplers import proposer as proposers
from starling.search.samplers.base import History
from starling.search.samplers.proposer import Proposer, make_sampler
from starling.search.space import Gene, SettingGene, Space, Values
from starling.search.study import LeasedCandidate, SearchStudy, Turn
from starling.search.trials import IMPORTED
from tests.searches import CLASSIC, outcome, spec

HYP = Hyp(degrees=2.0, mixup=0.1).as_dict()
SPACE = Space(
    CLASSIC.genes,
    settings=(SettingGene("batch_size", (4, 8, 16)), SettingGene("optimizer", ("SGD", "AdamW"))),
).starting_from(HYP)
SEED: dict[str, Any] = {**HYP, "batch_size": 8, "optimizer": "SGD"}
START = {name: SEED[name] for name in SPACE.names}


def fitness(values: Values) -> float:
    """Return a smooth score: best at an lr0 of 0.02 and a scale of 0.7."""
    return 1 - abs(np.log(float(values["lr0"]) / 0.02)) / 10 - abs(float(values["scale"]) - 0.7)


def trial(
    number: int, values: Values, state: TrialState = TrialState.COMPLETE, **attributes: Any
) -> FrozenTrial:
    """Return an attempt as a study holds it; one that ended has a fitness or a curve."""
    made = create_trial(
        state=state,
        value=fitness(values) if state is TrialState.COMPLETE else None,
        params=dict(values),
        distributions=SPACE.distributions(values),
        user_attrs={"worker": "w", "root": number, **attributes},
        intermediate_values={3: fitness(values) / 2} if state is TrialState.PRUNED else None,
    )
    made.number = number
    return made


def history(name: Sampler, count: int, study_seed: int = 0) -> list[FrozenTrial]:
    """Return a search's first trials, each finished before the next was proposed; by `random` for a sampler of cost."""
    proposer = Proposer.of("random" if name == "gp" else name, SPACE, SEED, study_seed)
    trials: list[FrozenTrial] = []
    for number in range(count):
        trials.append(trial(number, proposer.propose(number, trials).values))
    return trials


def proposal(
    name: Sampler, number: int, trials: Sequence[FrozenTrial], study_seed: int = 0
) -> dict[str, Any]:
    """Return what a worker that has just started proposes."""
    return Proposer.of(name, SPACE, SEED, study_seed).propose(number, trials).values


@pytest.fixture(params=SAMPLERS)
def name(request: pytest.FixtureRequest) -> Sampler:
    """Return the name of a sampler."""
    return request.param  # type: ignore[no-any-return]


def test_the_choices_of_the_flag_are_the_samplers_that_there_are() -> None:
    assert set(proposers.SAMPLERS) == set(SAMPLERS)
    assert spec(HYP, 1).sampler == DEFAULT_SAMPLER
    with pytest.raises(ConfigError, match="did you mean 'fast'"):
        make_sampler("fats", SPACE, SEED, 0)


def test_the_first_candidate_is_the_seed_exactly_and_no_later_one_is(name: Sampler) -> None:
    proposer = Proposer.of(name, SPACE, SEED, 0)
    first = proposer.propose(0, [])
    assert (first.values, first.attributes["sampler"]) == (START, "seed")
    running = [trial(0, first.values, TrialState.RUNNING)]
    second = proposer.propose(1, running)
    assert second.attributes["sampler"] == name
    assert second.values != START


def test_the_seed_may_lie_outside_its_limits_and_later_candidates_do_not(name: Sampler) -> None:
    seed = {**SEED, "lr0": 0.5, "translate": 0.95}
    proposer = Proposer.of(name, SPACE, seed, 0)
    trials: list[FrozenTrial] = []
    for number in range(12):
        made = proposer.propose(number, trials)
        assert SPACE.contains(made.values) == (number > 0)
        trials.append(trial(number, made.values))
    assert trials[0].params["lr0"] == 0.5


@pytest.mark.parametrize("known", [1, 12])
def test_proposals_made_while_others_run_lie_inside_and_are_distinct(name: Sampler, known: int) -> None:
    trials = history(name, known)
    for number in range(known, known + 8):
        values = proposal(name, number, trials)
        assert SPACE.contains(values), values
        trials.append(trial(number, values, TrialState.RUNNING))
    assert len({SPACE.key(trial.params) for trial in trials}) == len(trials)


@pytest.mark.parametrize("known", [1, 12])
def test_the_same_arguments_give_the_same_proposal_to_a_new_and_an_old_worker(
    name: Sampler, known: int
) -> None:
    trials = history(name, known)
    old = Proposer.of(name, SPACE, SEED, 0)
    for seen in range(known):  # looked at from trial to trial, while they ran and after
        old._known.update([*trials[:seen], trial(seen, trials[seen].params, TrialState.RUNNING)])
    assert old.propose(known, trials).values == proposal(name, known, trials)


def test_other_numbers_and_study_seeds_draw_from_other_streams(name: Sampler) -> None:
    trials = history(name, 1)
    made = [proposal(name, number, trials, seed) for number in range(1, 5) for seed in range(2)]
    assert len({SPACE.key(values) for values in made}) == len(made)


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_proposal_lies_inside_any_space(name: Sampler, data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(["lr0", "degrees", "shear", "anchor_t"]), unique=True))
    genes = []
    for gene in names:
        low, width = data.draw(st.floats(0, 50)), data.draw(st.floats(1e-3, 50))
        genes.append(Gene(gene, 1, low, low + width, data.draw(st.booleans()) and low > 0))
    choices = data.draw(st.lists(st.integers(1, 99), unique=True, min_size=0 if genes else 40, max_size=40))
    setting = (SettingGene("batch_size", tuple(sorted(choices))),) if len(choices) > 1 or not genes else ()
    space = Space(tuple(genes), setting)
    # A classic step multiplies: it never gets from a place far outside, or from 0, to anywhere.
    inside = st.floats(0.1, 0.9)
    start: dict[str, Any] = {
        gene.name: gene.at(data.draw(inside)) if name == "classic" else data.draw(st.floats(0, 100))
        for gene in genes
    }
    start |= {"batch_size": setting[0].choices[0]} if setting else {}
    space = Space(
        tuple(Gene(g.name, 1, g.lower, g.upper, g.log and start[g.name] > 0) for g in genes), setting
    )
    known = History(space)
    known.taken.add(space.key(start))
    sampler = make_sampler(name, space, start, data.draw(st.integers(0, 99)))
    # gp takes over from the start-up draws in the tests of a search that is under way
    for number in range(1, 4):
        values = sampler.propose(number, known)
        assert space.contains(values)
        assert space.key(values) not in known.taken
        known.taken.add(space.key(values))


@pytest.mark.parametrize("ending", [State.LOST, State.STOPPED])
def test_an_attempt_and_the_one_that_continues_it_count_once(name: Sampler, ending: State) -> None:
    trials = history(name, 10)
    again = trial(10, trials[9].params, root=9, retry_of=9)
    plain = proposal(name, 11, trials)
    interrupted = [*trials[:9], trial(9, trials[9].params, TrialState.FAIL, ending=str(ending)), again]
    assert proposal(name, 11, interrupted) == plain
    known = History(SPACE)
    known.update(interrupted)
    assert [finding.number for finding in known.finished] == list(range(10))
    assert (known.failed, known.open) == ([], [])


def test_failed_candidates_are_never_proposed_again_nor_counted_as_finished(name: Sampler) -> None:
    trials = history(name, 9)
    values = proposal(name, 9, trials)
    failed = trial(9, values, TrialState.FAIL, ending=str(State.FAILED))
    assert proposal(name, 9, [*trials, failed]) != values
    known = History(SPACE)
    known.update([*trials, failed])
    assert (len(known.finished), [finding.number for finding in known.failed]) == (9, [9])


def test_imported_candidates_are_known_and_the_seed_is_begun_all_the_same(name: Sampler) -> None:
    old = [trial(n, t.params, **{IMPORTED: "evolve.csv"}) for n, t in enumerate(history(name, 12))]
    first = Proposer.of(name, SPACE, SEED, 0).propose(12, old)
    assert (first.values, first.attributes["sampler"]) == (START, "seed")
    own = [*old, trial(12, START)]
    known = History(SPACE)
    known.update(own)
    assert len(known.finished) == 13
    assert SPACE.key(proposal(name, 13, own)) not in {SPACE.key(t.params) for t in own}


@pytest.mark.parametrize("name", ["classic", "fast", "gp"])
def test_what_is_known_changes_what_a_learning_sampler_proposes(name: Sampler) -> None:
    trials = history(name, 12)
    other = [*trials[:-1], trial(11, {**trials[11].params, "lr0": 0.02, "scale": 0.7})]
    assert proposal(name, 12, trials) != proposal(name, 12, other)


def test_pruned_candidates_and_those_of_another_space_are_read(name: Sampler) -> None:
    trials = history(name, 10)
    trials.append(trial(10, {**START, "lr0": 0.03}, TrialState.PRUNED))
    foreign = create_trial(value=9.0, params={}, distributions={})
    foreign.number = 11
    assert SPACE.contains(proposal(name, 12, [*trials, foreign]))
    known = History(SPACE)
    known.update([*trials, foreign])
    assert [(finding.number, finding.epochs) for finding in known.pruned] == [(10, 3)]
    assert len(known.finished) == 10


def join(directory: Path, name: Sampler) -> SearchStudy:
    """Join the study as a worker with this sampler."""
    return SearchStudy.open_or_create(
        directory, spec(HYP, 14, space=SPACE, settings={"batch_size": 8, "optimizer": "SGD"}, sampler=name)
    )


def test_workers_with_different_samplers_share_one_study(tmp_path: Path) -> None:
    workers = [join(tmp_path, name) for name in SAMPLERS]
    claims = []
    while len(claims) < 14:
        for worker, name in zip(workers, SAMPLERS, strict=True):
            claim = worker.ask(name)
            if claim is Turn.WAIT:
                break
            assert isinstance(claim, LeasedCandidate)
            claims.append((worker, claim, name))
            if len(claims) % 3:
                candidate = claim.candidate
                score = fitness({**candidate.hyp, **candidate.settings})
                worker.finish(claim, outcome(score, precision=0, recall=0, map50=0, map5095=0, box_loss=0, obj_loss=0, cls_loss=0))  # fmt: skip
    told = [t.user_attrs["sampler"] for t in workers[0]._trials()]
    assert told == ["seed", *(name for _, _, name in claims[1:])]
    candidates = [claim.candidate for _, claim, _ in claims]
    assert (candidates[0].hyp, candidates[0].settings) == (HYP, {"batch_size": 8, "optimizer": "SGD"})
    assert all(set(c.settings) == {"batch_size", "optimizer"} and set(c.hyp) == set(HYP) for c in candidates)
    assert len({(*c.hyp.values(), *c.settings.values()) for c in candidates}) == 14
    for _, claim, _ in claims:
        claim.lease.close()

"""report.html: the figures behind it, and a page that is whole, safe and self-contained."""

from __future__ import annotations

import math
import re
import shlex
import shutil
import subprocess
import time
from dataclasses import replace
from datetime import datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starling.core.settings.train import parse_args
from starling.search.exports import draw_plot, write_files
from starling.search.outcome import SearchProgress, State
from starling.search.report import REPORT, write_report
from starling.search.report.facts import (
    FEWEST_FOR_IMPORTANCE,
    costs_of,
    gene_importance,
    winner_command,
    worker_times,
)
from starling.search.report.markup import element, text
from starling.search.report.page import build_page
from starling.search.report.svg import ticks
from starling.search.report.tables import MOST_ROWS, SHOWN
from starling.search.study import LeasedCandidate, SearchStudy
from tests.searches import outcome, spec
from tests.unit.search.search_pages import BEGAN, COMMAND, SEED, attempt, facts_of, search, time_left

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = '</td></script><script src="http://evil.example/a.js"></script><img src=//evil.example/x onerror=alert(1)>&\x1b[31m'


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the words between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_the_page_answers_in_the_order_in_which_a_person_asks() -> None:
    page = build_page(facts_of(search(80)))
    heads = re.findall(r"<h2>(.*?)</h2>", page)
    assert heads == ["The winner", "Best so far", "Genes and fitness", "Which genes matter", "Workers", "Ended early",
                     "Candidates", "The winner&#x27;s hyperparameters"]  # fmt: skip
    words = Elements(page).words
    best = max(a.fitness or 0 for a in search(80))
    assert f"{best:.4g}" in words[: words.index("The winner")]
    assert "python train.py --weights yolov5s.pt" in words


def test_nothing_on_the_page_leads_out_of_it() -> None:
    page = build_page(facts_of(search(80)))
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    assert "url(" not in page
    for tag, attributes in Elements(page).found:
        assert not {"src", "href", "srcset", "data", "action", "xlink:href"} & attributes.keys(), tag


def test_hostile_names_and_reasons_stay_text() -> None:
    attempts = [
        replace(
            a, worker=HOSTILE, reason=HOSTILE if a.reason else "", hyp={**a.hyp, HOSTILE: float(a.number)}
        )
        for a in search(70)
    ]
    facts = facts_of(attempts, name=HOSTILE, training={"command": {**COMMAND, "data": HOSTILE}})
    page = build_page(replace(facts, seed_hyp={**SEED, HOSTILE: 0.0}))
    elements = Elements(page)
    assert elements.of("img") == []
    assert elements.of("script") == [{}]
    assert not [
        attributes for _, attributes in elements.found if any(key.startswith("on") for key in attributes)
    ]
    assert "\x1b" not in page
    assert "onerror=alert(1)" in elements.words, "the words are there, as words"


@given(st.text())
def test_any_text_in_an_element_is_read_back_as_that_text(words: str) -> None:
    read = Elements(element("p", words, title=words))
    assert [tag for tag, _ in read.found] == ["p"]
    printable = "".join(letter if letter.isprintable() else " " for letter in words)
    assert read.words == printable
    assert read.of("p") == [{"title": printable}]
    assert text(text(words)) == text(words), "what is escaped already is not escaped again"


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_search_that_has_hardly_begun_has_a_page(count: int) -> None:
    attempts = [attempt(0, state=State.RUNNING, ended=None)] if count == 1 else search(count)
    words = Elements(build_page(facts_of(attempts))).words
    assert ("No candidate has finished yet." in words) == (count < 2)
    assert str(FEWEST_FOR_IMPORTANCE) in words[words.index("Which genes matter") :]


def test_a_long_table_is_folded_and_a_very_long_one_cut_with_a_word_on_it() -> None:
    few, many = (build_page(facts_of(search(count))) for count in (SHOWN, SHOWN + 1))
    assert 'id="candidates-more"' not in few
    assert 'id="candidates-more"' in many
    attempts = [attempt(n) for n in range(MOST_ROWS + 7)]
    assert "7 more are not on this page" in build_page(facts_of(attempts))


def test_the_page_of_five_hundred_candidates_is_below_a_megabyte() -> None:
    assert len(build_page(facts_of(search(500))).encode()) < 1e6


def test_every_chart_has_a_name_and_a_description() -> None:
    page = build_page(facts_of(search(80)))
    charts = [attributes for attributes in Elements(page).of("svg") if attributes.get("role") == "img"]
    assert len(charts) == 4
    ids = [attributes["id"] for _, attributes in Elements(page).found if "id" in attributes]
    assert len(ids) == len(set(ids))
    for chart in charts:
        assert set(str(chart["aria-labelledby"]).split()) <= set(ids)


def test_pruned_candidates_and_finalists_are_marked_in_the_chart() -> None:
    plain = build_page(facts_of([attempt(n) for n in range(6)]))
    assert 'class="cross"' not in plain
    marked = [attempt(n) for n in range(5)]
    marked += [attempt(5, state=State.PRUNED, curve={3: 0.2}), attempt(6, finalist_of=2, fitness=0.31)]
    page = build_page(facts_of(marked))
    assert "candidate 5: pruned at 0.2 after 3 epochs" in page
    assert "candidate 6: fitness 0.31, trains candidate 2 again" in page


def test_the_winners_command_is_the_searchs_own_training_with_the_winners_hyp(tmp_path: Path) -> None:
    words = shlex.split(winner_command(COMMAND, tmp_path / "search"))
    assert words[:2] == ["python", "train.py"]
    config = parse_args(words[2:]).config
    same = {key: value for key, value in COMMAND.items() if key not in ("epochs", "freeze")}
    assert {key: getattr(config, key) for key in same} == same
    assert config.freeze == (10,)
    assert config.hyp == str(tmp_path / "search" / "hyp_evolve.yaml")
    assert config.epochs > 10


def test_the_winners_command_names_the_runs_folder_as_it_is_called_inside_and_outside(runs: Path) -> None:
    assert " --hyp runs/blood/search/hyp_evolve.yaml " in winner_command(COMMAND, runs / "blood" / "search")
    assert winner_command({}, runs) == ""


def test_a_candidate_that_was_taken_over_is_charged_once_and_validations_at_a_third() -> None:
    attempts = [
        attempt(0),
        attempt(1, state=State.LOST, epochs=4),
        attempt(2, root=1),
        attempt(3, state=State.PRUNED, curve={2: 0.1, 5: 0.2}, epochs=5),
        attempt(4, state=State.FAILED),
    ]
    costs = costs_of(attempts, full_epochs=10, train_images=100, val_images=30)
    assert {number: cost.epochs for number, cost in costs.items()} == {0: 10, 1: 4, 2: 6, 3: 5, 4: 0}
    assert {number: cost.images for number, cost in costs.items()} == {
        0: 1010, 1: 400, 2: 610, 3: 520, 4: 0,
    }  # fmt: skip
    unknown = costs_of(attempts, full_epochs=10, train_images=None, val_images=None)
    assert unknown[0].images is None


def test_time_between_trainings_is_idle_unless_the_worker_was_stopped_or_lost() -> None:
    def at(number: int, began: float, ended: float | None, **changes: object) -> object:
        end = None if ended is None else BEGAN + timedelta(minutes=ended)
        return attempt(number, worker="w", began=BEGAN + timedelta(minutes=began), ended=end, **changes)

    (time,) = worker_times(
        [
            at(0, 0, 10),
            at(1, 12, 20, state=State.STOPPED),
            at(2, 50, 60, state=State.LOST),
            at(3, 58, 68),  # it was back before anybody noticed that it had been lost
            at(4, 68, None, state=State.RUNNING),
        ],
        BEGAN + timedelta(minutes=70),
    )  # type: ignore[arg-type]
    assert (time.busy, time.idle, time.away) == (38 * 60, 2 * 60, 30 * 60)
    assert time.idle_share == pytest.approx(2 / 40)


def test_importance_finds_the_gene_that_decides_and_is_the_same_each_time() -> None:
    facts = facts_of(search(120))
    shares = gene_importance(facts.finished, list(SEED))
    assert next(iter(shares)) == "lr0"
    assert shares["lr0"] > 0.8
    assert shares.keys() == {"lr0", "momentum", "scale"}, "genes that never change have none"
    assert shares == gene_importance(facts.finished, list(SEED))


def test_importance_is_not_guessed_from_too_few_or_from_equal_results() -> None:
    finished = facts_of(search(120)).finished
    assert gene_importance(finished[: FEWEST_FOR_IMPORTANCE - 1], list(SEED)) == {}
    assert gene_importance(finished[:FEWEST_FOR_IMPORTANCE], list(SEED)) != {}
    assert gene_importance([replace(candidate, fitness=0.5) for candidate in finished], list(SEED)) == {}


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 10))
def test_ticks_are_round_inside_and_not_too_many(low: float, span: float, most: int) -> None:
    high = low + span
    found = ticks(low, high, most)
    assert len(found) <= most + 1
    slack = span * 1e-6 + 4 * math.ulp(max(abs(low), abs(high)))
    assert all(low - slack <= tick <= high + slack for tick in found)


def test_the_time_left_deals_the_trainings_that_are_left_to_whoever_is_free_first() -> None:
    running = [
        attempt(n, state=State.RUNNING, ended=None, began=BEGAN + timedelta(minutes=20)) for n in (2, 3)
    ]
    attempts = [attempt(0), attempt(1), *running]
    now = BEGAN + timedelta(minutes=25)

    def left(budget: int, finished: int = 2) -> float | None:
        progress = SearchProgress(budget=budget, finished=finished, running=2, failed=0, best_fitness=0.3)
        return time_left(attempts, progress, now)

    assert left(4) == 5 * 60
    assert left(5) == left(6) == 15 * 60
    assert left(2) == 0
    assert (
        time_left(running, SearchProgress(budget=4, finished=0, running=2, failed=0, best_fitness=None), now)
        is None
    )


def test_what_failed_is_in_the_price_of_a_training_and_what_was_pruned_by_its_part() -> None:
    running = attempt(9, state=State.RUNNING, ended=None, began=BEGAN)
    progress = SearchProgress(budget=2, finished=1, running=1, failed=0, best_fitness=0.3)
    cheap = time_left([attempt(0), running], progress, BEGAN)
    dear = time_left([attempt(0), attempt(1, state=State.FAILED), running], progress, BEGAN)
    assert (cheap, dear) == (10 * 60, 20 * 60)
    third = attempt(1, state=State.PRUNED, began=BEGAN, ended=BEGAN + timedelta(minutes=5))
    part = SearchProgress(
        budget=3, finished=1, running=1, failed=0, best_fitness=0.3, pruned=1, part_trained=0.5
    )
    assert time_left([attempt(0), third, running], part, BEGAN) == 10 * 60


def test_a_study_counts_the_time_of_its_attempts_whenever_it_looks(tmp_path: Path) -> None:
    study = SearchStudy.open_or_create(tmp_path, spec(SEED, 9))
    late, now = SearchStudy.read(tmp_path), datetime.now() + timedelta(minutes=1)
    for number in range(4):
        held = study.ask("w")
        assert isinstance(held, LeasedCandidate)
        time.sleep(0.02)
        if number == 1:
            study.fail(held, State.LOST, "its worker died")
        elif number != 3:
            study.finish(held, outcome(0.5))
        expected = time_left(study.attempts(), study.progress(), now)
        assert (expected is None) == (number == 0 or study.progress().running == 0)
        assert study.seconds_left(now) == (expected if expected is None else pytest.approx(expected))
    assert expected is not None
    assert late.seconds_left(now) == pytest.approx(expected)
    assert SearchStudy.read(tmp_path).seconds_left(now) == pytest.approx(expected)


def test_the_report_is_one_of_the_views_and_says_what_the_study_says(tmp_path: Path) -> None:
    study = SearchStudy.open_or_create(tmp_path / "s", spec(SEED, 3, signature={"epochs": 10}))
    study.describe({"command": COMMAND, "train_images": 100, "val_images": 30})
    study.describe({"command": {}, "train_images": 1, "val_images": 1})
    for fitness in (0.25, 0.75):
        claim = study.ask("the worker")
        assert isinstance(claim, LeasedCandidate)
        study.finish(claim, outcome(fitness))
    failing = study.ask("the worker")
    assert isinstance(failing, LeasedCandidate)
    study.fail(failing, State.FAILED, "it was <b>too large</b>")
    write_files(study)
    draw_plot(study)
    page = (tmp_path / "s" / REPORT).read_text()
    words = Elements(page).words
    assert "0.75" in words
    assert "2/3" in words
    assert "it was <b>too large</b>" in words
    assert "2.02k" in words, "the images of two trainings, by what the first worker said"
    assert Elements(page).of("b") == []
    assert write_report(study) == tmp_path / "s" / REPORT


def in_browser(page: Path, folder: Path) -> tuple[str, list[str]]:
    """Open a page in headless Chromium; return the document as its script leaves it, and what the console says."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr",
         f"--user-data-dir={folder}", "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_opens_the_page_without_an_error_or_a_request_and_its_script_runs(tmp_path: Path) -> None:
    attempts = [replace(a, worker=HOSTILE) for a in search(80)]
    page = tmp_path / "report.html"
    page.write_text(build_page(facts_of(attempts)))
    document, console = in_browser(page, tmp_path / "profile")
    assert console == [], "a script error, or a request that the page's own policy refused"
    assert document.count("<button") > 20, "the headings can be clicked"
    # That such a page would be told apart: the policy refuses an image from outside and a script that is not ours.
    page.write_text(
        page.read_text().replace("</body>", '<img src="http://127.0.0.1:9/x"><script>1</script></body>')
    )
    assert len(in_browser(page, tmp_path / "profile")[1]) == 2


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_click_on_a_heading_sorts_folded_rows_too(tmp_path: Path) -> None:
    # Without its policy, so that a second script can click on `candidate` in the table of candidates.
    page = re.sub(r"<meta http-equiv[^>]*>", "", build_page(facts_of(search(60))))
    click = "document.querySelector('#candidates th button').click();"
    (tmp_path / "report.html").write_text(page.replace("</body>", f"<script>{click}</script></body>"))
    document, _ = in_browser(tmp_path / "report.html", tmp_path / "profile")
    table = document[document.index('id="candidates"') :]
    numbers = [
        int(n) for n in re.findall(r'<tr[^>]*><th scope="row"[^>]*>(\d+)', table[: table.index("</table>")])
    ]
    assert numbers == list(range(60))

"""Verdicts answer for questions; a judge of ratings follows the ratings, the world's among them."""

from __future__ import annotations

from mogeo.demo.world import OBJECTIVES, World
from mogeo.judging.golden import golden_response
from mogeo.judging.judge import OVERALL, RatingJudge, Verdict


def test_a_verdict_answers_for_each_question() -> None:
    verdict = Verdict({"wit": 1, "tact": None}, -1)
    assert (verdict["wit"], verdict["tact"], verdict[OVERALL]) == (1, None, -1)


def test_overall_goes_by_the_sum_of_ratings() -> None:
    ratings = {"a": {"wit": 5, "tact": 1}, "b": {"wit": 3, "tact": 2}}
    judge = RatingJudge(lambda _, response: ratings[response], ("wit", "tact"))
    assert judge.compare(["?", "?"], ["a", "b"], ["b", "b"]) == [
        Verdict({"wit": 1, "tact": -1}, 1),
        Verdict({"wit": 0, "tact": 0}, 0),
    ]


def test_the_worlds_golden_response_beats_or_equals_its_completions() -> None:
    world = World(1)
    rater = RatingJudge(world.rate, OBJECTIVES)
    rows = world.rows(40)
    asked, golden = [r["instruction"] for r in rows], [golden_response(r, rater.objectives) for r in rows]
    for policy in range(4):
        said = [r["completions"][policy]["response"] for r in rows]
        assert all(verdict.overall <= 0 for verdict in rater.compare(asked, said, golden))

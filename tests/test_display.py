"""What a person sees while a simulation runs: short lines, however many sites there are."""

from __future__ import annotations

from fedaccord.simulations.display import FEW, Answers


def after(sites: int, kind: str = "train") -> Answers:
    """So many sites have answered, after an earlier question that all had answered."""
    answers = Answers()
    for place in range(sites):
        answers.note("query.reserve", f"site-{place}")
    for place in range(sites):
        answers.note(kind, f"site-{place}")
    return answers


def test_the_last_answers_of_a_few_sites_are_named() -> None:
    assert after(2).line(2) == "site-0 trained, site-1 trained"
    answers = after(3)
    answers.note("evaluate", "site-0")
    assert answers.line(3) == "site-1 trained, site-2 trained, site-0 counted"
    assert Answers().line(3) == ""


def test_the_answers_of_many_sites_are_counted_anew_for_each_question() -> None:
    line = after(10_000).line(10_000)
    assert line.startswith("10,000 sites trained, ") and line.endswith(" a second")
    assert len(line) < 60
    answers = after(FEW + 1)
    answers.note("evaluate", "site-0")
    assert answers.line(FEW + 1).startswith("1 sites counted, ")
    answers.ask("evaluate")
    assert "sites" not in answers.line(FEW + 1)  # nobody has answered yet

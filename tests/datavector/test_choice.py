import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datavector import choice
from datavector.choice import Counts, choose_candidate, standard_error


def counts(*right, of=100):
    """Of each class so many recognised, the rest taken for the next class."""
    confusion = np.zeros((len(right), len(right)), dtype=np.int64)
    for label, hits in enumerate(right):
        confusion[label, label] = hits
        confusion[label, (label + 1) % len(right)] += of - hits
    return Counts(confusion, np.zeros((10, 3)))


def evaluations(**models):
    return {hospital: dict(models) for hospital in ("north", "south")}


def choose(found, candidates=("mean", "sum", "sum.head"), singles=(), needed=2):
    return choose_candidate(found, candidates, singles, fallback="mean", needed=needed)


def test_the_highest_balanced_accuracy_wins_though_another_recognises_more_images():
    many_of_one = Counts(np.array([[990, 10], [8, 2]]), np.zeros((10, 3)))
    balanced = Counts(np.array([[900, 100], [1, 9]]), np.zeros((10, 3)))
    found = choose(evaluations(mean=many_of_one, sum=balanced), ("mean", "sum"))
    assert found.chosen == "sum"
    assert found.validated
    assert "90.0%" in found.reason


def test_an_earlier_candidate_within_the_margin_of_error_is_preferred():
    close = choose(evaluations(mean=counts(80, 80), sum=counts(81, 80)), ("mean", "sum"))
    assert close.chosen == "mean"
    assert "within the margin of error" in close.reason
    far = choose(evaluations(mean=counts(60, 60), sum=counts(81, 80)), ("mean", "sum"))
    assert far.chosen == "sum"


def test_counts_are_summed_and_each_hospitals_result_is_told():
    found = {
        "north": {"mean": counts(90, 90, of=100), "sum": counts(10, 10, of=100)},
        "south": {"mean": counts(0, 0, of=10), "sum": counts(10, 10, of=10)},
    }
    result = choose(found, ("mean", "sum"))
    assert result.chosen == "mean"
    (mean, _) = result.scores
    assert mean.all.accuracy == pytest.approx(180 / 220)
    assert (mean.hospitals["north"].accuracy, mean.hospitals["south"].accuracy) == (0.9, 0.0)


@pytest.mark.parametrize("needed", [0, 2])
def test_one_hospital_alone_never_validates(needed):
    result = choose(
        {"north": {"mean": counts(9, 9, of=10), "sum": counts(9, 9, of=10)}}, ("mean", "sum"), needed=needed
    )
    assert (result.chosen, result.validated, result.scores) == ("mean", False, ())
    assert "1 of 2 hospitals" in result.reason


def test_a_hospital_that_evaluated_only_some_does_not_count():
    found = evaluations(mean=counts(80, 80), sum=counts(90, 90))
    del found["south"]["sum"]
    assert not choose(found, ("mean", "sum")).validated
    found["south"]["sum"] = Counts(np.zeros((2, 2), dtype=np.int64), np.zeros((10, 3)))
    assert not choose(found, ("mean", "sum")).validated


def test_a_single_hospital_that_is_better_on_either_measure_is_named():
    models = {"mean": counts(80, 80), "hospital.north": counts(85, 85), "hospital.south": counts(60, 60)}
    singles = ("hospital.north", "hospital.south")
    assert choose(evaluations(**models), ("mean",), singles).worse_than == "north"
    assert choose(evaluations(**{**models, "mean": counts(90, 90)}), ("mean",), singles).worse_than == ""
    many_of_one = Counts(np.array([[99, 1], [10, 0]]), np.zeros((10, 3)))  # better in accuracy alone
    balanced = Counts(np.array([[80, 20], [1, 9]]), np.zeros((10, 3)))
    found = choose(evaluations(mean=balanced, **{"hospital.north": many_of_one}), ("mean",), ("hospital.north",))
    assert found.worse_than == "north"


CANDIDATES = ("mean", "sum", "iso-c")
TABLES = st.lists(st.integers(0, 30), min_size=4, max_size=4).map(lambda cells: np.array(cells).reshape(2, 2))


def plainly_chosen(found):
    """The rule in exact numbers, hospital by hospital and class by class; None where too few evaluated everything."""
    complete = [models for models in found.values() if all(models[name].sum() for name in CANDIDATES)]
    if len(complete) < 2:
        return None
    totals = {name: sum(models[name] for models in complete).tolist() for name in CANDIDATES}

    def balanced(name):
        shares = [Fraction(row[label], sum(row)) for label, row in enumerate(totals[name]) if sum(row)]
        return sum(shares) / len(shares)

    best = max(CANDIDATES, key=balanced)
    variances = []
    for label, row in enumerate(totals[best]):
        if sum(row):
            share = (row[label] + 2) / (sum(row) + 4)
            variances.append(share * (1 - share) / (sum(row) + 4))
    margin = choice.MARGIN * math.sqrt(sum(variances)) / len(variances)
    return next(name for name in CANDIDATES if float(balanced(best) - balanced(name)) <= margin), margin


@given(st.dictionaries(st.sampled_from("abcd"), st.fixed_dictionaries(dict.fromkeys(CANDIDATES, TABLES)), max_size=4))
def test_the_choice_is_that_of_the_rule_in_exact_numbers(found):
    """Also where a class has no image at a hospital, or at any: then no figure is NaN either."""
    given_counts = {
        hospital: {name: Counts(table, np.zeros((10, 3))) for name, table in models.items()}
        for hospital, models in found.items()
    }
    result, expected = choose(given_counts, CANDIDATES), plainly_chosen(found)
    if expected is None:
        assert (result.chosen, result.validated) == ("mean", False)
    else:
        assert result.validated
        assert result.chosen == expected[0]
        assert result.margin == pytest.approx(expected[1])
    results = [each for score in result.scores for each in (score.all, *score.hospitals.values())]
    assert all(math.isfinite(each.accuracy) and math.isfinite(each.balanced_accuracy) for each in results)


@given(st.permutations(["a", "b", "c", "d"]), st.lists(st.integers(0, 20), min_size=16, max_size=16))
def test_the_order_of_the_hospitals_does_not_matter(order, hits):
    found = {
        name: {"mean": counts(*hits[4 * i : 4 * i + 2], of=20), "sum": counts(*hits[4 * i + 2 : 4 * i + 4], of=20)}
        for i, name in enumerate("abcd")
    }
    assert choose({name: found[name] for name in order}, ("mean", "sum")) == choose(found, ("mean", "sum"))


def test_few_images_give_no_certainty():
    assert standard_error(counts(5, 5, of=5).confusion) > 0.05 > standard_error(counts(500, 500, of=500).confusion)
    assert choice.MARGIN > 0

"""Rules and their hit rates, against trying every threshold, and the claim of `hf-ibdistill assess`."""

import json

import numpy as np
import pytest

from .advice import FEATURES, Example, assess, fit, hits, main, mean_error, read_examples


def make_examples(seed=0, gain=lambda random, value: random.normal()):
    """Three data sets of different sizes; every figure is noise, but for the divergence, of which `gain` may be a function."""
    random = np.random.default_rng(seed)
    given = []
    for data, count in (("a", 20), ("b", 6), ("c", 9)):
        for _ in range(count):
            figures = {name: random.normal() for name in (*FEATURES, "divergence_as_trained", "temperature")}
            given.append(Example(data, figures, gain(random, figures["divergence"])))
    return given


def rate_of(given, guesses):
    """The mean over data sets of the share of right guesses."""
    names = sorted({example.data for example in given})
    right = [guess == (example.gain > 0) for example, guess in zip(given, guesses)]
    return np.mean([np.mean([r for r, e in zip(right, given) if e.data == name]) for name in names])


@pytest.mark.parametrize("seed", range(3))
def test_a_rule_is_the_best_of_all_thresholds(seed):
    given = make_examples(seed)
    values = [example.features["memorization"] for example in given]
    possible = [rate_of(given, [(v > t) == above for v in values]) for t in [*values, -9.0] for above in (True, False)]
    rule = fit(given, "memorization")
    assert rule.rate == pytest.approx(max(possible)) == rate_of(given, [rule(example) for example in given])
    constant = fit(given, None)
    assert constant.rate == pytest.approx(max(rate_of(given, [answer] * len(given)) for answer in (True, False)))
    unknown = Example("a", {"memorization": np.nan}, 1.0)
    assert rule(unknown) == constant(unknown)


def test_a_figure_that_decides_is_found_and_noise_is_not():
    found = assess(make_examples(gain=lambda random, value: value))
    assert found["supported"] == "divergence" and found["rules"]["divergence"]["rate"] > 0.9
    assert found["rules"]["divergence"]["mean_error"] == pytest.approx(0, abs=1e-9)
    # A figure that decides, but is that of the baseline.
    given = make_examples(gain=lambda random, value: value)
    renamed = [Example(e.data, e.features | {"teacher_accuracy": e.features["divergence"]}, e.gain) for e in given]
    assert assess(renamed)["supported"] is None
    assert all(assess(make_examples(seed))["supported"] is None for seed in range(3))


def test_advice_that_is_right_less_often_than_always_the_same_answer_is_none():
    # Data set → divergence → answers. What the others say most often is wrong for each data set, so it is easy to beat.
    answers = {"a": {0.0: [False] * 4, 1.0: [False] * 16}, "b": {0.0: [False], 1.0: [True] * 5}}
    answers["c"] = {0.0: [False], 1.0: [True] * 8}
    names = (*FEATURES, "divergence_as_trained", "temperature")
    given = [
        Example(data, {**dict.fromkeys(names, 0.5), "divergence": value}, 1.0 if is_yes else -1.0)
        for data, by_value in answers.items()
        for value, of_value in by_value.items()
        for is_yes in of_value
    ]
    found = assess(given)
    right = {name: rule["right"] for name, rule in found["rules"].items()}
    assert right["constant"] == right["teacher_accuracy"] == 2 and right["best_on_the_others"] == 4 + 6 + 9
    assert len(given) - found["yes"] == 20 + 1 + 1 and found["supported"] is None


def test_the_data_set_that_is_asked_about_is_left_out():
    seen = []
    given = make_examples()

    def how(others):
        seen.append({example.data for example in others})
        return fit(others, "labelled")

    found = hits(given, how)
    assert seen == [{"b", "c"}, {"a", "c"}, {"a", "b"}]
    assert {name: count for name, (_, count) in found["by_data"].items()} == {"a": 20, "b": 6, "c": 9}
    # Without a figure, the prediction is the mean over the other data sets, each of the same weight.
    means = {name: np.mean([e.gain for e in given if e.data == name]) for name in "abc"}
    expected = [
        np.mean([abs(e.gain - np.mean([means[n] for n in "abc" if n != name])) for e in given if e.data == name])
        for name in "abc"
    ]
    assert mean_error(given, None) == pytest.approx(np.mean(expected))


def test_no_figure_supports_advice_which_is_what_the_command_prints(tmp_path):
    """If new cells change this, the command must give the advice, and the page of recording its hit rate."""
    main(["--output_file", str(tmp_path / "advice.json")])
    found = json.loads((tmp_path / "advice.json").read_text())
    assert [answers["supported"] for answers in found.values()] == [None, None, None]
    examples = read_examples()
    for question, answers in found.items():
        assert answers["yes"] == sum(example.gain > 0 for example in examples[question]) > 0
        assert answers["examples"] == len(examples[question]) > 10

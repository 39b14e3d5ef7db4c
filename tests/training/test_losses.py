"""The ensemble distillation loss against its formula, written out number by number, and against other libraries."""

import doctest
import math

import pytest
import torch
from torch import nn

from hf_ibdistill import ensemble_distillation_loss
from hf_ibdistill.training.losses import MODES, UNLABELLED_TARGETS


N, C = 5, 4


def random_logits(num_teachers, num_rows=N, num_classes=C, scale=3.0):
    """Class logits, teacher tokens' logits, labels and teachers' logits, in the loss's order of arguments."""
    z = scale * torch.randn(num_rows, num_classes)
    s, t = scale * torch.randn(2, num_rows, num_teachers, num_classes)
    return z, s, torch.randint(num_classes, (num_rows,)), t


# The formula. Python's floats are float64; nothing here is torch's.


def softmax(logits, temperature=1.0):
    largest = max(logits)
    exponentials = [math.exp((logit - largest) / temperature) for logit in logits]
    return [exponential / sum(exponentials) for exponential in exponentials]


def cross_entropy(logits, label):
    return -math.log(softmax(logits)[label])


def divergence(teacher, student, temperature):
    terms = zip(softmax(teacher, temperature), softmax(student, temperature))
    return sum(p * (math.log(p) - math.log(q)) for p, q in terms)


def formula(z, s, y, t, weights, temperatures, label_weight, mode):
    """(loss, label loss, teacher losses) of lists of numbers."""
    num_rows, num_teachers = len(z), len(weights)
    label_loss = sum(cross_entropy(z[n], y[n]) for n in range(num_rows)) / num_rows
    teacher_losses = []
    for i, temperature in enumerate(temperatures):
        total = 0.0
        for n in range(num_rows):
            if mode == "hard":
                total += cross_entropy(s[n][i], t[n][i].index(max(t[n][i])))
            else:
                total += temperature**2 * divergence(t[n][i], s[n][i], temperature)
        teacher_losses.append(total / num_rows)
    loss = label_weight * label_loss + sum(weights[i] * teacher_losses[i] for i in range(num_teachers))
    return loss, label_loss, teacher_losses


SETTINGS = [
    pytest.param([0.7], [1.0], 1.0, id="one teacher"),
    pytest.param([0.7], [3.0], 0.0, id="one teacher, no labels"),
    pytest.param([0.25, 2.0], [4.0, 0.5], 0.3, id="two teachers"),
    pytest.param([1.0, 0.0, 0.5], [1.0, 2.0, 8.0], 1.5, id="three teachers, one without weight"),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("weights", "temperatures", "label_weight"), SETTINGS)
def test_every_term_is_the_formulas(weights, temperatures, label_weight, mode):
    logits = random_logits(len(weights))
    result = ensemble_distillation_loss(
        *logits, weights=weights, temperature=temperatures, label_weight=label_weight, mode=mode
    )
    loss, label_loss, teacher_losses = formula(
        *(tensor.double().tolist() for tensor in logits[:2]), logits[2].tolist(), logits[3].double().tolist(),
        weights, temperatures, label_weight, mode,
    )  # fmt: skip
    assert result.loss.item() == pytest.approx(loss, rel=1e-5)
    assert result.label_loss.item() == pytest.approx(label_loss, rel=1e-5)
    assert result.teacher_losses.tolist() == pytest.approx(teacher_losses, rel=1e-5)
    assert result.loss.shape == result.label_loss.shape == () and result.teacher_losses.shape == (len(weights),)
    # A named tuple in the order of the contract.
    assert tuple(result) == (result.loss, result.label_loss, result.teacher_losses)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("weights", "temperatures", "label_weight"), SETTINGS)
def test_gradients_are_the_slopes_of_the_formula(weights, temperatures, label_weight, mode):
    z, s, y, t = random_logits(len(weights), num_rows=2, num_classes=3)
    z.requires_grad_(), s.requires_grad_()
    ensemble_distillation_loss(
        z, s, y, t, weights=weights, temperature=temperatures, label_weight=label_weight, mode=mode
    ).loss.backward()

    for student in (z, s):
        numbers = {id(tensor): tensor.detach().double() for tensor in (z, s)}
        changing = numbers[id(student)]
        slopes = torch.zeros_like(changing)
        for index in range(changing.numel()):
            losses = []
            for step in (1e-4, -1e-4):
                changed = changing.clone()
                changed.view(-1)[index] += step
                current = {**numbers, id(student): changed}
                arguments = current[id(z)].tolist(), current[id(s)].tolist(), y.tolist(), t.double().tolist()
                losses.append(formula(*arguments, weights, temperatures, label_weight, mode)[0])
            slopes.view(-1)[index] = (losses[0] - losses[1]) / 2e-4
        torch.testing.assert_close(student.grad.double(), slopes, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_match_autograd_of_the_textbook_formula(mode):
    z, s, y, t = random_logits(2, num_rows=32, num_classes=10)
    weights, temperatures, label_weight = [0.5, 1.5], [4.0, 2.0], 0.7
    leaves = [z.clone().requires_grad_(), s.clone().requires_grad_()]
    ensemble_distillation_loss(
        *leaves, y, t, weights=weights, temperature=temperatures, label_weight=label_weight, mode=mode
    ).loss.backward()

    expected = [z.double().requires_grad_(), s.double().requires_grad_()]
    rows = torch.arange(len(y))
    loss = -label_weight * (expected[0].exp() / expected[0].exp().sum(1, keepdim=True)).log()[rows, y].mean()
    for i, (weight, tau) in enumerate(zip(weights, temperatures)):
        student, teacher = expected[1][:, i], t[:, i].double()
        if mode == "hard":
            q = student.exp() / student.exp().sum(1, keepdim=True)
            loss = loss - weight * q.log()[rows, teacher.argmax(1)].mean()
        else:
            q = (student / tau).exp() / (student / tau).exp().sum(1, keepdim=True)
            p = (teacher / tau).exp() / (teacher / tau).exp().sum(1, keepdim=True)
            loss = loss + weight * tau**2 * (p * (p.log() - q.log())).sum(1).mean()
    loss.backward()
    for leaf, reference in zip(leaves, expected):
        torch.testing.assert_close(leaf.grad.double(), reference.grad, rtol=1e-4, atol=1e-7)


# Peers


def test_all_ones_is_co_advises_loss():
    z, s, y, t = random_logits(2)
    # arXiv 2106.12378, equation 3: cross-entropy of the class token, and for each token KL(teacher ‖ token).
    divergences = nn.KLDivLoss(reduction="batchmean")
    expected = nn.CrossEntropyLoss()(z, y)
    for i in range(2):
        expected = expected + divergences(s[:, i].log_softmax(-1), t[:, i].softmax(-1))
    result = ensemble_distillation_loss(z, s, y, t, weights=[1.0, 1.0], temperature=1.0)
    torch.testing.assert_close(result.loss, expected)


def test_one_hard_teacher_with_halves_is_deits_loss():
    z, s, y, t = random_logits(1, num_rows=16)
    # arXiv 2012.12877, equation 3: ½ CE(class token, label) + ½ CE(distillation token, teacher's choice).
    expected = 0.5 * nn.CrossEntropyLoss()(z, y) + 0.5 * nn.CrossEntropyLoss()(s[:, 0], t[:, 0].argmax(1))
    result = ensemble_distillation_loss(z, s, y, t, weights=[0.5], label_weight=0.5, mode="hard")
    torch.testing.assert_close(result.loss, expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_a_soft_term_is_torchs_divergence_times_the_squared_temperature(temperature):
    z, s, y, t = random_logits(3)
    result = ensemble_distillation_loss(z, s, y, t, weights=[1.0] * 3, temperature=temperature)
    divergence = nn.KLDivLoss(reduction="batchmean", log_target=True)
    for i in range(3):
        student, teacher = ((logits[:, i] / temperature).log_softmax(-1) for logits in (s, t))
        torch.testing.assert_close(result.teacher_losses[i], temperature**2 * divergence(student, teacher))


def test_at_high_temperature_it_is_half_the_mean_square_of_centered_logits():
    # arXiv 1503.02531, section 2.1: what the squared temperature is for.
    z, s, y, t = random_logits(1, num_classes=6)
    result = ensemble_distillation_loss(z, s, y, t, weights=[1.0], temperature=50.0)
    centered = (s - t) - (s - t).mean(-1, keepdim=True)
    assert result.teacher_losses.item() == pytest.approx((centered**2).mean(-1).mean().item() / 2, rel=0.05)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("mode", MODES)
def test_label_smoothing_is_torchs_and_leaves_the_teachers_alone(mode, smoothing):
    z, s, y, t = random_logits(2)
    settings = {"weights": [1.0, 0.5], "temperature": 2.0, "mode": mode}
    plain = ensemble_distillation_loss(z, s, y, t, **settings)
    smooth = ensemble_distillation_loss(z, s, y, t, **settings, label_smoothing=smoothing)
    torch.testing.assert_close(smooth.label_loss, nn.CrossEntropyLoss(label_smoothing=smoothing)(z, y))
    assert torch.equal(smooth.teacher_losses, plain.teacher_losses)
    torch.testing.assert_close(smooth.loss - plain.loss, smooth.label_loss - plain.label_loss, atol=1e-6, rtol=1e-5)


# Properties


def test_teacher_terms_and_their_gradients_vanish_if_the_student_equals_the_teachers():
    z, _, y, t = random_logits(3)
    s = t.clone().requires_grad_()
    result = ensemble_distillation_loss(z, s, y, t, weights=[1.0, 2.0, 3.0], temperature=[1.0, 4.0, 0.5])
    result.loss.backward()
    torch.testing.assert_close(result.teacher_losses, torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(s.grad, torch.zeros_like(s), rtol=0, atol=1e-6)
    torch.testing.assert_close(result.loss, result.label_loss, rtol=0, atol=1e-5)


def test_soft_terms_are_positive_elsewhere():
    result = ensemble_distillation_loss(*random_logits(3), weights=[1.0] * 3, temperature=4.0)
    assert (result.teacher_losses > 0.01).all()


@pytest.mark.parametrize("mode", MODES)
def test_no_gradient_reaches_the_teachers(mode):
    z, s, y, t = random_logits(2)
    s.requires_grad_(), t.requires_grad_()
    ensemble_distillation_loss(z, s, y, t, weights=[1.0, 1.0], mode=mode).loss.backward()
    assert t.grad is None and s.grad.abs().sum() > 0


@pytest.mark.parametrize("mode", MODES)
def test_each_token_learns_from_its_own_teacher_only(mode):
    z, s, y, t = random_logits(3)
    z.requires_grad_(), s.requires_grad_()
    ensemble_distillation_loss(z, s, y, t, weights=[0.0, 1.0, 0.0], label_weight=0.0, mode=mode).loss.backward()
    assert z.grad.abs().sum() == 0 and s.grad[:, [0, 2]].abs().sum() == 0 and s.grad[:, 1].abs().sum() > 0


@pytest.mark.parametrize("mode", MODES)
def test_teachers_can_be_reordered_with_their_settings(mode):
    z, s, y, t = random_logits(3)
    weights, temperatures, order = torch.tensor([0.2, 1.0, 3.0]), torch.tensor([1.0, 2.0, 5.0]), [2, 0, 1]
    first = ensemble_distillation_loss(z, s, y, t, weights=weights, temperature=temperatures.tolist(), mode=mode)
    second = ensemble_distillation_loss(
        z, s[:, order], y, t[:, order], weights=weights[order], temperature=temperatures[order].tolist(), mode=mode
    )
    torch.testing.assert_close(second.teacher_losses, first.teacher_losses[order])
    torch.testing.assert_close(second.loss, first.loss)


@pytest.mark.parametrize("mode", MODES)
def test_a_constant_added_to_a_rows_logits_changes_nothing(mode):
    z, s, y, t = random_logits(2)
    settings = {"weights": [1.0, 0.5], "temperature": [2.0, 3.0], "mode": mode}
    first = ensemble_distillation_loss(z, s, y, t, **settings)
    shift = torch.linspace(-20, 20, N)
    second = ensemble_distillation_loss(z + shift[:, None], s - shift[:, None, None], y, t + 7.0, **settings)
    for before, after in zip(first, second):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_the_mean_over_rows_is_the_mean_of_single_rows():
    z, s, y, t = random_logits(2)
    settings = {"weights": [1.0, 0.5], "temperature": [2.0, 3.0]}
    whole = ensemble_distillation_loss(z, s, y, t, **settings)
    rows = [ensemble_distillation_loss(z[n, None], s[n, None], y[n, None], t[n, None], **settings) for n in range(N)]
    for term, terms in zip(whole, zip(*rows)):
        torch.testing.assert_close(term, torch.stack(terms).mean(0))


def test_one_temperature_serves_all_teachers():
    logits = random_logits(3)
    one = ensemble_distillation_loss(*logits, weights=[1.0] * 3, temperature=3.0)
    three = ensemble_distillation_loss(*logits, weights=[1.0] * 3, temperature=[3.0] * 3)
    assert torch.equal(one.loss, three.loss) and torch.equal(one.teacher_losses, three.teacher_losses)


def test_hard_mode_does_not_use_the_temperature():
    logits = random_logits(2)
    cold, warm = (
        ensemble_distillation_loss(*logits, weights=[1.0, 1.0], temperature=temperature, mode="hard")
        for temperature in (1.0, 9.0)
    )
    assert torch.equal(cold.loss, warm.loss)


def test_without_teachers_the_labels_remain():
    z, s, y, t = random_logits(0)
    result = ensemble_distillation_loss(z, s, y, t, weights=[], label_weight=0.5)
    torch.testing.assert_close(result.loss, 0.5 * nn.CrossEntropyLoss()(z, y))
    assert result.teacher_losses.shape == (0,)


def test_the_documented_example_runs():
    namespace = {}
    for example in doctest.DocTestParser().get_examples(ensemble_distillation_loss.__doc__):
        exec(example.source, namespace)
    terms = namespace["label_loss"] + 0.5 * namespace["teacher_losses"].sum()
    torch.testing.assert_close(namespace["loss"], terms)


# Standardized logits and confidence


def standardized(logits):
    mean = sum(logits) / len(logits)
    deviation = math.sqrt(sum((logit - mean) ** 2 for logit in logits) / len(logits))
    return [(logit - mean) / deviation for logit in logits]


def test_standardized_logits_are_those_of_the_formula():
    z, s, y, t = random_logits(2)
    settings = {"weights": [0.7, 0.4], "temperature": [2.0, 0.5]}
    found = ensemble_distillation_loss(z, s, y, t, **settings, standardize_logits=True)
    s, t = ([[standardized(logits) for logits in row] for row in x.tolist()] for x in (s, t))
    loss, _, teacher_losses = formula(z.tolist(), s, y.tolist(), t, [0.7, 0.4], [2.0, 0.5], 1.0, "soft")
    assert found.loss.item() == pytest.approx(loss, rel=1e-4)
    assert found.teacher_losses.tolist() == pytest.approx(teacher_losses, rel=1e-4)


def test_standardized_logits_ignore_another_scale_and_nothing_else():
    z, s, y, _ = random_logits(2)
    settings = {"weights": [1, 1], "standardize_logits": True}
    assert ensemble_distillation_loss(z, s, y, 3 * s + 5, **settings).teacher_losses.max() < 1e-5
    assert ensemble_distillation_loss(z, s, y, s.flip(-1), **settings).teacher_losses.min() > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_confidence_weights_are_those_of_the_formula(mode):
    z, s, y, t = random_logits(2)
    found = ensemble_distillation_loss(
        z, s, y, t, weights=[1, 1], temperature=3.0, mode=mode, confidence_weighting=True
    )
    expected = [0.0, 0.0]
    for n in range(N):
        rows = [x[n : n + 1].tolist() for x in (z, s, y, t)]
        terms = formula(*rows, [1, 1], [3.0, 3.0], 1.0, mode)[2]
        right = [softmax(t[n, i].tolist())[y[n]] for i in range(2)]
        for i in range(2):
            expected[i] += 2 * right[i] / sum(right) * terms[i] / N
    assert found.teacher_losses.tolist() == pytest.approx(expected, rel=1e-4)


def test_confidence_of_a_single_teacher_or_of_equal_teachers_changes_nothing():
    z, s, y, t = random_logits(2)
    for teachers in (1, 2):
        arguments = (z, s[:, :teachers], y, t[:, :1].expand(-1, teachers, -1))
        plain = ensemble_distillation_loss(*arguments, weights=[1] * teachers)
        weighted = ensemble_distillation_loss(*arguments, weights=[1] * teachers, confidence_weighting=True)
        torch.testing.assert_close(weighted.teacher_losses, plain.teacher_losses)


# Precision


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype, mode):
    z, s, y, t = random_logits(2, num_rows=64, num_classes=10)
    halves = z.to(dtype), s.to(dtype), y, t.to(dtype)
    settings = {"weights": [1.0, 0.5], "temperature": [4.0, 2.0], "mode": mode}
    result = ensemble_distillation_loss(*halves, **settings)
    expected = ensemble_distillation_loss(*(x.float() if x.is_floating_point() else x for x in halves), **settings)
    for term, reference in zip(result, expected):
        assert term.dtype == torch.float32 and torch.equal(term, reference)


def test_autocast_does_not_lower_the_precision():
    logits = random_logits(2, num_rows=64, num_classes=10)
    settings = {"weights": [1.0, 0.5], "temperature": [4.0, 2.0]}
    expected = ensemble_distillation_loss(*logits, **settings)
    with torch.autocast("cpu", torch.bfloat16):
        result = ensemble_distillation_loss(*logits, **settings)
    for term, reference in zip(result, expected):
        assert term.dtype == torch.float32 and torch.equal(term, reference)


@pytest.mark.parametrize("mode", MODES)
def test_extreme_logits_stay_finite(mode):
    z, s, y, t = random_logits(2, scale=1e4)
    z.requires_grad_(), s.requires_grad_()
    loss = ensemble_distillation_loss(z, s, y, t, weights=[1.0, 1.0], temperature=1.0, mode=mode).loss
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all() and s.grad.isfinite().all()


# Errors


def shapes(z=(5, 4), s=(5, 2, 4), y=(5,), t=(5, 2, 4)):
    return torch.randn(z), torch.randn(s), torch.zeros(y, dtype=torch.long), torch.randn(t)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"s": (5, 3, 4)}, r"teacher_token_logits \(5, 3, 4\).*teacher_logits \(5, 2, 4\)"),
        ({"t": (5, 2, 3)}, r"teacher_token_logits \(5, 2, 4\).*teacher_logits \(5, 2, 3\)"),
        # Shapes that would broadcast to a wrong result.
        ({"s": (5, 1, 4)}, r"teacher_token_logits \(5, 1, 4\).*teacher_logits \(5, 2, 4\)"),
        ({"t": (1, 2, 4)}, r"teacher_token_logits \(5, 2, 4\).*teacher_logits \(1, 2, 4\)"),
        ({"s": (5, 4), "t": (5, 4)}, r"teacher_token_logits \(5, 4\).*teacher_logits \(5, 4\)"),
        ({"z": (5, 3)}, r"class_logits \(5, 3\).*labels \(5,\).*teacher_logits \(5, 2, 4\)"),
        ({"z": (4, 4)}, r"class_logits \(4, 4\).*labels \(5,\).*teacher_logits \(5, 2, 4\)"),
        ({"y": (4,)}, r"class_logits \(5, 4\).*labels \(4,\)"),
        ({"y": (5, 1)}, r"class_logits \(5, 4\).*labels \(5, 1\)"),
        ({"y": (5, 4)}, r"class_logits \(5, 4\).*labels \(5, 4\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ensemble_distillation_loss(*shapes(**arguments), weights=[1.0, 1.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": [1.0]}, "1 weights and 1 temperatures .*2 teachers"),
        ({"weights": [1.0, 1.0, 1.0]}, "3 weights and 1 temperatures .*2 teachers"),
        ({"weights": [1.0, 1.0], "temperature": [1.0]}, "2 weights and 1 temperatures .*2 teachers"),
        ({"weights": [1.0, 1.0], "temperature": [1.0] * 3}, "2 weights and 3 temperatures .*2 teachers"),
        ({"weights": [1.0, 1.0], "mode": "medium"}, 'mode="medium"'),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ensemble_distillation_loss(*shapes(), **settings)


@pytest.mark.parametrize("target", UNLABELLED_TARGETS)
def test_both_marks_of_a_row_without_a_label(target):
    z, s, y, t = random_logits(2, num_rows=4)
    results = []
    for mark in (-1, -100):
        labels = y.clone()
        labels[1:3] = mark
        results.append(ensemble_distillation_loss(z, s, labels, t, weights=[1.0, 1.0], unlabelled_target=target))
    for first, second in zip(*results):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    y[0] = -2
    with pytest.raises(IndexError, match="-2"):
        ensemble_distillation_loss(z, s, y, t, weights=[1.0, 1.0], unlabelled_target=target)

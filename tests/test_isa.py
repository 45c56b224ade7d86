"""The sneaking attack: its laws, its searches against plain loops, Proposition 1 on every attack that succeeds."""
import copy
from functools import partial

import pytest
import torch
from conftest import one_line
from torch import nn

from robustint.aai import protocol_targets
from robustint.attributions import integrated_gradients
from robustint.core import make_generator
from robustint.data import load_dataset
from robustint.discrepancy import class_distances, kendall_tau, pearson, proposition1_bound, two_class_discrepancy
from robustint.interpreters import cams
from robustint.isa import (CLASS_SETS, ClippedStep, class_set, isa, largest_weights, map_distance, map_source, mean_interval, normalised_discrepancy,
                           normalised_slope, report_sneaking, running_best, smallest_radii, sneak, target_margin, usable_attacks)
from robustint.models import Pool, Small, WResnet, fold
from robustint.zoo import load_model

N = 6
SHORT_IG = partial(integrated_gradients, steps=3, softplus=True)
MEASURES = [(classes, norm) for classes in CLASS_SETS for norm in (1, 2)]


@pytest.fixture(scope="module")
def setting():
    "An untrained network, some digits, their classes by that network, and wanted classes: the runners-up, which an attack can reach."
    network = Small(generator=make_generator(0))
    images = load_dataset("digits", "test").images[:N]
    ranked = network(images).argsort(1, descending=True)
    return network, images, ranked[:, 0], ranked[:, 1]


def close(a, b, tolerance=1e-5):
    return torch.allclose(a, b, atol=tolerance)


# --- one attack --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("classes, norm", MEASURES)
@pytest.mark.parametrize("interpreter", ["cam", "gradcampp_shortcut", "gradcampp", SHORT_IG], ids=["cam", "shortcut", "published", "ig"])
def test_an_attack_stays_in_its_ball(setting, classes, norm, interpreter):
    network, x, y, t = setting
    x, y, t, radii = x[:3], y[:3], t[:3], torch.tensor([0.0, 0.05, 0.3])
    attacked = sneak(network, x, y, t, eps=radii, weight=0.01, n=3, classes=classes, norm=norm, interpreter=interpreter, steps=3)
    assert ((attacked - x).flatten(1).abs().amax(1) <= radii + 1e-6).all()
    assert attacked.min() >= 0 and attacked.max() <= 1 and attacked.isfinite().all()
    assert torch.equal(attacked[0], x[0]) and not torch.equal(attacked[2], x[2])


def plain_loop(network, x, targets, eps, weight, n, classes, norm, labels, steps=10):
    "Eq. 6 written out with autograd on the unfolded network: a second implementation."
    rows = torch.arange(len(x))
    explain = lambda points: torch.einsum("ck,nkhw->nchw", network.head, network.features(points))
    benign, points = explain(x).detach(), x.clone()
    for _ in range(steps):
        points.requires_grad_()
        logits, maps = network(points), explain(points)
        others = logits.clone()
        others[rows, targets] = -1e9
        margin = torch.maximum(others.amax(1) - logits[rows, targets], torch.tensor(-0.1))
        power = (lambda d: d.abs()) if norm == 1 else (lambda d: d * d)
        each = power(maps - benign).sum((2, 3))
        distance = {"1-class": each[rows, labels], "2-class": (each[rows, labels] + each[rows, targets]) / 2, "all-class": each.mean(1)}[classes]
        gradient, = torch.autograd.grad((margin + weight * distance).sum() / n, points)
        points = points.detach() - 0.2 * eps * (1000 * gradient).clamp(-1, 1)
        points = torch.minimum(torch.maximum(points, x - eps), x + eps).clamp(0, 1)
    return points


@pytest.mark.parametrize("classes, norm", MEASURES)
@pytest.mark.parametrize("weight", [0.0, 0.003])
def test_an_attack_is_eq_6_written_out(setting, classes, norm, weight):
    "Weight 0 among them: the plain attack."
    network, x, y, t = setting
    ours = sneak(network, x, y, t, eps=0.1, weight=weight, n=100, classes=classes, norm=norm)
    assert close(ours, plain_loop(network, x, t, 0.1, weight, 100, classes, norm, y), 1e-4)


def test_n_is_what_the_paper_means_by_the_number_of_images(setting):
    "With n images in the batch the gradient of the batch mean is taken; a step grows with 1/n until it is clipped."
    ball = ClippedStep(torch.full((2, 1, 1, 1), 0.1), n=50)
    gradient = torch.tensor([0.01, 10.0]).view(2, 1, 1, 1)
    assert close(ball.step(torch.zeros(2, 1, 1, 1), gradient, 0.2).flatten(), torch.tensor([0.2 * 0.1 * 1000 * 0.01 / 50, 0.02]), 1e-9)
    network, x, y, t = setting
    far, near = (sneak(network, x, y, t, eps=0.1, weight=0, n=n, steps=1) for n in (1, 100_000))
    assert (far - x).abs().sum() > 10 * (near - x).abs().sum() > 0


@pytest.mark.parametrize("architecture", [Small, Pool, WResnet])
def test_every_gap_network_and_its_folded_form(architecture):
    network, x = architecture(channels=3, generator=make_generator(1)), torch.rand(2, 3, 32, 32, generator=make_generator(2))
    y, t = torch.tensor([0, 1]), torch.tensor([2, 3])
    whole, folded = (sneak(model, x, y, t, eps="8/255", weight=1e-3, n=2, steps=2) for model in (network, fold(network)))
    assert close(whole, folded, 1e-4) and not torch.equal(whole, x)


def test_double_precision_and_the_model_as_it_was(setting):
    network, x, y, t = setting
    network = copy.deepcopy(network).train()
    before = {name: p.clone() for name, p in network.named_parameters()}
    isa(network, x, y, t, n=N, multiples=(1.5,), bisections=2, steps=2)
    assert network.training and all(p.requires_grad and p.grad is None and torch.equal(p, before[name]) for name, p in network.named_parameters())
    assert sneak(network.double(), x.double(), y, t, eps=0.1, weight=1e-3, n=N, steps=2).dtype == torch.float64


# --- the searches ------------------------------------------------------------------------------------------------------

def test_a_batch_bisected_together_is_each_image_alone(setting):
    network, x, y, t = setting
    settings = dict(n=N, multiples=(1.0, 2.0), bisections=6, steps=5)
    together = isa(network, x, y, t, **settings)
    for i in range(N):
        alone = isa(network, x[i:i + 1], y[i:i + 1], t[i:i + 1], **settings)
        assert close(alone.radii, together.radii[i:i + 1], 1e-6) and close(alone.weights, together.weights[:, i:i + 1], 1e-7)
        assert close(alone.attacked, together.attacked[:, i:i + 1], 1e-3)


def one_weight(threshold, first=5e-5, largest=1.0, bisections=10):
    "The search for one image as protocol and paper describe it."
    low, high, weight = 0.0, largest, first
    for _ in range(bisections):
        if weight < threshold:
            low, weight = weight, min(2 * weight, (weight + high) / 2)
        else:
            high, weight = weight, (low + weight) / 2
    return low


def test_the_largest_weights_against_a_loop():
    thresholds = torch.tensor([0.0, 1e-6, 4e-5, 6e-5, 3e-4, 1e-3, 0.0123, 0.7, 2.0], dtype=torch.float64)
    images = torch.zeros(len(thresholds), 1, 1, 1, dtype=torch.float64)
    calls = []

    def attack(weights):
        calls.append(weights.clone())
        return images + 1 + weights.view(-1, 1, 1, 1), weights < thresholds

    for tries in (1, 5, 10, 30):
        calls.clear()
        weights, points = largest_weights(attack, images, bisections=tries)
        assert weights.tolist() == pytest.approx([one_weight(t, bisections=tries) for t in thresholds.tolist()])
        assert torch.equal(points.flatten(), 1 + weights), "the points are those of the weight returned, of weight 0 where none succeeded"
        assert len(calls) == tries + 1, "all images are tried at once"


def test_the_benign_maps_are_made_once(setting):
    "And the attacks are those that make them anew."
    network, x, y, t = setting
    asked = []

    def show(model, images, target, differentiable=False):
        asked.append(torch.equal(images, x))
        return SHORT_IG(model, images, target, differentiable=differentiable)

    settings = dict(n=N, interpreter=show)
    searched = smallest_radii(network, x, y, t, n=N, bisections=2, steps=2)
    found = isa(network, x, y, t, multiples=(1.5, 2.0), bisections=2, steps=2, plain=searched, **settings)
    attacks, classes = 2 * (2 + 1), 2  # at each multiple: the bisections, and one of weight 0 where none succeeded
    assert sum(asked) <= (1 + attacks) * classes, "once by itself, and once in the first step of each attack"
    eps = 2 * torch.where(searched[0].isinf(), 1.0, searched[0])
    assert close(found.attacked[-1], sneak(network, x, y, t, eps=eps, weight=found.weights[-1], steps=2, **settings))


def test_the_range_of_weights_is_the_callers(setting):
    network, x, y, t = setting
    settings = dict(n=N, multiples=(2.0,), bisections=3, steps=3)
    low, high = (isa(network, x, y, t, first_weight=first, largest_weight=largest, **settings).weights for first, largest in ((1e-6, 3e-6), (1e-3, 1.0)))
    assert (low <= 3e-6).all() and high.max() > 3e-6


def test_isa_reports_attacks_that_succeed_with_the_smallest_radius(setting):
    network, x, y, t = setting
    radii, points = smallest_radii(network, x, y, t, n=N)
    reached = radii.isfinite()
    assert reached.any() and (target_margin(network(points), t) < 0)[reached].all()
    smaller = sneak(network, x, y, t, eps=torch.where(reached, 0.9 * radii, 0.1), weight=0, n=N)
    assert (target_margin(network(smaller), t) >= 0)[reached].float().mean() > 0.5, "a radius 10% smaller mostly fails"
    found = isa(network, x, y, t, n=N, multiples=(1.0, 2.0), plain=(radii, points))
    assert torch.equal(found.radii, radii) and torch.equal(found.attacked[0], points) and found.weights.shape == (2, N)
    for weights, attacked in zip(found.weights, found.attacked[1:]):
        won = weights > 0
        assert (target_margin(network(attacked), t) < 0)[won].all()


def test_sneaking_makes_its_own_measure_smaller(setting):
    "Against the plain attack of the same radius."
    network, x, y, t = setting
    searched = smallest_radii(network, x, y, t, n=N)
    attacked = sneak(network, x, y, t, eps=2 * searched[0], weight=0, n=N)
    for classes, norm in MEASURES:
        found = isa(network, x, y, t, n=N, multiples=(2.0,), classes=classes, norm=norm, plain=searched)
        explain, chosen = map_source(network), class_set(classes, y, t, 10)
        benign, plain, sneaking = (explain(points, chosen)[1] for points in (x, attacked, found.attacked[1]))
        won = found.weights[0] > 0
        assert won.any() and (map_distance(benign, sneaking, norm=norm) < map_distance(benign, plain, norm=norm))[won].all(), (classes, norm)


def test_no_multiples_is_the_plain_attack_alone(setting):
    network, x, y, t = setting
    found = isa(network, x, y, t, n=N, multiples=(), bisections=3, steps=2)
    assert found.attacked.shape == (1, *x.shape) and found.weights.shape == (0, N)


# --- the measures ------------------------------------------------------------------------------------------------------

def test_distances_of_a_map_against_itself_and_under_scaling():
    maps, others = torch.randn(2, 5, 3, 4, 4, generator=make_generator(0))
    for norm in (1, 2):
        assert map_distance(maps, maps, norm=norm).abs().max() == 0 and normalised_discrepancy(maps, maps, norm=norm).abs().max() == 0
        assert close(normalised_discrepancy(7 * maps + 2, 7 * others + 2, norm=norm), normalised_discrepancy(maps, others, norm=norm))
    assert close(map_distance(maps, others), class_distances(maps, others).mean(1))
    assert close(map_distance(maps, others, norm=2), class_distances(maps, others, norm=2).square().mean(1), 1e-4)
    span = maps.flatten(2).amax(2) - maps.flatten(2).amin(2)
    assert close(normalised_discrepancy(maps[:, :1], others[:, :1]), (maps - others)[:, 0].abs().sum((1, 2)) / span[:, 0])


def by_hand(values, eps, usable):
    "Running minimum and slope of one image, as a loop over its attacks."
    kept = [(v, e) for v, e, ok in zip(values, eps, usable) if ok]
    best, run = float("inf"), []
    for value, _ in kept:
        best = min(best, value)
        run.append(best)
    if len(kept) < 2 or kept[-1][1] <= kept[0][1]:
        return run, None
    return run, ((run[0] - run[-1]) / run[0]) / ((kept[-1][1] - kept[0][1]) / kept[0][1])


def test_running_minimum_and_slope_against_a_loop():
    generator = make_generator(3)
    values, eps = torch.rand(5, 40, generator=generator) + 0.1, (torch.rand(5, 40, generator=generator) + 0.1).cumsum(0)
    usable = torch.rand(5, 40, generator=generator) < 0.7
    lowest = values.gather(0, running_best(values, usable))
    slopes = normalised_slope(lowest, eps, usable)
    for i in range(40):
        run, slope = by_hand(values[:, i].tolist(), eps[:, i].tolist(), usable[:, i].tolist())
        assert lowest[usable[:, i], i].tolist() == pytest.approx(run)
        assert slopes[i].isnan() if slope is None else slopes[i].item() == pytest.approx(slope, rel=1e-4)


def test_which_attacks_count():
    before = torch.tensor([[2.0, 1.0], [2.0, 1.0], [1.0, 2.0], [2.0, 2.0]])
    after = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0], [1.0, 2.0]])
    zero = torch.zeros(4, dtype=torch.long)
    assert usable_attacks(before, after, zero, zero + 1).tolist() == [True, False, False, True]


def test_the_report_says_what_the_maps_say(setting):
    network, x, y, t = setting
    found = isa(network, x, y, t, n=N, multiples=(1.5, 2.0), bisections=5)
    for classes, norm in (("2-class", 1), ("all-class", 2)):
        report, chosen = report_sneaking(network, x, y, t, found, classes=classes, norm=norm), class_set(classes, y, t, 10)
        assert all(getattr(report, name).shape == (3, N) for name in ("eps", "usable", "raw", "discrepancy", "tau", "pearson")) and report.slope.shape == (N,)
        assert close(report.eps, (found.attacked - x).flatten(2).abs().amax(2))
        explain = map_source(network)
        benign, moved = (explain(points, chosen)[1].detach() for points in (x, found.attacked[0]))
        first = report.usable[0]
        assert close(report.discrepancy[0][first], normalised_discrepancy(benign, moved, norm=norm)[first], 1e-4)
        for name, measure in (("tau", kendall_tau), ("pearson", pearson)):
            expected = torch.stack([measure(benign[:, j], moved[:, j]) for j in range(chosen.shape[1])], 1).mean(1)
            assert close(getattr(report, name)[0][first].double(), expected[first].double(), 1e-4)
        for row, ok in zip(report.discrepancy.T, report.usable.T):
            assert (row[ok].diff() <= 0).all(), "a larger radius has no larger discrepancy"


def test_mean_interval_is_students():
    from scipy.stats import t, ttest_1samp
    values = torch.randn(30, generator=make_generator(0), dtype=torch.float64)
    mean, low, high, n = mean_interval(torch.cat([values, torch.tensor([float("nan")])]))
    expected = ttest_1samp(values.numpy(), 0).confidence_interval()
    assert (mean, low, high, n) == (pytest.approx(values.mean().item()), pytest.approx(expected.low), pytest.approx(expected.high), 30)
    assert mean_interval(torch.tensor([])) == (None, None, None, 0) and mean_interval(torch.tensor([2.0])) == (2.0, None, None, 1)
    assert t.ppf(0.975, 29) > 2


# --- Proposition 1 -----------------------------------------------------------------------------------------------------

def violations(network, x, y, t, **settings):
    "How many successful attacks, plain and sneaking, there are, and how many fall below the bound."
    tried = broken = 0
    plain = smallest_radii(network, x, y, t, n=100, bisections=settings.get("bisections", 10))
    for classes, norm in (("2-class", 1), ("1-class", 1), ("2-class", 2)):
        found = isa(network, x, y, t, n=100, classes=classes, norm=norm, plain=plain, **settings)
        with torch.no_grad():
            before, benign = network(x), cams(network, x)
            bound = proposition1_bound(before, y, t)
            for attacked in found.attacked:
                distance = two_class_discrepancy(benign, cams(network, attacked), y, t)
                ok = usable_attacks(before, network(attacked), y, t)
                tried, broken = tried + int(ok.sum()), broken + int((distance < bound - 1e-4 * (1 + bound.abs()))[ok].sum())
    return tried, broken


def test_no_attack_on_a_sample_breaks_proposition_1(setting):
    network, x, y, t = setting
    tried, broken = violations(network, x, y, t, multiples=(1.0, 2.0), bisections=5)
    assert tried >= 10 and broken == 0


@pytest.mark.full
@pytest.mark.parametrize("method, dataset, architecture", [("normal", "mnist", "small"), ("int", "mnist", "small"), ("normal", "cifar10", "small")])
def test_no_attack_on_700_images_breaks_proposition_1(method, dataset, architecture, data, released):
    points, targets = protocol_targets(data(dataset), 700)
    tried, broken = violations(load_model(method, dataset, architecture).eval(), points.images, points.labels, targets, multiples=(2.0,), bisections=8)
    assert tried > 400 and broken == 0  # attacks that succeeded; a robust network or a wrong answer leaves fewer than the 700


# --- at the door -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changed, match", [
    (dict(images=lambda x: x * 255), "divide by 255"), (dict(images=lambda x: x / 0), "NaN"), (dict(images=lambda x: x[:0]), "empty"),
    (dict(images=lambda x: x.expand(-1, 3, -1, -1)), "3 channels"), (dict(labels=lambda y: y + 10), "below 10"), (dict(targets=lambda t: t + 10), "targets must be below 10"),
    (dict(labels=lambda y: y.float()), "whole numbers"), (dict(eps=8), "write '8/255'"), (dict(eps=-0.1), "negative"), (dict(eps=torch.tensor([0.1])), "one value an image"),
    (dict(weight=-1.0), "0 or more"), (dict(weight=float("nan")), "0 or more"), (dict(n=0), "1 or more"), (dict(n=2.5), "whole number"), (dict(classes="3-class"), "2-class"), (dict(norm=3), "norm must be 1 or 2"),
    (dict(interpreter="lime"), "choose one of cam")])
def test_bad_input_is_refused(setting, changed, match):
    network, x, y, t = setting
    told = dict(images=x, labels=y, targets=t, eps=0.1, weight=1e-3, n=N)
    told |= {name: value(told[name]) if callable(value) else value for name, value in changed.items()}
    with pytest.raises(ValueError, match=match) as error:
        sneak(network, **told)
    one_line(error)


def test_a_target_that_is_the_label_and_a_model_that_will_not_do(setting):
    network, x, y, t = setting
    for model, targets, match in ((network, y, "own label as target"), (nn.Sequential(network, nn.Softmax(1)), t, "remove the softmax"),
                                  (nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), t, "global average pooling")):
        with pytest.raises(ValueError, match=match) as error:
            sneak(model, x, y, targets, eps=0.1, weight=1e-3, n=N)
        one_line(error)


def plain_network():
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))


def test_a_network_without_a_gap_head_is_attacked_by_the_interpreter_it_has():
    torch.manual_seed(0)
    network, images = plain_network(), torch.rand(4, 1, 8, 8)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    labels = network.eval()(images).argmax(1)
    targets = (labels + 1) % 5
    found = isa(network.train(), images, labels, targets, n=4, interpreter="gradient", multiples=(1., 3.), bisections=3)
    assert found.attacked.shape == (3, *images.shape) and network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items()), "in training mode too it is only looked at"
    calm = isa(network.eval(), images, labels, targets, n=4, interpreter="gradient", multiples=(1., 3.), bisections=3)
    assert torch.equal(found.attacked, calm.attacked)


def test_a_wrong_name_is_refused_before_the_search_begins(monkeypatch):
    monkeypatch.setattr("robustint.isa.smallest_radii", lambda *given, **more: pytest.fail("searched first"))
    for wrong in ({"interpreter": "gradients"}, {"classes": "3-class"}):
        with pytest.raises(ValueError, match="choose"):
            isa(plain_network(), torch.rand(2, 1, 8, 8), torch.tensor([0, 1]), torch.tensor([1, 0]), n=2, **({"interpreter": "gradient"} | wrong))

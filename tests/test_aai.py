"""Attacks on interpretability: the paper's draws, the attacks against plain loops, Table 3's score."""
from functools import partial

import numpy
import pytest
import torch
from conftest import one_line
from scipy.stats import kendalltau
from torch import nn

from robustint.aai import discrepancy_attack, draw_targets, map_stability, protocol_draws, protocol_targets, topk_attack
from robustint.attributions import integrated_gradients
from robustint.core import make_generator
from robustint.data import Dataset, evaluation_indices, load_dataset
from robustint.interpreters import cam, cams
from robustint.isa import map_source
from robustint.models import Small, fold
from robustint.zoo import load_model

SHORT_IG = partial(integrated_gradients, steps=3, softplus=True)
INTERPRETERS = pytest.mark.parametrize("interpreter", ["cam", "gradcampp_shortcut", "gradcampp", SHORT_IG], ids=["cam", "shortcut", "published", "ig"])


@pytest.fixture(scope="module")
def setting():
    network, test = Small(generator=make_generator(0)), load_dataset("digits", "test")
    return network, test.images[:5], test.labels[:5]


# --- the paper's draws -------------------------------------------------------------------------------------------------

def coloured(n=30):
    generator = make_generator(0)
    return Dataset(torch.rand(n, 3, 4, 6, generator=generator), torch.randint(9, (n,), generator=generator), "made up", "test", tuple("abcdefghi"))


def test_the_draws_are_numpys_in_the_papers_order():
    dataset = coloured()
    points, targets, start = protocol_draws(dataset, 7, eps="1/10")
    random = numpy.random.RandomState(99)
    index = random.permutation(30)[:7]
    labels = dataset.labels.numpy()[index]
    wrong = (labels + 1 + random.randint(8, size=7)) % 9
    noise = random.uniform(-0.1, 0.1, size=(7, 4, 6, 3))  # channels last
    assert torch.equal(points.images, dataset.images[index]) and points.labels.tolist() == labels.tolist() and targets.tolist() == wrong.tolist()
    assert all(start[i, c, h, w].item() == pytest.approx(noise[i, h, w, c], abs=1e-7) for i in (0, 6) for c in range(3) for h in range(4) for w in range(6))
    assert start.dtype == dataset.images.dtype


def test_the_points_are_those_of_every_evaluation_and_the_targets_are_wrong():
    test = load_dataset("digits", "test")
    points, targets = protocol_targets(test, 200)
    assert torch.equal(points.images, test.images[evaluation_indices(len(test), 200)])
    assert (targets != points.labels).all() and targets.min() >= 0 and targets.max() <= 9 and len(targets.unique()) == 10
    assert torch.equal(targets, protocol_draws(test, 200, eps=0.3)[1]), "the radius does not move the targets"


def test_every_wrong_class_is_as_likely():
    counts = draw_targets(numpy.random.RandomState(0), torch.full((9000,), 4), 10).bincount(minlength=10)
    assert counts[4] == 0 and counts[torch.arange(10) != 4].min() > 850


def test_eps_0_draws_no_perturbation():
    assert protocol_draws(coloured(), 5, eps=0)[2].abs().max() == 0


# --- the attacks -------------------------------------------------------------------------------------------------------

ATTACKS = pytest.mark.parametrize("attack", [topk_attack, discrepancy_attack], ids=["top-k", "discrepancy"])


@ATTACKS
@INTERPRETERS
def test_an_attack_stays_in_its_ball(setting, attack, interpreter):
    network, x, y = setting
    attacked = attack(network, x[:2], y[:2], eps="8/255", steps=3, step_size=0.02, interpreter=interpreter, generator=make_generator(1))
    assert (attacked - x[:2]).abs().max() <= 8 / 255 + 1e-6 and attacked.min() >= 0 and attacked.max() <= 1 and not torch.equal(attacked, x[:2])
    assert torch.equal(attack(network, x[:2], y[:2], eps=0, steps=3, interpreter=interpreter), x[:2])


@ATTACKS
def test_a_batch_is_each_image_alone(setting, attack):
    network, x, y = setting
    start = 0.1 * (2 * torch.rand(x.shape, generator=make_generator(2)) - 1)
    settings = dict(eps=0.1, steps=3, step_size=0.02)
    together = attack(network.double(), x.double(), y, start=start.double(), **settings)
    alone = torch.cat([attack(network, x[i:i + 1].double(), y[i:i + 1], start=start[i:i + 1].double(), **settings) for i in range(len(x))])
    network.float()
    assert torch.allclose(together, alone, atol=1e-9)


def test_the_topk_attack_written_out(setting):
    "A second implementation: autograd on the unfolded network, positions by NumPy."
    network, x, y = setting
    network, x, rows = network.double(), x.double(), torch.arange(len(y))
    start = 0.1 * (2 * torch.rand(x.shape, generator=make_generator(3), dtype=torch.float64) - 1)
    show = lambda points: torch.einsum("nk,nkhw->nhw", network.head[y], network.features(points)).flatten(1)
    top = torch.from_numpy(numpy.argsort(-show(x).detach().numpy(), axis=1)[:, :8].copy())
    points = (x + start).clamp(0, 1)
    for _ in range(12):
        points.requires_grad_()
        gradient, = torch.autograd.grad(show(points)[rows[:, None], top].sum(), points)
        points = torch.minimum(torch.maximum(points.detach() - 0.01 * gradient.sign(), x - 0.1), x + 0.1).clamp(0, 1)
    ours = topk_attack(network, x, y, eps=0.1, steps=12, start=start)
    network.float()
    assert torch.allclose(ours, points, atol=1e-9)


@INTERPRETERS
def test_the_attacks_do_what_they_are_for(setting, interpreter):
    "The top-8 sum falls; the discrepancy grows beyond that of the random start."
    network, x, y = setting
    start = 0.05 * (2 * torch.rand(x.shape, generator=make_generator(4)) - 1)
    flat = lambda points: map_source(network, interpreter)(points, y[:, None])[1].flatten(1).detach()
    benign = flat(x)
    top = benign.topk(8).indices
    attacked = topk_attack(network, x, y, eps=0.05, steps=8, interpreter=interpreter, start=start)
    assert (flat(attacked).gather(1, top).sum(1) < benign.gather(1, top).sum(1)).all()
    far = discrepancy_attack(network, x, y, eps=0.05, steps=8, interpreter=interpreter, start=start)
    first = (x + start).clamp(0, 1)
    assert ((flat(far) - benign).abs().sum(1) > (flat(first) - benign).abs().sum(1)).all()


def test_the_discrepancy_attack_over_two_and_all_classes(setting):
    network, x, y = setting
    for classes in ("2-class", "all-class"):
        attacked = discrepancy_attack(network, x, y, eps=0.05, steps=8, classes=classes, targets=(y + 1) % 10, generator=make_generator(5))
        moved = (cams(network, attacked) - cams(network, x)).abs().sum((2, 3)).mean(1)
        assert (moved > 0).all() and (attacked - x).abs().max() <= 0.05 + 1e-6


def test_the_same_start_gives_the_same_attack_and_the_model_is_left_alone(setting):
    network, x, y = setting
    network.train()
    first, second = (topk_attack(network, x, y, eps=0.1, steps=2, generator=make_generator(7)) for _ in range(2))
    assert torch.equal(first, second) and network.training and all(p.requires_grad and p.grad is None for p in network.parameters())


# --- the score ---------------------------------------------------------------------------------------------------------

def test_the_score_is_scipys_tau_of_the_true_class(setting):
    network, x, y = setting
    attacked = topk_attack(network, x, y, eps=0.3, steps=5, step_size=0.1, generator=make_generator(8))
    tau, share, kept = map_stability(network, x, attacked, y)
    benign, moved = cam(network, x, y), cam(network, attacked, y)
    assert tau.tolist() == pytest.approx([kendalltau(a.numpy(), b.numpy()).statistic for a, b in zip(benign, moved)], abs=1e-3)
    assert kept.tolist() == (network(x).argmax(1) == network(attacked).argmax(1)).tolist()
    tau, share, kept = map_stability(fold(network), x, x, y)
    assert (tau > 1 - 1e-12).all() and (share == 1).all() and kept.all()


@pytest.mark.full
@pytest.mark.parametrize("method, eps, paper", [("int", 0.05, 0.982), ("int", 0.3, 0.913), ("adv", 0.2, 0.910), ("int_one_class", 0.1, 0.818)])
def test_cells_of_table_3(method, eps, paper, data, released):
    points, _, start = protocol_draws(data("mnist"), 200, eps=eps)
    network = load_model(method, "mnist")
    tau, share, kept = map_stability(network, points.images, topk_attack(network, points.images, points.labels, eps=eps, start=start), points.labels)
    assert kept.sum() >= 50 and tau[kept].mean().item() == pytest.approx(paper, abs=0.0105)


# --- at the door -------------------------------------------------------------------------------------------------------

@ATTACKS
@pytest.mark.parametrize("changed, match", [
    (dict(images=lambda x: x * 255), "divide by 255"), (dict(images=lambda x: x / 0), "NaN"), (dict(images=lambda x: x[:0]), "empty"), (dict(images=lambda x: x.expand(-1, 3, -1, -1)), "3 channels"),
    (dict(labels=lambda y: y + 10), "below 10"), (dict(labels=lambda y: y.float()), "whole numbers"), (dict(labels=lambda y: y[:2]), "as many"), (dict(eps=8), "write '8/255'"), (dict(eps=-0.1), "negative"),
    (dict(start=torch.zeros(1, 1, 28, 28)), "one perturbation an image"), (dict(interpreter="lime"), "choose one of cam")])
def test_bad_input_is_refused(setting, attack, changed, match):
    network, x, y = setting
    told = dict(images=x, labels=y, eps=0.1, steps=1)
    told |= {name: value(told[name]) if callable(value) else value for name, value in changed.items()}
    with pytest.raises(ValueError, match=match) as error:
        attack(network, **told)
    one_line(error)


@pytest.mark.parametrize("call, match", [
    (lambda net, x, y: topk_attack(net, x, y, eps=0.1, k=50), "from 1 to 49"), (lambda net, x, y: topk_attack(net, x, y, eps=0.1, k=0), "from 1 to 49"),
    (lambda net, x, y: topk_attack(nn.Sequential(net, nn.Softmax(1)), x, y, eps=0.1), "remove the softmax"), (lambda net, x, y: topk_attack(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), x, y, eps=0.1), "global average pooling"),
    (lambda net, x, y: discrepancy_attack(net, x, y, eps=0.1, classes="2-class"), "needs targets"), (lambda net, x, y: discrepancy_attack(net, x, y, eps=0.1, norm=3), "norm must be 1 or 2"),
    (lambda net, x, y: protocol_draws(coloured(), 31, eps=0.1), "from 1 to the number of images, 30"), (lambda net, x, y: protocol_draws(coloured(), 5, eps=8), "write '8/255'"),
    (lambda net, x, y: protocol_targets(coloured(), 0), "from 1 to")])
def test_other_bad_input(setting, call, match):
    with pytest.raises(ValueError, match=match) as error:
        call(*setting)
    one_line(error)

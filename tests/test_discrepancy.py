"""Measures of explanations: closed forms, other libraries, and Proposition 1 on attacks that succeeded."""
import pytest
import torch
from scipy import stats

from robustint.core import make_generator
from robustint.data import load_dataset
from robustint.discrepancy import class_distances, discrepancy, kendall_tau, pearson, proposition1_bound, soft_discrepancy, topk_overlap, two_class_discrepancy
from robustint.interpreters import cams
from robustint.models import make_model
from robustint.objectives import make_method
from robustint.pgd import pgd
from robustint.training import train


def maps(*shape, seed=0):
    return torch.randn(*shape, generator=make_generator(seed))


def test_equation_3_over_each_set_of_classes():
    a, b = maps(5, 4, 3, 3), maps(5, 4, 3, 3, seed=1)
    for norm, order in ((1, 1), (2, 2)):
        by_hand = (a - b).flatten(2).norm(p=order, dim=2)
        torch.testing.assert_close(class_distances(a, b, norm=norm), by_hand)
        torch.testing.assert_close(discrepancy(a, b, norm=norm), by_hand.mean(1))
        one, two = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1, 2, 3, 0, 2])
        torch.testing.assert_close(discrepancy(a, b, one[:, None], norm=norm), by_hand[range(5), one])
        torch.testing.assert_close(two_class_discrepancy(a, b, one, two, norm=norm), (by_hand[range(5), one] + by_hand[range(5), two]) / 2)


def test_equation_7_by_hand():
    a, b, logits, labels = maps(5, 4, 3, 3), maps(5, 4, 3, 3, seed=1), maps(5, 4, seed=2), torch.tensor([0, 1, 2, 3, 0])
    for n in range(5):
        d = (a[n] - b[n]).abs().sum((1, 2))
        wrong = [i for i in range(4) if i != labels[n]]
        weights = logits[n, wrong].exp() / logits[n, wrong].exp().sum()
        torch.testing.assert_close(soft_discrepancy(a, b, logits, labels)[n], d[labels[n]] / 2 + (weights * d[wrong]).sum() / 2)


def test_the_weights_of_equation_7_are_differentiated_through():
    logits = maps(2, 4).requires_grad_()
    soft_discrepancy(maps(2, 4, 3, 3), maps(2, 4, 3, 3, seed=1), logits, torch.tensor([0, 1])).sum().backward()
    assert logits.grad[0, 1:].abs().min() > 0 and logits.grad[0, 0] == 0


def test_kendall_and_pearson_are_scipys():
    a, b = maps(30, 7, 7).round(decimals=1), maps(30, 7, 7, seed=1).round(decimals=1)
    for i, (tau, r) in enumerate(zip(kendall_tau(a, b), pearson(a, b))):
        assert tau.item() == pytest.approx(stats.kendalltau(a[i].flatten().numpy(), b[i].flatten().numpy()).statistic, abs=1e-12)
        assert r.item() == pytest.approx(stats.pearsonr(a[i].flatten().numpy(), b[i].flatten().numpy()).statistic, abs=1e-6)


def test_a_constant_map_has_no_rank():
    assert kendall_tau(torch.ones(1, 4), torch.rand(1, 4)).isnan().all()


def test_overlap_counts_shared_positions():
    a = torch.arange(16.0).view(1, 4, 4)
    assert topk_overlap(a, a, k=8).item() == 1 and topk_overlap(a, -a, k=8).item() == 0 and topk_overlap(a, -a, k=16).item() == 1


def check_no_violation(model, images, labels, eps, **attack):
    """Every image that an attack turned obeys the bound, and there are some; returns how many."""
    attacked = pgd(model, images, labels, eps=eps, **attack)
    with torch.no_grad():
        before, after = model(images), model(attacked).argmax(1)
    turned = (before.argmax(1) == labels) & (after != labels)
    x, z, y, t = images[turned], attacked[turned], labels[turned], after[turned]
    bound = proposition1_bound(before[turned], y, t)
    measured = two_class_discrepancy(cams(model, x), cams(model, z), y, t)
    assert turned.any() and (bound > 0).all() and (measured >= bound * (1 - 1e-4) - 1e-5).all()
    return int(turned.sum())


@pytest.mark.parametrize("architecture", ["small", "pool"])
def test_no_attack_on_the_digits_violates_proposition_1(architecture):
    digits, test = load_dataset("digits"), load_dataset("digits", "test")
    model = make_model(architecture, channels=1, generator=make_generator(0))
    train(model, digits.images[:600], digits.labels[:600], make_method("normal"), epochs=6, learning_rate=[[0, 2e-3]])
    for eps in (0.05, 0.2):
        check_no_violation(model, test.images[:100], test.labels[:100], eps, steps=10, step_size=0.02)


@pytest.mark.full
def test_no_attack_on_the_released_networks_violates_proposition_1(data, released):
    from robustint.zoo import load_released
    counts = []
    for method, eps in (("normal", 0.1), ("adv", 0.4), ("int", 0.4)):
        test = data("mnist").subset(range(1000))
        counts.append(check_no_violation(load_released(released / f"mnist_smallgap_{method}_100.pkl"), test.images, test.labels, eps, steps=60, step_size=0.01))
    assert sum(counts) >= 2000


@pytest.mark.parametrize("positions", [9, 400])
def test_a_map_with_infinity_has_no_rank_correlation(positions):
    first, second = torch.rand(3, positions), torch.rand(3, positions)
    first[1, 2], second[2, 0] = torch.inf, torch.nan
    assert kendall_tau(first, second).isnan().tolist() == [False, True, True]

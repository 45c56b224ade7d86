"""Accuracies, intervals, and signs of masked gradients."""
import pytest
import torch
from statistics import NormalDist
from torch import nn

from house import ROOT
from robustint.core import make_generator, read_record
from robustint.data import load_dataset
from robustint.evaluation import accuracy, correct, masking_warnings, pixel_thresholds, robust_accuracy, seed_interval, wilson_interval
from robustint.models import make_model


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", "test").subset(range(60))


@pytest.fixture(scope="module")
def model():
    return make_model("small", channels=1, generator=make_generator(0))


def test_accuracy_is_the_share_of_right_answers_in_any_batching(model, digits):
    by_hand = (model(digits.images).argmax(1) == digits.labels).double().mean().item()
    assert all(accuracy(model, digits.images, digits.labels, batch_size=b) == pytest.approx(by_hand) for b in (1, 7, 60, 500))
    assert correct(model, digits.images, digits.labels).shape == (60,)


def test_zero_eps_is_the_clean_accuracy(model, digits):
    labels = model(digits.images).argmax(1)
    assert robust_accuracy(model, digits.images, labels, eps=0) == accuracy(model, digits.images, labels) == 1
    assert robust_accuracy(model, digits.images, labels, eps=0.3, steps=40) < 0.2


@pytest.mark.parametrize("k, n", [(0, 200), (1, 200), (100, 200), (199, 200), (200, 200), (3, 7)])
def test_wilsons_interval_by_its_formula(k, n):
    z, p = NormalDist().inv_cdf(0.975), k / n
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    low, high = wilson_interval(k, n)
    assert low == pytest.approx((centre - half) / (1 + z * z / n), abs=1e-9) and high == pytest.approx((centre + half) / (1 + z * z / n), abs=1e-9)
    assert 0 <= low <= p <= high <= 1


def test_the_interval_over_seeds_is_students():
    mean, low, high = seed_interval([0.2, 0.4, 0.6])
    assert mean == pytest.approx(0.4) and high - mean == pytest.approx(mean - low, abs=1e-9) or low == 0
    assert seed_interval([0.5, 0.5])[1:] == (0.5, 0.5)
    for values, level in (([55., 60.], 0.95), ([0.5, 0.6], 95)):
        with pytest.raises(ValueError, match="must be a number in"):
            seed_interval(values, level=level)
    with pytest.raises(ValueError, match="two seeds"):
        seed_interval([0.5])


def test_masked_gradients_are_noticed(model, digits):
    class Rounded(nn.Module):
        def forward(self, images):
            return model((images * 4).round() / 4)

    class Noisy(nn.Module):
        def forward(self, images):
            return model(images) + torch.randn(len(images), 10)

    labels = model(digits.images).argmax(1)
    assert masking_warnings(model, digits.images, labels) == []
    assert any("exactly zero" in w for w in masking_warnings(Rounded(), digits.images, labels))
    assert any("asked twice" in w for w in masking_warnings(Noisy(), digits.images, labels))


@pytest.mark.parametrize("change, message", [
    (dict(images=lambda x: x * 255), "divide by 255"), (dict(labels=lambda y: y + 10), "below 10"), (dict(labels=lambda y: y.float()), "whole numbers"),
    (dict(images=lambda x: x[:0]), "empty"), (dict(images=lambda x: x.expand(-1, 3, -1, -1)), "3 channels"), (dict(model=lambda m: nn.Sequential(m, nn.Softmax(1))), "softmax")])
def test_bad_input(change, message, model, digits):
    good = dict(model=model, images=digits.images, labels=digits.labels)
    for name, value in change.items():
        good[name] = value(good[name])
    for batch_size in (0, -1, 2.5):
        with pytest.raises(ValueError, match="batch_size must be a whole number"):
            accuracy(model, digits.images, digits.labels, batch_size=batch_size)
    with pytest.raises(ValueError) as error:
        accuracy(**good)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_attack_of_ones_own_may_take_gradients(model, digits):
    def mine(images, labels):
        points = images.clone().requires_grad_()
        nn.functional.cross_entropy(model(points), labels).backward()
        return (points + 0.1 * points.grad.sign()).clamp(0, 1)
    assert correct(model, digits.images, digits.labels, attack=mine).shape == digits.labels.shape


@pytest.mark.parametrize("attack, message", [(lambda x, y: x * torch.nan, "attacked images hold NaN"), (lambda x, y: x + 5, "must lie in"), (lambda x, y: x[:1], "of shape"), (lambda x, y: None, "tensor")],
                         ids=["NaN", "outside", "too few", "nothing"])
def test_what_no_attack_may_return_is_refused(attack, message, model, digits):
    with pytest.raises((TypeError, ValueError), match=message):
        correct(model, digits.images, digits.labels, attack=attack)


def test_looking_for_masked_gradients_leaves_the_network_alone():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    masking_warnings(network, torch.rand(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1]), steps=1)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items()) and network.training
    with pytest.raises(ValueError, match="255"):
        masking_warnings(network, torch.full((5, 1, 8, 8), 200.), torch.tensor([0, 1, 2, 0, 1]))


# --- filters that are thresholds ---------------------------------------------------------------------------------------

def test_a_filter_of_one_pixel_opens_at_its_threshold():
    layer = nn.Conv2d(1, 8, 4)
    with torch.no_grad():
        layer.weight.zero_()[:, 0, 1, 2] = torch.rand(8, generator=make_generator(0)) + 0.5
        layer.bias.copy_(-torch.rand(8, generator=make_generator(1)))
    found = pixel_thresholds(layer)
    assert found["single"].all() and torch.allclose(found["share"], torch.ones(8))
    for k, value in enumerate(found["threshold"]):
        below, above = (layer(torch.full((1, 1, 4, 4), value.item() + shift))[0, k].item() for shift in (-1e-3, 1e-3))
        assert below < 0 < above


def test_a_filter_that_waits_for_darkness_or_weighs_little_or_several_pixels_is_no_threshold():
    layer = nn.Conv2d(1, 4, 2)
    with torch.no_grad(): layer.weight.copy_(torch.tensor([[1., 0, 0, 0], [-1, 0, 0, 0], [0.05, 0, 0, 0], [0.8, 0.2, 0, 0]]).view(4, 1, 2, 2))
    assert pixel_thresholds(layer)["single"].tolist() == [True, False, False, False]
    assert pixel_thresholds(layer, share=0.7, strength=0)["single"].tolist() == [True, False, True, True]


@pytest.mark.parametrize("layer", [nn.Linear(2, 2), nn.Conv2d(1, 1, 2, bias=False), make_model("small", channels=1)])
def test_what_is_no_convolution_with_bias_is_refused(layer):
    with pytest.raises(TypeError, match="model.convolutions\\[0\\]"): pixel_thresholds(layer)


def test_thresholds_were_measured_under_the_attack_of_table_1():
    "From the image, the committed accuracies are those of Table 1's records."
    found = sorted((ROOT / "data/records").glob("*-thresholds200.json"))
    assert len(found) >= 25
    for path in found:
        cells = {cell["eps"]: cell["accuracy"] for cell in read_record(path)["metrics"]["cells"] if cell["begin"] == "image"}
        table = {cell["eps"]: cell["accuracy"] for cell in read_record(path.with_name(path.name.replace("thresholds200", "pgd200")))["metrics"]["cells"]}
        assert set(cells) == {0.3, 0.35} and all(abs(accuracy - table[eps]) <= 0.005 for eps, accuracy in cells.items()), path.name

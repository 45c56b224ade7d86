"""The networks and their folded forms: shapes, counts, and identities that must hold exactly."""
import pytest
import torch
import torch.nn.functional as F

from robustint.core import make_generator
from robustint.models import ARCHITECTURES, Folded, GapNetwork, convolve_same, evaluation_mode, fold, gradient_phases, make_model, same_padding

INPUTS = [("small", 1, 28), ("small", 3, 32), ("pool", 1, 28), ("pool", 3, 32), ("wresnet", 3, 32), ("wresnet", 3, 64)]


def network_and_images(architecture, channels, size, dtype=torch.float32):
    model = make_model(architecture, channels=channels, generator=make_generator(0)).to(dtype)
    for convolution in model.convolutions:  # biases start at zero, where a mistake in folding them would not show
        torch.nn.init.normal_(convolution.bias, std=0.1, generator=make_generator(1))
    return model, torch.rand(3, channels, size, size, generator=make_generator(2)).to(dtype)


@pytest.mark.parametrize("architecture, channels, count", [("small", 1, 166_396), ("wresnet", 3, 463_008)])
def test_parameter_counts_are_the_papers(architecture, channels, count):
    assert sum(p.numel() for p in make_model(architecture, channels=channels).parameters()) == count


def test_initial_weights_have_the_stated_spread():
    model = make_model("wresnet", channels=3, generator=make_generator(0))
    for convolution in model.convolutions:
        assert convolution.weight.std().item() * convolution.weight[0].numel() ** 0.5 == pytest.approx(1, abs=0.15)
        assert not convolution.bias.any()
    assert model.head.std().item() * 8 == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("architecture, channels, size", INPUTS)
def test_folding_changes_neither_logits_nor_maps(architecture, channels, size):
    model, images = network_and_images(architecture, channels, size)
    logits, cams = model.logits_and_cams(images)
    for folded in (fold(model), fold(model, frozen=True)):
        assert isinstance(folded, Folded)
        torch.testing.assert_close(folded(images), logits, atol=1e-4, rtol=1e-4)
        for ours, plain in zip(folded.logits_and_cams(images), (logits, cams)):
            torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(images), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture, channels, size", INPUTS[:5])
def test_folding_changes_no_gradient(architecture, channels, size):
    model, images = network_and_images(architecture, channels, size, torch.float64)
    images.requires_grad_()

    def gradients(network):
        logits, cams = network.logits_and_cams(images)
        loss = F.cross_entropy(network(images), torch.tensor([0, 1, 2])) + cams.abs().mean() + logits.square().mean()
        return torch.autograd.grad(loss, [images, *model.parameters()])

    for ours, plain in zip(gradients(fold(model)), gradients(model)):
        torch.testing.assert_close(ours, plain, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("channels, kernel", [(1, 4), (3, 4), (1, 2), (2, 6)])
def test_both_orders_of_summation_give_the_same_phases(monkeypatch, channels, kernel):
    grad = torch.randn(2, 5, 4, 6, generator=make_generator(0), dtype=torch.float64)
    weight = torch.randn(5, channels, kernel, kernel, generator=make_generator(1), dtype=torch.float64)
    convolved = gradient_phases(grad, weight)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    summed = gradient_phases(grad, weight)
    torch.testing.assert_close(summed, convolved, atol=1e-12, rtol=1e-12)
    assert not torch.equal(summed, convolved)  # another order, so other last bits: both forms have run


def test_a_fold_follows_the_weights_and_a_frozen_fold_does_not():
    model, images = network_and_images("small", 1, 28)
    live, frozen, before = fold(model), fold(model, frozen=True), model(images).detach()
    with torch.no_grad():
        model.head.mul_(2)
    torch.testing.assert_close(live(images), 2 * before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(frozen(images), before, atol=1e-4, rtol=1e-4)


def test_a_fold_takes_images_of_several_sizes():
    frozen = fold(make_model("wresnet", channels=3, generator=make_generator(0)), frozen=True)
    for size in (32, 64, 32):
        images = torch.rand(1, 3, size, size, generator=make_generator(size))
        torch.testing.assert_close(frozen(images), frozen.model(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_maps_are_complete(architecture):
    model, images = network_and_images(architecture, 3, 32)
    torch.testing.assert_close(fold(model).cams(images).mean((2, 3)), model(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stride, kernel, size", [(2, 4, 28), (2, 4, 32), (2, 2, 10), (2, 6, 12), (2, 3, 32), (1, 7, 7), (1, 5, 9), (2, 4, 27)])
def test_same_convolution_is_tensorflows(stride, kernel, size):
    generator = make_generator(0)
    x = torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, kernel, kernel, generator=generator, dtype=torch.float64, requires_grad=True)
    before, after = same_padding(size, kernel, stride)
    plain = F.conv2d(F.pad(x, (before, after, before, after)), weight, stride=stride)
    ours = convolve_same(x, weight, None, stride)
    assert ours.shape[-1] == -(-size // stride)
    torch.testing.assert_close(ours, plain)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (x, weight)) for y in (ours, plain))):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_evaluation_mode_restores_every_module_after_an_error():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval())
    with pytest.raises(RuntimeError), evaluation_mode(model):
        assert not model[0].training
        raise RuntimeError
    assert model[0].training and not model[1].training


def test_any_network_with_a_gap_head_can_be_folded():
    """A user's own architecture needs `trunk` and `tail`, and no `stem`."""

    class Own(GapNetwork):
        def __init__(self):
            super().__init__([(1, 6, 3, 1), (6, 9, 3, 1)], 9, 4)

        def trunk(self, images):
            return (self.convolve(0, images).relu(),)

        def tail(self):
            return (self.convolutions[1],)

    own, images = Own(), torch.rand(2, 1, 9, 9, generator=make_generator(0))
    torch.testing.assert_close(fold(own, frozen=True)(images), own(images), atol=1e-5, rtol=1e-5)


def test_a_network_that_folding_would_not_know_is_not_folded():
    "A forward of one's own, or a hook, would be passed by without a word."
    with pytest.raises(TypeError, match="Normed must not define forward.*beginning of stem"):
        type("Normed", (ARCHITECTURES["small"],), {"forward": lambda self, images: super().forward(images - 0.5)})
    with pytest.raises(TypeError, match="Normed defines trunk.*write stem = Small.stem"): # written for images, it would be given the stem's output
        type("Normed", (ARCHITECTURES["small"],), {"trunk": lambda self, images: super().trunk(images - 0.5)})
    model, images = network_and_images("small", 1, 28)
    model.register_forward_hook(lambda module, given, logits: -logits)
    assert fold(model, frozen=True) is model and torch.equal(fold(model)(images), model(images))

"""Interpreters against Captum, against closed forms and finite differences; and that they leave a network as they found it."""
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import one_line
from torch import nn

from robustint.attributions import INTERPRETERS, ReplacedReLU, WithIntegratedGradients, class_maps, gradient, guided_backprop, integrated_gradients, smoothgrad
from robustint.core import make_generator
from robustint.discrepancy import proposition1_bound, soft_discrepancy, two_class_discrepancy
from robustint.interpreters import cam, cams, features_and_slopes, gradcam, gradcampp, gradcampp_shortcut, recording, rectify_head, with_head
from robustint.models import GapNetwork, Pool, Small, WResnet, fold
from robustint.objectives import METHODS, make_method
from robustint.visualisation import coarse_share, visualise

CAM_FAMILY = ("cam", "gradcam", "gradcampp", "gradcampp_shortcut")
EVERY = pytest.mark.parametrize("name", INTERPRETERS)
TARGET = torch.tensor([0, 2, 1, 2])


def pictures(*shape, seed=0, dtype=torch.float64):
    return torch.rand(shape, generator=make_generator(seed), dtype=dtype)


def seeded(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


class Residual(nn.Module):
    "ReLUs as a layer, as a function and as a method, in place and not; batch statistics and dropout; a GAP head with a bias."

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.second, self.last, self.dropout, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 5, 3), nn.Dropout(), nn.Linear(5, 3)

    def forward(self, x):
        x = self.relu(self.norm(self.first(x)))
        x = F.relu(self.second(x).relu() + x, inplace=True)
        return self.head(self.dropout(F.max_pool2d(self.last(x).relu_(), 2).mean((2, 3))))


def vgg():
    "Torch's own layers alone, as Captum's guided backpropagation needs them; no GAP head."
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(24, 3))


class Tiny(GapNetwork):
    "A network with a GAP head that is small enough for finite differences."

    def __init__(self): super().__init__([(1, 2, 2, 1), (2, 3, 2, 1)], 3, 3, make_generator(0))
    def trunk(self, images): return (self.convolve(0, images).relu(),)
    def tail(self): return (self.convolutions[1],)


# --- Captum has the same methods -----------------------------------------------------------------------------------------

NETWORKS = {"vgg": (vgg, 3, 10), "residual": (Residual, 3, 8), "small": (lambda: Small(classes=3, generator=make_generator(0)), 1, 28),
            "wresnet": (lambda: WResnet(classes=3, generator=make_generator(0)), 3, 8)}


@pytest.fixture(params=NETWORKS)
def pair(request):
    "A network in evaluation mode and images for it."
    build, channels, side = NETWORKS[request.param]
    network, images = seeded(build).double().eval(), pictures(4, channels, side, side)
    seeded(lambda: [module.reset_running_stats() for module in network.modules() if isinstance(module, nn.BatchNorm2d)])
    return network, images


@pytest.fixture(scope="module")
def captum():
    return pytest.importorskip("captum.attr", reason="captum is not installed")


def agree(ours, theirs):
    assert ours.shape == theirs.shape and theirs.abs().max() > 1e-4
    assert (ours - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max().item())


def test_gradient_is_captums_saliency(captum, pair):
    network, images = pair
    agree(gradient(network, images, TARGET), captum.Saliency(network).attribute(images.clone().requires_grad_(), TARGET, abs=False))


@pytest.mark.parametrize("place, method", [("right", "riemann_right"), ("middle", "riemann_middle")])
@pytest.mark.parametrize("baseline", [0.0, 0.4])
def test_integrated_gradients_are_captums(captum, pair, place, method, baseline):
    network, images = pair
    theirs = captum.IntegratedGradients(network).attribute(images, baseline, TARGET, n_steps=12, method=method)
    agree(integrated_gradients(network, images, TARGET, steps=12, place=place, baseline=baseline), theirs)


@pytest.mark.filterwarnings("ignore:Setting backward hooks")
def test_guided_backprop_is_captums(captum):
    network, images = seeded(vgg).double().eval(), pictures(4, 3, 10, 10)
    agree(guided_backprop(network, images, TARGET), captum.GuidedBackprop(network).attribute(images.clone().requires_grad_(), TARGET))


def test_smoothgrad_is_captums_with_the_same_noise(captum, pair):
    "Captum draws from the global generator, one copy of the batch at a time if told so."
    network, images = (part.float() for part in pair)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        theirs = captum.NoiseTunnel(captum.Saliency(network)).attribute(images.clone(), nt_type="smoothgrad", nt_samples=9, nt_samples_batch_size=1, stdevs=0.2, target=TARGET, abs=False)
        torch.manual_seed(3)
        agree(smoothgrad(network, images, TARGET, samples=9, spread=0.2), theirs)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("layer", ["0", "1", "3", "4"])
def test_gradcam_is_captums_at_any_layer(captum, relu, layer):
    network, images = seeded(vgg).double().eval(), pictures(4, 3, 10, 10)
    theirs = captum.LayerGradCam(network, network.get_submodule(layer)).attribute(images, TARGET, relu_attributions=relu)
    agree(gradcam(network, images, TARGET, layer=layer, relu=relu), theirs[:, 0])


@pytest.mark.parametrize("build", [Small, Pool, WResnet])
def test_gradcam_without_a_layer_is_captums(captum, build):
    class Written(nn.Module):
        "The same network with its last features as the output of a layer."

        def __init__(self, network): super().__init__(); self.network, self.features, self.head = network, nn.Identity(), network.head
        def forward(self, x): return self.features(self.network.features(x)).mean((2, 3)) @ self.head.T

    network = build(classes=3, generator=make_generator(0)).double()
    written, images = Written(network), pictures(4, network.image_channels, 16, 16)
    agree(gradcam(network, images, TARGET, relu=False), captum.LayerGradCam(written, written.features).attribute(images, TARGET)[:, 0])


def test_cam_and_gradcam_on_a_network_of_torchvision(captum):
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    network, images, target = seeded(torchvision.models.resnet18).eval(), pictures(2, 3, 48, 48, dtype=torch.float32), torch.tensor([3, 999])
    with torch.no_grad():
        logits = network(images)[[0, 1], target]
    assert torch.allclose(cam(network, images, target, layer="layer4").sum((1, 2)), logits - network.fc.bias[target], atol=1e-4)
    theirs = captum.LayerGradCam(network, network.layer3).attribute(images, target, relu_attributions=True)
    agree(gradcam(network, images, target, layer="layer3"), theirs[:, 0])


# --- closed forms ----------------------------------------------------------------------------------------------------------

class Kinks(nn.Module):
    "relu(relu(x1) - 0.3 - relu(x2)), the example of the integrated gradients paper on a smaller scale; and its negative."

    def forward(self, x):
        first, second = x.flatten(1).unbind(1)
        f = torch.relu(torch.relu(first) - 0.3 - torch.relu(second))
        return torch.stack([f, -f], 1)


def test_the_example_of_the_integrated_gradients_paper():
    x = torch.tensor([[[[0.9, 0.3]]]], dtype=torch.float64)
    assert torch.allclose(integrated_gradients(Kinks(), x, 0, steps=2000, place="middle").flatten(), torch.tensor([0.45, -0.15], dtype=torch.float64), atol=1e-3)
    assert gradient(Kinks(), x, 1).flatten().tolist() == [-1, 1] and guided_backprop(Kinks(), x, 0).flatten().tolist() == [1, 0]


def test_quadratic_network_has_the_integral_of_a_line():
    "f = (w x)^2: the gradient grows linearly on the way from black, so the middle rule is exact and the right rule is off by 1 + 1/m."
    class Square(nn.Module):
        def forward(self, x): return torch.stack([(x.flatten(1) * torch.tensor([1.0, -2.0])).sum(1) ** 2, x.flatten(1).sum(1)], 1)

    x = torch.tensor([[[[0.8, 0.1]]]])
    exact = x * 0.6 * torch.tensor([1.0, -2.0])
    assert torch.allclose(integrated_gradients(Square(), x, 0, steps=3, place="middle"), exact, atol=1e-6)
    assert torch.allclose(integrated_gradients(Square(), x, 0, steps=4), exact * 1.25, atol=1e-6)


@pytest.mark.parametrize("baseline", [0.0, 1.0, torch.tensor([0.2, 0.5, 0.9]).view(3, 1, 1), "image"])
def test_integrated_gradients_are_complete(baseline):
    network, images = seeded(vgg).eval(), pictures(4, 3, 10, 10, dtype=torch.float32)
    baseline = images.flip(0) if isinstance(baseline, str) else baseline
    start = torch.zeros_like(images) + baseline
    with torch.no_grad():
        rise = (network(images) - network(start))[torch.arange(4), TARGET]
    gaps = [(integrated_gradients(network, images, TARGET, steps=m, baseline=baseline, place="middle").sum((1, 2, 3)) - rise).abs().max() for m in (10, 1000)]
    assert gaps[1] < 2e-4 and gaps[1] < gaps[0]


@pytest.mark.parametrize("build", [Small, Pool, WResnet])
def test_cam_is_complete_and_gradcam_is_its_positive_part(build):
    network = build(classes=3, generator=make_generator(0)).double()
    images = pictures(4, network.image_channels, 16, 16)
    logits = network(images).detach()
    assert torch.allclose(cams(network, images).sum((2, 3)), logits)
    assert torch.allclose(cam(fold(network), images, TARGET, divide_by_positions=False).mean((1, 2)), logits[torch.arange(4), TARGET])
    features, slopes = features_and_slopes(network, images, TARGET)
    assert torch.allclose(gradcam(network, images, TARGET), (slopes.mean((2, 3), keepdim=True) * features).sum(1).relu())
    assert torch.allclose(gradcampp_shortcut(network, images, TARGET), torch.einsum("nk,nkhw->nhw", network.head[TARGET].relu(), features) / features[0, 0].numel())


def test_gradcampp_from_the_derivatives_of_its_paper():
    "alpha from the second and third derivative of exp(f), each taken by autograd, position by position."
    network, images = seeded(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))).double(), pictures(1, 1, 4, 4)
    network[0].bias.data += 1
    features = network[:2](images).detach().requires_grad_()
    score = network[2:](features)[0, 1].exp()
    first, = torch.autograd.grad(score, features, create_graph=True)
    diagonal = lambda slopes: torch.stack([torch.autograd.grad(g, features, create_graph=True)[0].flatten()[i] for i, g in enumerate(slopes.flatten())]).view_as(features)
    second = diagonal(first)
    third = diagonal(second)
    alpha = second / (2 * second + features.sum((2, 3), keepdim=True) * third)
    expected = ((alpha * first.relu()).sum((2, 3), keepdim=True) * features).sum(1).relu() / score
    agree(gradcampp(network, images, 1, layer="1"), expected.detach())


def test_gradcampp_where_its_denominator_vanishes():
    "A feature that contributes exactly -2 to the logit: no division by zero."
    network = Tiny().double()
    with torch.no_grad():
        features, slopes = features_and_slopes(network, pictures(1, 1, 6, 6), 0)
        sums = (features.sum((2, 3)) * slopes[:, :, 0, 0])[0]
        network.head[0] *= -2 / sums[0]
    assert torch.isfinite(gradcampp(network, pictures(1, 1, 6, 6), 0)).all()


def test_softplus_is_the_network_with_softplus_layers(captum):
    def soft(module): return nn.Softplus() if isinstance(module, nn.ReLU) else module

    network, images = seeded(vgg).double().eval(), pictures(4, 3, 10, 10)
    smooth = nn.Sequential(*map(soft, network))
    theirs = captum.IntegratedGradients(smooth).attribute(images, 0.0, TARGET, n_steps=20, method="riemann_right")
    agree(integrated_gradients(network, images, TARGET, steps=20, softplus=True), theirs)
    x = images.clone().requires_grad_()
    maps = integrated_gradients(network, x, TARGET, steps=20, softplus=True, differentiable=True)
    assert torch.autograd.grad(maps.square().sum(), x)[0].abs().max() > 0


# --- differentiable in the weights and in the images -------------------------------------------------------------------------

def options(name, network):
    more = {"smoothgrad": {"samples": 3, "generator": make_generator(0)}, "integrated_gradients": {"steps": 3}}.get(name, {})
    return {**more, **({"layer": "2"} if name in CAM_FAMILY and isinstance(network, nn.Sequential) else {})}


def finite_difference(value, tensor, step=1e-6):
    slopes = torch.zeros_like(tensor)
    with torch.no_grad():
        for i in range(tensor.numel()):
            ends = []
            for sign in (1, -1):
                tensor.view(-1)[i] += sign * step
                ends.append(value())
                tensor.view(-1)[i] -= sign * step
            slopes.view(-1)[i] = (ends[0] - ends[1]) / (2 * step)
    return slopes


SMALL_NETWORKS = {"gap": Tiny, "plain": lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Conv2d(2, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))}


@EVERY
@pytest.mark.parametrize("build", SMALL_NETWORKS.values(), ids=SMALL_NETWORKS)
def test_maps_are_differentiable_in_weights_and_images(name, build):
    "Against finite differences in double precision, for each weight and each pixel."
    network, images, target = seeded(build).double(), 0.1 + 0.8 * pictures(2, 1, 5, 5), torch.tensor([0, 2])
    interpreter = partial(INTERPRETERS[name], relu=False) if name in ("gradcam", "gradcampp") else INTERPRETERS[name]
    for weight in network.parameters(): weight.data += 0.2  # no ReLU is dead
    weighed = lambda maps: (maps * torch.linspace(-1, 2, maps.numel(), dtype=maps.dtype).view_as(maps).sin()).sum()
    images.requires_grad_()
    loss = weighed(interpreter(network, images, target, differentiable=True, **options(name, network)))
    found = torch.autograd.grad(loss, [*network.parameters(), images], allow_unused=True)
    value = lambda: weighed(interpreter(network, images.detach(), target, **options(name, network)))
    assert torch.isclose(value(), loss.detach())
    assert max(slopes.abs().max() for slopes in found if slopes is not None) > 1e-3
    for tensor, slopes in zip([*network.parameters(), images], found):
        assert torch.allclose(torch.zeros_like(tensor) if slopes is None else slopes, finite_difference(value, tensor.data), atol=1e-6, rtol=1e-4)


@EVERY
def test_maps_carry_no_graph_unless_asked(name):
    network, images = Tiny().double(), pictures(2, 1, 5, 5).requires_grad_()
    plain = INTERPRETERS[name](network, images, 1, **options(name, network))
    kept = INTERPRETERS[name](network, images, 1, differentiable=True, **options(name, network))
    with torch.no_grad():
        blind = INTERPRETERS[name](network, images, 1, differentiable=True, **options(name, network))
    assert kept.requires_grad and not plain.requires_grad and not blind.requires_grad and torch.allclose(plain, kept) and torch.allclose(plain, blind)
    assert images.grad is None and all(weight.grad is None for weight in network.parameters())


@EVERY
def test_frozen_networks_give_the_same_maps_and_gradients_of_images(name):
    network, images = Tiny().double(), pictures(2, 1, 5, 5).requires_grad_()
    maps = [INTERPRETERS[name](n, images, 1, differentiable=True, **options(name, network)) for n in (network, fold(network), fold(network, frozen=True))]
    slopes = [torch.autograd.grad(m.square().sum(), images, allow_unused=True)[0] for m in maps]
    assert all(torch.allclose(m, maps[0]) for m in maps) and all(s is None and slopes[0] is None or torch.allclose(s, slopes[0]) for s in slopes)


# --- groups of points ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("batch_size", [1, 4, 7, 13, 1000, None])
@pytest.mark.parametrize("name", ["smoothgrad", "integrated_gradients"])
def test_groups_give_what_one_batch_gives(name, batch_size):
    network, images = seeded(vgg).double().eval(), pictures(4, 3, 10, 10)
    largest = []
    network.register_forward_pre_hook(lambda module, given: largest.append(len(given[0])))
    run = {"smoothgrad": lambda b: smoothgrad(network, images, TARGET, samples=6, generator=make_generator(0), batch_size=b),
           "integrated_gradients": lambda b: integrated_gradients(network, images, TARGET, steps=6, batch_size=b)}[name]
    maps = run(batch_size)
    assert max(largest) == min(24, max(4, (batch_size or 24) // 4 * 4)) and sum(largest) == 24
    assert torch.allclose(maps, run(24), atol=1e-12)


def test_the_default_group_is_bounded_for_large_images():
    class Wide(nn.Module):
        def forward(self, x): seen.append(len(x)); return x.mean((2, 3))

    seen = []
    integrated_gradients(Wide(), torch.rand(2, 3, 256, 256, generator=make_generator(0)), 0, steps=8)
    assert sum(seen) == 16 and max(seen) * 3 * 256 ** 2 <= 2 ** 21


# --- nothing is left behind --------------------------------------------------------------------------------------------------------

def traces(network):
    "Hooks, modes, buffers and gradients of a network."
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [(len([h for kind in kinds for h in getattr(module, kind)]), module.training) for module in network.modules()], \
        {key: value.clone() for key, value in network.state_dict().items()}, [weight.grad for weight in network.parameters()], [weight.requires_grad for weight in network.parameters()]


def same(before, after):
    assert before[0] == after[0] and before[2:] == after[2:]
    assert before[1].keys() == after[1].keys() and all(torch.equal(before[1][key], after[1][key]) for key in before[1])


@EVERY
def test_a_network_is_left_as_it_was_found(name):
    "Dropout and batch statistics included: the network stands in training mode, one part of it in evaluation mode."
    network, images = seeded(Residual).train(), pictures(4, 3, 8, 8, dtype=torch.float32)
    network.norm.eval()
    network.last.weight.requires_grad_(False)
    network.first.register_forward_hook(lambda *given: None)  # a hook of somebody else
    before = traces(network)
    more = {"layer": "last"} if name in CAM_FAMILY[1:] else {"layer": "dropout"} if name in CAM_FAMILY else {}
    call = lambda target, **kept: INTERPRETERS[name](network, images, target, **more, **kept)
    if name == "cam":
        with pytest.raises(ValueError, match="no maps"): call(TARGET)
    else:
        call(TARGET)
        assert call(TARGET, differentiable=True).requires_grad
    same(before, traces(network))
    with pytest.raises(ValueError): call(torch.tensor([0, 1, 2, 3]))
    network.head.forward = broken
    with pytest.raises((RuntimeError, ValueError)): call(TARGET)
    same(before, traces(network))
    assert torch.equal(torch.tensor([-1.0, 1.0]).relu(), torch.tensor([0.0, 1.0])) and torch.equal(F.relu(torch.tensor([-1.0])), torch.zeros(1))


def broken(*given):
    raise RuntimeError("out of order")


def test_recording_takes_its_hook_off_whatever_happens():
    network = seeded(vgg)
    with pytest.raises(KeyError), recording(network, "3") as outputs:
        network(torch.rand(1, 3, 10, 10))
        assert outputs[0].shape == (1, 6, 2, 2)
        raise KeyError
    assert traces(network)[0] == traces(seeded(vgg))[0]


def test_recording_does_not_touch_images_that_a_layer_passes_through():
    network, images = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4, 2)), pictures(1, 1, 2, 2, dtype=torch.float32)
    for weight in network.parameters(): weight.requires_grad_(False)
    kept = images.clone()
    gradcam(network, images, 0, layer="0")
    assert not images.requires_grad and torch.equal(images, kept)


def test_another_head_leaves_the_network_alone():
    network, images = Small(generator=make_generator(0)), pictures(2, 1, 28, 28, dtype=torch.float32)
    before = traces(network)
    for form in (network, fold(network), fold(network, frozen=True)):
        rectified, picked = rectify_head(form), with_head(form, torch.eye(100)[7:8])
        assert torch.allclose(rectified(images), network.features(images).mean((2, 3)) @ network.head.relu().T, atol=1e-5)
        assert torch.allclose(picked(images)[:, 0], network.features(images)[:, 7].mean((1, 2)), atol=1e-5)
        assert torch.allclose(cams(picked, images)[:, 0].sum((1, 2)), picked(images)[:, 0], atol=1e-5)
    same(before, traces(network))
    assert all(slopes.abs().max() > 0 for slopes in torch.autograd.grad(rectify_head(network)(images).square().sum(), list(network.parameters())))


def test_a_mode_within_a_mode_and_other_functions():
    with ReplacedReLU(torch.neg) as outer, ReplacedReLU(torch.abs) as inner:
        assert torch.equal(torch.relu(torch.tensor([-2.0])), torch.tensor([2.0])) and torch.equal(torch.tensor([-2.0]).clamp(min=0), torch.zeros(1))
    assert (outer.count, inner.count) == (0, 1)


def test_guided_backprop_sees_every_way_to_call_a_relu():
    network, images = seeded(Residual).double().eval(), pictures(4, 3, 8, 8)
    with ReplacedReLU(torch.relu) as seen: network(images)
    assert seen.count == 4
    assert guided_backprop(network, images, TARGET).abs().max() > 0 and not torch.allclose(guided_backprop(network, images, TARGET), gradient(network, images, TARGET))


# --- at the door ---------------------------------------------------------------------------------------------------------------

@EVERY
@pytest.mark.parametrize("change, match", [
    (dict(images=lambda x: x * 255), "divide by 255"), (dict(images=lambda x: x[:0]), "empty"), (dict(images=lambda x: x / 0), "NaN"), (dict(images=lambda x: x[0]), r"\(N,C,H,W\)"),
    (dict(images=lambda x: x[:, :1].expand(-1, 3, -1, -1)), "3 channels"), (dict(target=torch.tensor([0, 1])), "as many"), (dict(target=torch.tensor([0, 1, 2, 10])), "below 10"),
    (dict(target=10), "below 10"), (dict(target=-1), "0 or more"), (dict(target=torch.tensor([0.0, 1, 2, 3])), "whole numbers"), (dict(target=None), "torch tensor"), (dict(target=[0, 1, 2, 3]), "torch tensor")])
def test_bad_input_is_refused_in_one_line(name, change, match):
    network, images = Small(), pictures(4, 1, 28, 28, dtype=torch.float32)
    with pytest.raises((ValueError, TypeError), match=match) as error:
        INTERPRETERS[name](network, change.get("images", lambda x: x)(images), change.get("target", torch.arange(4)))
    one_line(error)


@EVERY
def test_the_target_is_mandatory_and_probabilities_are_refused(name):
    network, images = seeded(vgg), pictures(4, 3, 10, 10, dtype=torch.float32)
    with pytest.raises(TypeError): INTERPRETERS[name](network, images)
    more = {"layer": "0.3"} if name in CAM_FAMILY else {}
    with pytest.raises(ValueError, match="softmax") as error: INTERPRETERS[name](nn.Sequential(network, nn.Softmax(1)), images, TARGET, **more)
    one_line(error)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_scripted_network_hides_its_relus_and_that_is_said():
    network, images = torch.jit.script(seeded(vgg).eval()), pictures(4, 3, 10, 10, dtype=torch.float32)
    with pytest.raises(ValueError, match="no ReLU ran"): guided_backprop(network, images, TARGET)
    with pytest.raises(ValueError, match="no ReLU ran"): integrated_gradients(network, images, TARGET, softplus=True)
    assert torch.allclose(gradient(network, images, TARGET), gradient(seeded(vgg), images, TARGET), atol=1e-6)


def test_layers_that_cannot_be_explained():
    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.conv, self.side = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)
        def forward(self, x): self.side(x); return self.conv(self.conv(x)).flatten(1)

    network, images = Twice(), pictures(2, 1, 2, 2, dtype=torch.float32)
    for layer, match in (("conv", "ran 2 times"), ("side", "do not depend"), ("conf", "no layer 'conf'")):
        for interpreter in (cam, gradcam, gradcampp, gradcampp_shortcut):
            with pytest.raises(ValueError, match=match) as error: interpreter(network, images, 0, layer=layer)
            one_line(error)
    with pytest.raises(ValueError, match="use gradcam"): cam(seeded(vgg), pictures(4, 3, 10, 10, dtype=torch.float32), TARGET, layer="4")


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_shape_follow_the_images(name, dtype):
    network, images = Small().to(dtype), pictures(3, 1, 28, 28, dtype=dtype)
    maps = INTERPRETERS[name](network, images, 2)
    assert maps.dtype == dtype and maps.shape == ((3, 7, 7) if name in CAM_FAMILY else images.shape)
    assert class_maps(INTERPRETERS[name], network, images, torch.tensor([[0, 1]] * 3)).shape == (3, 2, *maps.shape[-2:])


# --- Int without CAM ----------------------------------------------------------------------------------------------------------

def test_int_trains_on_integrated_gradients():
    "The terms of Int, fed with integrated gradients: zero without a perturbation, the paper's scale, a climb that climbs, slopes equal to finite differences."
    network, images, labels = Tiny().double(), 0.1 + 0.8 * pictures(3, 1, 5, 5), torch.arange(3)
    perturbed, seen = (images + 0.1 * pictures(3, 1, 5, 5, seed=1) - 0.05).clamp(0, 1), WithIntegratedGradients(network, steps=4)
    method = make_method("int", gamma=0.98, normalisation="paper")
    clean = F.cross_entropy(network(images), labels, reduction="none")
    assert torch.allclose(method.loss(seen, images, images.clone(), labels), clean)
    maps = [class_maps(integrated_gradients, network, x, torch.arange(3).expand(3, -1), steps=4) for x in (images, perturbed)]
    assert torch.allclose(method.loss(seen, images, perturbed, labels), clean + 0.98 * soft_discrepancy(*maps, network(perturbed), labels))
    x = perturbed.clone().requires_grad_()
    climb = method.climb(WithIntegratedGradients(fold(network, frozen=True), steps=4), images, labels)
    slopes, = torch.autograd.grad(climb(x).sum(), x)
    assert torch.allclose(slopes, finite_difference(lambda: climb(x.detach()).sum(), x.data), atol=1e-5)
    value = lambda: method.loss(seen, images, perturbed, labels).sum()
    found = torch.autograd.grad(value(), list(network.parameters()), allow_unused=True)
    for weight, slopes in zip(network.parameters(), found):
        assert torch.allclose(torch.zeros_like(weight) if slopes is None else slopes, finite_difference(value, weight.data), atol=1e-5)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if name.startswith("int")])
def test_every_int_method_accepts_integrated_gradients(name):
    network, images, labels = WithIntegratedGradients(Tiny()), pictures(3, 1, 5, 5, dtype=torch.float32), torch.arange(3)
    losses = make_method(name).loss(network, images, images.flip(0), labels)
    assert losses.shape == (3,) and torch.isfinite(losses).all()


def test_proposition_1_holds_for_integrated_gradients():
    "Smooth network, many steps: no pair of images of which one is taken for another class comes below the bound."
    network = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(9, 12), nn.Softplus(beta=5), nn.Linear(12, 3))).double()
    first, second = pictures(2, 400, 1, 3, 3)
    with torch.no_grad(): logits, others = network(first), network(second)
    labels, targets = logits.argmax(1), others.argmax(1)
    moved = labels != targets
    assert moved.sum() > 20
    maps = [class_maps(integrated_gradients, network, x[moved], torch.arange(3).expand(int(moved.sum()), -1), steps=300, place="middle") for x in (first, second)]
    bound = proposition1_bound(logits[moved], labels[moved], targets[moved])
    assert (two_class_discrepancy(*maps, labels[moved], targets[moved]) >= bound - 1e-5).all() and (bound > 0).all()


# --- visualisation ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("eps", [None, 2.0])
def test_visualisation_raises_its_neuron_and_stays_in_range(eps):
    network, seeds = Small(generator=make_generator(0)), pictures(3, 1, 28, 28, dtype=torch.float32)
    before = traces(network)
    grown = visualise(network, seeds, 5, steps=10, eps=eps)
    value = lambda x: network.features(x)[:, 5].mean((1, 2))
    assert (value(grown) > value(seeds)).all() and grown.min() >= 0 and grown.max() <= 1 and not grown.requires_grad
    assert eps is None or (grown - seeds).flatten(1).norm(dim=1).max() <= eps + 1e-5
    assert ((coarse_share(seeds, grown) >= 0) & (coarse_share(seeds, grown) <= 1)).all()
    same(before, traces(network))


def test_visualisation_of_a_layer_is_that_of_the_same_neuron():
    class Written(nn.Module):
        def __init__(self, network): super().__init__(); self.network, self.maps = network, nn.Identity()
        def forward(self, x): return self.maps(self.network.features(x)).mean((2, 3)) @ self.network.head.T

    network, seeds = Small(generator=make_generator(0)).double(), pictures(2, 1, 28, 28)
    assert torch.allclose(visualise(network, seeds, 5, steps=5), visualise(Written(network), seeds, 5, layer="maps", steps=5), atol=1e-8)

"""A neuron is raised within the pixel range, the network is left alone, and the coarse share tells strokes from texture."""
import pytest
import torch
from conftest import one_line

from robustint.models import Pool, Small, WResnet
from robustint.visualisation import coarse_share, neuron_objective, visualise


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def some_images(n=3, shape=(3, 32, 32)):
    return torch.rand(n, *shape, generator=seeded(1))


NETWORKS = [(Small, dict(channels=3)), (Pool, dict()), (WResnet, dict())]
every_network = pytest.mark.parametrize("network, options", NETWORKS, ids=[network.__name__ for network, _ in NETWORKS])


@every_network
def test_the_neuron_is_the_mean_of_its_feature_map(network, options):
    model = network(generator=seeded(), **options)
    images = some_images(shape=(model.image_channels, 28, 28) if network is Pool else (3, 32, 32))
    for neuron in (0, 3, model.head.shape[1] - 1):
        assert torch.allclose(neuron_objective(model, neuron)(images), model.features(images)[:, neuron].mean((1, 2)), atol=1e-4)


def test_the_ascent_raises_the_neuron_and_leaves_the_network_as_it_was():
    model, images = Small(channels=3, generator=seeded()), some_images()
    before = images.clone()
    grown = visualise(model, images, 3, steps=10)
    value = neuron_objective(model, 3)
    assert (value(grown) > value(images)).all() and 0 <= grown.min() and grown.max() <= 1
    assert torch.equal(images, before) and model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters()) and not any(m._forward_hooks for m in model.modules())


def test_images_grow_each_on_its_own():
    model, images = Small(channels=3, generator=seeded()), some_images()
    together, alone = visualise(model, images, 3, steps=5), torch.cat([visualise(model, image[None], 3, steps=5) for image in images])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("steps, step_size, eps, longest", [(3, 0.2, None, 0.6), (50, 0.5, 1, 1.0), (0, 0.5, None, 0.0)])
def test_the_change_is_no_longer_than_the_steps_or_the_radius(steps, step_size, eps, longest):
    images = some_images()
    grown = visualise(Small(channels=3, generator=seeded()), images, 3, steps=steps, step_size=step_size, eps=eps)
    assert (grown - images).flatten(1).norm(dim=1).max() <= longest + 1e-5


@pytest.mark.parametrize("side", [2, 4, 8])
def test_coarse_share_of_noise_of_a_constant_and_of_a_chessboard(side):
    seeds, noise = torch.zeros(8, 3, 64, 64), torch.randn(8, 3, 64, 64, generator=seeded())
    chess = ((torch.arange(64)[:, None] + torch.arange(64)) % 2 * 2.0 - 1).expand(1, 3, 64, 64)
    assert coarse_share(seeds, noise, side=side).mean() == pytest.approx(1 / side ** 2, rel=0.1)
    assert torch.allclose(coarse_share(seeds, seeds + 0.3, side=side), torch.ones(8))
    assert coarse_share(seeds[:1], chess, side=side) == 0
    blocks = noise[:, :, ::side, ::side].repeat_interleave(side, 2).repeat_interleave(side, 3)
    assert torch.allclose(coarse_share(seeds, blocks, side=side), torch.ones(8), atol=1e-5)


def test_coarse_share_knows_no_scale_and_no_seed():
    change, seeds = torch.randn(4, 1, 16, 16, generator=seeded()).double(), torch.rand(4, 1, 16, 16, generator=seeded(1)).double()
    assert torch.allclose(coarse_share(seeds, seeds + change), coarse_share(0 * seeds, 7 * change))


def test_nothing_changed_is_no_share():
    assert coarse_share(some_images(), some_images()).isnan().all()


@pytest.mark.parametrize("arguments, match", [(dict(neuron=100), "from 0 to 99"), (dict(neuron=-1), "from 0 to 99"), (dict(images=255 * some_images()), "divide by 255"),
                                              (dict(step_size="long"), "step_size must be a number"), (dict(images=some_images(shape=(1, 32, 32))), "channel")])
def test_bad_input_is_refused_in_one_line(arguments, match):
    given = dict(images=some_images(), neuron=3) | arguments
    with pytest.raises(ValueError, match=match) as error:
        visualise(Small(channels=3, generator=seeded()), given.pop("images"), given.pop("neuron"), **given)
    one_line(error)


def test_a_radius_around_the_seed_is_not_negative():
    with pytest.raises(ValueError, match="cannot be negative"):
        visualise(Small(1), some_images(shape=(1, 28, 28)), 3, eps=-1., steps=1)

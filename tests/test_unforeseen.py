"""Unforeseen attacks keep their budgets in their own units, on any image; the JPEG inside them is checked against three others."""
import io

import numpy
import pytest
import torch
import torch.nn.functional as F
from conftest import one_line
from torch import nn

from robustint.data import evaluation_indices
from robustint.jpeg import dct_basis, decode, encode, jpeg, plane_sizes, quantisation_tables, split_blocks, split_planes
from robustint.models import Small
from robustint.pgd import ascend, label_objective
from robustint.unforeseen import ATTACKS, UNITS, Flakes, FreeFlakes, unforeseen
from robustint.zoo import load_model

every_attack = pytest.mark.parametrize("attack", ATTACKS)
LABELS = torch.tensor([1, 2])
SHAPES = [(1, 28, 28), (3, 32, 32), (3, 17, 23), (1, 5, 9), (3, 33, 8), (1, 1, 1)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def some_images(shape=(3, 32, 32), n=2, dtype=torch.float32, low=0.0, high=1.0):
    return (low + (high - low) * torch.rand(n, *shape, generator=seeded())).to(dtype)


def any_size(channels, dtype=torch.float32):
    "A small network that takes images of any size."
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).to(dtype)


def climb(attack, images, eps, steps=4, seed=0):
    "The corruption of an attack and the variables it ends with."
    corrupt = ATTACKS[attack].corruption(images, eps, seeded(seed))
    start = corrupt.ball.random_start(corrupt.centre, seeded(seed))
    objective = label_objective(any_size(images.shape[1], images.dtype), LABELS[:len(images)])
    return corrupt, ascend(lambda v: objective(corrupt(v)), corrupt.centre, corrupt.ball, steps=steps, step_size=eps / steps ** 0.5, start=start)


# --- budgets -----------------------------------------------------------------------------------------------------------

def test_table_2_has_these_budgets_in_these_units():
    assert {name: attack.budget for name, attack in ATTACKS.items()} == {"gabor": 400, "snow": 2, "jpeg_linf": 0.25, "jpeg_l2": 8, "jpeg_l1": 256, "fog": 2048, "snow_free": 2}
    assert UNITS == {"Gabor": 1 / 255, "Snow": 1, "Fog": 1 / 255, "JPEG": 0.5}


@pytest.mark.parametrize("eps", [3, 40])
def test_gabor_adds_at_most_eps_levels(eps):
    images = some_images(low=0.2, high=0.6)
    added = 255 * (unforeseen(any_size(3), images, LABELS, "gabor", eps=eps, steps=4, generator=seeded()) - images)
    assert added.min() >= -1e-4 and added.max() == pytest.approx(eps, rel=1e-4)
    assert torch.allclose(added, added[:, :1].expand_as(added), atol=1e-4), "the noise is grey"


def test_gabor_moves_a_sparse_set_of_positions():
    corrupt, amplitudes = climb("gabor", some_images((3, 64, 64)), 40.)
    assert amplitudes.abs().max() <= 1 and 0.05 < (amplitudes != 0).double().mean() < 0.1  # one in 14 is 0.071
    assert ((amplitudes != 0) <= (corrupt.ball.kept != 0)).all()


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 70, 45)])
def test_snow_keeps_a_fifth_of_its_flakes_in_each_block(shape):
    corrupt, flakes = climb("snow", some_images(shape), 2.)
    assert flakes.shape == (2, 7, -(-shape[1] // 4), -(-shape[2] // 4)) and 0 <= flakes.min() and flakes.max() <= 1
    assert F.avg_pool2d(flakes, 8, ceil_mode=True).max() <= 0.2 + 1e-6
    assert torch.equal(corrupt.ball.projection(corrupt.centre)(torch.zeros(2, 7, 8, 8)), torch.full((2, 7, 8, 8), 1e-9))


def test_published_snow_leaves_its_budget_by_one_step_and_no_more():
    images, size = some_images(), 2 / 4 ** 0.5 / 10
    corrupt = ATTACKS["snow_free"].corruption(images, 2.0, seeded())
    objective, start = label_objective(any_size(3), LABELS), corrupt.ball.random_start(corrupt.centre, seeded())
    flakes = ascend(lambda v: objective(corrupt(v)), corrupt.centre, corrupt.ball, steps=4, step_size=size, start=start)
    means = F.avg_pool2d(flakes, 8, ceil_mode=True)
    assert means.max() > 0.2 + 1e-3 and means.max() <= 0.2 + size + 1e-6
    assert -size <= flakes.min() and flakes.max() <= 1 + size


def test_published_snow_is_snow_brought_back_one_step_later():
    "While no flake is below zero, both go through the same points: snow's are those of the other, brought back."
    images, size = some_images(), 1e-3
    free, bound = (ATTACKS[name].corruption(images, 2.0, seeded()) for name in ("snow_free", "snow"))
    gradients = torch.randn(3, *free.centre.shape, generator=seeded(5))
    start = bound.ball.random_start(bound.centre, seeded()) + 0.01
    a = b = bound.ball.projection(start)(start)
    for gradient in gradients:
        a, b = FreeFlakes().step(a, gradient, size), bound.ball.projection(b)(bound.ball.step(b, gradient, size))
        assert torch.allclose(bound.ball.projection(a)(a), b, atol=1e-6)


def test_snow_is_as_bright_as_its_budget():
    images = some_images(low=0.1, high=0.3)
    corrupt = ATTACKS["snow"].corruption(images, 0.001, seeded())
    flakes = corrupt.ball.random_start(corrupt.centre, seeded())
    once, nothing = corrupt(flakes), corrupt(torch.zeros_like(flakes))
    twice = ATTACKS["snow"].corruption(images, 0.002, seeded())(flakes)
    assert torch.allclose(twice - nothing, 2 * (once - nothing), atol=1e-6) and (once >= nothing).all() and (once > nothing).any()


def test_fog_follows_its_formula():
    images = some_images(low=0.1, high=0.9)
    corrupt, heights = climb("fog", images, 100.)
    assert 0 <= heights.min() and heights.max() <= 1
    brightest, thickness = images.amax((2, 3), keepdim=True), 100 / 255
    fog = (corrupt(heights) * (brightest + thickness) - images) / thickness
    assert fog.min() >= -1e-5 and fog.max() <= 1 + 1e-5 and torch.allclose(fog, fog[:, :1].expand_as(fog), atol=1e-5)


@pytest.mark.parametrize("attack, eps, norm", [("jpeg_linf", 0.25, float("inf")), ("jpeg_l2", 8, 2), ("jpeg_l1", 64, 1)])
@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 32, 48), (1, 31, 20)])
def test_jpeg_moves_the_coefficients_by_half_its_budget(attack, eps, norm, shape):
    images = some_images(shape, low=0.35, high=0.65).double()
    images = decode(encode(images), shape)  # without the colours that any JPEG loses
    corrupt, variables = climb(attack, images, eps)
    with torch.no_grad():
        attacked = corrupt(variables)
    assert attacked.min() > 0 and attacked.max() < 1, "a pixel was cut off: choose other images for this test"
    assert torch.linalg.vector_norm(variables, norm, dim=1).max() <= eps * (1 + 1e-6) and variables.abs().max() <= 2
    if shape[1] % 16 == 0:  # else the border that is cut away holds a part
        moved = encode(attacked) - encode(images)
        assert torch.allclose(moved, variables / 2, atol=1e-6)


@every_attack
def test_no_budget_returns_the_images(attack):
    images = some_images()
    same = unforeseen(any_size(3), images, LABELS, attack, eps=0, steps=5)
    assert torch.equal(same, images) and same is not images


# --- any image ---------------------------------------------------------------------------------------------------------

@every_attack
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_grey_and_colour_images_of_any_size(attack, shape):
    images = some_images(shape)
    attacked = unforeseen(any_size(shape[0]), images, LABELS, attack, steps=2, generator=seeded())
    assert attacked.shape == images.shape and torch.isfinite(attacked).all() and 0 <= attacked.min() and attacked.max() <= 1


@every_attack
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_type_follows_the_images(attack, dtype):
    images = some_images(dtype=dtype)
    assert unforeseen(any_size(3, dtype), images, LABELS, attack, steps=2, generator=seeded()).dtype == dtype


@every_attack
def test_the_device_follows_the_images(attack):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    images, generator = some_images().cuda(), torch.Generator("cuda").manual_seed(0)
    attacked = unforeseen(any_size(3).cuda(), images, LABELS.cuda(), attack, steps=2, generator=generator)
    assert attacked.device == images.device and torch.isfinite(attacked).all()


@every_attack
@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_gradients_are_finite_at_the_ends(attack, level):
    images = torch.full((2, 3, 16, 16), level)
    corrupt = ATTACKS[attack].corruption(images, ATTACKS[attack].budget, seeded())
    inside = corrupt.ball.projection(corrupt.centre)
    for variables in (corrupt.ball.random_start(corrupt.centre, seeded()), inside(torch.zeros_like(corrupt.centre)), inside(torch.ones_like(corrupt.centre))):
        variables = variables.clone().requires_grad_()
        gradient, = torch.autograd.grad(corrupt(variables).square().sum(), variables)
        assert torch.isfinite(gradient).all()


@every_attack
def test_images_do_not_influence_one_another(attack):
    corrupt = ATTACKS[attack].corruption(some_images(low=0.2, high=0.8), ATTACKS[attack].budget / 20, seeded())
    variables = corrupt.ball.random_start(corrupt.centre, seeded()).requires_grad_()
    gradient, = torch.autograd.grad(corrupt(variables)[0].square().sum(), variables)
    assert (gradient[0] != 0).any() and (gradient[1] == 0).all()


# --- behaviour ---------------------------------------------------------------------------------------------------------

@every_attack
def test_the_generator_decides(attack):
    images, model = some_images(), any_size(3)
    before = torch.get_rng_state()
    first, again, other = (unforeseen(model, images, LABELS, attack, steps=2, generator=seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before), "it draws from the global source although it was given one"


@every_attack
def test_an_attack_changes_the_loss_as_it_should(attack):
    "With small steps: those of Table 2 go from bound to bound. Snow's steps also scale flakes down, so its random start need not lie between."
    images, model = some_images((3, 16, 16), n=4, low=0.1, high=0.5), Small(channels=3, generator=seeded(3))
    wanted = (model(images).argmax(1) + 1) % 10
    eps = ATTACKS[attack].budget / 2
    def loss(steps, targeted):
        attacked = unforeseen(model, images, wanted, attack, eps=eps, steps=steps, step_size=min(0.1, eps / 10), targeted=targeted, generator=seeded())
        return F.cross_entropy(model(attacked), wanted)
    towards, away = loss(10, True), loss(10, False)
    assert towards < away and (attack.startswith("snow") or towards < loss(0, True) < away)


def test_the_model_is_left_as_it_was_found():
    model = Small(channels=3, generator=seeded())
    unforeseen(model, some_images(), LABELS, "fog", steps=1)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("arguments, match", [
    (dict(attack="rain"), "choose one of gabor"), (dict(eps=-1), "cannot be negative"), (dict(eps="much"), "eps must be a number"), (dict(steps=1.5), "whole number"),
    (dict(images=255 * some_images()), "divide by 255"), (dict(labels=LABELS + 9), "labels"), (dict(step_size=None, labels=LABELS[:1]), "labels"),
    (dict(model=any_size(2), images=some_images((2, 8, 8)), attack="snow"), "choose gabor or fog"),
    (dict(model=any_size(2), images=some_images((2, 8, 8)), attack="jpeg_l1"), "choose gabor or fog"),
    (dict(model=nn.Sequential(any_size(3), nn.Softmax(1))), "softmax"), (dict(step_size="long"), "step_size must be a number")])
def test_bad_input_is_refused_in_one_line(arguments, match):
    given = dict(model=any_size(3), images=some_images(), labels=LABELS, attack="gabor", steps=1) | arguments
    with pytest.raises(ValueError, match=match) as error:
        unforeseen(given.pop("model"), given.pop("images"), given.pop("labels"), given.pop("attack"), **given)
    one_line(error)


def test_two_channels_are_no_hindrance_for_noise_and_fog():
    for attack in ("gabor", "fog"):
        assert unforeseen(any_size(2), some_images((2, 8, 8)), LABELS, attack, steps=1).shape == (2, 2, 8, 8)


def test_an_average_block_of_flakes_is_left_alone():
    flakes = torch.rand(1, 7, 16, 16, generator=seeded()) * 0.3
    assert torch.equal(Flakes().projection(flakes)(flakes), flakes)


# --- JPEG against others -----------------------------------------------------------------------------------------------

def photographs(n, channels, height, width):
    "Something like a picture: smooth, with grain, whole levels, and nothing near black or white."
    smooth = F.interpolate(torch.rand(n, channels, 5, 6, generator=seeded()), size=(height, width), mode="bilinear")
    return (255 * (0.3 + 0.4 * smooth + 0.02 * torch.randn(n, channels, height, width, generator=seeded(1)))).clamp(50, 205).round() / 255


def test_coefficients_are_those_of_scipy():
    from scipy.fft import dctn
    images = photographs(2, 1, 24, 16).double()
    blocks = split_blocks(split_planes(images)[0]).view(2, -1, 8, 8)
    expected = dctn(blocks.numpy(), axes=(2, 3), norm="ortho") / quantisation_tables(50).view(2, 8, 8)[0].numpy()
    assert numpy.allclose(encode(images).view(2, -1, 8, 8).numpy(), expected, atol=1e-10)


def planes_of_a_file(image, quality):
    "The planes of a JPEG file that Pillow wrote; decoded at half the size, libjpeg gives the colours as the file has them."
    Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    levels, file = (image * 255).round().byte().numpy(), io.BytesIO()
    Image.fromarray(levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0)).save(file, "jpeg", quality=quality, **({} if len(levels) == 1 else {"subsampling": 2}))
    read = []
    for size in (image.shape[:0:-1], (image.shape[2] // 2, image.shape[1] // 2)):
        opened = Image.open(file)
        opened.draft("L" if len(levels) == 1 else "YCbCr", size)
        read.append(torch.tensor(numpy.asarray(opened), dtype=torch.float64).reshape(opened.height, opened.width, -1).permute(2, 0, 1) - 128)
    return [read[0][0], *read[1][1:]]


@pytest.mark.parametrize("channels, quality", [(1, 50), (3, 50), (1, 20), (3, 80)])
def test_with_rounding_the_coefficients_are_those_of_pillows_encoder(channels, quality):
    "98.5% are equal and no other is off by more than one: the encoder works in whole numbers and rounds ties another way."
    images = photographs(4, channels, 64, 96)
    ours = encode(images, quality=quality, rounding=True)
    tables = quantisation_tables(quality)
    theirs = torch.stack([torch.cat([(split_blocks(plane[None]) @ (dct_basis() / tables[min(k, 1)][:, None]).T).flatten()
                                     for k, plane in enumerate(planes_of_a_file(image, quality))]) for image in images])
    off = (ours - theirs.round()).abs()
    assert (theirs - theirs.round()).abs().max() < 0.5 and off.max() <= 1 and (off == 0).double().mean() > 0.985


@pytest.mark.parametrize("height, width", [(64, 96), (41, 59)])
def test_with_rounding_a_grey_image_is_pillows(height, width):
    "On average within half a level of 255."
    images = photographs(4, 1, height, width)
    for image, ours in zip(images, jpeg(images, rounding=True)):
        theirs = planes_of_a_file(image, 50)[0] + 128
        assert (255 * ours[0] - theirs).abs().mean() < 0.5


def test_without_rounding_it_is_kornias_codec_where_that_has_nothing_to_round():
    "At quality 100, with steps of one level, kornia's cubic rounding hardly matters. Within half a level of 255, in colour too where colours change slowly."
    kornia = pytest.importorskip("kornia.enhance", reason="kornia is not installed: pip install robustint[peers]")
    grey = photographs(3, 1, 48, 64).expand(-1, 3, -1, -1)
    slow = F.interpolate(0.3 + 0.4 * torch.rand(3, 3, 2, 2, generator=seeded()), size=(48, 64), mode="bilinear", align_corners=True)
    for images in (grey, slow):
        assert 255 * (kornia.jpeg_codec_differentiable(images, torch.tensor([100.0])) - jpeg(images, quality=100)).abs().mean() < 0.5


@pytest.mark.parametrize("shape, sizes", [((1, 28, 28), [(32, 32)]), ((3, 32, 32), [(32, 32), (16, 16), (16, 16)]), ((3, 1, 17), [(16, 32), (8, 16), (8, 16)])])
def test_sizes_of_the_planes(shape, sizes):
    assert plane_sizes(shape) == sizes and encode(some_images(shape)).shape == (2, sum(h * w for h, w in sizes))


def test_jpeg_refuses_what_is_no_picture():
    for images, match in (some_images((2, 8, 8)), "1 or 3 channels"), (some_images()[0], "shape"), (2 * some_images(), "divide by 255"):
        with pytest.raises(ValueError, match=match) as error:
            jpeg(images)
        one_line(error)
    with pytest.raises(ValueError, match="from 1 to 100") as error:
        jpeg(some_images(), quality=50.5)
    one_line(error)


# --- the paper ---------------------------------------------------------------------------------------------------------

@pytest.mark.full
@pytest.mark.parametrize("attack, printed", [("jpeg_linf", 0.460), ("jpeg_l2", 0.380), ("jpeg_l1", 0.230), ("snow", 0.115), ("snow_free", 0.115), ("gabor", 0.190)])
def test_adv_keeps_what_table_2_says(attack, printed, data, released):
    "The authors' Adv on CIFAR-10, one seed: within 0.07 of the printed cell, about twice the standard error of 200 images."
    points, draws = data("cifar10"), numpy.random.RandomState(99)
    index = draws.permutation(len(points))[:200]
    assert (index == evaluation_indices(len(points), 200)).all()
    images, labels = points.images[index], points.labels[index]
    wanted = (labels + 1 + torch.as_tensor(draws.randint(9, size=200))) % 10
    model, generator = load_model("adv", "cifar10", "small"), seeded()
    attacked = torch.cat([unforeseen(model, x, y, attack, targeted=True, generator=generator) for x, y in zip(images.split(40), wanted.split(40))])
    with torch.no_grad():
        assert (model(attacked).argmax(1) == labels).double().mean().item() == pytest.approx(printed, abs=0.07)

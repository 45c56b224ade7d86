"""Attacks: known answers, laws, other libraries' results, and what happens to bad input."""
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from robustint.core import make_generator
from robustint.data import load_dataset
from robustint.models import make_model
from robustint.pgd import L2, Linf, ascend, fgsm, minimum_eps, momentum_pgd, pgd


@pytest.fixture(scope="module")
def trained():
    """Small on the embedded digits, after a few seconds of training."""
    from robustint.objectives import make_method
    from robustint.training import train

    digits, model = load_dataset("digits"), make_model("small", channels=1, generator=make_generator(0))
    train(model, digits.images, digits.labels, make_method("normal"), epochs=8, learning_rate=[[0, 2e-3]])
    return model


@pytest.fixture(scope="module")
def batch():
    return load_dataset("digits", "test").subset(range(40))


class Linear(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, images):
        return images.flatten(1) @ self.weight.T


def test_a_linear_classifier_loses_most_at_a_corner():
    model = Linear(torch.tensor([[1.0, -2.0], [0.0, 0.0]]))
    x = torch.full((1, 1, 1, 2), 0.5)
    for attacked in (pgd(model, x, torch.tensor([0]), eps=0.1, steps=30, step_size=0.01), fgsm(model, x, torch.tensor([0]), eps=0.1)):
        torch.testing.assert_close(attacked.flatten(), torch.tensor([0.4, 0.6]))


@pytest.mark.parametrize("norm", ["inf", 2])
@pytest.mark.parametrize("eps", [0, 0.01, 0.3, 1.0])
def test_no_attack_leaves_the_ball_or_the_pixel_range(trained, batch, norm, eps):
    attacked = pgd(trained, batch.images, batch.labels, eps=eps, steps=5, step_size=0.2, norm=norm, random_start=True, generator=make_generator(1))
    offset = (attacked - batch.images).flatten(1)
    assert (offset.abs().amax(1) if norm == "inf" else offset.norm(dim=1)).max() <= eps + 1e-6
    assert attacked.min() >= 0 and attacked.max() <= 1
    if eps == 0:
        assert torch.equal(attacked, batch.images)


def test_a_larger_ball_never_helps_the_network_much(trained, batch):
    right = [(trained(pgd(trained, batch.images, batch.labels, eps=e, steps=30, step_size=0.01)).argmax(1) == batch.labels).sum() for e in (0, 0.05, 0.1, 0.2)]
    assert right == sorted(right, reverse=True) and right[-1] < right[0]


def test_images_do_not_influence_one_another(trained, batch):
    together = pgd(trained, batch.images, batch.labels, eps=0.1, steps=5, step_size=0.02)
    alone = torch.cat([pgd(trained, x[None], y[None], eps=0.1, steps=5, step_size=0.02) for x, y in zip(batch.images, batch.labels)])
    assert ((together - alone).abs() < 1e-6).double().mean() > 0.999  # a sign may turn where a gradient is zero but for rounding


def test_a_radius_for_each_image(trained, batch):
    radii = torch.linspace(0, 0.3, len(batch.images))
    objective = lambda points: nn.functional.cross_entropy(trained(points), batch.labels, reduction="none")
    attacked = ascend(objective, batch.images, Linf(radii[:, None, None, None]), steps=10, step_size=0.05)
    assert ((attacked - batch.images).flatten(1).abs().amax(1) <= radii + 1e-6).all()


def test_targeted_attacks_reach_their_targets(trained, batch):
    targets = (batch.labels + 1) % 10
    attacked = pgd(trained, batch.images, targets, eps=0.3, steps=40, step_size=0.02, targeted=True)
    assert (trained(attacked).argmax(1) == targets).double().mean() > 0.9


def test_momentum_sums_raw_gradients():
    seen = []

    class Recorder(Linf):
        def step(self, points, gradient, size):
            seen.append(gradient.clone())
            return super().step(points, gradient, size)

    centre = torch.full((1, 1, 1, 2), 0.5)
    ascend(lambda p: (p * torch.tensor([1.0, -2.0])).sum((1, 2, 3)), centre, Recorder(0.2), steps=3, step_size=0.01, decay=1.0)
    for k, gradient in enumerate(seen, 1):
        torch.testing.assert_close(gradient.flatten(), k * torch.tensor([1.0, -2.0]))


def test_the_same_seed_gives_the_same_attack(trained, batch):
    runs = [momentum_pgd(trained, batch.images, batch.labels, eps=0.1, steps=3, step_size=0.02, generator=make_generator(s)) for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_nothing_is_left_behind(trained, batch):
    trained.train()
    state = {k: v.clone() for k, v in trained.state_dict().items()}
    pgd(trained, batch.images, batch.labels, eps=0.1, steps=2, step_size=0.02)
    assert trained.training and all(p.grad is None or not p.grad.any() for p in trained.parameters())
    assert all(p.requires_grad for p in trained.parameters()) and all(torch.equal(v, state[k]) for k, v in trained.state_dict().items())


def test_uniform_starts_fill_the_balls():
    images = torch.full((4000, 1, 1, 3), 0.5)
    inf = Linf(0.2).random_start(images, make_generator(0)) - images
    two = (L2(0.2).random_start(images, make_generator(0)) - images).flatten(1).norm(dim=1)
    assert inf.abs().max() <= 0.2 and inf.std() == pytest.approx(0.4 / 12**0.5, rel=0.03)
    assert two.max() <= 0.2 + 1e-6 and (two < 0.1).double().mean() == pytest.approx(1 / 8, abs=0.02)


def test_minimum_eps_brackets_a_linear_margin():
    model, x = Linear(torch.tensor([[1.0, -2.0], [0.0, 0.0]])), torch.tensor([[[[0.9, 0.2]]], [[[0.6, 0.2]]]])
    def attack(radii):
        objective = lambda p: nn.functional.cross_entropy(model(p), torch.zeros(2, dtype=torch.long), reduction="none")
        points = ascend(objective, x, Linf(radii), steps=1, step_size=radii)
        return points, model(points).argmax(1) != 0
    radii, points = minimum_eps(attack, x, bisections=20)
    torch.testing.assert_close(radii, torch.tensor([0.5 / 3, 0.2 / 3]), atol=1e-3, rtol=0)
    torch.testing.assert_close((points - x).flatten(1).abs().amax(1), radii, atol=1e-5, rtol=0)


def test_foolbox_finds_the_same_images(trained, batch):
    """The same model, steps and start: the sign steps of both libraries go the same way."""
    foolbox = pytest.importorskip("foolbox", reason="foolbox is not installed: pip install '.[dev]'")
    model = foolbox.PyTorchModel(trained.eval(), bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(abs_stepsize=0.02, steps=20, random_start=False)
    theirs, _, success = attack(model, batch.images, batch.labels, epsilons=0.15)
    ours = pgd(trained, batch.images, batch.labels, eps=0.15, steps=20, step_size=0.02)
    assert ((ours - theirs).abs() < 1e-5).double().mean() > 0.98
    assert ((trained(ours).argmax(1) != batch.labels) == success).double().mean() >= 0.95


BAD = [
    (dict(images=lambda x: x * 255), "divide by 255"),
    (dict(images=lambda x: (x * 255).byte()), "float"),
    (dict(images=lambda x: x.masked_fill(x > 0.9, torch.nan)), "NaN"),
    (dict(images=lambda x: x[:0], labels=lambda y: y[:0]), "empty"),
    (dict(images=lambda x: x[0]), "(N,C,H,W)"),
    (dict(images=lambda x: x.expand(-1, 3, -1, -1)), "3 channels"),
    (dict(labels=lambda y: y + 10), "below 10"),
    (dict(labels=lambda y: y - 10), "0 or more"),
    (dict(labels=lambda y: y.float()), "whole numbers"),
    (dict(labels=lambda y: y[:3]), "as many"),
    (dict(labels=lambda y: nn.functional.one_hot(y)), "(N,)"),
    (dict(eps=-0.1), "eps"),
    (dict(eps="8"), "8/255"),
    (dict(eps=float("nan")), "eps"),
    (dict(eps="eight"), "eps"),
    (dict(steps=-1), "steps"),
    (dict(norm="l1"), "norm"),
    (dict(decay=float("nan")), "decay"),  # each of these moved no image, and said nothing
    (dict(loss_scale=0), "loss_scale"),
    (dict(loss_scale=-1), "loss_scale"),
    (dict(targeted="no"), "True or False"),
    (dict(model=lambda m: nn.Sequential(m, nn.Softmax(1))), "softmax"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[message + str(i) for i, (_, message) in enumerate(BAD)])
def test_bad_input_gets_one_line_with_the_remedy(trained, batch, change, message):
    good = dict(model=trained, images=batch.images, labels=batch.labels, eps=0.1, steps=1, step_size=0.1)
    for name, value in change.items():
        good[name] = value(good[name]) if callable(value) else value
    with pytest.raises((ValueError, TypeError)) as error:
        pgd(good.pop("model"), good.pop("images"), good.pop("labels"), **good)
    assert message in str(error.value) and "\n" not in str(error.value)


# --- compiled steps ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [{}, {"decay": 1.0}, {"norm": 2, "eps": 2.0, "step_size": 0.1}])
def test_compiled_steps_end_at_the_same_points(trained, batch, options):
    settings = {"eps": 0.2, "steps": 8, "step_size": 0.03} | options
    plain, fused = (pgd(trained, batch.images, batch.labels, **settings, compiled=compiled) for compiled in (False, True))
    assert ((plain - fused).abs() < 1e-4).float().mean() > 0.999 and not torch.equal(fused, batch.images)


@pytest.mark.parametrize("method", ["adv", "int", "ig_norm"])
def test_a_compiled_inner_attack_is_the_same_attack(trained, batch, method):
    from robustint.objectives import make_method
    from robustint.training import find_perturbed

    plain, fused = (find_perturbed(trained, batch.images, batch.labels, make_method(method), eps=0.2, steps=5, step_size=0.05, generator=make_generator(0), compiled=compiled) for compiled in (False, True))
    assert ((plain - fused).abs() < 1e-4).float().mean() > 0.99  # a gradient of about zero has no certain sign


def test_without_a_compiler_the_steps_are_taken_as_they_are(tmp_path):
    program = """if True:
        import torch
        from robustint.models import make_model
        from robustint.pgd import pgd
        from robustint.core import make_generator
        model, x, y = make_model("small", channels=1, generator=make_generator(0)), torch.rand(5, 1, 28, 28), torch.arange(5)
        a, b = (pgd(model, x, y, eps=0.2, steps=4, step_size=0.1, compiled=compiled) for compiled in (False, True))
        assert torch.equal(a, b)"""
    environment = {**os.environ, "CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_ball_has_no_negative_radius(batch):
    with pytest.raises(ValueError, match="cannot be negative"):
        pgd(make_model("small", channels=1), batch.images, batch.labels, eps=-0.5, steps=1, step_size=0.1, norm=2)


def test_the_width_of_a_network_is_not_taken_for_its_images(batch):
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    network.channels = 64
    found = pgd(network, batch.images.clone().requires_grad_(), batch.labels, eps=0., steps=1, step_size=0.1)
    assert torch.equal(found, batch.images) and not found.requires_grad

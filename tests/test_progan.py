"""The progressive GAN: laws of its parts, growth, exact resume in the middle of a fade, divergence, bad input."""
import pytest
import torch
import torch.nn.functional as F

from robustint.core import make_generator
from robustint.progan import (LOSSES, Critic, Diverged, Equalised, Gan, Generator, add_minibatch_deviation, check_alive, enlarge, gan_tensors, grow, growth, noise_feed, pixel_norm,
                              r1_penalty, set_gan_tensors, shrink)
from robustint.training import list_broken
from robustint.zoo import load_tensors

STEPS = dict(steps=(4, 10), batch_size=8, every=2)


def player(seed=0, **settings):
    chance = make_generator(seed)
    return Gan(Generator((6, 4), latent=4, generator=chance), Critic((6, 4), generator=chance), **settings)


@pytest.fixture(scope="module")
def images():
    return torch.rand(40, 1, 8, 8, generator=make_generator(9))


def same(a, b):
    a, b = gan_tensors(a), gan_tensors(b)
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kernel, inputs", [(None, 16), (None, 400), (1, 16), (3, 30)])
def test_equalised_layer_keeps_the_variance_whatever_its_fan_in(kernel, inputs):
    layer = Equalised(300, inputs, kernel, gain=1.0, generator=make_generator(0))
    shape = (60, inputs) if kernel is None else (60, inputs, 5, 5)
    out = layer(torch.randn(shape, generator=make_generator(1)))
    inner = out if kernel is None else out[:, :, 2:3, 2:3]
    assert abs(inner.std().item() - 1) < 0.1 and abs(layer.weight.std().item() - 1) < 0.1
    assert layer.scale == pytest.approx((inputs * (kernel or 1) ** 2) ** -0.5)


def test_equalised_rate_every_stored_weight_moves_by_the_learning_rate():
    for inputs in (4, 400):
        layer = Equalised(3, inputs, generator=make_generator(0))
        before, adam = layer.weight.detach().clone(), torch.optim.Adam(layer.parameters(), lr=0.02)
        (1e4 * layer(torch.ones(2, inputs)).square().sum()).backward()
        adam.step()
        torch.testing.assert_close((layer.weight - before).abs(), torch.full_like(before, 0.02), atol=1e-5, rtol=1e-3)


def test_pixel_norm_of_vectors_and_maps():
    for x in (torch.randn(3, 7), torch.randn(2, 5, 4, 4)):
        torch.testing.assert_close(pixel_norm(x).square().mean(1), torch.ones_like(x[:, 0]), atol=1e-4, rtol=1e-4)
    assert torch.isfinite(pixel_norm(torch.zeros(2, 3))).all()


@pytest.mark.parametrize("n, group", [(8, 4), (6, 4), (7, 4), (1, 4), (12, 5)])
def test_minibatch_deviation_shape_and_value(n, group):
    x = torch.randn(n, 3, 4, 4, generator=make_generator(0))
    out = add_minibatch_deviation(x, group)
    assert out.shape == (n, 4, 4, 4) and torch.equal(out[:, :3], x)
    size = next(s for s in range(min(group, n), 0, -1) if n % s == 0)
    expected = x.reshape(size, -1, 3, 4, 4).std(0, unbiased=False).mean((1, 2, 3)).repeat(size)
    torch.testing.assert_close(out[:, 3, 0, 0], expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scales", [2, 4, 6])
def test_shapes_from_4_to_128_grey_and_colour(channels, scales):
    widths = (8, 6, 4, 4, 2, 2)[:scales]
    generator, critic = Generator(widths, channels, generator=make_generator(0)), Critic(widths, channels, generator=make_generator(1))
    start = torch.randn(2, 8, 4, 4, generator=make_generator(2))
    for scale in range(scales):
        picture = generator(start, scale)
        assert picture.shape == (2, channels, 4 * 2**scale, 4 * 2**scale) and critic(picture, scale).shape == (2,)
        assert 0 <= picture.min() and picture.max() <= 1
    assert generator(start).shape[2] == 4 * 2 ** (scales - 1)


def test_alpha_0_is_the_smaller_network_and_alpha_1_the_larger():
    generator, critic = Generator((8, 6, 4), latent=5, generator=make_generator(0)), Critic((8, 6, 4), generator=make_generator(1))
    z = torch.randn(6, 5, generator=make_generator(2))
    for scale in (1, 2):
        assert torch.equal(generator(z, scale, 0.0), enlarge(generator(z, scale - 1)))
        half = (enlarge(generator(z, scale - 1)) + generator(z, scale)) / 2
        torch.testing.assert_close(generator(z, scale, 0.5), half)
        pictures = generator(z, scale)
        torch.testing.assert_close(critic(pictures, scale, 0.0), critic(F.avg_pool2d(pictures, 2), scale - 1))
    torch.testing.assert_close(shrink(pictures, 1, 0.0), enlarge(shrink(pictures, 0)))


def test_growth_counts_every_step_once():
    steps, seen = (3, 4, 10), [growth(step, (3, 4, 10), 0.5) for step in range(17)]
    assert [scale for scale, _ in seen] == [0] * 3 + [1] * 4 + [2] * 10
    assert [alpha for _, alpha in seen][:7] == [1, 1, 1, 0.5, 1, 1, 1] and seen[7][1] == 0.2 and seen[11][1] == 1
    assert growth(99, steps) == (2, 1.0) and growth(3, steps, 0.0) == (1, 1.0)


def test_losses_are_those_of_the_papers():
    real, drawn = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    eq1 = real.sigmoid().log().mean() + (1 - drawn.sigmoid()).log().mean()
    for name in LOSSES:
        torch.testing.assert_close(LOSSES[name][0](real, drawn), -eq1)
    torch.testing.assert_close(LOSSES["standard"][1](drawn), (1 - drawn.sigmoid()).log().mean())
    torch.testing.assert_close(LOSSES["nonsaturating"][1](drawn), -drawn.sigmoid().log().mean())


def test_r1_is_the_squared_gradient_and_reaches_the_weights():
    critic, images = Critic((4, 3), generator=make_generator(0)), torch.rand(4, 1, 8, 8, generator=make_generator(1))
    penalty = r1_penalty(critic, images)
    points = images.clone().requires_grad_()
    gradient, = torch.autograd.grad(critic(points).sum(), points)
    torch.testing.assert_close(penalty, gradient.square().sum() / 4)
    penalty.backward()
    assert critic.dense.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("loss, penalty", [("nonsaturating", 1.0), ("standard", 0.0)])
def test_each_player_moves_itself_only_and_the_average_follows(loss, penalty, images):
    gan = player(loss=loss, penalty=penalty)
    before = {name: [p.clone() for p in part.parameters()] for name, part in gan.parts.items()}
    gan.update("critic", gan.parts["critic"](gan.parts["generator"](torch.ones(4, 4))).sum())
    assert all(torch.equal(a, b) for a, b in zip(before["generator"], gan.parts["generator"].parameters()))
    losses = gan.play(torch.ones(8, 4), images[:8], 1, 1.0, 0)
    assert set(losses) == {"critic", "generator", "term", "inputs", "spread"} and all(torch.isfinite(v) for v in losses.values())
    for slow, start, fast in zip(gan.averaged.parameters(), before["averaged"], gan.parts["generator"].parameters()):
        torch.testing.assert_close(slow, 0.1 * start + 0.9 * fast)
    assert not any(p.requires_grad for p in gan.averaged.parameters())


def test_a_state_goes_to_a_dictionary_and_back(images):
    a, b = player(), player(seed=1)
    grow({"gan": a}, images, noise_feed(4), **STEPS)
    set_gan_tensors(b, {name: value.clone() for name, value in gan_tensors(a).items()})
    assert same(a, b)


@pytest.mark.parametrize("stop", [2, 6, 8, 12])
def test_a_run_stopped_anywhere_ends_with_the_same_bits(stop, images, tmp_path, monkeypatch):
    "Steps 4 to 8 are the fade of the second scale."
    assert 0 < growth(6, STEPS["steps"])[1] < 1
    unbroken, broken, state = player(), player(), tmp_path / "state.safetensors"
    expected = grow({"gan": unbroken}, images, noise_feed(4), **STEPS)
    real, steps = Gan.play, []

    def stopping(self, *arguments):
        steps.append(0)
        if len(steps) > stop + 1:
            raise KeyboardInterrupt
        return real(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Gan, "play", stopping)
        grow({"gan": broken}, images, noise_feed(4), state=state, **STEPS)
    assert load_tensors(state)[1]["step"] == stop
    broken = player()
    log = grow({"gan": broken}, images, noise_feed(4), state=state, **STEPS)
    assert same(unbroken, broken) and [e["gan"] for e in log] == [e["gan"] for e in expected]


def test_another_seed_gives_another_generator(images):
    made = []
    for seed in (0, 0, 1):
        made.append(player())
        grow({"gan": made[-1]}, images, noise_feed(4), seed=seed, **STEPS)
    assert same(made[0], made[1]) and not same(made[0], made[2])


def test_a_state_of_other_settings_is_refused(images, tmp_path):
    state = tmp_path / "state.safetensors"
    grow({"gan": player()}, images, noise_feed(4), state=state, **STEPS)
    for other, options in ((player(learning_rate=1e-4), {}), (player(loss="standard"), {}), (player(), {"fade": 0.25}), (player(), {"seed": 3}), (player(), {"identity": {"lambda": 0}})):
        with pytest.raises(ValueError, match="other settings"):
            grow({"gan": other}, images, noise_feed(4), state=state, **STEPS | options)
    with pytest.raises(ValueError, match="other settings"):
        grow({"gan": player()}, 1 - images, noise_feed(4), state=state, **STEPS)


def test_what_is_not_finite_stops_the_run_and_the_last_state_is_good(images, tmp_path):
    state, calls = tmp_path / "state.safetensors", []

    def feed(batch, generator):
        calls.append(0)
        return {"gan": (torch.randn(len(batch), 4, generator=generator) / (len(calls) != 7), None)}

    with pytest.raises(Diverged, match="before step 8.*last saved state is good") as error:
        grow({"gan": player()}, images, feed, state=state, **STEPS)
    assert "\n" not in str(error.value)
    tensors, header = load_tensors(state)
    assert header["step"] == 6 and all(torch.isfinite(v).all() for v in tensors.values() if v.is_floating_point())


@pytest.mark.parametrize("poisoned", [2, 6, 14])
def test_a_gradient_that_is_not_finite_at_the_last_step_before_a_save(poisoned, images, tmp_path):
    "The term is 0 and its gradient NaN: every loss of the interval is finite, and only the weights after it show what happened."
    state, calls = tmp_path / "state.safetensors", []

    def feed(batch, generator):
        calls.append(0)
        return {"gan": (torch.randn(len(batch), 4, generator=generator), (lambda drawn: (0 * drawn).sum().sqrt()) if len(calls) == poisoned else None)}

    assert poisoned % STEPS["every"] == 0
    with pytest.raises(Diverged, match=f"gan diverged before step {poisoned}: .* not finite: ") as error:
        grow({"gan": player()}, images, feed, state=state, **STEPS)
    assert ("the last saved state is good" in str(error.value)) == (poisoned > 2), "nothing is kept before the first state is saved"
    assert state.exists() == (poisoned > 2)
    if state.exists():
        tensors, header = load_tensors(state)
        assert header["step"] == poisoned - 2 and not list_broken(tensors)
        good, resumed = player(), player()
        grow({"gan": good}, images, noise_feed(4), **STEPS), grow({"gan": resumed}, images, noise_feed(4), state=state, **STEPS)
        assert same(good, resumed)


@pytest.mark.parametrize("part", ["generator", "critic", "averaged"])
def test_weights_averages_and_moments_are_looked_at(part, images):
    gan, good = player(), dict(critic=1.0, generator=1.0, term=0.0, inputs=1.0, spread=0.5)
    grow({"gan": gan}, images, noise_feed(4), **STEPS)
    check_alive("gan", good, 9, tensors=gan_tensors(gan))
    for name, tensor in gan_tensors(gan).items():
        if not name.startswith((part, f"adam.{part}")) or not tensor.numel() or not tensor.is_floating_point():
            continue
        tensors = gan_tensors(gan) | {name: torch.full_like(tensor, torch.inf)}
        with pytest.raises(Diverged) as error:
            check_alive("gan", good, 9, tensors=tensors)
        assert f"{name} not finite" in str(error.value)


def test_a_collapse_is_said(images, tmp_path):
    state = tmp_path / "state.safetensors"

    def one_picture():
        gan = player(learning_rate=1e-9)
        for layer in gan.parts["generator"].to_image:
            layer.weight.data.zero_()
        return gan

    for where in (None, state):
        with pytest.raises(Diverged, match="gan collapsed before step 2") as error:
            grow({"gan": one_picture()}, images, noise_feed(4), state=where, **STEPS)
        assert "kept" not in str(error.value)
    assert not state.exists()
    grow({"gan": one_picture()}, images, lambda batch, _: {"gan": (torch.ones(len(batch), 4), None)}, **STEPS)  # inputs that are all alike: no fault of the generator
    check_alive("gan", dict(critic=1.0, generator=1.0, term=0.0, inputs=1.0, spread=0.5), 1)


def test_a_collapse_after_a_good_start_leaves_the_last_good_state(images, tmp_path):
    "From the seventh step on the generator draws one picture, whatever it is given."
    state, gan, calls = tmp_path / "state.safetensors", player(), []

    def feed(batch, generator):
        calls.append(0)
        for layer in gan.parts["generator"].to_image if len(calls) > 6 else []:
            layer.weight.data.zero_()
        return noise_feed(4)(batch, generator)

    with pytest.raises(Diverged, match="gan collapsed before step 8: .*the last saved state is good and is kept") as error:
        grow({"gan": gan}, images, feed, state=state, **STEPS)
    assert "\n" not in str(error.value)
    tensors, header = load_tensors(state)
    assert header["step"] == 6 and [entry["step"] for entry in header["log"]] == [2, 4, 6]
    assert all(value.any() for name, value in tensors.items() if name.startswith("player.gan.generator.to_image") and name.endswith("weight"))
    good, continued = player(), player()
    expected = grow({"gan": good}, images, noise_feed(4), **STEPS)
    log = grow({"gan": continued}, images, noise_feed(4), state=state, **STEPS)
    assert same(good, continued) and [entry["gan"] for entry in log] == [entry["gan"] for entry in expected]


@pytest.mark.parametrize("penalty", [1.0, 0.0])
def test_the_loss_of_eq_1_trains_as_well(penalty):
    "Images with one bright side: after some steps the pictures are as bright as they, as varied, and the critic is not sure."
    bright = torch.rand(64, 1, 8, 8, generator=make_generator(3)) * 0.3
    bright[::2, :, :, :4] += 0.6
    bright[1::2, :, :, 4:] += 0.6
    chance = make_generator(0)
    gan = Gan(Generator((10, 8), latent=4, generator=chance), Critic((10, 8), generator=chance), loss="standard", penalty=penalty, learning_rate=5e-3, averaging=0.95)
    before = F.l1_loss(gan.averaged(torch.randn(200, 4, generator=make_generator(5))).mean(0), bright.mean(0))
    log = grow({"gan": gan}, bright, noise_feed(4), steps=(40, 80), batch_size=16, every=20)
    after = F.l1_loss(gan.averaged(torch.randn(200, 4, generator=make_generator(5))).mean(0), bright.mean(0))
    assert after < 0.7 * before and log[-1]["gan"]["generator"] < 0, "log(1 - D) is negative"
    assert 0.5 < log[-1]["gan"]["spread"] < 2 and log[-1]["gan"]["critic"] > 0.3


def test_players_grow_side_by_side_as_they_would_alone(images):
    def feed(batch, generator):
        z = torch.randn(len(batch), 4, generator=generator)
        return {name: (z, None) for name in ("a", "b")}

    a, b, alone = player(0), player(1), player(1)
    grow({"a": a, "b": b}, images, feed, **STEPS)
    grow({"b": alone}, images, noise_feed(4, "b"), **STEPS)
    assert same(b, alone) and not same(a, b)


def test_observe_is_called_at_every_entry_and_goes_into_the_log(images):
    log = grow({"gan": player()}, images, noise_feed(4), observe=lambda players, step, scale, alpha: {"seen": [step, scale]}, **STEPS)
    assert [e["seen"] for e in log] == [[2, 0], [4, 0], [6, 1], [8, 1], [10, 1], [12, 1], [14, 1]] and [e["side"] for e in log] == [4, 4] + [8] * 5


BAD = [(dict(images=lambda x: x * 255), "divide by 255"), (dict(images=lambda x: x[:, :, :6, :6]), "make images of 8x8"), (dict(batch_size=1), "batch_size"), (dict(batch_size=99), "batch_size"),
       (dict(every=0), "every"), (dict(steps=(4, 4, 4)), "16x16"), (dict(seed=-1), "seed"),
       (dict(steps=(4,), images=lambda x: x[:, :, :4, :4]), "has 2 scales, and steps are given for 1"), (dict(steps=(4, 1.5)), "steps.1. must be a whole number"), (dict(steps=(4, -1)), "steps.1."),
       (dict(fade=3.0), "fade must be a number in"), (dict(fade=-0.1), "fade"), (dict(fade=float("nan")), "fade"), (dict(batch_size=8.0), "batch_size must be a whole number")]
BAD_RULES = [(dict(learning_rate=-1.0), "learning_rate"), (dict(learning_rate=float("nan")), "learning_rate"), (dict(averaging=2.0), "averaging"), (dict(averaging=1.0), "averaging"),
             (dict(averaging=-0.1), "averaging"), (dict(penalty=-5.0), "penalty"), (dict(penalty=float("inf")), "penalty"), (dict(penalty_every=0), "penalty_every")]


@pytest.mark.parametrize("rule, name", BAD_RULES)
def test_rules_that_train_something_else_are_refused(rule, name):
    with pytest.raises(ValueError, match=f"{name} must be a") as error:
        player(**rule)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [Generator, Critic])
def test_widths_that_make_no_network_are_refused(kind):
    for widths, message in ((), "name no scale"), ((4, 0), "widths.1. must be a whole number"), ((4, 2.5), "widths.1."):
        with pytest.raises(ValueError, match=message):
            kind(widths)


@pytest.mark.parametrize("change, message", BAD)
def test_bad_input_is_refused_before_the_first_step(change, message, images):
    good = dict(images=images, **STEPS)
    for name, value in change.items():
        good[name] = value(good[name]) if callable(value) else value
    gan = player()
    with pytest.raises(ValueError, match=message) as error:
        grow({"gan": gan}, good.pop("images"), noise_feed(4), **good)
    assert "\n" not in str(error.value) and same(gan, player())
    with pytest.raises(ValueError, match="choose one of"):
        player(loss="hinge")
    with pytest.raises(ValueError, match="shape"):
        Generator((4, 4), latent=3)(torch.zeros(2, 4))

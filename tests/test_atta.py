"""ATTA: perturbations that are kept, carried through crops and flips, and never lost to a kill."""
import math

import house
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import one_line
from networks import Hard
from torch import nn

from robustint import training
from robustint.atta import LOSSES, Adversarial, Natural, PerturbedSet, Trades, draw_views, scaled_step, train_atta, view_places
from robustint.classifiers import SmallCNN
from robustint.core import make_generator
from robustint.data import load_dataset
from robustint.pgd import Linf
from robustint.training import find_perturbed, list_broken
from robustint.zoo import load_tensors

SETTINGS = dict(epochs=4, batch_size=24, learning_rate=[[0, 0.05], [3, 0.01]], eps=0.2, inner_step_size=0.05, padding=2, flip=True, reset_every=2, weight_decay=2e-4)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits").subset(range(60))  # 24 + 24 + 12: the last batch is partial


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


# --- views ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("padding, flip", [(0, False), (0, True), (4, False), (4, True)])
def test_there_and_back_loses_nothing_that_stayed_in_view(padding, flip):
    chance = make_generator(0)
    frames = torch.rand(8, 3, 12 + 2 * padding, 10 + 2 * padding, generator=chance)
    views = draw_views(8, (12, 10), padding=padding, flip=flip, generator=chance)
    places = view_places(views, 3)
    crops, back = frames[places], frames.clone()
    assert crops.shape == (8, 3, 12, 10)
    back[places] = crops
    assert torch.equal(back, frames)
    new = torch.rand(crops.shape, generator=chance) + 2  # told apart from every old value
    back[places] = new
    assert torch.equal(back[places], new) and torch.equal(back[back < 2], frames[back < 2]) and (back >= 2).sum() == new.numel()


def test_views_are_crops_and_mirrored_crops():
    frames = torch.rand(200, 1, 9, 9, generator=make_generator(0))
    views = draw_views(200, (5, 5), padding=2, flip=True, generator=make_generator(1))
    crops, mirrored = frames[view_places(views, 1)], 0
    for frame, crop, rows, columns in zip(frames, crops, *views):
        plain, turned = frame[:, rows[0]:rows[0] + 5, columns.min():columns.min() + 5], columns[0] > columns[-1]
        assert torch.equal(crop, plain.flip(2) if turned else plain)
        mirrored += int(turned)
    assert 70 < mirrored < 130 and set(views[0][:, 0].tolist()) == {0, 1, 2, 3, 4}
    assert all(torch.equal(part, torch.arange(5).expand(3, 5)) for part in draw_views(3, (5, 5), generator=make_generator(0)))


def test_what_leaves_the_view_waits_in_the_frame():
    "A perturbation seen through one crop is found again through another, shifted and mirrored, where both saw."
    stored, index = PerturbedSet(torch.full((1, 1, 6, 6), 0.5), 0, padding=2, flip=True), torch.tensor([0])
    stored.kept, marked = {"perturbed": stored.frames.clone()}, torch.zeros(1, 1, 10, 10, dtype=torch.bool)
    for _ in range(20):
        images, place = stored.take(index)
        points = stored.start(place, images, Linf(1.))
        assert torch.equal(points != images, marked[place[1]])
        points[0, 0, 1, 2] = 0.9
        assert stored.keep(place, images, points)["moved"] == pytest.approx((points - images).abs().mean().item())
        rows, columns = place[1][2].flatten(), place[1][3].flatten()
        marked[0, 0, rows[1], columns[2]] = True


def test_a_reset_is_the_images_and_a_little_noise():
    images = torch.rand(50, 3, 8, 8, generator=make_generator(0))
    stored = PerturbedSet(images, 0, padding=4)
    stored.reset()
    first = stored.kept["perturbed"]
    noise = first - F.pad(images, (4,) * 4, value=0.5)
    assert abs(noise.std() - 0.001) < 5e-5 and noise.abs().max() < 0.01 and first.min() >= 0 and first.max() <= 1
    stored.reset()
    assert not torch.equal(first, stored.kept["perturbed"])


def test_the_set_is_forgotten_at_its_epochs_and_made_anew_when_asked_for():
    for every, forgotten in ((0, []), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4])):
        stored, index, found = PerturbedSet(torch.rand(3, 1, 6, 6, generator=make_generator(0)), 0, reset_every=every), torch.arange(3), []
        for epoch in range(5):
            stored.kept = {"perturbed": stored.frames}
            stored.begin(epoch)
            if not stored.kept:
                found.append(epoch)
            images, place = stored.take(index)
            assert (stored.start(place, images, Linf(0.1)) == images).all() == bool(epoch not in found) and stored.kept
        assert found == forgotten


def test_a_start_lies_in_the_ball_of_the_clean_crop():
    images, index = torch.rand(4, 1, 6, 6, generator=make_generator(0)), torch.arange(4)
    stored = PerturbedSet(images, 0)
    stored.kept = {"perturbed": 1 - images}
    assert (stored.start(stored.take(index)[1], images, Linf(0.05)) - images).abs().max() <= 0.05 + 1e-6


def test_a_source_without_a_climb_stores_nothing():
    stored, index = PerturbedSet(torch.rand(4, 1, 6, 6, generator=make_generator(0)), 0, reset_every=1), torch.arange(4)
    stored.begin(0)
    images, place = stored.take(index)
    assert stored.keep(place, images, images) == {"moved": 0} and not stored.kept


def test_visits_add_up_to_one_long_climb():
    "Against a network that stays as it is, five visits of a step end where one visit of five steps does."
    net, images, labels, ends = Hard().eval(), torch.rand(6, 1, 28, 28, generator=make_generator(0)), torch.arange(6), []
    for visits in (1, 5):
        stored = PerturbedSet(images, 0)
        for _ in range(visits):
            x, place = stored.take(torch.arange(6))
            end = find_perturbed(net, x, labels, Trades(), eps=0.1, steps=5 // visits, step_size=0.04, start=lambda ball: stored.start(place, x, ball))
            stored.keep(place, x, end)
        ends.append(end)
    assert torch.equal(*ends) and 0.09 < (ends[0] - images).abs().max() <= 0.1 + 1e-6


# --- losses --------------------------------------------------------------------------------------------------------------

def test_losses_are_the_papers():
    net, chance = Hard().eval(), make_generator(0)
    x, y = torch.rand(6, 1, 28, 28, generator=chance), torch.arange(6)
    z = (x + 0.2 * torch.rand(x.shape, generator=chance)).clamp(0, 1)
    before, after = net(x).softmax(1), net(z).softmax(1)
    batch = F.cross_entropy(net(x), y) + 6 / 6 * nn.KLDivLoss(reduction="sum")(after.log(), before)  # CE + beta KL / batch
    torch.testing.assert_close(Trades().loss(net, x, z, y).mean(), batch)
    torch.testing.assert_close(Adversarial().loss(net, x, z, y), F.cross_entropy(net(z), y, reduction="none"))
    torch.testing.assert_close(Natural().loss(net, x, None, y), F.cross_entropy(net(x), y, reduction="none"))
    torch.testing.assert_close(Trades(beta=0.).loss(net, x, z, y), F.cross_entropy(net(x), y, reduction="none"))
    assert Natural().climb(net, x, y) is None and list(LOSSES) == ["normal", "adv", "trades"]
    for method in (Adversarial(), Trades()):
        torch.testing.assert_close(method.climb(net, x, y)(z), F.cross_entropy(net(z), y, reduction="none"))


def test_the_step_of_a_shortened_run():
    assert scaled_step(60) == pytest.approx(0.01) and scaled_step(10) * 10 == pytest.approx(0.6)
    assert scaled_step(10, 4) * 40 == pytest.approx(0.6) and scaled_step(5, reach=0.1) == pytest.approx(0.02)


# --- the loop ------------------------------------------------------------------------------------------------------------

def test_perturbations_are_kept_and_grow_a_step_an_epoch(digits, tmp_path):
    state, log, far = tmp_path / "state", [], []
    for epochs in (1, 2, 3, 4):
        log = train_atta(Hard(), digits.images, digits.labels, state=state, **SETTINGS | dict(epochs=epochs, padding=0, flip=False, reset_every=0))
        kept = load_tensors(state)[0]["source.perturbed"]
        assert (kept - digits.images).abs().max() <= 0.2 + 1e-6 and kept.min() >= 0 and kept.max() <= 1
        far.append((kept - digits.images).abs().max().item())
    assert far == pytest.approx([0.05, 0.1, 0.15, 0.2], abs=0.006)  # the noise of the start comes on top
    assert [e["epoch"] for e in log] == [1, 2, 3, 4] and [e["step"] for e in log] == [3, 6, 9, 12]
    assert [e["learning_rate"] for e in log] == [0.05, 0.05, 0.05, 0.01]


def test_atta_k_takes_k_steps(digits, tmp_path):
    still = SETTINGS | dict(epochs=1, padding=0, flip=False, inner_steps=3, inner_step_size=0.02)
    train_atta(Hard(), digits.images, digits.labels, state=tmp_path / "state", **still)
    kept = load_tensors(tmp_path / "state")[0]["source.perturbed"]
    assert 0.05 < (kept - digits.images).abs().max() <= 0.06 + 0.006


def test_a_reset_forgets(digits):
    moved = [e["moved"] for e in train_atta(Hard(), digits.images, digits.labels, **SETTINGS)]
    assert moved[1] > moved[0] and moved[2] < moved[1] and moved[3] > moved[2]


@pytest.mark.parametrize("loss", ["normal", "adv", "trades"])
def test_every_loss_trains(loss, digits):
    net, settings = Hard(), SETTINGS | dict(padding=0, flip=False, epochs=8)
    log = train_atta(net, digits.images, digits.labels, loss=loss, **settings)
    assert log[-1]["loss"] < log[0]["loss"] and all(math.isfinite(e["loss"]) for e in log)
    assert all(e["moved"] == 0 for e in log) == (loss == "normal")
    assert all(parameter.grad is None for parameter in net.parameters()) and not same(net, Hard())


def test_seeds_and_the_callers_chance(digits):
    nets, before = [], torch.get_rng_state()
    for seed in (0, 0, 1):
        nets.append(Hard())
        train_atta(nets[-1], digits.images, digits.labels, seed=seed, **SETTINGS | {"epochs": 1})
    assert same(nets[0], nets[1]) and not same(nets[0], nets[2]) and torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("loss, stop", [("trades", 1), ("trades", 3), ("trades", 7), ("adv", 6), ("normal", 5)])
def test_a_run_stopped_at_any_step_ends_with_the_same_bits(loss, stop, digits, tmp_path, monkeypatch):
    settings, state = SETTINGS | {"loss": loss}, tmp_path / "state"
    unbroken, real, steps = Hard(), training._take_step, []
    expected = train_atta(unbroken, digits.images, digits.labels, **settings)

    def stopping(*arguments):
        steps.append(0)
        if len(steps) > stop:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "_take_step", stopping)
        train_atta(Hard(), digits.images, digits.labels, state=state, save_every=0, **settings)
    assert ("source.perturbed" in load_tensors(state)[0]) == (loss != "normal")
    again = Hard()
    log = train_atta(again, digits.images, digits.labels, state=state, **settings)
    assert same(unbroken, again) and [e["loss"] for e in log] == [e["loss"] for e in expected]
    assert [e["moved"] for e in log] == [e["moved"] for e in expected]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_state(digits, tmp_path):
    state = tmp_path / "state"
    train_atta(Hard(), digits.images, digits.labels, state=state, **SETTINGS | {"epochs": 1})
    before = state.read_bytes()

    class Exploding(Hard):
        def forward(self, images):
            return super().forward(images) * (math.inf if self.training else 1)

    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        train_atta(Exploding(), digits.images, digits.labels, state=state, **SETTINGS)
    with pytest.raises(ValueError, match="other settings") as error:
        train_atta(Hard(), digits.images, digits.labels, state=state, **SETTINGS | {"eps": 0.1})
    one_line(error)
    for change in (dict(momentum=0.5), dict(weight_decay=0.), dict(beta=1.), dict(loss="adv"), dict(padding=1), dict(flip=False), dict(reset_every=3), dict(learning_rate=[[0, 0.05]])):
        with pytest.raises(ValueError, match="other settings"):
            train_atta(Hard(), digits.images, digits.labels, state=state, **SETTINGS | change)
    assert state.read_bytes() == before


@pytest.mark.parametrize("loss, step", [("trades", 4), ("adv", 6), ("normal", 5)])
def test_a_gradient_that_is_not_finite_is_never_saved(loss, step, digits, tmp_path):
    state, poisoned, calls, settings = tmp_path / "state", Hard(), [], SETTINGS | {"loss": loss}

    def poison(gradient):
        calls.append(0)
        return gradient * math.nan if len(calls) == step else gradient

    poisoned.body[-1].weight.register_hook(poison)
    with pytest.raises(FloatingPointError, match=f"by step {step}: lower the learning rate"):
        train_atta(poisoned, digits.images, digits.labels, state=state, save_every=0, **settings)
    tensors, header = load_tensors(state)
    assert header["step"] == step - 1 and not list_broken(tensors)
    good, resumed = Hard(), Hard()
    train_atta(good, digits.images, digits.labels, **settings), train_atta(resumed, digits.images, digits.labels, state=state, **settings)
    assert same(good, resumed)


def test_a_network_of_the_same_weights_with_another_pooling_is_another_run(digits, tmp_path):
    state, settings, images = tmp_path / "state", dict(epochs=1, batch_size=6, learning_rate=[[0, 0.01]]), F.pad(digits.images[:12], (2, 2, 2, 2))
    train_atta(SmallCNN(generator=make_generator(0)), images, digits.labels[:12], state=state, **settings)
    for model, those in (SmallCNN(pooling="avg", generator=make_generator(0)), images), (SmallCNN(generator=make_generator(0)), 1 - images):
        with pytest.raises(ValueError, match="on other images or of another network"):
            train_atta(model, those, digits.labels[:12], state=state, **settings | {"epochs": 2})


BAD = [
    (dict(images=lambda x: x * 255), "divide by 255"), (dict(labels=lambda y: y + 10), "below 10"), (dict(loss="mat"), "choose one of normal, adv, trades"),
    (dict(batch_size=0), "batch_size"), (dict(inner_steps=0), "inner_steps"), (dict(epochs=1.5), "epochs"), (dict(padding=-1), "padding"), (dict(reset_every=-1), "reset_every"),
    (dict(eps="8"), "8/255"), (dict(beta=-1), "beta"), (dict(beta=math.nan), "beta"), (dict(inner_step_size=0), "inner_step_size"), (dict(inner_step_size="x"), "inner_step_size"),
    (dict(learning_rate=[]), "learning_rate"), (dict(learning_rate=[[1, 0.1]]), "begin at epoch 0"), (dict(learning_rate=[[0, -1.]]), "learning_rate"), (dict(seed=-1), "seed"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[message for _, message in BAD])
def test_bad_input_is_refused_before_the_first_step(change, message, digits):
    good = dict(images=digits.images, labels=digits.labels, **SETTINGS)
    for name, value in change.items():
        good[name] = value(good[name]) if callable(value) else value
    net = Hard()
    with pytest.raises(ValueError) as error:
        train_atta(net, good.pop("images"), good.pop("labels"), **good)
    assert message in one_line(error) and same(net, Hard())


# --- the experiment ------------------------------------------------------------------------------------------------------

def test_the_params_file_names_parameters_of_run_atta():
    known = house.parameter_names(house.read(house.ROOT / "nbs/experiments/run_atta.ipynb"))
    blocks = yaml.safe_load((house.ROOT / "nbs/experiments/params/interpretgan.yaml").read_text(encoding="utf-8"))["atta"]
    unknown = {name for dataset in blocks.values() for block in dataset.values() for name in block} - set(known)
    assert not unknown and {"robust", "natural"} <= set(blocks["mnist"])
    silent = [f"{dataset} {name}" for dataset, of in blocks.items() for name, block in of.items() if "evaluate_images" not in block]
    assert not silent, f"the notebook's own evaluate_images is for the smoke test: {silent} must name theirs"


def test_losses_in_lower_precision_look_at_wide_logits():
    "Two almost equal predictions: their divergence is small, and never below 0."
    from robustint.classifiers import make_classifier
    from robustint.core import lower_precision

    model, x = make_classifier("smallcnn", channels=1, classes=10, generator=make_generator(0)).eval(), torch.rand(64, 1, 32, 32, generator=make_generator(1))
    y, near = torch.arange(64) % 10, (x + 0.01 * torch.randn(x.shape, generator=make_generator(2))).clamp(0, 1)
    with lower_precision("bfloat16"), torch.no_grad():
        natural, trades = LOSSES["normal"]().loss(model, x, near, y), LOSSES["trades"](6.0).loss(model, x, near, y)
        assert model(x).dtype == torch.bfloat16 and natural.dtype == trades.dtype == torch.float32
        assert (trades - natural >= -1e-6).all()

"""The training loop and the ten methods: what they compute, and that a kill at any moment loses nothing."""
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from networks import Hard

from robustint import pgd as pgd_module
from robustint import training
from robustint.attributions import integrated_gradients
from robustint.checks import check_range
from robustint.core import make_generator
from robustint.data import load_dataset
from robustint.discrepancy import soft_discrepancy
from robustint.interpreters import cams
from robustint.models import Small, fold, make_model
from robustint.objectives import METHODS, Pair, attribution_norm, make_method
from robustint.training import RandomStarts, Team, borrowed_chance, digest_tensors, find_perturbed, list_broken, piecewise, ramp, train
from robustint.zoo import load_tensors, save_tensors

SETTINGS = dict(epochs=2, batch_size=20, learning_rate=[[0, 1e-3]], eps=0.1, eps_ramp=(3, 8), inner_steps=2, inner_step_size=0.05)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits").subset(range(200))


def fresh(architecture="small"):
    return make_model(architecture, channels=1, generator=make_generator(0))


def pair(seed=0):
    images = torch.rand(6, 1, 28, 28, generator=make_generator(seed))
    perturbed = (images + 0.2 * torch.rand(images.shape, generator=make_generator(seed + 1)) - 0.1).clamp(0, 1)
    return images, perturbed, torch.arange(6)


def losses(name, network, **options):
    images, perturbed, labels = pair()
    return make_method(name, **options).loss(network, images, perturbed, labels)


def test_there_are_the_ten_methods_of_table_1():
    assert [m.title for m in list(METHODS.values())[:10]] == ["Normal", "Adv", "TRADES", "IG-Norm", "IG-Norm-Sum", "Int-one-class", "Int", "Int-Adv", "Int2", "Int2-Adv"]


def test_every_outer_loss_is_the_protocols():
    """Each loss again, written out from the table of objectives with the plain network and the maps of the interpreters."""
    network, (images, perturbed, labels) = fresh(), pair()
    clean, adversarial = (F.cross_entropy(network(x), labels, reduction="none") for x in (images, perturbed))
    probabilities = network(images).softmax(1)
    kl = (probabilities * (network(images).log_softmax(1) - network(perturbed).log_softmax(1))).sum(1)
    before, after = (cams(network, x, divide_by_positions=False) for x in (images, perturbed))
    d = 2 * soft_discrepancy(before, after, network(perturbed), labels)
    one = (before - after)[range(6), labels].abs().sum((1, 2))
    r = attribution_norm(Pair(network, images, labels, perturbed))
    expected = {"normal": clean, "adv": adversarial, "trades": clean + kl, "ig_norm": clean + r, "ig_norm_sum": adversarial + r,
                "int_one_class": clean + 0.01 * one, "int": clean + 0.01 * d, "int_adv": adversarial + 0.01 * d,
                "int2": clean + 0.01 * d, "int2_adv": adversarial + 0.01 * d}
    assert set(expected) == set(METHODS) - {"int_ig"}
    for name, value in expected.items():
        torch.testing.assert_close(losses(name, fold(network)), value, atol=1e-4, rtol=1e-4, msg=name)


def test_int_with_integrated_gradients_is_eq_9_with_their_maps():
    "The maps of all classes by Captum's way of counting: x times the mean gradient over five points, added up as in eq. 7."
    network, (images, perturbed, labels) = fresh(), pair()
    maps = [torch.stack([integrated_gradients(network, x, c, steps=5, differentiable=True) for c in range(10)], 1).flatten(2, 3) for x in (images, perturbed)]
    d = soft_discrepancy(*maps, network(perturbed), labels)
    expected = F.cross_entropy(network(images), labels, reduction="none") + 0.98 * d
    torch.testing.assert_close(losses("int_ig", fold(network), gamma=0.98, normalisation="paper"), expected, atol=1e-4, rtol=1e-4)


def test_attribution_norm_is_the_sum_over_five_points_one_by_one():
    network, (images, perturbed, labels) = fresh(), pair()
    total = torch.zeros_like(images)
    for k in range(1, 6):
        z = (images + k / 5 * (perturbed - images)).requires_grad_()
        total += torch.autograd.grad(F.cross_entropy(network(z), labels), z)[0] / 5
    expected = ((perturbed - images) * total).abs().sum((1, 2, 3))
    torch.testing.assert_close(attribution_norm(Pair(fold(network), images, labels, perturbed)), expected, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("architecture, channels, side", [("small", 1, 28), ("pool", 1, 12), ("wresnet", 3, 8)])
def test_the_stem_apart_changes_neither_the_attribution_norm_nor_its_gradients(architecture, channels, side):
    "Folded, the points are mixed after the stem; unfolded, they are images. In double precision, by points and by weights."
    network = make_model(architecture, channels=channels, generator=make_generator(0)).double().eval()
    images, end = torch.rand(2, 3, channels, side, side, generator=make_generator(1), dtype=torch.float64)
    end, labels = end.requires_grad_(), torch.tensor([0, 1, 2])
    assert fold(network).stem(images).shape != images.shape, "there is a stem"
    values = [attribution_norm(Pair(form, images, labels, end)) for form in (network, fold(network))]
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-12)
    slopes = [torch.autograd.grad(value.sum(), [end, *network.parameters()], allow_unused=True) for value in values]
    assert slopes[0][0].abs().max() > 0 and slopes[0][1].abs().max() > 0
    for plain, apart in zip(*slopes): torch.testing.assert_close(plain, apart, rtol=1e-7, atol=1e-12)


def test_gamma_in_both_scales():
    network = fresh()
    for name, positions in (("int", 98), ("int_one_class", 49)):
        code, paper = losses(name, network, gamma=0.01), losses(name, network, gamma=0.01 * positions, normalisation="paper")
        torch.testing.assert_close(code, paper, rtol=1e-5, atol=1e-6)
        literal = losses(name, network, gamma=0.01, normalisation="paper") - losses("normal", network)
        torch.testing.assert_close((code - losses("normal", network)) / literal, torch.full((6,), float(positions)), rtol=0.02, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(name, digits):
    model = fresh()
    log = train(model, digits.images, digits.labels, make_method(name), **SETTINGS)
    assert [e["epoch"] for e in log] == [1, 2] and all(math.isfinite(e["loss"]) for e in log)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), fresh().parameters()))
    assert all(p.grad is None for p in model.parameters())


def test_perturbed_images_stay_in_the_ball(digits):
    images, labels = digits.images[:10], digits.labels[:10]
    for name in METHODS:
        perturbed = find_perturbed(fresh(), images, labels, make_method(name), eps=0.1, steps=3, step_size=0.3, generator=make_generator(0))
        assert (perturbed - images).abs().max() <= 0.1 + 1e-6 and perturbed.min() >= 0 and perturbed.max() <= 1
        assert torch.equal(perturbed, images) == (name == "normal")
        assert find_perturbed(fresh(), images, labels, make_method(name), eps=0, steps=3, step_size=0.3) is images


def test_schedules():
    assert [round(ramp(s, 2000, 10_000, 0.3), 6) for s in (0, 1999, 2000, 6000, 10_000, 10**6)] == [0, 0, 0, 0.15, 0.3, 0.3]
    assert [piecewise(s, [[0, 1e-3], [40_000, 1e-4], [60_000, 1e-5]]) for s in (0, 39_999, 40_000, 59_999, 60_000)] == [1e-3, 1e-3, 1e-4, 1e-4, 1e-5]


def test_the_log_follows_the_schedules_and_the_evaluation(digits):
    log = train(fresh(), digits.images, digits.labels, make_method("adv"), **SETTINGS | {"learning_rate": [[0, 1e-3], [15, 1e-4]]},
                evaluate=lambda model: {"share": 0.5 if not model.training else 1.0})
    assert [e["learning_rate"] for e in log] == [1e-3, 1e-4] and log[-1]["eps"] == pytest.approx(0.1)
    assert [e["step"] for e in log] == [10, 20] and all(e["share"] == 0.5 for e in log)


def test_another_seed_gives_another_network(digits):
    nets = []
    for seed in (0, 0, 1):
        nets.append(fresh())
        train(nets[-1], digits.images, digits.labels, make_method("adv"), seed=seed, **SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters()))
    assert not all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[2].parameters()))


def stop_at(step, call):
    "Run a training that is killed before its step of that number."
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        real, steps = training._take_step, []

        def stopping(*arguments):
            steps.append(0)
            if len(steps) > step:
                raise KeyboardInterrupt
            return real(*arguments)

        patch.setattr(training, "_take_step", stopping)
        call()


@pytest.mark.parametrize("stop", [1, 7, 10, 13])
def test_a_run_stopped_at_any_step_ends_with_the_same_bits(stop, digits, tmp_path):
    unbroken, broken, state = fresh(), fresh(), tmp_path / "state.safetensors"
    expected = train(unbroken, digits.images, digits.labels, make_method("int"), **SETTINGS)
    stop_at(stop, lambda: train(broken, digits.images, digits.labels, make_method("int"), state=state, save_every=0, **SETTINGS))
    broken, elsewhere = fresh(), tmp_path / "elsewhere" / "copied.safetensors"
    elsewhere.parent.mkdir()
    shutil.move(state, elsewhere) # a state may be copied away and back, to another machine too
    assert elsewhere.stat().st_size < 2.5e6
    log = train(broken, digits.images, digits.labels, make_method("int"), state=elsewhere, **SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(unbroken.parameters(), broken.parameters()))
    assert [e["loss"] for e in log] == [e["loss"] for e in expected]


@pytest.mark.full
def test_a_compiled_run_that_was_stopped_ends_with_the_same_bits(digits, tmp_path):
    given, settings = (digits.images, digits.labels, make_method("adv")), SETTINGS | {"inner_steps": 5, "compiled": True}
    unbroken, state = fresh(), tmp_path / "state.safetensors"
    train(unbroken, *given, **settings)
    stop_at(13, lambda: train(fresh(), *given, state=state, save_every=0, **settings))
    torch._dynamo.reset() # as in another process
    pgd_module._compile_step.cache_clear()
    broken = fresh()
    train(broken, *given, state=state, **settings)
    assert all(torch.equal(a, b) for a, b in zip(unbroken.parameters(), broken.parameters()))


# --- what a loop may be given --------------------------------------------------------------------------------------------

def sgd(parameters):
    return torch.optim.SGD(parameters, momentum=0.9, nesterov=True)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("options", [{}, {"optimiser": sgd, "drop_last": False}], ids=["adam", "sgd and a partial batch"])
@pytest.mark.parametrize("stop", [1, 9, 13])
def test_dropout_belongs_to_the_run(options, stop, digits, tmp_path):
    "The caller draws in between, and the network drops what it would have dropped."
    given = (digits.images[:190], digits.labels[:190], make_method("adv"))
    unbroken, resumed, state, before = Hard(), Hard(), tmp_path / "state.safetensors", torch.get_rng_state()
    expected = train(unbroken, *given, **SETTINGS, **options)
    assert torch.equal(before, torch.get_rng_state())
    stop_at(stop, lambda: train(Hard(), *given, state=state, save_every=0, **SETTINGS, **options))
    torch.rand(7)
    log = train(resumed, *given, state=state, **SETTINGS, **options)
    assert same(unbroken, resumed) and [e["loss"] for e in log] == [e["loss"] for e in expected]


def test_borrowed_chance_is_given_back():
    before = torch.get_rng_state()
    draws = []
    for seed in (0, 0, 1):
        with pytest.raises(KeyError), borrowed_chance(make_generator(seed)):
            draws.append(torch.rand(5))
            raise KeyError
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("drop_last, steps, images", [(True, 3, 180), (False, 4, 200)])
def test_the_last_batch_is_left_out_or_taken(drop_last, steps, images, digits):
    seen = []

    class Counting(RandomStarts):
        def take(self, index):
            seen.extend(index.tolist())
            return super().take(index)

    log = train(fresh(), digits.images, digits.labels, make_method("normal"), source=Counting, drop_last=drop_last, **SETTINGS | {"batch_size": 60, "epochs": 1})
    assert log[-1]["step"] == steps and len(seen) == len(set(seen)) == images


def test_a_partial_batch_counts_by_its_share(digits):
    "At a rate of almost nothing the mean over batches is the mean over images."
    network, still = fresh(), SETTINGS | {"batch_size": 60, "epochs": 1, "learning_rate": [[0, 1e-12]]}
    log = train(network, digits.images, digits.labels, make_method("normal"), drop_last=False, **still)
    assert log[0]["loss"] == pytest.approx(F.cross_entropy(fresh()(digits.images), digits.labels).item(), rel=1e-5)


def test_a_batch_may_be_larger_than_the_set_where_partial_ones_are_taken(digits):
    assert train(fresh(), digits.images, digits.labels, make_method("normal"), drop_last=False, **SETTINGS | {"batch_size": 500})[-1]["step"] == 2


def test_the_loop_asks_its_source_and_keeps_what_it_holds(digits, tmp_path):
    """A source that remembers the mean of each image's last climb: it is asked in order, its numbers are in the log, its tensors in the state."""
    asked = []

    class Remembering(RandomStarts):
        def __init__(self, images, seed):
            super().__init__(images, seed)
            self.kept, self.settings = {"means": torch.zeros(len(images))}, {"source": "remembering"}

        def begin(self, epoch):
            asked.append(("begin", epoch))

        def take(self, index):
            asked.append("take")
            return self.images[index], index

        def start(self, place, images, ball):
            asked.append(("start", ball.eps))
            return images

        def keep(self, place, images, perturbed):
            asked.append("keep")
            assert torch.equal(images, self.images[place]) and (perturbed - images).abs().max() <= 0.1 + 1e-6
            self.kept["means"][place] = perturbed.mean((1, 2, 3))
            return {"brightness": perturbed.mean().item()}

    settings, state = SETTINGS | {"batch_size": 100, "eps_ramp": (1, 2)}, tmp_path / "state"
    log = train(fresh(), digits.images, digits.labels, make_method("adv"), source=Remembering, state=state, **settings)
    assert asked == [("begin", 0), "take", "keep", "take", "keep", ("begin", 1), "take", ("start", 0.1), "keep", "take", ("start", 0.1), "keep"]
    means = load_tensors(state)[0]["source.means"]
    assert log[-1]["brightness"] == pytest.approx(means.mean().item(), rel=1e-5) and set(log[0]) == {"epoch", "step", "eps", "learning_rate", "loss", "brightness", "seconds", "threads"}
    with pytest.raises(ValueError, match="other settings"):
        train(fresh(), digits.images, digits.labels, make_method("adv"), state=state, **settings)


def test_random_starts_are_the_sources_own(digits):
    "Zero steps of attack leave the start: the loop's first batch is attacked at a point drawn from the seed alone."
    reached = []

    class Looking(RandomStarts):
        def keep(self, place, images, perturbed):
            reached.append((images, perturbed))
            return {}

    train(fresh(), digits.images, digits.labels, make_method("adv"), source=Looking, **SETTINGS | {"inner_steps": 0, "eps_ramp": (0, 0), "epochs": 1}, seed=3)
    images, perturbed = reached[0]
    noise = torch.rand(images.shape, generator=make_generator(4))
    assert torch.equal(perturbed, (images + 0.1 * (2 * noise - 1)).clamp(0, 1))


def test_what_decides_the_numbers_is_in_the_fingerprint(digits, tmp_path):
    "Another optimiser, another rule for the last batch, other maps: each is another run. The usual ones are not named, so that older states stay good."
    known = set()
    changes = [{}, {"optimiser": torch.optim.Adam}, {"optimiser": sgd}, {"optimiser": lambda p: torch.optim.SGD(p, momentum=0.5)},
               {"optimiser": lambda p: torch.optim.Adam(p, betas=(0.5, 0.9))}, {"drop_last": False}, {"seed": 1}]
    for i, change in enumerate(changes):
        train(fresh(), digits.images, digits.labels, make_method("normal"), state=tmp_path / str(i), **SETTINGS | {"epochs": 1, "batch_size": 200, "eps_ramp": (0, 0)} | change)
        known.add(load_tensors(tmp_path / str(i))[1]["fingerprint"])
    assert len(known) == len(changes) - 1 and "0751b662382d9f17" in known  # Adam by name is the default; the number was written down before the loop had a source
    assert training._describe_method(make_method("int")) != training._describe_method(make_method("int_ig"))


def test_a_resumed_bar_begins_where_the_run_stood(digits, tmp_path, monkeypatch):
    state, told = tmp_path / "state", tmp_path / "progress.json"
    stop_at(13, lambda: train(fresh(), digits.images, digits.labels, make_method("normal"), state=state, save_every=0, **SETTINGS))
    monkeypatch.setenv("ROBUSTINT_PROGRESS", str(told))
    real, words = training._take_step, []

    def looking(*arguments):
        words.append(json.loads(told.read_text())["done"])
        return real(*arguments)

    monkeypatch.setattr(training, "_take_step", looking)
    train(fresh(), digits.images, digits.labels, make_method("normal"), state=state, **SETTINGS)
    assert words[0] == 13 and len(words) == 7 and json.loads(told.read_text())["done"] == 20


def test_more_epochs_go_on_from_a_finished_run(digits, tmp_path):
    state, longer = tmp_path / "state.safetensors", SETTINGS | {"epochs": 3}
    in_one, in_two = fresh(), fresh()
    train(in_one, digits.images, digits.labels, make_method("adv"), **longer)
    train(in_two, digits.images, digits.labels, make_method("adv"), state=state, **SETTINGS)
    train(in_two, digits.images, digits.labels, make_method("adv"), state=state, **longer)
    assert all(torch.equal(a, b) for a, b in zip(in_one.parameters(), in_two.parameters()))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_state(digits, tmp_path):
    state, model = tmp_path / "state.safetensors", fresh()
    train(model, digits.images, digits.labels, make_method("normal"), state=state, **SETTINGS)
    before = state.read_bytes()

    class Exploding:
        inner = outer = ()
        gamma = normalisation = None
        def climb(self, *_): return None
        def loss(self, network, images, *_): return network(images).sum(1) * math.inf

    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        train(fresh(), digits.images, digits.labels, Exploding(), state=tmp_path / "other.safetensors", **SETTINGS)
    with pytest.raises(ValueError, match="other settings"):
        train(fresh(), digits.images, digits.labels, make_method("adv"), state=state, **SETTINGS)
    assert state.read_bytes() == before and load_tensors(state)[1]["step"] == 20


@pytest.mark.parametrize("save_every, step, saved", [(0, 6, 5), (0, 10, 9), (None, 20, 10)])
def test_a_gradient_that_is_not_finite_is_never_saved(save_every, step, saved, digits, tmp_path):
    "The loss of the poisoned step is finite: only the weights after it show what happened."
    state, poisoned, calls, good = tmp_path / "state", fresh(), [], fresh()

    def poison(gradient):
        calls.append(0)
        return gradient * math.nan if len(calls) == step else gradient

    next(poisoned.parameters()).register_hook(poison)
    arguments = (digits.images, digits.labels, make_method("adv"))
    with pytest.raises(FloatingPointError, match=f"by step {step}: lower the learning rate.*last saved state is intact"):
        train(poisoned, *arguments, state=state, save_every=save_every, evaluate=lambda model: {"finite": not list_broken(model.state_dict())}, **SETTINGS)
    tensors, header = load_tensors(state)
    assert header["step"] == saved and not list_broken(tensors)
    resumed = fresh()
    train(good, *arguments, **SETTINGS), train(resumed, *arguments, state=state, **SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(good.parameters(), resumed.parameters()))


def test_without_a_state_too_a_lost_network_is_said(digits):
    model = fresh()
    next(model.parameters()).register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FloatingPointError, match="NaN or infinite by step 1"):
        train(model, digits.images, digits.labels, make_method("normal"), **SETTINGS | {"epochs": 1, "batch_size": 200})


def test_the_state_of_another_problem_is_refused_and_an_older_one_is_known(digits, tmp_path):
    state, method = tmp_path / "state", make_method("normal")
    train(make_model("small", channels=1, generator=make_generator(0)), digits.images, digits.labels, method, state=state, **SETTINGS)
    before, others = state.read_bytes(), {"images": (1 - digits.images, digits.labels), "labels": (digits.images, digits.labels.flip(0)), "order": (digits.images.flip(0), digits.labels)}
    for images, labels in others.values():
        with pytest.raises(ValueError, match="on other images or of another network: delete it"):
            train(fresh(), images, labels, method, state=state, **SETTINGS)
    with pytest.raises(ValueError, match="of another network"):
        train(fresh("pool"), digits.images, digits.labels, method, state=state, **SETTINGS)
    assert state.read_bytes() == before
    tensors, header = load_tensors(state)
    header.pop("problem")  # as it was written before it had one
    save_tensors(state, tensors, header)
    assert len(train(fresh(), digits.images, digits.labels, method, state=state, **SETTINGS)) == 2


def test_a_digest_tells_tensors_apart():
    images = torch.rand(300, 1, 32, 32, generator=make_generator(0)).round(decimals=2)
    images[:, :, :4], images[:, :, :, :4] = 0, 0  # a frame, as padded digits have it
    digests = {digest_tensors({"x": x}, 4096) for x in (images, 1 - images, images.flip(0), images.flip(3), images[:299], images.half(), images.round())}
    assert len(digests) == 7 and digest_tensors({"x": images.clone()}, 4096) in digests
    assert digest_tensors({"x": images.contiguous(memory_format=torch.channels_last)}, 4096) in digests, "where it lies in memory says nothing"
    changed = images.clone()
    changed[7, 0, 9, 9] += 0.001
    assert digest_tensors({"x": changed}) != digest_tensors({"x": images})


@pytest.mark.parametrize("interval, good, bad", [("[0, 1)", (0, 0.5), (1, -0.1)), ("(0, inf)", (1e-9, 5), (0, math.inf)), ("[0, 1]", (0, 1), (1.1, math.nan)), ("[0, inf)", (0, 7), (None, "1"))])
def test_ranges_of_settings(interval, good, bad):
    for value in good:
        check_range(interval, fade=value)
    for value in bad:
        with pytest.raises(ValueError) as error:
            check_range(interval, weight=1e-3, fade=value)
        assert str(error.value) == f"fade must be a number in {interval}; got {value!r}"


BAD = [
    (dict(images=lambda x: x * 255), "divide by 255"), (dict(labels=lambda y: y + 10), "below 10"), (dict(labels=lambda y: y.double()), "whole numbers"),
    (dict(images=lambda x: x.expand(-1, 3, -1, -1)), "3 channels"), (dict(batch_size=500), "batch_size"), (dict(eps="8"), "8/255"),
    (dict(epochs=-1), "epochs"), (dict(epochs=1.5), "epochs must be a whole number"), (dict(inner_steps=-1), "inner_steps"), (dict(batch_size=0), "batch_size must be a whole number"), (dict(learning_rate=[[0, -1.0]]), "learning_rate"), (dict(learning_rate=[]), "learning_rate"),
    (dict(compiled="no"), "compiled must be True or False"), (dict(save_every="x"), "save_every must be"), (dict(seed=1.5), "seed must be a whole number"), (dict(seed=-1), "seed must"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[f"{m}{i}" for i, (_, m) in enumerate(BAD)])
def test_bad_input_is_refused_before_the_first_step(change, message, digits):
    good = dict(images=digits.images, labels=digits.labels, **SETTINGS)
    for name, value in change.items():
        good[name] = value(good[name]) if callable(value) else value
    model = fresh()
    with pytest.raises(ValueError) as error:
        train(model, good.pop("images"), good.pop("labels"), make_method("normal"), **good)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh().parameters()))


def test_what_cannot_evaluate_is_refused_before_the_first_epoch(digits):
    with pytest.raises(TypeError, match="evaluate must be a function"):
        train(fresh(), digits.images, digits.labels, make_method("normal"), **SETTINGS | {"evaluate": 3})


PROGRAM = """
import sys
from robustint.core import make_generator, make_record, write_record
from robustint.data import load_dataset
from robustint.models import make_model
from robustint.objectives import make_method
from robustint.training import train
from robustint.zoo import save_checkpoint
import torch
torch.set_num_threads(1)
folder = sys.argv[1]
digits, model = load_dataset("digits").subset(range(200)), make_model("small", channels=1, generator=make_generator(0))
log = train(model, digits.images, digits.labels, make_method("adv"), state=folder + "/state.safetensors", save_every=0.0, epochs=12, batch_size=20,
            learning_rate=[[0, 1e-3]], eps=0.1, eps_ramp=(3, 8), inner_steps=5, inner_step_size=0.05)
save_checkpoint(folder + "/network.safetensors", model, dataset="digits", method="adv", seed=0, parameters={})
losses = [e["loss"] for e in log]
write_record(make_record("run", notebook="test", parameters={}, seed=0, n=200, seconds=0.0, device="cpu", metrics={"losses": losses}), folder)
"""


@pytest.mark.full
def test_a_run_killed_twenty_times_ends_with_the_same_network_and_record(tmp_path):
    from robustint.core import read_record, sha256

    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(folder):
        folder.mkdir(exist_ok=True)
        return subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder)], env=environment, stderr=subprocess.DEVNULL)

    began = time.monotonic()
    assert start(quiet).wait() == 0
    whole, chance, kills = time.monotonic() - began, random.Random(0), 0
    while kills < 20:
        run = start(killed)
        while not (killed / "state.safetensors").exists() and run.poll() is None and kills == 0:
            time.sleep(0.02)  # the first kill comes after some work was done
        time.sleep(chance.uniform(0.2, 1.0) * whole)
        if run.poll() is None:
            kills += 1
            os.kill(run.pid, signal.SIGKILL)
        run.wait()
        if (killed / "run.json").exists():  # finished between two kills: begin again
            for path in killed.iterdir():
                path.unlink()
        for path in killed.glob("*.safetensors"):
            load_tensors(path)  # whatever stands there is whole
    assert start(killed).wait() == 0
    assert sha256(quiet / "network.safetensors") == sha256(killed / "network.safetensors")
    a, b = (read_record(folder / "run.json") for folder in (quiet, killed))
    assert json.dumps(a["metrics"]) == json.dumps(b["metrics"])
    assert not list(killed.glob(".*.tmp"))


# --- several processes -------------------------------------------------------------------------------------------------

def train_in_a_team(rank, size, port, folder, name):
    "One of the processes that `accelerate launch` would start."
    import os

    from accelerate import Accelerator
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    images, labels = load_dataset("digits").images[:35], load_dataset("digits").labels[:35]
    model = Small(1, 10, generator=make_generator(0))
    log = train(model, images, labels, make_method(name), epochs=1, batch_size=35, learning_rate=[[0, 1.0]], eps=0.1, eps_ramp=(0, 0), inner_steps=2, inner_step_size=0.05, optimiser=torch.optim.SGD,
                accelerator=Accelerator(cpu=True) if size > 1 else None, state=f"{folder}/{size}.state" if size > 1 else None)
    torch.save({"weights": [p.detach() for p in model.parameters()], "loss": log[-1]["loss"]}, f"{folder}/{size}-{rank}")


@pytest.mark.parametrize("name", ["adv", pytest.param("int", marks=pytest.mark.full), pytest.param("ig_norm", marks=pytest.mark.full)])
def test_two_processes_train_as_one(name, tmp_path):
    "One step of rate 1, so that the weights differ by as much as the gradients."
    import socket
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    train_in_a_team(0, 1, port, tmp_path, name)
    torch.multiprocessing.spawn(train_in_a_team, args=(2, port, tmp_path, name), nprocs=2)
    one, first, second = (torch.load(tmp_path / f"{end}") for end in ("1-0", "2-0", "2-1"))
    begun = list(Small(1, 10, generator=make_generator(0)).parameters())
    assert abs(one["loss"] - first["loss"]) < 1e-6 and first["loss"] == second["loss"]
    for a, b, c, start in zip(one["weights"], first["weights"], second["weights"], begun):
        assert torch.equal(b, c) and not torch.equal(a, start)
        assert (a - b).abs().max() < 1e-6


@pytest.mark.parametrize("name", METHODS)
def test_the_shares_of_a_batch_make_the_gradient_of_the_batch(name):
    "In double precision, without processes: what a team adds up is what one process finds."
    network, method = make_model("small", channels=1, generator=make_generator(0)).double(), make_method(name)
    images, perturbed, labels = (part.double() if part.is_floating_point() else part for part in pair())
    def gradient(*shares):
        given = {"whole": len(images)} if method.needs_whole else {}
        total = sum(method.loss(network, images[share], perturbed[share], labels[share], **given).sum() for share in shares) / len(images)
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, network.parameters())])
    whole, shared = gradient(slice(None)), gradient(slice(0, 4), slice(4, 6))
    assert (whole - shared).abs().max() < 1e-12 * whole.abs().max().clamp(min=1)
    if method.needs_whole: # and the climb likewise
        climbs = [method.climb(network, images[share], labels[share], whole=6)(perturbed[share]) for share in (slice(None), slice(0, 4), slice(4, 6))]
        assert torch.allclose(climbs[0], torch.cat(climbs[1:]))


def test_a_batch_that_is_too_small_for_the_team_is_refused():
    class Three:
        num_processes, process_index = 3, 0
    with pytest.raises(ValueError, match="fewer"):
        Team(Three).share(2)


@pytest.mark.parametrize("wrong, message", [
    (dict(method="adv"), "make_method"), (dict(learning_rate=1e-3), "pairs"), (dict(learning_rate=[(0, 0.1), (20, 0.2), (10, 0.3)]), "in order"), (dict(eps_ramp=None), "two steps"),
    (dict(eps_ramp=(8, 3)), "start <= stop"), (dict(eps_ramp=(1, 2, 3)), "two steps"), (dict(optimiser=torch.optim.Adam([torch.zeros(1)])), "function of the parameters"), (dict(inner_step_size=-0.05), "0 or more")])
def test_the_first_mistakes_are_answered_in_one_line(wrong, message, digits):
    given = SETTINGS | wrong
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        train(fresh(), digits.images, digits.labels, given.pop("method", make_method("adv")), **given)
    assert "\n" not in str(caught.value)


def test_maps_are_asked_of_networks_that_have_them(digits):
    with pytest.raises(ValueError, match="Int compares class activation maps, which Sequential has not.*int_ig"):
        train(torch.nn.Sequential(fresh()), digits.images, digits.labels, make_method("int"), **SETTINGS)


def test_a_run_that_ends_before_its_attack_begins_says_so(digits, recwarn):
    given = digits.images[:40].clone().requires_grad_(), digits.labels[:40]
    short = SETTINGS | {"eps_ramp": (4, 8)}
    train(fresh(), *given, make_method("adv"), **short) # 2 epochs of 2 steps
    assert "4 steps end before the attack begins, at step 4" in str(recwarn.pop(UserWarning).message)
    train(fresh(), *given, make_method("normal"), **short)
    train(fresh(), *given, make_method("trades"), **SETTINGS)
    assert not [warning for warning in recwarn if "attack begins" in str(warning.message)] and given[0].grad is None


@pytest.mark.parametrize("name, sides", [("adv", 1), ("ig_norm_sum", 1), ("trades", 2), ("int2", 2), ("normal", 1)])
def test_the_outer_loss_passes_the_clean_side_only_where_a_term_reads_it(name, sides):
    images, labels = torch.rand(3, 1, 12, 12, generator=make_generator(0)), torch.tensor([0, 1, 2])
    network, seen = make_model("small", channels=1, generator=make_generator(1)), []
    plain, maps = network.forward, network.logits_and_cams
    network.forward = lambda x: (seen.append(len(x)), plain(x))[1]
    network.logits_and_cams = lambda x: (seen.append(len(x)), maps(x))[1]
    perturbed = images if name == "normal" else images.flip(3)
    make_method(name).loss(network, images, perturbed, labels)
    assert seen[-1] == (5 * 3 if name == "ig_norm_sum" else sides * 3) and seen[0] == sides * 3

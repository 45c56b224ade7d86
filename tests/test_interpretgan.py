"""InterpretGAN: the bound of Appendix B, layers tapped in one pass, Tables 4 and 5, training, ablation, inversion, files."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustint.classifiers import SmallCNN, VGG16, split
from robustint.core import make_generator
from robustint.interpretgan import (COMPRESSION, Compression, check_layers, explain, explain_layers, explanation_feed, information_bound, interpretability_term, load_explainers,
                                    make_explainers, mutual_information, name_layers, save_explainers, table_filters, tap_layers, train_explainers)
from robustint.progan import Diverged
from robustint.zoo import save_tensors

LAYERS = {"Conv1": "1", "FC1": "3", "FC2": ""}
SHORT = dict(widths=(6, 4), steps=(4, 10), batch_size=8, every=2)


def classifier(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(108, 12), nn.Dropout(0.5), nn.Linear(12, 4))


@pytest.fixture(scope="module")
def images():
    return torch.rand(40, 1, 8, 8, generator=make_generator(9))


def joint_of_a_discrete_case(seed, inputs=7, classes=3, explanations=4, temperature=4.0):
    "p(e, y) where y ~ f(x) and e is a stochastic explanation of x."
    chance = make_generator(seed)
    p_x = torch.rand(inputs, generator=chance, dtype=torch.float64).softmax(0)
    f = (temperature * torch.randn(inputs, classes, generator=chance, dtype=torch.float64)).softmax(1)
    shown = (temperature * torch.randn(inputs, explanations, generator=chance, dtype=torch.float64)).softmax(1)
    return p_x, f, shown, torch.einsum("x,xy,xe->ey", p_x, f, shown)


@pytest.mark.parametrize("seed", range(8))
def test_the_bound_holds_for_every_q_and_is_reached_by_the_posterior(seed):
    p_x, f, shown, joint = joint_of_a_discrete_case(seed)
    information, posterior = mutual_information(joint), joint / joint.sum(1, keepdim=True)
    torch.testing.assert_close(information_bound(joint, posterior), information)
    chance = make_generator(seed + 100)
    for spread in (0.1, 1.0, 5.0):
        q = (posterior.log() + spread * torch.randn(4, 3, generator=chance, dtype=torch.float64)).softmax(1)
        gap = information - information_bound(joint, q)
        kl = (joint * (posterior / q).log()).sum()
        assert gap > 0
        torch.testing.assert_close(gap, kl)  # the gap is the divergence that the derivation leaves out
    expected = torch.einsum("x,xe,xy,ey->", p_x, shown, f, q.log())
    torch.testing.assert_close(torch.special.xlogy(joint, q).sum(), expected)  # eq. 3, an expectation over inputs
    assert 0 <= information <= mutual_information(p_x[:, None] * f) + 1e-12 <= math.log(3) + 1e-9


def test_mutual_information_in_closed_form():
    assert mutual_information(torch.eye(4) / 4).item() == pytest.approx(math.log(4), rel=1e-5)
    apart = torch.tensor([0.2, 0.8])[:, None] * torch.tensor([0.5, 0.3, 0.2])
    assert mutual_information(apart).item() == pytest.approx(0, abs=1e-6)
    assert information_bound(torch.eye(2) / 2, torch.eye(2)).item() == pytest.approx(math.log(2))


def test_the_term_is_a_cross_entropy_with_soft_labels_least_at_the_prediction_itself():
    logits = torch.randn(5, 4, generator=make_generator(0))
    soft = torch.randn(5, 4, generator=make_generator(1)).softmax(1)
    torch.testing.assert_close(interpretability_term(logits, soft), F.cross_entropy(logits, soft, reduction="none"))
    at = soft.log().requires_grad_()
    gradient, = torch.autograd.grad(interpretability_term(at, soft).sum(), at)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0)


def test_all_layers_in_one_pass_equal_the_cuts(images):
    model, calls = classifier().train(), []
    model[0].register_forward_hook(lambda *_: calls.append(0))
    logits, latents = tap_layers(model, images[:3], LAYERS)
    assert len(calls) == 1 and model.training and all(len(m._forward_hooks) == (m is model[0]) for m in model.modules())
    model.eval()
    torch.testing.assert_close(latents["Conv1"], model[:2](images[:3]))
    torch.testing.assert_close(latents["FC1"], model[:4](images[:3]))
    torch.testing.assert_close(latents["FC2"], model(images[:3]).softmax(1))
    assert not any(latent.requires_grad for latent in latents.values())
    with pytest.raises(RuntimeError):
        tap_layers(model, images[:3, :, :4], LAYERS)
    for bad, layers, message in (images * 255, LAYERS, "divide by 255"), (images, {"a": "nowhere"}, "no module for a .'nowhere'."), (images, ["1"], "write name_layers"):
        with pytest.raises(ValueError, match=message):
            tap_layers(model, bad, layers)
    assert all(len(m._forward_hooks) == (m is model[0]) for m in model.modules()), "a hook survived an error"


@pytest.mark.parametrize("model", [SmallCNN(generator=make_generator(0)), VGG16(classes=2, width=2, generator=make_generator(0))], ids=["smallcnn", "vgg16"])
def test_the_chains_of_the_house_are_tapped_where_they_are_cut(model):
    model.eval()
    x = torch.rand(2, model.image_channels, 32, 32, generator=make_generator(1))
    for title, latent in tap_layers(model, x, name_layers(model))[1].items():
        torch.testing.assert_close(latent, split(model, title)[0](x))


def test_table_4_of_the_paper():
    model, wanted = SmallCNN(generator=make_generator(0)).eval(), COMPRESSION["mnist"]
    assert list(name_layers(model)) == list(wanted)
    explainers = make_explainers(model, name_layers(model), torch.rand(1, 1, 32, 32), widths=(8, 4, 4, 4), filters={k: [c // 16 for c in v] for k, v in wanted.items()}, generator=make_generator(0))
    shapes = {title: (e.compression.shape, len(e.compression.convolutions), e.compression.dense.weight.shape[1]) for title, e in explainers.items()}
    assert shapes == {"Conv1": ((32, 30, 30), 3, 16 * 9), "Conv2": ((32, 14, 14), 2, 8 * 9), "Conv3": ((64, 12, 12), 2, 16 * 9), "Conv4": ((64, 5, 5), 0, 1600),
                      "FC1": ((200,), 0, 200), "FC2": ((200,), 0, 200), "FC3": ((10,), 0, 10)}
    assert all(images.shape == (3, 1, 32, 32) for images in explain_layers(model, torch.rand(3, 1, 32, 32), explainers).values())


def test_table_5_of_the_paper_ends_at_the_generators_first_map():
    for (block, filters), shape in zip(list(COMPRESSION["celeba"].items())[:5], [(4, 64, 64), (8, 32, 32), (16, 16, 16), (32, 8, 8), (32, 4, 4)]):
        net = Compression(shape, [k // 16 for k in filters], 32, generator=make_generator(0))
        assert net.dense is None and net(torch.zeros(2, *shape)).shape == (2, 32, 4, 4), block


def test_the_classifier_is_left_as_it_was_and_the_term_reaches_the_explainer_alone(images):
    model = classifier().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    feed = explanation_feed(model, LAYERS)
    fed = feed(images[:8], None)
    assert set(fed) == set(LAYERS)
    drawn = torch.rand(8, 1, 8, 8, requires_grad=True)
    fed["Conv1"][1](drawn).backward()
    assert drawn.grad.abs().sum() > 0 and all(p.grad is None for p in model.parameters()) and model.training
    train_explainers(model, LAYERS, images, **SHORT)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_term_by_scale_and_without_weight(images):
    model = classifier().eval()
    small = torch.rand(8, 1, 4, 4)
    term = explanation_feed(model, LAYERS, weight=2.0)(images[:8], None)["FC1"][1]
    expected = 2 * interpretability_term(model(F.interpolate(small, size=8)), model(images[:8]).softmax(1)).mean()
    torch.testing.assert_close(term(small), expected.detach())
    assert explanation_feed(model, LAYERS, first_scale=1)(images[:8], None)["FC1"][1](small).item() == 0
    assert explanation_feed(model, LAYERS, weight=0.0)(images[:8], None)["FC1"][1] is None


def test_side_by_side_and_resumed_in_the_middle_of_a_fade(images, tmp_path):
    model, state = classifier(), tmp_path / "state.safetensors"

    def stop(players, step, scale, alpha):
        if step == 8:
            raise KeyboardInterrupt
        return {}

    whole, log = train_explainers(model, LAYERS, images, **SHORT)
    with pytest.raises(KeyboardInterrupt):
        train_explainers(model, LAYERS, images, state=state, observe=stop, **SHORT)
    again, resumed = train_explainers(model, LAYERS, images, state=state, **SHORT)
    for title in LAYERS:
        assert all(torch.equal(a, b) for a, b in zip(whole[title].state_dict().values(), again[title].state_dict().values()))
        assert [e[title] for e in log] == [e[title] for e in resumed]
    for other in ({"weight": 0.0}, {"invert": True}, {"first_scale": 1}, {"seed": 1}):
        with pytest.raises(ValueError, match="other settings"):
            train_explainers(model, LAYERS, images, state=state, **SHORT | other)
    before, marked = state.read_bytes(), classifier()
    marked.recipe = {"pooling": "avg"}  # the same weights, another network
    for those, shown in (classifier(1), images), (marked, images), (classifier(), 1 - images):
        with pytest.raises(ValueError, match="other settings"):
            train_explainers(those, LAYERS, shown, state=state, **SHORT)
    assert state.read_bytes() == before


def test_lambda_0_has_no_term_and_inversion_learns_the_image(images):
    model = classifier()
    _, log = train_explainers(model, LAYERS, images, weight=0.0, **SHORT)
    assert all(entry[title]["term"] == 0 for entry in log for title in LAYERS)
    smooth = F.interpolate(torch.rand(40, 1, 2, 2, generator=make_generator(3)), size=8, mode="bilinear")
    inverters, log = train_explainers(model, {"Conv1": "1"}, smooth, invert=True, widths=(8, 6), steps=(30, 90), batch_size=16, every=30, learning_rate=0.01, averaging=0.9)
    assert log[-1]["Conv1"]["generator"] < 0.5 * smooth.var(0).mean() and log[-1]["Conv1"]["critic"] == 0
    assert not any("critic" in name for name in inverters["Conv1"].state_dict())


def test_a_classifier_that_returns_nan_is_a_divergence(images, tmp_path):
    model = classifier()
    model[5].bias.data.fill_(math.nan)
    with pytest.raises(Diverged, match="Conv1 diverged before step 2.*term"):
        train_explainers(model, {"Conv1": "1"}, images, state=tmp_path / "s.safetensors", **SHORT)
    assert not (tmp_path / "s.safetensors").exists()


def test_explanations_are_images_the_same_one_by_one_or_together(images):
    model = classifier().eval()
    explainers = make_explainers(model, LAYERS, images, widths=(6, 4), generator=make_generator(0))
    together = explain_layers(model, images, explainers, batch_size=7)
    for title in LAYERS:
        alone = explain(model, title, images[:5], explainers=explainers)
        torch.testing.assert_close(alone, together[title][:5])
        assert alone.min() >= 0 and alone.max() <= 1 and not alone.requires_grad
    assert explain_layers(model, images[:2], explainers, scale=0)["FC1"].shape == (2, 1, 4, 4)


def test_colour_images_and_any_torch_classifier(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    images = torch.rand(12, 3, 16, 16, generator=make_generator(0))
    explainers, _ = train_explainers(model, {"maps": "1", "answer": ""}, images, widths=(4, 4, 4), filters={"maps": (4, 4)}, steps=(2, 2, 2), batch_size=4, every=2)
    path = save_explainers(tmp_path / "e.safetensors", explainers, classifier="any")
    again, header = load_explainers(path)
    assert header["classifier"] == "any"
    a, b = (explain_layers(model, images[:3], those) for those in (explainers, again))
    assert all(torch.equal(a[title], b[title]) and a[title].shape == (3, 3, 16, 16) for title in a)


class Branches(nn.Module):
    "No chain: a residual block with one ReLU for both places, a branch that returns a tuple, a head that no pass comes to."

    def __init__(self):
        super().__init__()
        self.first, self.second, self.relu = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True)
        self.pool, self.rows, self.head, self.spare = nn.MaxPool2d(2, return_indices=True), nn.GRU(12, 5, batch_first=True), nn.Linear(20, 4), nn.Linear(20, 4)

    def forward(self, x):
        before = self.relu(self.first(x))
        after = self.relu(before + self.second(before))
        pooled, _ = self.pool(after)  # (N, 3, 4, 4)
        rows, _ = self.rows(pooled.transpose(1, 2).flatten(2))  # (N, 4, 5)
        return self.head(rows.flatten(1))


@pytest.fixture(scope="module")
def branches():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Branches().eval()


def test_a_classifier_that_is_no_chain_is_explained(branches, images):
    layers = {"first": "first", "second": "second", "head": "head", "answer": ""}
    logits, latents = tap_layers(branches, images[:4], layers)
    first = branches.first(images[:4])
    torch.testing.assert_close(latents["first"], first)  # as it was before the ReLU, which works in place
    torch.testing.assert_close(latents["second"], branches.second(first.relu()))
    torch.testing.assert_close(latents["head"], logits)
    explainers, log = train_explainers(branches, layers, images, **SHORT)
    assert log[-1]["step"] == 14 and all(e.shape == (3, 1, 8, 8) for e in explain_layers(branches, images[:3], explainers).values())


NO_LAYER = {"relu": "module of it runs more than once in a pass", "pool": "module of it returns a tuple and not a tensor", "rows": "returns a tuple", "spare": "module of it does not run when the classifier reads an image"}


@pytest.mark.parametrize("name", NO_LAYER)
def test_a_module_that_is_no_layer_is_refused_at_the_door_and_at_every_pass(name, branches, images):
    layers, there = {"first": "first", "it": name}, make_explainers(branches, {"first": "first"}, images, widths=(6, 4), generator=make_generator(0))
    there["it"] = there["first"]
    there["it"].module = name
    attempts = (lambda: tap_layers(branches, images, layers), lambda: make_explainers(branches, layers, images, widths=(6, 4)), lambda: table_filters(branches, layers, images, "mnist"),
                lambda: explain(branches, "it", images, explainers=there), lambda: explanation_feed(branches, layers)(images[:8], None),
                lambda: train_explainers(branches, layers, images, observe=lambda *_: pytest.fail("a step was taken"), **SHORT))
    for attempt in attempts:
        with pytest.raises(ValueError, match=NO_LAYER[name]) as error:
            attempt()
        assert "\n" not in str(error.value)
    assert not any(module._forward_hooks for module in branches.modules()), "a hook survived an error"


BAD_SETTINGS = [(dict(widths=(6, 4, 4)), "has 3 scales, and steps are given for 2"), (dict(widths=(6,)), "has 1 scales"), (dict(widths=()), "name no scale"), (dict(first_scale=2), "one of the 2 scales"),
                (dict(first_scale=-1), "one of the 2 scales"), (dict(weight=-1.0), "weight"), (dict(weight=math.nan), "weight"), (dict(averaging=1.0), "averaging"), (dict(fade=3.0), "fade"),
                (dict(learning_rate=-1.0), "learning_rate"), (dict(penalty=-5.0), "penalty"), (dict(steps=(1.5, 2)), "steps.0."), (dict(layers=["FC1"]), "write name_layers"), (dict(layers={}), "no layer is named"),
                (dict(invert=True, averaging=2.0), "averaging"), (dict(loss="standart"), "choose one of standard")]


@pytest.mark.parametrize("change, message", BAD_SETTINGS)
def test_settings_that_train_something_else_are_refused_before_the_first_step(change, message, images):
    settings = dict(layers=LAYERS, observe=lambda *_: pytest.fail("a step was taken")) | SHORT | change
    with pytest.raises(ValueError, match=message) as error:
        train_explainers(classifier(), settings.pop("layers"), images, **settings)
    assert "\n" not in str(error.value)


def test_a_layer_with_maps_that_a_table_does_not_know_is_refused():
    model, image = SmallCNN(generator=make_generator(0)).eval(), torch.rand(1, 1, 32, 32)
    layers = name_layers(model)
    assert table_filters(model, layers, image, "mnist") == COMPRESSION["mnist"]
    assert table_filters(model, layers, image, "mnist", divide=1000) == {title: (1,) * len(filters) for title, filters in COMPRESSION["mnist"].items()}
    assert table_filters(model, {"mine": layers["FC1"], "FC3": ""}, image, "celeba") == {"mine": (), "FC3": ()}  # vectors: a linear layer is all there can be
    for tables, divide, message in ("celeba", 1, "for the maps of Conv1, Conv2, Conv3, Conv4: choose"), ("minst", 1, "choose one of mnist, celeba"), ("mnist", 0, "divide must be"):
        with pytest.raises(ValueError, match=message) as error:
            table_filters(model, layers, image, tables, divide=divide)
        assert "\n" not in str(error.value)


def test_explainers_of_another_network_are_refused(images):
    model, other = classifier(), nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(180, 12), nn.Dropout(0.5), nn.Linear(12, 4))
    explainers = make_explainers(model, LAYERS, images, widths=(6, 4), generator=make_generator(0))
    attempts = {"activations of shape .3, 6, 6. and this classifier gives .5, 6, 6.": lambda: explain(other, "Conv1", images, explainers=explainers),
                "draws images of shape .1, 8, 8.; got .1, 28, 28.": lambda: explain(model, "Conv1", torch.rand(2, 1, 28, 28), explainers=explainers),
                "scale must be a number in .0, 1.; got 9": lambda: explain_layers(model, images, explainers, scale=9), "scale must be a whole number": lambda: explain_layers(model, images, explainers, scale=-1),
                "alpha must be a number in": lambda: explain_layers(model, images, explainers, alpha=5.0), "batch_size must be a whole number": lambda: explain_layers(model, images, explainers, batch_size=0)}
    for message, attempt in attempts.items():
        with pytest.raises(ValueError, match=message) as error:
            attempt()
        assert "\n" not in str(error.value)


def test_what_is_no_distribution_is_refused():
    joint = torch.eye(2) / 4 + 0.125
    attempts = {"guess must be .* in each row": lambda: information_bound(joint, torch.ones(2, 2)), "joint must be .* got a sum of 2": lambda: mutual_information(torch.ones(2, 2) / 2),
                "guess and joint must have one shape": lambda: information_bound(joint, torch.ones(3, 2) / 2), "joint must be": lambda: mutual_information(torch.tensor([[1.5, -0.5]]))}
    for message, attempt in attempts.items():
        with pytest.raises(ValueError, match=message):
            attempt()


def test_bad_input_is_refused_in_one_line(images, tmp_path):
    model = classifier()
    explainers = make_explainers(model, LAYERS, images, widths=(6, 4), generator=make_generator(0))
    attempts = {"no module for nowhere": lambda: check_layers(model, {"nowhere": "77"}), "no layer is named": lambda: check_layers(model, {}),
                "choose one of Conv1": lambda: explain(model, "Conv7", images, explainers=explainers), "divide by 255": lambda: explain(model, "Conv1", images * 255, explainers=explainers),
                "16x16": lambda: train_explainers(model, LAYERS, images, widths=(4, 4, 4), steps=(1, 1, 1), batch_size=4), "choose among": lambda: name_layers(SmallCNN(), ["Conv9"]),
                "linear layer alone": lambda: Compression((12,), (4,), 4),
                "holds no explainers": lambda: load_explainers(save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, {}))}
    for message, attempt in attempts.items():
        with pytest.raises(ValueError, match=message) as error:
            attempt()
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        load_explainers(tmp_path / "none.safetensors")

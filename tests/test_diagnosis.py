"""The diagnosis: eq. 5 telescopes, intervals, pooling indices, Figure 7, sanity rows, bad input."""
import json

import pytest
import torch
from torch import nn

from robustint.core import make_generator
from robustint import diagnosis
from robustint.diagnosis import (FACE_REGIONS, changed_pooling_indices, diagnose, drift_rows, layer_hits, list_changes, locate_changes, measure_change, misclassification_matrix, over_seeds, paired_interval, read_images, read_layers, region_masks, sanity_rows, show_matrix, vulnerabilities,
                                 within_class_distance)
from robustint.evaluation import wilson_interval
from robustint.interpretgan import explain_layers, make_explainers


def hits(shares, n=500, seed=0):
    chance = make_generator(seed)
    return {f"layer {i}": torch.rand(n, generator=chance) < share for i, share in enumerate(shares)}


@pytest.fixture(scope="module")
def case():
    "A classifier with max pooling, its explainers, images and labels."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = [nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 4)).eval() for _ in range(2)]
    images = torch.rand(30, 1, 8, 8, generator=make_generator(1))
    explainers = make_explainers(models[0], {"Conv1": "2", "FC1": ""}, images, widths=(6, 4), generator=make_generator(2))
    return models[0], models[1], explainers, images, torch.arange(30) % 4


@pytest.mark.parametrize("seed", range(4))
def test_eq_5_telescopes(seed):
    shares = torch.rand(6, generator=make_generator(seed)).tolist()
    rows = vulnerabilities(hits(shares, seed=seed))
    assert sum(row["vulnerability"] for row in rows) == pytest.approx(1 - rows[-1]["accuracy"], abs=1e-12)
    assert rows[0]["vulnerability"] == pytest.approx(1 - rows[0]["accuracy"])
    for before, row in zip(rows, rows[1:]):
        assert row["vulnerability"] == pytest.approx(before["accuracy"] - row["accuracy"])
    for row in rows:
        for key in ("accuracy", "vulnerability"):
            assert row[f"{key}_low"] <= row[key] <= row[f"{key}_high"]
    low, high = wilson_interval(int(hits(shares, seed=seed)["layer 0"].sum()), 500)
    assert (rows[0]["vulnerability_low"], rows[0]["vulnerability_high"]) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize("values", [[True] * 9, [False] * 9])
def test_rows_at_the_ends(values):
    rows = vulnerabilities({"a": torch.tensor(values), "b": ~torch.tensor(values)})
    for row in rows:
        assert -1 <= row["vulnerability_low"] <= row["vulnerability"] <= row["vulnerability_high"] <= 1
        assert 0 <= row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] <= 1


def test_the_paired_interval_by_hand_and_by_trial():
    before = torch.tensor([True] * 60 + [False] * 40)
    after = torch.cat([before[:45], ~before[45:60], before[60:95], ~before[95:]])  # 15 lost, 5 won
    n, d = 102, 10 / 102
    half = 1.959964 * ((15 + 5 + 1 - 100 / n) / n**2) ** 0.5
    assert paired_interval(before, after) == pytest.approx((d - half, d + half), abs=1e-5)
    chance, covered = make_generator(0), 0
    for _ in range(400):
        a = torch.rand(200, generator=chance) < 0.8
        b = torch.where(torch.rand(200, generator=chance) < 0.85, a, ~a)  # share 0.8 * 0.85 + 0.2 * 0.15 = 0.71
        low, high = paired_interval(a, b)
        covered += low <= 0.09 <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_over_seeds_is_the_mean_with_a_wider_interval():
    tables = [vulnerabilities(hits((0.9, 0.5, 0.6), seed=seed)) for seed in range(3)]
    rows = over_seeds(tables)
    for i, row in enumerate(rows):
        assert row["accuracy"] == pytest.approx(sum(table[i]["accuracy"] for table in tables) / 3)
        assert row["vulnerability"] == pytest.approx(sum(table[i]["vulnerability"] for table in tables) / 3)
        assert row["vulnerability_low"] <= row["vulnerability"] <= row["vulnerability_high"] and row["seeds"] == 3
    assert rows[2]["vulnerability"] < 0
    with pytest.raises(ValueError, match="two seeds"):
        over_seeds(tables[:1])
    with pytest.raises(ValueError, match="different layers"):
        over_seeds([tables[0], tables[1][:2]])


def test_hits_are_the_judges_reading_of_the_explanations(case):
    model, other, explainers, images, labels = case
    shown = explain_layers(model, images, explainers)
    for judge in (None, other):
        found = layer_hits(model, explainers, images, labels, judge=judge)
        for layer, right in found.items():
            assert torch.equal(right, (judge or model)(shown[layer]).argmax(1) == labels)


def test_pooling_indices_counted_one_by_one(case):
    model, _, _, images, _ = case
    other = (images + 0.2 * torch.randn(images.shape, generator=make_generator(5))).clamp(0, 1)
    share = changed_pooling_indices(model, images, other)
    assert list(share) == ["2"] and share["2"].shape == (30,) and 0 < share["2"].mean() < 1
    maps = [model[:2](x) for x in (images, other)]
    windows = [m.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).argmax(4) for m in maps]
    assert torch.equal(share["2"], (windows[0] != windows[1]).flatten(1).double().mean(1))
    assert changed_pooling_indices(model, images, images)["2"].sum() == 0 and not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match="nn.MaxPool2d"):
        changed_pooling_indices(nn.Sequential(nn.AvgPool2d(2)), images, other)
    with pytest.raises(ValueError, match="one shape"):
        changed_pooling_indices(model, images, other[:3])


def test_misclassification_matrix_and_its_picture():
    labels, answers = torch.randint(4, (200,), generator=make_generator(0)), torch.randint(4, (200,), generator=make_generator(1))
    counts, shares = misclassification_matrix(labels, answers, 4)
    for i in range(4):
        for j in range(4):
            assert counts[i, j] == (0 if i == j else ((labels == i) & (answers == j)).sum())
    assert torch.allclose(shares.sum(1), torch.ones(4)) and counts.sum() == (labels != answers).sum()
    assert misclassification_matrix(labels, labels, 4)[1].sum() == 0
    figure = show_matrix(shares, names=list("abcd"), caption="n = 200")
    assert figure.axes[0].get_xlabel() == "read as" and len(figure.axes[0].texts) == (shares > 0).sum()


def test_within_class_distance():
    images, labels = torch.rand(12, 1, 4, 4, generator=make_generator(0)), torch.tensor([0] * 5 + [1] * 6 + [2])
    found = within_class_distance(images, labels)
    assert list(found) == [0, 1]
    pairs = [(images[i] - images[j]).norm() for i in range(5) for j in range(i)]
    assert found[0] == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-5)


def test_sanity_rows(case):
    model, other, explainers, images, labels = case
    shown, read = explain_layers(model, images, explainers), read_images(model, images)
    for row in sanity_rows(model, explainers, images, labels, independent=other):
        pictures = shown[row["layer"]]
        assert row["agreement"] == pytest.approx((model(pictures).argmax(1) == read).double().mean().item())
        assert row["independent_agreement"] == pytest.approx((other(pictures).argmax(1) == read).double().mean().item())
        assert row["natural_accuracy"] == pytest.approx((model(pictures).argmax(1) == labels).double().mean().item())
        assert all(row[f"{key}_low"] <= row[key] <= row[f"{key}_high"] for key in ("agreement", "independent_agreement", "natural_accuracy")) and row["distance_ratio"] >= 0
    assert "independent_agreement" not in sanity_rows(model, explainers, images, labels)[0]


def test_a_diagnosis_is_plain_values_and_whole(case):
    model, other, explainers, images, labels = case
    attacked = (images + 0.3 * torch.randn(images.shape, generator=make_generator(7))).clamp(0, 1)
    found = diagnose(model, explainers, images, attacked, labels, classes=4, independent=other)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["robust_accuracy"] == pytest.approx((model(attacked).argmax(1) == labels).double().mean().item())
    assert sum(map(sum, found["misclassified"])) == round(30 * (1 - found["robust_accuracy"])) and list(found["pooling_changed"]) == ["2"]
    assert sum(row["vulnerability"] for row in found["layers"]) == pytest.approx(1 - found["layers"][-1]["accuracy"])


@pytest.mark.parametrize("side", [8, 32, 100, 128])
def test_the_regions_of_a_face_share_out_all_pixels(side):
    masks = region_masks(side, FACE_REGIONS)
    assert list(masks) == [*FACE_REGIONS, "elsewhere"]
    assert torch.stack(list(masks.values())).sum(0).eq(1).all(), "each pixel lies in one region"
    if side == 128:
        left, top, right, bottom = FACE_REGIONS["eyes"]
        assert masks["eyes"].double().mean().item() == pytest.approx((right - left) * (bottom - top), abs=0.005)
        for name, mask in masks.items(): assert name == "elsewhere" or torch.equal(mask, mask.flip(1)), "the boxes are symmetric"


def test_a_change_is_found_where_it_was_made():
    masks, chance = region_masks(16, {"left": (0, 0, 0.5, 1), "corner": (0.5, 0.5, 1, 1)}), make_generator(0)
    before = torch.rand(20, 3, 16, 16, generator=chance) / 2
    for name, mask in masks.items():
        found = measure_change(before, before + 0.25 * mask, masks)
        assert torch.allclose(found[name], torch.ones(20)) and torch.allclose(found["change"], 0.25 * mask.float().mean().expand(20), atol=1e-6)
    noise = measure_change(before, torch.rand(before.shape, generator=chance), masks)
    assert torch.allclose(sum(noise[name] for name in masks), torch.ones(20), atol=1e-6), "the shares sum to one"
    still = measure_change(before, before, masks)
    assert still["change"].eq(0).all() and still["left"].isnan().all()


@pytest.mark.parametrize("batch_size", [30, 29, 7, 1])
def test_changes_of_the_explanations_by_hand(case, batch_size):
    model, _, explainers, images, _ = case
    attacked = (images + 0.3 * torch.randn(images.shape, generator=make_generator(7))).clamp(0, 1)
    rows = locate_changes(model, explainers, images, attacked, regions={"left": (0, 0, 0.5, 1)}, batch_size=batch_size)
    assert [row["layer"] for row in rows[::4]] == ["image", *explainers] and json.loads(json.dumps(rows, allow_nan=False)) == rows
    before, after = ({"image": x} | explain_layers(model, x, explainers) for x in (images, attacked))
    moved = read_images(model, images) != read_images(model, attacked)
    for row in rows:
        chosen = moved if row["over"] == "read otherwise" else torch.ones_like(moved)
        assert row["n"] == chosen.sum() and row["low"] <= row["change"] <= row["high"]
        if row["against"] == "attack":
            difference = (before[row["layer"]] - after[row["layer"]]).abs()[chosen].mean(1)
            assert row["change"] == pytest.approx(difference.mean().item(), rel=1e-5)
            assert row["regions"]["left"]["share"] == pytest.approx((difference[..., :4].sum((1, 2)) / difference.sum((1, 2))).mean().item(), rel=1e-4)
        else:  # the image before it, whatever the size of a batch
            difference = (before[row["layer"]] - before[row["layer"]].roll(1, 0)).abs()[chosen]
            assert row["change"] == pytest.approx(difference.mean().item(), rel=1e-5)
        assert sum(at["share"] for at in row["regions"].values()) == pytest.approx(1) and sum(at["area"] for at in row["regions"].values()) == 1
    listed = list_changes(rows)
    assert len(listed) == len(rows) + len(rows) // 2 + 2 * len(rows), "a change or difference, a quotient for each change, and two regions a row"
    for row in listed: assert row["low"] <= row["value"] <= row["high"]


@pytest.mark.parametrize("n, batch_size", [(30, 30), (30, 29), (30, 28), (3, 2), (2, 1)], ids=["rest 0", "rest 1", "rest 2", "rest 1 of 3", "one at a time"])
def test_no_image_is_compared_with_itself(case, n, batch_size):
    model, _, explainers, images, _ = case
    whole, parts = (locate_changes(model, explainers, images[:n], images[:n], batch_size=size) for size in (n, batch_size))
    for a, b in zip(whole, parts):
        assert a["n"] == b["n"] and a["change"] == (b["change"] if b["change"] is None else pytest.approx(b["change"], rel=1e-5))
        assert a["against"] == "attack" or a["over"] != "all" or a["change"] > 0
    with pytest.raises(ValueError, match="give two or more"):
        locate_changes(model, explainers, images[:1], images[:1])


def test_nothing_changed_and_nobody_moved(case):
    model, _, explainers, images, _ = case
    rows = locate_changes(model, explainers, images, images, regions=FACE_REGIONS)
    whole = [row for row in rows if row["against"] == "attack" and row["over"] == "all"]
    assert all(row["change"] == 0 and row["regions"]["eyes"]["share"] is None for row in whole)
    assert all(row["n"] == 0 and row["change"] is None for row in rows if row["over"] == "read otherwise")
    assert {row["quantity"] for row in list_changes(rows)} == {"change", "difference", "change / difference", "difference here / everywhere"}
    assert all(not row["regions"] for row in locate_changes(model, explainers, images, images))


def test_an_image_that_was_wrong_before_the_attack_was_not_brought_anywhere():
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    natural = torch.tensor([0, 0, 2, 2, 1, 1])  # the third and the fourth are wrong by themselves
    answers = torch.tensor([3, 3, 3, 2, 1, 0])  # all but the fifth are wrong under attack
    row, = drift_rows({"FC": torch.tensor([0, 3, 3, 2, 1, 2])}, labels, answers, natural)
    assert (row["n"], row["already_wrong"]) == (3, 2) and [row[name] for name in ("as_true", "as_wrong", "as_other")] == pytest.approx([1 / 3] * 3)
    row, = drift_rows({"FC": labels}, labels, natural, natural)
    assert (row["n"], row["already_wrong"], row["as_true"], row["as_other"]) == (0, 2, 0, 0) and (row["as_true_low"], row["as_true_high"]) == (0, 1)


@pytest.mark.parametrize("labels", [torch.arange(4), torch.tensor([0, 1, 2, 2])], ids=["none", "one class"])
def test_a_class_of_one_image_has_no_distance_and_the_rows_fit_a_record(case, labels):
    model, other, explainers, images, _ = case
    rows = sanity_rows(model, explainers, images[:4], labels, independent=other)
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert all((row["distance"] is None) == (row["distance_ratio"] is None) == (labels.max() == 3) for row in rows)


def test_a_diagnosis_holds_no_more_pictures_than_it_needs(case, monkeypatch):
    "A batch of all layers, or all images of one layer, never all images of all layers."
    model, other, explainers, images, labels = case
    asked, real = [], explain_layers

    def looking(model, images, explainers, **options):
        asked.append((len(images), len(explainers)))
        return real(model, images, explainers, **options)

    monkeypatch.setattr(diagnosis, "explain_layers", looking)
    diagnose(model, explainers, images, images, labels, classes=4, independent=other, batch_size=7)
    assert max(n for n, layers in asked if layers > 1) == 7 and sum(n for n, layers in asked if layers > 1) == 30 and asked.count((30, 1)) == len(explainers)
    layer_hits(model, explainers, images, labels)


@pytest.mark.parametrize("batch_size", [30, 7, 1])
def test_each_reader_reads_every_explanation(case, batch_size):
    model, other, explainers, images, _ = case
    shown = explain_layers(model, images, explainers)
    for reader, read in zip((model, other), read_layers(model, explainers, images, model, other, batch_size=batch_size)):
        assert list(read) == list(explainers) and all(torch.equal(read[layer], reader(shown[layer]).argmax(1)) for layer in explainers)


def test_readers_know_the_same_classes(case):
    model, _, explainers, images, labels = case
    three = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    attempts = [lambda: diagnose(model, explainers, images, images, labels, classes=4, independent=three), lambda: sanity_rows(model, explainers, images, labels, independent=three),
                lambda: layer_hits(model, explainers, images, labels, judge=three), lambda: diagnose(model, explainers, images, images, labels, classes=5)]
    for attempt in attempts:
        with pytest.raises(ValueError, match="give a classifier trained on the same classes") as error:
            attempt()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("batch_size", [8, 7, 30])
def test_a_diagnosis_in_parts_is_the_same(case, batch_size):
    model, other, explainers, images, labels = case
    attacked = (images + 0.3 * torch.randn(images.shape, generator=make_generator(7))).clamp(0, 1)
    whole, parts = (diagnose(model, explainers, images, attacked, labels, classes=4, independent=other, batch_size=n) for n in (500, batch_size))
    assert {key: value for key, value in whole.items() if key not in ("sanity", "pooling_changed")} == {key: value for key, value in parts.items() if key not in ("sanity", "pooling_changed")}
    assert parts["pooling_changed"]["2"] == pytest.approx(whole["pooling_changed"]["2"])


def test_bad_input_is_refused_in_one_line(case):
    model, _, explainers, images, labels = case
    attempts = {"one shape": lambda: diagnose(model, explainers, images, images[:4], labels, classes=4), "divide by 255": lambda: layer_hits(model, explainers, images * 255, labels),
                "as many as the images": lambda: sanity_rows(model, explainers, images, labels[:3]), "below 4": lambda: misclassification_matrix(labels + 1, labels, 4),
                "as many, one or more": lambda: paired_interval(torch.tensor([True]), torch.tensor([True, False])), "[0,1]": lambda: read_images(model, images - 1),
                "fractions of the side": lambda: region_masks(8, {"left": (0, 0, 4, 8)}), "natural and adversarial must": lambda: locate_changes(model, explainers, images, images[:4])}
    for message, attempt in attempts.items():
        with pytest.raises(ValueError) as error:
            attempt()
        assert message in str(error.value) and "\n" not in str(error.value)

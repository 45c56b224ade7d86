"""The numbers and sentences of the InterpretGAN tables, from records made up by hand: every expected cell is worked out here."""
import csv
import json

import numpy
import pandas
import pytest
from house import ROOT
from test_notebooks import execute_here

from robustint.core import make_record, write_record
from robustint.diagnosis_tables import compare_diagnoses, describe_training, group_diagnoses, make_banner, summarise_diagnoses, summarise_matrices, tell_verdicts
from robustint.evaluation import seed_interval, wilson_interval
from robustint.plans import read_params
from robustint.pooling_tables import add_printed, compare_poolings, difference_interval, judge_poolings, write_poolings
from robustint.reproduce import plan


def write(job, folder, metrics, n=1000, **more):
    write_record(make_record(job.name, notebook=job.notebook, parameters=job.parameters | more, seed=job.parameters.get("seed", 0), n=n, seconds=1, device="cpu", metrics=metrics), folder)


def read_table(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# --- Table 3: max against average pooling ------------------------------------------------------------------------------

CORRECT = {("vgg16", "max"): (400, 410, 420), ("vgg16", "avg"): (430, 440, 450), ("wrn", "max"): (300, 300, 300), ("wrn", "avg"): (310, 310, 310)}  # of 1,000, by seed


@pytest.fixture(scope="module")
def table3(tmp_path_factory):
    "The report of Table 3 at the shortened scale, from made-up records: VGG16 of width 16 and WRN-10-1."
    folder = tmp_path_factory.mktemp("table3")
    jobs = plan("interpretgan_table3", scale="short", weights=["trained"])[0]
    networks = {job.name: job.parameters for job in jobs if job.notebook == "run_atta"}
    assert {"cifar10-vgg16_max_w16-trades-eps0.031-s0", "cifar10-wrn_max_w1_d10-trades-eps0.031-s0"} <= set(networks)
    for job in jobs:
        if job.notebook == "run_atta":
            write(job, folder / "records", {"steps": 4 * 704}, inner_step_size=0.015)
        else:
            made = networks[job.parameters["train_id"]]
            right = CORRECT[made["architecture"], made["pooling"]][made["seed"]]
            write(job, folder / "records", {"cells": [{"epsilon": 0.031, "eps": 0.031, "correct": right, "n": 1000}], "clean_accuracy": 0.6})
    execute_here(ROOT / "nbs/experiments/interpretgan_table3.ipynb", folder, scale="short")
    return folder / "figures"


def test_table3_is_made_where_our_networks_are_smaller(table3):
    rows = {(row["model"], row["pooling"], row["attack"]): row for row in read_table(table3 / "interpretgan_table3.csv")}
    ours, printed = rows["VGG16 (width 16)", "avg", "PGD-20"], rows["VGG16", "avg", "PGD-20"]
    assert (ours["paper"], ours["ours"], ours["n"], ours["seeds"]) == ("", "0.44000", "1000", "3")
    assert (printed["paper"], printed["ours"], printed["low"], printed["n"], printed["seeds"], printed["weights"]) == ("0.48250", "", "", "", "", "the paper's")
    assert float(rows["VGG16", "avg - max", "PGD-20"]["paper"]) == pytest.approx(0.0128) and rows["WRN-34-10", "max", "FGSM"]["paper"] == "0.57630"
    assert {row["n"] for row in rows.values()} == {"1000", ""} and {row["seeds"] for row in rows.values()} == {"3", ""}


def test_table3_shows_the_printed_accuracies_beside_ours(table3):
    text = (table3 / "interpretgan_table3.md").read_text()
    head = next(line for line in text.splitlines() if line.startswith("| attack | VGG16 (width 16), trained: max"))
    line = next(line for line in text.splitlines() if line.startswith("| PGD-20 | 41.00 ["))
    assert [cell.strip() for cell in head.split("|")][-4:-1] == [f"VGG16, the paper's: {kind}" for kind in ("max", "avg", "avg - max")]
    assert [cell.strip() for cell in line.split("|")][-4:-1] == ["(46.97)", "(48.25)", "(1.28)"]
    assert "Newcombe" in text and "chance of both" in text
    assert "CIFAR-10, VGG16, PGD-20: the paper's average - max is +1.28 points" in text


def test_table3_says_how_its_networks_differ_from_the_published_ones(table3):
    text = (table3 / "interpretgan_table3.md").read_text()
    assert "Smaller than in the paper or trained otherwise, for a CPU: VGG16 (width 16), Adversarial (ATTA-1, TRADES beta=6); WRN-10-1, Adversarial" in text
    narrow = next(line for line in text.splitlines() if line.startswith("VGG16 (width 16), Adversarial"))
    for words in ("width 16 (64)", "units of FC1 and FC2 128 (512)", "dropout 0 (0.5)", "epochs 4 (38)", "precision bfloat16 (float32)", "epochs between fresh starting points 0 (10)", "learning rate 0.05, 0.01 from epoch 2 on, 0.001 from epoch 3 on (0.1, 0.01 from epoch 30 on, 0.001 from epoch 36 on)"):
        assert words in narrow
    assert "padding" not in narrow and "mirroring" not in narrow  # as published
    assert "depth 10 (34)" in next(line for line in text.splitlines() if line.startswith("WRN-10-1, Adversarial"))


def test_the_difference_holds_the_chance_of_the_seeds_and_of_the_images(table3):
    rows = {(row["model"], row["pooling"], row["attack"]): row for row in read_table(table3 / "interpretgan_table3.csv")}
    agreeing = rows["WRN-10-1", "avg - max", "PGD-20"]  # 300, 300, 300 against 310, 310, 310: the seeds alone would give no width
    (a, b), (c, d) = wilson_interval(310, 1000), wilson_interval(300, 1000)
    expected = 0.01 - ((0.31 - a) ** 2 + (d - 0.3) ** 2) ** 0.5, 0.01 + ((b - 0.31) ** 2 + (0.3 - c) ** 2) ** 0.5
    assert (float(agreeing["ours"]), float(agreeing["low"]), float(agreeing["high"])) == pytest.approx((0.01, *expected), abs=1e-5)
    other = rows["VGG16 (width 16)", "avg - max", "PGD-20"]  # Welch: 0.03 -+ 2.7764 sqrt(2 * 0.01^2 / 3) = 0.0227; Newcombe's is wider, +-0.043
    assert float(other["ours"]) == pytest.approx(0.03) and float(other["low"]) < 0 < 0.0527 < float(other["high"])


@pytest.mark.parametrize("base, images, word", [(300, 1000, "average pooling is sturdier, and the paper's difference is excluded."), (900, 1000, "max pooling is sturdier, and the paper's difference is excluded."), (502, 1000, "not decided.")])
def test_the_sentence_of_a_pooling_follows_the_interval(base, images, word):
    cells = pandas.DataFrame([{"dataset": "MNIST", "model": "SmallCNN", "method": "Adversarial", "weights": "trained", "pooling": pooling, "attack": "PGD-40", "seed": seed, "correct": right + seed, "images": images, "clean": 0.99}
                              for pooling, right in (("max", base), ("avg", 500)) for seed in range(3)])
    table = compare_poolings(cells, "interpretgan_table2")
    assert judge_poolings(table)[1].endswith(f", the paper's +2.23: {word}")
    assert len(add_printed(table, "interpretgan_table2")) == len(table) + 9 and "(87.48)" in write_poolings(add_printed(table, "interpretgan_table2"))


def test_records_that_say_which_images_were_right_decide_more():
    "Two kinds of network that differ on 30 of 1,000 images, always for the better."
    def hits(wrong): return numpy.arange(1000) >= wrong
    cells = pandas.DataFrame([{"dataset": "MNIST", "model": "SmallCNN", "method": "Adversarial", "weights": "trained", "pooling": pooling, "attack": "PGD-40", "seed": seed, "correct": 1000 - wrong, "images": 1000, "clean": 0.99,
                               "hits": hits(wrong), "clean_hits": hits(10)} for pooling, wrong in (("max", 130), ("avg", 100)) for seed in range(2)])
    gain = lambda cells: compare_poolings(cells, "interpretgan_table2").query("pooling == 'avg - max' and attack == 'PGD-40'").iloc[0]
    matched, apart = gain(cells), gain(cells.assign(hits=None))
    assert matched["ours"] == apart["ours"] == pytest.approx(0.03)
    assert 0.015 < matched["low"] < 0.03 < matched["high"] < 0.045 and apart["low"] < 0.005


def test_different_numbers_of_images_are_refused():
    cells = pandas.DataFrame([{"dataset": "MNIST", "model": "SmallCNN", "method": "Adversarial", "weights": "trained", "pooling": pooling, "attack": "PGD-40", "seed": seed, "correct": 400, "images": images, "clean": 0.99}
                              for pooling, images in (("max", 1000), ("avg", 500)) for seed in range(2)])
    with pytest.raises(ValueError, match="1000 and 500: attack both again with the same -p images"):
        compare_poolings(cells, "interpretgan_table2")


def test_seeds_far_apart_are_wider_than_images():
    _, low, high = difference_interval([0.5, 0.9], [0.4, 0.6], 10000)
    assert high - low > 1


# --- Table 1: the layers -----------------------------------------------------------------------------------------------

LAYERS = ("Conv1", "Conv2", "FC3")


def diagnosis(acc, widths=0.02):
    "Metrics of a made-up diagnosis: Acc of three layers, shares, and intervals of one half width."
    ends = lambda key, value: {key: value, f"{key}_low": value - widths, f"{key}_high": value + widths}
    rows = [{"layer": layer, "n": 1000} | ends("accuracy", own) | ends("vulnerability", before - own) for layer, own, before in zip(LAYERS, acc, (1.0, *acc))]
    drift = [{"layer": layer, "n": 900} | ends("as_true", 0.6) | ends("as_wrong", share) | {"as_other": 0.4 - share} for layer, share in zip(LAYERS, (0.1, 0.2, 0.3))]
    sanity = [{"layer": layer, "n": 1000, "distance": 5.0, "distance_ratio": 0.8} | ends("natural_accuracy", 0.9) | ends("agreement", 0.95) | ends("independent_agreement", 0.9) for layer in LAYERS]
    return {"clean_accuracy": 0.99, "robust_accuracy": 0.1, "layers": rows, "drift": drift, "sanity": sanity, "class_names": [str(k) for k in range(10)], "image_shape": [1, 32, 32], "misclassified": [[int(i != j) for j in range(10)] for i in range(10)]}


def make_table1(folder, natural, robust):
    "Records of Table 1 at the shortened scale: lists of Acc, one a network."
    jobs = plan("interpretgan_table1", scale="short")[0]
    methods = {job.name: job.parameters for job in jobs if job.notebook == "run_atta"}
    for kind, networks in ("normal", natural), ("trades", robust):
        asked = [job for job in jobs if job.notebook == "run_diagnosis" and methods[job.parameters["train_id"]]["method"] == kind]
        for job, acc in zip(asked, networks):
            write(job, folder, diagnosis(acc))
    return jobs


def table_of(folder, natural, robust):
    return compare_diagnoses(summarise_diagnoses(group_diagnoses(make_table1(folder, natural, robust), folder)))


def test_cells_of_table1(tmp_path):
    make_table1(tmp_path / "records", [(0.5, 0.3, 0.1), (0.6, 0.3, 0.1)], [(0.9, 0.85, 0.8)])
    execute_here(ROOT / "nbs/experiments/interpretgan_table1.ipynb", tmp_path, scale="short")
    rows = {(row["method"].split(" ")[0], row["layer"], row["quantity"]): row for row in read_table(tmp_path / "figures/interpretgan_table1.csv")}
    first = rows["Natural", "Conv1", "Acc"]
    mean, low, high = seed_interval([0.5, 0.6])  # two networks: Student's over them
    assert [first[key] for key in ("paper", "ours", "n", "seeds")] == ["52.600", "55.000", "1000", "2"]
    assert (float(first["low"]), float(first["high"])) == pytest.approx((100 * max(low, 0), 100 * min(high, 1)), abs=1e-3)
    agreed, lost = rows["Natural", "Conv2", "Acc"], rows["Natural", "FC3", "Vul"]
    assert [float(agreed[key]) for key in ("paper", "ours", "low", "high")] == pytest.approx([26.3, 30, 28, 32])  # they agree: their own intervals
    assert [float(lost[key]) for key in ("paper", "ours", "low", "high")] == pytest.approx([22.8, 20, 18, 22]) and lost["since"] == "Conv2"
    alone = rows["Adversarial", "FC3", "Acc"]
    assert [float(alone[key]) for key in ("paper", "ours", "low", "high")] == pytest.approx([89.5, 80, 78, 82]) and alone["seeds"] == "1"
    text = (tmp_path / "figures/interpretgan_table1.md").read_text()
    assert '"Acc falls layer by layer in the natural network": **not decided**. From the unattacked image on, and by the interval of Vul, it falls at 1 of 3 steps, rises at 0, and 2 are not decided (Conv1, Conv2); in all 90.0 points [88.0, 92.0] are lost.' in text
    assert "read rightly before the attack and wrongly after it" in text and "gets wrong" not in text


@pytest.mark.parametrize("acc, word, numbers", [
    ((0.5, 0.3, 0.1), "holds", "falls at 3 of 3 steps, rises at 0, and 0 are not decided; in all 90.0 points [88.0, 92.0] are lost."),
    ((0.5, 0.6, 0.1), "does not hold", "falls at 2 of 3 steps, rises at 1 (Conv2), and 0 are not decided; in all 90.0 points [88.0, 92.0] are lost."),
    ((0.5, 0.49, 0.1), "not decided", "falls at 2 of 3 steps, rises at 0, and 1 is not decided (Conv2); in all 90.0 points [88.0, 92.0] are lost."),
    ((1.0, 0.5, 0.1), "not decided", "falls at 2 of 3 steps, rises at 0, and 1 is not decided (Conv1); in all 90.0 points [88.0, 92.0] are lost.")])  # nothing lost at the first layer
def test_the_first_verdict(tmp_path, acc, word, numbers):
    (said,) = tell_verdicts(table_of(tmp_path, [acc], []))
    assert said == f'MNIST, SmallCNN, trained: "Acc falls layer by layer in the natural network": **{word}**. From the unattacked image on, and by the interval of Vul, it {numbers}'


@pytest.mark.parametrize("last, word, share", [(0.95, "holds", "0.06"), (0.5, "does not hold", "0.56"), (0.78, "not decided", "0.24"), (0.77, "not decided", "0.26")])
def test_the_second_verdict_counts_from_the_image(tmp_path, last, word, share):
    "A quarter of 90 points is 22.5. All of it is lost at the first layer: from there on this network loses nothing."
    said = tell_verdicts(table_of(tmp_path, [(0.5, 0.3, 0.1)], [(last, last, last)]))
    assert len(said) == 2 and f"Adversarial (ATTA-1, TRADES beta=6): **{word}**. It loses {100 - 100 * last:.1f} points [{98 - 100 * last:.1f}, {102 - 100 * last:.1f}] in all, the natural one 90.0 points [88.0, 92.0]: a share of {share}; at most 0.25" in said[1]


def test_every_other_training_has_its_verdict(tmp_path):
    table = table_of(tmp_path, [(0.5, 0.3, 0.1)], [(0.95, 0.95, 0.95)])
    other = table[table["method"] != "Natural"].assign(method="Adversarial (ATTA-10)", ours=lambda rows: rows["ours"].where(rows["quantity"] != "Acc", 40.0), low=lambda rows: rows["low"].where(rows["quantity"] != "Acc", 38.0), high=lambda rows: rows["high"].where(rows["quantity"] != "Acc", 42.0))
    said = tell_verdicts(pandas.concat([table, other]))
    assert [line.split("**")[1] for line in said] == ["holds", "holds", "does not hold"] and "Adversarial (ATTA-10): **does not hold**" in said[2]
    (alone,) = tell_verdicts(table[table["method"] != "Natural"])
    assert "**cannot be said**" in alone and "5.0 points [3.0, 7.0]" in alone
    assert "**does not hold**" in tell_verdicts(table, hardly=0.01)[1]


# --- Figure 7: the wrong answers ---------------------------------------------------------------------------------------

def confused(*rows):
    return {"metrics": {"class_names": ["a", "b", "c"], "misclassified": [list(row) for row in rows]}}


def test_figure7_is_the_mean_over_networks_and_not_their_sum():
    key = ("MNIST", "SmallCNN", "Natural", "trained")
    pair = [confused((0, 30, 70), (5, 0, 5), (0, 0, 0)), confused((0, 20, 20), (0, 0, 0), (0, 0, 0))]
    cells = summarise_matrices({key: pair}).set_index(["true_label", "misclassified_as"])
    cell = cells.loc["a", "b"]
    assert [cell[name] for name in ("ours", "n", "seeds", "lowest", "highest")] == [40, 40, 2, 30, 50]  # the sum would be 50 of 140
    assert (cell["low"], cell["high"]) == (0, 100)  # Student's interval of two: 40 -+ 127, cut at its ends
    assert cells.loc["b", "a"][["ours", "n", "seeds"]].tolist() == [50, 10, 1]  # one network alone has such answers
    assert (cells.loc["b", "a"]["low"], cells.loc["b", "a"]["high"]) == pytest.approx([100 * end for end in wilson_interval(5, 10)])
    assert numpy.isnan(cells.loc["c", "a"]["ours"]) and cells.loc["c", "a"]["n"] == 0
    same = summarise_matrices({key: pair[:1] * 2}).iloc[1]
    assert (same["low"], same["high"]) == pytest.approx([100 * end for end in wilson_interval(30, 100)])  # the same images twice are no more images


def test_cells_of_figure7(tmp_path):
    jobs = make_table1(tmp_path / "records", [(0.5, 0.3, 0.1)] * 2, [])
    for job, ones in zip([job for job in jobs if job.notebook == "run_diagnosis"], (30, 30)):
        counts = [[0, ones, *[10] * 7, 0] if i == 0 else [0] * 10 for i in range(10)]
        write(job, tmp_path / "records", diagnosis((0.5, 0.3, 0.1)) | {"misclassified": counts})
    execute_here(ROOT / "nbs/experiments/interpretgan_fig7.ipynb", tmp_path, scale="short", shuffles=20)
    rows = {(row["true_label"], row["misclassified_as"]): row for row in read_table(tmp_path / "figures/interpretgan_fig7.csv")}
    low, high = wilson_interval(30, 100)
    assert [rows["0", "1"][key] for key in ("paper", "ours", "low", "high", "n", "seeds")] == ["0.400", "30.000", f"{100 * low:.3f}", f"{100 * high:.3f}", "100", "2"]


# --- how they were trained ---------------------------------------------------------------------------------------------

def test_the_banner_of_the_faces_says_which_network_is_smaller(tmp_path):
    jobs = plan("interpretgan_fig4", scale="short")[0]
    for job in jobs:
        write(job, tmp_path, {"steps": 45 * 30})
    assert make_banner("short", jobs, tmp_path) == "Smaller than in the paper or trained otherwise, for a CPU: VGG16 (width 8), Natural; explainers."
    record = json.loads((tmp_path / f"{jobs[0].name}.json").read_text())
    said = describe_training(record)
    for words in ("30 epochs of about 1,440 images", "width 8 (64)", "units of FC1 and FC2 64 (4096)", "random crops after padding by 12 (0)", "random mirroring yes (no)", "precision bfloat16 (float32)", "batch size 32 (64)"):
        assert words in said
    changed = describe_training(record | {"parameters": record["parameters"] | {"dropout": 0.25}})
    assert "dropout 0.25 (0.5)" in changed and "dropout" not in said


def test_the_banner_of_a_table_leaves_out_what_is_not_measured(tmp_path):
    jobs = make_table1(tmp_path, [(0.5, 0.3, 0.1)], [])
    for job in jobs:
        if job.notebook != "run_diagnosis":
            write(job, tmp_path, {"steps": 4300})
    assert make_banner("short", jobs, tmp_path) == "Trained by the paper's schedule: SmallCNN, Natural. Smaller than in the paper or trained otherwise, for a CPU: explainers."


def test_what_is_as_published_is_called_so():
    values = read_params("interpretgan")["atta"]["mnist"]["robust"]
    said = describe_training({"parameters": {"dataset": "mnist"} | values, "metrics": {"steps": 430 * 60}, "device": "cpu"})
    assert "by the paper's schedule" in said and "brackets" not in said

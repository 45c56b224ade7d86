"""What a plan costs: made-up records with known speeds, and the committed ones against facts that are known otherwise."""
import json

import pytest
from house import ROOT

from robustint.core import make_record, read_record, write_record
from robustint.costs import (Cost, compare_methods, count_flops, count_work, describe_plan, forecast, learn, order_kinds, predict_cost, price, unit_time, weigh_guesses)
from robustint.jobs import Job
from robustint.reproduce import TARGETS, plan

FIT = {"dataset": "mnist", "architecture": "small", "method": "adv", "epochs": 5, "train_images": None, "inner_steps": 40}
HIT = {"dataset": "mnist", "architecture": "small", "method": "adv", "images": 200, "steps": 200, "eps": [0.1, 0.3]}
SECONDS_A_GRADIENT = 1e-4  # of an image, in the made-up records


def record(id, notebook, parameters, seconds, device="cpu", metrics=None):
    made = make_record(id, notebook=notebook, parameters=parameters, seed=0, n=1, seconds=seconds, device="cpu", metrics=metrics or {})
    return made | {"device": device}  # which need not be on this machine


def training(id="fit", seconds=None, device="cpu", **changes):
    made = FIT | changes
    gradients = made["epochs"] * 55000 * (2 + made["inner_steps"] * (made["method"] != "normal"))
    return record(id, "run_train", made, seconds or gradients * SECONDS_A_GRADIENT, device)


def timed(device="cpu", repetitions=30, id="epoch-time", **epochs):
    "A record of run_epoch_time with these seconds for an epoch of each method."
    cells = [{"method": method, "folded": True, "epoch_seconds": seconds} for method, seconds in epochs.items()]
    cells += [{"method": method, "folded": False, "epoch_seconds": 100 * seconds} for method, seconds in epochs.items()]
    made = {"dataset": "mnist", "architecture": "small", "methods": list(epochs), "inner_steps": 40, "batch_size": 50, "repetitions": repetitions}
    return record(id, "run_epoch_time", made, 60., device, {"cells": cells, "steps_of_epoch": 1100})


def asked(notebook="run_train", **changes):
    return Job("asked", notebook, (FIT if notebook == "run_train" else HIT) | changes)


def seconds(records, *, device="cpu", **changes):
    return predict_cost(asked(**changes), learn(records, device)).seconds


# --- what is counted ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words, mflop", [(("small", 28, 1), 1.87), (("wresnet", 32, 3), 266)])
def test_a_step_has_the_operations_that_were_counted_by_hand(words, mflop):
    assert count_flops(*words) == pytest.approx(mflop, rel=0.005)


def test_the_count_follows_side_width_and_depth():
    assert count_flops("wresnet", 224, 3) == pytest.approx(49 * count_flops("wresnet", 32, 3), rel=0.01)
    assert count_flops("vgg16", 32, 3, 8) < count_flops("vgg16", 32, 3) / 40
    assert count_flops("wrn", 32, 3, 2, 16) < count_flops("wrn", 32, 3) / 20


def test_a_radius_of_zero_costs_one_pass():
    zero, one, both = (count_work("run_pgd", HIT | {"eps": eps}) for eps in (["0"], ["8/255"], [0, "8/255"]))
    assert one == pytest.approx(200 * zero) and both == pytest.approx(zero + one)


# --- whom to ask -------------------------------------------------------------------------------------------------------

def test_a_run_like_it_gives_the_time_by_its_work():
    assert seconds([training()], epochs=100) == pytest.approx(100 * 55000 * 42 * SECONDS_A_GRADIENT)
    cost = predict_cost(asked(epochs=100), learn([training()]))
    assert not cost.rough and cost.source == "1 run of the same notebook, dataset, architecture, method"


def test_its_own_record_is_taken_as_it_is_unless_it_had_other_work():
    own = training("asked", 1234.)
    assert predict_cost(asked(), learn([own, training(seconds=1.)])) == Cost(1234., "its record")
    assert predict_cost(asked(epochs=10), learn([own])).seconds == pytest.approx(2468)


def test_the_method_counts_as_it_was_timed():
    known = [training(), timed(adv=42., ig_norm=420., normal=3.)]
    assert seconds(known, method="ig_norm", epochs=100) == pytest.approx(42000), "the timed epoch itself, folded"
    pool = training(architecture="pool", seconds=1000.)
    cost = predict_cost(asked(architecture="pool", method="ig_norm"), learn([pool, timed(adv=42., ig_norm=420., normal=3.)]))
    assert cost.seconds == pytest.approx(10000) and cost.rough, "ten times the training of Adv of its own network"
    assert predict_cost(asked(architecture="pool", method="trades"), learn([pool, timed(adv=42.)])).seconds == pytest.approx(1000), "a method that was not timed"


def test_the_timed_record_with_most_repetitions_counts():
    assert compare_methods([timed(adv=1., int=9., repetitions=3), timed(adv=1., int=2., repetitions=30)])["int"] == 2
    assert compare_methods([timed(int=2.)]) == {}, "nothing to compare with"


def test_a_large_network_is_priced_by_its_operations():
    ratio = count_flops("wresnet", 32, 3) / count_flops("small", 28, 1)
    large = dict(dataset="cifar10", architecture="wresnet", epochs=200, inner_steps=10)
    assert ratio > 100
    assert seconds([training()], **large) == pytest.approx(200 * 45000 * 12 * SECONDS_A_GRADIENT * ratio)


def test_a_training_asks_attacks_on_its_network_before_trainings_of_another():
    attack = record("hit", "run_pgd", HIT | {"dataset": "cifar10", "architecture": "wresnet"}, 200 * 400 * 2e-3)
    large = asked(dataset="cifar10", architecture="wresnet", epochs=200, inner_steps=10)
    cost = predict_cost(large, learn([training(), attack]))
    assert cost.seconds == pytest.approx(200 * 45000 * 12 * 2e-3) and cost.rough and "run_pgd" in cost.source


def test_the_best_witness_comes_first():
    kinds = order_kinds("run_train")
    assert kinds[0] == ("run_train", ("dataset", "architecture", "method")) and kinds[1][0] == "timed epoch" and kinds[-1] == ("run_train", ())
    assert {kind for kind, _ in order_kinds("run_isa")} == {"run_isa"}


def test_long_runs_count_for_more_than_short_ones():
    known = learn([training("long", 100., epochs=50), *(training(f"short{k}", 50., epochs=1) for k in range(9))])
    assert unit_time(known.witnesses) == pytest.approx(100 / known.witnesses[0].work)


def test_a_graphics_card_does_not_price_a_processor():
    card = training(device="cuda:0", seconds=1.)
    assert seconds([card]) is None and seconds([card], device="cuda") == pytest.approx(1)
    assert seconds([training(), card]) == pytest.approx(5 * 55000 * 42 * SECONDS_A_GRADIENT)
    assert seconds([timed("cuda", adv=1.)]) is None
    assert "nothing known of run_train on cpu" == predict_cost(asked(), learn([card])).source


def test_a_plan_asks_the_records_of_the_device_it_would_run_on(tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUSTINT_HOME", str(tmp_path))
    for made in (training("fit", 100.), training("card", 1., "cuda:0")):
        write_record(made, tmp_path / "data/records")
    times = {device: price([asked(device=device)])["asked"].seconds for device in ("cpu", "cuda:1", "mps")}
    assert times == {"cpu": pytest.approx(100), "cuda:1": pytest.approx(1), "mps": None}


@pytest.mark.parametrize("damage", [{"notebook": "run_no_more"}, {"device": None}, {"parameters": {"dataset": "mnist", "architecture": "no_more"}}, {"notebook": "benchmarks/attacks"}, {"seconds": 0}])
def test_a_record_that_cannot_be_read_is_no_witness(damage):
    broken = training() | damage
    if damage.get("device", "") is None:
        del broken["device"]
    assert learn([broken]).witnesses == []


def test_a_damaged_file_stops_no_plan(tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUSTINT_HOME", str(tmp_path))
    write_record(training(), tmp_path / "data/records")
    (tmp_path / "data/records/broken.json").write_text('{"id": "cut sh')
    assert price([asked()])["asked"].seconds


# --- what is said ------------------------------------------------------------------------------------------------------

JOBS = [Job("a", "run_train", {}, outputs=("a.json", "a.safetensors")), Job("b", "run_pgd", {}, inputs=("a.safetensors",))]
COSTS = {"a": Cost(7200., "10 runs of the same notebook", rough=True), "b": Cost(3600., "3 runs of the same notebook, dataset, architecture, method")}


def test_a_guess_is_marked_in_its_line_and_in_the_sum():
    lines = describe_plan(JOBS, COSTS, [1])
    assert "~ 2.0 h  a" in lines[0] and "~" not in lines[1]
    assert "3.0 h  in all, 2 runs" in lines[2] and "2.0 h of it (67%), marked ~" in lines[2]
    assert weigh_guesses(JOBS[1:], COSTS) == ""


def test_the_forecast_is_one_line():
    taken, line = forecast(JOBS, COSTS, 2)
    assert taken == pytest.approx(7200 + 3600 + 33) and "\n" not in line and "marked" not in line
    assert line.startswith("2 runs to do, about 3.0 h with 2 side by side (a rough guess)")
    assert "at least" in forecast(JOBS, COSTS | {"b": Cost(None, "nothing known")}, 1)[1]
    assert forecast(JOBS, COSTS | {"a": Cost(100., "", rough=True)}, 1)[1].endswith("side by side"), "a guess of a few seconds is not worth a word"


@pytest.mark.parametrize("target, scale", [(name, scale) for name, target in TARGETS.items() for scale in target.scales])
def test_every_plan_has_a_price(target, scale):
    jobs, _ = plan(target, scale=scale, weights=["released", "trained"])
    costs = price(jobs)
    assert len(describe_plan(jobs, costs, [1])) == len(jobs) + 3


# --- the committed records ---------------------------------------------------------------------------------------------

def table1(dataset, monkeypatch):
    "Prices in hours of the trainings of Table 1 at the paper's schedule, by method, as if nothing of it were done."
    monkeypatch.setenv("ROBUSTINT_DEVICE", "cpu")
    jobs = [job for job in plan("icml2020_table1", scale="paper", weights=["trained"], datasets=[dataset], seeds=[0])[0] if job.notebook == "run_train"]
    costs = price([Job(f"not-{job.name}", job.notebook, job.parameters) for job in jobs])
    return {job.parameters["method"]: costs[f"not-{job.name}"] for job in jobs}


def test_ig_norm_costs_what_figure_3_measured(monkeypatch):
    cells = read_record(ROOT / "data/records/mnist-small-epoch-time.json")["metrics"]["cells"]
    epoch = next(cell["epoch_seconds"] for cell in cells if cell["method"] == "ig_norm" and cell["folded"])
    cost = table1("mnist", monkeypatch)["ig_norm"]
    assert 0.5 < cost.seconds / (100 * epoch) < 2 and not cost.rough


def test_a_cifar10_network_takes_days_of_a_core_and_the_plan_says_so(monkeypatch):
    costs = table1("cifar10", monkeypatch)
    if not costs["adv"].rough:
        pytest.skip("a WResnet has been trained: its record tells")
    assert 60 < costs["adv"].seconds / 3600 < 600, "2.1 ms an image and step on two threads make 60 hours"


def test_the_committed_records_can_be_read():
    found = [json.loads(path.read_text()) for path in (ROOT / "data/records").glob("*.json")]
    runs = [made for made in found if made["notebook"].startswith("run_") and made["device"] == "cpu" and made["seconds"] > 0]
    known = learn(runs)
    assert {made["id"] for made in runs} == {witness.id for witness in known.witnesses} and all(witness.work > 0 for witness in known.witnesses)


def test_the_digits_are_as_many_as_the_plan_counts():
    from robustint.costs import SIZES
    from robustint.data import load_dataset
    assert SIZES["digits"] == tuple(len(load_dataset("digits", split)) for split in ("train", "test"))

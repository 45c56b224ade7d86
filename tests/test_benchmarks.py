"""The benchmarks at their smallest scale: the harness is right, the port is ours, every script writes a whole record."""
import json
import subprocess
import sys

import house
import pytest
import torch

sys.path.insert(0, str(house.ROOT / "benchmarks"))

import attacks
import common
import maps
import plan as plan_benchmark
import port
import race
import ranks
import report
import scaling
import targets
import training

from robustint.core import make_generator, make_record, read_record, write_record
from robustint.costs import START_SECONDS
from robustint.jobs import notebook_parameters
from robustint.models import make_model
from robustint.plans import places
from robustint.reproduce import plan

BENCHMARKS = {"attacks": attacks, "maps": maps, "training": training, "scaling": scaling}


class Clock:
    "A clock that stands still but for what a contestant takes."

    def __init__(self):
        self.now, self.turns = 0.0, []

    def __call__(self):
        return self.now

    def contestant(self, name, *seconds):
        "Takes the given times, one after another and over again."
        def work():
            self.now += seconds[sum(turn == name for turn in self.turns) % len(seconds)]
            self.turns.append(name)
        return work


# --- the harness ---------------------------------------------------------------------------------------------------------

def test_contestants_take_turns_and_each_begins_once():
    clock = Clock()
    seconds = race.race({name: clock.contestant(name, 1) for name in "abc"}, repetitions=3, warm_up=1, clock=clock)
    rounds = ["".join(clock.turns[i:i + 3]) for i in range(0, 12, 3)]
    assert rounds == ["cab", "abc", "bca", "cab"]  # the first one warms up
    assert seconds == {"a": [1, 1, 1], "b": [1, 1, 1], "c": [1, 1, 1]}


def test_ratio_is_formed_within_a_repetition():
    clock = Clock()
    slow, fast = clock.contestant("slow", 3, 6, 30), clock.contestant("fast", 1, 2, 3)  # the machine slows down for both
    seconds = race.race({"slow": slow, "fast": fast}, repetitions=3, warm_up=0, clock=clock)
    assert race.compare(seconds, "slow", "fast") == {"name": "slow", "against": "fast", "median": 3, "low": 3, "high": 10}


def test_two_repetitions_warm_up():
    clock = Clock()
    seconds = race.race({"a": clock.contestant("a", 9, 4, 1)}, repetitions=1, clock=clock)
    assert seconds == {"a": [1]} and race.WARM_UP == 2


def test_share_of_the_limit():
    seconds = {"a": [2.0, 4.0], race.PRODUCT: [1.0, 1.0]}
    assert race.share_of_limit(seconds, "a", 10, 20) == {"median": 0.1875, "low": 0.125, "high": 0.25}


def test_matmul_limit_leaves_the_threads_alone():
    before = torch.get_num_threads()
    limit = race.matmul_limit(1, side=64, repetitions=3)
    assert 0 < limit["low"] <= limit["median"] <= limit["high"] and torch.get_num_threads() == before


def test_arithmetic_of_small_by_hand():
    "Two convolutions and the folded head, forwards: 934,528 operations; there and back 1.87 million."
    model = make_model("small", channels=1, generator=make_generator(0))
    images = torch.rand(2, 1, 28, 28, generator=make_generator(1))
    by_hand = 2 * (14 * 14 * 16 * 16 + 7 * 7 * 32 * 256 + 7 * 7 * 32 * 10)
    assert common.forward_flops(model, images) == by_hand == 934528
    assert common.forward_flops(model, images, maps=True) == by_hand + 2 * 7 * 7 * 10 * 32 * (49 - 1)


# --- the port ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["int", "adv", "int2", "normal"])
def test_port_takes_our_step(name):
    "In double precision: the same perturbed images, loss and weights after a step."
    case = training.STEP | {"images": 6, "inner_steps": 5, "device": "cpu", "digits": True}
    assert training.compare_with_port(name, case, torch.float64) == {"equal_pixels": 1, "loss_difference": pytest.approx(0, abs=1e-12)}
    ours, theirs = training.prepare_ours(name, case), training.prepare_port(name, case, True)
    assert ours().item() == pytest.approx(theirs().item(), rel=1e-5)
    assert torch.allclose(ours.args[0].head, theirs.args[0].head.weight, atol=1e-5)


def test_port_finds_the_same_gradient_both_ways():
    case = training.STEP | {"images": 4, "inner_steps": 3, "device": "cpu", "digits": True}
    x, y, start, model = training.prepare(case)
    network = port.PlainSmall(model)
    found = [port.find_perturbed(network, x, y, "int", eps=0.3, steps=3, step_size=0.01, start=start, all_weights=b) for b in (True, False)]
    assert torch.equal(*found) and not any(p.grad is not None and p.grad.any() for p in network.parameters())


# --- the scripts ---------------------------------------------------------------------------------------------------------

def run_all(folder):
    "Every script once: one as a person calls it, the others in this process. The records by script."
    more = ["--scale", "smoke", "--threads", "1", "--records", str(folder), "--figures", str(folder)]
    for name, script in BENCHMARKS.items():
        common.run(name, script.SCALES, script.measure, getattr(script, "draw", common.draw_races), arguments=more)
    subprocess.run([sys.executable, house.ROOT / "benchmarks/ranks.py", *more], check=True, capture_output=True)
    return {name: json.loads((folder / f"bench-{name}-smoke.json").read_text()) for name in [*BENCHMARKS, "ranks"]}


def check_record(record, name, folder):
    "A whole record with every single time, and a plot beside it."
    assert not house.record_faults(record, f"bench-{name}-smoke")
    assert record["notebook"] == f"benchmarks/{name}" and record["parameters"]["scale"] == "smoke" and record["n"] > 0
    assert {"matmul_gflops", "peers"} <= set(record["metrics"])
    entries = record["metrics"]["axes" if name == "scaling" else "races"]
    assert entries and all(len(times) == 2 for entry in entries for times in entry["seconds"].values())
    assert all((folder / f"bench_{name}_smoke.{kind}").stat().st_size > 5000 for kind in ("png", "pdf"))


def check_results(records):
    "The contestants computed the same things."
    found = {entry["title"]: entry for record in records.values() for entry in record["metrics"].get("races", [])}
    attack = found["PGD, MNIST Small"]
    assert attack["checks"]["robustint, unfolded"]["equal_pixels"] > 0.99 and attack["images"].startswith("embedded digits")
    assert attack["memory_mib"]["robustint, compiled"] > 0 and attack["flop_image_step"] == 2 * 934528
    assert all(entry["checks"]["scipy"]["largest_difference"] < 1e-12 for title, entry in found.items() if title.startswith("Kendall"))
    assert found["One training step, MNIST Small"]["checks"]["int port"]["equal_pixels"] > 0.99


def test_scripts_write_whole_records_and_the_report_reads_them(tmp_path):
    threads = torch.get_num_threads()
    records = run_all(tmp_path)
    for name, record in records.items():
        check_record(record, name, tmp_path)
    check_results(records)
    text = report.write_report(tmp_path, tmp_path, "smoke")
    assert (tmp_path / "benchmarks.md").read_text() == text and "measure nothing" in text
    assert "not measured" in text and "Missing" not in text  # no peers at this scale; all scripts ran
    torch.set_num_threads(threads)


def test_report_says_what_is_met():
    races = [(None, {"title": report.STEP, "seconds": {"int, compiled": [1.0] * 7}, "ratios": [{"name": "int, compiled", "against": "adv, compiled", "median": m, "low": 1.5, "high": 3.0}]}) for m in (1.9, 2.1)]
    assert [report.judge(report.STEP, "int, compiled", "adv, compiled", "<=", 2, [one])[3] for one in races] == ["met", "**NOT met**"]
    assert report.judge(report.STEP, "ig_norm", "int, compiled", "<=", 3, races)[3] == "not measured"


def test_report_without_records_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="make bench"):
        report.write_report(tmp_path, tmp_path)


def test_a_missing_peer_is_named_and_left_out(monkeypatch):
    monkeypatch.setattr(common, "find_spec", lambda name: None)
    case = attacks.SCALES["smoke"] | attacks.MNIST | {"images": 2, "steps": 1, "peers": attacks.PEERS, "device": "cpu", "threads": 1}
    assert list(attacks.make(case)) == ["robustint, compiled", "robustint, not compiled", "robustint, unfolded"]
    assert common.find_missing(attacks.PEERS) == attacks.PEERS


# --- the report of older records, and its reasons --------------------------------------------------------------------------

def make_attack_record(**more):
    "A record of a race as it was written when compiled PGD was called robustint."
    seconds = {"robustint": [1.0, 1.0, 1.0], "robustint, not compiled": [2.0, 2.0, 2.0], "torchattacks": [4.0, 4.0, 20.0], race.PRODUCT: [1.0, 1.0, 1.0]}
    case = {"images": 2, "steps": 3, "step_size": 0.01, "eps": 0.3, "side": 100, "device": "cpu"}
    ratios = [race.compare(seconds, name, "robustint") for name in ("robustint, not compiled", "torchattacks")]
    entry = {"title": targets.PGD, "n": 2, "case": case, "seconds": seconds, "ratios": ratios, "checks": {}, "missing": [], "gflop": {"robustint": 1e-3}, "flop_image_step": 1e6, "shares": {"robustint": {"median": 0.5, "low": 0.4, "high": 0.6}}, "memory_mib": {"robustint": 5.0}}
    limit = {"median": 2.0, "low": 1.0, "high": 3.0}
    return make_record("bench-attacks", notebook="benchmarks/attacks", parameters={"scale": "short", "threads": 1}, seed=0, n=2, seconds=1, device="cpu", metrics={"races": [entry], "matmul_gflops": limit, "peers": {}}) | more


def test_an_old_record_gets_the_new_names_and_the_default_its_ratio():
    record = report.compare_again("attacks", make_attack_record())
    entry = record["metrics"]["races"][0]
    assert "robustint" not in entry["seconds"] and {name for key in ("gflop", "shares", "memory_mib") for name in entry[key]} == {"robustint, compiled"}
    found = {(ratio["name"], ratio["against"]): ratio["median"] for ratio in entry["ratios"]}
    assert found == {("robustint, not compiled", "robustint, compiled"): 2, ("torchattacks", "robustint, compiled"): 4, ("torchattacks", "robustint, not compiled"): 2}
    assert report.compare_again("attacks", record) == record  # a record with the new names stays as it is


def test_what_is_missed_has_its_reason():
    "15 MFLOP in 4 s beside a product of matrices with 2 MFLOP in 1 s: 188% of its speed are asked for; 1 MFLOP in 1 s and in 2 s are 50% and 25%."
    text = report.write_text({"attacks": report.compare_again("attacks", make_attack_record())})
    assert text.count("- PGD, MNIST Small, torchattacks at least 15") == 1  # compiled or not, the reason is the same
    entry = report.compare_again("attacks", make_attack_record())["metrics"]["races"][0]
    assert [report.share_of(entry, *pair) for pair in (("torchattacks", 15e-3), ("robustint, compiled", 1e-3), ("robustint, not compiled", 1e-3))] == ["188%", "50%", "25%"]
    assert 'asked was "no slower"' in text and "How long it takes is not measured" in text and "about 10 such attacks" in text


def test_slow_repetitions_are_named_with_what_they_move():
    records = {"attacks": report.compare_again("attacks", make_attack_record())}
    row = next(line for line in report.table_of_slow(records).splitlines() if "torchattacks" in line)
    assert "| 2e+04 | 4e+03 | 5.0 | 3 of 3 | 20 of torchattacks / robustint, compiled; 10 of torchattacks / robustint, not compiled |" in row
    assert "attacks 1." in report.describe_warm_up(records)  # a record that does not say so warmed up once
    assert not report.describe_warm_up({"attacks": make_attack_record(parameters={"warm_up": 2})})


def test_every_column_of_the_report_has_a_head():
    text = report.write_text({"attacks": report.compare_again("attacks", make_attack_record())})
    heads = [before for before, line in zip(text.splitlines(), text.splitlines()[1:]) if line.startswith("| ---")]
    assert heads and all(cell.strip() for head in heads for cell in head.strip("|").split("|"))


def test_report_is_the_one_its_records_give():
    folder = house.ROOT / "data/records"
    file = folder / "bench-plan.json"
    text = report.write_text(report.read_benchmarks(folder, "short", "cpu"), plan=read_record(file) if file.is_file() else None)
    assert (house.ROOT / "figures/benchmarks.md").read_text(encoding="utf-8") == text, "run `python benchmarks/report.py`"


def test_caption_tells_the_fewest_repetitions():
    record = report.compare_again("attacks", make_attack_record())
    short = record["metrics"]["races"][0] | {"seconds": {"a": [1.0]}}
    record["metrics"]["races"].append(short)
    assert "At least 1 interleaved" in common.describe_run(record) and "Orange triangles" in common.describe_run(record)


@pytest.mark.parametrize("low, high", [(0.87, 1.15), (0.9, 1.7), (0.8, 5), (0.8, 18), (0.2, 60)])
def test_axis_has_ticks_enough(low, high):
    from matplotlib.figure import Figure
    axes = Figure().subplots()
    axes.set(xscale="log", xlim=(low, high))
    common.label_plainly(axes.xaxis)
    ticks = axes.get_xticks()
    assert len(ticks) >= 4 and all(low <= tick <= high for tick in ticks) and axes.get_xlim() == (low, high)


# --- does a plan tell the truth? -------------------------------------------------------------------------------------------

def pretend_to_run(home, workers, taken=3., beside=9.):
    "Write the records that the target would leave; the seconds it would take, with `beside` for each start."
    jobs = plan(plan_benchmark.TARGET, scale=plan_benchmark.SCALE)[0]
    for job in jobs:
        record = make_record(job.name, notebook=job.notebook, parameters=notebook_parameters(job.notebook) | job.parameters, seed=0, n=1, seconds=taken, device="cpu", metrics={})
        write_record(record, f"{home}/{places(plan_benchmark.SCALE)['records']}")
    return (taken + beside) * len(jobs) / workers + beside


@pytest.fixture
def plan_record(monkeypatch, tmp_path):
    "The record of benchmarks/plan.py where running takes no time."
    monkeypatch.setattr(plan_benchmark, "run_target", pretend_to_run)
    return plan_benchmark.main(["--records", str(tmp_path)])


def test_plan_benchmark_predicts_from_the_records_of_the_first_run(plan_record, tmp_path):
    assert read_record(tmp_path / "bench-plan.json") == plan_record and not house.record_faults(plan_record, "bench-plan")
    metrics, runs = plan_record["metrics"], plan_record["n"]
    assert runs == metrics["runs"] > 1 and metrics["measured"]["1"] == 12 * runs + 9
    assert metrics["seconds_beside_the_record"] == pytest.approx(9) and metrics["start_seconds_assumed"] == START_SECONDS
    assert metrics["predicted"]["1"] == pytest.approx((3 + START_SECONDS) * runs + START_SECONDS)
    assert metrics["predicted"]["1"] / 2 < metrics["predicted"]["2"] < metrics["predicted"]["1"]


def test_report_judges_the_plan_on_two_workers(plan_record):
    assert report.judge_plan("1", 0.1).startswith("not judged") and [report.judge_plan("2", ratio) for ratio in (0.7, 0.9, 1.3)] == ["**NOT true**", "true", "**NOT true**"]
    told = plan_record["metrics"]["predicted"]["2"]
    plan_record["metrics"]["measured"]["2"] = told * 2
    assert "| 0.50 | **NOT true** |" in report.table_of_plan(plan_record)
    assert "assumes the same" in report.describe_plan(plan_record)


def test_report_says_that_a_plan_is_older_than_the_code(plan_record):
    text = report.describe_plan(plan_record, start=START_SECONDS + 2)
    later = plan_record["metrics"]["predicted"]["1"] + 2 * (plan_record["n"] + 1)
    assert "older than the code" in text and f"makes {later:.0f} s" in text and plan_record["machine"] in text and plan_record["created"][:10] in text
    assert "bench-plan" in report.table_of_machines([plan_record])

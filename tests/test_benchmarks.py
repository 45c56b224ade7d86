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
import port
import race
import ranks
import report
import scaling
import training

from robustint.core import make_generator
from robustint.models import make_model

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

@pytest.mark.parametrize("name", ["int", "adv"])
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
    assert attack["memory_mib"]["robustint"] > 0 and attack["flop_image_step"] == 2 * 934528
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
    races = [(None, {"title": report.STEP, "seconds": {"int": [1.0] * 7}, "ratios": [{"name": "int", "against": "adv", "median": m, "low": 1.5, "high": 3.0}]}) for m in (1.9, 2.1)]
    assert [report.judge(report.STEP, "int", "adv", "<=", 2, [one])[3] for one in races] == ["met", "**NOT met**"]
    assert report.judge(report.STEP, "ig_norm", "int", "<=", 3, races)[3] == "not measured"


def test_report_without_records_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="make bench"):
        report.write_report(tmp_path, tmp_path)


def test_a_missing_peer_is_named_and_left_out(monkeypatch):
    monkeypatch.setattr(common, "find_spec", lambda name: None)
    case = attacks.SCALES["smoke"] | attacks.MNIST | {"images": 2, "steps": 1, "peers": attacks.PEERS, "device": "cpu", "threads": 1}
    assert list(attacks.make(case)) == ["robustint", "robustint, not compiled", "robustint, unfolded"]
    assert common.find_missing(attacks.PEERS) == attacks.PEERS

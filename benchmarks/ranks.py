"""Kendall's tau of many pairs of maps against a loop over SciPy's."""
import torch
from common import SMOKE, cases, hold, run
from scipy.stats import kendalltau

from robustint.core import make_generator
from robustint.discrepancy import kendall_tau

TAU = {"title": "Kendall's tau of {pairs} pairs of maps, {positions:,} positions", "pairs": 200}
SCALES = {
    "smoke": SMOKE | {"cases": {"49": TAU | {"pairs": 5, "positions": 49}, "3136": TAU | {"pairs": 3, "positions": 3136}}},
    "short": {"repetitions": 21, "memory": None, "cases": {"49": TAU | {"positions": 49}, "3136": TAU | {"positions": 3136}}},
}
SCALES["paper"] = SCALES["short"]  # 200 images; maps of 7 x 7 (MNIST Small) and of 56 x 56 (Restricted ImageNet)


def make_maps(pairs, positions, **_):
    "Pairs of maps that agree in part, as maps before and after an attack do; every fifth pair is rounded, so that values are equal."
    first, noise = torch.randn(2, pairs, positions, generator=make_generator(0))
    second = first + noise
    for maps in (first, second):
        maps[::5] = maps[::5].mul(2).round()
    return first, second


def make(case):
    "Ours, and the loop."
    first, second = make_maps(**case)
    rows = [maps.double().numpy() for maps in (first, second)]
    first, second = first.to(case["device"]), second.to(case["device"])
    return {"robustint": lambda: kendall_tau(first, second),
            "scipy": lambda: torch.tensor([kendalltau(a, b).statistic for a, b in zip(*rows)], dtype=torch.float64)}


def check(contestants):
    "The largest difference of a tau."
    ours, loop = (contestants[name]().double().cpu() for name in ("robustint", "scipy"))
    return {"scipy": {"largest_difference": (ours - loop).abs().max().item()}}


def measure(settings):
    "One race for each size of map."
    races = [hold(case["title"].format(**case), make, case, checks=check, n=case["pairs"]) for case in cases(settings).values()]
    return {"races": races, "n": max(entry["n"] for entry in races)}


if __name__ == "__main__":
    run("ranks", SCALES, measure)

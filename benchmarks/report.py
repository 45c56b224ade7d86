"""The report of the benchmarks: what was asked, what was measured, and whether it is met; from the records alone."""
import argparse
from math import log

from common import SMOKE_NOTE, show_ratio

from robustint.core import project_root, read_record, write_atomic
from robustint.tables import to_markdown

SCRIPTS = ("attacks", "maps", "ranks", "training", "scaling")
PGD, DEEP, STEP = "PGD, MNIST Small", "PGD, CIFAR-10 WResnet", "One training step, MNIST Small"
TARGETS = [  # title of the race (its beginning), the pair, and what is asked of their ratio
    (PGD, "torchattacks", "robustint", ">=", 15), (PGD, "foolbox", "robustint", ">=", 15),
    (DEEP, "torchattacks", "robustint", ">=", 1.4), (DEEP, "foolbox", "robustint", ">=", 1.4),
    (STEP, "int port", "int", ">=", 4), (STEP, "int port, image gradient", "int", ">=", 4),
    (STEP, "int", "adv", "<=", 2), (STEP, "ig_norm", "int", "<=", 3),
    ("Kendall's tau of 200 pairs of maps, 49 ", "scipy", "robustint", ">=", 10), ("Kendall's tau of 200 pairs of maps, 3,136 ", "scipy", "robustint", ">=", 0.9)]  # no slower: both are SciPy there, a tenth is noise
LIMITS = {"CAM": 1e-5, "Integrated": 1e-5, "Kendall": 1e-12}  # of the largest difference from another implementation
SIGNS = {">=": ("at least", lambda a, b: a >= b), "<=": ("at most", lambda a, b: a <= b)}


def read_benchmarks(folder, scale, device):
    "The records by script, as far as they are there. FileNotFoundError with the command if there is none."
    ending = ("" if scale == "short" else f"-{scale}") + ("" if device == "cpu" else f"-{device}")
    files = {name: folder / f"bench-{name}{ending}.json" for name in SCRIPTS}
    found = {name: read_record(file) for name, file in files.items() if file.is_file()}
    if not found:
        raise FileNotFoundError(f"no record of a benchmark in {folder}: run `make bench`, or `{command('attacks', scale, device)}`")
    return found


def command(name, scale, device):
    "The command that makes a record."
    return f"python benchmarks/{name}.py --scale {scale}" + ("" if device == "cpu" else f" --device {device}")


def list_races(records):
    "All races, each with the record it stands in."
    return [(record, entry) for record in records.values() for entry in record["metrics"].get("races", [])]


def judge(title, name, against, sign, asked, races):
    "One line of the table of targets."
    words, holds = SIGNS[sign]
    line = [f"{title.strip()}: {name} / {against}", f"{words} {asked:g}"]
    for _, entry in races:
        for ratio in entry["ratios"]:
            if entry["title"].startswith(title) and (ratio["name"], ratio["against"]) == (name, against):
                return line + [show_ratio(ratio), "met" if holds(ratio["median"], asked) else "**NOT met**", len(entry["seconds"][name])]
    return line + ["–", "not measured", "–"]


def table_of_targets(races):
    return to_markdown([["target: ratio of times", "asked", "measured: median (lowest to highest)", "", "repetitions"], *[judge(*target, races) for target in TARGETS]])


def table_of_ratios(races):
    rows = [[f"{entry['title']}: {ratio['name']} / {ratio['against']}", show_ratio(ratio)] for _, entry in races for ratio in entry["ratios"]]
    return to_markdown([["ratio of times", "median (lowest to highest)"], *rows])


def table_of_shares(races):
    rows = [[f"{entry['title']}: {name}", f"{entry['gflop'][name]:.4g}", f"{100 * share['median']:.0f}% ({100 * share['low']:.0f}% to {100 * share['high']:.0f}%)"]
            for _, entry in races for name, share in entry["shares"].items()]
    return to_markdown([["contestant", "arithmetic (GFLOP)", "speed / speed of a matrix product"], *rows])


def show_check(entry, name, check):
    "One line of the table of agreements."
    limit = next((limit for title, limit in LIMITS.items() if entry["title"].startswith(title)), None)
    verdict = "" if limit is None else f"asked {limit:g}: " + ("met" if check["largest_difference"] <= limit else "**NOT met**")
    return [f"{entry['title']}: {name}", ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in check.items()), verdict]


def explain_folding(races):
    "Why folding alone cannot win more on MNIST Small: the arithmetic of the network as it is, the zeros of the padding left out."
    taps = sum(min(k + 3, 6) - max(k - 3, 0) + 1 for k in range(7)) ** 2  # of a 7x7 kernel on a 7x7 map that meet a pixel, over all positions
    folded = next((entry["flop_image_step"] for _, entry in races if entry["title"] == PGD), None)
    if folded is None:
        return ""
    last = 2 * 2 * 32 * 100 * taps  # forwards and back
    return (f"On MNIST Small the folded network needs {folded / 1e6:.2f} MFLOP an image and step. The last convolution, 7x7 on 7x7 maps, needs {last / 1e6:.1f} more where it is not folded, even if a library leaves out "
            f"the zeros of the padding. The ratio of the arithmetic is {1 + last / folded:.1f}: so much faster could PGD be at most where a library convolves at full speed in both. More is possible only where the peers' convolution is slow.")


def table_of_checks(races):
    rows = [show_check(entry, name, check) for _, entry in races for name, check in entry["checks"].items() if list(check) != ["largest_difference"] or name != "robustint"]
    return to_markdown([["contestant", "against ours", ""], *rows])


def table_of_memory(races):
    rows = [[f"{entry['title']}: {name}", f"{peak:.0f}"] for _, entry in races for name, peak in entry["memory_mib"].items()]
    return to_markdown([["contestant", "peak above the start (MiB)"], *rows])


def table_of_growth(record):
    "How each axis of scaling.py grows; an exponent of 1 is cost in proportion."
    rows = []
    for entry in record["metrics"]["axes"]:
        first, last = entry["values"][0], entry["values"][-1]
        for what, ratios in entry["ratios"].items():
            rows.append([entry["axis"], what, f"{first} to {last}", show_ratio(ratios[-1]), f"{log(ratios[-1]['median']) / log(last / first):.2f}"])
    return to_markdown([["axis", "what", "from, to", "time, last / first", "exponent"], *rows])


def table_of_plan(record):
    "What `robustint plan` said, and what it took."
    told, took = record["metrics"]["predicted"], record["metrics"]["measured"]
    made, rows = record["parameters"], [[workers, f"{told[workers]:.0f}", f"{took[workers]:.0f}", f"{told[workers] / took[workers]:.2f}"] for workers in told]
    return (to_markdown([["workers", "predicted (s)", "took (s)", "predicted / took"], *rows])
            + f"\n\n`robustint reproduce {made['target']} --scale {made['scale']}`: {record['n']} runs and the report, predicted from the records of the run on one worker, with {record['metrics']['start_seconds_assumed']:g} s assumed for each start; "
            f"{record['metrics']['seconds_beside_the_record']:.1f} s were measured. Seconds of this machine.")


def table_of_times(races):
    "Absolute times: of a GPU only, which is not shared."
    rows = [[f"{entry['title']}: {name}", f"{1e3 * sorted(seconds)[len(seconds) // 2]:.4g}"] for _, entry in races for name, seconds in entry["seconds"].items()]
    return to_markdown([["contestant", "median (ms)"], *rows])


def describe_machine(record):
    "One line: the machine, its limit and the peers of one record."
    limit, peers = record["metrics"]["matmul_gflops"], ", ".join(f"{name} {version}" for name, version in record["metrics"]["peers"].items())
    missing = sorted({name for entry in record["metrics"].get("races", []) for name in entry["missing"]})
    return (f"- `{record['id']}`: {record['machine']}, device {record['device']}; matrix product {show_ratio(limit)} GFLOP/s; torch {record['libraries']['torch']}; {peers}"
            + (f"; not installed: {', '.join(missing)}" if missing else "") + f"; {record['seconds']:.0f} s in all.")


def describe_race(entry):
    "One line: what a race was about."
    case, what = entry["case"], "; ".join(entry[key] for key in ("network", "images") if key in entry)
    numbers = ", ".join(f"{key.replace('_', ' ')} {case[key]:.4g}" for key in ("images", "steps", "inner_steps", "step_size", "eps", "pairs", "positions") if key in case)
    return f"- {entry['title']}: {numbers}" + (f"; network {what}." if what else ".")


def write_report(folder, figures, scale="short", device="cpu"):
    "Write benchmarks.md out of the records; returns its text."
    records = read_benchmarks(folder, scale, device)
    races = list_races(records)
    missing = [command(name, scale, device) for name in SCRIPTS if name not in records]
    parts = ["# Benchmarks", f"> Scale smoke: {SMOKE_NOTE}." if scale == "smoke" else "",
             "All contestants of a race take turns in one run, with the same network and images, and the turn begins with another one each time. A ratio is formed within a repetition; "
             "its median stands before its lowest and highest. A target is judged by the median.",
             f"Missing: {', '.join(f'`{line}`' for line in missing)}." if missing else "", "## What was asked", table_of_targets(races), "## All ratios", table_of_ratios(races),
             "## How near the machine's limit", "Convolutions and products that the folded computation needs, over the time it takes, as a share of the speed of a large matrix product in the same repetition. "
             "An ascent step is counted as forwards and back to the pixels.", table_of_shares(races), explain_folding(races),
             "## The same results", "Adversarial or perturbed pixels count as equal to 1e-4; a loss difference is relative.", table_of_checks(races),
             "## Memory", "Each contestant alone in a new process; the first call, with what libraries set up once.", table_of_memory(races)]
    if "scaling" in records:
        parts += ["## How cost grows", table_of_growth(records["scaling"]), "`networks`: each in a process and thread of its own, all at once."]
    if device == "cpu" and (folder / "bench-plan.json").is_file():
        parts += ["## Does a plan tell the truth?", table_of_plan(read_record(folder / "bench-plan.json"))]
    if device != "cpu":
        parts += ["## Times", table_of_times(races)]
    parts += ["## Measured on", "\n".join(map(describe_machine, records.values())), "\n".join(describe_race(entry) for _, entry in races)]
    text = "\n\n".join(part for part in parts if part) + "\n"
    name = "benchmarks" + ("" if device == "cpu" else f"_{device}") + ".md"
    write_atomic(f"{figures}/{name}", text)
    return text


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", choices=("smoke", "short", "paper"), default="short")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--records", default=None, help="folder; data/records if not given, for smoke data/runs/smoke")
    parser.add_argument("--figures", default=None, help="folder; figures if not given, for smoke figures/smoke")
    given, _ = parser.parse_known_args(arguments)  # what only the races need, such as --threads, may stand there
    smoke, root = given.scale == "smoke", project_root()
    folder = given.records or root / ("data/runs/smoke" if smoke else "data/records")
    return write_report(type(root)(folder), given.figures or root / ("figures/smoke" if smoke else "figures"), given.scale, given.device)


if __name__ == "__main__":
    print(main())

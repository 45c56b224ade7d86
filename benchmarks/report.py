"""The report of the benchmarks and its plots: what was asked, what was measured, and whether it is met; from the records alone."""
import argparse
from math import log
from statistics import median

import attacks
import scaling
import training
from common import SMOKE_NOTE, draw_races, draw_record, show_ratio
from race import SIDE, WARM_UP, compare, share_of_limit
from targets import LIMITS, OURS, PGD, SIGNS, STEP, TARGETS

from robustint.core import project_root, read_record, write_atomic
from robustint.costs import START_SECONDS
from robustint.tables import to_markdown

SCRIPTS = ("attacks", "maps", "ranks", "training", "scaling")
PAIRS = {"attacks": attacks.list_pairs, "training": lambda names: training.PAIRS}  # of the others the record has all there are
OLD_NAMES = {"attacks": {"robustint": OURS[0]}, "training": {name: f"{name}, compiled" for name in ("int", "adv")}}  # in records made before the contestants were called so
SLOW = 2  # times the median: a repetition to be named
TRUE = (0.8, 1.25)  # predicted / taken of a plan that tells the truth: our own limits


def rename(entry, names):
    "A race with these new names of contestants for old ones."
    by_name = ("seconds", "checks", "shares", "gflop", "memory_mib")
    return entry | {key: {names.get(name, name): value for name, value in entry[key].items()} for key in by_name}


def compare_again(script, record):
    "A record with today's names of the contestants and today's pairs, out of its single times."
    if script not in PAIRS:
        return record
    races = [entry if "methods" in entry["case"] else rename(entry, OLD_NAMES[script]) for entry in record["metrics"]["races"]]
    for entry in races:
        if "methods" in entry["case"]:  # the race on one core: its pairs are its methods'
            continue
        there = entry["seconds"]
        entry["ratios"] = [compare(there, *pair) for pair in PAIRS[script](list(dict.fromkeys(ratio["name"] for ratio in entry["ratios"]))) if there.keys() >= set(pair)]
    return record | {"metrics": record["metrics"] | {"races": races}}


def read_benchmarks(folder, scale, device):
    "The records by script, as far as they are there. FileNotFoundError with the command if there is none."
    ending = ("" if scale == "short" else f"-{scale}") + ("" if device == "cpu" else f"-{device}")
    files = {name: folder / f"bench-{name}{ending}.json" for name in SCRIPTS}
    found = {name: compare_again(name, read_record(file)) for name, file in files.items() if file.is_file()}
    if not found:
        raise FileNotFoundError(f"no record of a benchmark in {folder}: run `make bench`, or `{command('attacks', scale, device)}`")
    return found


def command(name, scale, device):
    "The command that makes a record."
    return f"python benchmarks/{name}.py --scale {scale}" + ("" if device == "cpu" else f" --device {device}")


def list_races(records):
    "All races, each with the record it stands in."
    return [(record, entry) for record in records.values() for entry in record["metrics"].get("races", [])]


def find_ratio(races, title, name, against):
    "The race and the ratio of a target; None if it was not measured."
    return next(((entry, ratio) for _, entry in races if entry["title"].startswith(title) for ratio in entry["ratios"] if (ratio["name"], ratio["against"]) == (name, against)), None)


def judge(title, name, against, sign, asked, races):
    "One line of the table of targets."
    (words, holds), found = SIGNS[sign], find_ratio(races, title, name, against)
    line = [f"{title.strip(' ,')}: {name} / {against}", f"{words} {asked:g}"]
    if not found:
        return line + ["–", "not measured", "–"]
    entry, ratio = found
    line[0] = f"{entry['title']}: {name} / {against}"
    return line + [show_ratio(ratio), "met" if holds(ratio["median"], asked) else "**NOT met**", len(entry["seconds"][name])]


def table_of_targets(races):
    return to_markdown([["target: ratio of times", "asked", "measured: median (lowest to highest)", "verdict", "repetitions"], *[judge(*target, races) for target in TARGETS]])


# --- why something is not met ----------------------------------------------------------------------------------------------

def list_missed(races):
    "The targets that were measured and are not met, each with its race."
    found = [(target, find_ratio(races, *target[:3])) for target in TARGETS]
    return [(target, pair[0]) for target, pair in found if pair and not SIGNS[target[3]][1](pair[1]["median"], target[4])]


def share_of(entry, name, gflop):
    "The share of a matrix product's speed at which a contestant does so much arithmetic, the median in words."
    side = entry["case"].get("side") or SIDE[entry["case"]["device"]]
    return f"{100 * share_of_limit(entry['seconds'], name, gflop, 2 * side ** 3 / 1e9)['median']:.0f}%"


def explain_attack(target, entry):
    "Why PGD is not so much faster: it would have to compute faster than the machine multiplies matrices."
    title, peer, _, _, asked = target
    gflop = entry["gflop"][OURS[0]]
    return (f"- {title}, {peer} at least {asked:g}: to be so much faster, the folded network would have to compute at {share_of(entry, peer, gflop * asked)} of the speed of a large matrix product in the same run; "
            f"compiled, it computes at {share_of(entry, OURS[0], gflop)}, not compiled at {share_of(entry, OURS[1], gflop)}.")


def explain_ig_norm(entry):
    "Why a step of IG-Norm is not nearer to one of Int: its arithmetic."
    flop = entry["gflop"]
    return (f"- {STEP}, IG-Norm at most 3 times Int: an inner step of IG-Norm passes the network at five points, each time forwards, back, and through both again for the second derivative: 20 passes where Adv makes 2. "
            f"Only the first convolution is spared most of them. Together that is {flop['ig_norm'] / flop['adv, compiled']:.1f} times the arithmetic of Adv, where Int needs {flop['int, compiled'] / flop['adv, compiled']:.1f} times Adv's, "
            f"so IG-Norm needs {flop['ig_norm'] / flop['int, compiled']:.1f} times Int's, over the 3 asked. Besides, IG-Norm runs as it is, not compiled: "
            "`ascend` refuses the compiled step, whose gradient differs (seen by hand, no record).")


def explain_port(target, entry):
    "Why a step of Int that is not compiled is not faster beside a port: what the port does not do, and how far the ratios spread."
    ratio, compiled = (next(r for r in entry["ratios"] if (r["name"], r["against"]) == pair) for pair in (target[1:3], (target[1], "int, compiled")))
    return (f"- {STEP}, {target[1]} at least {target[4]} times as long as Int, not compiled: this port already leaves out the gradients of the weights, which the usual one computes, and the ratio lies around the target, from {ratio['low']:.2f} to {ratio['high']:.2f}. "
            f"Compiled, as long trainings run, it is {compiled['median']:.2f}.")


def explain_missed(races):
    "A list of reasons for the targets that are missed."
    missed = list_missed(races)
    lines = [explain_attack(target, entry) for target, entry in missed if target[2] in OURS]
    lines += [explain_port(target, entry) for target, entry in missed if target[1] == "int port, image gradient" and target[2] == "int, not compiled"]
    lines += [explain_ig_norm(entry) for target, entry in missed if target[1] == "ig_norm"]
    return "\n".join(dict.fromkeys(lines))  # compiled or not, the reason is the same


def explain_folding(races):
    "What folding saves on MNIST Small: the arithmetic of the network as it is, without and with the zeros of the padding."
    entry = next((entry for _, entry in races if entry["title"] == PGD), None)
    if entry is None:
        return ""
    folded, taps = entry["flop_image_step"], sum(min(k + 3, 6) - max(k - 3, 0) + 1 for k in range(7)) ** 2  # of a 7x7 kernel on a 7x7 map that meet a pixel, over all positions
    last, padded = (2 * 2 * 32 * 100 * number for number in (taps, 7 ** 4))  # forwards and back
    gflop, peer = entry["gflop"][OURS[0]], "torchattacks"
    text = (f"On MNIST Small the folded network needs {folded / 1e6:.2f} million operations for an image and a step. The last convolution, 7x7 on 7x7 maps, is folded away. The peers' network has it, and it needs {last / 1e6:.1f} million more where the zeros of its padding are left out, "
            f"{padded / 1e6:.1f} million where they are multiplied: folding saves a factor of {1 + last / folded:.1f} of the arithmetic, or of {1 + padded / folded:.1f}.")
    if peer not in entry["seconds"]:
        return text
    return text + (f" The times differ by less, because that large convolution runs near the machine's limit and the small ones that are left do not: with the zeros left out of the count, {peer} computes at {share_of(entry, peer, gflop * (1 + last / folded))} of the speed of a matrix product, "
                   f"ours, compiled, at {share_of(entry, OURS[0], gflop)}.")


def describe_compiling(races):
    "What compiling saves, and what is not in the times."
    text = ("What is called compiled was compiled before the repetitions that count: the time to compile is in no ratio. How long it takes is not measured here (30_pgd.ipynb says about ten seconds). Compiling is off unless asked for.")
    entry = next((entry for _, entry in races if entry["title"] == PGD), None)
    if entry is None:
        return text
    compiled, usual = (entry["seconds"][name] for name in OURS)
    saved = median(b - a for a, b in zip(compiled, usual))
    text += f" Of an attack of {median(usual):.2g} s on MNIST Small it saves {saved:.2g} s"
    return text + (f": if it takes ten seconds, about {10 / saved:.0f} such attacks earn them back, and one alone never does." if saved > 0 else ".")


def describe_warm_up(records):
    "How many repetitions these records leave out, where the code leaves out more."
    fewer = {name: record["parameters"].get("warm_up", 1) for name, record in records.items()}
    fewer = [f"{name} {number}" for name, number in fewer.items() if number < WARM_UP]
    return f" Of the warm-up these records leave out fewer repetitions than the {WARM_UP} of the present code: {', '.join(fewer)}." if fewer else ""


# --- tables ------------------------------------------------------------------------------------------------------------------

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
    verdict = "no limit set" if limit is None else f"at most {limit:g} asked: " + ("met" if check["largest_difference"] <= limit else "**NOT met**")
    return [f"{entry['title']}: {name}", ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in check.items()), verdict]


def table_of_checks(races):
    rows = [show_check(entry, name, check) for _, entry in races for name, check in entry["checks"].items() if name not in ("robustint", OURS[0])]
    return to_markdown([["contestant", "beside ours", "verdict"], *rows])


def name_ends(entry, name, repetition):
    "The ends of a race's ratios that come from this contestant in this repetition, in words."
    words = []
    for ratio in entry["ratios"]:
        if name in (ratio["name"], ratio["against"]) and ratio["name"] != ratio["against"]:
            values = [own / other for own, other in zip(entry["seconds"][ratio["name"]], entry["seconds"][ratio["against"]])]
            words += [f"{values[repetition]:.3g} of {ratio['name']} / {ratio['against']}" for end in (min, max) if values[repetition] == end(values)]
    return words


def list_entries(records):
    "All races with their titles; an axis of scaling.py is one too."
    for record in records.values():
        for entry in record["metrics"].get("races", []):
            yield entry
        for entry in record["metrics"].get("axes", []):
            yield entry | {"title": f"How cost grows, {entry['axis']}", "ratios": [ratio for ratios in entry["ratios"].values() for ratio in ratios]}


def table_of_slow(records):
    "Contestants one of whose repetitions took over twice their median, and the ends of ratios that come from it."
    rows = []
    for entry in list_entries(records):
        for name, seconds in entry["seconds"].items():
            usual, slowest = median(seconds), max(seconds)
            if slowest > SLOW * usual:
                place = seconds.index(slowest)
                rows.append([f"{entry['title']}: {name}", f"{1e3 * slowest:.3g}", f"{1e3 * usual:.3g}", f"{slowest / usual:.1f}", f"{place + 1} of {len(seconds)}", "; ".join(name_ends(entry, name, place)) or "none"])
    head = ["contestant", "slowest (ms)", "median (ms)", "slowest / median", "repetition", "ends of ratios that come from it"]
    return to_markdown([head, *rows]) if rows else "None."


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


def judge_plan(workers, ratio):
    "Whether a prediction is near enough. One worker's is not judged: its own records were the source."
    if workers == "1":
        return "not judged: predicted from its own records"
    return "true" if TRUE[0] <= ratio <= TRUE[1] else "**NOT true**"


def table_of_plan(record):
    "What `robustint plan` said, and what it took."
    told, took = record["metrics"]["predicted"], record["metrics"]["measured"]
    rows = [[workers, f"{told[workers]:.0f}", f"{took[workers]:.0f}", f"{told[workers] / took[workers]:.2f}", judge_plan(workers, told[workers] / took[workers])] for workers in told]
    return to_markdown([["workers", "predicted (s)", "took (s)", "predicted / took", "verdict"], *rows])


def describe_plan(record, start=START_SECONDS):
    "What was run, with what assumed, and whether the code still assumes it."
    made, metrics, assumed = record["parameters"], record["metrics"], record["metrics"]["start_seconds_assumed"]
    text = (f"`robustint reproduce {made['target']} --scale {made['scale']}`: {record['n']} runs and the report, on {record['machine']}, {record['created'][:10]}. The time of each run is taken from the records of the run on one worker; to it come {assumed:g} s for each start "
            f"(a kernel, the imports, the data), and {metrics['seconds_beside_the_record']:.1f} s were measured. So the test is two workers: true means predicted / took from {TRUE[0]:g} to {TRUE[1]:g}, limits of our own.")
    if assumed == start:
        return text + " The present code assumes the same."
    later = metrics["predicted"]["1"] + (record["n"] + 1) * (start - assumed)  # one run after the other, and the report
    return text + (f" **This record is older than the code:** `START_SECONDS` was {assumed:g} then and is {start:g} now. On one worker that makes {later:.0f} s for the {metrics['measured']['1']:.0f} s taken, which proves little, because {start:g} s is what this record found. "
                   "What the present code predicts for two workers has not been measured; `python benchmarks/plan.py` does it.")


def table_of_times(races):
    "Absolute times: of a GPU only, which is not shared."
    rows = [[f"{entry['title']}: {name}", f"{1e3 * sorted(seconds)[len(seconds) // 2]:.4g}"] for _, entry in races for name, seconds in entry["seconds"].items()]
    return to_markdown([["contestant", "median (ms)"], *rows])


def describe_machine(record):
    "One line: when and on what machine a record was made, the machine's limit, the peers."
    metrics = record["metrics"]
    missing = sorted({name for entry in metrics.get("races", []) for name in entry["missing"]})
    peers = ", ".join([f"{name} {version}" for name, version in metrics.get("peers", {}).items()] + [f"{name} not installed" for name in missing])
    return [f"`{record['id']}`", f"{record['created'][:16].replace('T', ' ')} UTC", record["machine"], record["device"], show_ratio(metrics["matmul_gflops"]) if "matmul_gflops" in metrics else "–",
            record["code"], record["libraries"]["torch"], peers or "–", f"{record['seconds']:.0f}"]


def table_of_machines(records):
    head = ["record", "made", "machine", "device", "matrix product (GFLOP/s)", "code", "torch", "peers", "seconds in all"]
    return to_markdown([head, *map(describe_machine, records)])


def describe_race(entry):
    "One line: what a race was about."
    case, what = entry["case"], "; ".join(entry[key] for key in ("network", "images") if key in entry)
    numbers = ", ".join(f"{key.replace('_', ' ')} {case[key]:.4g}" for key in ("images", "steps", "inner_steps", "step_size", "eps", "pairs", "positions") if key in case)
    return f"- {entry['title']}: {numbers}" + (f"; network {what}." if what else ".")


INTRODUCTION = """All contestants of a race take turns in one run, with the same network and images, and the turn begins with another one each time. A ratio is formed within a repetition; its median stands before its lowest and highest. A target is judged by the median. An end far from its median comes from a slow repetition; the worst are listed below.

- `robustint, compiled` is `pgd(..., compiled=True)`, `robustint, not compiled` is `pgd(...)` as it is by default; both fold the network first. `robustint, unfolded` does neither.
- torchattacks, foolbox and ART attack the network as anybody would write it. On our own module and on its folded form torchattacks runs once more, so that one sees what is the network's part and what the loop's.
- `int`, `adv` and `ig_norm` are our training steps; `compiled` means their inner steps. A `port` is the straightforward PyTorch form of the same step; with `image gradient` it leaves out the gradients of the weights, which the inner steps do not need. In the race on one core each method's step, compiled, stands beside its port."""
GROWTH = """Time grows as size to the power of the exponent, taken from the first and the last size alone: 1 is cost in proportion, 0 is no growth. For the side of the image, 2 would be cost in proportion to the number of pixels; for networks, 0 would mean that two at once take no longer than one. An exponent below proportion comes probably from what is done once for an attack, which weighs less in a larger one, and from small batches and images that do not fill the machine.

Nothing is compiled here. `networks`: each in a process of one thread, all at once. One size is changed at a time; the others stay at """
TRIED = """Keeping the points of an attack in phases (even and odd rows and columns), so that both strided convolutions of Small become products of matrices: a compiled step took 0.86 of the time for 50 images on an otherwise idle core, but 1.9 times the time for 200 images (17 against 9 ms). So it was left out. Measured by hand; there is no record."""
KENDALL = "Kendall's tau of 3,136 positions: asked was \"no slower\". Maps of more than 256 positions go to SciPy in both, so the true ratio is 1 and what is measured around it is noise; 0.9 leaves a tenth for it."


def write_why(races):
    "The reasons: of targets that are missed, of the limit for Kendall's tau, of what folding can do."
    missed = explain_missed(races)
    return ["## What is not reached, and why", missed, explain_folding(races), KENDALL] if missed else ["## A limit and its reason", KENDALL]


def write_growth(record):
    "The section on how cost grows."
    middle = ", ".join(f"{name} {value}" for name, value in record["parameters"]["middle"].items())
    return ["## How cost grows", table_of_growth(record), GROWTH + middle + f". The machine: {record['machine']}."]


def write_text(records, scale="short", device="cpu", plan=None):
    "The report."
    races, made = list_races(records), [*records.values(), *([plan] if plan else [])]
    missing = [command(name, scale, device) for name in SCRIPTS if name not in records] + ["python benchmarks/plan.py"] * (device == "cpu" and scale == "short" and not plan)
    parts = ["# Benchmarks", f"> Scale smoke: {SMOKE_NOTE}." if scale == "smoke" else "", INTRODUCTION, f"Missing: {', '.join(f'`{line}`' for line in missing)}." if missing else "",
             "## What was asked", table_of_targets(races), describe_compiling(races), *write_why(races), "## All ratios", table_of_ratios(races),
             "## Slow repetitions", f"Contestants whose slowest repetition took over {SLOW} times their median; they move the ends of the ratios, hardly the medians. What caused them is not known." + describe_warm_up(records), table_of_slow(records),
             "## How near the machine's limit", "Convolutions and products that the folded computation needs, over the time it takes, as a share of the speed of a large matrix product in the same repetition. "
             "An ascent step is counted as forwards and back to the pixels.", table_of_shares(races),
             "## The same results", f"Of an attack, beside `{OURS[0]}`: the share of adversarial pixels equal to 1e-4, and the accuracy that is left; of a training step, the perturbed pixels and the relative difference of the loss; else the largest difference.", table_of_checks(races),
             "## Memory", "Each contestant alone in a new process; the first call, with what libraries set up once, the compiler among them.", table_of_memory(races)]
    if "scaling" in records:
        parts += write_growth(records["scaling"])
    if plan:
        parts += ["## Does a plan tell the truth?", table_of_plan(plan), describe_plan(plan)]
    if device == "cpu":
        parts += ["## Tried and left", TRIED]
    else:
        parts += ["## Times", table_of_times(races)]
    parts += ["## Measured on", table_of_machines(made), "\n".join(describe_race(entry) for _, entry in races)]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_report(folder, figures, scale="short", device="cpu"):
    "Write benchmarks.md and the plots out of the records; returns the text."
    records, file = read_benchmarks(folder, scale, device), folder / "bench-plan.json"
    plan = read_record(file) if device == "cpu" and file.is_file() else None
    text = write_text(records, scale, device, plan)
    for name, record in records.items():
        draw_record(record, scaling.draw if name == "scaling" else draw_races, figures)
    write_atomic(f"{figures}/benchmarks" + ("" if device == "cpu" else f"_{device}") + ".md", text)
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

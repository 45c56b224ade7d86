"""Does `robustint plan` tell the truth? The main job at smoke scale on one worker, the prediction from its records, and the same on two workers."""
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import read_arguments

from robustint.core import make_record, project_root, write_record
from robustint.costs import START_SECONDS, makespan, price, simulate
from robustint.plans import places
from robustint.reproduce import plan

TARGET, SCALE = "quick", "smoke"


def run_target(home, workers):
    "Run the whole target in an empty project on so many workers; returns the wall seconds, Snakemake's and the report's among them."
    command = [sys.executable, "-c", "import sys; from robustint.cli import main; sys.exit(main())", "reproduce", TARGET, "--scale", SCALE, "-j", str(workers)]
    began = time.perf_counter()
    subprocess.run(command, check=True, env=os.environ | {"ROBUSTINT_HOME": str(home), "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def predict(home, workers, start):
    "From the records of an earlier run: when the report ends. A `start` of 0 counts what stands in the records alone."
    jobs = plan(TARGET, scale=SCALE)[0]
    costs = price(jobs, Path(home) / places(SCALE)["records"])
    taken = {job.name: costs[job.name].seconds + start for job in jobs}
    return makespan(jobs, taken, workers) if start else max(end for _, _, end in simulate(jobs, taken, workers))


def measure():
    "Predicted and measured seconds for one worker and two; and what a run takes beside its record's seconds, by the first."
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        alone, jobs = run_target(first, 1), plan(TARGET, scale=SCALE)[0]
        beside = (alone - predict(first, 1, 0.)) / (len(jobs) + 1)  # the report is one run more
        told = {str(workers): predict(first, workers, START_SECONDS) for workers in (1, 2)}
        return {"runs": len(jobs), "measured": {"1": alone, "2": run_target(second, 2)}, "predicted": told, "start_seconds_assumed": START_SECONDS, "seconds_beside_the_record": beside}


def main(arguments=None):
    "Measure, write the record, print the two numbers."
    given, began = read_arguments({"short": {}}, arguments), time.perf_counter()
    metrics = measure()
    record = make_record("bench-plan", notebook="benchmarks/plan", parameters={"target": TARGET, "scale": SCALE, "workers": [1, 2]}, seed=0, n=metrics["runs"],
                         seconds=time.perf_counter() - began, device="cpu", metrics=metrics)
    write_record(record, given.records or project_root() / "data/records")
    for workers in ("1", "2"):
        print(f"{TARGET} at scale {SCALE} on {workers} worker(s): predicted {metrics['predicted'][workers]:.0f} s, took {metrics['measured'][workers]:.0f} s with Snakemake and the report")
    print(f"a run takes {metrics['seconds_beside_the_record']:.1f} s beside what its record counts (assumed: {START_SECONDS:g})")
    return record


if __name__ == "__main__":
    main()

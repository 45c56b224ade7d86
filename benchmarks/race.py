"""Contestants take turns in one run on one machine: their times, their memory, and how near the machine's limit they come."""
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch

PRODUCT = "matrix product"  # the contestant that shows what the machine can do
WARM_UP = 2  # repetitions that do not count: after a single one, a first repetition of Int took four times its median
SIDE = {"cpu": 2048, "cuda": 8192}  # of its matrices, if nothing else is said


def wait_for(device):
    "Until the device has done what it was given."
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def race(contestants, repetitions=7, warm_up=WARM_UP, *, device="cpu", clock=time.perf_counter):
    "Wall seconds of each contestant in each repetition, the warm-up left out: all take one turn a repetition, and each time another one begins."
    names, seconds = list(contestants), {name: [] for name in contestants}
    for repetition in range(-warm_up, repetitions):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            wait_for(device)
            began = clock()
            contestants[name]()
            wait_for(device)
            if repetition >= 0:
                seconds[name].append(clock() - began)
    return seconds


def spread(values):
    "The median of some values, the lowest and the highest."
    return {"median": median(values), "low": min(values), "high": max(values)}


def compare(seconds, name, against):
    "How many times as long as `against` the contestant `name` takes: a ratio within each repetition, then their spread."
    return {"name": name, "against": against} | spread([own / other for own, other in zip(seconds[name], seconds[against])])


# --- the limit of the machine --------------------------------------------------------------------------------------------

def matrix_product(device="cpu", side=None):
    "A product of two large square matrices in single precision as a contestant, and its arithmetic in GFLOP."
    side = side or SIDE[torch.device(device).type]
    first, second = (torch.rand(side, side, device=device) for _ in range(2))
    return lambda: first @ second, 2 * side ** 3 / 1e9


def matmul_limit(threads, device="cpu", repetitions=7, side=None):
    "GFLOP/s of a large matrix product on so many threads."
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        product, gflop = matrix_product(device, side)
        return spread([gflop / took for took in race({PRODUCT: product}, repetitions, device=device)[PRODUCT]])
    finally:
        torch.set_num_threads(before)


def share_of_limit(seconds, name, gflop, product_gflop):
    "The speed of a contestant with so much arithmetic to do, as a share of the matrix product's in the same repetition."
    return spread([gflop / own * limit / product_gflop for own, limit in zip(seconds[name], seconds[PRODUCT])])


# --- memory --------------------------------------------------------------------------------------------------------------

def _status(entry):
    "An entry of this process's status in MiB (VmRSS: resident now, VmHWM: the peak); elsewhere than on Linux the peak."
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(entry + ":")) / 2 ** 10


def _forget_peak():
    "Let the kernel count the peak from here on, where it can."
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def _peak_above_start(make, case, name):
    "Make a contestant, run it once, and return by how many MiB its memory rose above the start at most."
    torch.set_num_threads(case["threads"])
    contestant, device = make(case)[name], torch.device(case["device"])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        contestant()
        return (torch.cuda.max_memory_allocated(device) - start) / 2 ** 20
    _forget_peak()  # VmHWM is ru_maxrss less what a child inherits from its parent, and it can be set back
    start = _status("VmRSS")
    contestant()
    return max(_status("VmHWM") - start, 0)


def measure_memory(make, case, names):
    "Peak memory above the start, in MiB, of each named contestant of `make(case)`, in a new process for each."
    peaks = {}
    for name in names:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            peaks[name] = round(pool.submit(_peak_above_start, make, case, name).result(), 1)
    return peaks

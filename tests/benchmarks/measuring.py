"""How the benchmarks measure: a call's seconds, its FLOPs, what this machine's matrix products reach, peak memory, where the time goes.

    share of the matmul rate = FLOPs of a step / its seconds / best FLOP/s of a plain matrix product on the same day

FLOPs are those of convolutions and matrix products, forward and backward, two for each multiply-add; what norms, activations and copies take
is time without FLOPs. Attention is counted through its unfused form: the counter does not know the CPU's fused kernel.
"""

import itertools
import multiprocessing
import re
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIDES = {"cpu": (1024, 2048, 3072), "cuda": (4096, 8192)}                  # of the matrices that the machine's rate is measured with


@dataclass(frozen=True)
class Timing:
    """What one call took."""
    seconds: float
    kernel: float                       # seconds of processor time in the operating system, of all threads together
    faults: int                         # pages of memory that the system had to provide


def wait(device):
    """Until a GPU has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def timed(call, device="cpu"):
    """Runs call() -> Timing."""
    wait(device)
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    call()
    wait(device)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    return Timing(seconds, after.ru_stime - before.ru_stime, after.ru_minflt - before.ru_minflt)


def in_turns(calls, rounds, device="cpu", between=None, warm_up=2):
    """{name: [Timing, ...]}: all of `calls` {name: call}, one after the other, `rounds` times, so that what slows the machine down for a
    while slows all of them. Before that each runs `warm_up` times. between(): runs before each round.
    """
    for _, call in itertools.product(range(warm_up), calls.values()):
        call()
    found = {name: [] for name in calls}
    for _ in range(rounds):
        if between:
            between()
        for name, call in calls.items():
            found[name].append(timed(call, device))
    return found


def seconds(timings):
    """The median of some Timings' seconds."""
    return statistics.median(timing.seconds for timing in timings)


def ratio(ours, theirs):
    """The median of ours / theirs, round by round (lists of Timings of equal length)."""
    return statistics.median(a.seconds / b.seconds for a, b in zip(ours, theirs, strict=True))


class MatmulRate:
    """The best FLOP/s of a plain matrix product that were seen so far; calling it looks again, at several sizes.

    Two libraries do matrix products on a CPU: that of torch.mm, and the one that convolutions use, asked here by a 1 × 1 convolution. Either may
    be the faster, and `best` is that of both: a network that beats torch.mm does not thereby use the machine up.
    """

    def __init__(self, device="cpu", dtype="fp32"):
        self.device, self.seen = torch.device(device), {}
        self.matrices = [torch.randn(2, n, n, device=device, dtype=DTYPES[dtype]) for n in SIDES[self.device.type]]
        self()                                                             # to warm up
        self.seen = dict.fromkeys(self.seen, 0.0)

    def __call__(self):
        for a, b in self.matrices:
            n = len(a)
            pixels = a.T.reshape(1, n, 32, n // 32).contiguous(memory_format=torch.channels_last)      # (1, C, H, W), H · W = C = n
            for name, product in {"mm": lambda: a @ b, "1 × 1 convolution": lambda: F.conv2d(pixels, b[:, :, None, None])}.items():
                self.seen[name] = max(self.seen.get(name, 0.0), 2 * n ** 3 / timed(product, self.device).seconds)

    @property
    def best(self):
        """FLOP/s."""
        return max(self.seen.values())


def flops(call):
    """FLOPs of the convolutions and matrix products in call(), with those of a backward pass if it makes one."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


# ---------------------------------------------------------------------------------------------------------------- memory

def resident(key):
    """Bytes of this process's memory, as Linux counts them: key "VmRSS" (now) or "VmHWM" (the most that it ever was)."""
    path = Path("/proc/self/status")
    if path.is_file():
        return int(re.search(rf"{key}:\s+(\d+) kB", path.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_bytes(prepare, device):
    """The most memory that prepare() and then two calls of what it returned took, beyond what was in use before; call it in a process of
    its own. On a GPU: what torch took there, in all.
    """
    before = resident("VmRSS")
    step = prepare()
    for _ in range(2):
        step()
    wait(device)
    return torch.cuda.max_memory_allocated(device) if torch.device(device).type == "cuda" else resident("VmHWM") - before


def alone(function, *arguments):
    """function(*arguments) in a fresh process, where nothing of what this one has done is left. It must be one of a module's own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


# ---------------------------------------------------------------------------------------------------------------- where the time goes

# The first that is found in an operator's name says what kind it is; names are torch's own, of the CPU or of CUDA's wrappers.
KINDS = [("attention", "scaled_dot_product|flash_attention|efficient_attention"),
         ("convolution", "conv"),
         ("matrix product", r"::(add|b|badd)?mm\b|linear|matmul|einsum"),
         ("norm", "norm"),
         ("optimiser", "adam|Optimizer"),
         ("copy, layout", "copy_|_to_copy|contiguous|clone|::cat|reshape|zero_|fill_|pad|pixel_|::index|stack|empty|resize"),
         ("resampling", "pool|upsample|interpolate"),
         ("elementwise", r"silu|gelu|sigmoid|tanh|softmax|::(add|sub|mul|div|pow|exp|log|sqrt|rsqrt|where|clamp|sum|mean|neg|var)")]


def kind_of(name):
    """Which of KINDS an operator belongs to; "other" if none."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other")


def where_time_goes(call, device="cpu", calls=2):
    """({kind: share of the time in operators}, seconds of a call by the profiler, the longest operators as (name, share))."""
    cuda = torch.device(device).type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    call()
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(calls):
            call()
        wait(device)
    spent, names = {}, {}
    for event in profiler.key_averages():
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        if own > 0 and not (cuda and event.device_type.name == "CUDA"):    # a kernel's time is also that of the operator it belongs to
            names[event.key] = names.get(event.key, 0) + own
            spent[kind_of(event.key)] = spent.get(kind_of(event.key), 0) + own
    total = sum(spent.values())
    longest = sorted(names.items(), key=lambda item: -item[1])[:12]
    return ({kind: value / total for kind, value in sorted(spent.items(), key=lambda item: -item[1])}, total / calls / 1e6,
            [(name, value / total) for name, value in longest])

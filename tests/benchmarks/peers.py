"""How fast do our models train and draw, beside those of other packages of the same size? Decoder, prior, upsampler and CLIP.

    python tests/benchmarks/peers.py [--subjects decoder ...] [--peers dalle2-pytorch diffusers transformers] [--rounds 5]
        [--sampling-rounds 1] [--device cuda] [--dtype bf16] [--compile] [--layout channels_last] [--size micro] [--out runs/peers.json]
    python tests/benchmarks/peers.py --alone       is a step as fast among others as alone?
    python tests/benchmarks/peers.py --sweep       cost of the decoder's step against resolution, batch and width
    python tests/benchmarks/peers.py --profile     where the decoder's step goes
    python tests/benchmarks/peers.py --precision   how many times faster are our steps in bfloat16? (without peers or --dtype)

All in one process and by turns (ours, a peer, the next peer, ours, …), so that a machine's moods meet all alike; a ratio is the median of
those of single rounds. A training step is loss, backward pass and the same AdamW on the same data, and has the same FLOPs for all, to within
3 % (peer_models.py says how), but that our prior and CLIP do not compute, in their last block, the places that nobody reads. Ours runs as
train.py runs it: channels last. The peers run as their users find them; with `--layout channels_last` they are given that too. Sampling is that
of 16 captioned pictures in 50 steps, with guidance. Peak memory is that of a step in a process of its own. Nothing else may run meanwhile.
The peer that is not in tests/requirements.txt, with what it imports (but not with what it asks for: that would bring another torch):

    pip install --no-deps dalle2-pytorch==1.15.6 x-clip==0.14.4 coca-pytorch==0.1.0 rotary-embedding-torch==0.9.1 \
        einops==0.8.2 kornia==0.9.0 resize-right==0.0.2
"""

import argparse
import functools
import json
import math
import platform
import re
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
from measuring import DTYPES, MatmulRate, alone, flops, in_turns, peak_bytes, ratio, seconds, where_time_goes       # noqa: E402
from peer_models import BUILDERS, INSTALL, PEERS, SIZES, SUBJECTS, Data, changes, installed    # noqa: E402
from mini_dalle2.runtime.commands import Parser, sentence          # noqa: E402
from mini_dalle2.configs import TrainConfig          # noqa: E402
from mini_dalle2.runtime.device import keep_memory, pick_device          # noqa: E402
from mini_dalle2.training.state import make_optimizer          # noqa: E402
from mini_dalle2.transformer import Transformer          # noqa: E402

# What we hold our decoder to: the most that ours / theirs may be, and the least share of the matmul rate.
TARGETS = {("training", "dalle2-pytorch"): 0.65, ("training", "diffusers"): 0.9,
           ("sampling", "dalle2-pytorch"): 0.5, ("sampling", "diffusers"): 0.8}
SHARE = 0.9


@dataclass(frozen=True)
class How:
    """What all contenders run on, and how."""
    device: str = "cpu"
    dtype: str = "fp32"
    compile: bool = False
    layout: str = "own"                 # of the peers' weights: as they come, or "channels_last" as ours
    keep: bool = True                   # freed memory stays with the process (training.keep_memory), for all of them


def made(subject, who, size, how, change, n):
    """A Contender of `subject` on the device, with data for n examples; change: its sizes' changes (peer_models.changes)."""
    torch.manual_seed(0)
    contender = BUILDERS[subject][who](size, Data(size, n, how.device), **change)
    contender.model.to(how.device)
    if how.layout == "channels_last":
        contender.model.to(memory_format=torch.channels_last)
    for network in contender.networks if how.compile else ():
        network.forward = torch.compile(network.forward)
    return contender


def autocast(how):
    """The context that the networks run in."""
    return torch.autocast(torch.device(how.device).type, torch.bfloat16, enabled=how.dtype == "bf16")


def training(contender, how):
    """step(): loss, gradient, AdamW."""
    optimizer = make_optimizer(contender.model.train(), TrainConfig())

    def step():
        with autocast(how):
            loss = contender.loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def drawing(contender, how, steps):
    """draw(): as many sampling steps."""
    contender.model.eval()

    def draw():
        with torch.no_grad(), autocast(how):
            contender.sample(steps)

    return draw


def prepared(subject, who, size, how, change):
    """What `measuring.peak_bytes` runs in a process of its own: a training step."""
    return training(made(subject, who, size, how, change, size.batch[subject]), how)


def memory(*arguments):
    """Peak memory of a training step; arguments as `prepared` takes them."""
    how = arguments[3]
    torch.set_float32_matmul_precision("high")
    if how.keep:
        keep_memory()
    return peak_bytes(functools.partial(prepared, *arguments), how.device)


def flops_of_one(subject, who, size, change, every_place=False):
    """FLOPs of a training step for one example. They are proportional to the batch, but for CLIP's few of comparing all with all.

    every_place: as if our transformers' last blocks computed all places, as those of the peers do, and not just the one that is read.
    """
    contender = BUILDERS[subject][who](size, Data(size, 1), **change)
    contender.model.train()
    forward = Transformer.forward

    def whole(self, x, cache=None, mask=None, place=None):
        x = forward(self, x, cache, mask)
        return x if place is None else x[:, [place]]

    with mock.patch.object(Transformer, "forward", whole if every_place else forward):
        return flops(lambda: contender.loss().backward())


def equalised(subject, who, size, target):
    """(change, FLOPs): the first change of a peer's sizes that gives it `target` FLOPs for one example, as near as the size's tolerance.

    A network that is nowhere larger than one which is too small need not be counted, nor one that is nowhere smaller than one which is too
    large. Raises ValueError if none fits.
    """
    small, large, nearest = [], [], math.inf
    for change in changes(subject, who, size):
        sizes = torch.tensor([item for value in change.values() for item in (value if isinstance(value, tuple) else (value,))])
        if any((sizes <= other).all() for other in small) or any((sizes >= other).all() for other in large):
            continue
        count = flops_of_one(subject, who, size, change)
        if abs(count / target - 1) <= size.tolerance:
            return change, count
        (small if count < target else large).append(sizes)
        nearest = min(nearest, count, key=lambda flop: abs(flop - target))
    raise ValueError(f"{subject}: none of the sizes tried gives {who} the FLOPs of ours; the nearest is {nearest / target - 1:+.1%}")


class Bench:
    """One call of the command: whom it compares, how, what was found, and where that is written."""

    def __init__(self, args):
        self.size, self.rounds, self.out, self.peers = SIZES[args.size], args.rounds, args.out, args.peers
        self.how = How(str(args.device), args.dtype, args.compile, args.layout, args.keep_memory)
        if args.keep_memory:
            keep_memory()
        self.rate = MatmulRate(self.how.device, self.how.dtype)
        self.results = {"machine": machine(self.how.device), "how": asdict(self.how), "size": asdict(self.size)}
        self.write()                                                       # a folder that cannot be written to shows before anything is measured

    def who(self, subject):
        """Ours and the peers that have such a model."""
        return [who for who in BUILDERS[subject] if who == "ours" or who in self.peers]

    def fitted(self, subject, size):
        """{who: (change, FLOPs of a training step)}, all with the FLOPs that ours would have without sparing itself places that nobody reads."""
        target, n = flops_of_one(subject, "ours", size, {}, every_place=True), size.batch[subject]
        found = {who: ({}, flops_of_one(subject, who, size, {})) if who == "ours" else equalised(subject, who, size, target)
                 for who in self.who(subject)}
        return {who: (change, n * count) for who, (change, count) in found.items()}

    def keep(self, title, found, flop, extra=None):
        """Prints a table of Timings {who: [...]} with each one's FLOPs {who: number}, and keeps it; extra: {who: {name: value}}."""
        print(f"\n{title}\n{'':<16}{'seconds':>10}{'ours / it':>11}{'TFLOP':>9}{'TFLOP/s':>9}{'of matmul':>11}{'kernel s':>10}{'peak GB':>9}   changed")
        best, rows = self.rate.best, {}
        for who, timings in found.items():
            row = {"seconds": seconds(timings), "ratio": ratio(found["ours"], timings), "flops": flop[who],
                   "share": flop[who] / seconds(timings) / best, "kernel": statistics.median(t.kernel for t in timings),
                   "faults": statistics.median(t.faults for t in timings), "all": [t.seconds for t in timings], **(extra or {}).get(who, {})}
            peak = f"{row['peak'] / 1e9:>9.2f}" if "peak" in row else f"{'':>9}"
            sizes = " ".join(f"{key}={value}" for key, value in row.get("change", {}).items())
            print(f"{who:<16}{row['seconds']:>10.3f}{row['ratio']:>11.3f}{row['flops'] / 1e12:>9.3f}{row['flops'] / row['seconds'] / 1e12:>9.3f}"
                  f"{row['share']:>11.1%}{row['kernel']:>10.2f}{peak}   {sizes}", flush=True)
            rows[who] = row
        self.results[title] = rows
        self.results["matmul FLOP/s"] = self.rate.seen
        self.write()
        return rows

    def write(self):
        """The JSON, after each table: a long run that is stopped keeps what it has."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.results, indent=1))

    def judge(self, kind, rows):
        """Says how the decoder's rows stand to what we hold ourselves to."""
        for who in rows:
            if most := TARGETS.get((kind, who)):
                print(f"  {kind}: {rows[who]['ratio']:.3f} of {who}'s seconds; at most {most} was asked for: "
                      f"{'met' if rows[who]['ratio'] <= most else 'missed'}")
        if kind == "training":
            print(f"  {kind}: {rows['ours']['share']:.1%} of the matmul rate; {SHARE:.0%} was asked for: "
                  f"{'met' if rows['ours']['share'] >= SHARE else 'missed'}")


def compare(bench, subject, sampling_rounds, with_memory):
    """Training and sampling of one subject, by all who have it."""
    size, how = bench.size, bench.how
    fitted = bench.fitted(subject, size)
    extra = {who: {"change": change} for who, (change, _) in fitted.items()}
    for who in fitted if with_memory else ():
        extra[who]["peak"] = alone(memory, subject, who, size, how, extra[who]["change"])
    steps = {who: training(made(subject, who, size, how, change, size.batch[subject]), how) for who, (change, _) in fitted.items()}
    found = in_turns(steps, bench.rounds, how.device, bench.rate)
    rows = bench.keep(f"{subject}, a training step of {size.batch[subject]}", found, {who: count for who, (_, count) in fitted.items()}, extra)
    if subject == "decoder":
        bench.judge("training", rows)
    del steps
    if not sampling_rounds:
        return
    contenders = {who: made(subject, who, size, how, change, size.drawn[subject]) for who, (change, _) in fitted.items()}
    n, few = size.steps[subject], min(2, size.steps[subject])
    counts = {who: flops(drawing(replace(contender), how, few)) * n / few for who, contender in contenders.items()}
    draws = {who: drawing(contender, how, n) for who, contender in contenders.items()}
    for contender in contenders.values():                                  # to warm up, a whole sampling would be too long
        drawing(contender, how, few)()
    found = in_turns(draws, sampling_rounds, how.device, bench.rate, warm_up=0)
    what = "embedding pictures and captions" if subject == "clip" else f"sampling in {n} steps"
    rows = bench.keep(f"{subject}, {what}, {size.drawn[subject]} at once", found, counts, {who: {"change": extra[who]["change"]} for who in extra})
    if subject == "decoder":
        bench.judge("sampling", rows)


def study_alone(bench):
    """Is our decoder's step as fast in turns with others as alone, before its FLOPs are counted as after, first as last?"""
    size, how, rows = bench.size, bench.how, {}

    def say(name, timings):
        rows[name] = [asdict(timing) for timing in timings]
        middle = {key: statistics.median(row[key] for row in rows[name]) for key in rows[name][0]}
        print(f"{name:<46}{middle['seconds']:>10.3f}{middle['kernel']:>10.2f}{middle['faults']:>12,.0f}", flush=True)

    print(f"{'our decoder’s training step':<46}{'seconds':>10}{'kernel s':>10}{'new pages':>12}")
    contender = made("decoder", "ours", size, how, {}, size.batch["decoder"])
    step = training(contender, how)
    say("alone, at first", in_turns({"ours": step}, bench.rounds, how.device)["ours"])
    target = flops(lambda: contender.loss().backward()) / size.batch["decoder"]
    contender.model.zero_grad(set_to_none=True)
    say("alone, after counting its FLOPs", in_turns({"ours": step}, bench.rounds, how.device, warm_up=1)["ours"])
    for who in bench.who("decoder")[1:]:
        change, _ = equalised("decoder", who, size, target)
        other = training(made("decoder", who, size, how, change, size.batch["decoder"]), how)
        for calls in ({"ours": step, who: other}, {who: other, "ours": step}):
            for name, timings in in_turns(calls, bench.rounds, how.device, warm_up=1).items():
                order = " then ".join(calls)
                say(f"in turns, {order}: {name}", timings)
        del other, calls
    say("alone, at last", in_turns({"ours": step}, bench.rounds, how.device, warm_up=1)["ours"])
    bench.results["alone"] = rows
    bench.write()


def sweep(bench):
    """The decoder's training step at other resolutions, batches and widths, one changed at a time."""
    size, cfg = bench.size, bench.size.decoder
    S, B, C = cfg.image_size, size.batch["decoder"], cfg.model_channels
    levels = [cfg.image_size // side for side in cfg.attn_resolutions]     # attention stays at its levels

    def sized(image_size=S, batch=B, model_channels=C):
        decoder = replace(cfg, image_size=image_size, model_channels=model_channels, attn_resolutions=tuple(image_size // k for k in levels))
        return replace(size, decoder=decoder, batch=size.batch | {"decoder": batch})

    for axis, values in (("image_size", (S // 2, S, 2 * S)), ("batch", (B // 4, B // 2, B, 2 * B)), ("model_channels", (C, 3 * C // 2, 2 * C))):
        for value in values:
            # Four times the work is divided by four again: the point is where time is lost, not how long one can wait.
            changed = sized(**{axis: value, **({"batch": max(1, B // 4)} if axis != "batch" and value > values[0] else {})})
            fitted = bench.fitted("decoder", changed)
            steps = {who: training(made("decoder", who, changed, bench.how, change, changed.batch["decoder"]), bench.how)
                     for who, (change, _) in fitted.items()}
            found = in_turns(steps, bench.rounds, bench.how.device, bench.rate, warm_up=1)
            d = changed.decoder
            bench.keep(f"decoder of {d.image_size} px, batch {changed.batch['decoder']}, {d.model_channels} channels", found,
                       {who: count for who, (_, count) in fitted.items()}, {who: {"change": change} for who, (change, _) in fitted.items()})
            del steps


def profile(bench):
    """Where the decoder's training step goes, by kind of operator."""
    size, shares = bench.size, {}
    for who, (change, _) in bench.fitted("decoder", size).items():
        step = training(made("decoder", who, size, bench.how, change, size.batch["decoder"]), bench.how)
        kinds, total, longest = where_time_goes(step, bench.how.device)
        print(f"\n{who}: {total:.2f} s in operators a step\n  " + ", ".join(f"{kind} {share:.1%}" for kind, share in kinds.items()))
        print("  longest: " + ", ".join(f"{name} {share:.1%}" for name, share in longest), flush=True)
        shares[who] = {"seconds": total, "kinds": kinds, "longest": dict(longest)}
    bench.results["profile"] = shares
    bench.write()


def precision(bench, subjects):
    """Our training steps in float32 and in bfloat16, by turns: "ours / it" is how many times faster the second are."""
    for subject in subjects:
        n, hows = bench.size.batch[subject], {"ours": replace(bench.how, dtype="fp32"), "in bf16": replace(bench.how, dtype="bf16")}
        steps = {name: training(made(subject, "ours", bench.size, how, {}, n), how) for name, how in hows.items()}
        found = in_turns(steps, bench.rounds, bench.how.device, bench.rate)
        bench.keep(f"{subject}, a training step of {n} in two precisions", found,
                   dict.fromkeys(hows, n * flops_of_one(subject, "ours", bench.size, {})))


def machine(device):
    """What this ran on."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file() and (found := re.search(r"model name\s*: (.+)", info.read_text())):
        name = found[1]
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {"name": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def parse(argv):
    """Command line -> namespace. Raises ValueError."""
    parser = Parser(prog="peers.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), metavar="SUBJECT")
    parser.add_argument("--peers", nargs="*", choices=PEERS, metavar="PEER", help="default: those that are installed")
    parser.add_argument("--size", choices=list(SIZES), default="full", help="micro: only to see that it runs")
    parser.add_argument("--rounds", type=int, default=5, help="of training steps")
    parser.add_argument("--sampling-rounds", type=int, default=1, help="0: no sampling")
    parser.add_argument("--device", default="cpu", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES))
    parser.add_argument("--compile", action="store_true", help="torch.compile all networks")
    parser.add_argument("--layout", default="own", choices=["own", "channels_last"], help="of the peers' weights")
    parser.add_argument("--memory", default=True, action=argparse.BooleanOptionalAction, help="peak memory, in processes of their own")
    parser.add_argument("--keep-memory", default=True, action=argparse.BooleanOptionalAction, help="as train.py does; here for all alike")
    parser.add_argument("--out", type=Path, default=Path("runs/peers.json"))
    instead = parser.add_mutually_exclusive_group()
    for option, text in (("alone", "our step alone and in turns"), ("sweep", "resolution, batch, width"), ("profile", "where time goes"),
                         ("precision", "float32 and bfloat16")):
        instead.add_argument(f"--{option}", action="store_true", help=f"instead: {text}")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.sampling_rounds < 0:
        raise ValueError("--rounds must be at least 1 and --sampling-rounds at least 0")
    if args.out.is_dir():
        raise ValueError(f"--out {args.out} is a folder: it names a file")
    missing = [who for who in (PEERS if args.peers is None else args.peers) if not installed(who)]
    if args.peers is not None and missing:
        raise ValueError(f"{missing[0]} is not installed: {INSTALL[missing[0]]}")
    for who in missing:
        print(f"note: {who} is left out, because it is not installed: {INSTALL[who]}")
    args.peers = [who for who in (PEERS if args.peers is None else args.peers) if who not in missing]
    args.device = pick_device(args.device)
    return args


def main(argv=None):
    """The command: 0 when all went well, 2 after a mistake (one sentence on standard error)."""
    torch.set_float32_matmul_precision("high")                             # as train.py
    try:
        args = parse(argv)
        bench = Bench(args)
        print("{name}, {threads} threads, torch {torch}".format(**bench.results["machine"]))
        if args.alone or args.sweep or args.profile:
            (study_alone if args.alone else sweep if args.sweep else profile)(bench)
        elif args.precision:
            precision(bench, args.subjects)
        else:
            for subject in args.subjects:
                compare(bench, subject, args.sampling_rounds, args.memory)
    except (ValueError, OSError) as error:
        print(f"peers.py: {sentence(error)}", file=sys.stderr)
        return 2
    seen = ", ".join(f"{name} {rate / 1e12:.3f}" for name, rate in bench.rate.seen.items())
    print(f"\nbest TFLOP/s of a matrix product: {seen}; written to {bench.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

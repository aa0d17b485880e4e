"""One training step of a preset's decoder, as train.py takes it: pictures a second, the share of the matmul rate, and memory.

    python tests/benchmarks/decoder_step.py --preset small --dtype bf16 --compile                   on one GPU
    python tests/benchmarks/decoder_step.py --preset paper --dtype bf16 --recompute --batch 16      all of the paper's 3.5 billion weights
    python tests/benchmarks/decoder_step.py --preset micro --device cpu                             only to see that it runs

With loss, backward pass, clipping, AdamW and the average of the weights, on random pictures and captions. FLOPs are those that the network
asks for: what `--recompute` computes a second time does not count. The first steps, in which torch compiles, are not timed.
"""

import argparse
import math
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
from measuring import DTYPES, MatmulRate, flops, resident, timed           # noqa: E402
from mini_dalle2.configs import PRESETS, build, preset          # noqa: E402
from mini_dalle2.runtime.commands import Parser, sentence          # noqa: E402
from mini_dalle2.runtime.device import machine_memory          # noqa: E402
from mini_dalle2.runtime.device import out_of_memory          # noqa: E402
from mini_dalle2.configs import TrainConfig          # noqa: E402
from mini_dalle2.runtime.device import keep_memory, pick_device          # noqa: E402
from mini_dalle2.training.state import EMA, Objective, make_optimizer, network_options          # noqa: E402


def batch_of(cfg, n, device):
    """Random pictures (B, 3, S, S), z_img (B, D) and tokens (B, L)."""
    images = torch.randn(n, 3, cfg.image_size, cfg.image_size, device=device).clamp(-1, 1)
    tokens = torch.randint(1, cfg.eot_id, (n, cfg.context_length), device=device)
    tokens[:, -1] = cfg.eot_id
    return images.contiguous(memory_format=torch.channels_last), F.normalize(torch.randn(n, cfg.clip_dim, device=device), dim=-1), tokens


def flops_of(cfg, n):
    """FLOPs of loss and gradient for n pictures, without computing them."""
    with torch.device("meta"):
        model = build(cfg)
        return flops(lambda: model.loss(*batch_of(cfg, n, "meta")).backward())


def measure(cfg, train, n, device, steps):
    """(Timings of `steps` steps, FLOP/s of the best matrix product, bytes of memory at most)."""
    rate = MatmulRate(device, train.dtype)
    before = resident("VmRSS")
    with torch.device(device):
        model = build(cfg)
    model.to(memory_format=torch.channels_last)
    batch, generator, found = batch_of(cfg, n, device), torch.Generator(device).manual_seed(0), []
    objective = Objective(model, lambda model, batch, generator: model.loss(*batch, generator=generator), train.dtype == "bf16")
    params, optimizer, ema = list(model.parameters()), make_optimizer(model, train), EMA(model, train.ema)

    def step():
        objective(batch, generator).backward()
        nn.utils.clip_grad_norm_(params, train.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(len(found))

    with network_options(model.train(), train):
        for _ in range(3):
            step()
        for _ in range(steps):
            found.append(timed(step, device))
            rate()
    return found, rate.best, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM") - before


def parse(argv):
    """Command line -> namespace. Raises ValueError."""
    parser = Parser(prog="decoder_step.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="small")
    parser.add_argument("--batch", type=int, help="pictures (default: the preset's)")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--recompute", action="store_true", help="keep few activations")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.batch is not None and args.batch < 1:
        raise ValueError("--steps and --batch must be at least 1")
    if args.preset == "karlo":
        raise ValueError("--preset karlo reads captions through a CLIP that is not here: choose another")
    args.device = pick_device(args.device)
    return args


def main(argv=None):
    """The command: 0 when all went well, 2 after a mistake (one sentence on standard error)."""
    torch.set_float32_matmul_precision("high")
    keep_memory()
    try:
        args = parse(argv)
        stage = preset(args.preset).decoder
        cfg, n = stage.model, args.batch or stage.train.batch_size
        train = TrainConfig(ema=stage.train.ema, grad_clip=stage.train.grad_clip, dtype=args.dtype, compile=args.compile, recompute=args.recompute)
        with torch.device("meta"):
            weights = sum(p.numel() for p in build(cfg).parameters())
        there = torch.cuda.mem_get_info(args.device)[0] if args.device.type == "cuda" else machine_memory()
        needed = 5 * 4 * weights                                           # weights, gradients, AdamW's two averages, the averaged weights
        if needed > there:
            raise ValueError(f"the decoder of {args.preset} needs {needed / 1e9:.1f} GB before it has seen a picture; there are {there / 1e9:.1f} GB")
        found, best, peak = measure(cfg, train, n, args.device, args.steps)
    except (ValueError, OSError) as error:
        print(f"decoder_step.py: {sentence(error)}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        print("decoder_step.py: there is not enough memory for this: make --batch smaller, or add --recompute", file=sys.stderr)
        return 2
    taken, count = statistics.median(timing.seconds for timing in found), flops_of(cfg, n)
    print(f"{args.preset}: {weights / 1e6:,.1f} million weights, {n} pictures a step, {args.dtype}{', compiled' * args.compile}"
          f"{', recomputing' * args.recompute}, on {args.device}")
    print(f"{taken:.3f} s a step, {n / taken:,.1f} pictures a second, {count / taken / 1e12:.2f} of {best / 1e12:.2f} TFLOP/s that a matrix product "
          f"reaches ({count / taken / best:.1%}), {peak / 1e9:.2f} GB at most")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The training loop: one visible loop for every stage, and what a long run needs around it (unCLIP App. C: AdamW and EMA).

    g  = ∇L(w)                              or, with SAM, ∇L(w + ρ·g/‖g‖₂)      (Foret et al. 2020; unCLIP App. C, ρ = 0.1)
    w ← AdamW(w, g clipped to norm c)       learning rate: linear warm-up, then a half cosine to zero
    e ← d·e + (1 − d)·w                     the moving average that is sampled from

Around it: a progress bar, one line of metrics.jsonl per window of steps, checkpoints that are written atomically, Ctrl-C that saves,
and a resume that continues bit for bit. Two files per stage lie in the run folder. STAGE.pt is enough by itself to sample (configuration,
averaged weights, tokenizer). STAGE.resume.pt, four times as large, is only needed to go on training: delete it once a stage is done.
Several processes (distributed.py), and the parts a batch is computed in, have equal shares of each batch and of its noise (noise.py).

References: AdamW (1711.05101), SAM (2010.01412), CLIP §2.5 (2103.00020). Read next: configs.py (the numbers), train.py (the batches).
"""
import contextlib
import ctypes
import functools
import json
import math
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from .checks import check_choice, check_positive, check_range
from .distributed import alone, anyone, collect, is_main, like, mean, rank, whole, world, wrap
from .noise import Share


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4                       # of the C library's mallopt


@dataclass(frozen=True)
class TrainConfig:
    """How one stage is trained. Raises ValueError for a value that cannot work."""
    steps: int = 1000               # optimiser steps in all
    batch_size: int = 64            # examples per step
    lr: float = 3e-4                # peak learning rate
    beta1: float = 0.9              # Adam's decay of the gradient's mean (0.9 in every stage of the paper)
    beta2: float = 0.999            # Adam's decay of the squared gradient's mean
    eps: float = 1e-8               # Adam's denominator
    weight_decay: float = 0.0       # decoupled, on the matrices of linear and convolution layers only
    ema: float = 0.9999             # d of the moving average, reached after a warm-up (see EMA)
    # mini: the paper names neither warm-up, decay nor clipping; ours are CLIP's (warm-up, cosine) and the usual clipping to norm 1.
    warmup: int = 100               # steps of linear warm-up
    decay: str = "cosine"           # "cosine": to zero at the last step; "none": constant after the warm-up
    grad_clip: float = 1.0          # largest gradient norm; 0 = no clipping
    sam_rho: float = 0.0            # SAM's ρ; 0 = plain gradient (one backward pass instead of two)
    accumulate: int = 1             # parts that a batch is computed in, one after the other: less memory for the same gradient
    recompute: bool = False         # gradient checkpointing: less memory for a third more time (transformer.run_block)
    dtype: str = "fp32"             # "bf16": matrices are multiplied in bfloat16 (autocast); weights and optimiser stay in float32
    shard: bool = False             # several processes: each keeps a part of the weights only, for models too large for one GPU
    compile: bool = False           # torch.compile: the first steps take minutes, the others are faster on a GPU
    save_every: int = 500           # steps between checkpoints
    log_every: int = 20             # steps per line of metrics.jsonl

    def __post_init__(self):
        check_choice("decay", self.decay, ("cosine", "none"))
        check_choice("dtype", self.dtype, ("fp32", "bf16"))
        check_positive(self, "steps", "batch_size", "save_every", "log_every", "accumulate")
        check_range(self, 0, math.inf, "eps", "weight_decay", "warmup", "grad_clip", "sam_rho")
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, not {self.lr}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by accumulate {self.accumulate}")
        if self.sam_rho and self.accumulate > 1:
            raise ValueError("sam_rho needs the gradient of the whole batch at once: accumulate must be 1")
        if self.sam_rho and self.shard:
            raise ValueError("sam_rho needs each process's own gradient, which a sharded model does not have: shard must be false")
        for key in ("beta1", "beta2", "ema"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 0 and below 1, not {getattr(self, key)}")


def pick_device(name="auto"):
    """"auto", "cpu" or "cuda" -> torch.device; "auto" is the GPU if there is one. Raises ValueError when that device cannot be had.

    A torch.device stays what it is.
    """
    if isinstance(name, torch.device):
        return name
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f'unknown device "{name}": it is auto, cpu or cuda')
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch finds no usable GPU")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def keep_memory():
    """Freed memory stays with this process, at hand for the next step: only with the GNU C library, which by default gives it back.

    Large tensors are then no longer asked of the system one by one, which makes and zeroes each of their pages again in every step. The results
    are the same to the bit. It is a setting of the whole process, and therefore made by the commands.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 64 * 2 ** 20)):
            mallopt(parameter, value)


def lr_at(step, cfg):
    """Learning rate of a 0-based step: lr·(step+1)/warmup, then lr·½(1 + cos πu), u from 0 (end of warm-up) to 1 (`steps`). CLIP §2.5."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    if cfg.decay == "none":
        return cfg.lr
    u = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, u)))


def make_optimizer(model, cfg):
    """AdamW; only the matrices of linear and convolution layers are decayed, gains, biases and embeddings are not (CLIP §2.5).

    Embeddings are here all tables and learned tokens: positions, null embeddings, the prior's final query.
    """
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d)
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, layers)}
    matrices -= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}       # a tied table stays a table
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if id(p) in matrices], "weight_decay": cfg.weight_decay},
              {"params": [p for p in trained if id(p) not in matrices], "weight_decay": 0.0}]
    fused = trained[0].device.type in ("cpu", "cuda")      # one kernel for all of it, where torch has one: several times faster
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=fused)


class Objective(nn.Module):
    """loss_fn(model, batch, generator) as a module, in the precision asked for: torch averages the gradients of modules."""

    def __init__(self, model, loss_fn, bf16):
        super().__init__()
        self.model, self.loss_fn, self.bf16 = model, loss_fn, bf16

    def forward(self, batch, generator):
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.bf16):
            return self.loss_fn(self.model, batch, generator)


def backward(params, loss_fn, streams, rho=0.0, own=contextlib.nullcontext):
    """Leaves the gradient of `loss_fn()` in `params`, or with rho > 0 the SAM gradient, and returns the (detached) loss at w.

    SAM: g = ∇L(w), then the gradient is taken again at w + ρ·g/‖g‖₂, on the same batch and with the same noise. The norm is over all
    parameters together. With several processes each uses its own g, as in the paper (App. C): `own` is the context for that.
    """
    if rho == 0:
        loss = loss_fn()
        loss.backward()
        return loss.detach()
    before = streams.state()
    with own():
        loss = loss_fn()
        loss.backward()
    params = [p for p in params if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in params]))
    weights = [p.detach().clone() for p in params]         # kept, because (w + e) − e is not w in floating point
    with torch.no_grad():
        for p in params:
            p.add_(p.grad * (rho / (norm + 1e-12)))
            p.grad = None
    streams.load(before)                                   # the same dropout and noise at both points
    loss_fn().backward()
    with torch.no_grad():
        for p, w in zip(params, weights):
            p.copy_(w)
    return loss.detach()


class EMA:
    """Exponential moving average of the weights, e ← d_n·e + (1 − d_n)·w with d_n = min(d, (1+n)/(10+n)) at update n = 0, 1, ….

    The warm-up makes the average span about the last tenth of the steps so far, until d's own span 1/(1−d) is shorter. With the constant
    d = 0.9999 a run of 3,000 steps would still be 74 % initialisation. Buffers are constants here, so the copies made at the start serve.
    """

    def __init__(self, model, decay):
        self.decay = decay
        self.shadow = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self._pairs = [(self.shadow[name], p) for name, p in model.named_parameters() if name in self.shadow]

    @torch.no_grad()
    def update(self, n):
        """Moves the average towards the model's present weights; n counts the updates made before."""
        decay = min(self.decay, (1 + n) / (10 + n))
        for average, p in self._pairs:
            average.lerp_(p, 1 - decay)


class Streams:
    """Random streams: `data` (on the CPU: crops, near misses), `noise` (the model's device: t, ε, dropped conditions), torch's own (dropout).

    Their states are part of a checkpoint, so that a resumed run draws what the uninterrupted one would have drawn.
    """

    def __init__(self, device, seed=0):
        self.device = torch.device(device)
        self.data = torch.Generator().manual_seed(seed)
        self.noise = torch.Generator(self.device).manual_seed(seed + 1)
        if rank() > 0:                                     # the first two are the same in all processes (see noise.py), dropout is not
            torch.manual_seed(seed + 1 + rank())

    def shares(self, parts):
        """(data, noise) for each of the `parts` parts, one after the other, of this process's share of a batch."""
        count = world() * parts
        if count == 1:
            yield self.data, self.noise
            return
        start = self.data.get_state(), self.noise.get_state()
        for index in range(rank() * parts, (rank() + 1) * parts):
            self.data.set_state(start[0])                  # each draws the numbers of the whole batch
            self.noise.set_state(start[1])
            yield Share(self.data, index, count), Share(self.noise, index, count)

    def own(self):
        """The states of torch's own streams, which differ between processes."""
        cuda = {"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {}
        return {"cpu": torch.get_rng_state()} | cuda

    def state(self):
        """The states of all streams."""
        return {"data": self.data.get_state(), "noise": self.noise.get_state()} | self.own()

    def load(self, state):
        """Restores `state()`. A run that moves from CPU to CUDA or back keeps its data stream and starts new noise."""
        self.data.set_state(state["data"])
        torch.set_rng_state(state["cpu"])
        if ("cuda" in state) == (self.device.type == "cuda"):
            self.noise.set_state(state["noise"])
            if "cuda" in state:
                torch.cuda.set_rng_state(state["cuda"], self.device)


@contextlib.contextmanager
def writing(path):
    """Makes a full disk, or one that may not be written to, an OSError that names the file, in one sentence."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} could not be written ({error.strerror or error}); what was saved before is still there") from None


@contextlib.contextmanager
def atomic_open(path):
    """Opens a neighbour of `path` for writing bytes and renames it over `path` at the end: there is the old file or the new, never half.

    Raises OSError when the disk is full, or may not be written to.
    """
    path, temporary = Path(path), Path(f"{path}.tmp")
    try:
        with writing(path):
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())                    # the contents reach the disk before the name does
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_checkpoint(checkpoint, path):
    """Writes a dict of tensors and plain values atomically. Its key "stage" says what it is."""
    with atomic_open(path) as file:
        torch.save(checkpoint, file)


def load_checkpoint(path, stage=None):
    """Reads a checkpoint, a dict with tensors on the CPU, without running any code in it; stage: what it must be of, if that matters.

    Raises FileNotFoundError, ValueError.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                             # torch raises half a dozen types for a damaged file, all with long texts
        raise ValueError(f"{path} cannot be read as a checkpoint: it is damaged or not one ({type(error).__name__})") from None
    if not isinstance(checkpoint, dict) or "stage" not in checkpoint:
        raise ValueError(f"{path} is a torch file, but no checkpoint of mini_dalle2")
    if stage not in (None, checkpoint["stage"]):
        raise ValueError(f"{path} is a checkpoint of {checkpoint['stage']}, not of {stage}")
    return checkpoint


def read_metrics(run):
    """The lines of metrics.jsonl as a list of dicts; what is none (half-written, since the machine went down) is left out."""
    path, entries = Path(run) / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict) and "stage" in entry and isinstance(entry.get("step"), int)]


class Log:
    """Progress bar and metrics.jsonl: collects losses on the device and reads them once per window, so that a GPU need not wait.

    indices: step -> (B,), which examples it learned from; written to STAGE.not_finite.json when that went wrong.
    """

    def __init__(self, stage, run, cfg, step, seconds, indices=None):
        self.stage, self.path, self.every, self.lr = stage, Path(run) / "metrics.jsonl", cfg.log_every, cfg.lr
        self.start, self.smooth, self.window = time.perf_counter() - seconds, None, []
        self.indices, self.culprit = indices, Path(run) / f"{stage}.not_finite.json"
        self.bar = tqdm(total=cfg.steps, initial=step, desc=stage, unit="step", dynamic_ncols=True, mininterval=0.5, disable=not is_main())
        if not is_main():
            return
        self.culprit.unlink(missing_ok=True)
        # Lines after `step` are those of a run that went down after its last checkpoint and is now repeated.
        kept = [entry for entry in read_metrics(run) if entry["stage"] != stage or entry["step"] <= step]
        with atomic_open(self.path) as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in kept).encode())

    def seconds(self):
        """Time spent in this stage, those of earlier, interrupted sessions included."""
        return time.perf_counter() - self.start

    def add(self, step, loss, norm, lr):
        """Notes one step; `step` counts the steps done."""
        self.window.append((step, loss, norm, lr))
        self.bar.update()
        if step % self.every == 0:
            self.flush()

    def flush(self):
        """Writes the window, if there is one, as one line. Raises FloatingPointError when a loss or a gradient in it was not finite."""
        if not self.window:
            return
        steps, losses, norms, rates = zip(*self.window)
        self.window = []
        values = mean(torch.stack([torch.stack(losses), torch.stack(norms)])).tolist()
        for step, loss, norm in zip(steps, *values):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self.stop(step, loss, norm)
        if not is_main():
            return
        loss, norm = (sum(column) / len(column) for column in values)
        self.smooth = loss if self.smooth is None else 0.8 * self.smooth + 0.2 * loss
        self.bar.set_postfix_str(f"loss {self.smooth:.4f}", refresh=False)
        entry = {"stage": self.stage, "step": steps[-1], "loss": loss, "lr": rates[-1], "grad_norm": norm, "seconds": self.seconds()}
        with writing(self.path), open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")

    def stop(self, step, loss, norm):
        """Notes which examples a step learned from that was not finite, and raises FloatingPointError."""
        listed = ""
        if self.indices:
            listed = f" (its examples are listed in {self.culprit})"
            if is_main():
                found = {"stage": self.stage, "step": step, "loss": str(loss), "grad_norm": str(norm)}
                with atomic_open(self.culprit) as file:
                    file.write(json.dumps(found | {"indices": self.indices(step - 1).tolist()}).encode())
        raise FloatingPointError(f"{self.stage}: loss {loss:g}, gradient norm {norm:g} at step {step}{listed}; nothing was saved after it: "
                                 f"go on with --resume and a lower rate, say --{self.stage}.lr={self.lr / 3:.1e}")


class Interrupt:
    """While it is entered, the first Ctrl-C only sets `requested`; a second one interrupts at once, as usual."""
    def __enter__(self):
        self.requested = False
        self.here = threading.current_thread() is threading.main_thread()      # only there may a handler be set
        self.previous = self.here and signal.signal(signal.SIGINT, self._request) or signal.default_int_handler
        return self

    def _request(self, signum, frame):
        self.requested = True
        signal.signal(signal.SIGINT, self.previous)

    def __exit__(self, *_):
        if self.here:
            signal.signal(signal.SIGINT, self.previous)


def restore(path, model, optimizer, ema, streams):
    """Loads STAGE.resume.pt into the four; returns (step, seconds). Raises ValueError when the file is not of this model.

    With as many processes as before the run goes on bit for bit (with more than two, as far as their sums are taken in the same order). With
    another number it sees the same batches and noise, but sums are rounded, and dropout is drawn, differently.
    """
    saved = load_checkpoint(path)
    try:
        now = model.state_dict()
        model.load_state_dict({name: like(value, now.get(name)) for name, value in saved["model"].items()})
        params = [p for group in optimizer.param_groups for p in group["params"]]
        state = {i: {key: like(value, params[i]) if value.ndim else value for key, value in of.items()} for i, of in saved["optimizer"].items()}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})                   # betas and the like may have changed
        for name, value in ema.shadow.items():
            value.copy_(like(saved["ema"][name], value))
        processes = saved.get("processes", [saved["streams"]])
        if len(processes) == world():
            streams.load(saved["streams"] | processes[rank()])
        else:
            streams.load(saved["streams"])
            torch.manual_seed(saved["step"] * world() + rank())
            print(f"note: {saved['stage']} was trained by {len(processes)} processes so far, now by {world()}: batches and noise stay those of an "
                  f"undisturbed run; dropout and the rounding of sums do not, so that weights are no longer bit-identical to its")
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        raise ValueError(f"{path} belongs to a model of other sizes, or is not from training") from None
    return saved["step"], saved["seconds"]


def fit(stage, model, draw, loss_fn, cfg, run, header, resume=False, seed=0, indices=None):
    """Trains `model` and returns (model with its averaged weights, in eval mode; seconds spent).

    stage:   name of the files and of the bar
    header:  header(averaged weights) -> dict of plain values that STAGE.pt carries besides them (configuration, tokenizer)
    draw:    draw(generator, step) -> batch of a 0-based step; what is random in it comes from the generator, which lives on the CPU;
             a Share (noise.py) asks for some of its rows
    loss_fn: loss_fn(model, batch, generator) -> scalar; the generator lives on the model's device and makes the noise
    run:     folder for STAGE.pt, STAGE.resume.pt and metrics.jsonl
    indices: indices(step) -> (B,), which examples a step learns from, to be written down when it goes wrong
    resume:  continue STAGE.resume.pt if there is one; a finished stage takes no further step
    Raises FloatingPointError when the loss is not finite, KeyboardInterrupt after a Ctrl-C (saved), ValueError for a bad checkpoint.
    """
    (step, seconds), latest = (0, 0.0), Path(run) / f"{stage}.resume.pt"
    objective = wrap(Objective(model, loss_fn, cfg.dtype == "bf16"), cfg.shard)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer, ema, streams = make_optimizer(model, cfg), EMA(model, cfg.ema), Streams(params[0].device, seed)
    own = functools.partial(alone, objective)              # a context: gradients stay those of this process
    if resume and latest.is_file():
        step, seconds = restore(latest, model, optimizer, ema, streams)

    def together(tensors):
        return {name: whole(value) for name, value in tensors.items()}

    def save():
        processes, average, weights = collect(streams.own()), together(ema.shadow), together(model.state_dict())
        moments = {i: together(of) for i, of in optimizer.state_dict()["state"].items()}
        if not is_main():
            return
        done = header(average) | {"stage": stage, "step": step, "steps": cfg.steps, "seconds": log.seconds(), "ema": average}
        state = {"model": weights, "optimizer": moments, "streams": streams.state()}
        state |= {"processes": processes} if world() > 1 else {}
        save_checkpoint(done | state, latest)
        save_checkpoint(done, Path(run) / f"{stage}.pt")

    log = Log(stage, run, cfg, step, seconds, indices)
    if step >= cfg.steps:
        save()                                             # the machine may have gone down between the two files of the last step
    model.train()
    with contextlib.closing(log.bar), Interrupt() as interrupt:
        while step < cfg.steps:
            lr = lr_at(step, cfg)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = 0
            for part, (data, noise) in enumerate(streams.shares(cfg.accumulate), 1):
                batch = draw(data, step)
                with contextlib.nullcontext() if part == cfg.accumulate else own():        # averaged once, with the last part
                    loss += backward(params, lambda: objective(batch, noise) / cfg.accumulate, streams, cfg.sam_rho, own)
            norm = whole(nn.utils.clip_grad_norm_(params, cfg.grad_clip or math.inf)).to(loss.device)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update(step)
            step += 1
            log.add(step, loss, norm, lr)
            # Read once: a Ctrl-C from here on is for the next step. Several processes must agree on it, for which GPUs wait; on CPUs, where
            # steps are long, it is done after each: torchrun kills who has not ended half a minute after a Ctrl-C.
            asked = step % cfg.log_every == 0 or step >= cfg.steps or streams.device.type == "cpu" or world() == 1
            stop = asked and anyone(interrupt.requested, streams.device)
            if step % cfg.save_every == 0 or step >= cfg.steps or stop:
                log.flush()                                # first, because it refuses a state that has gone wrong
                save()
            if stop:
                raise KeyboardInterrupt(f"{stage} stopped and saved at step {step} of {cfg.steps}")
    model.load_state_dict(ema.shadow)
    return model.eval(), log.seconds()

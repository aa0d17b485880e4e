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
import functools
import math
from pathlib import Path

import torch
from torch import nn

from ..runtime.files import load_checkpoint, save_checkpoint
from ..runtime.noise import Share
from ..runtime.processes import alone, anyone, collect, is_main, like, rank, whole, world, wrap
from .log import Interrupt, Log


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

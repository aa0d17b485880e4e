"""The state of a training, around the loop in train.py (unCLIP App. C: AdamW and EMA).

    g ← ∇L(w)                          with SAM: ∇L(w + ρ·g/‖g‖₂)     (unCLIP App. C: ρ = 0.1)
    w ← AdamW(w, g clipped to norm c)
    e ← d·e + (1 − d)·w                EMA weights, which sampling uses

A resumed training goes on bit for bit: its optimizer, EMA weights and random streams are saved
too. Each stage has two files in the run folder. STAGE.pt is enough to sample: it holds the
configuration, the EMA weights and the tokenizer. STAGE.resume.pt is four times as large, and only
needed to go on with the training. A batch may be divided among processes, and into parts that are
computed one after the other. All shares are equal (../runtime/noise.py, ../runtime/processes.py).

References: AdamW (1711.05101), SAM (2010.01412), CLIP §2.5 (2103.00020).
Read next: log.py, then stages.py, which says what each model learns from.
"""

import contextlib
import math
from pathlib import Path

import torch
from torch import nn

from ..configs import check_weights, load_weights
from ..runtime.files import load_checkpoint, save_checkpoint
from ..runtime.noise import Share
from ..runtime.processes import (
    anyone, collect, is_main, like, own_gradients, parallel_module, rank, whole, world)
from ..transformer import Transformer
from ..unet import UNet


def lr_at(step, cfg):
    """Learning rate of a 0-based step (CLIP §2.5).

    Warm-up: lr·(step+1)/warmup. Then lr·½(1 + cos πu), with u from 0 to 1 at the last step.
    """
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    if cfg.decay == "none":
        return cfg.lr
    u = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, u)))


def make_optimizer(model, cfg):
    """AdamW for a model. Weight decay acts on the matrices of linear and convolution layers.

    Gains, biases and embeddings do not decay (CLIP §2.5). Embeddings are all tables and learned
    tokens: positions, null embeddings, the prior's final query.
    """
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d)
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, layers)}
    # A tied table stays a table.
    matrices -= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decaying = [p for p in trained if id(p) in matrices]
    others = [p for p in trained if id(p) not in matrices]
    groups = [{"params": decaying, "weight_decay": cfg.weight_decay},
              {"params": others, "weight_decay": 0.0}]
    # One kernel for all parameters is several times faster, where torch has one.
    fused = trained[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps,
                             fused=fused)


def numbered(optimizer):
    """{number: parameter}, as the optimizer numbers what it keeps about them."""
    return dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))


def check_moments(optimizer, moments):
    """Raise KeyError or RuntimeError unless these, {number: AdamW's moments}, are of its weights.

    AdamW itself would take moments of any size and type.
    """
    if not moments:
        raise KeyError("moments")
    params = numbered(optimizer)
    for i, of in moments.items():
        p = params[i]
        check_weights({"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p}, of)


class Objective(nn.Module):
    """loss(model, batch, noise) as a module, in the precision of the training.

    torch averages gradients over processes for modules only.
    """

    def __init__(self, model, loss, bf16=False):
        super().__init__()
        self.model = model
        self.loss = loss
        self.bf16 = bf16

    def forward(self, batch, noise):
        """The loss of a batch; noise: a random stream, or a Share of one."""
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.bf16):
            return self.loss(self.model, batch, noise)


def sam_backward(objective, parameters, batch, streams, noise, rho):
    """Leave the SAM gradient in the parameters. Return the loss at w, detached.

    g = ∇L(w). The gradient is then taken at w + ρ·g/‖g‖₂, on the same batch and with the same
    noise. The norm is over all parameters together. Of several processes each climbs by its own
    g, as in the paper (unCLIP App. C).
    """
    before = streams.state()
    with own_gradients(objective):
        loss = objective(batch, noise)
        loss.backward()
    moved = [p for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in moved]))
    # A copy of the weights, because (w + e) − e is not w in floating point.
    weights = [p.detach().clone() for p in moved]
    with torch.no_grad():
        for p in moved:
            p.add_(p.grad * (rho / (norm + 1e-12)))
            p.grad = None
    streams.load(before)
    objective(batch, noise).backward()
    with torch.no_grad():
        for p, w in zip(moved, weights):
            p.copy_(w)
    return loss.detach()


class EMA:
    """Exponential moving average of the weights: e ← d_n·e + (1 − d_n)·w at update n = 0, 1, ….

    d_n = min(d, (1+n)/(10+n)). The warm-up lets the average span about the last tenth of the
    steps so far, until d's own span 1/(1−d) is shorter. With a constant d = 0.9999, a run of
    3,000 steps would still be 74 % initialisation. Buffers never change in training, so the
    copies made at the start are enough.
    """

    def __init__(self, model, decay):
        self.decay = decay
        self.shadow = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self._pairs = [(self.shadow[name], p) for name, p in model.named_parameters()
                       if name in self.shadow]

    @torch.no_grad()
    def update(self, n):
        """Move the EMA weights towards the present weights; n: the number of earlier updates."""
        decay = min(self.decay, (1 + n) / (10 + n))
        for average, p in self._pairs:
            average.lerp_(p, 1 - decay)


class Streams:
    """The random streams of a training. Their states are saved, so that a resumed run goes on.

    data:  on the CPU: crops, near misses
    noise: on the model's device: t, ε, dropped conditions
    torch's own stream: dropout
    """

    def __init__(self, device, seed=0):
        self.device = torch.device(device)
        self.data = torch.Generator().manual_seed(seed)
        self.noise = torch.Generator(self.device).manual_seed(seed + 1)
        # `data` and `noise` are the same in all processes (see noise.py). Dropout differs.
        if rank() > 0:
            torch.manual_seed(seed + 1 + rank())

    def shares(self, parts):
        """Yield (data, noise) for each of the `parts` parts of this process's share of a batch."""
        count = world() * parts
        if count == 1:
            yield self.data, self.noise
            return
        data = self.data.get_state()
        noise = self.noise.get_state()
        for index in range(rank() * parts, (rank() + 1) * parts):
            # Each part makes the numbers of the whole batch, and keeps its own rows.
            self.data.set_state(data)
            self.noise.set_state(noise)
            yield Share(self.data, index, count), Share(self.noise, index, count)

    def own(self):
        """The states of torch's own streams, which differ between processes."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        if self.device.type == "mps":
            states["mps"] = torch.mps.get_rng_state()
        return states

    def state(self):
        """The states of all streams."""
        return {"data": self.data.get_state(), "noise": self.noise.get_state()} | self.own()

    def load(self, state):
        """Restore `state()`.

        A run that moves to another kind of device keeps its data stream, and starts new noise.
        """
        self.data.set_state(state["data"])
        torch.set_rng_state(state["cpu"])
        saved_on = next((kind for kind in ("cuda", "mps") if kind in state), "cpu")
        if saved_on == self.device.type:
            self.noise.set_state(state["noise"])
            if "cuda" in state:
                torch.cuda.set_rng_state(state["cuda"], self.device)
            if "mps" in state:
                torch.mps.set_rng_state(state["mps"])


class State:
    """All that the loop changes from step to step: weights, optimizer, EMA, streams, `step`."""

    def __init__(self, stage, model, folder, resume=False):
        """stage: see stages.py. resume: go on with NAME.resume.pt in `folder`, if it is there.

        Raises ValueError when that file belongs to another model.
        """
        cfg = stage.cfg
        self.stage = stage
        self.cfg = cfg
        self.model = model
        self.folder = Path(folder)
        self.latest = self.folder / f"{stage.name}.resume.pt"
        bf16 = cfg.dtype == "bf16"
        self.objective = parallel_module(Objective(model, stage.loss, bf16), cfg.shard)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(model, cfg)
        self.ema = EMA(model, cfg.ema)
        self.streams = Streams(self.parameters[0].device, stage.seed)
        self.step = 0
        self.seconds = 0.0
        if resume and self.latest.is_file():
            self.restore()
        model.train()

    def parts(self):
        """Yield (data stream, noise stream, context) for each part of this process's batch.

        The gradients add up over the parts. They are averaged over the processes once, with the
        last part: the context says when.
        """
        count = self.cfg.accumulate
        for part, (data, noise) in enumerate(self.streams.shares(count), start=1):
            last = part == count
            yield data, noise, contextlib.nullcontext() if last else own_gradients(self.objective)

    def sam_backward(self, batch, noise):
        """Leave the SAM gradient in the parameters. Return the loss."""
        return sam_backward(self.objective, self.parameters, batch, self.streams, noise,
                            self.cfg.sam_rho)

    def set_lr(self, lr):
        """Give the optimizer the learning rate of the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def finished(self):
        """Whether all steps are done."""
        return self.step >= self.cfg.steps

    def must_save(self):
        """Whether a checkpoint is due after this step."""
        return self.step % self.cfg.save_every == 0 or self.finished()

    def must_stop(self, interrupt):
        """Whether a Ctrl-C came before this moment, to any process. A later one waits a step.

        Several processes must agree. GPUs would wait for the answer, so they ask only when the
        log is written. On CPUs, where steps are slow, every step asks: torchrun kills any
        process that still runs 30 s after Ctrl-C.
        """
        asked = (self.step % self.cfg.log_every == 0 or self.finished()
                 or self.streams.device.type == "cpu" or world() == 1)
        return asked and anyone(interrupt.requested, self.streams.device)

    def save(self, seconds):
        """Write NAME.resume.pt, then NAME.pt. All processes must call this together.

        seconds: what the training has taken so far.
        """
        processes = collect(self.streams.own())
        ema = whole_tensors(self.ema.shadow)
        weights = whole_tensors(self.model.state_dict())
        moments = {i: whole_tensors(of) for i, of in self.optimizer.state_dict()["state"].items()}
        if not is_main():
            return
        done = self.stage.header(ema) | {
            "stage": self.stage.name, "step": self.step, "steps": self.cfg.steps,
            "seconds": seconds, "ema": ema}
        more = {"model": weights, "optimizer": moments, "streams": self.streams.state()}
        if world() > 1:
            more["processes"] = processes
        save_checkpoint(done | more, self.latest)
        save_checkpoint(done, self.folder / f"{self.stage.name}.pt")

    def restore(self):
        """Load NAME.resume.pt. Raises ValueError when the file belongs to another model.

        With as many processes as before, the run goes on bit for bit. (With more than two, this
        holds if their sums are taken in the same order.) With another number, batches and noise
        are the same, but dropout and the rounding of sums are not.
        """
        saved = load_checkpoint(self.latest)
        try:
            self.restore_weights(saved)
            self.restore_streams(saved)
            self.step = saved["step"]
            self.seconds = saved["seconds"]
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            raise ValueError(f"{self.latest} belongs to a model of other sizes, "
                             f"or is not from training") from None

    def restore_weights(self, saved):
        """Load weights, optimizer and EMA. New settings, such as another β, stay as they are."""
        now = self.model.state_dict()
        weights = {name: like(value, now.get(name)) for name, value in saved["model"].items()}
        load_weights(self.model, weights)
        check_moments(self.optimizer, saved["optimizer"])
        params = numbered(self.optimizer)
        moments = {i: {key: like(value, params[i]) if value.ndim else value
                       for key, value in of.items()}
                   for i, of in saved["optimizer"].items()}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        check_weights(whole_tensors(self.ema.shadow), saved["ema"])
        for name, value in self.ema.shadow.items():
            value.copy_(like(saved["ema"][name], value))

    def restore_streams(self, saved):
        """Load the random streams; say what changes with another number of processes."""
        processes = saved.get("processes", [saved["streams"]])
        if len(processes) == world():
            self.streams.load(saved["streams"] | processes[rank()])
            return
        self.streams.load(saved["streams"])
        torch.manual_seed(saved["step"] * world() + rank())
        print(f"note: {saved['stage']} was trained by {len(processes)} processes so far, now by "
              f"{world()}: batches and noise stay those of an undisturbed run. Dropout and the "
              f"rounding of sums change, so weights are no longer bit-identical to that run's.")


def whole_tensors(tensors):
    """{name: tensor} with every sharded tensor in one piece."""
    return {name: whole(value) for name, value in tensors.items()}


@contextlib.contextmanager
def network_options(model, cfg):
    """In this context the model's transformers and U-Nets run as a TrainConfig says.

    recompute: they keep few activations. compile: torch.compile makes their forward pass.
    """
    networks = [part for part in model.modules() if isinstance(part, (Transformer, UNet))]
    for network in networks:
        network.recompute = cfg.recompute
        if cfg.compile:
            # The instance's own `forward` hides that of the class.
            network.forward = torch.compile(network.forward)
    yield
    for network in networks:
        network.recompute = False
        if cfg.compile:
            del network.forward

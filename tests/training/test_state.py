"""The training loop: its formulas against closed forms, and that nothing is lost when a run stops, breaks off or goes on."""

import json
import math
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from mini_dalle2.training import state
from mini_dalle2.configs import TrainConfig
from mini_dalle2.runtime.files import load_checkpoint, read_metrics
from mini_dalle2.training.state import EMA, Streams, lr_at, make_optimizer, sam_backward

import train                                               # the script at the top level
from conftest import ROOT, ToyRun, ToyStage


class Toy(nn.Module):
    """A small regression with dropout, so that torch's own random stream matters as well."""

    def __init__(self, width=8):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Dropout(0.2), nn.Linear(width, 1))

    def loss(self, x, y, generator):
        """Squared error; the input is made noisy by `generator`."""
        return (self.net(x + 0.1 * torch.randn(x.shape, generator=generator)) - y).square().mean()


def toy_batch(generator, step=0):
    """A batch of a fixed problem, the examples chosen by `generator`."""
    x = torch.randn(16, 4, generator=generator)
    return x, x[:, :1] * x[:, 1:2]


def toy_loss(model, batch, generator):
    """What the loop calls."""
    return model.loss(*batch, generator)


def run_toy(run, cfg, resume=False, loss_fn=toy_loss, draw=toy_batch, width=8):
    """Trains a Toy into the folder `run`."""
    run.mkdir(exist_ok=True)
    torch.manual_seed(3)
    return train.train(ToyRun(run, resume), ToyStage("toy", Toy(width), cfg, draw, loss_fn))


def states_equal(a, b):
    """Whether two state dicts agree bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---------------------------------------------------------------------------------------------------------------- formulas

def test_learning_rate():
    cfg = TrainConfig(steps=110, warmup=10, lr=2.0)
    assert [lr_at(step, cfg) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert lr_at(10, cfg) == pytest.approx(2.0)
    assert lr_at(60, cfg) == pytest.approx(1.0)                            # half of the cosine
    assert lr_at(35, cfg) == pytest.approx(1 + math.cos(math.pi / 4))
    assert lr_at(110, cfg) == pytest.approx(0.0, abs=1e-12) and 0 < lr_at(109, cfg) < 1e-3
    constant = TrainConfig(steps=110, warmup=10, lr=2.0, decay="none")
    assert lr_at(4, constant) == pytest.approx(1.0) and lr_at(109, constant) == 2.0
    assert lr_at(0, TrainConfig(warmup=0, lr=2.0)) == 2.0


@pytest.mark.parametrize("key, value", [("decay", "linear"), ("steps", 0), ("batch_size", -1), ("lr", -1e-3), ("lr", float("nan")),
                                        ("ema", 1.0), ("beta2", 1.5), ("save_every", 0), ("warmup", -1)])
def test_impossible_numbers_are_refused(key, value):
    with pytest.raises(ValueError, match=key):
        TrainConfig(**{key: value})


def test_ema_closed_form():
    """e_n = Π d_i · w_0 + Σ_k (1 − d_k) · Π_{i>k} d_i · w_k, summed here in float64."""
    model, weights = nn.Linear(1, 1, bias=False), [0.3, -1.0, 2.5, 0.7, 4.0, -3.0]
    nn.init.constant_(model.weight, weights[0])
    ema = EMA(model, decay=0.3)
    decays = [min(0.3, (1 + n) / (10 + n)) for n in range(5)]
    assert decays[0] == 0.1 and decays[3] == 0.3                           # both the warm-up and d itself are met
    for n, w in enumerate(weights[1:]):
        nn.init.constant_(model.weight, w)
        ema.update(n)
    expected = weights[0] * math.prod(decays)
    expected += sum((1 - decays[k]) * math.prod(decays[k + 1:]) * w for k, w in enumerate(weights[1:]))
    assert ema.shadow["weight"].item() == pytest.approx(expected, rel=1e-6)


def test_ema_zero_is_the_weights_themselves():
    model = nn.Linear(2, 2)
    ema = EMA(model, decay=0.0)
    nn.init.constant_(model.weight, 5.0)
    ema.update(100)
    assert torch.equal(ema.shadow["weight"], model.weight)


def test_ema_forgets_the_start_of_a_short_run():
    """After 50 updates with d = 0.9999 the first weights are gone, which a constant d would keep at 99.5 %."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    ema = EMA(model, decay=0.9999)
    nn.init.constant_(model.weight, 0.0)
    for n in range(50):
        ema.update(n)
    assert 0 <= ema.shadow["weight"].item() < 1e-6


def test_sam_gradient_on_a_quadratic():
    """L = ½ wᵀAw: ∇L(w + ρ g/‖g‖) = A w + ρ A g/‖g‖ with g = A w; the norm is over all parameters together."""
    a = torch.tensor([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]])
    start = torch.tensor([1.0, -2.0, 0.5])
    u, v = nn.Parameter(start[:1].clone()), nn.Parameter(start[1:].clone())

    def loss(batch, noise):
        w = torch.cat([u, v])
        return 0.5 * w @ a @ w

    streams = Streams("cpu")
    value = sam_backward(loss, [u, v], None, streams, streams.noise, rho=0.1)
    g = a @ start
    expected = a @ (start + 0.1 * g / g.norm())
    assert value.item() == pytest.approx((0.5 * start @ a @ start).item())  # the loss is that at w
    assert torch.allclose(torch.cat([u.grad, v.grad]), expected, atol=1e-6)
    assert torch.equal(torch.cat([u, v]).detach(), start)                  # and w is where it was, to the bit
    u.grad = v.grad = None
    # Without SAM, as the loop does it.
    loss(None, streams.noise).backward()
    assert torch.allclose(torch.cat([u.grad, v.grad]), g)


def test_sam_sees_the_same_noise_twice():
    model, streams, seen = Toy(), Streams("cpu", seed=5), []
    x, y = toy_batch(streams.data)

    def loss(batch, generator):
        noise = torch.randn(3, generator=generator)
        seen.append((noise, torch.rand(3)))                                # one of each stream: ours, and torch's own
        return model.loss(*batch, generator)

    sam_backward(loss, list(model.parameters()), (x, y), streams, streams.noise, rho=0.05)
    (noise_1, own_1), (noise_2, own_2) = seen
    assert torch.equal(noise_1, noise_2) and torch.equal(own_1, own_2)


def test_only_matrices_decay():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.conv, self.norm = nn.Linear(3, 3), nn.Conv2d(3, 3, 3), nn.LayerNorm(3)
            self.token, self.position = nn.Embedding(5, 3), nn.Parameter(torch.ones(4, 3))
            self.tied = nn.Linear(3, 5, bias=False)
            self.tied.weight = self.token.weight
            self.frozen = nn.Linear(3, 3).requires_grad_(False)

    model = Mixed()
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.5, lr=0.1))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    assert groups[0.5] == {"linear.weight", "conv.weight"}
    assert groups[0.0] == {"linear.bias", "conv.bias", "norm.weight", "norm.bias", "token.weight", "position"}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()                                                       # without gradient only the decay acts: w·(1 − lr·wd)
    assert torch.allclose(model.linear.weight, before["linear.weight"] * 0.95)
    assert torch.equal(model.position, before["position"]) and torch.equal(model.frozen.weight, before["frozen.weight"])


# ---------------------------------------------------------------------------------------------------------------- the loop

def test_the_loop_learns_and_leaves_its_files(tmp_path):
    def easy(generator, step):
        x = torch.randn(16, 4, generator=generator)
        return x, x[:, :1]
    cfg = TrainConfig(steps=200, lr=3e-2, warmup=10, ema=0.99, log_every=20, save_every=70)
    model = run_toy(tmp_path, cfg, draw=easy)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == sorted({*range(20, 201, 20), 70, 140})
    assert set(lines[0]) == {"stage", "step", "loss", "lr", "grad_norm", "seconds"} and lines[0]["stage"] == "toy"
    assert lines[-1]["loss"] < 0.3 * lines[0]["loss"]
    assert lines[0]["lr"] == pytest.approx(lr_at(19, cfg))
    assert not model.training
    saved = load_checkpoint(tmp_path / "toy.pt")
    assert saved["step"] == saved["steps"] == 200 and saved["config"] == {"a": 1} and "optimizer" not in saved
    assert states_equal(saved["ema"], model.state_dict())                  # what the loop returns are the EMA weights
    assert not list(tmp_path.glob("*.tmp"))


def test_gradients_are_clipped(tmp_path):
    """SGD would show it directly; with AdamW and ε far above the gradients a step is lr·g/ε, so the clipped norm can be read off."""
    cfg = TrainConfig(steps=1, lr=1.0, warmup=0, decay="none", grad_clip=1e-3, eps=1e3, ema=0.0, beta1=0.0)
    torch.manual_seed(3)
    before = torch.cat([p.detach().flatten() for p in Toy().parameters()])
    model = run_toy(tmp_path, cfg)
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]).double() - before.double()
    assert read_metrics(tmp_path)[-1]["grad_norm"] > 0.05                  # as it was before clipping
    assert moved.norm().item() == pytest.approx(1e-6, rel=0.2)             # ‖g‖ = 1e-3 over ε = 1e3; float32 weights near 0.3 blur it


@pytest.mark.parametrize("rho", [0.0, 0.05])
def test_resume_equals_an_uninterrupted_run(tmp_path, rho):
    cfg = TrainConfig(steps=40, lr=1e-2, warmup=5, ema=0.95, save_every=15, log_every=4, weight_decay=0.1, sam_rho=rho)
    whole = run_toy(tmp_path / "whole", cfg)

    calls = []

    def stopping(generator, step):
        calls.append(1)
        if len(calls) == 38:                                               # after the checkpoint at 30, before that at 40
            raise RuntimeError("the power went")
        return toy_batch(generator)

    with pytest.raises(RuntimeError, match="power"):
        run_toy(tmp_path / "parts", cfg, draw=stopping)
    assert load_checkpoint(tmp_path / "parts" / "toy.pt")["step"] == 30
    assert read_metrics(tmp_path / "parts")[-1]["step"] == 36              # these lines are taken back
    torch.rand(7)                                                          # the resumed process stands elsewhere in torch's own stream
    parts = run_toy(tmp_path / "parts", cfg, resume=True)
    assert states_equal(whole.state_dict(), parts.state_dict())
    a, b = (load_checkpoint(tmp_path / name / "toy.resume.pt") for name in ("whole", "parts"))
    assert states_equal(a["model"], b["model"])
    assert all(states_equal(a["optimizer"][i], b["optimizer"][i]) for i in a["optimizer"])
    assert all(torch.equal(a["streams"][key], b["streams"][key]) for key in a["streams"])
    logs = [[{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(tmp_path / name)] for name in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_resuming_a_finished_stage_takes_no_step(tmp_path):
    cfg = TrainConfig(steps=6, warmup=0)
    model = run_toy(tmp_path, cfg)
    (tmp_path / "toy.pt").unlink()                                         # as if the machine had gone down between the two files
    again = run_toy(tmp_path, cfg, resume=True, draw=lambda *_: pytest.fail("a step was taken"))
    assert states_equal(model.state_dict(), again.state_dict()) and load_checkpoint(tmp_path / "toy.pt")["step"] == 6


def test_resume_takes_over_changed_numbers(tmp_path):
    """A lower rate or another β on the command line must not be undone by what the checkpoint remembers."""
    run_toy(tmp_path, TrainConfig(steps=4, warmup=0))
    seen = []
    original = state.make_optimizer

    def spy(model, cfg):
        seen.append(original(model, cfg))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "make_optimizer", spy)
        run_toy(tmp_path, TrainConfig(steps=6, warmup=0, lr=1e-5, beta2=0.5, weight_decay=0.3, decay="none"), resume=True)
    group = seen[0].param_groups[0]
    assert group["betas"] == (0.9, 0.5) and group["weight_decay"] == 0.3 and group["lr"] == 1e-5
    assert int(next(iter(seen[0].state.values()))["step"]) == 6            # while Adam's memory is the old one


def test_without_resume_it_starts_again(tmp_path):
    cfg = TrainConfig(steps=6, warmup=0, log_every=2)
    run_toy(tmp_path, cfg)
    run_toy(tmp_path, cfg)
    assert [line["step"] for line in read_metrics(tmp_path)] == [2, 4, 6]  # not twice


def test_resume_refuses_another_model(tmp_path):
    run_toy(tmp_path, TrainConfig(steps=2, warmup=0))
    with pytest.raises(ValueError, match="toy.resume.pt belongs to a model of other sizes"):
        run_toy(tmp_path, TrainConfig(steps=4, warmup=0), resume=True, width=9)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_not_finite_stops_and_keeps_the_last_good_state(tmp_path, where):
    calls = []

    def loss_fn(model, batch, generator):
        calls.append(1)
        loss = model.loss(*batch, generator)
        if len(calls) < 13:
            return loss
        return loss * float("inf") if where == "loss" else loss + (model.net[0].weight * 0).sum().sqrt()   # √0 has no finite slope

    cfg = TrainConfig(steps=40, warmup=0, save_every=5, log_every=8)       # the window 9-16 spans the checkpoint at 15
    with pytest.raises(FloatingPointError, match=r"toy: .* at step 13; .*--resume.*--toy.lr=1.0e-04"):
        run_toy(tmp_path, cfg, loss_fn=loss_fn)
    saved = load_checkpoint(tmp_path / "toy.resume.pt")
    assert saved["step"] == 10 and all(torch.isfinite(v).all() for v in saved["model"].values())


def test_not_finite_lists_the_examples(tmp_path):
    """The batch's indices are saved beside the last good checkpoint; when the stage goes on, that list is gone."""
    def draw(generator, step):
        x, y = toy_batch(generator)
        return x, y * float("nan") if step == 6 else y                     # the 7th step

    def train_on(draw, resume):
        cfg = TrainConfig(steps=12, warmup=0, save_every=4, log_every=4)
        stage = ToyStage("toy", Toy(), cfg, draw, toy_loss)
        stage.indices = lambda step: torch.arange(3) + 100 * step
        train.train(ToyRun(tmp_path, resume), stage)

    with pytest.raises(FloatingPointError, match=r"toy: loss nan.* at step 7 \(its examples are listed in .*toy\.not_finite\.json\)"):
        train_on(draw, resume=False)
    found = json.loads((tmp_path / "toy.not_finite.json").read_text())
    assert found == {"stage": "toy", "step": 7, "loss": "nan", "grad_norm": "nan", "indices": [600, 601, 602]}
    saved = load_checkpoint(tmp_path / "toy.resume.pt")
    assert saved["step"] == 4 and all(torch.isfinite(v).all() for v in saved["model"].values())
    train_on(toy_batch, resume=True)
    assert load_checkpoint(tmp_path / "toy.pt")["step"] == 12 and not (tmp_path / "toy.not_finite.json").exists()


# ---------------------------------------------------------------------------------------------------------------- Ctrl-C

SCRIPT = """
import sys, time, torch
from pathlib import Path
sys.path[:0] = ["tests/training", "tests"]
from test_state import TrainConfig, run_toy, toy_batch
def slow(generator, step):
    time.sleep(0.02)
    return toy_batch(generator)
run_toy(Path(sys.argv[1]), TrainConfig(steps=100000, warmup=0, save_every=100000, log_every=1), draw=slow)
"""


def test_ctrl_c_saves(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / "run")], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 300
    while not read_metrics(tmp_path / "run") and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=300)[1]
    assert process.returncode != 0 and "KeyboardInterrupt: toy stopped and saved at step" in error
    saved = load_checkpoint(tmp_path / "run" / "toy.resume.pt")
    assert saved["step"] >= 1 and saved["step"] == read_metrics(tmp_path / "run")[-1]["step"]
    assert json.dumps(load_checkpoint(tmp_path / "run" / "toy.pt")["config"]) == '{"a": 1}'

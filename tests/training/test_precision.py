"""Less memory, other precision: parts of a batch, gradient checkpointing, bfloat16 and torch.compile give the losses of plain training."""

import pytest
import torch
import torch.nn.functional as F

import train                                               # the script at the top level
from conftest import ToyRun, ToyStage, lively, three_words
from mini_dalle2 import configs
from mini_dalle2.runtime.noise import Share, draw_rows, rows_of
from mini_dalle2.configs import TrainConfig
from mini_dalle2.runtime.files import read_metrics
from mini_dalle2.training.state import Objective, Streams, make_optimizer, network_options
from mini_dalle2.transformer import attention, attention_by_hand
from mini_dalle2.unet import GroupNorm
from mini_dalle2.training import overrides

MICRO, B = configs.preset("micro"), 8
DIFFUSION = [stage for stage in configs.MODELS if stage != "clip"]


def example(stage):
    """(a model of micro in which nothing is zero, a batch of B for its loss, loss_fn)."""
    torch.manual_seed(0)
    cfg = getattr(MICRO, stage).model
    model, g = lively(configs.build(cfg), 0.05), torch.Generator().manual_seed(1)
    if stage.startswith("upsampler"):
        batch = (torch.rand(B, 3, cfg.crop_size, cfg.crop_size, generator=g) * 2 - 1,)
    else:
        words = MICRO.clip.model                                           # a sketch has none of its own
        tokens = three_words(B, words.context_length, words.eot_id - 20, g)    # which leaves room for its words above
        tokens[tokens == words.eot_id - 20] = words.eot_id
        z = F.normalize(torch.randn(2, B, cfg.clip_dim, generator=g), dim=-1)
        side = getattr(cfg, "image_size", 16)
        images = torch.rand(B, 3, side, side, generator=g) * 2 - 1
        batch = {"clip": (images, tokens), "sketch": (images, z[0]), "decoder": (images, z[0], tokens)}.get(stage, (z[0], z[1], tokens))
        if stage in ("prior", "ar_prior"):
            model.measure(*z)
    if stage in ("clip", "sketch"):
        return model, batch, lambda model, batch, generator: model.loss(*batch)
    return model, batch, lambda model, batch, generator: model.loss(*batch, generator=generator)


def gradients(stage, **settings):
    """(loss, {name: gradient}) of the first step, trained as these settings of TrainConfig say."""
    model, batch, loss_fn = example(stage)
    cfg = TrainConfig(**settings)
    model.train()
    with network_options(model, cfg):
        loss = Objective(model, loss_fn, cfg.dtype == "bf16")(batch, torch.Generator().manual_seed(2))
        loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_share_gives_the_rows_of_the_whole_batch():
    def stream():
        return torch.Generator().manual_seed(3)
    for shape, dim in (((8,), 0), ((8, 3, 2), 0), ((2, 8), 1)):
        part = [4 if i == dim else n for i, n in enumerate(shape)]
        halves = [draw_rows(torch.rand, part, Share(stream(), i, 2), dim=dim) for i in range(2)]
        assert torch.equal(torch.cat(halves, dim), torch.rand(shape, generator=stream()))
    assert rows_of(torch.arange(6), Share(stream(), 2, 3)).tolist() == [4, 5] and rows_of(torch.arange(6), stream()).tolist() == [*range(6)]
    with pytest.raises(ValueError, match="7 cannot be divided among 2"):
        rows_of(torch.arange(7), Share(stream(), 0, 2))


@pytest.mark.parametrize("stage", DIFFUSION)
def test_parts_of_a_batch_give_its_losses(stage, tmp_path):
    """Four parts, one after the other, within float rounding; and the streams then stand where they would have stood."""
    losses, streams = [], []
    for parts in (1, 4):
        model, batch, loss_fn = example(stage)
        cfg = TrainConfig(steps=3, batch_size=B, warmup=0, lr=1e-3, log_every=1, accumulate=parts)
        (tmp_path / str(parts)).mkdir()
        toy = ToyStage(stage, model, cfg, lambda data, step: [rows_of(x, data) for x in batch], loss_fn)
        train.train(ToyRun(tmp_path / str(parts)), toy)
        losses.append([line["loss"] for line in read_metrics(tmp_path / str(parts))])
        streams.append(torch.load(tmp_path / str(parts) / f"{stage}.resume.pt", weights_only=True)["streams"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5, abs=1e-5)
    assert all(torch.equal(streams[0][key], streams[1][key]) for key in ("data", "noise"))


def test_parts_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="clip.accumulate must be 1"):
        overrides.override(MICRO, ["--clip.accumulate=2"])
    with pytest.raises(ValueError, match="16 is not divisible by accumulate 3"):
        overrides.override(MICRO, ["--prior.accumulate=3"])
    with pytest.raises(ValueError, match="accumulate must be 1"):
        overrides.override(MICRO, ["--prior.accumulate=2", "--prior.sam_rho=0.1"])
    with pytest.raises(ValueError, match="unknown dtype"):
        overrides.override(MICRO, ["--prior.dtype=fp8"])


@pytest.mark.parametrize("stage", configs.MODELS)
def test_gradient_checkpointing_changes_no_bit(stage):
    (loss, plain), (again, recomputed) = gradients(stage), gradients(stage, recompute=True)
    assert loss == again and plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_gradient_checkpointing_sees_the_same_dropout():
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = lively(configs.build(overrides.override(MICRO, ["--decoder.dropout=0.5"]).decoder.model), 0.05).train()
        _, batch, loss_fn = example("decoder")
        with network_options(model, TrainConfig(recompute=recompute)):
            torch.manual_seed(4)
            loss_fn(model, batch, torch.Generator().manual_seed(2)).backward()
        results.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("stage", configs.MODELS)
def test_bf16_gives_the_losses_within_its_precision(stage):
    """bfloat16 has 8 bits: 0.4 %. Weights and their gradients stay in float32."""
    (loss, plain), (short, rounded) = gradients(stage), gradients(stage, dtype="bf16")
    assert short != loss and short == pytest.approx(loss, rel=2e-2)
    assert all(gradient.dtype == torch.float32 for gradient in rounded.values())
    a, b = (torch.cat([g[name].flatten() for name in plain]) for g in (plain, rounded))
    assert F.cosine_similarity(a, b, dim=0) > 0.98


@pytest.mark.parametrize("causal, masked", [(False, False), (True, False), (False, True)])
def test_attention_of_a_cpu_learns_in_float32(causal, masked):
    """Also under autocast: value and gradients are those of the formula on the rounded q, k, v, rounded themselves; all in 16 bits gives others."""
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, 17, 32, generator=g).bfloat16().requires_grad_() for _ in range(3)]
    mask = torch.rand(2, 17, generator=g).gt(0.3).index_fill_(1, torch.tensor(0), True) if masked else None
    weight = torch.randn(2, 3, 17, 32, generator=g)

    def found(f):
        y = f(*inputs)
        return [y, *torch.autograd.grad((y.float() * weight).sum(), inputs)]

    with torch.autocast("cpu", torch.bfloat16):
        ours = found(lambda q, k, v: attention(q, k, v, causal, mask))
    exact = found(lambda q, k, v: attention_by_hand(q.double(), k.double(), v.double(), causal, mask).bfloat16())
    rounded = found(lambda q, k, v: attention_by_hand(q, k, v, causal, mask))      # after each operation
    assert all(value.dtype == torch.bfloat16 for value in ours)

    def wrong(values):
        return sum(((a.float() - b.float()).abs() > 1e-6).sum().item() for a, b in zip(values, exact))

    assert wrong(ours) < 20 < wrong(rounded) / 20                          # of 13,056 numbers: float32 rarely rounds to the other side


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_group_norm_of_a_cpu_is_taken_in_float32(dtype, monkeypatch):
    """What has more bits keeps them; the layer's own numbers are float32, as in training, or of the dtype, as in `DALLE2.load(dtype=)`."""
    taken, group_norm = [], F.group_norm
    monkeypatch.setattr(F, "group_norm", lambda x, *rest: taken.append(x.dtype) or group_norm(x, *rest))
    g = torch.Generator().manual_seed(0)
    layer = GroupNorm(4, 16)
    torch.nn.init.normal_(layer.weight, generator=g)
    assert layer.state_dict().keys() == torch.nn.GroupNorm(4, 16).state_dict().keys()
    x, inner = torch.randn(3, 16, 8, 8, generator=g).to(dtype).requires_grad_(), torch.float64 if dtype == torch.float64 else torch.float32
    for own in {inner, dtype}:
        layer.to(own)
        expected = group_norm(x.to(inner), 4, layer.weight.to(inner), layer.bias.to(inner)).to(dtype)
        weight = torch.randn(x.shape, generator=g).to(dtype)
        y = layer(x)
        assert taken.pop() == inner and torch.equal(y, expected)
        assert torch.equal(*(torch.autograd.grad((value * weight).sum(), x)[0] for value in (y, expected)))


@pytest.mark.parametrize("stage", ["prior"])                            # compiling a U-Net takes minutes
def test_compiled_gives_the_losses(stage):
    (loss, plain), (fast, compiled) = gradients(stage), gradients(stage, compile=True)
    assert fast == pytest.approx(loss, rel=1e-4)
    a, b = (torch.cat([g[name].flatten() for name in plain]) for g in (plain, compiled))
    assert F.cosine_similarity(a, b, dim=0) > 0.9999
    model, _, _ = example(stage)
    with network_options(model, TrainConfig(compile=True)):
        pass
    assert all("forward" not in vars(module) for module in model.modules())        # afterwards it is as it was


def test_the_optimiser_is_fused():
    assert make_optimizer(torch.nn.Linear(2, 2), TrainConfig()).defaults["fused"]


def test_streams_of_one_process_are_plain_generators():
    streams = Streams("cpu")
    assert list(streams.shares(1)) == [(streams.data, streams.noise)]

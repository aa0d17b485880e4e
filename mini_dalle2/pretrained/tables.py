"""Tables between public weights and ours: OpenAI's CLIP, and Karlo.

    theirs  --table-->  ours
    "transformer.resblocks.3.attn.c_qkv.weight"  ->  "transformer.blocks.3.attn.c_attn.weight"

Each architecture has one table per file format. A row has our names, their names, and the way from
one to the other and back. Every tensor of a file is used exactly once; a tensor that is missing,
left over or of another shape is named.

Most rows copy. A matrix that multiplies from the other side is turned. Query, key and value that
lie apart are joined, and those that lie head by head are sorted. Karlo interleaves its four context
tokens, and here they lie one after the other.

References: the public code of CLIP, Karlo v1.0.alpha (kakaobrain/karlo) and diffusers, for the
names. Read next: archive.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..decoder import Decoder
from ..runtime.device import shorten
from ..unet import UNet


class Row(NamedTuple):
    """One line of a table. load: their tensors -> our tensors; save: ours -> theirs.

    Both take and return as many tensors as are named.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    load: Callable
    save: Callable


def same(ours, theirs):
    """Take a tensor as it is."""
    return [Row((ours,), (theirs,), lambda x: (x,), lambda x: (x,))]


def turned(ours, theirs):
    """Turn a matrix that multiplies from the other side."""
    def turn(x):
        return (x.T.contiguous(),)

    return [Row((ours,), (theirs,), turn, turn)]


def layer(ours, theirs):
    """Take weight and bias of a layer as they are."""
    return same(f"{ours}.weight", f"{theirs}.weight") + same(f"{ours}.bias", f"{theirs}.bias")


def pointwise(ours, theirs):
    """Take a linear layer that is a convolution of one pixel there: (out, in, 1)."""
    weight = Row((f"{ours}.weight",), (f"{theirs}.weight",),
                 lambda x: (x.squeeze(-1),), lambda x: (x.unsqueeze(-1),))
    return [weight, *same(f"{ours}.bias", f"{theirs}.bias")]


def joined(ours, theirs):
    """Join a layer that is several there, such as query, key and value, one above the other."""
    return [Row((f"{ours}.{kind}",), tuple(f"{name}.{kind}" for name in theirs),
                lambda *xs: (torch.cat(xs),), lambda x: x.chunk(len(theirs)))
            for kind in ("weight", "bias")]


def by_head(ours, theirs, parts, head_dim):
    """Sort a layer whose rows lie head by head there, (heads, parts, d), and part by part here.

    The parts are all queries, all keys, all values.
    """
    def load(x):
        return (x.reshape(-1, parts, head_dim, *x.shape[1:]).transpose(0, 1).reshape(x.shape),)

    def save(x):
        return (x.reshape(parts, -1, head_dim, *x.shape[1:]).transpose(0, 1).reshape(x.shape),)

    return [Row((f"{ours}.{kind}",), (f"{theirs}.{kind}",), load, save) for kind in ("weight", "bias")]


def unsqueezed(row, dim):
    """Return the row for a tensor with one more dimension of length 1 there."""
    return Row(row.ours, row.theirs, lambda x: row.load(x.squeeze(dim)),
               lambda *xs: tuple(x.unsqueeze(dim) for x in row.save(*xs)))


def under(prefix, rows, of="theirs"):
    """Return the rows with a prefix before one side's names."""
    return [row._replace(**{of: tuple(prefix + name for name in getattr(row, of))})
            for row in rows]


def clip_openai(cfg):
    """Return the table of OpenAI's own names."""
    def tower(ours, theirs, depth):
        rows = []
        for i in range(depth):
            a = f"{ours}.transformer.blocks.{i}"
            b = f"{theirs}transformer.resblocks.{i}"
            rows += same(f"{a}.attn.c_attn.weight", f"{b}.attn.in_proj_weight")
            rows += same(f"{a}.attn.c_attn.bias", f"{b}.attn.in_proj_bias")
            rows += layer(f"{a}.attn.c_proj", f"{b}.attn.out_proj")
            rows += layer(f"{a}.ln_1", f"{b}.ln_1")
            rows += layer(f"{a}.ln_2", f"{b}.ln_2")
            rows += layer(f"{a}.mlp.c_fc", f"{b}.mlp.c_fc")
            rows += layer(f"{a}.mlp.c_proj", f"{b}.mlp.c_proj")
        return rows

    return [
        *same("logit_scale", "logit_scale"),
        *same("visual.patch_embedding.weight", "visual.conv1.weight"),
        *same("visual.class_embedding", "visual.class_embedding"),
        *same("visual.position_embedding", "visual.positional_embedding"),
        *layer("visual.ln_pre", "visual.ln_pre"),
        *layer("visual.ln_post", "visual.ln_post"),
        *turned("visual.projection.weight", "visual.proj"),
        *same("text.token_embedding.weight", "token_embedding.weight"),
        *same("text.position_embedding", "positional_embedding"),
        *layer("text.ln_final", "ln_final"),
        *turned("text.projection.weight", "text_projection"),
        *tower("visual", "visual.", cfg.vision_layers), *tower("text", "", cfg.text_layers)]


def clip_hf(cfg):
    """Return the table of the Hugging Face layout."""
    def tower(ours, theirs, depth):
        rows = []
        for i in range(depth):
            a = f"{ours}.transformer.blocks.{i}"
            b = f"{theirs}.encoder.layers.{i}"
            rows += joined(f"{a}.attn.c_attn", [f"{b}.self_attn.{x}_proj" for x in "qkv"])
            rows += layer(f"{a}.attn.c_proj", f"{b}.self_attn.out_proj")
            rows += layer(f"{a}.ln_1", f"{b}.layer_norm1")
            rows += layer(f"{a}.ln_2", f"{b}.layer_norm2")
            rows += layer(f"{a}.mlp.c_fc", f"{b}.mlp.fc1")
            rows += layer(f"{a}.mlp.c_proj", f"{b}.mlp.fc2")
        return rows

    see = "vision_model"
    read = "text_model"
    return [
        *same("logit_scale", "logit_scale"),
        *same("visual.patch_embedding.weight", f"{see}.embeddings.patch_embedding.weight"),
        *same("visual.class_embedding", f"{see}.embeddings.class_embedding"),
        *same("visual.position_embedding", f"{see}.embeddings.position_embedding.weight"),
        *layer("visual.ln_pre", f"{see}.pre_layrnorm"),
        *layer("visual.ln_post", f"{see}.post_layernorm"),
        *same("visual.projection.weight", "visual_projection.weight"),
        *same("text.token_embedding.weight", f"{read}.embeddings.token_embedding.weight"),
        *same("text.position_embedding", f"{read}.embeddings.position_embedding.weight"),
        *layer("text.ln_final", f"{read}.final_layer_norm"),
        *same("text.projection.weight", "text_projection.weight"),
        *tower("visual", see, cfg.vision_layers), *tower("text", read, cfg.text_layers)]


def places(cfg, theirs):
    """Divide their position embedding (1, L + 4, W): ours of the caption, and of four items."""
    L = cfg.context_length
    return [Row(("caption_position", "position"), (theirs,),
                lambda x: (x[0, :L], x[0, L:]), lambda a, b: (torch.cat([a, b])[None],))]


def final_query(theirs):
    """Take their final query (1, 1, W) as ours (W,)."""
    return [Row(("query",), (theirs,), lambda x: (x[0, 0],), lambda x: (x[None, None],))]


def prior_karlo(cfg):
    """Return the table of Karlo's own names."""
    rows = [
        *layer("time_embed.0", "time_embed.0"), *layer("time_embed.2", "time_embed.2"),
        *layer("z_img_proj", "clip_img_proj"), *layer("z_txt_proj", "text_emb_proj"),
        *layer("caption.proj", "text_enc_proj"), *places(cfg, "positional_embedding"),
        *final_query("prd_emb"), *layer("ln_final", "final_ln"), *layer("out_proj", "out_proj")]
    for i in range(cfg.layers):
        a = f"transformer.blocks.{i}"
        b = f"transformer.resblocks.{i}"
        rows += by_head(f"{a}.attn.c_attn", f"{b}.attn.c_qkv", 3, cfg.width // cfg.heads)
        rows += layer(f"{a}.attn.c_proj", f"{b}.attn.c_proj")
        rows += layer(f"{a}.ln_1", f"{b}.ln_1")
        rows += layer(f"{a}.ln_2", f"{b}.ln_2")
        rows += layer(f"{a}.mlp.c_fc", f"{b}.mlp.c_fc")
        rows += layer(f"{a}.mlp.c_proj", f"{b}.mlp.c_proj")
    return under("model.", rows)


def prior_diffusers(cfg):
    """Return the table of diffusers' PriorTransformer.

    Its mean and spread of z_img, which are among its weights, are no row here.
    """
    rows = [
        *layer("time_embed.0", "time_embedding.linear_1"),
        *layer("time_embed.2", "time_embedding.linear_2"), *layer("z_img_proj", "proj_in"),
        *layer("z_txt_proj", "embedding_proj"),
        *layer("caption.proj", "encoder_hidden_states_proj"),
        *places(cfg, "positional_embedding"), *final_query("prd_embedding"),
        *layer("ln_final", "norm_out"), *layer("out_proj", "proj_to_clip_embeddings")]
    for i in range(cfg.layers):
        a = f"transformer.blocks.{i}"
        b = f"transformer_blocks.{i}"
        rows += joined(f"{a}.attn.c_attn", [f"{b}.attn1.to_{x}" for x in "qkv"])
        rows += layer(f"{a}.attn.c_proj", f"{b}.attn1.to_out.0")
        rows += layer(f"{a}.ln_1", f"{b}.norm1")
        rows += layer(f"{a}.ln_2", f"{b}.norm3")
        rows += layer(f"{a}.mlp.c_fc", f"{b}.ff.net.0.proj")
        rows += layer(f"{a}.mlp.c_proj", f"{b}.ff.net.2")
    return rows


class Place(NamedTuple):
    """Where one of our U-Net's blocks lies: our name, Karlo's two names, diffusers' two names.

    A block has a name for its residual block and one for its attention.
    """

    ours: str
    karlo_res: str
    karlo_attn: str | None
    diffusers_res: str
    diffusers_attn: str | None


def places_down(cfg):
    """Return the places of the blocks on the way down, in order."""
    found = []
    # input_blocks.0 is the first convolution.
    n = 1
    for level in range(len(cfg.channel_mult)):
        for i in range(cfg.num_res_blocks):
            found.append(Place(
                f"down.{n - 1}", f"input_blocks.{n}.0", f"input_blocks.{n}.1",
                f"down_blocks.{level}.resnets.{i}", f"down_blocks.{level}.attentions.{i}"))
            n += 1
        if level < len(cfg.channel_mult) - 1:
            found.append(Place(f"down.{n - 1}", f"input_blocks.{n}.0", None,
                               f"down_blocks.{level}.downsamplers.0", None))
            n += 1
    return found


def places_middle(cfg):
    """Return the places of the two blocks in the middle."""
    # Without attention the second residual block moves up.
    second = 2 if cfg.middle_attention else 1
    return [
        Place("middle.0", "middle_block.0", "middle_block.1", "mid_block.resnets.0",
              "mid_block.attentions.0"),
        Place("middle.1", f"middle_block.{second}", None, "mid_block.resnets.1", None)]


def places_up(cfg):
    """Return the places of the blocks on the way up, in order."""
    found = []
    ours = 0
    theirs = 0
    for step, level in enumerate(reversed(range(len(cfg.channel_mult)))):
        attended = cfg.sides[level] in cfg.attn_resolutions
        for i in range(cfg.num_res_blocks + 1):
            found.append(Place(
                f"up.{ours}", f"output_blocks.{theirs}.0", f"output_blocks.{theirs}.1",
                f"up_blocks.{step}.resnets.{i}", f"up_blocks.{step}.attentions.{i}"))
            ours += 1
            theirs += 1
        if level > 0:
            # Enlarging is part of the block before it there.
            inner = 2 if attended else 1
            found.append(Place(f"up.{ours}", f"output_blocks.{theirs - 1}.{inner}", None,
                               f"up_blocks.{step}.upsamplers.0", None))
            ours += 1
    return found


def unet_places(cfg):
    """Return where each of our U-Net's blocks lies, as a list of Place, in order."""
    return places_down(cfg) + places_middle(cfg) + places_up(cfg)


def attended_blocks(cfg):
    """Return the names of our blocks that have attention, as a set."""
    with torch.device("meta"):
        names = [name for name, _ in UNet(cfg).named_modules()]
    return {name.removesuffix(".attn.norm") for name in names if name.endswith(".attn.norm")}


def shortcuts(cfg):
    """Return the names of our blocks whose skip connection is a convolution, as a set."""
    with torch.device("meta"):
        names = [name for name, _ in UNet(cfg).named_parameters()]
    end = ".res.skip.weight"
    return {name.removesuffix(end) for name in names if name.endswith(end)}


def unet_karlo(cfg):
    """Return the table of ADM's names, which Karlo keeps."""
    rows = [
        *layer("time_embed.0", "time_embed.0"), *layer("time_embed.2", "time_embed.2"),
        *layer("in_conv", "input_blocks.0.0"), *layer("out_norm", "out.0"),
        *layer("out_conv", "out.2")]
    attended = attended_blocks(cfg)
    skips = shortcuts(cfg)
    for place in unet_places(cfg):
        name = place.ours
        res = place.karlo_res
        attn = place.karlo_attn
        rows += layer(f"{name}.res.in_norm", f"{res}.in_layers.0")
        rows += layer(f"{name}.res.in_conv", f"{res}.in_layers.2")
        rows += layer(f"{name}.res.emb_proj", f"{res}.emb_layers.1")
        rows += layer(f"{name}.res.out_norm", f"{res}.out_layers.0")
        rows += layer(f"{name}.res.out_conv", f"{res}.out_layers.3")
        if name in skips:
            rows += layer(f"{name}.res.skip", f"{res}.skip_connection")
        if name in attended:
            rows += layer(f"{name}.attn.norm", f"{attn}.norm")
            rows += pointwise(f"{name}.attn.proj", f"{attn}.proj_out")
            for kind, parts in (("qkv", 3), ("encoder_kv", 2)):
                weight, bias = by_head(
                    f"{name}.attn.{kind}", f"{attn}.{kind}", parts, cfg.head_dim)
                rows += [unsqueezed(weight, -1), bias]
    return rows


def unet_diffusers(cfg):
    """Return the table of diffusers' UNet2DModel and UNet2DConditionModel."""
    rows = [
        *layer("time_embed.0", "time_embedding.linear_1"),
        *layer("time_embed.2", "time_embedding.linear_2"), *layer("in_conv", "conv_in"),
        *layer("out_norm", "conv_norm_out"), *layer("out_conv", "conv_out")]
    attended = attended_blocks(cfg)
    skips = shortcuts(cfg)
    for place in unet_places(cfg):
        name = place.ours
        res = place.diffusers_res
        attn = place.diffusers_attn
        rows += layer(f"{name}.res.in_norm", f"{res}.norm1")
        rows += layer(f"{name}.res.in_conv", f"{res}.conv1")
        rows += layer(f"{name}.res.emb_proj", f"{res}.time_emb_proj")
        rows += layer(f"{name}.res.out_norm", f"{res}.norm2")
        rows += layer(f"{name}.res.out_conv", f"{res}.conv2")
        if name in skips:
            rows += layer(f"{name}.res.skip", f"{res}.conv_shortcut")
        if name in attended:
            rows += layer(f"{name}.attn.norm", f"{attn}.group_norm")
            rows += layer(f"{name}.attn.proj", f"{attn}.to_out.0")
            rows += joined(f"{name}.attn.qkv", [f"{attn}.to_{x}" for x in "qkv"])
            rows += joined(f"{name}.attn.encoder_kv", [f"{attn}.add_{x}_proj" for x in "kv"])
    return rows


def interleaved(ours, theirs, tokens):
    """Sort the projection to several tokens at once.

    Their rows go token by token through each channel, our rows token after token.
    """
    return by_head(ours, theirs, tokens, 1)


def decoder_karlo(cfg):
    """Return the table of Karlo's own names. U-Net and projections lie together there."""
    rows = [
        *layer("z_to_emb", "clip_emb"), *layer("text_to_emb", "text_feat_proj"),
        *layer("caption.proj", "text_seq_proj.0"), *layer("ln_final", "text_seq_proj.1"),
        *interleaved("z_to_tokens", "clip_tok_proj", Decoder.Z_TOKENS),
        *same("null_z", "cf_param")]
    return under("model.", rows + under("unet.", unet_karlo(cfg.unet()), of="ours"))


def decoder_diffusers(cfg):
    """Return the table of diffusers' `text_proj` and `decoder`.

    They are two folders; their names are prefixes here.
    """
    rows = [
        *layer("z_to_emb", "clip_image_embeddings_project_to_time_embeddings"),
        *layer("text_to_emb", "embedding_proj"),
        *layer("caption.proj", "encoder_hidden_states_proj"),
        *layer("ln_final", "text_encoder_hidden_states_norm"),
        *interleaved("z_to_tokens", "clip_extra_context_tokens_proj", Decoder.Z_TOKENS),
        *same("null_z", "learned_classifier_free_guidance_embeddings")]
    unet = under("unet.", unet_diffusers(cfg.unet()), of="ours")
    return under("text_proj.", rows) + under("decoder.", unet)


def upsampler_karlo(cfg):
    """Return the table of Karlo's own names: two U-Nets in one file."""
    rows = unet_karlo(cfg.unet())
    return (under("model_first_steps.", under("unet.", rows, of="ours"))
            + under("model_last_step.", under("unet_last.", rows, of="ours")))


def upsampler_diffusers(cfg):
    """Return the table of diffusers' `super_res_first` and `super_res_last`.

    They are two folders; their names are prefixes here.
    """
    rows = unet_diffusers(cfg.unet())
    return (under("super_res_first.", under("unet.", rows, of="ours"))
            + under("super_res_last.", under("unet_last.", rows, of="ours")))


def some(names):
    """Return a few of many names, for a message."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def to_ours(rows, theirs, shapes, what):
    """Put their state dict through a table: {our name: tensor}.

    shapes: {our name: shape} of all that ours must have. Raises ValueError naming the tensors of
    `what` that are missing, left over or of another shape.
    """
    wanted = {name for row in rows for name in row.theirs}
    if missing := wanted - theirs.keys():
        raise ValueError(f"{what} is missing {some(missing)}: wrong model or truncated file")
    if surplus := theirs.keys() - wanted:
        raise ValueError(f"{what} holds {some(surplus)}, which this model does not have: "
                         f"wrong model")
    ours = {}
    for row in rows:
        try:
            tensors = row.load(*(theirs[name] for name in row.theirs))
            ours |= dict(zip(row.ours, tensors, strict=True))
        except (RuntimeError, IndexError):
            raise ValueError(f"{what}: {some(row.theirs)} cannot be laid out as this model needs "
                             f"it: it is of another size") from None
    for name, shape in shapes.items():
        if name not in ours:
            # A hole in a table, not in a file.
            raise ValueError(f"{what}: nothing in it is our {name}")
        if ours[name].shape != shape:
            source = next(row.theirs for row in rows if name in row.ours)
            raise ValueError(f"{what}: {some(source)} should become our {name}, {tuple(shape)}, "
                             f"but gives {tuple(ours[name].shape)}: it is of another size")
    return ours


def to_theirs(rows, ours):
    """Put our state dict through a table: {their name: tensor}."""
    theirs = {}
    for row in rows:
        tensors = row.save(*(ours[name] for name in row.ours))
        theirs |= dict(zip(row.theirs, tensors, strict=True))
    return theirs


def fill(model, rows, theirs, what, dtype=None):
    """Put their state dict into the parameters of a model; buffers stay.

    dtype: of its matrices (see DALLE2). Returns the model in eval mode.
    """
    shapes = {name: p.shape for name, p in model.named_parameters()}
    ours = to_ours(rows, theirs, shapes, what)
    ours = {name: value.float().contiguous() for name, value in ours.items()}
    model.load_state_dict(ours, strict=False, assign=True)
    # Now, and not when all models are there, which takes twice the memory.
    return shorten(model.eval().requires_grad_(False), dtype)

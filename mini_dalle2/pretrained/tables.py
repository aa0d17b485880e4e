"""Tables between public weights and ours: OpenAI's CLIP, and Karlo's prior, decoder, upsampler.

rows.py says what a table is. Karlo interleaves its four context tokens, and here they lie one
after the other.

References: the public code of CLIP, Karlo v1.0.alpha (kakaobrain/karlo) and diffusers, for the
names. Read next: unet_tables.py.
"""

import torch

from ..decoder import Decoder
from .rows import Row, by_head, joined, layer, same, turned, under
from .unet_tables import unet_diffusers, unet_karlo


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

"""The models of CompVis/latent-diffusion as their YAML describes them, and the names and shapes of their tensors. These
are generated from the YAML by the rules of the published code (openaimodel.py, model.py, x_transformer.py), without
using ours."""

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

Shapes = dict[str, tuple[int, ...]]

# ch_mult, z_channels, n_embed (None: KL), attn_resolutions, attn_type
AUTOENCODERS: dict[str, tuple[list[int], int, int | None, list[int], str | None]] = {
    "kl-f4": ([1, 2, 4], 3, None, [], None),
    "kl-f8": ([1, 2, 4, 4], 4, None, [], None),
    "kl-f16": ([1, 1, 2, 2, 4], 16, None, [16], None),
    "kl-f32": ([1, 1, 2, 2, 4, 4], 64, None, [16, 8], None),
    "kl-f4-z4": ([1, 2, 4], 4, None, [], None),  # the autoencoder of the x4 upscaler
    "vq-f4": ([1, 2, 4], 3, 8192, [], None),
    "vq-f4-noattn": ([1, 2, 4], 3, 8192, [], "none"),
    "vq-f8": ([1, 2, 2, 4], 4, 16384, [32], None),
    "vq-f8-n256": ([1, 2, 2, 4], 4, 256, [32], None),
    "vq-f16": ([1, 1, 2, 2, 4], 8, 16384, [16], None),
    "autoencoder_kl_64x64x3": ([1, 2, 4], 3, None, [], "vanilla"),
    "autoencoder_kl_32x32x4": ([1, 2, 4, 4], 4, None, [], None),
    "autoencoder_kl_16x16x16": ([1, 1, 2, 2, 4], 16, None, [16], None),
    "autoencoder_kl_8x8x64": ([1, 1, 2, 2, 4, 4], 64, None, [16, 8], None),
}
FACES = {
    "model_channels": 224,
    "channel_mult": [1, 2, 3, 4],
    "attention_resolutions": [8, 4, 2],
    "num_head_channels": 32,
}
MAPS = {
    "model_channels": 128,
    "channel_mult": [1, 4, 8],
    "attention_resolutions": [32, 16, 8],
    "num_heads": 8,
    "in_channels": 6,
}
CHURCHES = {
    "model_channels": 192, "channel_mult": [1, 2, 2, 4, 4], "attention_resolutions": [1, 2, 4, 8], "num_heads": 8,
    "use_scale_shift_norm": True, "resblock_updown": True,
}  # fmt: skip
CLASS_F8 = {
    "model_channels": 256, "channel_mult": [1, 2, 4], "attention_resolutions": [4, 2, 1], "num_head_channels": 32,
    "use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 512,
}  # fmt: skip
TEXT = {
    "model_channels": 192, "channel_mult": [1, 2, 3, 5], "attention_resolutions": [8, 4, 2], "num_head_channels": 32,
    "use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 640,
}  # fmt: skip
ENCODERS = "ldm.modules.encoders.modules"
BERT = f"{ENCODERS}.BERTEmbedder"
CLASSES = {"target": f"{ENCODERS}.ClassEmbedder", "params": {"embed_dim": 512, "key": "class_label"}}
RESCALER = {
    "target": f"{ENCODERS}.SpatialRescaler", "params": {"n_stages": 2, "in_channels": 182, "out_channels": 3},
}  # fmt: skip
LAYOUT = {"n_embed": 512, "n_layer": 16, "vocab_size": 8192, "max_seq_len": 92, "use_tokenizer": False}
SD1 = {
    "model_channels": 320, "channel_mult": [1, 2, 4, 4], "attention_resolutions": [4, 2, 1], "num_heads": 8,
    "use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 768, "use_checkpoint": True, "legacy": False,
}  # fmt: skip
SD2 = {k: v for k, v in SD1.items() if k != "num_heads"} | {
    "num_head_channels": 64, "use_linear_in_transformer": True, "context_dim": 1024, "use_fp16": True,
}  # fmt: skip
OPENCLIP = {"target": f"{ENCODERS}.FrozenOpenCLIPEmbedder", "params": {"freeze": True, "layer": "penultimate"}}
STABLE = {
    "cond_stage_key": "txt", "conditioning_key": "crossattn", "scale_factor": 0.18215, "linear_start": 0.00085,
    "linear_end": 0.012, "use_ema": False, "cond_stage_trainable": False,
}  # fmt: skip


def unclip(kind: str, dim: int) -> dict[str, Any]:
    """The options that SD 2 unCLIP adds. kind: H (OpenCLIP's image encoder) or L (CLIP's)."""
    noise = {"timestep_dim": dim, "noise_schedule_config": {"timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}}
    embedder: dict[str, Any] = {"target": f"{ENCODERS}.FrozenOpenCLIPImageEmbedder"}
    if kind == "L":
        noise["clip_stats_path"] = "checkpoints/karlo_models/ViT-L-14_stats.th"
        embedder = {"target": f"{ENCODERS}.ClipImageEmbedder", "params": {"model": "ViT-L/14"}}
    return STABLE | {
        "embedding_dropout": 0.25, "parameterization": "v", "conditioning_key": "crossattn-adm", "image_size": 96,
        "first_stage_key": "jpg", "embedder_config": embedder,
        "noise_aug_config": {"target": f"{ENCODERS}.CLIPEmbeddingNoiseAugmentation", "params": noise},
    }  # fmt: skip


# autoencoder, U-Net, condition, other options of the model
DIFFUSION: dict[str, tuple[str, dict[str, Any], Any, dict[str, Any]]] = {
    "celeba256": ("vq-f4", FACES, "__is_unconditional__", {}),
    "ffhq256": ("vq-f4", FACES, "__is_unconditional__", {}),
    "lsun_beds256": ("vq-f4", FACES, "__is_unconditional__", {}),
    "lsun_churches256": ("kl-f8", CHURCHES, "__is_unconditional__", {"scale_by_std": True, "linear_end": 0.0155}),
    "cin256": ("vq-f8", CLASS_F8, CLASSES, {"cond_stage_key": "class_label", "conditioning_key": "crossattn"}),
    "text2img256": (
        "vq-f4", TEXT, {"target": BERT, "params": {"n_embed": 640, "n_layer": 32}},
        {"cond_stage_key": "caption", "conditioning_key": "crossattn"},
    ),
    "bsr_sr": (
        "vq-f4",
        {"model_channels": 160, "channel_mult": [1, 2, 2, 4], "attention_resolutions": [16, 8], "num_head_channels": 32, "in_channels": 6},
        {"target": "torch.nn.Identity"}, {"cond_stage_key": "LR_image", "concat_mode": True, "linear_end": 0.0155},
    ),
    "inpainting_big": (
        "vq-f4-noattn",
        {"model_channels": 256, "channel_mult": [1, 2, 3, 4], "attention_resolutions": [8, 4, 2], "num_heads": 8,
         "resblock_updown": True, "in_channels": 7},
        "__is_first_stage__", {"cond_stage_key": "masked_image", "linear_end": 0.0205},
    ),
    "layout2img-openimages256": (
        "vq-f4",
        {"model_channels": 128, "channel_mult": [1, 2, 3, 4], "attention_resolutions": [8, 4, 2], "num_head_channels": 32,
         "use_spatial_transformer": True, "transformer_depth": 3, "context_dim": 512, "legacy": False},
        {"target": BERT, "params": LAYOUT}, {"cond_stage_key": "coordinates_bbox", "conditioning_key": "crossattn"},
    ),
    "semantic_synthesis256": ("vq-f4", MAPS, RESCALER, {"cond_stage_key": "segmentation", "concat_mode": True}),
    "semantic_synthesis512": ("vq-f4", MAPS, RESCALER, {"cond_stage_key": "segmentation", "image_size": 128}),
    "celebahq-ldm-vq-4": ("vq-f4", FACES, "__is_unconditional__", {}),
    "ffhq-ldm-vq-4": ("vq-f4", FACES, "__is_unconditional__", {}),
    "lsun_bedrooms-ldm-vq-4": ("vq-f4", FACES, "__is_unconditional__", {}),
    "lsun_churches-ldm-kl-8": ("kl-f8", CHURCHES, "__is_unconditional__", {"scale_by_std": True, "loss_type": "l1"}),
    "cin-ldm-vq-f8": ("vq-f8", CLASS_F8, CLASSES, {"cond_stage_key": "class_label", "conditioning_key": "crossattn"}),
    "cin256-v2": (
        "vq-f4", TEXT | {"num_head_channels": -1, "num_heads": 1, "context_dim": 512},
        {"target": f"{ENCODERS}.ClassEmbedder", "params": {"n_classes": 1001, "embed_dim": 512, "key": "class_label"}},
        {"cond_stage_key": "class_label", "use_ema": False},
    ),
    "txt2img-1p4B-eval": (
        "kl-f8",
        {"model_channels": 320, "channel_mult": [1, 2, 4, 4], "attention_resolutions": [4, 2, 1], "num_heads": 8,
         "use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 1280, "use_checkpoint": True, "legacy": False},
        {"target": BERT, "params": {"n_embed": 1280, "n_layer": 32}},
        {"cond_stage_key": "caption", "use_ema": False, "scale_factor": 0.18215, "linear_start": 0.00085, "linear_end": 0.012},
    ),
    "sd-v1": ("kl-f8", SD1, {"target": f"{ENCODERS}.FrozenCLIPEmbedder"}, STABLE),
    "sd-v1-inpainting": (
        "kl-f8", SD1 | {"in_channels": 9}, {"target": f"{ENCODERS}.FrozenCLIPEmbedder"},
        STABLE | {"conditioning_key": "hybrid", "finetune_keys": None},
    ),
    "sd-v2-base": ("kl-f8", SD2, OPENCLIP, STABLE),
    "sd-v2-v": ("kl-f8", SD2, OPENCLIP, STABLE | {"parameterization": "v"}),
    "sd-v2-inpainting": (
        "kl-f8", SD2 | {"in_channels": 9}, OPENCLIP, STABLE | {"conditioning_key": "hybrid", "finetune_keys": None},
    ),
    "sd-v2-depth": (
        "kl-f8", SD2 | {"in_channels": 5}, OPENCLIP,
        STABLE | {
            "conditioning_key": "hybrid", "finetune_keys": None,
            "depth_stage_config": {"target": "ldm.modules.midas.api.MiDaSInference", "params": {"model_type": "dpt_hybrid"}},
        },
    ),
    "sd-v2-unclip-h": ("kl-f8", SD2 | {"num_classes": "sequential", "adm_in_channels": 2048}, OPENCLIP, unclip("H", 1024)),
    "sd-v2-unclip-l": ("kl-f8", SD2 | {"num_classes": "sequential", "adm_in_channels": 1536}, OPENCLIP, unclip("L", 768)),
    "rdm-768x768": (
        "kl-f16",
        {"model_channels": 448, "channel_mult": [1, 2, 3, 4], "attention_resolutions": [4, 2, 1], "num_head_channels": 32,
         "use_scale_shift_norm": False, "resblock_updown": False, "use_spatial_transformer": True, "transformer_depth": 1,
         "context_dim": 768, "use_checkpoint": True},
        {"target": "torch.nn.Identity"},
        {"cond_stage_key": "nix", "conditioning_key": "crossattn", "linear_end": 0.015, "scale_by_std": False,
         "scale_factor": 0.22765929, "first_stage_key": "jpg", "num_timesteps_cond": 1, "image_size": 48},
    ),
    "sd-x4-upscaler": (
        "kl-f4-z4",
        {"model_channels": 256, "channel_mult": [1, 2, 2, 4], "attention_resolutions": [2, 4, 8], "num_heads": 8,
         "use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 1024, "use_linear_in_transformer": True,
         "in_channels": 7, "num_classes": 1000, "disable_self_attentions": [True, True, True, False],
         "disable_middle_self_attn": False, "legacy": False, "use_checkpoint": True},
        OPENCLIP,
        STABLE | {
            "conditioning_key": "hybrid-adm", "parameterization": "v", "low_scale_key": "lr", "linear_start": 1e-4,
            "linear_end": 0.02, "scale_factor": 0.08333,
            "low_scale_config": {
                "target": "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation",
                "params": {"noise_schedule_config": {"linear_start": 1e-4, "linear_end": 0.02}, "max_noise_level": 350},
            },
        },
    ),
}  # fmt: skip


def autoencoder_config(name: str, width: int = 128, codes: int | None = None) -> dict[str, Any]:
    """Returns {"target", "params"} of a published autoencoder; smaller with another `width` and number of `codes`."""
    mult, z, n_embed, resolutions, attn_type = AUTOENCODERS[name]
    dd = {
        "double_z": n_embed is None, "z_channels": z, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": width,
        "ch_mult": mult, "num_res_blocks": 2, "attn_resolutions": resolutions, "dropout": 0.0,
    }  # fmt: skip
    params: dict[str, Any] = {
        "embed_dim": z,
        "monitor": "val/rec_loss",
        "lossconfig": {"target": "x.LPIPSWithDiscriminator"},
    }
    params["ddconfig"] = dd | ({"attn_type": attn_type} if attn_type else {})
    if n_embed is None:
        return {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}
    return {"target": "ldm.models.autoencoder.VQModel", "params": params | {"n_embed": codes or n_embed}}


def diffusion_config(name: str, small: bool = False) -> dict[str, Any]:
    autoencoder, unet, condition, options = DIFFUSION[name]
    latents, channels = 256 // 2 ** (len(AUTOENCODERS[autoencoder][0]) - 1), AUTOENCODERS[autoencoder][1]
    first = autoencoder_config(autoencoder, *((32, 16) if small else ()))
    unet = {"image_size": latents, "in_channels": channels, "out_channels": channels, "num_res_blocks": 2} | unet
    if small:
        unet = unet | {"model_channels": 64 if unet.get("num_head_channels") == 64 else 32, "num_res_blocks": 1}
        first["params"]["ddconfig"]["num_res_blocks"] = 1
    if small and options.get("cond_stage_key") == "txt":
        unet["context_dim"] = 64
    if small and isinstance(condition, dict) and "params" in condition:
        changed = {k: v for k, v in {"n_layer": 2, "vocab_size": 200}.items() if k in condition["params"]}
        if condition["target"] == BERT and "vocab_size" not in changed:
            changed["vocab_size"] = 40  # the size of the vocabulary that the tests make
        if condition["params"].get("use_tokenizer", True) and (
            width := {"n_embed", "embed_dim"} & condition["params"].keys()
        ):
            unet["context_dim"] = changed[width.pop()] = 64
        condition = {"target": condition["target"], "params": condition["params"] | changed}
    params = {
        "linear_start": 0.0015, "linear_end": 0.0195, "timesteps": 1000, "channels": channels, "image_size": latents,
        "monitor": "val/loss_simple_ema", "first_stage_key": "image", "cond_stage_config": condition, "log_every_t": 200,
        "first_stage_config": first, "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
    }  # fmt: skip
    kinds = {
        "inpainting": "LatentInpaintDiffusion",
        "depth": "LatentDepth2ImageDiffusion",
        "upscaler": "LatentUpscaleDiffusion",
        "unclip-h": "ImageEmbeddingConditionedLatentDiffusion",
        "unclip-l": "ImageEmbeddingConditionedLatentDiffusion",
    }
    if small and "noise_aug_config" in options:
        unet["adm_in_channels"], options = 64, deepcopy(options)
        options["noise_aug_config"]["params"]["timestep_dim"] = 32
    kind = next((k for word, k in kinds.items() if name.startswith("sd-") and name.endswith(word)), "LatentDiffusion")
    return {"target": f"ldm.models.diffusion.ddpm.{kind}", "params": params | options}


def of_one_architecture(names: Iterable[str]) -> set[str]:
    """Returns the names whose small model equals that of an earlier name. The published models may differ in sizes that
    a small model does not have."""
    seen, again = list[dict[str, Any]](), set[str]()
    for name in names:
        params = diffusion_config(name, small=True)["params"]
        made = {
            k: params[k]
            for k in ("unet_config", "first_stage_config", "cond_stage_config", "scale_by_std", "embedder_config")
            if k in params
        }
        again |= {name} if made in seen else set()
        seen.append(made)
    return again


# -- tensors -----------------------------------------------------------------------------------------------------------


def _layer(name: str, *shape: int, bias: bool = True) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    if bias:
        yield f"{name}.bias", shape[:1]


def _conv(name: str, inner: int, outer: int, size: int = 3) -> Iterator[tuple[str, tuple[int, ...]]]:
    return _layer(name, outer, inner, size, size)


def _resnet(name: str, a: int, b: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensors of a residual block of the autoencoder."""
    yield from _layer(f"{name}.norm1", a)
    yield from _conv(f"{name}.conv1", a, b)
    yield from _layer(f"{name}.norm2", b)
    yield from _conv(f"{name}.conv2", b, b)
    if a != b:
        yield from _conv(f"{name}.nin_shortcut", a, b, 1)


def _attn(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _layer(f"{name}.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        yield from _conv(f"{name}.{part}", width, width, 1)


def _middle(name: str, width: int, attention: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _resnet(f"{name}.block_1", width, width)
    if attention:
        yield from _attn(f"{name}.attn_1", width)
    yield from _resnet(f"{name}.block_2", width, width)


def autoencoder_tensors(config: Mapping[str, Any]) -> Shapes:
    params, dd = config["params"], config["params"]["ddconfig"]
    ch, mult, z, blocks = dd["ch"], dd["ch_mult"], dd["z_channels"], dd["num_res_blocks"]
    attention, embed, kl = dd.get("attn_type") != "none", params["embed_dim"], dd["double_z"]
    made: Shapes = dict(_conv("encoder.conv_in", 3, ch))
    width, resolution = ch, dd["resolution"]
    for level, m in enumerate(mult):
        for block in range(blocks):
            made |= _resnet(f"encoder.down.{level}.block.{block}", width, ch * m)
            width = ch * m
            if attention and resolution in dd["attn_resolutions"]:
                made |= _attn(f"encoder.down.{level}.attn.{block}", width)
        if level < len(mult) - 1:
            made |= _conv(f"encoder.down.{level}.downsample.conv", width, width)
            resolution //= 2
    made |= _middle("encoder.mid", width, attention)
    made |= dict(_layer("encoder.norm_out", width)) | dict(_conv("encoder.conv_out", width, 2 * z if kl else z))
    made |= dict(_conv("decoder.conv_in", z, width)) | dict(_middle("decoder.mid", width, attention))
    for level in reversed(range(len(mult))):
        for block in range(blocks + 1):
            made |= _resnet(f"decoder.up.{level}.block.{block}", width, ch * mult[level])
            width = ch * mult[level]
            if attention and resolution in dd["attn_resolutions"]:
                made |= _attn(f"decoder.up.{level}.attn.{block}", width)
        if level:
            made |= _conv(f"decoder.up.{level}.upsample.conv", width, width)
            resolution *= 2
    made |= dict(_layer("decoder.norm_out", width)) | dict(_conv("decoder.conv_out", width, 3))
    k = 2 if kl else 1
    made |= dict(_conv("quant_conv", k * z, k * embed, 1)) | dict(_conv("post_quant_conv", embed, z, 1))
    return made if kl else made | {"quantize.embedding.weight": (params["n_embed"], embed)}


def _res(name: str, a: int, b: int, emb: int, scale_shift: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensors of a residual block of the U-Net."""
    yield from _layer(f"{name}.in_layers.0", a)
    yield from _conv(f"{name}.in_layers.2", a, b)
    yield from _layer(f"{name}.emb_layers.1", 2 * b if scale_shift else b, emb)
    yield from _layer(f"{name}.out_layers.0", b)
    yield from _conv(f"{name}.out_layers.3", b, b)
    if a != b:
        yield from _conv(f"{name}.skip_connection", a, b, 1)


def _attention(
    name: str, width: int, p: Mapping[str, Any], cross_only: bool = False
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _layer(f"{name}.norm", width)
    if not p.get("use_spatial_transformer"):
        yield from _layer(f"{name}.qkv", 3 * width, width, 1)
        yield from _layer(f"{name}.proj_out", width, width, 1)
        return
    linear = p.get("use_linear_in_transformer", False)
    project = _layer if linear else partial(_conv, size=1)
    yield from project(f"{name}.proj_in", width, width)
    for depth in range(p.get("transformer_depth", 1)):
        block = f"{name}.transformer_blocks.{depth}"
        for attn, context in (("attn1", p["context_dim"] if cross_only else width), ("attn2", p["context_dim"])):
            for part, inner in (("to_q", width), ("to_k", context), ("to_v", context)):
                yield from _layer(f"{block}.{attn}.{part}", width, inner, bias=False)
            yield from _layer(f"{block}.{attn}.to_out.0", width, width)
        yield from _layer(f"{block}.ff.net.0.proj", 8 * width, width)
        yield from _layer(f"{block}.ff.net.2", width, 4 * width)
        for norm in ("norm1", "norm2", "norm3"):
            yield from _layer(f"{block}.{norm}", width)
    yield from project(f"{name}.proj_out", width, width)


def unet_tensors(p: Mapping[str, Any]) -> Shapes:
    ch, mult, blocks, emb = p["model_channels"], p["channel_mult"], p["num_res_blocks"], 4 * p["model_channels"]
    shift, updown = p.get("use_scale_shift_norm", False), p.get("resblock_updown", False)
    made: Shapes = dict(_layer("time_embed.0", emb, ch)) | dict(_layer("time_embed.2", emb, emb))
    made |= _conv("input_blocks.0.0", p["in_channels"], ch)
    alone = p.get("disable_self_attentions", [False] * len(mult))
    if isinstance(p.get("num_classes"), int):
        made["label_emb.weight"] = (p["num_classes"], emb)
    elif p.get("num_classes") == "sequential":
        made |= dict(_layer("label_emb.0.0", emb, p["adm_in_channels"])) | dict(_layer("label_emb.0.2", emb, emb))
    skips, width, index = [ch], ch, 1
    for level, m in enumerate(mult):
        for _ in range(blocks):
            made |= _res(f"input_blocks.{index}.0", width, ch * m, emb, shift)
            width = ch * m
            if 2**level in p["attention_resolutions"]:
                made |= _attention(f"input_blocks.{index}.1", width, p, alone[level])
            skips.append(width)
            index += 1
        if level < len(mult) - 1:
            down = f"input_blocks.{index}.0"
            made |= _res(down, width, width, emb, shift) if updown else _conv(f"{down}.op", width, width)
            skips.append(width)
            index += 1
    made |= dict(_res("middle_block.0", width, width, emb, shift)) | dict(_attention("middle_block.1", width, p))
    made |= _res("middle_block.2", width, width, emb, shift)
    for index in range(len(mult) * (blocks + 1)):
        level = len(mult) - 1 - index // (blocks + 1)
        made |= _res(f"output_blocks.{index}.0", width + skips.pop(), ch * mult[level], emb, shift)
        width, last = ch * mult[level], 1
        if 2**level in p["attention_resolutions"]:
            made |= _attention(f"output_blocks.{index}.1", width, p, alone[level])
            last = 2
        if level and index % (blocks + 1) == blocks:
            up = f"output_blocks.{index}.{last}"
            made |= _res(up, width, width, emb, shift) if updown else _conv(f"{up}.conv", width, width)
    return made | dict(_layer("out.0", width)) | dict(_conv("out.2", width, p["out_channels"]))


def bert_tensors(p: Mapping[str, Any]) -> Shapes:
    dim, vocabulary = p["n_embed"], p.get("vocab_size", 30522)
    made: Shapes = {"token_emb.weight": (vocabulary, dim), "pos_emb.emb.weight": (p.get("max_seq_len", 77), dim)}
    for layer in range(p["n_layer"]):
        attention, forward = f"attn_layers.layers.{2 * layer}", f"attn_layers.layers.{2 * layer + 1}"
        made |= dict(_layer(f"{attention}.0", dim)) | dict(_layer(f"{forward}.0", dim))
        for part in ("to_q", "to_k", "to_v"):
            made |= _layer(f"{attention}.1.{part}", 512, dim, bias=False)
        made |= dict(_layer(f"{attention}.1.to_out", dim, 512)) | dict(_layer(f"{forward}.1.net.0.0", 4 * dim, dim))
        made |= _layer(f"{forward}.1.net.2", dim, 4 * dim)
    return made | dict(_layer("norm", dim)) | dict(_layer("to_logits", vocabulary, dim))


def clip_tensors(width: int, layers: int, words: int) -> Shapes:
    """Tensors of SD 1's text encoder: transformers' CLIPTextModel, with the buffer that its older versions saved."""
    made: Shapes = {
        "embeddings.position_ids": (1, 77),
        "embeddings.token_embedding.weight": (words, width),
        "embeddings.position_embedding.weight": (77, width),
    }
    for n in range(layers):
        layer = f"encoder.layers.{n}"
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            made |= _layer(f"{layer}.self_attn.{part}", width, width)
        made |= dict(_layer(f"{layer}.layer_norm1", width)) | dict(_layer(f"{layer}.layer_norm2", width))
        made |= dict(_layer(f"{layer}.mlp.fc1", 4 * width, width)) | dict(_layer(f"{layer}.mlp.fc2", width, 4 * width))
    return made | dict(_layer("final_layer_norm", width))


def openclip_tensors(width: int, layers: int, words: int) -> Shapes:
    """Tensors of SD 2's text encoder: the text part of open_clip's model."""
    made: Shapes = {
        "positional_embedding": (77, width), "token_embedding.weight": (words, width), "text_projection": (width, width),
        "logit_scale": (),
    }  # fmt: skip
    return made | blocks_of_openclip(width, layers) | dict(_layer("ln_final", width))


def blocks_of_openclip(width: int, layers: int) -> Shapes:
    made: Shapes = {}
    for n in range(layers):
        block = f"transformer.resblocks.{n}"
        made |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        made |= dict(_layer(f"{block}.attn.out_proj", width, width)) | dict(_layer(f"{block}.ln_1", width))
        made |= dict(_layer(f"{block}.ln_2", width)) | dict(_layer(f"{block}.mlp.c_fc", 4 * width, width))
        made |= _layer(f"{block}.mlp.c_proj", width, 4 * width)
    return made


def vision_tensors(width: int, layers: int, patch: int, side: int, dim: int) -> Shapes:
    """Tensors of SD 2 unCLIP's image encoder: the vision part of CLIP's and open_clip's models."""
    made: Shapes = {
        "class_embedding": (width,), "positional_embedding": ((side // patch) ** 2 + 1, width), "proj": (width, dim),
        "conv1.weight": (width, 3, patch, patch),
    }  # fmt: skip
    made |= dict(_layer("ln_pre", width)) | dict(_layer("ln_post", width))
    return made | blocks_of_openclip(width, layers)


def tensors(model: Mapping[str, Any]) -> Shapes:
    """Returns every tensor of a released checkpoint as {name: shape}."""
    if "unet_config" not in model["params"]:
        return autoencoder_tensors(model)
    p = model["params"]
    unet = {f"diffusion_model.{k}": shape for k, shape in unet_tensors(p["unet_config"]["params"]).items()}
    made = {f"model.{k}": shape for k, shape in unet.items()}
    if p.get("use_ema", True):
        made |= {f"model_ema.{k.replace('.', '')}": shape for k, shape in unet.items()}
        made |= {"model_ema.decay": (), "model_ema.num_updates": ()}
    made |= dict.fromkeys(("betas", "alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef1"), (1000,))
    first = autoencoder_tensors(p["first_stage_config"])
    made |= {f"first_stage_model.{k}": shape for k, shape in first.items()}
    if p.get("scale_by_std"):
        made["scale_factor"] = ()
    condition = p["cond_stage_config"]
    if "low_scale_config" in p:
        made |= {"low_scale_model.betas": (1000,), "low_scale_model.sqrt_alphas_cumprod": (1000,)}
    if "depth_stage_config" in p:
        made |= {
            "depth_model.model.pretrained.model.cls_token": (1, 1, 768),
            "depth_model.model.scratch.a.weight": (8, 8, 3, 3),
        }
    if "embedder_config" in p:
        dim, openclip = p["noise_aug_config"]["params"]["timestep_dim"], "OpenCLIP" in p["embedder_config"]["target"]
        large = {1024: (1280, 32, 14, 224), 768: (1024, 24, 14, 224)}.get(dim, (64, 2, 8, 32))
        vision = vision_tensors(*large, dim)
        rest = {
            "logit_scale": (),
            "token_embedding.weight": (20, 64),
            "ln_final.weight": (64,),
            "text_projection": (64, dim),
        }
        rest |= {} if openclip else {"transformer.resblocks.0.ln_1.weight": (64,)}  # CLIP's text part, unused
        made |= {f"embedder.model.visual.{k}": shape for k, shape in vision.items()}
        made |= {f"embedder.model.{k}": shape for k, shape in rest.items()}
        made |= {"noise_augmentor.betas": (1000,), "noise_augmentor.sqrt_alphas_cumprod": (1000,)}
    if condition == "__is_first_stage__":
        made |= {f"cond_stage_model.{k}": shape for k, shape in first.items()}
    elif isinstance(condition, dict) and "Frozen" in condition["target"]:
        width, openclip = p["unet_config"]["params"]["context_dim"], "OpenCLIP" in condition["target"]
        size = (
            (width, 24 if openclip else 12, 49408) if width > 64 else (width, 2, 20)
        )  # in small models, 20 words: those of the tests' tokenizer
        if openclip:
            made |= {f"cond_stage_model.model.{k}": shape for k, shape in openclip_tensors(*size).items()}
        else:
            text = clip_tensors(*size).items()
            made |= {f"cond_stage_model.transformer.text_model.{k}": shape for k, shape in text}
    elif isinstance(condition, dict) and "params" in condition:
        kind, own = condition["target"].rpartition(".")[2], condition["params"]
        if kind == "ClassEmbedder":
            made["cond_stage_model.embedding.weight"] = (own.get("n_classes", 1000), own["embed_dim"])
        elif kind == "SpatialRescaler":
            made["cond_stage_model.channel_mapper.weight"] = (own["out_channels"], own["in_channels"], 1, 1)
        else:
            made |= {f"cond_stage_model.transformer.{k}": shape for k, shape in bert_tensors(own).items()}
    return made

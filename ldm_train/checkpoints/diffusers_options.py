"""Rules for the options in diffusers configs: which are used, which have no effect here, and which are refused by name.

A folder may come from an untrusted source: a value is used only after its rule has accepted it, and an option without a
rule is refused, because its effect is unknown. Defaults are diffusers' own, because a config may omit options.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm_train.storage import read_record, shown

# value -> the value to use; the text of its ValueError follows the option's name and says what can be loaded
Rule = Callable[[Any], Any]
Table = dict[str, tuple[Any, Rule]]  # name -> (default, rule)


def number(least: float, most: float, kinds: tuple[type, ...] = (int, float), name: str = "number") -> Rule:
    def rule(value: Any) -> Any:
        if isinstance(value, kinds) and not isinstance(value, bool) and least <= value <= most:
            return value
        raise ValueError(f" a {name} from {least} to {most}")

    return rule


def whole(least: int, most: int) -> Rule:
    return number(least, most, (int,), "whole number")


def only(*values: Any) -> Rule:
    def rule(value: Any) -> Any:
        if value in values:
            return value
        raise ValueError(f"={' or '.join(map(repr, values))}")

    return rule


def levels(rule: Rule) -> Rule:
    """A rule for a list with one entry for each of 1 to 8 levels."""

    def read(value: Any) -> list[Any]:
        if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= 8:
            raise ValueError(" a list of 1 to 8 entries, one per level")
        return [rule(entry) for entry in value]

    return read


def either(rule: Rule) -> Rule:
    """A rule for one value for all levels, or a list with one value per level."""
    return lambda value: levels(rule)(value) if isinstance(value, (list, tuple)) else rule(value)


def uniform(rule: Rule) -> Rule:
    """A rule for one value for all levels; the entries of a list must be equal."""

    def read(value: Any) -> Any:
        value = either(rule)(value)
        if isinstance(value, list) and len(set(value)) > 1:
            raise ValueError(" the same at every level")
        return value[0] if isinstance(value, list) else value

    return read


def optional(rule: Rule) -> Rule:
    return lambda value: None if value is None else rule(value)


def fixed(**values: Any) -> Table:
    """Options that can only be loaded at their default."""
    return {name: (value, only(value)) for name, value in values.items()}


def without_effect(names: str) -> Table:
    """Options that do not change what a loaded model computes in float32. names: separated by whitespace."""
    return {name: (None, lambda value: value) for name in names.split()}


def blocks(*kinds: str) -> Table:
    """The block types of the levels; the first is the default. The up blocks must mirror the down blocks, see
    `read_model`."""
    return {"down_block_types": ([kinds[0]], levels(only(*kinds))), "up_block_types": (None, lambda value: value)}


CHANNELS, LAYERS, FLAG = whole(1, 4096), whole(1, 16), only(False, True)
TRUNK: Table = {
    "in_channels": (3, CHANNELS),
    "out_channels": (3, CHANNELS),
    "block_out_channels": ([64], levels(whole(1, 2**14))),
    "layers_per_block": (1, LAYERS),
    "norm_num_groups": (32, whole(1, 1024)),
    "act_fn": ("silu", only("silu", "swish")),  # two names for the same function
}
UNET: Table = (
    TRUNK
    | {
        "sample_size": (None, optional(either(whole(1, 4096)))),
        "layers_per_block": (2, LAYERS),
        "resnet_time_scale_shift": ("default", only("default", "scale_shift")),
    }
    | fixed(
        center_input_sample=False,
        flip_sin_to_cos=True,
        freq_shift=0,
        time_embedding_type="positional",
        norm_eps=1e-5,
        time_embedding_dim=None,
        downsample_padding=1,
        mid_block_scale_factor=1,
        class_embed_type=None,
        num_class_embeds=None,
    )
    | without_effect("dropout")
)
CONDITIONAL: Table = (
    UNET
    | blocks("CrossAttnDownBlock2D", "DownBlock2D")
    | {
        "in_channels": (4, CHANNELS),
        "out_channels": (4, CHANNELS),
        "layers_per_block": (2, uniform(LAYERS)),
        "attention_head_dim": (8, either(whole(1, 1024))),
        "cross_attention_dim": (1280, uniform(whole(1, 2**14))),
        "transformer_layers_per_block": (1, uniform(LAYERS)),
        "only_cross_attention": (False, uniform(FLAG)),
        "use_linear_projection": (False, FLAG),
    }
    | fixed(
        mid_block_type="UNetMidBlock2DCrossAttn",
        reverse_transformer_layers_per_block=None,
        encoder_hid_dim=None,
        encoder_hid_dim_type=None,
        num_attention_heads=None,
        dual_cross_attention=False,
        addition_embed_type=None,
        time_embedding_act_fn=None,
        timestep_post_act=None,
        time_cond_proj_dim=None,
        conv_in_kernel=3,
        conv_out_kernel=3,
        attention_type="default",
        class_embeddings_concat=False,
    )
    # Options of embeddings and blocks that are refused above.
    | without_effect(
        """
        upcast_attention addition_embed_type_num_heads addition_time_embed_dim cross_attention_norm
        mid_block_only_cross_attention projection_class_embeddings_input_dim resnet_out_scale_factor
        resnet_skip_time_act
        """
    )
)
UNCONDITIONAL: Table = (
    UNET
    | blocks("DownBlock2D", "AttnDownBlock2D")
    | {
        "attention_head_dim": (8, optional(whole(1, 2**14))),
        "attn_norm_num_groups": (None, optional(whole(1, 1024))),
        "add_attention": (True, FLAG),
    }
    | fixed(mid_block_type="UNetMidBlock2D", downsample_type="conv", upsample_type="conv")
    | without_effect("num_train_timesteps")
)
AUTOENCODER: Table = (
    TRUNK
    | blocks("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
    | {
        "latent_channels": (4, CHANNELS),
        "scaling_factor": (0.18215, number(1e-6, 1e6)),
        "mid_block_add_attention": (True, FLAG),
    }
    | without_effect("sample_size force_upcast")
)
KL = AUTOENCODER | fixed(
    shift_factor=None, latents_mean=None, latents_std=None, use_quant_conv=True, use_post_quant_conv=True
)
VQ = (
    AUTOENCODER
    | {
        "latent_channels": (3, CHANNELS),
        "num_vq_embeddings": (256, whole(2, 2**20)),
        "vq_embed_dim": (None, optional(CHANNELS)),
    }
    | fixed(norm_type="group")
    | without_effect("lookup_from_codebook")  # pipelines quantise
)
# A ControlNet: the down half of such a U-Net, and the convolutions for the control image.
CONTROL: Table = (
    {k: v for k, v in CONDITIONAL.items() if k not in ("out_channels", "sample_size", "up_block_types")}
    | {
        "conditioning_channels": (3, only(1, 3)),
        "conditioning_embedding_out_channels": ([16, 32, 96, 256], levels(CHANNELS)),
    }
    | fixed(controlnet_conditioning_channel_order="rgb", global_pool_conditions=False)
)
UNETS = {"UNet2DConditionModel": CONDITIONAL, "UNet2DModel": UNCONDITIONAL}
CONTROLS = {"ControlNetModel": CONTROL}
AUTOENCODERS = {"AutoencoderKL": KL, "VQModel": VQ}

BETAS = {"scaled_linear": "scaled_linear", "linear": "linear", "squaredcos_cap_v2": "cosine"}  # diffusers' name, ours
# The options without effect say how diffusers steps through the schedule; our samplers have their own options.
# (Clipping of x_0 to [-1, 1] is for pixels.)
SCHEDULE: Table = (
    {
        "num_train_timesteps": (1000, whole(1, 100_000)),
        "beta_start": (0.0001, number(0, 1)),
        "beta_end": (0.02, number(0, 1)),
        "beta_schedule": ("linear", only(*BETAS)),
        "prediction_type": ("epsilon", only("epsilon", "v_prediction", "sample")),
        "rescale_betas_zero_snr": (False, FLAG),
        "variance_type": (None, only(None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")),
    }
    | fixed(trained_betas=None, thresholding=False, use_flow_sigmas=False, timestep_type="discrete")
    | without_effect(
        """
        algorithm_type clip_sample clip_sample_range disable_corrector dynamic_thresholding_ratio euler_at_final
        final_sigmas_type flow_shift interpolation_type lambda_min_clipped lower_order_final noise_sampler_seed
        predict_x0 sample_max_value set_alpha_to_one shift_terminal sigma_max sigma_min skip_prk_steps solver_order
        solver_p solver_type steps_offset tensor_format time_shift_type timestep_spacing timestep_values
        use_beta_sigmas use_dynamic_shifting use_exponential_sigmas use_karras_sigmas use_lu_lambdas
        """
    )
)
KARRAS = SCHEDULE | {"beta_start": (0.00085, number(0, 1)), "beta_end": (0.012, number(0, 1))}
KINDS = """
    DDIM DDPM PNDM LMSDiscrete EulerDiscrete EulerAncestralDiscrete DPMSolverMultistep DPMSolverSinglestep DEISMultistep
    UniPCMultistep
"""
SCHEDULERS = {f"{kind}Scheduler": SCHEDULE for kind in KINDS.split()} | {
    f"{kind}Scheduler": KARRAS for kind in ("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE")
}
CLIP: Table = {
    "model_type": (None, only("clip_text_model")),
    "vocab_size": (49408, whole(1, 2**20)),
    "hidden_size": (512, whole(1, 2**14)),
    "intermediate_size": (2048, whole(1, 2**16)),
    "num_hidden_layers": (12, whole(1, 64)),
    "num_attention_heads": (8, whole(1, 1024)),
    "max_position_embeddings": (77, whole(2, 4096)),
    "hidden_act": ("quick_gelu", only("quick_gelu", "gelu")),
    "layer_norm_eps": (1e-5, number(0, 1)),
}
BERT: Table = {
    "vocab_size": (30522, whole(1, 2**20)),
    "d_model": (1280, whole(1, 2**14)),
    "encoder_ffn_dim": (5120, whole(1, 2**16)),
    "encoder_layers": (32, whole(1, 64)),
    "encoder_attention_heads": (8, whole(1, 1024)),
    "head_dim": (64, whole(1, 1024)),
    "max_position_embeddings": (77, whole(2, 4096)),
    "activation_function": ("gelu", only("gelu")),
    "scale_embedding": (False, only(False)),
}
# Options of a tokenizer that are accepted and have no effect: it reads only the files of its own folder.
TOKENIZER = without_effect(
    """
    add_bos_token add_eos_token add_prefix_space added_tokens_decoder additional_special_tokens auto_map backend
    bos_token clean_up_tokenization_spaces do_lower_case eos_token errors extra_special_tokens is_local
    local_files_only model_max_length model_input_names name_or_path pad_token padding_side processor_class
    special_tokens_map_file split_special_tokens tokenizer_class truncation_side unk_token
    """
)


def refused(path: Path, name: str, value: Any, loadable: str) -> ValueError:
    return ValueError(f"{path} has {name}={shown(value)}; models with {name}{loadable} can be loaded")


def read_options(path: Path, table: Table, known: bool = True) -> dict[str, Any]:
    """Returns the options of a table, as accepted by its rules. known: refuse all other options that are not null.

    Raises FileNotFoundError, or ValueError naming file and option.
    """
    config, options = read_record(path), {}
    for name, (default, rule) in table.items():
        try:
            options[name] = rule(value := config.get(name, default))
        except ValueError as error:
            raise refused(path, name, value, str(error)) from error
    for name, value in config.items():
        if known and name not in table and not name.startswith("_") and value is not None:
            raise refused(path, name, value, " left out")
    return options


def read_groups(path: Path) -> int:
    """Returns the number of groups of a network's norms."""
    return read_options(path, {"norm_num_groups": TRUNK["norm_num_groups"]}, known=False)["norm_num_groups"]


EXPORTED = "it was exported with code of its own; use the run or model folder that it was made from"


def read_class(path: Path, tables: dict[str, Table]) -> tuple[str, dict[str, Any]]:
    """Returns the class that a config names, and its options. Raises ValueError for a class without a table."""
    name = read_record(path).get("_class_name")
    if not isinstance(name, str) or name not in tables:
        hint = f"; {EXPORTED}" if str(name).startswith("Narrow") else ""
        raise ValueError(f"{path} is for {shown(name)}; {', '.join(tables)} can be loaded{hint}")
    return name, read_options(path, tables[name])


def read_model(path: Path, tables: dict[str, Table]) -> tuple[str, dict[str, Any]]:
    """Same as `read_class`, for networks with levels, whose options must also fit each other."""
    name, options = read_class(path, tables)
    widths, down = options["block_out_channels"], options["down_block_types"]
    up = [kind.replace("Down", "Up").replace("Encoder", "Decoder") for kind in reversed(down)]
    if len(down) != len(widths):
        raise refused(path, "down_block_types", down, f" of {len(widths)} entries, as block_out_channels has,")
    if "up_block_types" in options and options["up_block_types"] not in (up, tuple(up)):
        raise refused(path, "up_block_types", options["up_block_types"], f"={up}")
    if any(width % widths[0] for width in widths):
        raise refused(path, "block_out_channels", widths, " of multiples of its first entry")
    return name, options

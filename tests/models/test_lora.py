"""LoRA: low-rank additions to weights that stay unchanged."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from ldm_train.conditioning.text import TokenEncoder
from ldm_train.models import lora
from ldm_train.models.dit import DiT
from ldm_train.models.lora import LoRA
from ldm_train.models.unet import UNet

X, TIMES, CONTEXT = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 5, 16)


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.1)
    return module.eval()


def networks() -> list[nn.Module]:
    trunk = {"channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_levels": (1,), "num_heads": 2}
    dit = DiT(in_channels=4, hidden_size=32, depth=1, num_heads=2, context_dim=16)
    return [randomised(m) for m in (UNet(4, context_dim=16, **trunk), UNet(4, **trunk), dit)]


def run(network: nn.Module) -> torch.Tensor:
    return network(X, TIMES, CONTEXT) if network.condition_widths["context"] else network(X, TIMES)


@pytest.mark.parametrize("targets", ["attention", "all", r"to_[qk]|qkv"])
@torch.no_grad()
def test_a_new_adapter_changes_nothing_to_the_bit(targets: str) -> None:
    for network in networks():
        before = run(network)
        LoRA(rank=4, targets=targets).attach(network)
        assert torch.equal(run(network), before)


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_every_adapted_weight_takes_part_and_no_other_trains(targets: str) -> None:
    """Holds even if a network joins the weights of several layers or uses a convolution as a matrix."""
    for network in networks():
        adapter = randomised(LoRA(rank=4, targets=targets).attach(network))
        run(network).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
        ours = {id(p) for p in adapter.parameters()}
        assert all(p.grad is None for p in network.parameters() if id(p) not in ours)


@torch.no_grad()
def test_what_is_added_is_alpha_by_rank_times_the_product() -> None:
    layer = nn.Sequential(nn.Linear(6, 5))
    weight = layer[0].weight.clone()
    (pair,) = randomised(LoRA(rank=2, alpha=3, targets="all").attach(layer)).values()
    x, by_hand = torch.randn(4, 6), weight + 3 / 2 * pair.up @ pair.down
    torch.testing.assert_close(layer(x), nn.functional.linear(x, by_hand, layer[0].bias))
    lora.set_strength(layer, "adapter", 0.5)
    torch.testing.assert_close(layer[0].weight, weight + 0.5 * 3 / 2 * pair.up @ pair.down)


@torch.no_grad()
def test_merged_equals_unmerged_and_a_second_merge_is_refused() -> None:
    for network in networks():
        before, plain = run(network), {k: v.clone() for k, v in network.state_dict().items()}
        randomised(LoRA(rank=2, targets="all").attach(network))
        adapted = run(network)
        assert not torch.equal(adapted, before)
        kept = lora.merge(network)
        assert torch.equal(run(network), adapted)
        assert network.state_dict().keys() == plain.keys()
        with pytest.raises(ValueError, match="no adapter to merge"):
            lora.merge(network)
        lora.unmerge(network, kept)
        assert all(torch.equal(value, plain[key]) for key, value in network.state_dict().items())


@torch.no_grad()
def test_several_adapters_add_up_each_with_its_strength() -> None:
    network = networks()[0]
    plain = dict(lora.adaptable(network))
    adapters = {name: randomised(LoRA(rank=2).attach(network, name)) for name in ("subject", "style")}
    lora.set_strength(network, "style", 0.25)
    key = next(iter(adapters["style"])).replace("/", ".")
    pairs = [adapters[name][key.replace(".", "/")] for name in adapters]
    added = sum(w * pair.up.flatten(1) @ pair.down.flatten(1) for w, pair in zip((1, 0.25), pairs))
    layer, _, leaf = key.rpartition(".")
    torch.testing.assert_close(getattr(network.get_submodule(layer), leaf), plain[key] + added.view_as(plain[key]))
    lora.set_strength(network, "subject", 0)
    lora.set_strength(network, "style", 0)
    assert torch.equal(getattr(network.get_submodule(layer), leaf), plain[key])
    with pytest.raises(ValueError, match="style is there already"):
        lora.attach(network, lora.pairs_of(network, "style"), "style")


@torch.no_grad()
def test_a_text_encoder_is_adapted_whole() -> None:
    encoder = randomised(TokenEncoder(20, 16, 1, 2, 6))
    ids = torch.randint(0, 20, (2, 6))
    before = encoder(ids)
    adapter = LoRA(rank=2, targets="all").attach(encoder)
    assert torch.equal(encoder(ids), before)
    assert any(key.endswith("in_proj_weight") for key in adapter)
    for name, pair in adapter.items():
        pair.up.normal_()
        assert not torch.equal(encoder(ids), before), name
        pair.up.zero_()


def test_an_adapter_of_another_architecture_is_refused_before_anything_changes() -> None:
    with_context, without, _ = networks()
    pairs = {key.replace("/", "."): pair for key, pair in LoRA(rank=2, targets="all").attach(with_context).items()}
    with pytest.raises(ValueError, match="which this model lacks: it is of another architecture"):
        lora.attach(without, pairs, "theirs")
    wider = UNet(4, 64, (1, 2), num_res_blocks=1, attention_levels=(1,), num_heads=2, context_dim=16)
    with pytest.raises(ValueError, match=r"of another architecture: its \S+ is \S+, the model's"):
        lora.attach(wider, pairs, "theirs")
    assert not any(parametrize.is_parametrized(m) for network in (without, wider) for m in network.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0 is not a whole number above 0"),
        ({"rank": 1.5}, "rank=1.5"),
        ({"alpha": -1}, "alpha=-1 is not a number above 0"),
        ({"targets": "to_("}, "no regular expression"),
    ],
)
def test_options_that_cannot_be_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRA(**options)


def test_targets_that_name_no_layer_are_refused() -> None:
    with pytest.raises(ValueError, match="targets=nothing names no layer"):
        LoRA(targets="nothing").attach(networks()[0])


@torch.no_grad()
def test_merged_equals_unmerged_under_autocast_too() -> None:
    network = networks()[0]
    (pair, *_) = randomised(LoRA(rank=4, targets="all").attach(network)).values()
    with torch.autocast("cpu", torch.bfloat16):
        assert pair().dtype == torch.float32
        adapted = run(network)
        lora.merge(network)
        assert torch.equal(run(network), adapted)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (4.0, 0.25)])
def test_the_scale_is_alpha_over_rank_also_where_the_rank_is_lowered(alpha: float | None, scale: float) -> None:
    module = nn.ModuleDict({"wide": nn.Linear(32, 32), "narrow": nn.Linear(32, 4)})
    LoRA(rank=16, alpha=alpha, targets="wide|narrow").attach(module, "a")
    pairs = lora.pairs_of(module, "a")
    assert sorted(pair.rank for pair in pairs.values()) == [4, 16]
    assert {pair.alpha / pair.rank for pair in pairs.values()} == {scale}

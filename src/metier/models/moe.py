"""A uniform view on every MoE layer that follows transformers' experts contract.

Some sixty architectures follow it (`metier.models.contract`), so whatever is written against `MoELayer` serves
all of them. Models that have no such layer, or other MoE layers, are refused by name. Of a multimodal model
only the text's experts are seen.
"""

# T tokens, D hidden_size, F moe_intermediate_size, E experts, K top_k

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from metier.errors import UnsupportedModelError
from metier.models.contract import FLAGS, contract_flags
from metier.models.encoder_decoder import is_encoder_decoder
from metier.models.foreign import can_follow_contract
from metier.models.spellings import (
    ENCODER_LAYERS,
    LAYER_INDEX,
    MOE_CLASS,
    NUM_SHARED_EXPERTS,
    OTHER_MODALITY,
    ROUTER_NAMES,
    SHARED_EXPERTS_NAMES,
    TOP_K,
    first_count,
)
from metier.models.unwrap import bare_model, base_path, original_module


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MoELayer:
    """One decoder layer's routed experts, as metier's other rooms see them."""

    index: int
    """Decoder layer, counted from 0 over all decoder layers, dense ones included, as ESFT counts; in an
    encoder-decoder the decoder's layers follow the encoder's."""
    path: str
    """Module path of the experts in the bare model, such as `model.layers.1.mlp.experts`, wrapped by PEFT or
    not."""
    experts: nn.Module
    """The base's own module that follows the contract and holds the stacked parameters."""
    entry: nn.Module
    """The module that the model calls: `experts`, or the outermost PEFT wrapper around it. Hooks belong
    here."""
    num_experts: int
    top_k: int
    hidden_size: int
    """Width of the experts' input and output; under the model's own where it projects to a latent size
    first."""
    moe_intermediate_size: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    """Weights are `(E, in, out)` instead of `(E, out, in)`."""
    is_concatenated: bool
    """Gate and up are stored one after the other, instead of interleaved."""
    has_post_expert_norm: bool
    num_shared_experts: int
    """0 where the block has none."""
    router_path: str | None
    """Module path of the router in the bare model; None where the router is no module of its own."""
    in_encoder: bool = False
    """In the encoder of an encoder-decoder, so that it sees the prompt and not the reply."""

    def parameter_names(self) -> tuple[str, ...]:
        """Names of the stacked parameters in `experts`: first the up projection, then down, each with its
        bias."""
        up = "gate_up_proj" if self.has_gate else "up_proj"
        if self.has_bias:
            return (up, f"{up}_bias", "down_proj", "down_proj_bias")
        return (up, "down_proj")


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """Every MoE layer of `model`, in order of the decoder layers; of a multimodal model, those for text.

    Args:
        model: a transformers model, bare or wrapped by PEFT.

    Raises:
        UnsupportedModelError: the model has no MoE layer; it has MoE layers outside the contract; two of its MoE
            layers claim the same decoder layer (two stacks in one model); or its experts are parted among processes
            (transformers' expert parallelism).
    """
    bare = bare_model(model)
    _refuse_parted(bare)
    layers = _layers_in_contract(bare)
    _refuse_foreign(bare, layers)
    if not layers:
        raise UnsupportedModelError(
            f"{type(bare).__name__}: the model has no MoE layer; expected at least one whose experts follow "
            f"transformers' experts contract.\nIt is a dense model: choose an MoE model, or tune it with method "
            f"meft or lora."
        )
    layers.sort(key=lambda layer: layer.index)
    for before, after in pairwise(layers):
        if before.index == after.index:
            raise UnsupportedModelError(
                f"layers.{after.index}: two MoE layers have this index, {before.path} and {after.path}, but "
                f"a selection names a layer by its index alone.\nPass the language model inside "
                f"{type(bare).__name__} instead of the whole."
            )
    return layers


def _refuse_parted(bare: nn.Module) -> None:
    for path, module in bare.named_modules():
        # not the instance: wrappers answer for what they wrap
        if vars(module).get("_is_expert_parallel", False):
            raise UnsupportedModelError(
                f"{base_path(path)}: its experts are parted among processes by transformers' expert parallelism "
                "(ep_size), which renumbers them in each, so that an expert's number no longer says which one it is.\n"
                "Load the model without ep_size, and shard it by FSDP2: fsdp: true."
            )


def is_dense(model: nn.Module) -> bool:
    """Whether the model has no MoE layer of any kind.

    Raises:
        UnsupportedModelError: it has one that is outside the contract.
    """
    bare = bare_model(model)
    layers = _layers_in_contract(bare)
    _refuse_foreign(bare, layers)
    return not layers


def _layers_in_contract(bare: nn.Module) -> list[MoELayer]:
    layers = []
    for path, module in bare.named_modules():
        flags = None if OTHER_MODALITY.search(path) else contract_flags(module)
        if flags is not None:
            layers.append(_view(bare, path, module, flags))
    return layers


def _view(bare: nn.Module, raw_path: str, experts: nn.Module, flags: dict[str, bool]) -> MoELayer:
    path = base_path(raw_path)
    found = LAYER_INDEX.findall(path)
    if not found:
        raise UnsupportedModelError(
            f"{path}: {type(experts).__name__} is not inside a numbered decoder layer; expected a path such "
            f"as 'model.layers.7.mlp.experts'.\nmetier cannot name this layer in a selection."
        )
    config = getattr(experts, "config", None)
    in_encoder = is_encoder_decoder(bare) and "decoder" not in path.split(".")
    index = int(found[-1]) + (0 if in_encoder else _num_encoder_layers(bare))
    parent_path, _, name = path.rpartition(".")
    block = original_module(bare.get_submodule(parent_path))  # an adapter may stand beside the whole block
    router_name = next((n for n in ROUTER_NAMES if isinstance(block._modules.get(n), nn.Module)), None)
    hidden_size, moe_intermediate_size = _sizes(path, experts, flags)
    return MoELayer(
        index=index,
        path=path,
        experts=experts,
        entry=block.get_submodule(name),
        num_experts=int(experts.num_experts),  # type: ignore[arg-type]
        top_k=_top_k(path, block, router_name, config, index),
        hidden_size=hidden_size,
        moe_intermediate_size=moe_intermediate_size,
        num_shared_experts=_num_shared_experts(bare, parent_path, config, index),
        router_path=None if router_name is None else f"{parent_path}.{router_name}",
        in_encoder=in_encoder,
        **flags,
    )


def _num_encoder_layers(bare: nn.Module) -> int:
    """Layers that count before those of the decoder: those of an encoder-decoder's encoder, else none."""
    if not is_encoder_decoder(bare):
        return 0
    config = bare.config
    num_layers = first_count(config, ENCODER_LAYERS, layer_index=0)
    assert num_layers is not None, f"{type(config).__name__} does not say how many layers its encoder has"
    return num_layers


def _sizes(path: str, experts: nn.Module, flags: dict[str, bool]) -> tuple[int, int]:
    """(hidden_size, moe_intermediate_size) from the shapes, because configurations spell them in many
    ways."""
    num_experts = experts.num_experts
    up_name = "gate_up_proj" if flags["has_gate"] else "up_proj"
    shapes = {}
    for name in (up_name, "down_proj"):
        weight = getattr(experts, name, None)
        if not isinstance(weight, nn.Parameter) or weight.dim() != 3 or weight.shape[0] != num_experts:
            got = (
                "no such parameter"
                if weight is None
                else f"{type(weight).__name__} {tuple(getattr(weight, 'shape', ()))}"
            )
            raise UnsupportedModelError(
                f"{path}.{name}: got {got} in {type(experts).__name__}, but the experts contract has one "
                f"stacked parameter of shape ({num_experts}, out, in).\n"
                f"Load the model without quantisation."
            )
        out_size, in_size = weight.shape[1:]
        shapes[name] = (in_size, out_size) if flags["is_transposed"] else (out_size, in_size)
    hidden_size, moe_intermediate_size = shapes["down_proj"]
    expected = (moe_intermediate_size * (2 if flags["has_gate"] else 1), hidden_size)
    if shapes[up_name] != expected:
        raise UnsupportedModelError(
            f"{path}.{up_name}: got (out, in) = {shapes[up_name]}, expected {expected} from down_proj "
            f"{shapes['down_proj']}.\nThe layout flags of {type(experts).__name__} do not fit its parameters."
        )
    return hidden_size, moe_intermediate_size


def _top_k(path: str, block: nn.Module, router_name: str | None, config: object, index: int) -> int:
    router = None if router_name is None else original_module(block.get_submodule(router_name))
    for owner, names in ((router, ("top_k",)), (block, ("top_k",)), (config, TOP_K)):
        top_k = first_count(owner, names, layer_index=index)
        if top_k is not None:
            return top_k
    raise UnsupportedModelError(
        f"{path}: neither the router nor {type(config).__name__} says how many experts a token gets; looked "
        f"for {', '.join(TOP_K)}.\nAdd the family's spelling to metier/models/spellings.py."
    )


def _num_shared_experts(bare: nn.Module, block_path: str, config: object, index: int) -> int:
    # Granite and Ernie keep them beside the block, in the decoder layer
    for owner_path in (block_path, block_path.rpartition(".")[0]):
        owner = bare.get_submodule(owner_path)
        if any(isinstance(owner._modules.get(name), nn.Module) for name in SHARED_EXPERTS_NAMES):
            return first_count(config, NUM_SHARED_EXPERTS, layer_index=index) or 1
    return 0


def _refuse_foreign(bare: nn.Module, layers: list[MoELayer]) -> None:
    """Raise if there is an MoE layer that none of `layers` covers."""
    for raw_path, module in bare.named_modules():
        path, kind = base_path(raw_path), type(module).__name__
        name = path.rpartition(".")[2]
        if not path or "shared" in path or "SharedExpert" in kind or OTHER_MODALITY.search(path):
            continue
        if not (name == "experts" or MOE_CLASS.search(kind)):
            continue
        covered = any(f"{x.path}.".startswith(f"{path}.") or f"{path}.".startswith(f"{x.path}.") for x in layers)
        routers = {x.router_path for x in layers}
        if covered or path in routers or not any(True for _ in module.parameters()):
            continue
        raise UnsupportedModelError(
            f"{path}: {kind} is an MoE layer that does not follow transformers' experts contract (stacked "
            f"parameters with the flags {', '.join(FLAGS)}).\n{_remedy(bare)}"
        )


def _remedy(bare: nn.Module) -> str:
    if can_follow_contract(bare):
        return "Load it with `metier.load`, or call `metier.models.foreign.follow_contract(model)` first."
    return f"metier cannot work on {type(bare).__name__}; docs/support.md lists the families that it works on."

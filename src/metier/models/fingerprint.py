"""A fingerprint of a base model, so that a delta trained on one base is never put on another.

It covers what a delta's meaning depends on and what is small even in a 600B model: the architecture's
essential sizes and every router's weights. Two bases that route alike and have the same shape have the same
fingerprint.

Not covered: the experts' own weights, attention, norms and embeddings (a base whose router is untouched but
whose attention was tuned passes), the tokenizer, and differences in the router below bfloat16's resolution.
The last is the price for one base having one fingerprint whether it was loaded in bfloat16 or in float32.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from metier.errors import UnsupportedModelError
from metier.models.moe import MoELayer, moe_layers
from metier.models.unwrap import bare_model, base_module, base_tensors, own_tensors, show_base

_SKELETON = "_metier_is_skeleton"


def mark_skeleton(model: nn.Module) -> None:
    """Say of a model that it is without weights on purpose: its fingerprint then covers shapes alone.

    Of any other model on the meta device (weights that another library has put elsewhere) there is no fingerprint.
    """
    setattr(model, _SKELETON, True)


def fingerprint(model: nn.Module) -> str:
    """sha256 over the essential configuration and all router weights, as 64 hexadecimal digits.

    The same for a model bare or wrapped by PEFT, and for a checkpoint loaded in bfloat16 or float32:
    floating-point tensors are rounded to bfloat16 before they are hashed.

    Args:
        model: a transformers MoE model, bare or wrapped by PEFT.

    Raises:
        UnsupportedModelError: as `moe_layers`.
    """
    bare = bare_model(model)
    show_base(bare)
    layers = moe_layers(bare)
    digest = hashlib.sha256(json.dumps(_essentials(bare, layers), sort_keys=True).encode())
    for layer in layers:
        for name, tensor in router_tensors(bare, layer):
            _add(digest, name, tensor, bare)
    return digest.hexdigest()


def fingerprint_of_any(model: nn.Module) -> str:
    """`fingerprint` where the model has expert layers that metier works on; else one that any model has.

    Without routers it covers every parameter of one axis (the norms' weights, and biases), which a model that was
    tuned as a whole has moved; where there is none, the first rows of the embeddings.
    """
    bare = bare_model(model)
    try:
        return fingerprint(bare)
    except UnsupportedModelError:
        digest = hashlib.sha256(json.dumps(_essentials(bare, []), sort_keys=True).encode())
    has_any = False
    for name, tensor in base_tensors(bare):
        if tensor.dim() == 1:
            _add(digest, name, tensor, bare)
            has_any = True
    if not has_any:  # OLMo's norms have no weights
        for name, tensor in _first_rows(bare):
            _add(digest, name, tensor, bare)
    return digest.hexdigest()


def fingerprint_tensors(model: nn.Module) -> list[Tensor]:
    """The tensors whose values `fingerprint_of_any` covers."""
    bare = bare_model(model)
    show_base(bare)
    try:
        layers = moe_layers(bare)
    except UnsupportedModelError:
        found = [tensor for _, tensor in base_tensors(bare) if tensor.dim() == 1]
        return found or [tensor for _, tensor in _first_rows(bare)]
    return [tensor for layer in layers for _, tensor in router_tensors(bare, layer)]


def _first_rows(bare: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Of the embeddings, which are in memory whatever is in a store; enough to tell checkpoints apart."""
    for name, tensor in base_tensors(bare):
        if tensor.dim() == 2 and "embed" in name:
            yield name, tensor[:16]


def _add(digest: hashlib._Hash, name: str, tensor: Tensor, bare: nn.Module) -> None:
    digest.update(f"{name} {tuple(tensor.shape)}".encode())
    if not (tensor.is_meta and getattr(bare, _SKELETON, False)):
        digest.update(_normalised_bytes(tensor))


def _essentials(bare: nn.Module, layers: list[MoELayer]) -> dict[str, object]:
    config = getattr(bare, "config", None)
    text_config = config if config is None else config.get_text_config()
    names = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    essentials: dict[str, object] = {name: getattr(text_config, name, None) for name in names}
    essentials["layers"] = [
        (x.index, x.num_experts, x.top_k, x.hidden_size, x.moe_intermediate_size, x.num_shared_experts) for x in layers
    ]
    return essentials


def router_tensors(bare: nn.Module, layer: MoELayer) -> Iterator[tuple[str, Tensor]]:
    """All that a fingerprint covers of a layer's values: name in the bare model, and tensor."""
    # some families keep the router's correction bias in the block instead of in the router
    block_path = layer.path.rpartition(".")[0]
    block = base_module(bare, block_path)
    assert block is not None, f"{block_path} holds the experts that were found"
    yield from own_tensors(block, f"{block_path}.")
    if layer.router_path is not None:
        router = base_module(bare, layer.router_path)
        assert router is not None, f"{layer.router_path} was found beside the experts"
        yield from base_tensors(router, f"{layer.router_path}.")


def _normalised_bytes(tensor: Tensor) -> bytes:
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):  # sharded by FSDP2
        tensor = tensor.full_tensor()
    tensor = tensor.to("cpu", torch.bfloat16 if tensor.is_floating_point() else torch.int64).contiguous()
    return tensor.view(torch.uint8).numpy().tobytes()

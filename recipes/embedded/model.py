"""The embedded model's architecture, and the parts that make pretraining it on two cores bearable.

DeepSeek-V2's fine-grained experts with shared ones and latent attention, 18.5M parameters: six decoder layers, each
with 32 routed experts of width 96 (top-4) and two shared ones.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV2Config, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# T tokens, D hidden_size, E experts, K top_k, V vocabulary
# S = T * K token-expert pairs, P the same with each expert's rows padded to full blocks; I, O inputs and outputs

BLOCK = 64
QUERY_BLOCK = 128

CONFIG = DeepseekV2Config(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=1024,
    moe_intermediate_size=96,
    num_hidden_layers=6,
    first_k_dense_replace=0,
    n_routed_experts=32,
    n_shared_experts=2,
    num_experts_per_tok=4,
    routed_scaling_factor=2.0,
    num_attention_heads=4,
    q_lora_rank=None,
    kv_lora_rank=128,
    qk_nope_head_dim=32,
    qk_rope_head_dim=32,
    v_head_dim=64,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    bos_token_id=0,
    pad_token_id=1,
    eos_token_id=6,
)


class _Gather(torch.autograd.Function):
    """Rows of a matrix by index, where the backward pass is a gather too: index and its inverse are both known.

    `index_P` names source rows, and one past the last for a row of zeros; `places_RK` says where each source row went.
    """

    @staticmethod
    def forward(ctx, rows_RD: Tensor, index_P: Tensor, places_RK: Tensor) -> Tensor:
        ctx.save_for_backward(places_RK)
        return torch.cat([rows_RD, rows_RD.new_zeros(1, rows_RD.shape[-1])])[index_P]

    @staticmethod
    def backward(ctx, grad_PD: Tensor):
        (places_RK,) = ctx.saved_tensors
        grad_PD = torch.cat([grad_PD, grad_PD.new_zeros(1, grad_PD.shape[-1])])
        return grad_PD[places_RK].sum(1), None, None


class _GroupedLinear(torch.autograd.Function):
    """`rows_PI @ weight_EOI[e].T` for every expert's block of rows.

    A loop of plain products, because blocks are padded to multiples of 64 rows: oneDNN makes a kernel for every new
    shape, and with arbitrary block sizes making kernels takes ten times as long as running them (bf16, two cores).
    """

    @staticmethod
    def forward(ctx, rows_PI: Tensor, weight_EOI: Tensor, bounds: list[int]) -> Tensor:
        ctx.save_for_backward(rows_PI, weight_EOI)
        ctx.bounds = bounds
        out_PO = rows_PI.new_empty(rows_PI.shape[0], weight_EOI.shape[1])
        for expert, (first, last) in enumerate(pairwise(bounds)):
            if last > first:
                torch.mm(rows_PI[first:last], weight_EOI[expert].T, out=out_PO[first:last])
        return out_PO

    @staticmethod
    def backward(ctx, grad_PO: Tensor):
        rows_PI, weight_EOI = ctx.saved_tensors
        grad_PO = grad_PO.contiguous()
        grad_PI, grad_EOI = torch.empty_like(rows_PI), torch.zeros_like(weight_EOI)
        for expert, (first, last) in enumerate(pairwise(ctx.bounds)):
            if last > first:
                torch.mm(grad_PO[first:last], weight_EOI[expert], out=grad_PI[first:last])
                torch.mm(grad_PO[first:last].T, rows_PI[first:last], out=grad_EOI[expert])
        return grad_PI, grad_EOI, None


def experts_forward(experts: nn.Module, hidden_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Experts in transformers' contract; the same function as its `grouped_mm`, faster on a CPU in bf16."""
    num_tokens, top_k = expert_ids_TK.shape
    sorted_S, order_S = torch.sort(expert_ids_TK.reshape(-1), stable=True)
    counts_E = torch.bincount(sorted_S, minlength=experts.num_experts)
    padded_E = (counts_E + BLOCK - 1) // BLOCK * BLOCK
    shift_E = (padded_E.cumsum(0) - padded_E) - (counts_E.cumsum(0) - counts_E)
    place_S = torch.arange(order_S.numel()) + shift_E[sorted_S]
    bounds = [0, *padded_E.cumsum(0).tolist()]
    pair_P = torch.full((bounds[-1],), order_S.numel())
    pair_P[place_S] = order_S
    places_TK = torch.empty_like(order_S)
    places_TK[order_S] = place_S
    places_TK = places_TK.view(num_tokens, top_k)
    rows_PD = _Gather.apply(hidden_TD, (pair_P // top_k).clamp(max=num_tokens), places_TK)
    gate_PF, up_PF = _GroupedLinear.apply(rows_PD, experts.gate_up_proj, bounds).chunk(2, -1)
    out_PD = _GroupedLinear.apply(nn.functional.silu(gate_PF) * up_PF, experts.down_proj, bounds)
    back_P1 = pair_P.view(-1, 1)
    out_SD = _Gather.apply(out_PD, places_TK.reshape(-1), back_P1)
    weights_TK1 = weights_TK.to(out_SD.dtype).unsqueeze(-1)
    return (out_SD.view(num_tokens, top_k, -1) * weights_TK1).sum(1)


ALL_EXPERTS_FUNCTIONS.register("recipe_blocks", experts_forward)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Next-token loss from the last hidden states without ever holding the logits of all tokens.

    Inputs: hidden_TD, the head's weight_VD, labels_T (int64). Output: the mean loss, a scalar. The gradients are made
    in the forward pass, chunk by chunk, while the chunk's logits are still in cache. Probabilities stay in the hidden
    states' dtype: the gradient is rounded to it anyway, and the loss is only logged.
    """

    @staticmethod
    def forward(ctx, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, chunk: int = 256) -> Tensor:
        grad_TD = torch.empty_like(hidden_TD)
        grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        loss = hidden_TD.new_zeros((), dtype=torch.float32)
        num_tokens = labels_T.numel()
        for first in range(0, num_tokens, chunk):
            rows = slice(first, first + chunk)
            probs_TV = (hidden_TD[rows] @ weight_VD.T).softmax(-1)
            picked_T1 = labels_T[rows].unsqueeze(-1)
            loss -= probs_TV.gather(-1, picked_T1).float().log().sum()
            grad_TV = probs_TV.scatter_add_(-1, picked_T1, probs_TV.new_full(picked_T1.shape, -1.0))
            torch.mm(grad_TV, weight_VD, out=grad_TD[rows])
            grad_VD += grad_TV.T @ hidden_TD[rows]
        ctx.save_for_backward(grad_TD.div_(num_tokens), grad_VD.div_(num_tokens).to(weight_VD.dtype))
        return loss / num_tokens

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_TD, grad_VD = ctx.saved_tensors
        return grad_TD * grad, grad_VD * grad, None, None


class _CausalAttention(torch.autograd.Function):
    """Softmax attention over whole rows, as plain products; a block of queries sees its keys only.

    Three times as fast as torch's fused attention on a CPU at 512 positions in bf16, whose tiles are small.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        probs = []
        for first in range(0, query.shape[-2], QUERY_BLOCK):
            last = min(first + QUERY_BLOCK, query.shape[-2])
            scores = torch.baddbmm(
                _causal_bias(first, last, query.dtype), query[:, first:last], key[:, :last].mT, alpha=scale
            )
            probs.append(scores.softmax(-1))
            out[:, first:last] = probs[-1] @ value[:, :last]
        ctx.save_for_backward(query, key, value, *probs)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        query, key, value, *probs = ctx.saved_tensors
        grads = [torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)]
        for index, part in enumerate(probs):
            first, last = index * QUERY_BLOCK, part.shape[-1]
            grad_out = grad[:, first:last]
            grads[2][:, :last] += part.mT @ grad_out
            grad_probs = grad_out @ value[:, :last].mT
            grad_scores = torch._softmax_backward_data(grad_probs, part, -1, part.dtype).mul_(ctx.scale)
            grads[0][:, first:last] = grad_scores @ key[:, :last]
            grads[1][:, :last] += grad_scores.mT @ query[:, first:last]
        return *grads, None


@lru_cache
def _causal_bias(first: int, last: int, dtype: torch.dtype) -> Tensor:
    """0 where a query of `first:last` may look, else minus infinity; (1, last - first, last)."""
    return torch.full((1, last - first, last), float("-inf"), dtype=dtype).triu_(first + 1)


def attention_forward(module: nn.Module, query, key, value, attention_mask, scaling: float, **_) -> tuple[Tensor, None]:
    """Attention in transformers' interface: (batch, heads, sequence, head_dim) in, (batch, sequence, heads, ·) out."""
    batch, heads = query.shape[:2]
    q, k, v = (part.reshape(batch * heads, *part.shape[2:]) for part in (query, key, value))
    out = _CausalAttention.apply(q, k, v, scaling)
    return out.view(batch, heads, *out.shape[1:]).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("recipe_causal", attention_forward)


def build(seed: int) -> PreTrainedModel:
    """A freshly initialised model in bf16 (masters live in the optimizer); the router starts small and random."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32, attn_implementation="sdpa")
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            nn.init.normal_(parameter, std=0.02)
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            nn.init.normal_(parameter, std=0.02)
    model.set_experts_implementation("recipe_blocks")
    model.set_attn_implementation("recipe_causal")
    return model


class RouterRecord:
    """What every router did in the last forward pass: the balancing loss, and the counts behind it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.losses: list[Tensor] = []
        self.counts: list[Tensor] = []
        for module in model.modules():
            if type(module).__name__ == "DeepseekV2TopkRouter":
                module.register_forward_hook(self._record)

    def _record(self, router: nn.Module, inputs: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits_TE, _, expert_ids_TK = output
        counts_E = torch.bincount(expert_ids_TK.reshape(-1), minlength=logits_TE.shape[-1])
        share_E = counts_E / counts_E.sum()
        self.losses.append(logits_TE.shape[-1] * (share_E * logits_TE.softmax(-1).mean(0)).sum())
        self.counts.append(counts_E)

    def pop(self) -> tuple[Tensor, Tensor]:
        """(mean balancing loss over layers, 1 when even; counts_LE) since the last call."""
        loss, counts_LE = torch.stack(self.losses).mean(), torch.stack(self.counts)
        self.losses, self.counts = [], []
        return loss, counts_LE

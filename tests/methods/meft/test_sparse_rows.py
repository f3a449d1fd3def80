"""The sparse adapter against plain loops over tokens, in outputs and all gradients."""

# T tokens, D hidden_size, N Key-Experts, K of them a token, M rows of one

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from metier.errors import RowStoreError
from metier.memory import RowAdamW
from metier.memory.row_store import RowStore
from metier.memory.step_gradients import StepGradients
from metier.methods.meft.sparse_rows import chosen_rows, sparse_rows

# float64 would hide nothing, but the store is float32: sums of up to a few hundred products
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
D, N, M = 12, 6, 5


def reference(hidden_TD: Tensor, key_experts_TK: Tensor, gate_TK: Tensor | None, rows_NMWD: Tensor, top_k: int):
    """What each token's best candidates give, one token at a time."""
    outs = []
    for token, hidden in enumerate(hidden_TD):
        rows = rows_NMWD[key_experts_TK[token]]  # (K, M, 2, D)
        gated = rows[:, :, 0] @ hidden
        if gate_TK is not None:
            gated = gated * gate_TK[token].unsqueeze(-1)
        best = gated.flatten().detach().argsort(descending=True)[:top_k]
        outs.append(gated.flatten()[best].relu() @ rows[:, :, 1].flatten(0, 1)[best])
    return torch.stack(outs)


def case(num_tokens: int, num_active: int, *, seed: int = 0, same: bool = False):
    generator = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(num_tokens, D, generator=generator)
    ids = torch.stack([torch.randperm(N, generator=generator)[:num_active] for _ in range(num_tokens)])
    if same:
        ids = ids[:1].expand(num_tokens, -1)
    gate_TK = torch.randn(num_tokens, num_active, generator=generator)
    store = RowStore(N, M, D)
    store.rows_NMWD.copy_(torch.randn(N, M, 2, D, generator=generator))
    return hidden_TD, ids.contiguous(), gate_TK, store


def dense_gradient(gradients: StepGradients) -> Tensor:
    whole = torch.zeros(N, M, 2, D)
    whole[gradients.block_ids] = gradients.holder.grad
    return whole


def check_against(
    expected: Tensor, inputs: list[Tensor], ids: Tensor, store: RowStore, *, gated: bool, **options
) -> None:
    """`expected` was made of `inputs` (hidden states, gates, rows): outputs and all gradients are to be the same."""
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * weight).sum().backward()
    hidden, gate = (tensor.detach().clone().requires_grad_() for tensor in inputs[:2])
    gradients = StepGradients(store)
    out = sparse_rows(hidden, ids, gate if gated else None, gradients, **options)
    (out * weight).sum().backward()
    torch.testing.assert_close(out, expected, **TOLERANCE)
    torch.testing.assert_close(hidden.grad, inputs[0].grad, **TOLERANCE)
    torch.testing.assert_close(dense_gradient(gradients), inputs[2].grad, rtol=1e-4, atol=1e-4)
    if gated:
        torch.testing.assert_close(gate.grad, inputs[1].grad, **TOLERANCE)


@pytest.mark.parametrize("num_tokens", [1, 63, 257])
@pytest.mark.parametrize("num_active", [1, 3, N])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("top_k", [1, 4, N * M])
def test_outputs_and_gradients_are_those_of_plain_loops(num_tokens, num_active, gated, top_k):
    hidden_TD, ids, gate_TK, store = case(num_tokens, num_active)
    top_k = min(top_k, num_active * M)
    inputs = [t.clone().requires_grad_() for t in (hidden_TD, gate_TK, store.rows_NMWD)]
    expected = reference(inputs[0], ids, inputs[1] if gated else None, inputs[2], top_k)
    check_against(expected, inputs, ids, store, gated=gated, top_k=top_k)


def test_one_key_expert_may_have_all_tokens():
    hidden_TD, ids, gate_TK, store = case(40, 1, same=True)
    out = sparse_rows(hidden_TD, ids, gate_TK, StepGradients(store), top_k=3)
    torch.testing.assert_close(out, reference(hidden_TD, ids, gate_TK, store.rows_NMWD, 3), **TOLERANCE)


def test_there_is_a_gradient_for_used_blocks_alone():
    hidden_TD, ids, gate_TK, store = case(2, 2)
    gradients = StepGradients(store)
    sparse_rows(hidden_TD.requires_grad_(), ids, gate_TK, gradients, top_k=4).sum().backward()
    assert sorted(gradients.block_ids) == sorted(set(ids.flatten().tolist()))
    assert len(gradients.holder.grad) == len(gradients.block_ids) < N


def test_rows_that_did_not_fire_are_not_flagged_and_have_no_gradient():
    hidden_TD, ids, gate_TK, store = case(3, 2)
    gradients = StepGradients(store)
    sparse_rows(hidden_TD.requires_grad_(), ids, gate_TK, gradients, top_k=2).sum().backward()
    moved_GM = (gradients.holder.grad != 0).flatten(2).any(-1)
    assert gradients.fired_GM.any()
    assert not gradients.fired_GM.all()
    assert (moved_GM == gradients.fired_GM).all()


def test_micro_batches_add_up_and_new_blocks_join():
    hidden_TD, ids, gate_TK, store = case(20, 2)
    together, apart = StepGradients(store), StepGradients(store)
    sparse_rows(hidden_TD, ids, gate_TK, together, top_k=5).square().sum().backward()
    for part in (slice(0, 1), slice(1, 3), slice(3, 20)):
        sparse_rows(hidden_TD[part], ids[part], gate_TK[part], apart, top_k=5).square().sum().backward()
    torch.testing.assert_close(dense_gradient(apart), dense_gradient(together), rtol=1e-4, atol=1e-4)
    fired = [dict(zip(g.block_ids, g.fired_GM.tolist(), strict=True)) for g in (apart, together)]
    assert fired[0] == fired[1]


def test_zero_grad_begins_a_new_step():
    hidden_TD, ids, gate_TK, store = case(20, 2)
    gradients = StepGradients(store)
    sparse_rows(hidden_TD, ids, gate_TK, gradients, top_k=5).sum().backward()
    gradients.holder.grad = None
    sparse_rows(hidden_TD[:1], ids[:1], gate_TK[:1], gradients, top_k=5).sum().backward()
    assert sorted(gradients.block_ids) == sorted(ids[0].tolist())


def test_the_holder_takes_no_memory_of_its_own():
    hidden_TD, ids, gate_TK, store = case(20, 2)
    gradients = StepGradients(store)
    sparse_rows(hidden_TD, ids, gate_TK, gradients, top_k=5).sum().backward()
    assert gradients.holder.shape == gradients.holder.grad.shape
    assert gradients.holder.untyped_storage().nbytes() == 4


def test_clipping_sees_rows_and_ordinary_parameters_as_one():
    hidden_TD, ids, gate_TK, store = case(20, 2)
    gradients, gate = StepGradients(store), nn.Parameter(gate_TK)
    sparse_rows(hidden_TD, ids, gate, gradients, top_k=5).square().sum().backward()
    expected = torch.cat([dense_gradient(gradients).flatten(), gate.grad.flatten()]).norm()
    got = nn.utils.clip_grad_norm_([gate, gradients.holder], 1e-3)
    torch.testing.assert_close(got, expected)
    clipped = torch.cat([dense_gradient(gradients).flatten(), gate.grad.flatten()]).norm()
    torch.testing.assert_close(clipped, torch.tensor(1e-3), rtol=1e-3, atol=0)


def test_a_token_is_answered_the_same_in_any_batch():
    hidden_TD, ids, gate_TK, store = case(31, 3)
    whole = sparse_rows(hidden_TD, ids, gate_TK, StepGradients(store), top_k=4)
    for token in range(31):
        part = slice(token, token + 1)
        alone = sparse_rows(hidden_TD[part], ids[part], gate_TK[part], StepGradients(store), top_k=4)
        torch.testing.assert_close(alone, whole[part], **TOLERANCE)


def test_chosen_rows_are_the_union_of_every_tokens_best():
    hidden_TD, ids, gate_TK, store = case(9, 2)
    expected = torch.zeros(N, M, dtype=torch.bool)
    for token in range(9):
        products = torch.stack([(store.rows_NMWD[b, :, 0] @ hidden_TD[token]) for b in ids[token]])
        best = (products * gate_TK[token, :, None]).flatten().topk(3).indices.tolist()
        for place in best:
            expected[ids[token][place // M], place % M] = True
    assert (chosen_rows(hidden_TD, ids, gate_TK, store, top_k=3) == expected).all()


@pytest.mark.parametrize("gated", [True, False])
def test_the_rows_of_a_union_fire_for_every_token_in_outputs_and_gradients(gated):
    hidden_TD, ids, gate_TK, store = case(23, N)
    chosen_NM = torch.rand(N, M, generator=torch.Generator().manual_seed(2)) < 0.4
    assert chosen_NM.any(1).all()
    assert not chosen_NM.all(1).any()
    inputs = [t.clone().requires_grad_() for t in (hidden_TD, gate_TK, store.rows_NMWD)]
    products = torch.einsum("td,nmd->tnm", inputs[0], inputs[2][:, :, 0])
    if gated:
        # a token's gates stand in the order of its Key-Experts
        products = products * inputs[1].gather(1, ids.argsort(1)).unsqueeze(-1)
    expected = torch.einsum("tnm,nmd->td", products.relu() * chosen_NM, inputs[2][:, :, 1])
    check_against(expected, inputs, ids, store, gated=gated, top_k=1, chosen_NM=chosen_NM)


def test_bfloat16_inputs_give_float32_gradients_of_rows():
    hidden_TD, ids, gate_TK, store = case(33, 2)
    exact, rounded = StepGradients(store), StepGradients(store)
    out = sparse_rows(hidden_TD, ids, gate_TK, exact, top_k=10)
    out.sum().backward()
    low = sparse_rows(hidden_TD.bfloat16(), ids, gate_TK.bfloat16(), rounded, top_k=10)
    low.sum().backward()
    assert low.dtype == torch.bfloat16
    assert rounded.holder.grad.dtype == torch.float32
    # bfloat16 has 8 bits: sums of 12 products err by some percent of their size
    torch.testing.assert_close(low.float(), out, rtol=0.05, atol=0.3)


def test_remote_rows_are_fetched_once_for_a_step_and_not_kept_without_gradients():
    hidden_TD, ids, gate_TK, store = case(20, 2)
    store.is_remote = True
    num_used, gradients = len(set(ids.flatten().tolist())), StepGradients(store)
    for _ in range(3):
        sparse_rows(hidden_TD.requires_grad_(), ids, gate_TK, gradients, top_k=5).sum().backward()
    assert store.meter.num_fetched == num_used
    store.end_step([])
    store.meter.take()
    with torch.no_grad():
        for _ in range(2):
            sparse_rows(hidden_TD, ids, gate_TK, gradients, top_k=5)
    assert store.meter.num_fetched == 2 * num_used


def test_a_gradient_of_the_inputs_alone_leaves_none_of_rows():
    hidden_TD, ids, gate_TK, store = case(20, 2)
    hidden, gradients = hidden_TD.requires_grad_(), StepGradients(store)
    out = sparse_rows(hidden, ids, gate_TK, gradients, top_k=5).square().sum()
    (wanted,) = torch.autograd.grad(out, hidden, retain_graph=True)
    out.backward(inputs=[hidden], retain_graph=True)
    assert torch.equal(hidden.grad, wanted)
    assert gradients.block_ids == []
    assert gradients.holder.grad is None
    out.backward()
    once, again = dense_gradient(gradients), StepGradients(store)
    sparse_rows(hidden, ids, gate_TK, again, top_k=5).square().sum().backward()
    assert torch.equal(dense_gradient(again), once)
    assert once.any()


def test_a_gradient_of_rows_to_be_returned_is_refused():
    hidden_TD, ids, gate_TK, store = case(20, 2)
    gradients = StepGradients(store)
    out = sparse_rows(hidden_TD.requires_grad_(), ids, gate_TK, gradients, top_k=5).sum()
    with pytest.raises(RowStoreError, match=r"got torch\.autograd\.grad of what stands for rows"):
        torch.autograd.grad(out, [hidden_TD, gradients.holder], allow_unused=True)
    assert gradients.block_ids == []


def test_with_checkpointing_rows_have_their_gradients_once():
    hidden_TD, ids, gate_TK, store = case(20, 2)
    hidden = hidden_TD.requires_grad_()
    found = []
    for reentrant in (None, False, True):
        gradients = StepGradients(store)

        def run(inputs: Tensor, gradients: StepGradients = gradients) -> Tensor:
            return sparse_rows(inputs, ids, gate_TK, gradients, top_k=5)

        out = run(hidden) if reentrant is None else checkpoint(run, hidden, use_reentrant=reentrant)
        out.square().sum().backward()
        found.append(dense_gradient(gradients))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert found[0].any()


@pytest.mark.parametrize("same_blocks", [True, False])
def test_another_tensor_in_the_gradients_place_is_what_the_next_pass_adds_to(same_blocks):
    hidden_TD, ids, gate_TK, store = case(40, 2)
    parts = [slice(0, 2), slice(0, 2) if same_blocks else slice(2, 40)]
    alone = []
    for part in parts:
        gradients = StepGradients(store)
        sparse_rows(hidden_TD[part], ids[part], gate_TK[part], gradients, top_k=5).square().sum().backward()
        alone.append(dense_gradient(gradients))
    gradients = StepGradients(store)
    for number, part in enumerate(parts):
        if number:
            gradients.holder.grad = gradients.holder.grad * 0.5
        sparse_rows(hidden_TD[part], ids[part], gate_TK[part], gradients, top_k=5).square().sum().backward()
    torch.testing.assert_close(dense_gradient(gradients), 0.5 * alone[0] + alone[1])


def test_rows_that_do_not_train_do_not_stay_on_a_device():
    hidden_TD, ids, gate_TK, store = case(20, 2)
    store.is_remote, gradients = True, StepGradients(store)
    gradients.holder.requires_grad_(False)
    for _ in range(3):
        sparse_rows(hidden_TD.requires_grad_(), ids, gate_TK, gradients, top_k=5).sum().backward()
    assert store.on_device._fetched == {}
    assert hidden_TD.grad.any()


def test_a_backward_pass_after_an_update_of_its_rows_is_refused():
    hidden_TD, ids, gate_TK, store = case(20, 2)
    gradients = StepGradients(store)
    first, second = (sparse_rows(hidden_TD.requires_grad_(), ids, gate_TK, gradients, top_k=5).sum() for _ in range(2))
    first.backward()
    RowAdamW([gradients.holder]).step()
    with pytest.raises(RowStoreError, match="rows were changed between a forward pass and its backward one"):
        second.backward()

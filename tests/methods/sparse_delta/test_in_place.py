"""Values in the base's own parameter: when they are written, what autograd sees, and that every bit comes back."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from metier.errors import ConfigError
from metier.methods.sparse_delta.in_place import Delta, EntriesInPlace

INDICES = torch.tensor([0, 3, 4, 11], dtype=torch.int32)
FROZEN = {"requires_grad": False}
assert peft, "registers the methods before their modules are imported"


def place_of(weight: torch.Tensor) -> EntriesInPlace:
    owner = nn.Module()
    owner.weight = nn.Parameter(weight, **FROZEN)
    return EntriesInPlace(owner, "weight", "layer.weight")


def delta(values, indices=INDICES, name="a") -> Delta:
    return Delta(name, indices, nn.Parameter(torch.tensor(values)))


def base(dtype=torch.float32) -> torch.Tensor:
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0, 0] = -0.0
    return weight


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("indices", [INDICES, INDICES.long(), None])
def test_what_is_written_is_the_sum_rounded_once_and_every_bit_comes_back(dtype, indices):
    place, weight = place_of(base(dtype)), base(dtype)
    before = bits(place.parameter)
    where = torch.arange(12) if indices is None else indices.long()
    added = delta(torch.randn(len(where)).tolist(), indices)
    place.show([added])
    expected = weight.clone()
    exact = torch.promote_types(dtype, torch.float32)
    expected.view(-1)[where] = (weight.view(-1)[where].to(exact) + added.values_M.detach()).to(dtype)
    assert torch.equal(place.parameter, expected)
    place.restore()
    assert torch.equal(bits(place.parameter), before)


def test_a_difference_of_zero_leaves_every_bit_also_of_a_negative_zero():
    place = place_of(base())
    before = bits(place.parameter)
    place.show([delta([0.0] * 4)])
    assert torch.equal(bits(place.parameter), before)


def test_small_steps_add_up_under_a_bf16_base():
    place, values = place_of(torch.ones(3, 4, dtype=torch.bfloat16)), delta([0.0] * 4)
    for _ in range(8):
        with torch.no_grad():
            values.values_M.add_(2**-10)  # an eighth of bf16's step at 1
        place.show([values])
    assert place.parameter.view(-1)[0] == 1 + 2**-7
    assert place.parameter.view(-1)[1] == 1


def test_adapters_that_meet_at_an_entry_add_up_whatever_their_order():
    place, weight = place_of(base(torch.bfloat16)), base(torch.bfloat16)
    before = bits(place.parameter)
    one, two = delta([1.0, 2.0, 3.0, 4.0]), delta([0.001, 0.002, 0.003], torch.tensor([3, 5, 11]), "b")
    whole = delta([0.5] * 12, None, "c")
    for deltas in ([one, two], [two, one], [one, whole, two]):
        total = weight.float().view(-1).clone()
        for added in deltas:
            where = torch.arange(12) if added.indices_M is None else added.indices_M.long()
            total[where] += added.values_M.detach()
        place.show(deltas)
        torch.testing.assert_close(place.parameter.float().view(-1), total.to(torch.bfloat16).float())
    place.restore()
    assert torch.equal(bits(place.parameter), before)


def test_nothing_is_written_while_nothing_changed():
    place, added = place_of(base()), delta([1.0] * 4)
    place.show([added])
    with torch.no_grad():
        place.parameter.view(-1)[1] = 7.0  # not an entry
        place.parameter.view(-1)[3] = 9.0  # an entry, by another hand
    place.show([added])
    assert place.parameter.view(-1)[3] == 9.0
    with torch.no_grad():
        added.values_M.add_(0)  # a change as far as its version says
    place.show([added])
    assert place.parameter.view(-1)[3] != 9.0
    assert place.parameter.view(-1)[1] == 7.0


def product(place, deltas, inputs):
    place.show(deltas)
    return F.linear(inputs, place.proxy(deltas)).square().sum()


def test_the_gradient_is_that_of_the_dense_parameter_at_the_entries():
    place, added = place_of(base()), delta([1.0, -2.0, 0.5, 3.0])
    inputs = torch.randn(5, 4, requires_grad=True)
    product(place, [added], inputs).backward()
    dense = base()
    dense.view(-1)[INDICES.long()] += added.values_M.detach()
    dense.requires_grad_()
    again = inputs.detach().requires_grad_()
    F.linear(again, dense).square().sum().backward()
    assert torch.equal(added.values_M.grad, dense.grad.view(-1)[INDICES.long()])
    assert torch.equal(inputs.grad, again.grad)
    assert place.parameter.grad is None
    assert place.parameter.data_ptr() == place.proxy([added]).data_ptr(), "a copy was made"


def test_a_look_at_the_base_between_forward_and_backward_does_no_harm():
    place, added, inputs = place_of(base()), delta([1.0] * 4), torch.randn(5, 4, requires_grad=True)
    product(place, [added], inputs).backward()
    expected, values = inputs.grad.clone(), added.values_M.grad.clone()
    inputs.grad = added.values_M.grad = None
    loss = product(place, [added], inputs)
    place.restore()
    place.show([added])
    loss.backward()
    assert torch.equal(inputs.grad, expected)
    assert torch.equal(added.values_M.grad, values)


@pytest.mark.parametrize("between", ["base", "other adapter", "other values"])
def test_a_backward_pass_over_other_contents_fails(between):
    place, added, inputs = place_of(base()), delta([1.0] * 4), torch.randn(5, 4, requires_grad=True)
    loss = product(place, [added], inputs)
    if between == "base":
        place.restore()
    elif between == "other adapter":
        place.show([delta([2.0] * 4, name="b")])
    else:
        with torch.no_grad():
            added.values_M.mul_(3)
        place.show([added])
    with pytest.raises(RuntimeError, match="modified"):
        loss.backward()


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_every_kind_of_optimizer_is_noticed(options):
    place, added, inputs = place_of(base()), delta([0.0] * 4), torch.randn(5, 4)
    optimizer = torch.optim.AdamW([added.values_M], lr=0.1, **options)
    for _ in range(2):
        product(place, [added], inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
        place.show([added])
        expected = base().view(-1)[INDICES.long()] + added.values_M.detach()
        assert torch.equal(place.parameter.view(-1)[INDICES.long()], expected)


def test_a_look_between_a_backward_pass_and_a_fused_step_hides_no_step():
    place, added, inputs = place_of(base()), delta([0.0] * 4), torch.randn(5, 4)
    optimizer = torch.optim.AdamW([added.values_M], lr=0.1, fused=True)
    for _ in range(2):
        product(place, [added], inputs).backward()
        with torch.no_grad():
            place.show([added])
        optimizer.step()
        place.show([added])
        expected = base().view(-1)[INDICES.long()] + added.values_M.detach()
        assert torch.equal(place.parameter.view(-1)[INDICES.long()], expected)
        optimizer.zero_grad()


def test_what_is_made_in_inference_mode_answers_there():
    with torch.inference_mode():
        place, added = place_of(base()), delta([1.0] * 4)
        for deltas in ([added], [], [added]):
            place.show(deltas)
            expected = base().view(-1)[INDICES.long()] + (1.0 if deltas else 0.0)
            assert torch.equal(place.parameter.view(-1)[INDICES.long()], expected)


def test_a_fused_optimizer_moves_values_behind_the_version_counter():
    """The reason why a backward pass makes the next forward pass write; may go when it fails."""
    value = nn.Parameter(torch.zeros(2))
    value.grad = torch.ones(2)
    torch.optim.AdamW([value], fused=True).step()
    assert value._version == 0
    assert value[0] != 0


def test_a_base_that_another_hand_changed_meanwhile_is_not_taken_for_the_old_one():
    place, added, inputs = place_of(base()), delta([1.0] * 4), torch.randn(5, 4, requires_grad=True)
    loss = product(place, [added], inputs)
    place.restore()
    with torch.no_grad():
        place.parameter.mul_(2)
    place.show([added])
    with pytest.raises(RuntimeError, match="modified"):
        loss.backward()
    place.restore()
    assert torch.equal(place.parameter, base() * 2)


def test_without_gradients_the_parameter_itself_is_used():
    place, added = place_of(base()), delta([1.0] * 4)
    with torch.no_grad():
        assert place.proxy([added]) is place.parameter
    added.values_M.requires_grad_(False)
    assert place.proxy([added]) is place.parameter
    with torch.inference_mode():
        place.show([added])
        assert place.parameter.view(-1)[3] == base().view(-1)[3] + 1
        place.restore()


def test_a_parameter_that_is_not_contiguous_is_refused():
    with pytest.raises(ConfigError, match=r"layer.weight: a parameter of shape \(4, 3\) with strides \(1, 4\)"):
        place_of(base().t()).show([delta([1.0] * 4)])

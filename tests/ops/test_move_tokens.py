import pytest
import torch

from diffusers_pisdm.ops import TokenMove, invert_scan_path, move_tokens, scan_transitions


def permutation(length):
    index = torch.randperm(length, generator=torch.Generator().manual_seed(0))
    return TokenMove(index, invert_scan_path(index))


def test_reads_tokens_in_the_order_of_the_index():
    tokens = torch.arange(12.0).view(2, 3, 2)
    moved = move_tokens(tokens, TokenMove(torch.tensor([2, 0, 2, 1]), None))
    assert torch.equal(moved, tokens[:, [2, 0, 2, 1]])


@pytest.mark.parametrize("with_inverse", [False, True])
def test_gradients_equal_those_of_plain_indexing(with_inverse):
    move = permutation(7)
    if not with_inverse:
        move = TokenMove(torch.tensor([0, 0, 3, 6]), None)
    tokens = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, len(move.index), 3, dtype=torch.float64)
    (grad,) = torch.autograd.grad((move_tokens(tokens, move) ** 2 * weight).sum(), tokens)
    (expected,) = torch.autograd.grad((tokens[:, move.index] ** 2 * weight).sum(), tokens)
    assert torch.equal(grad, expected)


def test_gradient_of_a_permutation_is_a_gather():
    """`index_add_`, the gradient of plain indexing, is far slower."""
    tokens = torch.randn(1, 7, 3, requires_grad=True)
    with torch.profiler.profile() as profile:
        move_tokens(tokens, permutation(7)).sum().backward()
    names = [event.name for event in profile.events()]
    assert "aten::index_add_" not in names
    assert names.count("aten::index_select") == 2


def test_is_twice_differentiable():
    move = permutation(5)
    tokens = torch.randn(1, 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda tokens: move_tokens(tokens, move) ** 2, tokens)
    assert torch.autograd.gradgradcheck(lambda tokens: move_tokens(tokens, move) ** 2, tokens)


def test_gradient_through_all_layers_of_a_rectangle_counts_each_use_of_a_pad():
    """2 x 3 with one pad: rows have 2 line ends, then columns 3; the last move drops them."""
    moves = scan_transitions(2, 3, ("row_top_left", "column_top_left"), num_padding_tokens=1, num_prefix_tokens=1)
    tokens = torch.zeros(1, 1 + 6 + 1, 1, requires_grad=True)
    in_columns = move_tokens(move_tokens(tokens, moves[0]), moves[1])
    in_columns.sum().backward()
    assert tokens.grad.flatten().tolist() == [1] * 7 + [3]

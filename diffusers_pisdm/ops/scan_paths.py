"""The orders in which a scan visits a 2-D grid of tokens (the paper's cyclic scanning, CSM, and padding tokens)."""

from __future__ import annotations

from functools import cache, partial
from typing import NamedTuple

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .cached_table import cached_table


# {row-major, column-major} x {four start corners}: the eight rasters of the square's symmetry group. DiM's four come
# first, so that a prefix of this tuple is a sensible smaller set; each path is followed by its exact reverse.
SCAN_DIRECTIONS = (
    "row_top_left",
    "row_bottom_right",
    "column_top_left",
    "column_bottom_right",
    "row_top_right",
    "row_bottom_left",
    "column_top_right",
    "column_bottom_left",
)


def check_scan_direction(direction: str) -> None:
    """Raises `ValueError` if `direction` is not one of [`SCAN_DIRECTIONS`]."""
    if direction not in SCAN_DIRECTIONS:
        raise ValueError(f"`{direction}` is not a scan direction. Choose from {', '.join(SCAN_DIRECTIONS)}.")


def scan_path(
    height: int,
    width: int,
    direction: str,
    snake: bool = False,
    num_padding_tokens: int = 0,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    r"""
    The order in which a scan visits the tokens of a `height x width` grid (one direction of the paper's CSM).

    Image tokens have their raster index `row * width + column`. With `num_padding_tokens = P > 0`, every scanned line
    is followed by its `P` padding tokens (the paper's PT) with indices `height * width + line * P + p`, where `line`
    is their row (or column), whatever the order in which lines are visited.

    Args:
        height (`int`): Rows of the grid, at least 1.
        width (`int`): Columns of the grid, at least 1.
        direction (`str`): One of [`SCAN_DIRECTIONS`]: the axis along which a line runs and the corner it starts from.
        snake (`bool`, defaults to `False`):
            Whether every second line is walked backwards, so that consecutive image tokens are always neighbours
            (boustrophedon, as in ZigMa).
        num_padding_tokens (`int`, defaults to 0): Padding tokens at the end of every line.
        device (`torch.device`, *optional*): Where the path is built.

    Returns:
        `torch.Tensor` of shape `(L,)`, int64: a permutation of `0..L-1`, where `L = height * width + lines * P`.

    Raises:
        ValueError: `direction` is unknown.
    """
    check_scan_direction(direction)
    return _scan_path(
        height, width, direction, snake, num_padding_tokens, _num_lines(height, width, direction), device
    )


def _scan_path(
    height: int,
    width: int,
    direction: str,
    snake: bool,
    num_padding_tokens: int,
    num_pad_lines: int,
    device: torch.device | str | None,
) -> torch.Tensor:
    """[`scan_path`] with padding tokens for `num_pad_lines` lines only: each line has those of the nearest."""
    axis, vertical, horizontal = direction.split("_")

    grid = torch.arange(height * width, device=device).view(height, width)  # (H, W)
    if vertical == "bottom":
        grid = grid.flip(0)
    if horizontal == "right":
        grid = grid.flip(1)
    lines = grid if axis == "row" else grid.T  # (lines, length)

    num_lines = _num_lines(height, width, direction)
    if snake:
        backwards = torch.arange(num_lines, device=device)[:, None] % 2 == 1  # (lines, 1)
        lines = torch.where(backwards, lines.flip(1), lines)

    if num_padding_tokens > 0:
        line_ids = torch.arange(num_lines, device=device)
        if (vertical if axis == "row" else horizontal) in ("bottom", "right"):
            line_ids = line_ids.flip(0)
        line_ids = line_ids * num_pad_lines // num_lines
        pads = torch.arange(num_padding_tokens, device=device) + line_ids[:, None] * num_padding_tokens
        lines = torch.cat([lines, height * width + pads], dim=1)  # (lines, length + P)
    return lines.reshape(-1)  # (L,)


def invert_scan_path(path: torch.Tensor) -> torch.Tensor:
    """
    The inverse permutation: the position of each token in the scan, so that `path[invert_scan_path(path)]` is
    `0..L-1`.
    """
    return torch.empty_like(path).scatter_(0, path, torch.arange(path.shape[0], device=path.device))


class TokenMove(NamedTuple):
    """A gather along the token axis. If it is a permutation, `inverse` undoes it: its gradient is also a gather."""

    index: torch.Tensor
    inverse: torch.Tensor | None


@cached_table(maxsize=32)
def scan_transitions(
    height: int,
    width: int,
    directions: tuple[str, ...],
    snake: bool = False,
    num_padding_tokens: int = 0,
    num_prefix_tokens: int = 0,
    *,
    device: torch.device | str | None = None,
) -> list[TokenMove | None]:
    r"""
    The gathers that take a token sequence through layers with the given scan directions (CSM), one before each layer
    and one after the last: a single index goes from one layer's order to the next.

    The first index reads from `[prefix tokens, image tokens in raster order, P padding tokens]` and thus copies the
    padding tokens to every line end. The next ones turn one layer's order into the following layer's; prefix tokens
    stay in front. The last picks the image tokens in raster order.

    A rectangle has different numbers of rows and columns, and thus of padding tokens; those of the next order then
    come from the nearest line of the previous one.

    Args:
        height (`int`), width (`int`): The grid of image tokens.
        directions (`tuple[str, ...]`): The scan direction of each layer.
        snake (`bool`), num_padding_tokens (`int`): As in [`scan_path`].
        num_prefix_tokens (`int`): Tokens that every scan reads before the image.
        device (`torch.device`, *optional*): The device of the indices.

    Returns:
        `list[TokenMove | None]` of `len(directions) + 1` moves; `None` where nothing moves (for the last: where only
        the prefix needs dropping).
    """
    sizes = (height, width, snake, num_padding_tokens, num_prefix_tokens)
    if torch.compiler.is_compiling():
        # From a single operator: building them would make up most of the graph.
        index = partial(_move_index_op, *sizes, None if device is None else torch.device(device))
    else:
        index = _MoveIndices(*sizes, device)

    def change(before: str, after: str) -> TokenMove:
        # A compiled graph with symbolic sizes cannot decide the second question and treats squares as rectangles.
        is_permutation = num_padding_tokens == 0 or statically_known_true(
            _num_lines(height, width, before) == _num_lines(height, width, after)
        )
        return TokenMove(index(before, after), index(after, before) if is_permutation else None)

    # Layers repeat a few pairs of directions, so each pair is built once and shared.
    pairs = list(zip(directions, directions[1:]))
    changes = {pair: change(*pair) for pair in dict.fromkeys(pairs) if pair[0] != pair[1]}
    is_raster = num_padding_tokens == 0 and not snake
    enter = leave = None
    if not is_raster or directions[0] != SCAN_DIRECTIONS[0]:
        enter = TokenMove(index(None, directions[0]), None)
    if not is_raster or directions[-1] != SCAN_DIRECTIONS[0]:
        leave = TokenMove(index(directions[-1], None), None)
    return [enter, *(changes.get(pair) for pair in pairs), leave]


class _MoveIndices:
    """
    Builds the indices of [`scan_transitions`] for a grid: from the order `before` (`None`: prefix, raster order, one
    set of padding tokens) to the order `after` (`None`: only the image tokens, in raster order).
    """

    def __init__(
        self,
        height: int,
        width: int,
        snake: bool,
        num_padding_tokens: int,
        num_prefix_tokens: int,
        device: torch.device | str | None,
    ):
        self.height, self.width, self.snake = height, width, snake
        self.num_padding_tokens, self.num_prefix_tokens = num_padding_tokens, num_prefix_tokens
        self.device = device
        self.path, self.inverse, self.indices = cache(self._path), cache(self._inverse), cache(self._index)

    def __call__(self, before: str | None, after: str | None) -> torch.Tensor:
        return self.indices(before, after)

    def _index(self, before: str | None, after: str | None) -> torch.Tensor:
        if after is None:
            image = slice(self.num_prefix_tokens, self.num_prefix_tokens + self.height * self.width)
            return self.inverse(before)[image]
        num_pad_lines = 1 if before is None else _num_lines(self.height, self.width, before)
        path = self.path(after, num_pad_lines)
        return path if before is None else self.inverse(before).index_select(0, path)

    def _inverse(self, direction: str) -> torch.Tensor:
        return invert_scan_path(self.path(direction, _num_lines(self.height, self.width, direction)))

    def _path(self, direction: str, num_pad_lines: int) -> torch.Tensor:
        sizes = (self.height, self.width, direction, self.snake, self.num_padding_tokens, num_pad_lines)
        path = self.num_prefix_tokens + _scan_path(*sizes, self.device)
        return torch.cat([torch.arange(self.num_prefix_tokens, device=self.device), path])  # (prefix + L,)


@cached_table(maxsize=256)
def _move_index(
    before: str | None, after: str | None, *sizes: int | bool, device: torch.device | None = None
) -> torch.Tensor:
    return _MoveIndices(*sizes, device)(before, after)


@torch.library.custom_op("diffusers_pisdm::token_move_index", mutates_args=())
def _move_index_op(
    height: int,
    width: int,
    snake: bool,
    num_padding_tokens: int,
    num_prefix_tokens: int,
    device: torch.device | None,
    before: str | None,
    after: str | None,
) -> torch.Tensor:
    sizes = (height, width, snake, num_padding_tokens, num_prefix_tokens)
    return _move_index(before, after, *sizes, device=device).clone()  # the graph may write into it


@_move_index_op.register_fake
def _(height, width, snake, num_padding_tokens, num_prefix_tokens, device, before, after):
    length = height * width
    if after is not None:
        length = num_prefix_tokens + length + _num_lines(height, width, after) * num_padding_tokens
    return torch.empty(length, dtype=torch.int64, device=device)


def _num_lines(height: int, width: int, direction: str) -> int:
    return height if direction.startswith("row") else width


class _PermuteTokens(torch.autograd.Function):
    # The gradient of `index_select` is `index_add_`, which must allow repeated indices and is an order of magnitude
    # slower than a gather with the inverse permutation.
    @staticmethod
    def forward(ctx, tokens: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index, inverse)
        return tokens.index_select(1, index)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        index, inverse = ctx.saved_tensors
        return _PermuteTokens.apply(grad, inverse, index), None, None


def move_tokens(tokens: torch.Tensor, move: TokenMove) -> torch.Tensor:
    """
    Reorders tokens by a move from [`scan_transitions`].

    Args:
        tokens (`torch.Tensor` of shape `(B, L, D)`): The sequence.
        move (`TokenMove`): Indices into the token axis, of length `M`.

    Returns:
        `torch.Tensor` of shape `(B, M, D)`.
    """
    if move.inverse is None:
        return tokens.index_select(1, move.index)
    return _PermuteTokens.apply(tokens, move.index, move.inverse)

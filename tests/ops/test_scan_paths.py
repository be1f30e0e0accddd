"""Scan paths: what an order of tokens has to be, checked on every direction and on grids of all kinds."""

import ast
import inspect

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusers_pisdm.ops import (
    SCAN_DIRECTIONS,
    TokenMove,
    invert_scan_path,
    move_tokens,
    scan_path,
    scan_paths,
    scan_transitions,
)


GRIDS = [(1, 1), (1, 5), (5, 1), (2, 2), (3, 3), (4, 4), (2, 7), (7, 2), (3, 4), (4, 3), (5, 6)]

grids = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")
all_directions = pytest.mark.parametrize("direction", SCAN_DIRECTIONS)
snakes = pytest.mark.parametrize("snake", [False, True], ids=["raster", "snake"])
padding = pytest.mark.parametrize("num_pads", [0, 1, 3])


def lines_of(grid, direction):
    """Number of lines and tokens in a line."""
    return grid if direction.startswith("row") else grid[::-1]


def image_path(grid, direction, snake=False):
    return tuple(scan_path(*grid, direction, snake).tolist())


def line_of_token(token, grid, direction):
    row, column = divmod(token, grid[1])
    return row if direction.startswith("row") else column


def test_there_are_eight_directions_and_the_four_of_dim_come_first():
    assert len(set(SCAN_DIRECTIONS)) == 8
    paths = [image_path((2, 3), direction) for direction in SCAN_DIRECTIONS[:4]]
    assert paths == [(0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0), (0, 3, 1, 4, 2, 5), (5, 2, 4, 1, 3, 0)]
    assert scan_path(2, 3, SCAN_DIRECTIONS[0]).tolist() == [0, 1, 2, 3, 4, 5]  # a raster without padding tokens


@snakes
def test_a_direction_names_its_axis_and_its_start(snake):
    corners = {"top_left": 0, "top_right": 3, "bottom_left": 8, "bottom_right": 11}
    for direction in SCAN_DIRECTIONS:
        axis, corner = direction.split("_", 1)
        first, second, *_ = image_path((3, 4), direction, snake)
        assert first == corners[corner]
        assert abs(second - first) == (1 if axis == "row" else 4)


@grids
@all_directions
@pytest.mark.parametrize(("snake", "num_pads"), [(False, 0), (False, 1), (True, 0), (True, 3)])
def test_path_is_a_bijection_and_its_inverse_is_exact(grid, direction, snake, num_pads):
    path = scan_path(*grid, direction, snake, num_pads)
    length = grid[0] * grid[1] + lines_of(grid, direction)[0] * num_pads
    assert path.dtype == torch.int64
    assert sorted(path.tolist()) == list(range(length))

    inverse = invert_scan_path(path)
    assert torch.equal(path[inverse], torch.arange(length))
    assert torch.equal(inverse[path], torch.arange(length))
    assert torch.equal(invert_scan_path(inverse), path)


@grids
@all_directions
def test_consecutive_tokens_of_a_snake_are_neighbours(grid, direction):
    places = [divmod(token, grid[1]) for token in image_path(grid, direction, snake=True)]
    steps = [abs(a - c) + abs(b - d) for (a, b), (c, d) in zip(places, places[1:])]
    assert steps == [1] * (len(places) - 1)


@grids
@all_directions
@snakes
def test_lines_are_scanned_one_after_another(grid, direction, snake):
    num_lines, length = lines_of(grid, direction)
    lines = [line_of_token(token, grid, direction) for token in image_path(grid, direction, snake)]
    blocks = [set(lines[i * length : (i + 1) * length]) for i in range(num_lines)]
    assert all(len(block) == 1 for block in blocks)
    assert len(set.union(*blocks)) == num_lines


@grids
@snakes
def test_the_eight_are_closed_under_reversal(grid, snake):
    paths = {image_path(grid, direction, snake) for direction in SCAN_DIRECTIONS}
    assert {path[::-1] for path in paths} == paths


@grids
def test_each_raster_is_followed_by_its_reverse(grid):
    for direction, reverse in zip(SCAN_DIRECTIONS[::2], SCAN_DIRECTIONS[1::2]):
        assert image_path(grid, direction)[::-1] == image_path(grid, reverse)


@grids
@snakes
def test_the_eight_are_closed_under_the_symmetries_of_the_grid(grid, snake):
    """Flips keep the grid; transposing turns it into the grid of `width x height`."""
    height, width = grid
    numbers = torch.arange(height * width).view(height, width)
    paths = {image_path(grid, direction, snake) for direction in SCAN_DIRECTIONS}
    transposed_paths = {image_path((width, height), direction, snake) for direction in SCAN_DIRECTIONS}

    def renamed(numbering):
        """The same walks, when the token at each place bears the number that `numbering` has there."""
        names = numbering.reshape(-1).tolist()
        return {tuple(names[token] for token in path) for path in paths}

    assert renamed(numbers.flip(0)) == paths
    assert renamed(numbers.flip(1)) == paths
    new_numbers = torch.arange(height * width).view(width, height).T  # what a place is called after transposing
    assert renamed(new_numbers) == transposed_paths


@pytest.mark.parametrize("grid", [(2, 3), (3, 3), (4, 5)])
@snakes
def test_the_eight_differ(grid, snake):
    assert len({image_path(grid, direction, snake) for direction in SCAN_DIRECTIONS}) == 8


@grids
@all_directions
@pytest.mark.parametrize(("snake", "num_pads"), [(False, 1), (True, 3)])
def test_pads_follow_the_line_they_belong_to(grid, direction, snake, num_pads):
    num_lines, length = lines_of(grid, direction)
    pixels = grid[0] * grid[1]
    path = scan_path(*grid, direction, snake, num_pads)
    assert tuple(path[path < pixels].tolist()) == image_path(grid, direction, snake)

    for scanned_line in path.view(num_lines, length + num_pads).tolist():
        line = line_of_token(scanned_line[0], grid, direction)
        assert scanned_line[length:] == [pixels + line * num_pads + p for p in range(num_pads)]


def test_unknown_direction_is_named_with_the_choices():
    with pytest.raises(ValueError, match=f"`diagonal`.*Choose from {', '.join(SCAN_DIRECTIONS)}"):
        scan_path(2, 2, "diagonal")


# --- Transitions -----------------------------------------------------------------------------------------------------


def apply(moves, tokens):
    for move in moves:
        if move is not None:
            tokens = tokens[move.index]
    return tokens


def sequence(grid, num_pads, num_prefix):
    """Tokens as the model makes them, as numbers: prefix -1, -2, ..; image 0, 1, ..; padding tokens 1000, 1001, .."""
    prefix = -1 - torch.arange(num_prefix)
    return torch.cat([prefix, torch.arange(grid[0] * grid[1]), 1000 + torch.arange(num_pads)])


@grids
@snakes
@pytest.mark.parametrize(("num_pads", "num_prefix"), [(0, 0), (0, 2), (1, 2), (3, 1)])
def test_transitions_lead_through_every_layers_order_and_back(grid, snake, num_pads, num_prefix):
    """In each layer: the prefix, then the tokens of its path, in which the pads have kept their kind."""
    directions = (*SCAN_DIRECTIONS, *SCAN_DIRECTIONS[::-1], "row_top_left", "column_bottom_left")
    moves = scan_transitions(*grid, directions, snake=snake, num_padding_tokens=num_pads, num_prefix_tokens=num_prefix)
    assert len(moves) == len(directions) + 1

    pixels = grid[0] * grid[1]
    tokens = sequence(grid, num_pads, num_prefix)
    for direction, move in zip(directions, moves):
        tokens = apply([move], tokens)
        path = scan_path(*grid, direction, snake, num_pads)
        kind = torch.where(path < pixels, path, 1000 + (path - pixels) % max(num_pads, 1))
        assert torch.equal(tokens, torch.cat([-1 - torch.arange(num_prefix), kind]))

    tokens = tokens[num_prefix:] if moves[-1] is None else apply(moves[-1:], tokens)
    assert torch.equal(tokens, torch.arange(pixels))


def test_a_pad_keeps_its_line_in_a_square_and_takes_the_nearest_in_a_rectangle():
    def lines_after(grid, before, after):
        """For each line of the second layer: the line of the first one its pad was at."""
        first = scan_path(*grid, before, num_padding_tokens=1)
        _, move, _ = scan_transitions(*grid, (before, after), num_padding_tokens=1)
        pixels = grid[0] * grid[1]
        second = scan_path(*grid, after, num_padding_tokens=1)
        pads = {int(now) - pixels: int(was) - pixels for now, was in zip(second, first[move.index]) if now >= pixels}
        return [pads[line] for line in range(len(pads))]

    assert lines_after((3, 3), "row_top_left", "column_bottom_right") == [0, 1, 2]
    assert lines_after((2, 4), "row_top_left", "row_bottom_right") == [0, 1]
    assert lines_after((2, 4), "row_top_left", "column_top_left") == [0, 0, 1, 1]
    assert lines_after((4, 2), "row_bottom_left", "column_top_right") == [0, 2]
    assert lines_after((1, 3), "row_top_left", "column_top_left") == [0, 0, 0]


@grids
@snakes
@padding
def test_inverse_of_a_move_undoes_it(grid, snake, num_pads):
    directions = (*SCAN_DIRECTIONS, *SCAN_DIRECTIONS)
    moves = scan_transitions(*grid, directions, snake=snake, num_padding_tokens=num_pads, num_prefix_tokens=2)
    for before, after, move in zip(directions, directions[1:], moves[1:]):
        is_permutation = num_pads == 0 or lines_of(grid, before)[0] == lines_of(grid, after)[0]
        assert (move.inverse is not None) == is_permutation
        if is_permutation:
            assert torch.equal(move.index[move.inverse], torch.arange(len(move.index)))


def test_nothing_moves_between_layers_of_one_direction():
    moves = scan_transitions(4, 4, ("column_top_left",) * 3, num_padding_tokens=1)
    assert [move is None for move in moves] == [False, True, True, False]


@pytest.mark.parametrize("layers", ["rr", "rc", "cr", "rcr", "crc"])
def test_without_pads_only_other_orders_than_row_major_are_entered_and_left(layers):
    names = {"r": "row_top_left", "c": "column_top_left"}
    moves = scan_transitions(4, 6, tuple(names[layer] for layer in layers), num_prefix_tokens=2)
    orders = f"r{layers}r"  # before, between and after the layers
    assert [move is not None for move in moves] == [before != after for before, after in zip(orders, orders[1:])]


def test_a_pair_of_directions_is_built_once():
    moves = scan_transitions(4, 4, ("row_top_left", "column_top_left") * 3, num_padding_tokens=1)
    assert moves[1] is moves[3] is moves[5]
    assert moves[2] is moves[4]


# --- Cost ------------------------------------------------------------------------------------------------------------


def test_equal_arguments_share_one_table():
    first = scan_transitions(6, 4, SCAN_DIRECTIONS, num_padding_tokens=1)
    assert scan_transitions(6, 4, SCAN_DIRECTIONS, num_padding_tokens=1) is first
    assert scan_transitions(4, 6, SCAN_DIRECTIONS, num_padding_tokens=1) is not first
    assert scan_transitions(6, 4, SCAN_DIRECTIONS[:4], num_padding_tokens=1) is not first


def test_cache_is_bounded():
    first = scan_transitions(1, 1, SCAN_DIRECTIONS)
    for width in range(2, 66):
        scan_transitions(1, width, SCAN_DIRECTIONS)
    assert scan_transitions(1, 1, SCAN_DIRECTIONS) is not first


def test_number_of_operations_does_not_grow_with_the_grid():
    """A loop over tokens, rows or columns would need more operations for a larger grid."""

    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert "token_move_index" not in str(func)  # the operator is for graphs
            self.count += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for size in (3, 100):
        with Counter() as counter:
            scan_transitions(size, size + 1, SCAN_DIRECTIONS, snake=True, num_padding_tokens=2)
        counts.append(counter.count)
    assert counts[0] == counts[1] > 0
    # Nor is a tensor turned into Python numbers, which the counter would not see.
    source = ast.dump(ast.parse(inspect.getsource(scan_paths)))
    assert not any(f"attr='{name}'" in source for name in ("tolist", "item", "numpy"))


def test_256_tokens_square_in_all_directions():
    moves = scan_transitions(256, 256, SCAN_DIRECTIONS, num_padding_tokens=1, num_prefix_tokens=2)
    tokens = apply(moves, sequence((256, 256), 1, 2))
    assert torch.equal(tokens, torch.arange(256 * 256))


# --- In graphs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize(("grid", "num_pads"), [((3, 4), 2), ((3, 3), 0)])
def test_a_graph_asks_one_operator_for_each_move(grid, num_pads, device):
    """Building the moves would be most of the graph."""
    directions = SCAN_DIRECTIONS[:4] if num_pads else SCAN_DIRECTIONS[:2]
    arguments = (*grid, directions, True, num_pads, 1)
    moves = scan_transitions(*arguments, device=device)
    tokens = torch.randn(2, 1 + grid[0] * grid[1] + num_pads, 3)
    expected = tokens
    for move in moves:
        expected = expected[:, move.index]

    def run(tokens):
        for move in scan_transitions(*arguments, device=device):
            tokens = move_tokens(tokens, move)
        return tokens

    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    assert torch.equal(torch.compile(run, fullgraph=True, backend=keep)(tokens), expected)
    torch.compiler.reset()
    called = [node for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert not any("arange" in str(node.target) for node in called)
    operators = [node for node in called if "token_move_index" in str(node.target)]
    assert len(operators) == len(moves) + sum(move.inverse is not None for move in moves)
    assert {node.args[5] for node in operators} == {None if device is None else torch.device(device)}


@pytest.mark.parametrize(("before", "after"), [(None, 2), (2, 5), (5, None)])
def test_the_operator_of_graphs_knows_its_shape_and_owns_its_memory(before, after):
    names = (None if i is None else SCAN_DIRECTIONS[i] for i in (before, after))
    arguments = (3, 4, True, 2, 1, torch.device("cpu"), *names)
    operator = torch.ops.diffusers_pisdm.token_move_index
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    index = operator(*arguments)
    index.zero_()
    assert operator(*arguments).any()


def test_the_operator_of_graphs_builds_on_the_device_asked_for():
    arguments = (3, 4, True, 2, 1), (None, SCAN_DIRECTIONS[2])
    operator = torch.ops.diffusers_pisdm.token_move_index
    assert operator(*arguments[0], torch.device("meta"), *arguments[1]).device.type == "meta"
    with FakeTensorMode():  # needs no GPU
        assert operator(*arguments[0], torch.device("cuda"), *arguments[1]).device.type == "cuda"


# --- What the cache must not keep ------------------------------------------------------------------------------------


def test_tables_built_in_inference_mode_serve_training():
    with torch.inference_mode():
        moves = scan_transitions(3, 5, SCAN_DIRECTIONS, num_prefix_tokens=1)
    assert not any(move.index.is_inference() for move in moves if move is not None)
    tokens = torch.randn(16, 2, requires_grad=True)
    apply(moves, tokens).sum().backward()
    assert torch.equal(tokens.grad[1:], torch.ones(15, 2))


@pytest.mark.parametrize("real_first", [False, True], ids=["fake first", "real first"])
def test_fake_tensors_stay_out_of_the_cache(real_first):
    size = 11 if real_first else 12
    if real_first:
        scan_transitions(size, size, SCAN_DIRECTIONS)
    with FakeTensorMode():
        fake = scan_transitions(size, size, SCAN_DIRECTIONS)
        tokens = torch.empty(size * size, 4)[fake[1].index]  # a real index would be refused here
        assert tokens.shape == (size * size, 4)
    assert type(scan_transitions(size, size, SCAN_DIRECTIONS)[1].index) is torch.Tensor


def test_default_device_is_part_of_what_is_cached():
    with torch.device("meta"):
        assert scan_transitions(13, 13, SCAN_DIRECTIONS)[1].index.device.type == "meta"
    assert scan_transitions(13, 13, SCAN_DIRECTIONS)[1].index.device.type == "cpu"
    assert scan_transitions(13, 13, SCAN_DIRECTIONS, device="meta")[1].index.device.type == "meta"


def test_paths_and_moves_are_built_on_the_device_asked_for():
    sizes = (3, 17)  # of no other test: what lies in the cache is not built
    with torch.device("meta"):
        path = scan_path(*sizes, "row_bottom_right", True, 2, device="cpu")
        inverse = invert_scan_path(path)
        moves = scan_transitions(*sizes, SCAN_DIRECTIONS, True, 2, 1, device="cpu")
    assert torch.equal(path, scan_path(*sizes, "row_bottom_right", True, 2))
    assert torch.equal(path[inverse], torch.arange(len(path)))
    assert {move.index.device.type for move in moves} == {"cpu"}
    assert torch.equal(apply(moves, sequence(sizes, 2, 1)), torch.arange(3 * 17))
    assert scan_path(*sizes, "row_bottom_right", True, 2, device="meta").device.type == "meta"


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

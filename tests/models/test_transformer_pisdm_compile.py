"""torch.compile and torch.export: one graph, no recompilation over sizes, the same results."""

import pytest
import torch
from torch.export import Dim

from tests.models.tiny_model import make_inputs, make_model, mean_square_error_gradients


CONFIG = {"num_layers": 3, "scan_directions": ("row_top_left", "column_bottom_right")}
SIZES = [(2, 8, 8), (2, 8, 16), (3, 16, 8), (2, 4, 4), (2, 12, 12), (5, 6, 10)]  # batch, height, width


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@torch.no_grad()
def run(model, **arguments):
    return model(**make_inputs(getattr(model, "_orig_mod", model), **arguments)).sample


@torch.fx.experimental._config.patch(use_duck_shape=False)
def test_one_graph_for_all_sizes():
    """Squares, rectangles and batches of any size. With `use_duck_shape`, torch takes squares for a case apart."""
    model = make_model(**CONFIG)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch_size, height, width in SIZES:
            arguments = {"batch_size": batch_size, "height": height, "width": width}
            torch.testing.assert_close(run(compiled, **arguments), run(model, **arguments))


def test_timesteps_and_levels_do_not_recompile():
    model = make_model(**CONFIG)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    inputs = make_inputs(model)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for timestep in (999, 500, 0):
            inputs["timestep"] = torch.tensor(timestep)
            inputs["noise_level"] = torch.tensor(timestep / 2000)
            assert torch.equal(compiled(**inputs).sample, model(**inputs).sample)


def test_each_kind_of_block_compiles_once():
    model = make_model(num_layers=6)  # an even number: the middle skip joins neighbours
    expected = run(model)
    model.compile_repeated_blocks(fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(2):
            torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_gradients(checkpointing):
    expected = mean_square_error_gradients(make_model(**CONFIG).train())
    model = make_model(**CONFIG).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.compile(fullgraph=True, backend="aot_eager")
    gradients = mean_square_error_gradients(model)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda message, name=name: f"{name}: {message}")


def test_export_with_free_sizes(tmp_path):
    model = make_model(**{**CONFIG, "num_layers": 2})
    batch, image = {0: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    inputs = make_inputs(model, batch_size=3, height=6, width=10)
    shapes = {name: image if value.ndim == 4 else batch for name, value in inputs.items()}
    program = torch.export.export(model, args=(), kwargs=inputs, dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "model.pt2")
    exported = torch.export.load(tmp_path / "model.pt2").module()
    for batch_size, height, width in [(2, 8, 8), (5, 4, 12), (2, 12, 4)]:
        inputs = make_inputs(model, batch_size=batch_size, height=height, width=width)
        with torch.no_grad():
            torch.testing.assert_close(exported(**inputs).sample, model(**inputs).sample)


def test_scan_order_of_a_compiled_graph_is_its_own_memory():
    """The graph may write into what the operator returns: the cached table must survive that."""
    arguments = (3, 4, False, 1, 2, torch.device("cpu"), "row_top_left", "column_top_left")
    index = torch.ops.diffusers_pisdm.token_move_index(*arguments)
    expected = index.clone()
    index.zero_()
    assert torch.equal(torch.ops.diffusers_pisdm.token_move_index(*arguments), expected)


@pytest.mark.parametrize(
    ("before", "after"), [(None, "row_top_left"), ("row_top_left", "column_top_left"), ("row_top_left", None)]
)
def test_scan_order_operator_says_its_shape(before, after):
    arguments = (3, 4, True, 2, 1, torch.device("cpu"), before, after)
    torch.library.opcheck(torch.ops.diffusers_pisdm.token_move_index, arguments)

"""PISDMTransformer2DModel: what it computes, and what each of its switches adds."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_pisdm import PISDM_SIZES, PISDMTransformer2DModel
from diffusers_pisdm.models.transformer_pisdm import (
    FLAGS,
    OPTIONAL_SIZES,
    SIZE_RANGES,
    PISDMBlock,
    PISDMSkipBlock,
    check_sizes,
    sincos_position_embedding,
)
from diffusers_pisdm.ops import SCAN_DIRECTIONS, TokenMove, invert_scan_path, scan_path
from diffusers_pisdm.ops.common.backends import force_backends, missing_backend
from tests.models.tiny_model import CONFIG, NUM_CLASSES, make_inputs, make_model


@torch.no_grad()
def run(model, **inputs):
    return model(**inputs)


class Operations(TorchDispatchMode):
    """Names and sizes of everything that is computed."""

    def __init__(self):
        super().__init__()
        self.names = []
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func.overloadpacket))
        self.elements += sum(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor))
        return out


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def operations(model, **arguments):
    inputs = make_inputs(model, **arguments)
    run(model, **inputs)  # tables are built and kept
    with Operations() as counted:
        run(model, **inputs)
    return counted


# --- Shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 16), (12, 4), (2, 2), (2, 10), (10, 2), (6, 14)])
@pytest.mark.parametrize("snake", [False, True])
def test_any_size_divisible_by_the_patch(height, width, snake):
    model = make_model(snake=snake)
    output = run(model, **make_inputs(model, height=height, width=width))
    assert output.sample.shape == (2, 3, height, width)
    assert output.features.shape == (2, height * width // 4, 32)
    assert output.sample.isfinite().all()


@pytest.mark.parametrize("num_layers", [1, 2, 3, 5])
def test_any_number_of_layers(num_layers):
    model = make_model(num_layers=num_layers)
    assert run(model, **make_inputs(model)).sample.shape == (2, 3, 8, 8)
    kinds = [isinstance(block, PISDMSkipBlock) for block in model.transformer_blocks]
    assert kinds == [False] * (num_layers - num_layers // 2) + [True] * (num_layers // 2)


def test_patch_channels_and_outputs_are_free():
    model = make_model(patch_size=1, in_channels=4, out_channels=8, sample_size=4, low_res_channels=None)
    output = run(model, **make_inputs(model, height=4, width=6))
    assert output.sample.shape == (2, 8, 4, 6)
    assert output.features.shape == (2, 24, 32)


def test_all_is_computed_on_the_inputs_device():
    """Whatever the default device: there, nothing could be computed."""
    model = make_model(snake=True)
    size = {"height": 6, "width": 22}  # of no other test: what lies in the cache is not built
    inputs = make_inputs(model, **size)
    inputs["timestep"] = 7
    with torch.device("meta"):
        sample = run(model, **inputs).sample
    assert torch.equal(sample, run(model, **inputs).sample)


def test_the_rank_of_the_time_step_is_a_sixteenth_rounded_up_or_as_given():
    for config, rank in [({"hidden_size": 36}, 3), ({"hidden_size": 32}, 2), ({"time_step_rank": 5}, 5)]:
        assert make_model(**config).transformer_blocks[0].mixer.dt_proj.in_features == rank


def test_time_and_level_may_be_numbers():
    model = make_model()
    inputs = make_inputs(model)
    inputs["timestep"], inputs["noise_level"] = torch.tensor([7, 7]), torch.tensor([0.25, 0.25])
    expected = run(model, **inputs).sample
    for timestep, noise_level in [(7, 0.25), (7.0, torch.tensor(0.25)), (torch.tensor(7), torch.tensor([0.25]))]:
        inputs["timestep"], inputs["noise_level"] = timestep, noise_level
        torch.testing.assert_close(run(model, **inputs).sample, expected)


def test_tuple_and_output_class_hold_the_same():
    model = make_model()
    output = run(model, **make_inputs(model))
    sample, features = run(model, **make_inputs(model), return_dict=False)
    assert torch.equal(output.sample, sample) and torch.equal(output.features, features)
    assert list(output.keys()) == ["sample", "features"] and torch.equal(output[0], sample)


def test_samples_of_a_batch_do_not_see_each_other():
    model = make_model()
    inputs = make_inputs(model, batch_size=3)
    together = run(model, **inputs)
    for i in range(3):
        alone = run(model, **{name: value[i : i + 1] for name, value in inputs.items()})
        torch.testing.assert_close(alone.sample, together.sample[i : i + 1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.features, together.features[i : i + 1], atol=1e-5, rtol=1e-5)


# --- The order of tokens ---------------------------------------------------------------------------------------------


def sinusoids(values):
    """256 wide, as in DDPM with the cosines first: frequencies from 1 down to almost 1/10000."""
    angles = values[:, None] * 10000.0 ** (-torch.arange(128) / 128)
    return torch.cat([angles.cos(), angles.sin()], 1)


def positions(rows, columns, dim, base_size):
    """The table as a definition: a place is its row and its column, in tokens of the grid of training."""
    table = torch.empty(rows, columns, dim, dtype=torch.float64)
    for row, column, k in itertools.product(range(rows), range(columns), range(dim // 4)):
        for half, (index, length) in enumerate([(row, rows), (column, columns)]):
            angle = ((index + 0.5) * base_size / length - 0.5) / 10000.0 ** (k / (dim // 4))
            start = half * (dim // 2) + k
            table[row, column, start], table[row, column, start + dim // 4] = math.sin(angle), math.cos(angle)
    return table.view(rows * columns, dim).float()


def layer_norm(tokens):
    centred = tokens - tokens.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def forward_through_raster_order(model, hidden_states, timestep, class_labels, low_res=None, noise_level=None):
    """The forward pass as a definition: each layer gathers its tokens from raster order and puts them back."""
    config, (batch_size, _, height, width) = model.config, hidden_states.shape
    rows, columns = height // config.patch_size, width // config.patch_size
    time = model.time_embedding(sinusoids(timestep))
    if low_res is not None:
        time = time + model.noise_level_embedding(sinusoids(noise_level * 1000))
        hidden_states = torch.cat([hidden_states, low_res], 1)
    label = model.class_embedding(class_labels)
    condition = torch.nn.functional.silu(time + label)
    modulation = model.modulation(condition).view(batch_size, 3, -1)

    image = model.patch_embed(hidden_states).flatten(2).mT
    image = image + positions(rows, columns, image.shape[2], config.sample_size // config.patch_size)
    if config.local_enhancement:
        grid = image.mT.view(batch_size, -1, rows, columns)
        image = (
            image
            + torch.nn.functional.conv2d(
                grid, model.local_in.weight, model.local_in.bias, padding=1, groups=image.shape[2]
            )
            .flatten(2)
            .mT
        )
    tokens = [time[:, None], label[:, None], image]
    if config.num_padding_tokens:
        tokens += [model.padding_tokens.expand(batch_size, -1, -1)] * rows
    tokens = torch.cat(tokens, 1)  # prefix, image in raster order, the pads line by line

    num_layers, stack = len(model.transformer_blocks), []
    for i, block in enumerate(model.transformer_blocks):
        direction = config.scan_directions[min(i, num_layers - 1 - i) % len(config.scan_directions)]
        path = scan_path(rows, columns, direction, config.snake, config.num_padding_tokens)
        order = torch.cat([torch.arange(2), 2 + path])
        skip = [stack.pop()[:, order]] if config.long_skips and i >= num_layers - num_layers // 2 else []
        tokens = block(tokens[:, order], modulation, *skip)[:, invert_scan_path(order)]
        if config.long_skips and i < num_layers // 2:
            stack.append(tokens)

    features = image = tokens[:, 2 : 2 + rows * columns]
    if config.local_enhancement:
        grid = image.mT.reshape(batch_size, -1, rows, columns)
        image = (
            image
            + torch.nn.functional.conv2d(
                grid, model.local_out.weight, model.local_out.bias, padding=1, groups=image.shape[2]
            )
            .flatten(2)
            .mT
        )
    shift, scale = model.modulation_out(condition).chunk(2, 1)
    patches = model.proj_out(layer_norm(image) * (1 + scale[:, None]) + shift[:, None])
    sample = torch.empty(batch_size, config.out_channels or config.in_channels, height, width)
    p = config.patch_size
    for row, column in itertools.product(range(rows), range(columns)):
        patch = patches[:, row * columns + column].view(batch_size, p, p, -1).permute(0, 3, 1, 2)
        sample[:, :, row * p : (row + 1) * p, column * p : (column + 1) * p] = patch
    return sample, features


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"num_layers": 9}, (8, 8)),
        ({"num_layers": 16, "snake": True, "num_padding_tokens": 2}, (6, 6)),
        ({"num_layers": 6, "num_padding_tokens": 0}, (4, 10)),
        ({"num_layers": 5, "num_padding_tokens": 0, "scan_directions": SCAN_DIRECTIONS[2:5]}, (10, 4)),
        ({"num_layers": 4, "scan_directions": ("row_top_left", "row_bottom_right")}, (4, 10)),  # pads on a rectangle
        ({"local_enhancement": False, "long_skips": False, "low_res_channels": None}, (8, 8)),
        ({"num_padding_tokens": 0, "scan_directions": ("row_top_left",)}, (8, 8)),  # nothing moves
    ],
    ids=str,
)
@torch.no_grad()
def test_composed_moves_equal_going_back_to_raster_order_in_every_layer(config, size):
    model = make_model(**config)
    inputs = make_inputs(model, height=size[0], width=size[1])
    sample, features = forward_through_raster_order(model, **inputs)
    output = model(**inputs)
    torch.testing.assert_close(output.features, features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.sample, sample, atol=1e-5, rtol=1e-5)


def test_a_layer_is_a_modulated_norm_the_mixer_and_a_gate():
    torch.manual_seed(0)
    block = PISDMSkipBlock(12, 4, 3, 2, 2)
    for parameter in block.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    tokens, skip, modulation = torch.randn(3, 5, 12), torch.randn(3, 5, 12), 0.1 * torch.randn(3, 3, 12)
    joined = torch.cat([tokens, skip], 2) @ block.skip_proj.weight.T + block.skip_proj.bias
    shift, scale, gate = (modulation + block.scale_shift_table)[:, :, None].unbind(1)
    expected = joined + gate * block.mixer(layer_norm(joined) * (1 + scale) + shift)
    torch.testing.assert_close(block(tokens, modulation, skip), expected, atol=1e-5, rtol=1e-5)
    plain = PISDMBlock(12, 4, 3, 2, 2)
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if not k.startswith("skip_proj")})
    torch.testing.assert_close(plain(joined, modulation), expected, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the table's precision is not the tokens'
        assert plain(joined.bfloat16(), modulation.bfloat16()).dtype == torch.bfloat16
    faint = 1e-3 * tokens  # where the norm's 1e-6 is as large as the variance
    torch.testing.assert_close(make_model(hidden_size=12).norm_out(faint), layer_norm(faint))
    expected = faint + gate * plain.mixer(layer_norm(faint) * (1 + scale) + shift)
    torch.testing.assert_close(plain(faint, modulation), expected, atol=1e-5, rtol=1e-5)
    move = TokenMove(torch.tensor([3, 0, 4, 1, 2]), torch.tensor([1, 3, 4, 0, 2]))  # tokens move before all else
    torch.testing.assert_close(plain(tokens, modulation, move), plain(tokens[:, move.index], modulation))
    torch.testing.assert_close(block(tokens, modulation, skip, move), block(tokens[:, move.index], modulation, skip))


@pytest.mark.skipif(missing_backend("triton") is not None, reason="needs Triton")
def test_tokens_move_in_the_blocks_where_one_kernel_does_both():
    """As on a GPU; blocks that are compiled get moved tokens, or each kind of move would be compiled."""
    model, given = make_model(num_layers=5), []
    inputs = {name: value.to(DEVICE) for name, value in make_inputs(model).items()}
    model.to(DEVICE)
    for block in model.transformer_blocks:
        block.register_forward_pre_hook(lambda _, args: given.append(any(isinstance(x, TokenMove) for x in args)))
    with force_backends(modulation="torch"):
        wanted = model(**inputs).sample
    assert not any(given)
    given.clear()
    with force_backends(modulation="triton"):  # in Triton's interpreter without a GPU
        torch.testing.assert_close(model(**inputs).sample, wanted)
        assert all(given)  # the path changes from layer to layer
        given.clear()
        for block in model.transformer_blocks:
            block._compiled_call_impl = block._call_impl
        torch.testing.assert_close(model(**inputs).sample, wanted)
        assert not any(given)


@pytest.mark.parametrize("snake", [False, True])
def test_features_are_in_raster_order_whatever_the_last_direction(snake):
    """With layers that do nothing, the features are the embedded patches."""
    for directions in [(direction,) for direction in SCAN_DIRECTIONS] + [SCAN_DIRECTIONS]:
        model = make_model(scan_directions=directions, snake=snake, local_enhancement=False, long_skips=False)
        for block in model.transformer_blocks:
            block.mixer.out_proj.weight.data.zero_()
        inputs = make_inputs(model, height=6, width=10)
        patches = model.patch_embed(torch.cat([inputs["hidden_states"], inputs["low_res"]], 1)).flatten(2).mT
        expected = patches + sincos_position_embedding(3, 5, 32, 4)
        torch.testing.assert_close(run(model, **inputs).features, expected)


def influence(model, size):
    """[i, j]: whether output token i depends on input token j."""
    inputs = make_inputs(model, batch_size=1, height=size[0], width=size[1])
    inputs["hidden_states"].requires_grad_()
    features = model(**inputs).features[0]
    rows = []
    for token in features:
        (grad,) = torch.autograd.grad(token.sum(), inputs["hidden_states"], retain_graph=True)
        rows.append(grad[0].abs().sum(0).flatten() > 0)  # patch 1: a pixel is a token
    return torch.stack(rows)


@pytest.mark.parametrize("snake", [False, True])
def test_one_direction_sees_only_what_was_read_before(snake):
    config = {"patch_size": 1, "local_enhancement": False, "snake": snake}
    for direction in SCAN_DIRECTIONS:
        seen = influence(make_model(scan_directions=(direction,), **config), (3, 4))
        path = scan_path(3, 4, direction, snake)
        assert torch.equal(seen[path][:, path], torch.ones(12, 12).tril().bool())


@pytest.mark.parametrize("config", [{"scan_directions": SCAN_DIRECTIONS}, {"scan_directions": SCAN_DIRECTIONS[:2]}])
def test_a_direction_and_its_reverse_give_a_global_receptive_field(config):
    assert influence(make_model(patch_size=1, local_enhancement=False, **config), (3, 4)).all()


def test_directions_cycle_and_mirror_so_that_skips_join_equal_orders():
    names = SCAN_DIRECTIONS[:3]
    a, b, c = names
    assert make_model(num_layers=5, scan_directions=names).layer_directions == (a, b, c, b, a)
    assert make_model(num_layers=8, scan_directions=names).layer_directions == (a, b, c, a, a, c, b, a)
    directions = make_model(num_layers=49, hidden_size=4).layer_directions
    assert directions[:16] == SCAN_DIRECTIONS * 2
    assert directions == directions[::-1]


def test_a_skip_brings_its_mirror_images_output():
    """The last layer takes in the first one's output, the one before it the second one's."""
    model = make_model(num_layers=5)
    seen = {}
    for i, block in enumerate(model.transformer_blocks):
        block.register_forward_hook(lambda block, args, out, i=i: seen.update({i: (args, out)}))
    run(model, **make_inputs(model))
    assert [len(args) for args, _ in seen.values()] == [2, 2, 2, 3, 3]
    assert seen[3][0][2].data_ptr() == seen[1][1].data_ptr()
    assert seen[4][0][2].data_ptr() == seen[0][1].data_ptr()


@pytest.mark.parametrize(("rows", "columns", "base_size"), [(3, 5, 4), (4, 4, 4), (8, 2, 4)])
def test_positions_are_sines_and_cosines_of_row_and_column(rows, columns, base_size):
    """A grid of any size spans that of training, whose first token is at 0."""
    torch.testing.assert_close(
        sincos_position_embedding(rows, columns, 24, base_size), positions(rows, columns, 24, base_size)
    )


def test_positions_are_float32_whatever_the_default_precision():
    """The table outlives whoever made it: a rounded one would serve all later calls."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        table = sincos_position_embedding(7, 9, 24, 8)
    finally:
        torch.set_default_dtype(torch.float32)
    assert table.dtype == torch.float32
    torch.testing.assert_close(table, positions(7, 9, 24, 8))


# --- Conditions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("timestep", torch.tensor([1, 2])),
        ("class_labels", torch.tensor([NUM_CLASSES, NUM_CLASSES])),  # the null label has a row of its own
        ("low_res", torch.zeros(2, 3, 8, 8)),
        ("noise_level", torch.tensor([0.9, 0.9])),
    ],
)
def test_every_condition_has_an_effect(name, value):
    model = make_model()
    inputs = make_inputs(model)
    changed = run(model, **{**inputs, name: value}).sample
    assert (changed - run(model, **inputs).sample).abs().amax((1, 2, 3)).min() > 1e-3


def test_a_new_model_starts_as_stated():
    torch.manual_seed(0)
    config = {"num_layers": 5, "hidden_size": 64, "num_classes": 500, "num_padding_tokens": 50, "patch_size": 4}
    model = PISDMTransformer2DModel(**{**CONFIG, **config}, pixel_head_channels=8)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def assert_uniform(name, bound):
        values = parameters[name]
        assert 0.97 * bound < values.max() <= bound and -bound <= values.min() < -0.97 * bound, name
        assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name

    assert parameters["class_embedding.weight"].shape == (500 + 1, 64)  # and the null label
    assert not any("norm" in name for name in parameters)  # modulation is their scale and shift
    for name in ("padding_tokens", "class_embedding.weight", "proj_out.weight"):
        assert parameters[name].std().item() == pytest.approx(0.02, rel=0.05), name
        assert parameters[name].abs().max() > 3 * 0.02, name  # normal
    zero = ("modulation", "modulation_out", "local_in", "local_out", "pixel_head.conv_out", "pixel_head.modulation")
    for name in ("proj_out.bias", *(f"{layer}.{kind}" for layer in zero for kind in ("weight", "bias"))):
        assert not parameters[name].any(), name
    for i in range(5):
        block, mixer = f"transformer_blocks.{i}", f"transformer_blocks.{i}.mixer"
        table = parameters[f"{block}.scale_shift_table"]
        assert not table[:2].any() and (table[2] == 1).all()  # shift 0, scale 0, gate 1
        # 128 channels inside, a time step of rank 4; what five layers add up to has the variance of one.
        assert_uniform(f"{mixer}.in_proj.weight", 64**-0.5)
        assert_uniform(f"{mixer}.out_proj.weight", 128**-0.5 / 5**0.5)
        assert_uniform(f"{mixer}.dt_proj.weight", 4**-0.5)
        if i >= 3:  # a skip starts closed
            assert torch.equal(parameters[f"{block}.skip_proj.weight"], torch.eye(64, 128))
            assert not parameters[f"{block}.skip_proj.bias"].any()


def test_conditions_have_an_effect_in_a_new_model():
    """Modulation starts at zero, so what is known of timestep and class must come through the prefix tokens."""
    torch.manual_seed(0)
    model = PISDMTransformer2DModel(**CONFIG).eval()
    inputs = make_inputs(model)
    before = run(model, **inputs).sample
    assert 0 < before.std() < 0.3
    for name, value in [("timestep", torch.tensor([1, 2])), ("class_labels", torch.tensor([NUM_CLASSES] * 2))]:
        assert not torch.equal(run(model, **{**inputs, name: value}).sample, before)


def test_every_parameter_has_a_gradient_in_a_new_model():
    """But those behind a table of zeros, which move once the table has."""
    torch.manual_seed(0)
    model = PISDMTransformer2DModel(**CONFIG)
    model(**make_inputs(model)).sample.pow(2).sum().backward()
    without = {name for name, parameter in model.named_parameters() if not parameter.grad.any()}
    assert without == set()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_neighbouring_timesteps_differ_in_half_precision(dtype):
    """As bfloat16 numbers, 998 and 999 are both 1000."""
    model = make_model().to(dtype)
    seen = []
    model.time_embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    inputs = make_inputs(model, dtype=dtype)
    for timestep in (998, 999, 1000):
        run(model, **{**inputs, "timestep": torch.tensor([timestep, timestep])})
    for timestep, sinusoids in zip((998, 999, 1000), seen):
        assert sinusoids.dtype == dtype
        assert torch.equal(sinusoids[0], model.time_proj(torch.tensor([float(timestep)]))[0].to(dtype))
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_noise_level_is_scaled_in_single_precision():
    model = make_model().bfloat16()
    seen = []
    model.noise_level_embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    inputs = make_inputs(model, dtype=torch.bfloat16)
    level = torch.tensor([0.3, 0.3], dtype=torch.bfloat16)
    run(model, **{**inputs, "noise_level": level})
    assert torch.equal(seen[0], model.time_proj(level.float() * 1000).bfloat16())


# --- Switches --------------------------------------------------------------------------------------------------------


def parameter_names(model):
    return {name for name, _ in model.named_parameters()}


def test_cyclic_scanning_has_no_parameters_and_one_gather_a_layer():
    cyclic = make_model(num_layers=8, num_padding_tokens=0)
    single = make_model(num_layers=8, num_padding_tokens=0, scan_directions=("row_top_left",))
    assert parameter_names(cyclic) == parameter_names(single)
    inputs = make_inputs(cyclic)
    assert not torch.allclose(run(cyclic, **inputs).sample, run(single, **inputs).sample, atol=1e-3)

    gathers = operations(cyclic).names.count("aten.index_select")
    assert 0 < gathers <= len(cyclic.transformer_blocks) + 1
    assert operations(single).names.count("aten.index_select") == 0


def test_cascade_condition_is_two_modules():
    higher, first = make_model(), make_model(low_res_channels=None)
    extra = parameter_names(higher) - parameter_names(first)
    assert {name.split(".")[0] for name in extra} == {"noise_level_embedding"}
    assert first.noise_level_embedding is None
    assert first.patch_embed.in_channels == 3 and higher.patch_embed.in_channels == 6
    assert parameter_names(first) <= parameter_names(higher)
    assert operations(first).names.count("aten.addmm") == operations(higher).names.count("aten.addmm") - 2


def test_padding_tokens_are_one_tensor_and_one_token_a_line():
    lengths = {}
    for num_pads in (0, 1, 3):
        model = make_model(num_padding_tokens=num_pads)
        block = model.transformer_blocks[0]
        block.register_forward_hook(lambda block, args, out, n=num_pads: lengths.update({n: args[0].shape[1]}))
        run(model, **make_inputs(model, height=4, width=10))  # 2 x 5 tokens, the first scan along rows
        assert ("padding_tokens" in parameter_names(model)) == (num_pads > 0)
        if num_pads:
            assert model.padding_tokens.shape == (num_pads, 32)
    assert lengths == {0: 2 + 10, 1: 2 + 10 + 2, 3: 2 + 10 + 6}


def test_padding_tokens_have_an_effect():
    model = make_model()
    inputs = make_inputs(model)
    before = run(model, **inputs).sample
    model.padding_tokens.data += 1.0
    assert not torch.allclose(run(model, **inputs).sample, before, atol=1e-3)


def test_local_enhancement_is_two_convolutions():
    on, off = make_model(), make_model(local_enhancement=False)
    assert {name.split(".")[0] for name in parameter_names(on) ^ parameter_names(off)} == {"local_in", "local_out"}
    convolutions = [operations(model).names.count("aten.convolution") for model in (on, off)]
    assert convolutions[0] - convolutions[1] == 2
    inputs = make_inputs(on)
    before = run(on, **inputs).sample
    on.local_out.weight.data.zero_()
    on.local_out.bias.data.zero_()
    assert not torch.allclose(run(on, **inputs).sample, before, atol=1e-3)


def test_local_enhancement_sees_the_eight_neighbours():
    model = make_model(scan_directions=("row_top_left",), patch_size=1, num_layers=1)
    model.transformer_blocks[0].mixer.out_proj.weight.data.zero_()  # the layer does nothing
    seen = influence(model, (4, 5))[6].view(4, 5)  # the token of row 1, column 1
    expected = torch.zeros(4, 5, dtype=torch.bool)
    expected[:3, :3] = True
    assert torch.equal(seen, expected)


def test_long_skips_are_one_projection_a_layer_of_the_second_half():
    on, off = make_model(num_layers=5), make_model(num_layers=5, long_skips=False)
    extra = {f"transformer_blocks.{i}.skip_proj.{kind}" for i in (3, 4) for kind in ("weight", "bias")}
    assert parameter_names(on) - parameter_names(off) == extra
    assert parameter_names(off) < parameter_names(on)
    on_names, off_names = operations(on).names, operations(off).names
    assert on_names.count("aten.cat") - off_names.count("aten.cat") == 2
    inputs = make_inputs(on)
    before = run(on, **inputs).sample
    on.transformer_blocks[4].skip_proj.weight.data[:, 32:] = 0
    assert not torch.allclose(run(on, **inputs).sample, before, atol=1e-3)


@pytest.mark.parametrize(
    "off",
    [
        {"low_res_channels": None},
        {"num_padding_tokens": 0},
        {"local_enhancement": False},
        {"long_skips": False},
    ],
    ids=str,
)
def test_what_is_off_costs_nothing(off):
    on_model, off_model = make_model(), make_model(**off)
    assert off_model.num_parameters() < on_model.num_parameters()
    assert operations(off_model).elements < operations(on_model).elements


# --- Sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "millions"), [("S", 50.93), ("L", 384.69), ("H", 860.35)])
def test_parameter_counts(name, millions):
    with torch.device("meta"):
        model = PISDMTransformer2DModel(**PISDM_SIZES[name])
    assert model.num_parameters() / 1e6 == pytest.approx(millions, abs=0.01)


def test_by_default_the_model_is_dim_huge():
    with torch.device("meta"):
        model, largest = PISDMTransformer2DModel(), PISDMTransformer2DModel(**PISDM_SIZES["H"])
    assert model.num_parameters() == largest.num_parameters() == pytest.approx(862e6, rel=0.03)
    paper = {"num_layers": 49, "hidden_size": 1536, "state_size": 16, "conv_kernel": 3, "expand": 2, "patch_size": 2}
    latents = {"sample_size": 32, "in_channels": 4, "out_channels": None, "low_res_channels": None}  # ImageNet 256
    parts = {
        "scan_directions": SCAN_DIRECTIONS,
        "num_padding_tokens": 1,
        "local_enhancement": True,
        "num_classes": 1000,
    }
    dim = {"time_step_rank": None, "long_skips": True, "snake": False}
    ours = {"overlapping_patches": False, "pixel_head_channels": None, "residual_scale": None, "class_factors": None}
    stated = paper | latents | parts | dim | ours
    assert {name: value for name, value in model.config.items() if not name.startswith("_")} == stated
    assert model.transformer_blocks[0].mixer.dt_proj.in_features == 1536 // 16


# --- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(2, 4, 8, 8)}, r"`hidden_states`.* 4 channels.* 3"),
        (
            {"hidden_states": torch.zeros(2, 3, 8, 7), "low_res": torch.zeros(2, 3, 8, 7)},
            r"`hidden_states`.*`patch_size` \(2\).* 8 x 7",
        ),
        (
            {"hidden_states": torch.zeros(2, 3, 7, 8), "low_res": torch.zeros(2, 3, 7, 8)},
            r"`hidden_states`.*`patch_size` \(2\).* 7 x 8",
        ),
        ({"low_res": None}, r"`low_res_channels=3`.*pass `low_res`"),
        ({"noise_level": None}, r"`low_res_channels=3`.*`noise_level`"),
        ({"low_res": torch.zeros(2, 3, 4, 4)}, r"`low_res`.*\(2, 3, 8, 8\).*\(2, 3, 4, 4\)"),
        ({"low_res": torch.zeros(2, 1, 8, 8)}, r"`low_res`.*\(2, 3, 8, 8\).*\(2, 1, 8, 8\)"),
        ({"low_res": torch.zeros(1, 3, 8, 8)}, r"`low_res`.*\(2, 3, 8, 8\).*\(1, 3, 8, 8\)"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        model(**{**make_inputs(model), **change})


@pytest.mark.parametrize("name", ["low_res", "noise_level"])
def test_a_first_stage_takes_no_condition(name):
    inputs = make_inputs(make_model())
    first = make_model(low_res_channels=None)
    del inputs["noise_level" if name == "low_res" else "low_res"]
    with pytest.raises(ValueError, match=r"first stage .*`low_res_channels`.* neither `low_res` nor `noise_level`"):
        first(**inputs)


def test_sizes_begin_with_one_and_end_with_round_numbers():
    for name, (least, most) in SIZE_RANGES.items():
        assert least == {"hidden_size": 4, "num_padding_tokens": 0}.get(name, 1), name
        assert most in (8, 64, 256, 1000, 4096, 8192, 16_384, 1_000_000), name
        check_sizes({name: least}), check_sizes({name: most})
        with pytest.raises(ValueError, match=rf"`{name}` .* from {least} to {most}, got {most + 1}"):
            check_sizes({name: most + 1})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        *(
            ({name: size}, rf"`{name}` must be .*integer from \d+ to \d+, got {size!r}\.")
            for name in SIZE_RANGES
            for size in (-1, "2", 2.0, True, 10**9)
        ),
        *(
            ({name: 0}, rf"`{name}` must be .* from [14] to .* got 0\.")
            for name in SIZE_RANGES
            if "padding" not in name
        ),
        *(({name: None}, rf"`{name}` must be an integer") for name in SIZE_RANGES if name not in OPTIONAL_SIZES),
        *(({name: "no"}, rf"`{name}` must be True or False, got 'no'") for name in FLAGS),
        ({"num_layers": 10**6}, "`num_layers`.* to 1000, got 1000000"),
        ({"hidden_size": 30}, "`hidden_size`.* 4 .* 30"),
        ({"sample_size": 9}, r"`sample_size` \(9\).*`patch_size` \(2\)"),
        ({"scan_directions": ()}, "`scan_directions`.* at least one of row_top_left"),
        ({"scan_directions": ("row_top_left", "zigzag")}, "`zigzag`.*Choose from row_top_left"),
        ({"scan_directions": 5}, "`scan_directions`.* tuple .*`5`"),
        ({"scan_directions": (1,)}, "`1`.*Choose from row_top_left"),
        ({"scan_directions": "row_top_left"}, "`scan_directions`.* tuple .*`row_top_left`"),
    ],
)
def test_configurations_out_of_range_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        PISDMTransformer2DModel(**{**CONFIG, **config})

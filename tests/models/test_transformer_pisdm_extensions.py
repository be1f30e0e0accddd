"""What this project adds to the paper's model: overlapping patches, the pixel head, factors of classes."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch.export import Dim

from diffusers_pisdm import PISDMTransformer2DModel
from diffusers_pisdm.models.transformer_pisdm import get_class_embedding, set_class_embedding
from tests.models.tiny_model import make_inputs, make_model, mean_square_error_gradients


FACTORS = tuple((i % 3, i // 3) for i in range(10))  # ten classes of 3 x 4 factors
EXTENSIONS = {
    "overlap": {"overlapping_patches": True},
    "head": {"pixel_head_channels": 6},
    "factors": {"class_factors": FACTORS},
    "all": {"overlapping_patches": True, "pixel_head_channels": 6, "class_factors": FACTORS, "residual_scale": 0.2},
}


@pytest.fixture(params=EXTENSIONS.values(), ids=EXTENSIONS)
def config(request):
    return request.param


@torch.no_grad()
def run(model, **arguments):
    return model(**make_inputs(model, **arguments)).sample


def open_head(model):
    """The head's last layer starts at zero, where it hides what it depends on."""
    if model.pixel_head is not None:
        torch.nn.init.normal_(model.pixel_head.conv_out.weight, std=0.2)
        torch.nn.init.normal_(model.pixel_head.modulation.weight, std=0.2)
    return model


def make_extended(**config):
    return open_head(make_model(**config))


# --- Formulas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 6])
def test_the_head_changes_nothing_at_first(channels):
    plain, headed = PISDMTransformer2DModel(**tiny()), PISDMTransformer2DModel(**tiny(), pixel_head_channels=channels)
    headed.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(run(headed), run(plain))


def tiny():
    return {"sample_size": 8, "in_channels": 3, "num_layers": 2, "hidden_size": 16, "num_classes": 10}


def test_the_head_is_convolutions_over_prediction_input_and_condition():
    model = make_extended(pixel_head_channels=6)
    kept = {}
    model.pixel_head.register_forward_hook(lambda head, args, out: kept.update(args=args, out=out))
    inputs = make_inputs(model)
    sample = model(**inputs).sample
    prediction, seen, condition = kept["args"]
    assert torch.equal(seen, torch.cat([inputs["hidden_states"], inputs["low_res"]], dim=1))
    head = model.pixel_head
    hidden = F.conv2d(torch.cat([prediction, seen], 1), head.conv_in.weight, head.conv_in.bias, padding=1)
    shift, scale = head.modulation(condition).chunk(2, dim=1)
    hidden = F.silu(hidden * (1 + scale[..., None, None]) + shift[..., None, None])
    hidden = F.silu(F.conv2d(hidden, head.conv_mid.weight, head.conv_mid.bias, padding=1))
    expected = prediction + F.conv2d(hidden, head.conv_out.weight, head.conv_out.bias, padding=1)
    torch.testing.assert_close(sample, expected)
    assert (sample - prediction).abs().max() > 0.01


def test_overlapping_patches_read_and_write_half_a_patch_beyond_their_own():
    """Without layers and positions, a token is its square of pixels, and writes into the same square."""
    model = make_model(overlapping_patches=True, patch_size=4, sample_size=16, local_enhancement=False)
    weight = model.patch_embed.weight
    assert weight.shape[2:] == (8, 8) and model.proj_out.weight.shape[2:] == (8, 8)
    image = torch.randn(1, 6, 16, 16)
    padded = F.pad(image, (2, 2, 2, 2))
    token = (padded[0, :, 4:12, 8:16] * weight).sum(dim=(1, 2, 3)) + model.patch_embed.bias  # row 1, column 2
    torch.testing.assert_close(model.patch_embed(image)[0, :, 1, 2], token, rtol=1e-4, atol=1e-5)

    grid = torch.zeros(1, 32, 4, 4)
    grid[0, :, 1, 2] = 1.0
    written = model.proj_out(grid) - model.proj_out(torch.zeros_like(grid))
    rows, columns = written[0].abs().sum(0).nonzero().unbind(1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 9, 6, 13)  # 4 rows from 4, and 2 around
    patch = written[0, :, 2:10, 6:14]
    torch.testing.assert_close(patch, model.proj_out.weight.sum(0), rtol=1e-4, atol=1e-5)


def test_a_class_is_the_sum_of_its_factors():
    model = make_model(class_factors=FACTORS)
    weight = model.class_embedding.weight
    assert len(weight) == (3 + 1) + (4 + 1)
    embedded = model._embed_classes(torch.arange(11))
    for label, (style, subject) in enumerate((*FACTORS, (3, 4))):  # and the null label: that of each factor
        torch.testing.assert_close(embedded[label], weight[style] + weight[4 + subject])
    # Ids of factors are taken, too, with the null label of one of them.
    partial = model._embed_classes(torch.tensor([[1, 4], [3, 2]]))
    torch.testing.assert_close(partial, torch.stack([weight[1] + weight[8], weight[3] + weight[6]]))
    assert not any("factor" in name for name in model.state_dict())  # the configuration has them
    model = make_model(num_classes=2, class_factors=((0, 1, 0), (2, 0, 1)))  # 3 + 1, 2 + 1, 2 + 1 rows
    weight = model.class_embedding.weight
    torch.testing.assert_close(model._embed_classes(torch.tensor([1]))[0], weight[2] + weight[4] + weight[7 + 1])


def test_factors_are_what_the_model_sees():
    model = make_model(class_factors=FACTORS)
    inputs = make_inputs(model)
    expected = model(**inputs).sample
    factors = torch.tensor(FACTORS)[inputs["class_labels"]]
    assert torch.equal(model(**{**inputs, "class_labels": factors}).sample, expected)
    other = model(**{**inputs, "class_labels": (inputs["class_labels"] + 1) % 10}).sample
    assert (other - expected).abs().max() > 1e-4


@pytest.mark.parametrize("config", [{}, {"class_factors": FACTORS}], ids=["rows", "factors"])
def test_a_mix_of_classes_is_the_mean_of_their_embeddings(config):
    model = make_model(**config)
    inputs = make_inputs(model)
    labels, weights = torch.tensor([[3, 1, 10], [5, 5, 2]]), torch.tensor([[0.2, 0.5, 0.3], [0.75, 0.25, 0.0]])
    mixed = model(**{**inputs, "class_labels": labels}, class_weights=weights.double()).sample
    assert model._embed_classes(labels, weights.double()).dtype == torch.float32
    rows = get_class_embedding(model).detach()
    rows[7] = 0.2 * rows[3] + 0.5 * rows[1] + 0.3 * rows[10]
    set_class_embedding(model, rows)
    expected = model(**{**inputs, "class_labels": torch.tensor([7, 5])}).sample
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("label", [-1, 11])
@pytest.mark.parametrize("config", [{}, {"class_factors": FACTORS}], ids=["rows", "factors"])
def test_unknown_labels_are_told(config, label):
    model = make_model(**config)
    inputs = make_inputs(model) | {"class_labels": torch.tensor([2, label])}
    held = f"{min(2, label)} to {max(2, label)}"
    with pytest.raises(ValueError, match=rf"`class_labels` .* 0 to 10 .* {held}\."):
        model(**inputs)


# --- All that the paper's model does ---------------------------------------------------------------------------------


def test_every_parameter_is_trained(config):
    gradients = mean_square_error_gradients(make_extended(**config).train())
    names = {name for name, _ in make_model(**config).named_parameters()}
    assert {name for name, gradient in gradients.items() if gradient.any()} == names


def test_any_size(config):
    model = make_extended(**config)
    assert run(model, height=6, width=14).shape == (2, 3, 6, 14)


def test_save_and_load(tmp_path, config):
    model = make_extended(**config)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    loaded = PISDMTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(run(loaded), run(model))
    half = PISDMTransformer2DModel.from_pretrained(tmp_path, dtype=torch.float16)
    expected = run(model)
    assert (run(half, dtype=torch.float16).float() - expected).norm() < 0.02 * expected.norm()


def test_gradient_checkpointing(config):
    expected = mean_square_error_gradients(make_extended(**config).train())
    model = make_extended(**config).train()
    model.enable_gradient_checkpointing()
    for name, gradient in mean_square_error_gradients(model).items():
        torch.testing.assert_close(gradient, expected[name])


@torch.fx.experimental._config.patch(use_duck_shape=False)
@pytest.mark.parametrize("config", [EXTENSIONS["all"]], ids=["all"])
def test_compiled_as_one_graph_for_all_sizes(config):
    torch.compiler.reset()
    model = make_extended(num_layers=2, **config)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for batch_size, height, width in [(2, 8, 8), (3, 16, 8), (2, 6, 10)]:
            inputs = make_inputs(model, batch_size=batch_size, height=height, width=width)
            torch.testing.assert_close(compiled(**inputs).sample, model(**inputs).sample)
    torch.compiler.reset()


@pytest.mark.parametrize("config", [EXTENSIONS["all"]], ids=["all"])
def test_export(config):
    model = make_extended(num_layers=2, **config)
    batch, image = {0: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    inputs = make_inputs(model, batch_size=3, height=6, width=10)
    shapes = {name: image if value.ndim == 4 else batch for name, value in inputs.items()}
    exported = torch.export.export(model, args=(), kwargs=inputs, dynamic_shapes=shapes).module()
    inputs = make_inputs(model, batch_size=2, height=4, width=12)
    with torch.no_grad():
        torch.testing.assert_close(exported(**inputs).sample, model(**inputs).sample)


def test_layerwise_casting(config):
    expected = run(make_extended(**config))
    model = make_extended(**config)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert (run(model) - expected).norm() < 0.2 * expected.norm()
    if model.pixel_head is not None:
        assert {parameter.dtype for parameter in model.pixel_head.parameters()} == {torch.float32}


def test_group_offloading(config):
    expected = run(make_extended(**config))
    model = make_extended(**config)
    device = torch.device("cpu")
    model.enable_group_offload(device, device, offload_type="block_level", num_blocks_per_group=1)
    assert torch.equal(run(model), expected)


def test_lora(tmp_path, config):
    model = make_extended(**config)
    before = run(model)
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, target_modules=["in_proj", "out_proj"], init_lora_weights=False))
    adapted = run(model)
    assert (adapted - before).abs().max() > 1e-2
    model.save_lora_adapter(tmp_path)
    model.unload_lora()
    assert torch.equal(run(model), before)
    model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    torch.testing.assert_close(run(model), adapted)


# --- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "culprit"),
    [
        ({"overlapping_patches": True, "patch_size": 1}, "`overlapping_patches`.* even `patch_size`.* 1"),
        ({"pixel_head_channels": 0}, "`pixel_head_channels`.* None or .* from 1 .* 0"),
        ({"residual_scale": 0.0}, "`residual_scale`.* positive.* 0.0"),
        ({"residual_scale": float("nan")}, "`residual_scale`.* positive.* nan"),
        ({"residual_scale": "1"}, "`residual_scale`.* positive.* '1'"),
        ({"residual_scale": float("inf")}, "`residual_scale`.* positive.* inf"),
        ({"residual_scale": 0.1, "low_res_channels": None}, "`residual_scale`.* first stage.*`low_res_channels`"),
        ({"class_factors": FACTORS[:9]}, "`class_factors`.* each of the 10 classes.* 9"),
        ({"class_factors": ((0, 1), *((0,),) * 9)}, "`class_factors`.* same number of ids"),
        ({"class_factors": ((),) * 10}, "`class_factors`.* same number of ids"),
        ({"class_factors": ((0, -1),) * 10}, r"`class_factors`.* ids.* class 0 .*\(0, -1\)"),
        ({"class_factors": ((0, 10**9),) * 10}, "`class_factors`.* from 0 to 999999, .* class 0"),
        ({"class_factors": "0123456789"}, "`class_factors`.* list .*'0123456789'"),
        ({"class_factors": (0,) * 10}, "`class_factors`.* list "),
        ({"class_factors": ((0, 1.0),) * 10}, "`class_factors`.* ids"),
        ({"class_factors": ((0, True),) * 10}, "`class_factors`.* ids"),
    ],
)
def test_arguments_out_of_range(config, culprit):
    with pytest.raises(ValueError, match=culprit):
        make_model(**config)

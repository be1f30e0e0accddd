"""
DiM against its authors' own code, and all that our models do.

tests/data/dim holds what the code of tyshiwo1/DiM-DiffusionMamba (292b228) computes with random weights: outputs and
gradients in float64, the layers' outputs in call 0, and names and shapes of the published configurations.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoModel
from peft import LoraConfig
from safetensors.torch import load_file
from torch.export import Dim

from diffusers_pisdm import DIM_SIZES, DiMTransformer2DModel
from diffusers_pisdm.models.dim_conversion import convert_dim_weights, dim_config
from diffusers_pisdm.models.transformer_dim import DiMBlock, DiMRMSNorm, padded_grid
from tests.models.tiny_model import make_inputs, mean_square_error_gradients


ROOT = Path(__file__).parents[3]
DATA = ROOT / "tests" / "data" / "dim"
CASES = {"lateral_l3": "lateral", "rho_l5_grid6": "raster"}
PUBLISHED = {256: 862_407_184, 512: 863_586_832}  # parameters by image size


@pytest.fixture(params=CASES)
def case(request):
    return request.param


def load_case(case: str) -> tuple[DiMTransformer2DModel, dict[str, torch.Tensor]]:
    """A model with the case's weights, in evaluation mode, and its calls."""
    state_dict = {name: tensor.float() for name, tensor in load_file(DATA / case / "nnet_ema.safetensors").items()}
    config = dim_config(state_dict, CASES[case])
    model = DiMTransformer2DModel(**config)
    model.load_state_dict(convert_dim_weights(state_dict, config))
    return model.eval(), load_file(DATA / case / "calls.safetensors")


def make_model(case: str = "rho_l5_grid6") -> DiMTransformer2DModel:
    return load_case(case)[0]


def errors(case: str) -> dict[str, float]:
    """The greatest differences from DiM's outputs and gradients, relative to their greatest values, by precision."""
    model, calls = load_case(case)
    worst = {}
    for dtype in (torch.float64, torch.float32):
        model.to(dtype)
        for k in range(3):
            image = calls[f"{k}.sample"].to(dtype).requires_grad_()
            sample = model(image, calls[f"{k}.timestep"] - 1, calls[f"{k}.class_labels"]).sample
            (gradient,) = torch.autograd.grad((sample * calls[f"{k}.cotangent"]).sum(), image)
            for name, ours in (("output", sample), ("grad_sample", gradient)):
                theirs = calls[f"{k}.{name}_fp64"]
                error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
                key = f"{name} {dtype}".replace("torch.", "")
                worst[key] = max(error, worst.get(key, 0.0))
    return worst


# --- Against DiM's own code ------------------------------------------------------------------------------------------


def test_agrees_with_dims_code_to_the_last_digits():
    """
    In a process of its own: MKL's float32 `exp`, in the timestep's sinusoids, may differ by one unit in the last place
    from the machine that computed the data, which these random weights amplify to 3e-4. Its compatible mode, which it
    reads at import, does not differ.
    """
    code = (
        "import json, sys; from tests.models.dim.test_transformer_dim import CASES, errors;"
        "print(json.dumps({case: errors(case) for case in CASES}))"
    )
    environment = {**os.environ, "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr
    for case, found in json.loads(run.stdout).items():
        assert len(found) == 4
        for name, error in found.items():
            assert error < (1e-10 if "float64" in name else 5e-4), f"{case}: {name} {error}"


def test_agrees_with_dims_code_on_any_machine():
    assert max(errors("lateral_l3").values()) < 2e-3


def test_every_layer_is_dims(case):
    model, calls = load_case(case)
    trace = load_file(DATA / case / "trace.safetensors")
    kept = {}
    model.transformer_blocks[0].register_forward_pre_hook(lambda block, args: kept.update(sequence=args[0]))
    model.last_smoother.register_forward_hook(lambda conv, args, out: kept.update(features=out))
    for i, block in enumerate(model.transformer_blocks):
        block.register_forward_hook(lambda block, args, out, i=i: kept.update({f"block_{i:02d}": out}))
    with torch.no_grad():
        model(calls["0.sample"], calls["0.timestep"] - 1, calls["0.class_labels"])
    assert kept.keys() == trace.keys()
    for name, theirs in trace.items():
        ours = kept[name].expand_as(theirs)
        assert (ours - theirs).abs().max() < 1e-3 * theirs.abs().max(), name


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_weights_convert_name_for_name(size):
    """On the meta device: 657 tensors, all used; each of ours made."""
    published = json.loads((DATA / "published_shapes.json").read_text())
    shapes = published["256"] | (published["512, where it differs"] if size == 512 else {})
    state_dict = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    assert len(state_dict) == 657
    config = dim_config(state_dict)
    assert config["padding"] == {256: "lateral", 512: "raster"}[size]
    with torch.device("meta"):
        model = DiMTransformer2DModel(**config)
        by_size = DiMTransformer2DModel(**DIM_SIZES["H"], sample_size=size // 8, padding=config["padding"])
    assert {name: weight.shape for name, weight in by_size.state_dict().items()} == {
        name: weight.shape for name, weight in model.state_dict().items()
    }
    assert sum(weight.numel() for weight in state_dict.values()) == PUBLISHED[size]
    assert model.num_parameters() == PUBLISHED[size] - 24 * 1536  # two biases of a skip are one
    converted = convert_dim_weights(state_dict, config)
    assert {name: weight.shape for name, weight in converted.items()} == {
        name: weight.shape for name, weight in model.state_dict().items()
    }


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (lambda weights: weights.pop("label_emb.weight"), "`label_emb.weight` is missing"),
        (lambda weights: weights.pop("norm_out.norm.weight"), "lacks norm_out.norm.weight"),
        (lambda weights: weights.pop("transformer_blocks.1.attn1.D"), r"lacks transformer_blocks\.1\.attn1\.D"),
        (lambda weights: weights.update(extra=torch.ones(1)), "also holds extra"),
        (
            lambda weights: weights.update({"proj_out_2.bias": torch.ones(15)}),
            r"proj_out_2\.bias of shape \(15,\) instead of \(16,\)",
        ),
        (
            lambda weights: weights.update({"transformer_blocks.2.skip_linear.1.weight": torch.ones(32, 31)}),
            r"blocks\.2\.skip_linear\.1\.weight of shape \(32, 31\) instead of \(32, 32\)",
        ),
        (
            lambda weights: weights.update(additional_embed=torch.ones(1, 17, 32)),
            r"`additional_embed`.* \(1, 17, 32\)",
        ),
        (lambda weights: weights.update(additional_embed=torch.ones(17, 32)), r"`additional_embed`.* 3 axes"),
    ],
)
def test_wrong_weights_are_named(change, culprit):
    weights = load_file(DATA / "lateral_l3" / "nnet_ema.safetensors")
    change(weights)
    with pytest.raises(ValueError, match=culprit):
        convert_dim_weights(weights, dim_config(weights, "lateral"))


def test_padding_is_that_of_the_published_grid_or_given():
    weights = load_file(DATA / "lateral_l3" / "nnet_ema.safetensors")
    with pytest.raises(ValueError, match=r"latents of 8 x 8.* Pass `padding`"):
        dim_config(weights)
    with pytest.raises(ValueError, match=r"`padding`.* lateral, raster.*'rho'"):
        dim_config(weights, "rho")
    weights["additional_embed"] = torch.ones(1, 2 + 32 * 32, 32)
    with pytest.raises(ValueError, match=r"images of 512 x 512.* 'raster', not 'lateral'"):
        dim_config(weights, "lateral")


# --- Formulas --------------------------------------------------------------------------------------------------------


def test_padded_grids():
    """2 x 3 image tokens, two columns and rows more; padding tokens are 6 and 7."""
    lateral = [[0, 1, 2, 6, 7], [3, 4, 5, 6, 7], [6, 6, 6, 6, 6], [7, 7, 7, 7, 7]]
    raster = [[0, 1, 2, 6, 7], [3, 4, 5, 6, 7], [6, 7, 6, 7, 6], [7, 6, 7, 6, 7]]
    assert padded_grid(2, 3, 2, "lateral").view(4, 5).tolist() == lateral
    assert padded_grid(2, 3, 2, "raster").view(4, 5).tolist() == raster


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_computes_in_the_precision_of_its_input(weight_dtype):
    norm = DiMRMSNorm(32).to(weight_dtype)
    torch.nn.init.normal_(norm.weight)
    x = 1e-3 * torch.randn(2, 5, 32)  # so small that epsilon counts
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.float()
    torch.testing.assert_close(norm(x), expected)


def test_positions_of_another_grid_are_resized_bilinearly():
    """A rectangle with half as many rows and twice as many columns as the trained 6 x 6, by hand."""
    model = make_model()
    prefix, positions = model._positions(3, 12)
    trained = model.position_embedding[0, 2:].unflatten(0, (6, 6))  # (6, 6, D)
    assert torch.equal(prefix, model.position_embedding[:, :2])
    expected = torch.zeros(3, 12, trained.shape[-1])
    for row in range(3):
        for column in range(12):
            across = (column + 0.5) / 2 - 0.5  # pixel centres
            left, share = int(max(across, 0)), max(across, 0) % 1
            for i in (2 * row, 2 * row + 1):  # the centre of a row of twice the height lies between two
                right = min(left + 1, 5)
                expected[row, column] += 0.5 * ((1 - share) * trained[i, left] + share * trained[i, right])
    torch.testing.assert_close(positions[0].unflatten(0, (3, 12)), expected)
    _, positions = model._positions(6, 6)
    assert torch.equal(positions, model.position_embedding[:, 2:])


def test_all_is_computed_on_the_inputs_device():
    """Whatever the default device: there, nothing could be computed."""
    model = make_model()
    inputs = make_inputs(model, height=8, width=26) | {"timestep": 7}  # of no other test: not in the cache
    with torch.no_grad(), torch.device("meta"):
        sample = model(**inputs).sample
    with torch.no_grad():
        assert torch.equal(sample, model(**inputs).sample)


@pytest.mark.parametrize(("height", "width"), [(6, 20), (20, 6), (2, 2), (24, 24)])
def test_any_size(height, width):
    model = make_model()
    assert run(model, height=height, width=width).shape == (2, 4, height, width)


def test_a_mix_of_classes_averages_both_tables():
    model = make_model()
    inputs = make_inputs(model)
    ids, weights = torch.tensor([[3, 1], [5, 5]]), torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    mixed = model(**{**inputs, "class_labels": ids}, class_weights=weights).sample
    for table in (model.class_embedding, model.class_token_embedding):
        row = 0.25 * table.weight[3] + 0.75 * table.weight[1]
        table.weight.data[7] = row
    expected = model(**{**inputs, "class_labels": torch.tensor([7, 5])}).sample
    torch.testing.assert_close(mixed, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_a_stream_of_single_precision(tmp_path, dtype):
    """A small change to a large stream would be lost in half precision: here, all of the layers' work."""
    make_model().save_pretrained(tmp_path)
    model = DiMTransformer2DModel.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for name, p in model.named_parameters() if name.endswith(("A_log", "D", "dt_bias"))} == {
        torch.float32
    }
    assert model.proj_out.weight.dtype == dtype
    streams, mixed = [], []
    for block in model.transformer_blocks:
        block.register_forward_hook(lambda block, args, out: streams.append(out))
        block.mixer.register_forward_hook(lambda mixer, args, out: mixed.append(out))
    sample = run(model, dtype=dtype)
    assert sample.dtype == dtype
    assert {out.dtype for out in mixed} == {dtype} and {out.dtype for out in streams} == {torch.float32}
    assert all((stream != stream.to(dtype)).any() for stream in streams)
    expected = run(make_model())
    assert (sample.float() - expected).norm() < (0.1 if dtype == torch.bfloat16 else 0.02) * expected.norm()


@pytest.mark.parametrize(
    ("config", "culprit"),
    [
        ({"hidden_size": 33}, "`hidden_size` must be even.* 33"),
        ({"sample_size": 9}, r"`sample_size` \(9\) .*`patch_size` \(2\)"),
        ({"num_padding_tokens": 0}, "`num_padding_tokens` must be at least 1.* 0"),
        ({"padding": "rho_pad"}, "`padding` must be one of lateral, raster.*'rho_pad'"),
        ({"num_layers": 0}, "`num_layers` must be an integer from 1"),
    ],
)
def test_arguments_out_of_range(config, culprit):
    with pytest.raises(ValueError, match=culprit):
        DiMTransformer2DModel(**{"hidden_size": 32, "num_layers": 1, "num_classes": 2, **config})


def test_inputs_that_do_not_fit():
    model = make_model()
    inputs = make_inputs(model)
    with pytest.raises(ValueError, match=r"divisible by .*`patch_size` \(2\).* 5 x 6"):
        model(**{**inputs, "hidden_states": torch.zeros(2, 4, 5, 6)})
    with pytest.raises(ValueError, match=r"3 channels.* takes 4"):
        model(**{**inputs, "hidden_states": torch.zeros(2, 3, 6, 6)})
    with pytest.raises(ValueError, match=r"first stage.*`low_res`.*`noise_level`"):
        model(**inputs, low_res=torch.zeros(2, 4, 12, 12), noise_level=torch.zeros(2))


# --- A new model -----------------------------------------------------------------------------------------------------


def test_a_new_model_starts_as_stated():
    torch.manual_seed(0)
    sizes = {"num_layers": 5, "hidden_size": 64, "num_classes": 500, "num_padding_tokens": 50, "patch_size": 4}
    parameters = dict(DiMTransformer2DModel(**sizes).named_parameters())
    assert parameters["position_embedding"].shape == (1, 2 + 8 * 8, 64)
    assert parameters["class_embedding.weight"].shape == (500 + 1, 64)  # and the null label
    normal = ("position_embedding", "padding_tokens", "prefix_padding_tokens", "class_embedding.weight")
    for name in (*normal, "class_token_embedding.weight", "proj_out.weight"):
        values = parameters[name].detach()
        assert values.std().item() == pytest.approx(0.02, rel=0.05) and values.abs().max() > 3 * 0.02, name
    zero = ("modulation", "modulation_out")
    biases = ("proj_out", "first_smoother", "last_smoother", "skip_projections.0", "skip_projections.1")
    for name in (*(f"{layer}.weight" for layer in zero), *(f"{layer}.bias" for layer in (*zero, *biases))):
        assert not parameters[name].any(), name
    for name in ("first_smoother.weight", "last_smoother.weight"):  # the identity
        assert torch.equal(parameters[name], torch.eye(9)[4].view(3, 3).expand(64, 1, 3, 3)), name
    for i in range(2):  # a skip starts closed
        assert torch.equal(parameters[f"skip_projections.{i}.weight"], torch.eye(64, 128))
    for i in range(5):
        block = f"transformer_blocks.{i}"
        assert (parameters[f"{block}.norm.weight"] == 1).all() and not parameters[f"{block}.scale_shift_table"].any()
        # 128 channels inside; what five layers add up to has the variance of one.
        out_proj = parameters[f"{block}.mixer.out_proj.weight"]
        assert out_proj.std().item() == pytest.approx((128 * 3 * 5) ** -0.5, rel=0.05)


def test_sizes_are_those_of_the_paper():
    stated = {name: (size["num_layers"], size["hidden_size"]) for name, size in DIM_SIZES.items()}
    assert stated == {"S": (25, 512), "L": (49, 1024), "H": (49, 1536)}
    with torch.device("meta"):
        model = DiMTransformer2DModel()
    defaults = {"sample_size": 32, "in_channels": 4, "num_classes": 1000, "padding": "lateral", **DIM_SIZES["H"]}
    assert {name: model.config[name] for name in defaults} == defaults
    for config, rank in [({"hidden_size": 34}, 3), ({"hidden_size": 32}, 2), ({"time_step_rank": 5}, 5)]:
        model = DiMTransformer2DModel(**{"hidden_size": 32, "num_layers": 1, "num_classes": 2, **config})
        assert model.transformer_blocks[0].mixer.dt_proj.in_features == rank


def test_directions_cycle_and_mirror():
    model = DiMTransformer2DModel(num_layers=11, hidden_size=32, num_classes=2)
    rows, columns = ("row_top_left", "row_bottom_right"), ("column_top_left", "column_bottom_right")
    first = (*rows, *columns, rows[0])
    assert model.layer_directions == (*first, rows[1], *reversed(first))
    assert (model.first_skip, len(model.skip_projections)) == (6, 5)


def test_outputs_may_have_channels_of_their_own():
    model = DiMTransformer2DModel(sample_size=8, out_channels=6, num_layers=1, hidden_size=32, num_classes=2)
    assert run(model, height=8, width=8).shape == (2, 6, 8, 8)


# --- All that our models do ------------------------------------------------------------------------------------------


@torch.no_grad()
def run(model, **arguments):
    return model(**make_inputs(model, **arguments)).sample


@pytest.mark.parametrize("loader", [DiMTransformer2DModel, AutoModel])
def test_save_and_load(tmp_path, loader):
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    loaded = loader.from_pretrained(str(tmp_path))
    assert type(loaded) is DiMTransformer2DModel and loaded.config.padding == "raster"
    assert torch.equal(run(loaded), run(model))


def test_a_new_model_trains():
    """Its random start lets a gradient reach every parameter but those that the modulation's zeros close."""
    torch.manual_seed(0)
    model = DiMTransformer2DModel(sample_size=8, num_layers=3, hidden_size=32, state_size=4, num_classes=10)
    inputs = make_inputs(model, height=8, width=8)
    assert run(model, height=8, width=8).std() < 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    target, losses = torch.randn(2, 4, 8, 8), []
    for _ in range(8):
        loss = F.mse_loss(model(**inputs).sample, target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.grad.any() for parameter in model.parameters())


def test_gradient_checkpointing_gives_the_same_gradients():
    expected = mean_square_error_gradients(make_model().train(), height=8)
    model = make_model().train()
    model.enable_gradient_checkpointing()
    calls = []
    for block in model.transformer_blocks:
        block.register_forward_pre_hook(lambda block, args: calls.append(block))
    gradients = mean_square_error_gradients(model, height=8)
    assert len(calls) == 2 * len(model.transformer_blocks)
    assert gradients.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda message, name=name: f"{name}: {message}")


def test_mixed_precision():
    exact = mean_square_error_gradients(make_model().train())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradients = mean_square_error_gradients(make_model().train())
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert F.cosine_similarity(gradient.flatten(), exact[name].flatten(), 0) > 0.9, name


def test_half_precision_inputs_under_autocast():
    """All but the stream is in the inputs' precision, as it is with weights of that precision."""
    model, seen, streams = make_model(), {}, []
    torch.manual_seed(0)
    for tokens in (model.padding_tokens, model.prefix_padding_tokens):
        torch.nn.init.normal_(tokens)  # the data's have few digits
    expected = run(model)
    layers = ("time_embedding", "first_smoother", "modulation", "skip_projections.0", "last_smoother")
    for name in (*layers, "modulation_out"):
        hook = lambda module, args, name=name: seen.update({name: args[0].dtype})  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(hook)
    for block in model.transformer_blocks:
        block.register_forward_pre_hook(lambda block, args: streams.append(args[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sample = run(model, dtype=torch.bfloat16)
    assert sample.dtype == torch.bfloat16 and set(seen.values()) == {torch.bfloat16} and len(seen) == 6
    assert {stream.dtype for stream in streams} == {torch.float32}
    assert torch.equal(streams[0], streams[0].bfloat16().float())
    assert (sample.float() - expected).norm() < 0.1 * expected.norm()


def test_a_block_is_modulated_in_the_precision_of_the_stream():
    torch.manual_seed(0)
    block = DiMBlock(32, state_size=4, conv_kernel=3, expand=2, time_step_rank=2)
    torch.nn.init.normal_(block.scale_shift_table)
    block.bfloat16().mixer.register_forward_hook(lambda mixer, args, out: 100 * args[0])
    x, modulation = torch.randn(2, 5, 32), torch.randn(2, 3, 32).bfloat16()
    shift, scale, gate = (modulation.float() + block.scale_shift_table.float()).chunk(3, dim=1)
    normed = (shift + block.norm(x) * (1 + scale)).bfloat16()
    torch.testing.assert_close(block(x, modulation), x + (1 + gate) * (100 * normed).float())


def test_lora(tmp_path):
    model = make_model()
    before = run(model)
    torch.manual_seed(0)
    targets = r".*\.(in_proj|x_proj|dt_proj|out_proj)|skip_projections\.\d+"
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    adapted = run(model)
    assert (adapted - before).abs().max() > 1e-2
    model.save_lora_adapter(tmp_path / "lora")
    assert any(name.startswith("skip_projections.1") for name in load_file(next((tmp_path / "lora").iterdir())))
    model.save_pretrained(tmp_path / "model")  # without the adapter
    assert torch.equal(run(DiMTransformer2DModel.from_pretrained(tmp_path / "model")), before)
    model.unload_lora()
    assert torch.equal(run(model), before)
    model.load_lora_adapter(tmp_path / "lora", prefix=None, use_safetensors=True)
    torch.testing.assert_close(run(model), adapted)


def test_blocks_are_not_split_and_are_what_repeats():
    (block,) = {type(module).__name__ for module in make_model().transformer_blocks}
    assert DiMTransformer2DModel._no_split_modules == DiMTransformer2DModel._repeated_blocks == [block]


def test_blocks_compile_once():
    torch.compiler.reset()
    expected = run(make_model())
    model = make_model()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        torch.testing.assert_close(run(model), expected, atol=1e-4, rtol=1e-4)
    torch.compiler.reset()


@torch.fx.experimental._config.patch(use_duck_shape=False)
def test_one_graph_for_all_sizes():
    torch.compiler.reset()
    model = make_model("lateral_l3")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for batch_size, height, width in [(2, 6, 10), (3, 16, 8), (2, 12, 12)]:
            inputs = make_inputs(model, batch_size=batch_size, height=height, width=width)
            torch.testing.assert_close(compiled(**inputs).sample, model(**inputs).sample, atol=1e-4, rtol=1e-4)
    torch.compiler.reset()


def test_export():
    model = make_model("lateral_l3")
    batch, image = {0: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    inputs = make_inputs(model, batch_size=3, height=6, width=10)
    shapes = {name: image if value.ndim == 4 else batch for name, value in inputs.items()}
    exported = torch.export.export(model, args=(), kwargs=inputs, dynamic_shapes=shapes).module()
    inputs = make_inputs(model, batch_size=2, height=4, width=14)
    with torch.no_grad():
        torch.testing.assert_close(exported(**inputs).sample, model(**inputs).sample, atol=1e-4, rtol=1e-4)


def test_layerwise_casting():
    expected = run(make_model())
    model = make_model()
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    assert (run(model) - expected).norm() < 2e-2 * expected.norm()
    layers = {"in_proj", "x_proj", "dt_proj", "out_proj", "conv1d", "skip_projections", "linear_1", "linear_2"}
    for name, parameter in model.named_parameters():
        is_cast = not layers.isdisjoint(name.split("."))
        assert parameter.dtype == (torch.float16 if is_cast else torch.float32), name


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offloading(offload_type):
    model, cpu = make_model(), torch.device("cpu")
    kwargs = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=offload_type, **kwargs)
    assert torch.equal(run(model), run(make_model()))


def test_sequential_offloading(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    model = DiMTransformer2DModel.from_pretrained(
        tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "offloaded"
    )
    assert torch.equal(run(model), run(make_model()))

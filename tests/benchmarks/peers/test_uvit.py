import pytest
import torch

from benchmarks.peers.equal_parameters import count_parameters
from benchmarks.peers.uvit import UViT2DModel, UViTAttention


# Table 1 of the paper; patches of 2x2. Keyword arguments of UViT2DModel.
SIZES = {
    "S": {"num_layers": 13, "hidden_size": 512, "num_heads": 8},
    "L": {"num_layers": 21, "hidden_size": 1024, "num_heads": 16},
    "H": {"num_layers": 29, "hidden_size": 1152, "num_heads": 16},
}
CONFIG = {"sample_size": 8, "num_layers": 5, "hidden_size": 32, "num_heads": 4, "num_classes": 3}


def make_model(**changes):
    torch.manual_seed(0)
    return UViT2DModel(**{**CONFIG, **changes}).eval()


@torch.no_grad()
def run(model, height=8, width=8, timestep=500, label=0, images=None):
    images = torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(1)) if images is None else images
    return model(images, torch.full((2,), timestep), torch.full((2,), label)).sample


# The paper's table 1. Its S has 3 channels and 10 classes (CIFAR-10), which num_classes and the null label make.
@pytest.mark.parametrize(
    ("size", "changes", "millions"), [("S", {"in_channels": 3, "num_classes": 9}, 44), ("L", {}, 287), ("H", {}, 501)]
)
def test_parameter_counts_are_the_papers(size, changes, millions):
    assert round(count_parameters(UViT2DModel, {**SIZES[size], **changes}) / 1e6) == millions


def test_attention_is_softmax_attention():
    attention = UViTAttention(24, num_heads=3).double()
    tokens = torch.randn(2, 7, 24, dtype=torch.float64)
    query, key, value = (
        part.unflatten(2, (3, 8)).transpose(1, 2) for part in (tokens @ attention.qkv_proj.weight.T).chunk(3, dim=-1)
    )  # (B, heads, L, 8) each
    weights = torch.exp(query @ key.transpose(2, 3) / 8**0.5)  # (B, heads, L, L)
    attended = (weights / weights.sum(dim=-1, keepdim=True)) @ value  # (B, heads, L, 8)
    wanted = attention.out_proj(torch.cat(attended.unbind(1), dim=-1))  # (B, L, D)
    torch.testing.assert_close(attention(tokens), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 16), (4, 4), (8, 12)])
@pytest.mark.parametrize("num_layers", [5, 4])
def test_any_size_and_depth(height, width, num_layers):
    sample = run(make_model(num_layers=num_layers), height, width)
    assert sample.shape == (2, 4, height, width) and torch.isfinite(sample).all()


def test_everything_given_matters():
    model = make_model()
    sample = run(model)
    assert not torch.allclose(run(model, timestep=400), sample)
    assert not torch.allclose(run(model, label=3), sample)
    with torch.no_grad():  # a plain transformer would not notice where a patch is
        model.conv_out.weight.zero_()[range(4), range(4), 1, 1] = 1.0
    images = torch.randn(2, 4, 8, 8)
    moved = run(model, images=images.roll(4, dims=3)).roll(-4, dims=3)
    assert not torch.allclose(moved, run(model, images=images))
    with torch.no_grad():
        model.position_embedding.zero_()
    moved = run(model, images=images.roll(4, dims=3)).roll(-4, dims=3)
    torch.testing.assert_close(moved, run(model, images=images), rtol=1e-4, atol=1e-5)


def test_patches_come_back_where_they_were():
    # No layers between: each patch of the output depends on its own patch of the input alone.
    model = make_model(num_layers=1)
    with torch.no_grad():
        model.conv_out.weight.zero_()[range(4), range(4), 1, 1] = 1.0
        model.transformer_blocks[0].attn.out_proj.weight.zero_()
    images = torch.randn(2, 4, 8, 8)
    changed = images.clone()
    changed[:, :, 2:4, 6:8] += 1
    difference = (run(model, images=changed) - run(model, images=images)).abs().sum(dim=(0, 1))
    assert difference[2:4, 6:8].min() > 0
    difference[2:4, 6:8] = 0
    assert difference.max() == 0


@pytest.mark.parametrize("num_layers", [5, 4])
def test_long_skips_join_mirrored_layers(num_layers):
    model = make_model(num_layers=num_layers)
    outputs, skips = {}, {}
    for i, block in enumerate(model.transformer_blocks):

        def record(block, inputs, output, i=i):
            outputs[i] = output
            if len(inputs) == 2:
                skips[i] = inputs[1]

        block.register_forward_hook(record)
    run(model)
    assert sorted(skips) == list(range(num_layers - num_layers // 2, num_layers))
    for i, skip in skips.items():
        assert skip is outputs[num_layers - 1 - i]


def test_positions_interpolate():
    model = make_model()
    assert model._positions(4, 4) is model.position_embedding
    with torch.no_grad():
        model.position_embedding[:, 2:] = torch.arange(4.0).repeat(4)[None, :, None]  # the column
        positions = model._positions(8, 8)
    assert torch.equal(positions[:, :2], model.position_embedding[:, :2])
    grid = positions[0, 2:, 0].view(8, 8)
    assert torch.allclose(grid, grid[:1])  # no change from row to row
    assert (grid[0].diff() > 0).all()


def test_wrong_arguments():
    with pytest.raises(ValueError, match="`hidden_size` \\(30\\) must be divisible by `num_heads` \\(4\\)"):
        make_model(hidden_size=30)
    with pytest.raises(ValueError, match="`sample_size` \\(9\\) must be divisible"):
        make_model(sample_size=9)
    with pytest.raises(ValueError, match="take neither"):
        make_model()(torch.randn(1, 4, 8, 8), torch.tensor([1]), torch.tensor([0]), low_res=torch.randn(1, 4, 8, 8))

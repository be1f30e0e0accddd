import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from diffusers_pisdm.training.cost.flops import FLOP_FORMULAS, StepTrace
from diffusers_pisdm.training.cost.stage_cost import CostSettings, estimate_stage_cost
from tests.training.cost.cost_stages import HIGHER_STAGE, NUM_CLASSES, STAGE, make_model, run_loss


def flops_by_hand(config, conv_backward):
    """Forward, and forward and backward, of one image; `conv_backward` passes' worth for the causal convolution."""
    width, pixels = config["hidden_size"], 2 * 2
    lines = config["sample_size"] // 2
    tokens = lines**2
    length = 2 + tokens + lines  # prefix, image, one padding token a line
    inner, states, rank, kernel, frequencies = 2 * width, 16, math.ceil(width / 16), 3, 256
    inputs = config["in_channels"] + config.get("low_res_channels", 0)
    embeddings = 2 if "low_res_channels" in config else 1
    skips = config["num_layers"] // 2

    # A gradient for the inputs and one for the weights; the network's own inputs need none.
    first = 2 * tokens * width * inputs * pixels + embeddings * 2 * frequencies * width
    linear = embeddings * 2 * width * width + 2 * width * 5 * width  # embeddings' second layer, two modulations
    linear += 2 * tokens * width * config["in_channels"] * pixels  # output
    linear += 2 * 2 * tokens * width * 9  # local enhancement, depthwise 3 x 3, twice
    linear += skips * 2 * length * 2 * width * width
    linear += config["num_layers"] * 2 * length * inner * (2 * width + rank + 2 * states + rank + width)
    conv = config["num_layers"] * 2 * length * inner * kernel
    scan_steps = config["num_layers"] * length * inner * states
    forward = first + linear + conv + 7 * scan_steps
    return forward, forward + first + 2 * linear + conv_backward * conv + 20 * scan_steps


@pytest.mark.parametrize("config", [STAGE, HIGHER_STAGE], ids=["first", "higher"])
@pytest.mark.parametrize(("device_type", "conv_backward"), [("cpu", 3), ("cuda", 2)])  # recomputed, and not
def test_flops_are_those_counted_by_hand(config, device_type, conv_backward):
    settings = CostSettings(device_type=device_type, fused_scan=device_type == "cpu")
    cost = estimate_stage_cost(config, NUM_CLASSES, 3, settings)
    assert (cost.forward_flops, cost.training_flops) == flops_by_hand(config, conv_backward)


def test_flops_of_dim_are_those_counted_by_hand():
    """Three columns and rows of padding and five tokens more than the image, and a skip to all but the first half."""
    width, layers, lines, states, kernel, frequencies = 32, 5, 4, 16, 3, 256
    tokens, length = lines**2, 5 + (lines + 3) ** 2
    inner, rank, patch = 2 * width, 2, 4 * 2 * 2
    first = 2 * tokens * width * patch + 2 * frequencies * width  # patches and timesteps need no gradient
    linear = 2 * width * width + 2 * width * 5 * width + 2 * tokens * width * patch + 2 * 2 * tokens * width * 9
    linear += 2 * 2 * length * 2 * width * width  # skips into the last two layers
    linear += layers * 2 * length * inner * (2 * width + rank + 2 * states + rank + width)
    conv, scan_steps = layers * 2 * length * inner * kernel, layers * length * inner * states
    forward = first + linear + conv + 7 * scan_steps
    config = {"_class_name": "DiMTransformer2DModel", "sample_size": 8, "num_layers": layers, "hidden_size": width}
    cost = estimate_stage_cost(config, NUM_CLASSES, 3, CostSettings())
    expected = (forward, forward + first + 2 * linear + 3 * conv + 20 * scan_steps)
    assert (cost.forward_flops, cost.training_flops) == expected


def test_torchs_own_counter_agrees_on_a_real_forward_pass():
    with FlopCounterMode(display=False) as counter:
        run_loss(make_model(HIGHER_STAGE), 2)
    cost = estimate_stage_cost(HIGHER_STAGE, NUM_CLASSES, 2, CostSettings())
    assert counter.get_total_flops() == 2 * cost.forward_flops


def test_every_scan_and_convolution_of_the_package_has_a_formula():
    names = [name.removeprefix("diffusers_pisdm::") for name in torch._C._dispatch_get_all_op_names()]
    ours = {name.split(".")[0] for name in names if name.startswith(("selective_scan", "causal_conv"))}
    assert len(ours) >= 8
    assert [name for name in ours if getattr(torch.ops.diffusers_pisdm, name) not in flop_registry] == []


def test_tritons_operators_count_as_numbas():
    ops = torch.ops.diffusers_pisdm
    sequence, states, rates = torch.empty(2, 5, 7), torch.empty(2, 3, 7), torch.empty(5, 3)
    inputs = (sequence, sequence, rates, states, states, None, None, None, False)
    for operator, arguments, flops in (
        (ops.selective_scan_triton, (*inputs, True), 7),
        (ops.selective_scan_triton_backward, (sequence, states, *inputs), 20),
        (ops.causal_conv_triton, (sequence, rates, None, "silu"), 2),
        (ops.causal_conv_triton_backward, (sequence, sequence, rates, None, "silu"), 6),
    ):
        assert FLOP_FORMULAS[operator](*arguments, out_val=None) == flops * 2 * 5 * 7 * 3


@pytest.mark.parametrize(("groups", "channels_seen"), [(6, 1), (3, 2), (1, 6)], ids=["depthwise", "grouped", "full"])
def test_a_convolutions_filters_see_only_their_group(groups, channels_seen):
    aten = torch.ops.aten.convolution_backward
    grad, x, weight = torch.ones(2, 6, 5), torch.ones(2, 6, 7), torch.ones(6, channels_seen, 3)
    options = ([6], [1], [0], [1], False, [0], groups)
    for wanted, passes in (([True, True, True], 2), ([False, True, True], 1), ([False, False, True], 0)):
        out = aten(grad, x, weight, *options, wanted)
        flops = FLOP_FORMULAS[aten](grad, x, weight, *options, wanted, out_val=out)
        assert flops == passes * 2 * grad.numel() * channels_seen * 3


def test_attention_on_a_cpu_is_counted_as_its_matrix_products():
    query = torch.randn(2, 3, 5, 8, requires_grad=True)  # images, heads, tokens, channels
    key, value = torch.randn(2, 2, 3, 7, 8)
    with StepTrace() as trace:
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        product = 2 * 2 * 3 * 5 * 7 * 8
        assert trace.flops == 2 * product
        out.sum().backward()
    assert trace.flops == (2 + 5) * product  # the scores again, and a gradient for each factor of both products


def test_operators_are_counted_forward_and_backward():
    x, weight = torch.ones(2, 3), torch.ones(3, 5, requires_grad=True)
    with StepTrace() as trace:
        loss = (x @ weight).sum()
        assert trace.flops == 2 * 2 * 3 * 5
        loss.backward()
    assert trace.flops == 2 * (2 * 2 * 3 * 5)  # x needs no gradient


def test_a_storage_counts_once_and_while_it_is_alive():
    with StepTrace() as trace:
        first = torch.zeros(100)
        view = first.view(10, 10)[2:]
        first.add_(1)
        assert trace.live_bytes == 400
        second = torch.zeros(50)
        assert trace.live_bytes == 600
        del first
        assert trace.live_bytes == 600  # the view holds it
        del view
        assert trace.live_bytes == 200
        third = torch.zeros(25)
    del second, third
    assert (trace.live_bytes, trace.peak_bytes) == (0, 600)


def test_what_was_there_before_can_be_left_out():
    weight = torch.zeros(100)
    trace = StepTrace()
    trace.ignore(weight)
    with trace:
        weight.mul_(2)
        weight.view(10, 10)
    assert trace.peak_bytes == 0

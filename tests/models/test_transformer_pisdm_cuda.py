"""PISDMTransformer2DModel on a GPU: the same as on the CPU, whole, compiled and as a CUDA graph."""

import pytest
import torch

from tests.models.tiny_model import make_inputs, make_model


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SIZE = {"height": 24, "width": 20}  # 120 tokens and the padding: several chunks of a scan


@pytest.fixture(autouse=True)
def full_float32():
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def to_cuda(inputs, dtype=torch.float32):
    return {name: x.to("cuda", dtype if x.is_floating_point() else None) for name, x in inputs.items()}


def gradients(model, inputs):
    sample = model(**inputs).sample
    weights = torch.randn(sample.shape, generator=torch.Generator().manual_seed(0)).to(sample)
    (sample * weights).sum().backward()
    return sample.detach().cpu(), {name: x.grad.cpu() for name, x in model.named_parameters() if x.grad is not None}


def test_outputs_and_gradients_are_those_of_the_cpu():
    model = make_model()
    inputs = make_inputs(model, **SIZE)
    wanted, wanted_gradients = gradients(model, inputs)
    model.zero_grad()
    sample, own_gradients = gradients(model.to("cuda"), to_cuda(inputs))
    torch.testing.assert_close(sample, wanted, rtol=1e-4, atol=1e-5)
    assert own_gradients.keys() == wanted_gradients.keys()
    for name, gradient in own_gradients.items():
        error = (gradient - wanted_gradients[name]).abs().max() / wanted_gradients[name].abs().max()
        assert error <= 1e-3, name


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = make_model()
    inputs = make_inputs(model, **SIZE)
    wanted = model(**inputs).sample
    sample = model.to("cuda", dtype)(**to_cuda(inputs, dtype)).sample
    assert sample.dtype == dtype
    assert (sample.float().cpu() - wanted).abs().mean() <= 0.03 * wanted.abs().mean()


@torch.no_grad()
def test_compiled():
    torch._dynamo.reset()
    model = make_model().to("cuda")
    inputs = to_cuda(make_inputs(model, **SIZE))
    wanted = model(**inputs).sample
    sample = torch.compile(model, fullgraph=True)(**inputs).sample
    torch.testing.assert_close(sample, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_replayed_as_a_graph():
    from benchmarks.measuring.timing import record_graph

    model = make_model().to("cuda")
    inputs = to_cuda(make_inputs(model, **SIZE))
    outputs = []
    replay = record_graph(lambda: outputs.append(model(**inputs).sample), torch.device("cuda"))
    inputs["hidden_states"].mul_(0.5)
    replay()
    torch.testing.assert_close(outputs[-1], model(**inputs).sample, rtol=1e-5, atol=1e-6)

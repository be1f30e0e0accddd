import torch

from diffusers_pisdm.training.step_trace import StepTrace


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

"""Whether what is timed computes the right thing."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from benchmarks.candidates import PISDM, Candidate, make_inputs
from benchmarks.peers import HEAD_SIZE
from diffusers_pisdm.ops.common.backends import force_backends


SMALL_CONFIG = {"num_layers": 16, "hidden_size": 128, "num_classes": 10}  # PIS-DM's eight directions twice
SMALL_IMAGE = 64  # pixels: 16 tokens
TOLERANCE = 1e-4  # of the largest value


def check_candidates(candidates: list[Candidate], device: torch.device) -> dict[str, float]:
    """
    Compares every candidate, narrow and in float32 with the device's kernels, with itself in float64 on the CPU, where
    PIS-DM scans with the textbook loop.

    Args:
        candidates (`list[Candidate]`): Of any size.
        device (`torch.device`): Where the models will be timed.

    Returns:
        `dict[str, float]`: The largest error of each candidate, as a share of the largest value.

    Raises:
        RuntimeError: One is off by more than [`TOLERANCE`], or not finite.
    """
    errors = {}
    for candidate in candidates:
        small = {**candidate.config, **SMALL_CONFIG}
        if "num_heads" in small:
            small["num_heads"] = SMALL_CONFIG["hidden_size"] // HEAD_SIZE
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = replace(candidate, config=small).build(SMALL_IMAGE)
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))  # what starts at zero would hide errors
        inputs = make_inputs(2, SMALL_IMAGE, torch.device("cpu"), torch.float64)
        with torch.no_grad(), force_backends(selective_scan="reference", causal_conv="torch"):
            wanted = copy.deepcopy(model).double()(*inputs, return_dict=False)[0]  # (B, C, H, W)
        with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):  # cuDNN's convolutions round by default
            inputs = make_inputs(2, SMALL_IMAGE, device, torch.float32)
            sample = model.to(device)(*inputs, return_dict=False)[0].double().cpu()  # (B, C, H, W)
        errors[candidate.name] = ((sample - wanted).abs().max() / wanted.abs().max()).item()
    wrong = [name for name, error in errors.items() if not error <= TOLERANCE]  # a NaN is wrong, too
    if wrong:
        raise RuntimeError(
            f"{', '.join(wrong)} differ from float64 by more than {TOLERANCE} of the largest value: {errors}."
            + (" Run the tests of diffusers_pisdm.ops to find the kernel at fault." if PISDM in wrong else "")
        )
    return errors

import argparse
import json
import math

import pytest
import torch

from benchmarks import scan
from diffusers_pisdm.ops.scan import triton_operator


def test_reports_errors_times_and_ratios(tmp_path, capsys, monkeypatch):
    # A peer that needs no package stands in for mambapy; a scan that is wrong must not be timed.
    candidates = {
        "mambapy": scan.loop_scan,
        "torch": scan.package_scan("torch"),
        "wrong": lambda u, *rest, **named: 1.01 * scan.package_scan("torch")(u, *rest, **named),
        "nan": lambda u, *rest, **named: math.nan * scan.package_scan("torch")(u, *rest, **named),
    }
    monkeypatch.setattr(scan, "make_candidates", lambda device_type: candidates)
    threads = torch.get_num_threads()
    scan.main(["--shapes", "2x5x9", "1x16x20", "--repeats", "2", "--output-dir", str(tmp_path), "--state-size", "4"])
    assert torch.get_num_threads() == threads
    report = json.loads((tmp_path / "scan.json").read_text())
    assert len(report["rows"]) == 2 * len(candidates) * len(scan.MODES)
    for row in report["rows"]:
        if row["candidate"] in ("wrong", "nan"):
            assert row["skipped"] == "wrong" and row["median"] is None and row["times_mambapy"] is None
        else:
            assert row["skipped"] is None and len(row["milliseconds"]) == 2
            assert row["output_error"] < 1e-6
            assert row["times_mambapy"] == 1 if row["candidate"] == "mambapy" else row["times_mambapy"] > 0
    assert (tmp_path / "scan.png").read_bytes().startswith(b"\x89PNG")
    assert "x mambapy" in capsys.readouterr().out


def test_the_loops_quadratic_backward_is_skipped(monkeypatch):
    monkeypatch.setattr(scan, "make_candidates", lambda device_type: {"Mamba's loop": scan.loop_scan})
    monkeypatch.setattr(scan, "MAX_LOOP_LENGTH_BACKWARD", 8)
    args = argparse.Namespace(
        triton_settings=False, state_size=2, repeats=1, tolerance=1e-4, dtype="float32", device=torch.device("cpu")
    )
    forward, backward = scan.measure_shape((1, 3, 9), args)
    assert forward["median"] > 0 and backward["skipped"] == "quadratic" and backward["median"] is None


def test_mambapy_computes_the_same():
    pytest.importorskip("mambapy.pscan")
    inputs = {name: tensor.double() for name, tensor in scan.make_inputs(2, 5, 13, 4).items()}
    grad = torch.ones_like(inputs["u"])
    out, gradients = scan.run_backward(scan.mambapy_scan, inputs, grad)
    wanted, wanted_gradients = scan.run_backward(scan.package_scan("reference"), inputs, grad)
    torch.testing.assert_close(out, wanted)
    for gradient, wanted_gradient in zip(gradients, wanted_gradients):
        torch.testing.assert_close(gradient, wanted_gradient)


@pytest.mark.parametrize("text", ["1024", "2x3", "2x3xfour", "0x3x4"])
def test_shapes_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match=text):
        scan.parse_shape(text)


@pytest.mark.parametrize(
    ("missing", "names"),
    [
        ((), ["torch", "triton", "mamba_ssm", "mamba_ssm, copying"]),
        (("mamba_ssm",), ["torch", "triton"]),
        (("triton", "mamba_ssm"), ["torch"]),
    ],
)
def test_the_candidates_on_a_gpu_are_those_that_import(missing, names, monkeypatch, capsys):
    monkeypatch.setattr(scan, "missing_backend", lambda name: f"no {name}" if name in missing else None)
    assert list(scan.make_candidates("cuda")) == names
    assert capsys.readouterr().out.splitlines() == [f"Skipping {name}: no {name}" for name in missing]


def test_the_floor_moves_every_tensor_once():
    inputs = scan.make_inputs(2, 5, 9, 4)
    sequence, states = 2 * 5 * 9 * 4, 2 * 4 * 9 * 4  # bytes of u, delta, z or the output; of B or C
    read = 3 * sequence + 2 * states + (5 * 4 + 5 + 5) * 4
    assert scan.bytes_moved(inputs, "forward") == read + sequence
    assert scan.bytes_moved(inputs, "forward + backward") == 3 * read + 2 * sequence


def test_bandwidth_is_that_of_a_read_and_a_write(monkeypatch):
    times = iter([2.0, 1.0, 4.0])
    monkeypatch.setattr(scan, "time_call", lambda call, device: call() is None or next(times))
    assert scan.measure_bandwidth(torch.device("cpu"), elements=8, repeats=3) == 2 * 8 * 4 / 1.0


def test_a_table_of_a_gpu_has_times_over_the_floor(capsys):
    row = {"shape": [1, 2, 3], "candidate": "triton", "mode": "forward", "output_error": 1e-7, "gradient_error": None}
    row |= {"skipped": None, "median": 0.0625, "times_mamba_ssm": 1.25, "times_floor": 2.5}
    wrong = {"candidate": "torch", "skipped": "wrong", "median": None, "times_mamba_ssm": None, "times_floor": None}
    scan.print_table([row, row | wrong])
    title, triton, torch_ = capsys.readouterr().out.splitlines()
    assert title.split()[-9:-5] == ["x", "mamba_ssm", "x", "floor"]
    assert triton.split()[-5:] == ["triton", "1.25", "2.50", "0.062", "1e-07"]
    assert torch_.split()[-3:] == ["torch", "wrong", "1e-07"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said(capsys):
    with pytest.raises(SystemExit):
        scan.main(["--device", "cuda"])
    assert "--device cuda: PyTorch finds no GPU here" in capsys.readouterr().err


def test_half_precision_is_compared_with_float64_on_the_same_inputs():
    pytest.importorskip("mambapy.pscan")
    args = argparse.Namespace(
        triton_settings=False, state_size=4, repeats=1, tolerance=2e-2, dtype="bfloat16", device=torch.device("cpu")
    )
    rows = scan.measure_shape((2, 5, 33), args)
    assert {row["candidate"] for row in rows} == set(scan.make_candidates())
    for row in rows:
        assert row["skipped"] is None and 1e-4 < row["output_error"] < 8e-3


def test_steps_can_be_adjacent():
    sequence = torch.randn(2, 3, 5)
    turned = scan.with_adjacent_steps(sequence)
    assert torch.equal(turned, sequence) and turned.stride() == (15, 1, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_runs_on_a_gpu(dtype, tmp_path):
    arguments = ["--shapes", "2x40x70", "--repeats", "2", "--dtype", dtype, "--output-dir", str(tmp_path)]
    scan.main(["--device", "cuda", *arguments])
    report = json.loads((tmp_path / "scan.json").read_text())
    assert all(row["skipped"] is None and row["times_floor"] > 0 for row in report["rows"])


def test_settings_of_the_triton_kernels_hold_for_forward_and_backward():
    seen = []

    def call(*arguments):
        seen.append((triton_operator.SHARED_DELTAS, triton_operator.FORWARD_STAGES, *arguments))

    scan.in_settings("triton, before", call, 1)
    scan.in_settings("triton", call, 2)
    assert seen == [(False, 1, 1), (True, 3, 2)]


def test_settings_of_the_triton_kernels_need_a_gpu(capsys):
    with pytest.raises(SystemExit):
        scan.main(["--triton-settings"])
    assert "--triton-settings needs --device cuda" in capsys.readouterr().err

import argparse
import json
import math

import pytest
import torch

from benchmarks import scan


def test_reports_errors_times_and_ratios(tmp_path, capsys, monkeypatch):
    # A peer that needs no package stands in for mambapy; a scan that is wrong must not be timed.
    candidates = {
        "mambapy": scan.loop_scan,
        "torch": scan.package_scan("torch"),
        "wrong": lambda u, *rest, **named: 1.01 * scan.package_scan("torch")(u, *rest, **named),
        "nan": lambda u, *rest, **named: math.nan * scan.package_scan("torch")(u, *rest, **named),
    }
    monkeypatch.setattr(scan, "make_candidates", lambda: candidates)
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
    monkeypatch.setattr(scan, "make_candidates", lambda: {"Mamba's loop": scan.loop_scan})
    monkeypatch.setattr(scan, "MAX_LOOP_LENGTH_BACKWARD", 8)
    args = argparse.Namespace(state_size=2, repeats=1, tolerance=1e-4)
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

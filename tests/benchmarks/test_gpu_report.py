import json

import pytest

from benchmarks import gpu_report
from diffusers_pisdm.ops.common.backends import forced_backend
from diffusers_pisdm.ops.scan import triton_operator


def read(folder):
    return json.loads((folder / "gpu_report.json").read_text())


@pytest.mark.slow
def test_a_rehearsal_measures_every_part_and_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    def fail(args):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(gpu_report, "matrix_product_peak", fail)
    parts = [part for part in gpu_report.PARTS if part != "compiled"]  # which takes longer than all of these
    gpu_report.main(["--rehearse", "--output-dir", str(tmp_path), "--parts", *parts])
    report = read(tmp_path)
    assert "compiled" not in report
    assert report["left_out"] == {"peak: matrix product": "RuntimeError: out of luck"}
    (sampling,) = report["sampling"]
    assert sampling["graphs_difference"] == 0 and sampling["eager_ms_per_step"] > 0
    kernels, before = report["kernels"]
    assert kernels["kernels_per_layer"] == kernels["kernels"] / 4 and before["before"]
    assert sampling["times_as_fast_as_before"] > 0
    pisdm, dit, _ = report["training"]
    assert abs(dit["parameters"] / pisdm["parameters"] - 1) < 0.05
    for row in report["training"]:
        assert row["images_per_second"] > 0 and row["skipped_steps"] == 0
    (trainer,) = report["trainer"]
    assert trainer["times_as_fast"] == trainer["as_it_is_images_per_second"] / trainer["waiting_images_per_second"]
    (scan,) = report["scan"]
    assert {"numba", "torch"} <= {row["candidate"] for row in scan["rows"]}


def test_what_there_is_no_time_for_is_named(tmp_path):
    gpu_report.main(["--rehearse", "--minutes", "0", "--output-dir", str(tmp_path)])
    left_out = read(tmp_path)["left_out"]
    assert set(left_out.values()) == {"no time left"} and "sampling: 64 px" in left_out


def test_a_gpu_is_needed_but_for_a_rehearsal(monkeypatch, capsys):
    monkeypatch.setattr(gpu_report.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_report.main([])
    assert "--rehearse" in capsys.readouterr().err


def test_before_is_what_it_says():
    with gpu_report.kernels_of_before():
        assert forced_backend("modulation") == "torch" and triton_operator.FORWARD_STAGES == 1
    assert forced_backend("modulation") is None and triton_operator.FORWARD_STAGES > 1

"""The published checkpoint, sampled by schedulers that once drew noise from it, in a few steps of its first stage."""

import json
from pathlib import Path

import pytest

from benchmarks import schedulers


pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' schedulers on NumPy 2

MODEL = str(Path(__file__).parents[2] / "checkpoints" / "pisdm-emoji128")


@pytest.mark.slow
def test_heun_is_as_right_as_ddim_on_the_published_checkpoint(tmp_path, capsys):
    output = tmp_path / "report.json"
    names = ["DDIMScheduler", "HeunDiscreteScheduler", "CogVideoXDDIMScheduler", "EDMEulerScheduler"]
    arguments = ["--model", MODEL, "--num_stages", "1", "--steps", "10", "--reference_steps", "20", "--classes", "60"]
    schedulers.main([*arguments, "--schedulers", *names, "--output", str(output)])
    report = json.loads(output.read_text())
    (reference,) = report["reference"]
    ddim, heun, cog_video, edm = report["rows"]
    assert "EDM" in edm["refused"]
    assert cog_video["runs"][0]["stages"][0] == pytest.approx(ddim["runs"][0]["stages"][0], rel=1e-4)
    assert cog_video["settings"] == {"snr_shift_scale": 1.0}
    for row in (ddim, heun):
        (stage,) = row["runs"][0]["stages"]
        assert stage["distance"] < 0.25  # noise: above 1
        assert stage["contrast"] == pytest.approx(reference["contrast"], rel=0.3)
        assert stage["roughness"] == pytest.approx(reference["roughness"], rel=0.5)  # noise: several times
    out = capsys.readouterr().out
    assert out.count("HeunDiscreteScheduler") == 2 and "EDMEulerScheduler                  refused" in out

import json

import pytest

from benchmarks import block
from benchmarks.speed.block_training import OURS, SLOW
from benchmarks.speed.candidates import PISDM


NAMES = [PISDM, *block.PEERS_BY_BLOCK]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(block, "DEPTH", 24)  # 40 layers of width 64 are not as near to DiT's as 24

    def run(*arguments):
        block.main([*arguments, "--output-dir", str(tmp_path), "--device", "cpu", "--repeats", "1", "--width", "64"])
        return tmp_path, capsys.readouterr().out

    return run


def test_a_table(run):
    output, said = run("--image-sizes", "128", "64")
    report = json.loads((output / "block.json").read_text())
    rows = report["rows"]
    assert [(row["tokens"], row["model"]) for row in rows] == [(n, name) for n in (16, 64) for name in NAMES]
    assert max(report["errors"].values()) < 1e-5
    for row in rows:
        own = next(other for other in rows if other["model"] == PISDM and other["tokens"] == row["tokens"])
        times = row["median_seconds"] / own["median_seconds"]
        for kind in ("parameters", "token_parameters"):
            assert row[f"times_as_fast_by_{kind}"] == pytest.approx(times * own[kind] / row[kind])
        assert ("shares" in row) == (row["model"] == PISDM)
    assert [row["growth"] for row in rows[:3]] == [None] * 3
    assert rows[3]["growth"] == pytest.approx(rows[3]["median_seconds"] / rows[0]["median_seconds"])
    assert (output / "block.png").read_bytes().startswith(b"\x89PNG")
    assert "x DiT, tokens'" in said and "GiB" in said


def test_training(run):
    output, said = run("--training", "--image-sizes", "64")
    rows = json.loads((output / "block_training.json").read_text())["rows"]
    assert {row["tokens"] for row in rows} == {16} and {row["width"] for row in rows} == {64}
    assert OURS in said and SLOW in said


def test_wrong_arguments(run, capsys):
    for arguments, message in (
        (("--image-sizes", "100"), "100"),
        (("--training", "--dtype", "bfloat16"), "float32 on the CPU"),
    ):
        with pytest.raises(SystemExit):
            run(*arguments)
        assert message in capsys.readouterr().err

import json

import pytest
from PIL import Image

from diffusers_pisdm.training.metrics import append_metrics, forget_later_metrics, plot_loss_curves, read_metrics


def test_lines_are_added_read_and_forgotten(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert read_metrics(file) == []
    for step in (2, 4, 6):
        append_metrics(file, step, {"loss": step / 2})
    forget_later_metrics(file, 4)
    append_metrics(file, 6, {"loss": 0.5})
    assert read_metrics(file) == [{"step": 2, "loss": 1.0}, {"step": 4, "loss": 2.0}, {"step": 6, "loss": 0.5}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_half_a_line_of_a_killed_run_is_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    append_metrics(file, 2, {"loss": 1.0})
    with file.open("a") as lines:
        lines.write('{"step": 4, "lo')
    assert [row["step"] for row in read_metrics(file)] == [2]
    forget_later_metrics(file, 4)
    append_metrics(file, 4, {"loss": 0.5})
    assert [row["step"] for row in read_metrics(file)] == [2, 4]


def test_lines_that_are_no_rows_and_files_that_are_none_stop_nothing(tmp_path):
    file = tmp_path / "metrics.jsonl"
    append_metrics(file, 2, {"loss": 1.0})
    with file.open("a") as lines:
        lines.write("1" * 5000 + "\n[1]\n" + "[" * 10_000 + '\n{"step": "3"}\n')
    append_metrics(file, 4, {"loss": 0.5})
    forget_later_metrics(file, 4)
    assert [row["step"] for row in read_metrics(file)] == [2, 4]
    (tmp_path / "folder.jsonl").mkdir()
    assert read_metrics(tmp_path / "folder.jsonl") == []
    with pytest.raises(OSError, match=r"Cannot write .*folder\.jsonl"):
        forget_later_metrics(tmp_path / "folder.jsonl", 4)


def count_coloured(picture):
    return sum(count for count, (r, g, b, *_) in picture.getcolors(1 << 20) if not r == g == b)


def test_draws_losses_of_both_kinds(tmp_path):
    metrics, empty = tmp_path / "metrics.jsonl", tmp_path / "empty.jsonl"
    rows = [
        {"step": step, "train/denoising_1": 1 / step, "train/scale_invariant_1_2": 2 / step, "learning_rate": 1e-4}
        for step in range(1, 20)
    ]
    rows.append({"step": 19, "validation/denoising_1": 0.5})
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    empty.write_text("")
    plot_loss_curves(metrics, tmp_path / "curves.png")
    plot_loss_curves(empty, tmp_path / "nothing.png")
    with Image.open(tmp_path / "curves.png") as curves, Image.open(tmp_path / "nothing.png") as nothing:
        assert curves.width == 2 * nothing.width  # both kinds; axes without curves
        assert count_coloured(nothing) == 0 and count_coloured(curves) > 500


def test_there_is_a_panel_for_each_kind_of_loss(tmp_path):
    widths = []
    for count in (1, 2, 3):
        names = ["train/denoising_1", "train/denoising_1_t0-249", "train/scale_invariant_1_2"][:count]
        metrics = tmp_path / "metrics.jsonl"
        rows = [{"step": step, **dict.fromkeys(names, 1 / step)} for step in (1, 2)]
        metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
        plot_loss_curves(metrics, tmp_path / "curves.png")
        with Image.open(tmp_path / "curves.png") as curves:
            widths.append(curves.width)
    assert widths == [720, 1440, 2160]

from diffusers_pisdm.training.metrics_file import append_metrics, forget_later_metrics, read_metrics


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

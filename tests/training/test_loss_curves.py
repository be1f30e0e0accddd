import json

from PIL import Image

from diffusers_pisdm.training.loss_curves import plot_loss_curves


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

import json

from PIL import Image

from diffusers_pisdm.training.loss_curves import plot_loss_curves


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
        assert curves.size == nothing.size
        assert curves.tobytes() != nothing.tobytes()

import json

import numpy as np
import pytest

from benchmarks import training_variants
from benchmarks.training_variants import format_table, interval, summarize


def write_run(output, variant, seed, losses, distance=100.0):
    """The losses of (stages, images), as a run leaves them."""
    folder = output / variant / f"seed-{seed}"
    folder.mkdir(parents=True)
    np.save(folder / "held_out_losses.npy", losses)
    result = {"held_out": losses.mean(axis=1).tolist(), "scores": {"frechet_distance": distance}}
    (folder / "result.json").write_text(json.dumps(result))


def test_differences_are_paired_by_seed_and_image(tmp_path):
    """Images and seeds differ far more than variants do; only seeds that both have are compared."""
    random = np.random.default_rng(0)
    for seed in range(3):
        plain = random.uniform(1, 9, (2, 50)) + 10 * seed
        write_run(tmp_path, "without", seed, plain, 100 + seed)
        if seed < 2:
            noise = random.normal(0, 0.01, 50)
            write_run(tmp_path, "weight_1", seed, np.stack([plain[0] + 0.2, plain[1] - 0.2 + noise]))
            write_run(tmp_path, "decay", seed, plain + random.normal(0, 0.1, (2, 50)))
    write_run(tmp_path, "weight_1", 7, np.full((2, 50), 1e6))
    without, weight_1, decay = summarize(tmp_path)
    assert without["seeds"] == [0, 1, 2] and "differences" not in without
    shared = np.stack([np.load(tmp_path / "without" / f"seed-{seed}" / "held_out_losses.npy") for seed in (0, 1)])
    first, second = weight_1["differences"]
    assert first.percent == pytest.approx(100 * 0.2 / shared[:, 0].mean())
    assert (first.verdict, second.verdict) == ("worse", "better")
    assert second.low < second.percent < second.high < 0
    assert {found.verdict for found in decay["differences"]} == {"cannot be told"}
    table = format_table([without, weight_1, decay])
    assert "101.0 ± 1.0" in table and "better" in table and table.count("\n") == 4


def test_an_interval_holds_the_spread_of_seeds_and_of_images():
    random = np.random.default_rng(0)
    seeds, images = np.array([[-1.0], [0.0], [1.0]]), random.normal(0, 1, (1, 400))
    low, high = interval(np.broadcast_to(seeds, (3, 400)), random)
    assert low == pytest.approx(-1, abs=0.4) and high == pytest.approx(1, abs=0.4)  # three seeds tell little
    low, high = interval(images, random)
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)  # of a mean of 400


@pytest.fixture
def compare(monkeypatch, tmp_path, real_image_dir, capsys):
    """The benchmark at a size of seconds."""
    shape = {"patch_size": 2, "in_channels": 3, "num_layers": 2, "hidden_size": 16, "state_size": 4}
    stages = [{"sample_size": 4, **shape}, {"sample_size": 8, "low_res_channels": 3, **shape}]
    monkeypatch.setattr(training_variants, "STAGES", stages)
    monkeypatch.setattr(training_variants, "RESAMPLES", 20)

    def compare(*arguments):
        data = ("--data_dir", str(real_image_dir), "--held_out_split", "train", "--output", str(tmp_path))
        sampling = ("--num_samples", "4", "--num_inference_steps", "1")
        training_variants.main([*data, *sampling, "--steps", "2", "--seeds", "0", *arguments])
        return capsys.readouterr().out

    return compare


@pytest.mark.slow
def test_variants_are_trained_once_and_compared(compare, tmp_path):
    compare("--variants", "without", "decay")
    made = (tmp_path / "without" / "seed-0" / "result.json").stat().st_mtime_ns
    table = compare("--variants", "without", "decay", "min_snr", "beta")
    assert (tmp_path / "without" / "seed-0" / "result.json").stat().st_mtime_ns == made
    rows = json.loads((tmp_path / "variants.json").read_text())["variants"]
    assert [row["variant"] for row in rows] == ["without", "decay", "min_snr", "beta"] and "min-SNR" in table
    assert rows[3]["held_out"] != rows[0]["held_out"]  # only its optimizer differs
    assert all(row["frechet_distances"][0] > 0 for row in rows)
    assert (tmp_path / "variants.png").stat().st_size > 1000 and not list(tmp_path.glob("*/*/checkpoint-*"))
    with pytest.raises(SystemExit, match="steps was 2, is 3"):
        compare("--variants", "without", "--steps", "3")


@pytest.mark.slow
def test_held_out_losses_do_not_depend_on_the_variants_weights(compare, tmp_path):
    """Before any step, all variants of a seed are the same models."""
    compare("--variants", "without", "min_snr", "weight_1", "--steps", "0")
    losses = [np.load(file) for file in sorted(tmp_path.glob("*/seed-0/held_out_losses.npy"))]
    assert len(losses) == 3 and losses[0].shape[0] == 2
    assert all(np.array_equal(losses[0], other) for other in losses[1:])

"""`pisdm convert-dim`: from DiM's file to a pipeline that draws; what is not its file is recognised."""

import io
import json
import os
import pickle
import re
import shutil
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverSinglestepScheduler
from safetensors.torch import load_file, save_file

from diffusers_pisdm import DIM_SIZES, DiMTransformer2DModel, PISDMCascadePipeline
from diffusers_pisdm.commands import convert_dim, publish
from diffusers_pisdm.models.dim_conversion import convert_dim_weights, dim_config
from diffusers_pisdm.models.dim_file import LEGACY_START
from diffusers_pisdm.publishing.hub import prepare_upload
from tests.models.tiny_vae import make_kl
from tests.support.small_disk import small_disk


DATA = Path(__file__).parents[1] / "data" / "dim"
LAST = "proj_out_2.bias"


def oracle_weights(case="rho_l5_grid6"):
    return {name: tensor.float() for name, tensor in load_file(DATA / case / "nnet_ema.safetensors").items()}


@pytest.fixture
def checkpoint(tmp_path):
    """As DiM's training leaves it: a bare state dict, beside the raw weights and the optimizer's state."""
    folder = tmp_path / "425000.ckpt"
    folder.mkdir()
    torch.save(oracle_weights(), folder / "nnet_ema.pth")
    return folder / "nnet_ema.pth"


def convert(checkpoint, output_dir, *more):
    convert_dim.main([str(checkpoint), "--output_dir", str(output_dir), "--padding", "raster", *more])
    return output_dir


def refusal(checkpoint, output_dir, *more) -> str:
    with pytest.raises(SystemExit) as error:
        convert(checkpoint, output_dir, *more)
    assert not output_dir.exists() or not any(output_dir.iterdir())
    return str(error.value)


def test_the_folder_draws_what_the_model_predicts(checkpoint, tmp_path, capsys):
    make_kl(latent_channels=4).save_pretrained(tmp_path / "vae")
    folder = convert(checkpoint.parent, tmp_path / "dim", "--vae", str(tmp_path / "vae"))
    out, err = capsys.readouterr()
    assert re.search("5 layers of width 32.*latents of 12 x 12.*\n.*2 long skips.*\nNo licence", out)
    assert "AutoencoderKL" not in err
    pipe = PISDMCascadePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    weights = oracle_weights()
    model = DiMTransformer2DModel(**dim_config(weights, "raster"))
    model.load_state_dict(convert_dim_weights(weights, dict(model.config)))
    assert all(torch.equal(a, b) for a, b in zip(pipe.transformer.parameters(), model.parameters(), strict=True))
    assert pipe.config.default_guidance_scale == 1.7 and pipe.config.default_num_inference_steps == 50
    images = pipe([3, 10 - 1], num_inference_steps=4, output_type="pt").images
    assert images.shape == (2, 3, 48, 48) and images.isfinite().all()
    assert pipe([3], height=32, width=64, num_inference_steps=2, output_type="pt").images.shape == (1, 3, 32, 64)


def test_without_an_autoencoder_it_draws_latents_and_says_so(checkpoint, tmp_path, capsys):
    pipe = PISDMCascadePipeline.from_pretrained(convert(checkpoint, tmp_path / "dim"))
    assert re.search("no autoencoder.*--vae", capsys.readouterr().out)
    assert pipe([3], num_inference_steps=2, output_type="latent").images.shape == (1, 4, 12, 12)


def test_half_precision_on_disk(checkpoint, tmp_path):
    folder = convert(checkpoint, tmp_path / "dim", "--dtype", "bfloat16")
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    kept = {name for name, weight in weights.items() if weight.dtype == torch.float32}
    assert {name.split(".")[-1] for name in kept} == {"A_log", "D", "dt_bias"}
    assert {weight.dtype for name, weight in weights.items() if name not in kept} == {torch.bfloat16}


def test_settings_are_dims(checkpoint, tmp_path):
    pipe = PISDMCascadePipeline.from_pretrained(convert(checkpoint, tmp_path / "dim"))
    assert type(pipe.scheduler) is DPMSolverSinglestepScheduler
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.check_stages()  # it does not clip latents
    pipe.scheduler = DPMSolverSinglestepScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.set_timesteps(50)
    # 50 evaluations, uniform in time from 1000 to 20.98 as DiM counts, to within the rounding of diffusers' timesteps.
    dims = 1000 - 19.98 * torch.arange(50) - 1
    assert (pipe.scheduler.timesteps - dims).abs().max() <= 1
    card = (tmp_path / "dim" / "README.md").read_text()
    assert "guidance_scale=1.7" in card and "s = 0.7" in card and 'from_pretrained("dim"' in card
    assert "No licence is stated" in card and "2405.14224" in card and "{" not in card.split("```bibtex")[0]


def test_the_scheduler_is_dims_sampler():
    """Against what DiM's own solver makes of 64 noises, for data that is a mixture of Gaussians of variance 0.05."""
    data = load_file(DATA / "sampler.safetensors")
    means, sample, theirs = data["means"], data["z"], data["result_50"]  # (K, D), (N, D), (N, D)
    scheduler = convert_dim.make_scheduler()
    scheduler.set_timesteps(convert_dim.NUM_STEPS)
    for t in scheduler.timesteps:
        abar = scheduler.alphas_cumprod[t].double()
        distances = ((sample[:, None] - abar.sqrt() * means) ** 2).sum(-1)  # (N, K)
        variance = 0.05 * abar + 1 - abar
        shares = (-distances / (2 * variance)).softmax(-1)[..., None]  # (N, K, 1)
        towards = 0.05 * abar.sqrt() / variance * (sample[:, None] - abar.sqrt() * means)  # (N, K, D)
        clean = (shares * (means + towards)).sum(1)  # (N, D)
        noise = (sample - abar.sqrt() * clean) / (1 - abar).sqrt()  # (N, D)
        sample = scheduler.step(noise, t, sample).prev_sample
    assert (sample - theirs).square().mean().sqrt() < 1e-4 * theirs.square().mean().sqrt()


def test_an_unknown_padding_rule_is_asked_for_by_its_option(checkpoint, tmp_path):
    with pytest.raises(SystemExit, match="Pass --padding: lateral or raster"):
        convert_dim.main([str(checkpoint), "--output_dir", str(tmp_path / "dim")])


def test_classes_of_imagenet():
    names = convert_dim.imagenet_classes()
    assert len(names) == len(set(names)) == 1000
    assert [names[i] for i in (0, 207, 517, 999)] == ["tench", "golden retriever", "crane", "toilet tissue"]


def test_publishing_needs_your_word(checkpoint, tmp_path, capsys):
    make_kl(latent_channels=4).save_pretrained(tmp_path / "vae")
    folder = convert(checkpoint, tmp_path / "dim", "--vae", str(tmp_path / "vae"))
    arguments = [str(folder), "someone/dim", "--dry_run"]
    with pytest.raises(SystemExit, match=r"no licence is stated[^`]*[^`]--i_have_the_right_to_publish\."):
        publish.main(arguments)
    # What was saved again, after training on, still says whose it is.
    PISDMCascadePipeline.from_pretrained(folder).save_pretrained(tmp_path / "again")
    with pytest.raises(SystemExit, match="no licence is stated"):
        publish.main([str(tmp_path / "again"), *arguments[1:]])
    consent = "--i_have_the_right_to_publish"
    for source in (folder, tmp_path / "again"):
        publish.main([str(source), *arguments[1:], consent])
        out = capsys.readouterr().out
        assert out.count("**No licence is stated") == out.count("2405.14224") == 1
        assert 'from_pretrained("someone/dim")' in out
        with pytest.raises(SystemExit, match=r"--license is 'mit', but .* no licence is stated"):
            publish.main([str(source), *arguments[1:], consent, "--license", "mit"])
        (tmp_path / "work").mkdir()
        files = prepare_upload(source, tmp_path / "work", "someone/dim", i_have_the_right_to_publish=True)
        assert not [name for name, file in files.items() if str(tmp_path).encode() in file.read_bytes()]
        shutil.rmtree(tmp_path / "work")


@pytest.mark.parametrize(("factor", "pixels"), [(None, 256), (4, 128)])
def test_a_card_claims_only_what_it_knows(checkpoint, tmp_path, factor, pixels):
    """Of training and quality only for the published shapes, of size for the autoencoder that is there."""
    pipe = PISDMCascadePipeline.from_pretrained(convert(checkpoint, tmp_path / "dim"))
    pipe.transformer.register_to_config(**DIM_SIZES["H"], sample_size=32, num_classes=1000)
    pipe.vae = None if factor is None else make_kl(latent_channels=4)
    card = convert_dim.make_card(pipe, "dim", 123)
    assert "trained by its authors" in card and "FID 2.40" in card and f"{pixels} x {pixels}" in card
    assert ("no autoencoder" in card) == (factor is None) and "The file has 123" in card
    pipe.transformer.register_to_config(num_layers=3)
    card = convert_dim.make_card(pipe, "dim", 123)
    assert "by its authors on" not in card and "FID" not in card and "of another size" in card


# --- What is not DiM's file ------------------------------------------------------------------------------------------


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    ("name", "content", "explained"),
    [
        ("nnet.pth", None, r"raw weights.*nnet_ema\.pth"),
        ("optimizer.pth", {"state": {}, "param_groups": []}, r"optimizer's state.*nnet_ema\.pth"),
        ("step.pth", 425_000, "holds a int"),
        ("nested.pth", {"model": {"a": torch.ones(1)}}, "more than tensors by name: 'model'"),
        ("code.pth", {"a": Code()}, r"more than tensors \(posix\.mkdir\).*could run code"),
        ("other.pth", {"conv.weight": torch.ones(1)}, r"`pos_embed\.proj\.weight` is missing"),
    ],
)
def test_wrong_files_are_recognised(tmp_path, monkeypatch, name, content, explained):
    monkeypatch.chdir(tmp_path)
    torch.save(oracle_weights() if content is None else content, name)
    assert re.search(explained, refusal(name, tmp_path / "dim"))
    assert not Path("ran").exists()


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x80]) + data[at + 1 :]


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def torch_script() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "damage", "explained"),
    [
        ("nnet_ema.pth", lambda data: data[: len(data) // 2], r"truncated at [\d,]+ bytes.*again"),
        ("nnet_ema.pth", lambda data: b"<!DOCTYPE html><title>Virus scan warning", "is a web page.*again"),
        ("nnet_ema.pth", lambda data: b"", "is empty.*again"),
        ("nnet_ema.pth", lambda data: b"GIF89a", "not saved by PyTorch.*again"),
        ("nnet_ema.pth", lambda data: pickle.dumps({"a": Code()}), "plain pickle.*could run code"),
        ("nnet_ema.pth", lambda data: LEGACY_START + b"\x80", "is damaged.*again"),
        ("nnet_ema.pth", lambda data: flip(data, data.index(b"proj_out_2.bias")), r"checksum of \S*/data\.pkl.*again"),
        ("nnet_ema.pth", lambda data: flip(data, len(data) // 2), r"checksum of \S*/data/\d+ is wrong.*again"),
        (
            "drive.zip",
            lambda data: zipped({"425000.ckpt/nnet_ema.pth": data}),
            r"unzip it.*425000\.ckpt/nnet_ema\.pth",
        ),
        ("other.zip", lambda data: zipped({"readme": data}), "not one of PyTorch"),
        ("program.pth", lambda data: torch_script(), "TorchScript program, which is code(?!.*weights_only)"),
        ("dim.safetensors", lambda data: data[:100], "not a safetensors file"),
    ],
)
def test_damaged_files_are_recognised(checkpoint, tmp_path, name, damage, explained):
    path = tmp_path / name
    path.write_bytes(damage(checkpoint.read_bytes()))
    assert re.search(explained, refusal(path, tmp_path / "dim"))


@pytest.mark.parametrize(
    ("change", "explained"),
    [
        (lambda w: {"ema": w, "step": 3}, r"under 'ema'.*torch\.save\(content\['ema'\]"),
        (lambda w: {**w, "step": 5}, r"by name: 'step'.*torch\.save"),
        (lambda w: {**w, 7: torch.ones(1)}, "by name: 7"),
        (
            lambda w: {f"module.{name}": weight for name, weight in w.items()},
            r"'module\.' before each name.*removeprefix",
        ),
        (lambda w: {**w, LAST: w[LAST].to(torch.int8)}, r"`proj_out_2.bias`.*strided int8"),
        (lambda w: {**w, LAST: w[LAST].to_sparse()}, r"`proj_out_2.bias`.*sparse_coo"),
        (lambda w: {**w, LAST: w[LAST].to("meta")}, r"`proj_out_2.bias`.*no data"),
        (lambda w: {**w, LAST: torch.full_like(w[LAST], 1e30)}, r"`proj_out_2.bias` does not fit float16.*bfloat16"),
        (lambda w: {**w, LAST: w[LAST] / 0}, r"`proj_out_2.bias` holds NaN"),
        (lambda w: {**w, "pos_embed.proj.weight": torch.ones(32, 3, 0, 0)}, r"`pos_embed.proj.weight` has shape"),
        (lambda w: {**w, "proj_out_2.weight": torch.ones(24, 32)}, r"`proj_out_2.weight` makes 6 channels of 4"),
        (lambda w: {**w, "\x1b[31m\n" + "a" * 5000: w[LAST]}, r"also holds \\x1b\[31m\\na{20,60}…a+\."),
        (lambda w: {**w, "transformer_blocks.99999999999.x": w[LAST]}, r"a DiM with 6 layers.*lacks"),
    ],
)
def test_other_contents_are_named(checkpoint, tmp_path, change, explained):
    torch.save(change(oracle_weights()), checkpoint)
    message = refusal(checkpoint, tmp_path / "dim", "--dtype", "float16")
    assert re.search(explained, message) and len(message) < 1500


@pytest.mark.parametrize("same", ["legacy", "safetensors", "tied"])
def test_other_forms_of_the_same_weights_convert(checkpoint, tmp_path, same):
    weights = oracle_weights()
    if same == "tied":
        weights["label_emb.weight"] = weights["adaln_single.emb.class_embedder.embedding_table.weight"]
    if same == "safetensors":
        save_file(weights, checkpoint)
    else:
        torch.save(weights, checkpoint, _use_new_zipfile_serialization=same == "tied")
    saved = load_file(convert(checkpoint, tmp_path / "dim") / "transformer" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(saved["class_token_embedding.weight"], weights["label_emb.weight"])


@pytest.mark.parametrize(
    ("output", "explained"),
    [("/proc/x", "Cannot write"), ("file/below", "Cannot write.*not a folder"), ("file", "is a file")],
)
def test_outputs_that_cannot_be_are_told_before_anything_is_read(tmp_path, output, explained):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=explained):
        convert(tmp_path / "lost.pth", tmp_path / output)


@pytest.mark.parametrize(
    ("vae", "explained"),
    [("", "empty"), ("./lost", "no folder"), ("pipeline", "Pass pipeline/vae"), ("file", "holds no autoencoder")],
)
def test_an_autoencoder_that_is_none(checkpoint, tmp_path, monkeypatch, vae, explained):
    (tmp_path / "pipeline" / "vae").mkdir(parents=True)
    (tmp_path / "pipeline" / "vae" / "config.json").touch()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(convert_dim, "make_pipeline", None)  # told before anything is converted
    assert re.search(f"--vae: .*{explained}", refusal(checkpoint, tmp_path / "dim", "--vae", vae))


def test_weights_that_do_not_belong_together(checkpoint, tmp_path):
    weights = oracle_weights()
    weights["extra"] = weights.pop("label_emb.weight")
    torch.save(weights, checkpoint)
    assert "`label_emb.weight` is missing" in refusal(checkpoint, tmp_path / "dim")
    weights = oracle_weights()
    weights["proj_out_2.bias"][3] = float("nan")
    torch.save(weights, checkpoint)
    assert "`proj_out_2.bias`" in refusal(checkpoint, tmp_path / "dim")
    assert "does not exist" in refusal(tmp_path / "lost.pth", tmp_path / "dim")


def test_a_full_disk_is_told_before_and_during_the_writing(checkpoint, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total free")
    with monkeypatch.context() as context:
        context.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**5))
        assert re.search(r"needs 1\.\d MB.* 0\.1 MB left.*bfloat16", refusal(checkpoint, tmp_path / "dim"))

    with small_disk(100_000):
        assert "too large" in refusal(checkpoint, tmp_path / "dim")
    assert not (tmp_path / "dim").exists()


def test_a_folder_may_hold_the_weights_as_safetensors(checkpoint, tmp_path):
    (tmp_path / "theirs").mkdir()
    save_file(oracle_weights(), tmp_path / "theirs" / "nnet_ema.safetensors")
    folder = convert(tmp_path / "theirs", tmp_path / "dim")
    assert (folder / "transformer" / "diffusion_pytorch_model.safetensors").is_file()


def test_a_folder_with_files_is_left_alone(checkpoint, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("notes")
    with pytest.raises(SystemExit, match=r"mine exists.*new --output_dir"):
        convert(checkpoint, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_an_autoencoder_of_other_latents(checkpoint, tmp_path):
    make_kl(latent_channels=3).save_pretrained(tmp_path / "vae")
    assert "4 channels" in refusal(checkpoint, tmp_path / "dim", "--vae", str(tmp_path / "vae"))


def test_the_transformer_remembers_whose_weights_it_has(checkpoint, tmp_path):
    folder = convert(checkpoint, tmp_path / "dim")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    assert "DiM-DiffusionMamba" in config["_rights"] and config["padding"] == "raster"

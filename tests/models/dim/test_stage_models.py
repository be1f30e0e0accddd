"""DiM as the first stage of a cascade: the pipeline, its classes, its LoRA."""

import pytest
import torch
from diffusers import DDIMScheduler
from peft import LoraConfig

from diffusers_pisdm import DiMTransformer2DModel, PISDMCascadePipeline, PISDMTransformer2DModel
from diffusers_pisdm.models.stage_models import make_stage, stage_class, stage_config
from diffusers_pisdm.models.transformer_pisdm import get_class_embedding, set_class_embedding
from diffusers_pisdm.schedulers import swap_scheduler
from diffusers_pisdm.training.fine_tuning import add_lora, new_cascade, resize_class_embedding, start_cascade


DIM = {"sample_size": 8, "num_layers": 3, "hidden_size": 32, "state_size": 4, "padding": "raster"}
SECOND = {"sample_size": 16, "num_layers": 2, "hidden_size": 16, "state_size": 4, "low_res_channels": 4}
NAMES = ["cat", "dog", "owl"]


def make_cascade(num_stages=2) -> PISDMCascadePipeline:
    torch.manual_seed(0)
    stages = [DiMTransformer2DModel(**DIM, num_classes=3), PISDMTransformer2DModel(**SECOND, num_classes=3)]
    for parameter in stages[0].parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)  # some start at zero
    pipe = PISDMCascadePipeline.from_stages(stages[:num_stages], DDIMScheduler(clip_sample=False), id2label=NAMES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, labels=("dog", "owl"), **arguments):
    generators = [torch.Generator().manual_seed(i) for i in range(len(labels))]
    arguments = {"num_inference_steps": 2, "output_type": "latent", **arguments}
    return pipe(list(labels), generator=generators, **arguments).images


def test_latents_are_not_clipped():
    pipe = make_cascade(1)
    with pytest.raises(ValueError, match=r"`scheduler` clips.*latents.*clip_sample=False"):
        pipe.scheduler = DDIMScheduler()
        draw(pipe)
    swap_scheduler(pipe, "DDPMScheduler")
    assert draw(pipe).abs().max() > 1


def test_latents_without_an_autoencoder_are_not_made_pictures():
    with pytest.raises(ValueError, match=r"latents of 4 channels.*`vae=`.*`output_type=.latent.`"):
        draw(make_cascade(), output_type="pil")


@pytest.mark.parametrize("num_stages", [1, 2])
def test_a_pipeline_with_dim_below_is_saved_and_loaded(tmp_path, num_stages):
    pipe = make_cascade(num_stages)
    images = draw(pipe)
    assert images.shape == (2, 4, 8 * num_stages, 8 * num_stages)
    pipe.save_pretrained(tmp_path)
    loaded = PISDMCascadePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.transformer) is DiMTransformer2DModel
    assert torch.equal(draw(loaded), images)


def test_guidance_and_mixes_of_classes_reach_dim():
    pipe = make_cascade(1)
    assert (draw(pipe, guidance_scale=1.0) - draw(pipe, guidance_scale=3.0)).abs().max() > 1e-3
    alone, mixed = draw(pipe, ["dog"]), draw(pipe, [{"dog": 0.5, "owl": 0.5}])
    assert (alone - mixed).abs().max() > 1e-3
    torch.testing.assert_close(draw(pipe, [{"dog": 1.0}]), alone)


def test_dim_is_only_a_first_stage():
    stages = [PISDMTransformer2DModel(**{**SECOND, "low_res_channels": None}, num_classes=3)]
    with pytest.raises(ValueError, match=r"`transformer_2` has `low_res_channels=None`.*`in_channels=4`"):
        PISDMCascadePipeline.from_stages([*stages, DiMTransformer2DModel(**DIM, num_classes=3)], DDIMScheduler())


def test_configurations_name_their_class():
    pipe = make_cascade()
    configs = [stage_config(stage) for stage in pipe.stages]
    assert configs[0].items() >= {"_class_name": "DiMTransformer2DModel", **DIM}.items()
    assert "_class_name" not in configs[1] and "num_classes" not in configs[0]
    for stage, config in zip(pipe.stages, configs):
        again = make_stage(config, num_classes=3)
        assert type(again) is type(stage) and stage_config(again) == config
    with pytest.raises(ValueError, match=r"`_class_name`.*PISDM.*, DiMTransformer2DModel, got 'DiM'"):
        stage_class({"_class_name": "DiM"})


def test_new_classes_get_rows_in_both_tables():
    model = make_cascade().transformer
    before = [table.weight.clone() for table in (model.class_embedding, model.class_token_embedding)]
    resize_class_embedding(model, NAMES, ["owl", "fox"])
    for old, table in zip(before, (model.class_embedding, model.class_token_embedding)):
        assert torch.equal(table.weight, old[[2, 3, 3]])
    assert model.config.num_classes == 2 and "class_factors" not in model.config
    weight = torch.randn(6, 64)
    set_class_embedding(model, weight)
    assert torch.equal(get_class_embedding(model), weight) and torch.equal(
        model.class_embedding.weight, weight[:, :32]
    )


def test_a_stage_is_added_to_dim():
    pipe = make_cascade(1)
    stages = start_cascade(pipe, [stage_config(pipe.transformer), SECOND], NAMES)
    assert stages[0] is pipe.transformer and stages[1].config.low_res_channels == 4
    with pytest.raises(ValueError, match=r"Stage 1 .* is a DiM.*, but .* a PISDM.*`_class_name`"):
        start_cascade(pipe, [{**SECOND, "low_res_channels": None}], NAMES)
    with pytest.raises(ValueError, match="`padding` is 'lateral' instead of 'raster'"):
        start_cascade(pipe, [{**stage_config(pipe.transformer), "padding": "lateral"}], NAMES)
    with pytest.raises(ValueError, match=r"DiM.* no factors"):
        new_cascade([stage_config(pipe.transformer)], ["a/b"], "/")


def test_lora_with_classes_of_its_own(tmp_path):
    pipe = make_cascade(1)
    resize_class_embedding(pipe.transformer, NAMES, ["fox", "dog"])
    pipe.register_to_config(id2label={0: "fox", 1: "dog"})
    add_lora(pipe.transformer, 2, 2, train_class_embedding=True)
    assert {name for name, p in pipe.transformer.named_parameters() if p.requires_grad and "lora" not in name} == {
        "class_embedding.weight",
        "class_token_embedding.weight",
    }
    adapted = {name.split(".lora_")[0] for name, p in pipe.transformer.named_parameters() if ".lora_" in name}
    blocks = {f"transformer_blocks.{i}.mixer.{layer}" for i in range(3) for layer in ("in_proj", "out_proj")}
    assert adapted == blocks | {"skip_projections.0"}
    for parameter in pipe.transformer.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    expected = draw(pipe, ["fox", "dog"])
    pipe.save_lora_weights(tmp_path, save_class_embeddings=True)
    base = make_cascade(1)
    before = draw(base)
    base.load_lora_weights(tmp_path)
    torch.testing.assert_close(draw(base, ["fox", "dog"]), expected)
    base.unload_lora_weights()
    assert torch.equal(draw(base), before)


def test_an_adapter_made_with_peft_itself_loads(tmp_path):
    pipe = make_cascade(1)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["in_proj"], init_lora_weights=False))
    expected = draw(pipe)
    pipe.save_lora_weights(tmp_path)
    base = make_cascade(1)
    base.load_lora_weights(tmp_path)
    torch.testing.assert_close(draw(base), expected)


@pytest.mark.parametrize("label", [-1, 4])
@pytest.mark.parametrize(
    "config", [{**DIM, "_class_name": "DiMTransformer2DModel"}, {**SECOND, "low_res_channels": None}]
)
def test_unknown_labels_are_told(config, label):
    model = make_stage({**config, "in_channels": 4}, num_classes=3)
    with pytest.raises(
        ValueError, match=f"`class_labels` has to be in 0 to 3 .*holds {min(1, label)} to {max(1, label)}"
    ):
        model(torch.zeros(2, 4, 8, 8), 0, torch.tensor([1, label]))

"""LoRA adapters of a cascade: trained, saved, loaded elsewhere, combined, fused and removed."""

import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_pisdm import PISDMCascadePipeline
from diffusers_pisdm.models.transformer_pisdm import set_class_embedding
from diffusers_pisdm.training.fine_tuning import add_lora, resize_class_embedding
from tests.models.tiny_model import make_inputs
from tests.pipelines.tiny_cascade import generators, make_cascade
from tests.support.hub_server import serve_hub


pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # diffusers' schedulers on NumPy 2
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),  # two adapters are meant
]

FILE = "pytorch_lora_weights.safetensors"
OLD_NAMES = list("abcdefghij")
NEW_NAMES = ["c", "new", "a"]


def run(pipe, labels=(1, 2), **arguments):
    """Latents: images are clipped, which would hide a difference."""
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 2, "output_type": "latent", "generator": generators(0, 1), **arguments}
    return pipe(list(labels), **arguments).images


def train(transformer, seed):
    """Three steps of Adam on what trains, by a loss that is different for each class."""
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    generator = torch.Generator().manual_seed(seed)
    size = transformer.config.sample_size
    for _ in range(3):
        inputs = make_inputs(transformer, transformer.config.num_classes, size, size)
        inputs["class_labels"] = torch.arange(transformer.config.num_classes)
        target = torch.randn(inputs["hidden_states"].shape, generator=generator)
        (transformer(**inputs).sample - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def make_trained(stages=("transformer", "transformer_2"), class_names=None, seed=0):
    """A cascade with a trained adapter on some stages, and with other classes if asked for."""
    pipe = make_cascade(2, id2label=class_names or OLD_NAMES)
    for name in ("transformer", "transformer_2"):
        transformer = getattr(pipe, name)
        if class_names:
            resize_class_embedding(transformer, OLD_NAMES, class_names)
        if name in stages:
            torch.manual_seed(seed)
            add_lora(transformer, rank=2, alpha=4, train_class_embedding=bool(class_names))
            train(transformer, seed)
    return pipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of an adapter on both stages, and what the trained pipeline makes."""
    pipe, folder = make_trained(), tmp_path_factory.mktemp("adapter")
    pipe.save_lora_weights(folder)
    return folder, run(pipe)


@pytest.fixture(scope="module")
def upper(tmp_path_factory):
    """Likewise of another adapter, on the second stage only."""
    pipe, folder = make_trained(["transformer_2"], seed=1), tmp_path_factory.mktemp("upper")
    pipe.save_lora_weights(folder)
    return folder, run(pipe)


@pytest.fixture(scope="module")
def with_classes(tmp_path_factory):
    """Likewise of an adapter that brings classes of its own."""
    pipe, folder = make_trained(class_names=NEW_NAMES), tmp_path_factory.mktemp("classes")
    pipe.save_lora_weights(folder, save_class_embeddings=True)
    return folder, run(pipe, NEW_NAMES[:2])


@pytest.fixture(scope="module")
def base():
    """What the cascade makes without an adapter."""
    return run(make_cascade(2, id2label=OLD_NAMES))


@pytest.fixture
def pipe():
    return make_cascade(2, id2label=OLD_NAMES)


def assert_differ(first, second):
    assert (first - second).abs().max() > 0.05


def adapted_layers(stages):
    return [module for stage in stages for module in stage.modules() if isinstance(module, BaseTunerLayer)]


# Saving and loading


def test_round_trip(pipe, trained, base):
    folder, images = trained
    assert_differ(images, base)
    pipe.load_lora_weights(folder)
    torch.testing.assert_close(run(pipe), images)
    assert pipe.get_list_adapters() == {"transformer": ["default_0"], "transformer_2": ["default_0"]}
    assert pipe.get_active_adapters() == ["default_0"]


def test_the_file_is_as_diffusers_writes_it(trained):
    weights = load_file(trained[0] / FILE)
    assert {key.split(".")[0] for key in weights} == {"transformer", "transformer_2"}
    assert weights["transformer_2.transformer_blocks.0.mixer.in_proj.lora_A.weight"].shape == (2, 16)
    with safe_open(trained[0] / FILE, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (metadata["transformer.r"], metadata["transformer_2.lora_alpha"]) == (2, 4)


def test_saved_again(pipe, trained, tmp_path):
    pipe.load_lora_weights(trained[0], adapter_name="first")
    pipe.save_lora_weights(tmp_path, weight_name="again.safetensors")
    second = make_cascade(2)
    second.load_lora_weights(tmp_path, weight_name="again.safetensors")
    torch.testing.assert_close(run(second), trained[1])


def test_the_configuration_survives(pipe, base, tmp_path):
    trained = make_cascade(2)
    options = {
        "rank_pattern": {"out_proj": 3},
        "alpha_pattern": {"in_proj": 12},
        "use_rslora": True,
        "use_dora": True,
    }
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["in_proj", "out_proj"], init_lora_weights=False, **options)
    trained.transformer_2.add_adapter(config)
    trained.save_lora_weights(tmp_path)
    pipe.load_lora_weights(tmp_path)
    loaded = pipe.transformer_2.peft_config["default_0"]
    assert {name: getattr(loaded, name) for name in options} == options
    assert_differ(run(pipe), base)
    torch.testing.assert_close(run(pipe), run(trained))


def test_file_subfolder_and_state_dict(trained, tmp_path):
    folder, images = trained
    shutil.copytree(folder, tmp_path / "step-1")
    (tmp_path / FILE).write_bytes(b"not the one that is asked for")
    sources = [(folder / FILE, {}), (tmp_path, {"subfolder": "step-1"}), (str(folder), {"weight_name": FILE})]
    for source, arguments in sources:
        pipe = make_cascade(2)
        pipe.load_lora_weights(source, **arguments)
        torch.testing.assert_close(run(pipe), images)

    pipe, state_dict = make_cascade(2), PISDMCascadePipeline.lora_state_dict(folder)
    pipe.load_lora_weights(state_dict)
    assert pipe.transformer.peft_config["default_0"].lora_alpha == 2  # as documented: the rank
    pipe.set_adapters("default_0", 2.0)
    torch.testing.assert_close(run(pipe), images)


def test_hub(pipe, trained, tmp_path, monkeypatch):
    folder, images = trained
    with serve_hub({"someone/adapter": folder}) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # the server does not speak it
        pipe.load_lora_weights("someone/adapter", cache_dir=tmp_path)
        with pytest.raises(OSError, match=r"not appear to have a file named other\.safetensors\. Pass the file,"):
            pipe.load_lora_weights("someone/adapter", weight_name="other.safetensors", cache_dir=tmp_path)
    torch.testing.assert_close(run(pipe), images)
    pipe.unload_lora_weights()
    pipe.load_lora_weights("someone/adapter", cache_dir=tmp_path, local_files_only=True)
    torch.testing.assert_close(run(pipe), images)


def test_half_precision(trained):
    pipe = make_cascade(2).to(torch.bfloat16)
    before = run(pipe)
    pipe.load_lora_weights(trained[0])
    images = run(pipe)
    assert_differ(images, before)
    assert (images - trained[1]).abs().mean() < 0.1 * trained[1].abs().mean()


# Adapters in use


def test_scale(pipe, trained, base):
    pipe.load_lora_weights(trained[0], adapter_name="a")
    pipe.set_adapters("a", 0.0)
    torch.testing.assert_close(run(pipe), base)
    pipe.set_adapters("a", 0.5)
    assert_differ(run(pipe), base)
    assert_differ(run(pipe), trained[1])
    pipe.set_adapters("a")
    torch.testing.assert_close(run(pipe), trained[1])


def test_a_loaded_adapter_drops_nothing_out(pipe, tmp_path):
    source = make_cascade(2, id2label=OLD_NAMES)
    for stage in source.stages:
        stage.add_adapter(LoraConfig(r=2, lora_alpha=8, lora_dropout=0.5, target_modules=["in_proj"]))
        train(stage, 0)
        stage.eval()
    source.save_lora_weights(tmp_path)
    for stage in pipe.stages:
        stage.eval()  # as from_pretrained does
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(run(pipe), run(source))


def test_the_scale_of_a_call_is_not_that_of_another_thread(pipe, trained, base):
    pipe.load_lora_weights(trained[0])
    other, seen = PISDMCascadePipeline.from_pipe(pipe), []

    def draw_elsewhere(*arguments):
        with ThreadPoolExecutor(1) as pool:
            seen.append(pool.submit(run, other).result())
        seen.append(run(other))
        return {}

    torch.testing.assert_close(run(pipe, attention_kwargs={"scale": 0.0}, callback_on_step_end=draw_elsewhere), base)
    for images in seen:
        torch.testing.assert_close(images, trained[1])


def test_scale_of_a_stage(pipe, trained, base):
    pipe.load_lora_weights(trained[0], adapter_name="a")
    pipe.set_adapters("a", {"transformer": 0.0})
    images = pipe([1, 2], num_inference_steps=2, output_type="latent", generator=generators(0, 1), output_stages=True)
    expected = make_cascade(1)
    torch.testing.assert_close(images.stage_images[0], run(expected))
    assert_differ(images.images, base)


def test_disable_and_enable(pipe, trained, base):
    pipe.load_lora_weights(trained[0])
    pipe.disable_lora()
    torch.testing.assert_close(run(pipe), base)
    pipe.enable_lora()
    torch.testing.assert_close(run(pipe), trained[1])


def test_fuse_and_unfuse(pipe, trained, base):
    pipe.load_lora_weights(trained[0], adapter_name="a")
    pipe.fuse_lora()
    assert adapted_layers(pipe.stages) and all(layer.merged for layer in adapted_layers(pipe.stages))
    assert pipe.fused_loras == {"a"}
    torch.testing.assert_close(run(pipe), trained[1], atol=1e-4, rtol=1e-4)
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0
    assert not any(layer.merged for layer in adapted_layers(pipe.stages))
    torch.testing.assert_close(run(pipe), trained[1], atol=1e-4, rtol=1e-4)
    pipe.disable_lora()
    torch.testing.assert_close(run(pipe), base, atol=1e-4, rtol=1e-4)


def test_fuse_at_a_scale(pipe, trained):
    pipe.load_lora_weights(trained[0], adapter_name="a")
    pipe.set_adapters("a", 0.5)
    expected = run(pipe)
    pipe.set_adapters("a")
    pipe.fuse_lora(lora_scale=0.5)
    torch.testing.assert_close(run(pipe), expected, atol=1e-4, rtol=1e-4)
    pipe.unfuse_lora()
    pipe.set_adapters("a")
    torch.testing.assert_close(run(pipe), trained[1], atol=1e-4, rtol=1e-4)


def test_fuse_one_stage(pipe, trained):
    pipe.load_lora_weights(trained[0])
    pipe.fuse_lora(components=["transformer_2"])
    merged = [[layer.merged for layer in adapted_layers([transformer])] for transformer in pipe.stages]
    assert merged == [[False] * len(merged[0]), [True] * len(merged[1])]
    with pytest.raises(TypeError, match="fuse_unet"):
        pipe.fuse_lora(fuse_unet=True)  # what diffusers still swallows


def test_two_adapters(pipe, trained, upper, base):
    pipe.load_lora_weights(trained[0], adapter_name="both")
    pipe.load_lora_weights(upper[0], adapter_name="upper")
    assert pipe.get_list_adapters() == {"transformer": ["both"], "transformer_2": ["both", "upper"]}
    assert pipe.get_active_adapters() == ["upper"]
    torch.testing.assert_close(run(pipe), upper[1])  # also in the first stage, which only the other one adapts
    pipe.set_adapters(["both", "upper"], [1.0, 0.5])
    combined = run(pipe)
    for images in (trained[1], upper[1], base):
        assert_differ(combined, images)
    pipe.set_adapters("both")
    torch.testing.assert_close(run(pipe), trained[1])
    pipe.delete_adapters("both")
    assert pipe.get_list_adapters() == {"transformer_2": ["upper"]}
    assert adapted_layers([pipe.transformer]) == []
    pipe.set_adapters("upper")
    torch.testing.assert_close(run(pipe), upper[1])


def test_unload(pipe, trained, base):
    pipe.load_lora_weights(trained[0])
    pipe.unload_lora_weights()
    assert adapted_layers(pipe.stages) == []
    assert torch.equal(run(pipe), base)
    pipe.load_lora_weights(trained[0])
    assert pipe.get_active_adapters() == ["default_0"]


def test_names_are_the_same_in_all_stages(pipe, trained, upper):
    pipe.load_lora_weights(upper[0])
    pipe.load_lora_weights(trained[0])
    assert pipe.get_list_adapters() == {"transformer": ["default_1"], "transformer_2": ["default_0", "default_1"]}


def test_hotswap(pipe, trained, base, tmp_path):
    second = make_trained(seed=1)
    second.save_lora_weights(tmp_path)
    pipe.load_lora_weights(trained[0], adapter_name="a")
    layers = adapted_layers(pipe.stages)
    pipe.load_lora_weights(tmp_path, adapter_name="a", hotswap=True)
    assert all(layer is before for layer, before in zip(adapted_layers(pipe.stages), layers))
    torch.testing.assert_close(run(pipe), run(second))


def test_hotswap_needs_an_adapter_on_the_same_stages(pipe, trained, upper):
    pipe.load_lora_weights(trained[0], adapter_name="a")
    for name, stages in (("a", "`transformer`, `transformer_2`"), (None, "none")):
        with pytest.raises(ValueError, match=f"new one's stages, `transformer_2`, but it is on {stages}. Load"):
            pipe.load_lora_weights(upper[0], adapter_name=name, hotswap=True)


# Classes of an adapter's own


def test_classes_round_trip(pipe, with_classes):
    folder, images = with_classes
    pipe.load_lora_weights(folder)
    assert pipe.config.id2label == dict(enumerate(NEW_NAMES))
    assert [transformer.config.num_classes for transformer in pipe.stages] == [3, 3]
    torch.testing.assert_close(run(pipe, NEW_NAMES[:2]), images)
    with pytest.raises(ValueError, match="'b', which is not a class of this pipeline"):
        run(pipe, ["b"])


@pytest.mark.parametrize("remove", ["unload_lora_weights", "delete_adapters"])
def test_former_classes_come_back(pipe, with_classes, base, remove):
    pipe.load_lora_weights(with_classes[0], adapter_name="a")
    assert_differ(run(pipe), base)
    pipe.unload_lora_weights() if remove == "unload_lora_weights" else pipe.delete_adapters(["a"])
    assert pipe.config.id2label == dict(enumerate(OLD_NAMES))
    assert torch.equal(run(pipe), base)
    pipe.load_lora_weights(with_classes[0], adapter_name="a")
    torch.testing.assert_close(run(pipe, NEW_NAMES[:2]), with_classes[1])


def test_former_classes_of_factors_come_back(with_classes):
    pipe = make_cascade(2, id2label=OLD_NAMES)
    factors = [[i % 2, i // 2] for i in range(10)]
    for transformer in pipe.stages:
        set_class_embedding(transformer, torch.randn(3 + 6, 16), factors)
    expected, configs = run(pipe), [dict(transformer.config) for transformer in pipe.stages]
    pipe.load_lora_weights(with_classes[0], adapter_name="a")
    assert [transformer.config.class_factors for transformer in pipe.stages] == [None, None]
    pipe.unload_lora_weights()
    assert [dict(transformer.config) for transformer in pipe.stages] == configs
    assert torch.equal(run(pipe), expected)


def test_deleting_another_adapter_leaves_the_classes(pipe, trained, with_classes):
    pipe.load_lora_weights(trained[0], adapter_name="a")
    pipe.load_lora_weights(with_classes[0], adapter_name="b")
    pipe.delete_adapters("a")
    torch.testing.assert_close(run(pipe, NEW_NAMES[:2]), with_classes[1])


def test_fused_adapters_keep_their_classes(pipe, with_classes, tmp_path):
    """How an adapter becomes a pipeline of its own."""
    pipe.load_lora_weights(with_classes[0])
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path)
    loaded = PISDMCascadePipeline.from_pretrained(tmp_path)
    assert loaded.config.id2label == dict(enumerate(NEW_NAMES))
    torch.testing.assert_close(run(loaded, NEW_NAMES[:2]), with_classes[1], atol=1e-4, rtol=1e-4)


def test_classes_of_two_adapters_are_refused(pipe, with_classes):
    pipe.load_lora_weights(with_classes[0], adapter_name="a")
    with pytest.raises(ValueError, match=r"`a` already did\. Call `delete_adapters\('a'\)` first"):
        pipe.load_lora_weights(with_classes[0], adapter_name="b")
    assert pipe.get_list_adapters()["transformer"] == ["a"]
    pipe.load_lora_weights(with_classes[0], adapter_name="a", hotswap=True)
    torch.testing.assert_close(run(pipe, NEW_NAMES[:2]), with_classes[1])
    pipe.unload_lora_weights()
    assert pipe.config.id2label == dict(enumerate(OLD_NAMES))


def test_classes_without_names(pipe, with_classes):
    pipe.load_lora_weights(load_file(with_classes[0] / FILE))
    assert pipe.config.id2label is None
    pipe.set_adapters("default_0", 2.0)  # alpha 4 of rank 2
    torch.testing.assert_close(run(pipe, [0, 1]), with_classes[1])


def test_classes_with_group_offloading(pipe, with_classes, base):
    cpu = torch.device("cpu")
    pipe.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    pipe.load_lora_weights(with_classes[0])
    assert all(hasattr(layer.lora_A["default_0"], "_diffusers_hook") for layer in adapted_layers(pipe.stages))
    torch.testing.assert_close(run(pipe, NEW_NAMES[:2]), with_classes[1])
    pipe.unload_lora_weights()
    torch.testing.assert_close(run(pipe), base)


# What does not fit is refused, and leaves the pipeline as it was


STAGES = ("transformer", "transformer_2")


def test_regular_expressions_are_saved_as_the_layers_they_mean(pipe, tmp_path):
    source = make_cascade(2, id2label=OLD_NAMES)
    patterns = {"rank_pattern": {"^transformer_blocks.0.*in_proj": 1}, "alpha_pattern": {".*out_proj": 5}}
    for stage in source.stages:
        stage.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=r".*\.(in|out)_proj", **patterns))
        train(stage, 0)
    source.save_lora_weights(tmp_path)
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(run(pipe), run(source))
    strengths = [(layer.r["default"], layer.scaling["default"]) for layer in adapted_layers(source.stages)]
    assert strengths == [(layer.r["default_0"], layer.scaling["default_0"]) for layer in adapted_layers(pipe.stages)]
    assert {rank for rank, _ in strengths} == {1, 2} and len({scaling for _, scaling in strengths}) == 3


def test_what_could_not_be_loaded_is_not_saved(pipe, tmp_path):
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["in_proj"], init_lora_weights="pissa"))
    with pytest.raises(ValueError, match=r"`transformer\.init_lora_weights` .* 'pissa'\. It could not be loaded"):
        pipe.save_lora_weights(tmp_path)
    assert not list(tmp_path.iterdir())


def on_norm(name):
    """LoRA matrices of a layer that PEFT cannot adapt."""
    return {f"{name}.norm_out.lora_{x}.weight": torch.zeros(*s) for x, s in {"A": (2, 16), "B": (16, 2)}.items()}


def everything(pipe):
    """All that an adapter may change: weights by name, modules, gradient flags, adapters, configurations."""
    weights = {f"{name}.{key}": w.clone() for name in STAGES for key, w in getattr(pipe, name).state_dict().items()}
    modules = [module for transformer in pipe.stages for module in transformer.modules()]
    flags = [parameter.requires_grad for transformer in pipe.stages for parameter in transformer.parameters()]
    adapters = [repr(getattr(transformer, "peft_config", None)) for transformer in pipe.stages]
    scales = [(layer.scaling.copy(), layer.active_adapters) for layer in adapted_layers(pipe.stages)]
    configs = [dict(transformer.config) for transformer in pipe.stages]
    return weights, pipe.config.id2label, modules, flags, adapters, scales, configs, pipe.get_list_adapters()


def assert_same(found, before):
    assert list(found[0]) == list(before[0])
    assert all(torch.equal(found[0][name], weight) for name, weight in before[0].items())
    assert found[1:] == before[1:]


def changed(weights, key, value):
    return {**weights, key: value}


PROJECTION = "transformer_2.transformer_blocks.0.mixer.in_proj.lora_A.weight"
UNFIT = {
    "stage": (
        lambda w: changed(w, PROJECTION.replace("_2", "_3"), w[PROJECTION]),
        r"for `transformer_3`, but this pipeline's stages are `transformer`, `transformer_2`\. Load it into",
    ),
    "not finite": (
        lambda w: changed(w, PROJECTION, w[PROJECTION] * float("nan")),
        rf"`{PROJECTION}` does not hold finite numbers\. .*save the adapter again",
    ),
    "integers": (
        lambda w: changed(w, PROJECTION, w[PROJECTION].int()),
        rf"`{PROJECTION}` does not hold finite numbers",
    ),
    "one number": (lambda w: changed(w, PROJECTION, torch.tensor(1.0)), r"shape \(\), but `.*` has in_features=16\."),
    "no layer": (lambda w: changed(w, "transformer.lora_A.weight", w[PROJECTION]), r"is not a LoRA weight"),
    "kind of layer": (
        lambda w: {**w, **on_norm("transformer")},
        r"cannot be loaded, and the pipeline is as before: Target module",
    ),
    "half a layer": (
        lambda w: {key: weight for key, weight in w.items() if key != PROJECTION},
        r"in_proj` has `lora_B\.weight` without its partner\. .*damaged",
    ),
    "rank": (
        lambda w: changed(w, PROJECTION, w[PROJECTION][:1]),
        r"`transformer_2\..*in_proj` .*different ranks: \{1, 2",
    ),
    "numbers of classes": (
        lambda w: {
            **w,
            "transformer.class_embedding.weight": torch.zeros(4, 16),
            "transformer_2.class_embedding.weight": torch.zeros(5, 16),
        },
        r"different numbers of classes: .*4.*5",
    ),
    "no classes": (
        lambda w: {**w, **{f"{name}.class_embedding.weight": torch.zeros(1, 16) for name in STAGES}},
        r"`transformer\.class_embedding\.weight` has shape \(1, 16\), but .* one for none",
    ),
    "hidden size": (
        lambda w: changed(w, PROJECTION, torch.zeros(2, 24)),
        rf"`{PROJECTION}` has shape \(2, 24\), but `transformer_blocks\.0\.mixer\.in_proj` has in_features=16\. Load",
    ),
    "output size": (
        lambda w: changed(w, PROJECTION.replace("_A", "_B"), torch.zeros(24, 2)),
        r"shape \(24, 2\), but `.*in_proj` has out_features=64\. Load it into the cascade that it was trained for",
    ),
    "layer": (
        lambda w: changed(w, PROJECTION.replace("blocks.0", "blocks.7"), w[PROJECTION]),
        r"adapts `transformer_blocks\.7\.mixer\.in_proj` of `transformer_2`, which has no such layer\. Load it into",
    ),
    "other format": (
        lambda w: changed(w, "transformer.transformer_blocks.0.mixer.in_proj.hada_w1_a", w[PROJECTION]),
        r"`transformer\.transformer_blocks\.0\.mixer\.in_proj\.hada_w1_a` is not a LoRA weight\. .*lora_A\.weight",
    ),
    "no weights": (lambda w: {}, r"no LoRA weights\. .*`save_lora_weights`"),
    "classes of one stage": (
        lambda w: changed(w, "transformer.class_embedding.weight", torch.zeros(4, 16)),
        r"its own classes, but not for `transformer_2`.*`transformer_2=None`",
    ),
    "width of classes": (
        lambda w: changed(w, "transformer.class_embedding.weight", torch.zeros(4, 24)),
        r"`transformer\.class_embedding\.weight` has shape \(4, 24\), but `transformer` needs rows of 16",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_unfit_adapters(pipe, trained, base, case):
    change, message = UNFIT[case]
    before = everything(pipe)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        pipe.load_lora_weights(change(load_file(trained[0] / FILE)))
    assert_same(everything(pipe), before)
    assert torch.equal(run(pipe), base)


@pytest.mark.parametrize("hotswap", [False, True])
def test_a_failed_load_leaves_earlier_adapters(pipe, trained, with_classes, hotswap, monkeypatch):
    """The second stage fails when the first one and the classes are done."""
    pipe.load_lora_weights(trained[0], adapter_name="a")
    pipe.load_lora_weights(trained[0], adapter_name="b")
    pipe.set_adapters(["a", "b"], [0.5, 0.25])
    before, images = everything(pipe), run(pipe)

    def fail(*arguments, **keywords):
        type(pipe.transformer_2).load_lora_adapter(pipe.transformer_2, *arguments, **keywords)
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr(pipe.transformer_2, "load_lora_adapter", fail, raising=False)
    with pytest.raises(ValueError, match="the pipeline is as before: the disk is gone"):
        pipe.load_lora_weights(with_classes[0], adapter_name="b" if hotswap else "c", hotswap=hotswap)
    monkeypatch.undo()
    assert_same(everything(pipe), before)
    assert torch.equal(run(pipe), images)
    pipe.delete_adapters(["a", "b"])
    pipe.load_lora_weights(with_classes[0])
    torch.testing.assert_close(run(pipe, NEW_NAMES[:2]), with_classes[1])


def test_foreign_weights_are_warned_of(pipe, trained, base, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    weights = load_file(trained[0] / FILE)
    foreign = {"lora_foo": torch.zeros(1), "unet.conv.lora_A.weight": torch.zeros(2, 3)}
    pipe.load_lora_weights(foreign)
    assert "No LoRA keys associated to PISDMTransformer2DModel" in caplog.text
    assert torch.equal(run(pipe), base)
    pipe.load_lora_weights({**weights, **foreign, f"{PROJECTION}.cats": torch.zeros(1)})
    assert "weights for `lora_foo`, `unet`, which no cascade has: they are ignored" in caplog.text
    assert "unexpected keys" in caplog.text and ".cats" in caplog.text
    pipe.set_adapters("default_0", 2.0)
    torch.testing.assert_close(run(pipe), trained[1])


# Metadata that is damaged or dangerous


def resaved(source, target, change):
    """Copies an adapter's file with other metadata: `change` gets and returns the dictionary, or text."""
    with safe_open(source / FILE, "pt") as file:
        metadata = change(json.loads(file.metadata()["lora_adapter_metadata"]))
    metadata = metadata if isinstance(metadata, str) else json.dumps(metadata)
    save_file(load_file(source / FILE), target / FILE, metadata={"lora_adapter_metadata": metadata})
    return target


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("target_modules", r"(\w+\.?)+(\w+\.?)+(\w+\.?)+!"),
        ("target_modules", ["in_proj", "(a+)+$"]),
        ("target_modules", [["in_proj"]]),
        ("target_modules", 5),
        ("target_modules", [f"layer_{i}" for i in range(5000)]),
        ("rank_pattern", {"(.*)*x": 2}),
        ("rank_pattern", {"in_proj": 0}),
        ("rank_pattern", {"in_proj": "2"}),
        ("rank_pattern", ["in_proj"]),
        ("rank_pattern", {"in_proj": 3}),
        ("alpha_pattern", {"(.*)*x": 2}),
        ("alpha_pattern", {"in_proj": float("inf")}),
        ("r", 0),
        ("r", "2"),
        ("r", 3),
        ("r", 10**9),
        ("r", None),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 1e308),
        ("alpha_pattern", {"in_proj": 1e308}),
        ("use_dora", True),
        ("lora_bias", True),
        ("lora_alpha", [4]),
        ("lora_alpha", None),
        ("use_dora", "yes"),
        ("use_rslora", 1),
        ("lora_dropout", 2.0),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", ["gaussian"]),
        ("kasa_config", {"beta": 1e-4}),
        ("peft_type", "LOHA"),
        ("target_parameters", ["a"]),
        ("modules_to_save", ["norm_out"]),
        ("layer_replication", [[0, 2]]),
        ("megatron_config", {"a": 1}),
        ("bias", "all"),
    ],
)
def test_configurations_that_are_not_plain_are_refused(pipe, trained, tmp_path, option, value):
    folder = resaved(trained[0], tmp_path, lambda metadata: {**metadata, f"transformer_2.{option}": value})
    before = everything(pipe)
    with pytest.raises(ValueError, match=rf"`transformer_2\.({option}|transformer_blocks.*rank)"):
        pipe.load_lora_weights(folder)
    assert_same(everything(pipe), before)


@pytest.mark.parametrize("option", ["r", "lora_alpha"])
def test_metadata_without_what_is_needed(pipe, trained, tmp_path, option):
    folder = resaved(
        trained[0], tmp_path, lambda metadata: {k: v for k, v in metadata.items() if k != f"transformer.{option}"}
    )
    with pytest.raises(ValueError, match=rf"no `transformer\.{option}`\. The file is damaged"):
        pipe.load_lora_weights(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "[" * 100_000, '"a"'], ids=lambda text: text[:5])
def test_metadata_that_is_no_dictionary(pipe, trained, tmp_path, text):
    with pytest.raises(OSError, match=rf"Unable to load LoRA weights from .*{FILE}: .*truncated or corrupt; copy it"):
        pipe.load_lora_weights(resaved(trained[0], tmp_path, lambda metadata: text))


@pytest.mark.parametrize("names", [{"7": "a"}, {"x": "a"}, {"0": 1}, "abc", 5])
def test_class_names_that_are_wrong(pipe, with_classes, tmp_path, names):
    folder = resaved(with_classes[0], tmp_path, lambda metadata: {**metadata, "pipeline.id2label": names})
    before = everything(pipe)
    with pytest.raises(ValueError, match=r"class names are wrong: `id2label`.*The file is damaged"):
        pipe.load_lora_weights(folder)
    assert_same(everything(pipe), before)


def test_what_makes_no_difference_is_not_read(pipe, trained, tmp_path):
    changes = {"task_type": "x", "layers_pattern": "(a+)+$", "exclude_modules": "(.*)*x", "init_lora_weights": "eva"}
    changes = {f"transformer.{name}": value for name, value in {**changes, "of_a_later_peft": {"a": 1}}.items()}
    changes["transformer_2.target_modules"] = None  # the weights say which
    pipe.load_lora_weights(resaved(trained[0], tmp_path, lambda metadata: {**metadata, **changes}))
    torch.testing.assert_close(run(pipe), trained[1])


# Saved pipelines


@pytest.mark.filterwarnings("ignore:.*merge:UserWarning:peft")
@pytest.mark.parametrize("state", ["loaded", "two", "one deleted", "deleted", "unloaded", "fused"])
def test_a_pipeline_with_adapters_is_saved_without_them(
    pipe, with_classes, trained, upper, base, tmp_path, state, caplog, monkeypatch
):
    pipe.load_lora_weights(with_classes[0], adapter_name="a")
    if state in ("two", "one deleted"):
        pipe.load_lora_weights(upper[0], adapter_name="b")
    if state in ("deleted", "one deleted"):
        pipe.delete_adapters("a")
    if state == "unloaded":
        pipe.unload_lora_weights()
    if state == "fused":
        pipe.fuse_lora()
    labels = NEW_NAMES[:2] if state in ("loaded", "two", "fused") else (1, 2)
    before, images = everything(pipe), run(pipe, labels)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(run(pipe, labels), images)
    assert_same(everything(pipe)[:2], before[:2])
    assert ("without its LoRA adapters" in caplog.text) == (state not in ("deleted", "unloaded"))
    loaded = PISDMCascadePipeline.from_pretrained(tmp_path)
    if state == "fused":
        torch.testing.assert_close(run(loaded, labels), with_classes[1], atol=1e-4, rtol=1e-4)
    else:
        assert torch.equal(run(loaded), base)
        assert loaded.config.id2label == dict(enumerate(OLD_NAMES))


# As diffusers' trainers call it


def layers_of(pipe):
    """What trainers pass: each stage's weights and configuration."""
    names = [name for name in STAGES if getattr(pipe, name) is not None]
    layers = {f"{name}_lora_layers": get_peft_model_state_dict(getattr(pipe, name)) for name in names}
    configs = {f"{name}_lora_adapter_metadata": getattr(pipe, name).peft_config["default"].to_dict() for name in names}
    return layers, configs


def assert_same_files(folder, other):
    contents = []
    for path in (folder / FILE, other / FILE):
        with safe_open(path, "pt") as file:
            contents.append((file.metadata(), {key: file.get_tensor(key).tolist() for key in file.keys()}))
    assert contents[0] == contents[1]


def test_saved_by_the_class(pipe, trained, tmp_path):
    made = make_trained()
    layers, configs = layers_of(made)
    PISDMCascadePipeline.save_lora_weights(tmp_path / "all", **layers, **configs)
    assert_same_files(tmp_path / "all", trained[0])
    made.save_lora_weights(tmp_path / "instance", **layers, **configs, weight_name=None, safe_serialization=True)
    assert_same_files(tmp_path / "instance", trained[0])
    assert [path.name for path in (tmp_path / "all").iterdir()] == [FILE]

    first = layers["transformer_lora_layers"]
    PISDMCascadePipeline.save_lora_weights(tmp_path / "first", first, weight_name="first.safetensors")
    pipe.load_lora_weights(tmp_path / "first", weight_name="first.safetensors")
    assert list(pipe.get_list_adapters()) == ["transformer"]
    assert pipe.transformer.peft_config["default_0"].lora_alpha == 2  # without metadata: the rank

    PISDMCascadePipeline.save_lora_weights(tmp_path / "other", first, is_main_process=False)
    assert not (tmp_path / "other").exists()
    written = []
    PISDMCascadePipeline.save_lora_weights(
        tmp_path, first, save_function=lambda weights, path: written.extend(weights) or save_file(weights, path)
    )
    assert written == [f"transformer.{key}" for key in first]


def test_saving_by_the_class_what_there_is_not(tmp_path):
    layers = {"norm_out.lora_A.weight": torch.zeros(1, 1)}
    save = PISDMCascadePipeline.save_lora_weights
    with pytest.raises(ValueError, match=r"at least one of `transformer_lora_layers`, .*`pipe\.save_lora_weights"):
        save(tmp_path)
    with pytest.raises(ValueError, match=r"`safe_serialization=False` asks for a pickle"):
        save(tmp_path, layers, safe_serialization=False)
    with pytest.raises(TypeError, match=r"`transformer_lora_layers` has to hold weights .*'a'.*`adapter_name`"):
        save(tmp_path, "a")
    with pytest.raises(ValueError, match=r"`adapter_name` and .* pass no layers"):
        save(tmp_path, layers, adapter_name="a")
    with pytest.raises(TypeError, match="unet_lora_layers"):
        save(tmp_path, unet_lora_layers=layers)


def test_loaded_with_diffusers_options(pipe, trained):
    state = torch.get_rng_state()
    pipe.load_lora_weights(trained[0], low_cpu_mem_usage=True, use_safetensors=True)
    assert torch.equal(torch.get_rng_state(), state)  # no random weights first
    torch.testing.assert_close(run(pipe), trained[1])
    with pytest.raises(ValueError, match=r"`use_safetensors=False` asks for a pickle"):
        pipe.load_lora_weights(trained[0], use_safetensors=False)


def test_scale_of_one_call(pipe, trained, upper, base):
    pipe.load_lora_weights(trained[0], adapter_name="a")
    pipe.set_adapters("a", 0.5)
    half = run(pipe)
    torch.testing.assert_close(run(pipe, attention_kwargs={"scale": 2.0}), trained[1])
    torch.testing.assert_close(run(pipe, attention_kwargs={"scale": 0.0}), base)
    for kwargs in ({"scale": 1.0}, {}, None):
        assert torch.equal(run(pipe, attention_kwargs=kwargs), half)
    with pytest.raises(RuntimeError, match="stop"):
        run(pipe, attention_kwargs={"scale": 0.0}, callback_on_step_end=stop)
    assert torch.equal(run(pipe), half)
    with pytest.raises(ValueError, match=r"`attention_kwargs` has \['scal'\], .*only `\{\"scale\": \.\.\.\}`"):
        run(pipe, attention_kwargs={"scal": 1.0})
    with pytest.raises(ValueError, match=r"`attention_kwargs\['scale'\]` has to be a finite number but is 'x'"):
        run(pipe, attention_kwargs={"scale": "x"})


def stop(pipe, step, timestep, tensors):
    raise RuntimeError("stop")


def test_a_failure_in_a_later_stage_undoes_the_ones_before(pipe, with_classes, base):
    weights = load_file(with_classes[0] / FILE)
    weights |= on_norm("transformer_2")
    before = everything(pipe)
    with pytest.raises(ValueError, match=r"the pipeline is as before: Target module .*LayerNorm"):
        pipe.load_lora_weights(weights, adapter_name="a")
    assert_same(everything(pipe), before)
    assert torch.equal(run(pipe), base)
    pipe.load_lora_weights(with_classes[0], adapter_name="a")
    torch.testing.assert_close(run(pipe, NEW_NAMES[:2]), with_classes[1])


def test_a_cascade_of_more_stages(trained, with_classes):
    """An adapter may leave upper stages alone, but classes may not differ between stages."""
    pipe = make_cascade(3)
    pipe.load_lora_weights(trained[0])
    assert list(pipe.get_list_adapters()) == ["transformer", "transformer_2"]
    pipe.unload_lora_weights()
    with pytest.raises(ValueError, match=r"not for `transformer_3`.*`transformer_3=None`"):
        pipe.load_lora_weights(with_classes[0])


def test_name_in_use(pipe, trained, upper):
    pipe.load_lora_weights(upper[0], adapter_name="a")
    with pytest.raises(ValueError, match=r"already has an adapter `a`\. Pass another `adapter_name`, or call"):
        pipe.load_lora_weights(trained[0], adapter_name="a")
    assert pipe.get_list_adapters() == {"transformer_2": ["a"]}


@pytest.mark.parametrize("source", ["folder", "pickle in folder", "no such folder"])
def test_missing_file(pipe, tmp_path, source):
    if source == "pickle in folder":
        torch.save({}, tmp_path / "pytorch_lora_weights.bin")
    folder = tmp_path / "missing" if source == "no such folder" else tmp_path
    with pytest.raises(OSError, match=rf"(?s){FILE}.* Pass the file, folder or .*Pickled weights are not read"):
        pipe.load_lora_weights(folder, local_files_only=True)


def test_pickles_are_refused(pipe, tmp_path):
    torch.save({}, tmp_path / "adapter.bin")
    for source, name in [(tmp_path, "adapter.bin"), (tmp_path / "adapter.bin", FILE)]:
        with pytest.raises(
            ValueError, match=r"adapter\.bin` is not a safetensors file\. .*pickles can run code: pass"
        ):
            pipe.load_lora_weights(source, weight_name=name)


@pytest.mark.parametrize("damage", [lambda data: data[:-10], lambda data: b""], ids=["truncated", "empty"])
def test_broken_file(pipe, trained, tmp_path, damage):
    (tmp_path / FILE).write_bytes(damage((trained[0] / FILE).read_bytes()))
    with pytest.raises(OSError, match=rf"Unable to load LoRA weights from .*{FILE}: .*truncated or corrupt; copy it"):
        pipe.load_lora_weights(tmp_path)


def test_metadata_of_another_tool(pipe, trained, tmp_path):
    weights = load_file(trained[0] / FILE)
    save_file(weights, tmp_path / FILE, metadata={"format": "pt", "made_by": "someone"})
    pipe.load_lora_weights(tmp_path)
    assert pipe.transformer.peft_config["default_0"].r == 2


def test_saving_what_there_is_not(pipe, trained, upper, tmp_path):
    with pytest.raises(ValueError, match=r"does not say which adapter to save\. Add or load one first"):
        pipe.save_lora_weights(tmp_path)
    pipe.load_lora_weights(trained[0], adapter_name="a")
    pipe.load_lora_weights(upper[0], adapter_name="b")
    with pytest.raises(ValueError, match=r"None` does not say which adapter to save\. Pass one of 'a', 'b'\."):
        pipe.save_lora_weights(tmp_path)
    with pytest.raises(
        ValueError, match=r"`adapter_name='c'` is not an adapter of this pipeline\. Pass one of 'a', 'b'"
    ):
        pipe.save_lora_weights(tmp_path, adapter_name="c")
    with pytest.raises(ValueError, match=r"`adapter\.bin` is not a safetensors file"):
        pipe.save_lora_weights(tmp_path, adapter_name="a", weight_name="adapter.bin")
    with pytest.raises(ValueError, match=r"`save_directory` is a file: .* Pass a folder"):
        pipe.save_lora_weights(trained[0] / FILE, adapter_name="a")
    pipe.save_lora_weights(tmp_path, adapter_name="b")
    assert {key.split(".")[0] for key in load_file(tmp_path / FILE)} == {"transformer_2"}


def test_missing_peft(pipe, trained, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_pisdm.pipelines.lora_loading.USE_PEFT_BACKEND", False)
    for call in (lambda: pipe.load_lora_weights(trained[0]), lambda: pipe.save_lora_weights(tmp_path)):
        with pytest.raises(ImportError, match=r"need PEFT, .* Run `pip install -U peft transformers`"):
            call()

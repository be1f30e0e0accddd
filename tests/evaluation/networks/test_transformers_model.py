import sys

import pytest
import torch

from diffusers_pisdm.evaluation import TransformersFeatures, load_feature_extractor


transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """A tiny DINOv2 with random weights, saved as the real ones are."""
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    transformers.Dinov2Model(transformers.Dinov2Config(**size)).save_pretrained(folder)
    crop = {"height": 28, "width": 28}
    transformers.BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=crop).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def extractor(dinov2):
    return load_feature_extractor(f"transformers:{dinov2}")


@pytest.fixture(scope="module")
def images(real_images):
    return ((real_images[:5] + 1) * 127.5).round().byte()  # (5, 3, 64, 64)


def test_pooled_features_of_real_images(extractor, images):
    features = extractor(images)
    assert isinstance(extractor, TransformersFeatures)
    assert features.pooled.shape == (5, 16) and features.pooled.dtype == torch.float32
    assert features.spatial is None and features.logits is None
    assert torch.equal(extractor(images).pooled, features.pooled)
    torch.testing.assert_close(extractor(images[2:3]).pooled[0], features.pooled[2])
    assert extractor(torch.zeros(1, 3, 3, 7, dtype=torch.uint8)).pooled.shape == (1, 16)  # which axis is colour?


def test_images_are_prepared_as_the_model_says(extractor, images, dinov2):
    processor = transformers.BitImageProcessorPil.from_pretrained(dinov2)
    picture = transformers.image_utils.to_numpy_array(images[0].permute(1, 2, 0))
    pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 28, 28) and pixels.min() < -0.5  # resized, cropped, normalised
    model = transformers.Dinov2Model.from_pretrained(dinov2).eval()
    with torch.no_grad():
        wanted = model(pixels).pooler_output
    torch.testing.assert_close(extractor(images[:1]).pooled, wanted)


def test_scores_carry_the_models_name(extractor, dinov2):
    assert extractor.name == f"transformers:{dinov2}"
    assert extractor.distance_name == f"Fréchet distance ({dinov2})"
    assert len(extractor.weights_hash()) == 64


def test_weights_that_are_not_in_the_file_are_not_drawn_at_random(tmp_path):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(**size, image_size=32)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks weights, pooler.dense.bias for one"):
        load_feature_extractor(f"transformers:{tmp_path}")


def test_a_model_of_words_is_refused(tmp_path):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.BertModel(transformers.BertConfig(**size, vocab_size=50)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a vision model: it takes input_ids"):
        load_feature_extractor(f"transformers:{tmp_path}")


def test_pickled_weights_are_refused(dinov2, tmp_path):
    for file in dinov2.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = transformers.Dinov2Model.from_pretrained(dinov2)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_feature_extractor(f"transformers:{tmp_path}")


def test_a_model_and_the_package_are_needed(monkeypatch):
    with pytest.raises(ValueError, match="transformers:facebook/dinov2-base"):
        load_feature_extractor("transformers")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install 'transformers"):
        load_feature_extractor("transformers:facebook/dinov2-base")

"""Any transformers vision model as a feature extractor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...utils.hub_names import check_exists
from .extractor import FeatureExtractor, Features, check_images, register_feature_extractor


if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel


class TransformersFeatures(FeatureExtractor):
    """
    The pooled output of a vision model. Images are resized and normalised by the model's own processor with its Pillow
    backend, so that results do not depend on whether torchvision is installed.

    Args:
        model_id (`str`): A folder or a repository on the Hub.
        model (`PreTrainedModel`): Takes `pixel_values` and returns a `pooler_output`.
        processor (`BaseImageProcessor`): Turns images into `pixel_values`.
        weights_file (`str` or `Path`, *optional*): The model's weights, if they are a single file.
    """

    def __init__(
        self,
        model_id: str,
        model: PreTrainedModel,
        processor: BaseImageProcessor,
        weights_file: str | Path | None = None,
    ):
        super().__init__(f"transformers:{model_id}", weights_file)
        self.model_id = model_id
        self.model = model
        self.processor = processor

    @property
    def title(self) -> str:
        return self.model_id

    def forward(self, images: torch.Tensor) -> Features:
        check_images(images)
        arrays = list(images.permute(0, 2, 3, 1).cpu().numpy())  # of shape (H, W, 3)
        pixels = self.processor(images=arrays, return_tensors="pt", input_data_format="channels_last")
        output = self.model(pixel_values=pixels["pixel_values"].to(self.device, self.model.dtype))
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            raise ValueError(f"{self.model_id} has no pooled image features (`pooler_output`): use another model.")
        return Features(pooled.flatten(1).float())  # (B, D)


def make_transformers_features(weights: str | None) -> TransformersFeatures:
    """
    Loads a model's safetensors from a folder or the Hub; raises ImportError without transformers, OSError without
    weights, and ValueError for a model without pooled image features.
    """
    if weights is None:
        raise ValueError(
            "transformers needs a model (a folder or a Hub repository), e.g. transformers:facebook/dinov2-base."
        )
    check_exists(weights)
    try:
        from transformers import AutoImageProcessor, AutoModel
        from transformers.utils import cached_file
    except ImportError as error:
        raise ImportError(f"{weights} needs transformers: pip install 'transformers>=5'. ({error})") from error

    model, report = AutoModel.from_pretrained(weights, use_safetensors=True, output_loading_info=True)
    model = getattr(model, "vision_model", model)  # for CLIP and the like
    if model.main_input_name != "pixel_values":
        raise ValueError(f"{weights} is not a vision model: it takes {model.main_input_name}, not pixel_values.")
    if report["missing_keys"]:
        raise ValueError(
            f"The file of {weights} lacks weights, {sorted(report['missing_keys'])[0]} for one, which would be random:"
            " use a model that was published with its pooling layer."
        )
    processor = AutoImageProcessor.from_pretrained(weights, backend="pil")
    weights_file = cached_file(weights, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    extractor = TransformersFeatures(weights, model.eval(), processor, weights_file)
    with torch.inference_mode():
        extractor(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))  # raises if there are no pooled features
    return extractor


register_feature_extractor("transformers", make_transformers_features)

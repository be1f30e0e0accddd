"""ADM's Inception v3, as ported by torch-fidelity: the network behind FID, sFID and IS."""

from __future__ import annotations

import io

import torch

from .extractor import FeatureExtractor, Features, check_images, read_weights, register_feature_extractor


SPATIAL_CHANNELS = 7  # of the map's 192, as in ADM: a covariance of 17 * 17 * 7 = 2023 features is feasible


class InceptionV3(FeatureExtractor):
    """
    The Inception v3 that FID was defined with (TensorFlow's of 2015-12-05), as ported by torch-fidelity.

    Features, as in ADM: 2048 pooled; the first 7 channels of the 1x1 branch of `Mixed_6d` (TensorFlow's
    `mixed_6/conv`), 17x17, flattened in the order rows, columns, channels to 2023; the logits of 1008 classes without
    their bias. Images are resized to 299x299 as in TensorFlow 1, without antialiasing.

    Args:
        network (`FeatureExtractorInceptionV3`): torch-fidelity's network, set to return `"2048"` and
            `"logits_unbiased"`.
        weights_file (`str`, *optional*): Where its weights came from.

    Source: Szegedy et al., 2015; openai/guided-diffusion, evaluations/evaluator.py.
    """

    is_adm_inception = True

    def __init__(self, network: torch.nn.Module, weights_file: str | None = None):
        super().__init__("inception_v3", weights_file)
        self.network = network
        self._spatial: torch.Tensor | None = None
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    @property
    def title(self) -> str:
        return "inception-v3"

    def _keep_spatial(self, module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (B, 2023)

    def forward(self, images: torch.Tensor) -> Features:
        check_images(images)
        pooled, logits = self.network(images.to(self.device))  # (B, 2048), (B, 1008)
        spatial, self._spatial = self._spatial, None
        return Features(pooled, spatial.float(), logits)


def make_inception_v3(weights: str | None) -> InceptionV3:
    """
    The network with weights from a file, or by default torch-fidelity's published ones, downloaded once. Raises
    ImportError without torch-fidelity, or if torchvision does not match torch.
    """
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as torch_fidelity
    except (ImportError, RuntimeError, OSError) as error:  # a torchvision for another torch raises various errors
        raise ImportError(
            "inception_v3 needs torch-fidelity and a torchvision that matches torch: pip install"
            f" torch-fidelity torchvision, the latter from the same index as your torch. ({error})"
        ) from error
    if weights is None:
        state_dict = torch.hub.load_state_dict_from_url(
            torch_fidelity.URL_INCEPTION_V3, map_location="cpu", check_hash=True, weights_only=True
        )
        weights = f"{torch.hub.get_dir()}/checkpoints/{torch_fidelity.URL_INCEPTION_V3.rpartition('/')[2]}"
    else:
        state_dict = read_weights(weights)
    # torch-fidelity unpickles whatever a file holds, so we hand it a copy that we know holds only tensors.
    copy = io.BytesIO()
    torch.save(state_dict, copy)
    copy.seek(0)
    try:
        network = torch_fidelity.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=copy
        )
    except RuntimeError as error:
        raise ValueError(f"{weights} does not hold torch-fidelity's Inception v3 weights: {error}") from error
    return InceptionV3(network, weights)


register_feature_extractor("inception_v3", make_inception_v3)

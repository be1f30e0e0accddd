"""ADM's Inception v3, by torch-fidelity: the network of FID, sFID and IS."""

from __future__ import annotations

import io

import torch

from .extractor import FeatureExtractor, Features, check_images, read_weights, register_feature_extractor


SPATIAL_CHANNELS = 7  # of the 192 of the map, as in ADM: a covariance of 17 * 17 * 7 = 2023 features is feasible


class InceptionV3(FeatureExtractor):
    """
    The Inception v3 that FID was defined with (TensorFlow's of 2015-12-05), as torch-fidelity ported it.

    Features, as ADM takes them: 2048 pooled; the first 7 channels of the 1x1 branch of `Mixed_6d` (TensorFlow's
    `mixed_6/conv`), 17x17, flattened in the order rows, columns, channels to 2023; the logits of 1008 classes without
    their bias. Images are resized to 299x299 as TensorFlow 1 did, without antialiasing.

    Args:
        network (`FeatureExtractorInceptionV3`): torch-fidelity's, made to give `"2048"` and `"logits_unbiased"`.
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
    The network with the weights of a file, or else those that torch-fidelity publishes, downloaded once. Raises
    ImportError without torch-fidelity, or if torchvision does not fit torch.
    """
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as torch_fidelity
    except (ImportError, RuntimeError, OSError) as error:  # what a torchvision for another torch raises varies
        raise ImportError(
            "inception_v3 needs torch-fidelity and a torchvision that fits torch: pip install"
            f" 'diffusers-pisdm[inception]', with torchvision from where your torch is from. ({error})"
        ) from error
    if weights is None:
        state_dict = torch.hub.load_state_dict_from_url(
            torch_fidelity.URL_INCEPTION_V3, map_location="cpu", check_hash=True, weights_only=True
        )
        weights = f"{torch.hub.get_dir()}/checkpoints/{torch_fidelity.URL_INCEPTION_V3.rpartition('/')[2]}"
    else:
        state_dict = read_weights(weights)
    # torch-fidelity unpickles whatever a file holds: it gets a copy of tensors, which are known to be nothing else.
    copy = io.BytesIO()
    torch.save(state_dict, copy)
    copy.seek(0)
    try:
        network = torch_fidelity.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=copy
        )
    except RuntimeError as error:
        raise ValueError(f"{weights} is not a file of torch-fidelity's Inception v3: {error}") from error
    return InceptionV3(network, weights)


register_feature_extractor("inception_v3", make_inception_v3)

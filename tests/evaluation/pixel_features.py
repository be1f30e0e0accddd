"""A feature extractor that costs nothing."""

import torch
import torch.nn.functional as F
from torch import nn

from diffusers_pisdm.evaluation.networks.extractor import FeatureExtractor, Features


class PixelFeatures(FeatureExtractor):
    """48 pooled features, 12 spatial ones and logits of 6 classes, of the colours of an image."""

    def __init__(self, weights_file=None, name="pixels"):
        super().__init__(name, weights_file)
        self.project = nn.Linear(48, 6)
        with torch.no_grad():
            self.project.weight.copy_(torch.randn(6, 48, generator=torch.Generator().manual_seed(0)) / 10)
            self.project.bias.zero_()

    def forward(self, images):
        small = F.adaptive_avg_pool2d(images.float(), 4) / 255  # (B, 3, 4, 4)
        pooled = small.flatten(1)
        return Features(pooled, F.adaptive_avg_pool2d(small, 2).flatten(1), self.project(pooled))


class PooledOnly(PixelFeatures):
    def forward(self, images):
        return Features(super().forward(images).pooled)


class InceptionStandIn(PixelFeatures):
    """Counts as ADM's Inception, whose statistics ADM's files are."""

    is_adm_inception = True

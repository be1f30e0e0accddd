"""Parameter-free tensor functions: scans, scan paths, the causal convolution, conditioning augmentation."""

from .common.backends import use_hub_kernels
from .conditioning_augmentation import augment_low_res, image_to_residual, residual_to_image, upsample_low_res
from .conv.dispatch import CAUSAL_CONV_BACKENDS, causal_conv
from .draw_scan_paths import draw_scan_paths
from .scan.dispatch import SELECTIVE_SCAN_BACKENDS, selective_scan
from .scan_paths import SCAN_DIRECTIONS, TokenMove, invert_scan_path, move_tokens, scan_path, scan_transitions


__all__ = [
    "CAUSAL_CONV_BACKENDS",
    "SCAN_DIRECTIONS",
    "SELECTIVE_SCAN_BACKENDS",
    "TokenMove",
    "augment_low_res",
    "image_to_residual",
    "causal_conv",
    "draw_scan_paths",
    "invert_scan_path",
    "move_tokens",
    "scan_path",
    "scan_transitions",
    "selective_scan",
    "residual_to_image",
    "upsample_low_res",
    "use_hub_kernels",
]

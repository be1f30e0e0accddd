from ..data.image_pyramid import image_pyramid
from ..schedulers import shift_noise_schedule
from .cascade_objective import CascadeLosses, CascadeObjective
from .denoising_loss import LOSS_WEIGHTINGS, denoising_target, denoising_weights
from .loss_meter import LossMeter
from .scale_invariant_loss import ScaleInvariantLoss, info_nce


__all__ = [
    "LOSS_WEIGHTINGS",
    "CascadeLosses",
    "CascadeObjective",
    "LossMeter",
    "ScaleInvariantLoss",
    "denoising_target",
    "denoising_weights",
    "image_pyramid",
    "info_nce",
    "shift_noise_schedule",
]

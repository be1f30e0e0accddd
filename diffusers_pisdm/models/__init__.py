from .transformer_dim import DIM_SIZES, DiMTransformer2DModel
from .transformer_pisdm import PISDM_SIZES, PISDMTransformer2DModel, PISDMTransformer2DModelOutput


__all__ = [
    "DIM_SIZES",
    "DiMTransformer2DModel",
    "PISDM_SIZES",
    "PISDMTransformer2DModel",
    "PISDMTransformer2DModelOutput",
]

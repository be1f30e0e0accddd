from .transformer_pisdm import PISDM_SIZES, PISDMTransformer2DModel, PISDMTransformer2DModelOutput


__all__ = ["PISDM_SIZES", "PISDMTransformer2DModel", "PISDMTransformer2DModelOutput"]

"""PIS-DM: progressive image synthesis with a cascade of Mamba diffusion models, for diffusers."""

# diffusers recognises a component by a base class of this name in its library's top-level namespace.
from diffusers import ModelMixin

from .models import DIM_SIZES, PISDM_SIZES, DiMTransformer2DModel, PISDMTransformer2DModel
from .pipelines import PISDMCascadePipeline, PISDMCascadePipelineOutput
from .registration import register_with_diffusers
from .utils.machine import keep_freed_memory
from .utils.shipped_files import CHECKPOINT


__version__ = "0.1.0"

# The folder of the trained checkpoint that comes with the package.
PISDM_EMOJI128 = str(CHECKPOINT)

register_with_diffusers(DiMTransformer2DModel, PISDMTransformer2DModel, PISDMCascadePipeline)

__all__ = [
    "DIM_SIZES",
    "DiMTransformer2DModel",
    "ModelMixin",
    "PISDM_EMOJI128",
    "PISDM_SIZES",
    "PISDMCascadePipeline",
    "PISDMCascadePipelineOutput",
    "PISDMTransformer2DModel",
    "__version__",
    "keep_freed_memory",
]

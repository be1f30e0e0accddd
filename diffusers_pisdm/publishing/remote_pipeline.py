"""
Loads this repository's cascade, for people who have not imported its package. `publish` puts this file into each
repository, as `pipeline.py`:

    DiffusionPipeline.from_pretrained("owner/name", trust_remote_code=True)
"""

try:
    from diffusers_pisdm import PISDMCascadePipeline
except ImportError as error:
    raise ImportError(
        "This cascade needs the package diffusers_pisdm, which is on no package index: install it as the model card"
        f" (README.md) says and try again ({error})."
    ) from None

__all__ = ["PISDMCascadePipeline"]

"""
Loads this repository's cascade, for people who have not imported its package. `publish` puts this file into each
repository, as `pipeline.py`:

    DiffusionPipeline.from_pretrained("owner/name", trust_remote_code=True)
"""

try:
    from diffusers_pisdm import PISDMCascadePipeline
except ImportError as error:
    raise ImportError(
        f"This cascade needs the package diffusers-pisdm: run `pip install diffusers-pisdm` and try again ({error})."
    ) from None

__all__ = ["PISDMCascadePipeline"]

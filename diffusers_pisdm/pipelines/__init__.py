from .pipeline_pisdm_cascade import PISDMCascadePipeline, PISDMCascadePipelineOutput


__all__ = ["PISDMCascadePipeline", "PISDMCascadePipelineOutput"]

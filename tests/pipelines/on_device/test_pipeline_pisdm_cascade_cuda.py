"""PISDMCascadePipeline on a GPU: it waits for the GPU nowhere in its loops, and its images are those of the CPU."""

import copy
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from tests.pipelines.tiny_cascade import generators, make_cascade


pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # diffusers' schedulers on NumPy 2
]


def test_images_are_those_of_the_cpu():
    arguments = {"class_labels": [1, 2], "num_inference_steps": 3, "output_type": "np"}
    wanted = make_cascade(2)(**arguments, generator=generators(0, 1)).images
    with torch.backends.cudnn.flags(allow_tf32=False):
        images = make_cascade(2).to("cuda")(**arguments, generator=generators(0, 1)).images
    np.testing.assert_allclose(images, wanted, atol=1e-3)


@pytest.mark.parametrize("guidance", [{"guidance_scale": 1.0}, {}, {"guidance_start": 0.25, "guidance_stop": 0.75}])
def test_the_loops_never_wait(guidance):
    pipe = make_cascade(2).to("cuda")
    arguments = {"class_labels": [1, 2], "num_inference_steps": 4, "output_type": "latent", **guidance}
    pipe(**arguments)  # compiles kernels and builds tables
    progress_bar, loops = pipe.progress_bar, []

    @contextmanager
    def strict(**kwargs):  # a stage's loop runs inside its progress bar
        with progress_bar(**kwargs) as bar:
            loops.append(bar)
            torch.cuda.set_sync_debug_mode("error")
            try:
                yield bar
            finally:
                torch.cuda.set_sync_debug_mode("default")

    pipe.progress_bar = strict
    assert pipe(**arguments).images.isfinite().all()
    assert len(loops) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graphs_give_the_same_images(dtype):
    pipe = make_cascade(2).to("cuda", dtype)
    for labels in ([1, 2], [3]):
        arguments = {"class_labels": labels, "num_inference_steps": 4, "output_type": "latent", "guidance_start": 0.5}
        seeds = generators(*range(len(labels)))
        wanted = pipe(**arguments, generator=copy.deepcopy(seeds)).images
        pipe.enable_cuda_graphs()
        for _ in range(2):
            images = pipe(**arguments, generator=copy.deepcopy(seeds)).images
            torch.testing.assert_close(images, wanted, rtol=1e-4, atol=1e-4)
        assert len(pipe._cuda_graphs.recordings) == 4
        assert all(recording.replay is not None for recording in pipe._cuda_graphs.recordings.values())
        pipe.disable_cuda_graphs()

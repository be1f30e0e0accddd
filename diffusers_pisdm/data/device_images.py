"""A data set that fits in the memory of the device that trains on it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from tqdm.auto import tqdm

from .image_rows import ImageRows


@dataclass(frozen=True)
class LabelledImages:
    """
    Args:
        images (`torch.Tensor` of shape `(N, 3, H, W)`, uint8): All of them.
        labels (`torch.Tensor` of shape `(N,)`, int64): Their classes.
        class_names (`list[str]`): The classes' names.
        may_flip (`torch.Tensor` of shape `(N,)`, bool, *optional*): Which of them show the same thing in the mirror.
    """

    images: torch.Tensor
    labels: torch.Tensor
    class_names: list[str]
    may_flip: torch.Tensor | None = None

    def to(self, device: torch.device) -> LabelledImages:
        """The same, with the tensors on a device."""
        moved = {name: getattr(self, name) for name in ("images", "labels", "may_flip")}
        return replace(self, **{name: tensor.to(device) for name, tensor in moved.items() if tensor is not None})


def load_labelled_images(rows: ImageRows, num_threads: int | None = None) -> LabelledImages:
    """
    Decodes a whole data set. Bad images stop it or are left out, as `rows.on_bad_image` says.

    Args:
        rows ([`ImageRows`]): Not of a stream.
        num_threads (`int`, *optional*): Threads that decode; one a core by default.

    Returns:
        [`LabelledImages`] in main memory.
    """

    def read(position: int) -> tuple[torch.Tensor, int, bool] | None:
        row = rows.read(position, epoch=0, seed=0)
        if row.bad_images:  # the image is that of another row
            tqdm.write("\n".join(f"Skipped: {bad}" for bad in row.bad_images[:1]))
            return None
        return row.images, row.label, rows.data.may_flip(rows.data.dataset[position])

    with ThreadPoolExecutor(num_threads or os.cpu_count()) as threads:
        done = threads.map(read, range(len(rows)))
        read_rows = [row for row in tqdm(done, total=len(rows), desc="reading images") if row is not None]
    images, labels, may_flip = zip(*read_rows)
    return LabelledImages(torch.stack(images), torch.tensor(labels), rows.data.class_names, torch.tensor(may_flip))

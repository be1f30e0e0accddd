"""A data set that fits in the memory of the training device."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm.auto import tqdm

from .image_rows import ImageRows
from .rows import TrainingBatch


@dataclass(frozen=True)
class LabelledImages:
    """
    Args:
        images (`torch.Tensor` of shape `(N, 3, H, W)`, uint8): All images.
        labels (`torch.Tensor` of shape `(N,)`, int64): The class of each image.
        class_names (`list[str]`): The name of each class.
        may_flip (`torch.Tensor` of shape `(N,)`, bool, *optional*): Which images keep their meaning when mirrored.
    """

    images: torch.Tensor
    labels: torch.Tensor
    class_names: list[str]
    may_flip: torch.Tensor | None = None

    def to(self, device: torch.device) -> LabelledImages:
        """Returns a copy with the tensors on `device`."""
        moved = {name: getattr(self, name) for name in ("images", "labels", "may_flip")}
        return replace(self, **{name: tensor.to(device) for name, tensor in moved.items() if tensor is not None})


def load_labelled_images(rows: ImageRows, num_threads: int | None = None) -> LabelledImages:
    """
    Decodes a whole data set. A bad image raises an error or is left out, depending on `rows.on_bad_image`.

    Args:
        rows ([`ImageRows`]): The data set, not a stream.
        num_threads (`int`, *optional*): Decoding threads; one per core by default.

    Returns:
        [`LabelledImages`] in main memory.
    """

    def read(position: int) -> tuple[torch.Tensor, int, bool] | None:
        row = rows.read(position, epoch=0, seed=0)
        if row.bad_images:  # this is another row's image
            tqdm.write("\n".join(f"Skipped: {bad}" for bad in row.bad_images[:1]))
            return None
        return row.images, row.label, rows.data.may_flip(rows.data.dataset[position])

    with ThreadPoolExecutor(num_threads or os.cpu_count()) as threads:
        done = threads.map(read, range(len(rows)))
        read_rows = [row for row in tqdm(done, total=len(rows), desc="reading images") if row is not None]
    images, labels, may_flip = zip(*read_rows)
    return LabelledImages(torch.stack(images), torch.tensor(labels), rows.data.class_names, torch.tensor(may_flip))


def batch_rows(step: int, num_images: int, batch_size: int, seed: int) -> np.ndarray:
    """The rows of one step's batch: each epoch visits all images in its own order."""
    first = step * batch_size
    positions = np.arange(first, first + batch_size)
    rows = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(positions // num_images):
        order = np.random.default_rng((seed, epoch)).permutation(num_images)
        now = positions // num_images == epoch
        rows[now] = order[positions[now] % num_images]
    return rows


class DeviceBatches:
    """
    Endless batches of images on a device. A batch's rows depend only on its number and the seed.

    Args:
        data ([`LabelledImages`]): The images to draw from.
        batch_size (`int`): Images per batch.
        seed (`int`): Seeds the order of the images.
    """

    def __init__(self, data: LabelledImages, batch_size: int, seed: int):
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.step = 0

    def __iter__(self) -> DeviceBatches:
        return self

    def __next__(self) -> TrainingBatch:
        rows = torch.from_numpy(self.next_rows())
        return TrainingBatch(self.data.images[rows], self.data.labels[rows], [])

    def next_rows(self) -> np.ndarray:
        """The rows of the next batch, of shape `(batch_size,)`."""
        rows = batch_rows(self.step, len(self.data.images), self.batch_size, self.seed)
        self.step += 1
        return rows

    def fingerprint(self) -> dict[str, str]:
        """For each class, by name, the number of its images and the sum of their pixels."""
        sums, labels = self.data.images.flatten(1).sum(1).cpu(), self.data.labels.cpu()  # (N,) each
        names = enumerate(self.data.class_names)
        return {name: f"{(labels == i).sum()} images, {sums[labels == i].sum()}" for i, name in names}

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]

"""How many images of a batch a stage is trained on."""


def stage_batch_size(share: float, batch_size: int) -> int:
    """
    A stage's part of the batch, rounded, but never empty.

    Args:
        share (`float`): The share of the batch for this stage, in (0, 1].
        batch_size (`int`): Images of the batch.

    Returns:
        `int`: From 1 to `batch_size`.
    """
    return max(1, round(share * batch_size))

"""How close a set of images is to a reference: Fréchet distances, inception score, precision and recall."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import torch

from ..data.image_sources import ImageSource
from ..utils.messages import show_size
from .metrics.feature_statistics import FeatureStatistics, collect_statistics
from .metrics.frechet_distance import frechet_distance
from .metrics.inception_score import count_splits, inception_score
from .metrics.precision_recall import precision_recall
from .networks.extractor import FeatureExtractor, Features


PUBLISHED_NUM_SAMPLES = 50_000


@dataclass
class Score:
    """
    Args:
        name (`str`): The score's name, such as "FID" or "Fréchet distance (efficientnet-lite0)".
        value (`float` or `None`): `None` if it cannot be computed.
        spread (`float`, *optional*): The inception score's standard deviation over its splits.
        missing (`str`, *optional*): Why there is no value.
    """

    name: str
    value: float | None = None
    spread: float | None = None
    missing: str | None = None


@dataclass
class EvaluationResult:
    """
    Args:
        scores (`dict[str, Score]`):
            `frechet_distance`, `spatial_frechet_distance`, `inception_score`, `precision` and `recall`.
        extractor (`str`), network (`str`), weights_sha256 (`str` or `None`):
            The name the network is loaded by, its name in scores, and the SHA-256 of its weights file.
        samples (`str`), num_samples (`int`), sample_size (`tuple[int, int]`):
            The samples, their number, and their height and width.
        reference (`str` or `None`), num_reference (`int` or `None`), reference_size (`tuple[int, int]` or `None`):
            The same for the reference; its number is `None` if its file does not say.
        num_reference_features (`int` or `None`): Reference images used for precision and recall.
        num_neighbors (`int`): k for precision and recall.
        split_size (`int`), num_splits (`int`): Size and number of the inception score's splits.
        seed (`int`): Seeds the shuffling into splits and the choice of reference features.
        notes (`list[str]`): Why the scores are not comparable with published ones.
    """

    scores: dict[str, Score]
    extractor: str
    network: str
    weights_sha256: str | None
    samples: str
    num_samples: int
    sample_size: tuple[int, int]
    reference: str | None
    num_reference: int | None
    reference_size: tuple[int, int] | None
    num_reference_features: int | None
    num_neighbors: int
    split_size: int
    num_splits: int
    seed: int
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict:
        """The result as dictionaries, lists, strings and numbers."""
        return asdict(self)

    def table(self) -> str:
        """The scores, one per line."""
        width = max(len(score.name) for score in self.scores.values())
        lines = []
        for score in self.scores.values():
            value = f"not computed: {score.missing}" if score.value is None else f"{score.value:.4f}"
            spread = f" ± {score.spread:.4f}" if score.spread else ""
            lines.append(f"{score.name:<{width}}  {value}{spread}")
        return "\n".join(lines)

    def summary(self) -> str:
        """The computed scores, on one line."""
        network = f" ({self.network})"
        named = any(score.name.endswith(network) for score in self.scores.values())
        values = [
            f"{score.name.removesuffix(network)} {score.value:.2f}"
            for score in self.scores.values()
            if score.value is not None
        ]
        return ", ".join(values) + (network if named else "")


def evaluate_images(
    samples: ImageSource,
    reference: ImageSource | FeatureStatistics | None,
    extractor: FeatureExtractor,
    batch_size: int = 50,
    num_neighbors: int = 3,
    max_reference_features: int = 10_000,
    split_size: int = 5000,
    seed: int = 0,
    show_progress: bool = True,
) -> EvaluationResult:
    """
    Computes every score that the samples, reference and network allow, following ADM's evaluation suite.

    Args:
        samples ([`ImageSource`]): The images to evaluate; 50,000 for scores comparable with published ones.
        reference ([`ImageSource`] or [`FeatureStatistics`], *optional*):
            The images to compare with. With `None`, only the inception score is computed.
        extractor ([`FeatureExtractor`]): The network; only `inception_v3` gives FID, sFID and IS.
        batch_size (`int`, defaults to 50): Images per batch.
        num_neighbors (`int`, defaults to 3): k for precision and recall.
        max_reference_features (`int`, defaults to 10,000):
            Reference images for precision and recall, drawn at random; ADM's files hold as many. All samples are used.
        split_size (`int`, defaults to 5000): Images per split of the inception score.
        seed (`int`, defaults to 0): Seeds the random choices.
        show_progress (`bool`, defaults to `True`): Whether to show progress bars.

    Returns:
        [`EvaluationResult`]: Scores that cannot be computed have a reason instead of a value.

    Raises:
        ImageSourceError: An image cannot be read.
        ValueError: `reference` holds statistics of another network, or `split_size` is less than 1.
    """
    num_splits = count_splits(len(samples), split_size)
    if isinstance(reference, FeatureStatistics) and (reference.extractor, reference.weights_hash) != (
        extractor.name,
        extractor.weights_hash(),
    ):
        raise ValueError(
            f"The reference statistics are from {reference.extractor} (weights {reference.weights_hash}), but the"
            f" samples' are from {extractor.name} (weights {extractor.weights_hash()}): use the same network for both."
        )
    if isinstance(reference, ImageSource):
        reference = collect_statistics(
            reference, extractor, batch_size, max_reference_features, seed, show_progress=show_progress
        )
    logits: list[torch.Tensor] = []  # (B, C) per batch: 200 MB for 50,000 images

    def keep_logits(features: Features) -> None:
        if features.logits is not None:
            logits.append(features.logits.float().cpu())

    found = collect_statistics(
        samples, extractor, batch_size, seed=seed, on_features=keep_logits, show_progress=show_progress
    )
    scores = {
        "frechet_distance": Score(extractor.distance_name),
        "spatial_frechet_distance": Score(extractor.score_name("sFID", "spatial Fréchet distance")),
        "inception_score": Score(extractor.score_name("IS", "classifier score")),
        "precision": Score(extractor.score_name("precision", "precision")),
        "recall": Score(extractor.score_name("recall", "recall")),
    }
    for key, part in (("frechet_distance", "pooled"), ("spatial_frechet_distance", "spatial")):
        score = scores[key]
        score.missing = _why_missing(part, found, reference)
        if score.missing is None:
            ours, theirs = getattr(found, part), getattr(reference, part)
            if ours.mean.shape != theirs.mean.shape:
                raise ValueError(
                    f"{reference.source} has statistics of {len(theirs.mean)} {part} features, but"
                    f" {extractor.name} gives {len(ours.mean)}: they are from another network."
                )
            score.value = frechet_distance(*theirs, *ours).item()

    score = scores["inception_score"]
    if logits:
        score.value, score.spread = (x.item() for x in inception_score(torch.cat(logits), split_size, seed))
    else:
        score.missing = f"{extractor.title} gives no class logits"

    precision, recall = scores["precision"], scores["recall"]
    precision.missing = _why_missing("features", found, reference)
    if precision.missing is None:
        fewest = min(len(reference.features), len(found.features))
        if fewest <= num_neighbors:
            precision.missing = f"{num_neighbors} neighbours need at least {num_neighbors + 1} images, not {fewest}"
        else:
            device = extractor.device if extractor.device.type == "cuda" else torch.device("cpu")
            precision.value, recall.value = precision_recall(
                reference.features.to(device),
                found.features.to(device),
                num_neighbors,
                show_progress=show_progress,
            )
    recall.missing = precision.missing

    return EvaluationResult(
        scores=scores,
        extractor=extractor.name,
        network=extractor.title,
        weights_sha256=found.weights_hash,
        samples=samples.name,
        num_samples=len(samples),
        sample_size=found.image_size,
        reference=None if reference is None else reference.source,
        num_reference=None if reference is None else reference.num_images,
        reference_size=None if reference is None else reference.image_size,
        num_reference_features=None if reference is None or reference.features is None else len(reference.features),
        num_neighbors=num_neighbors,
        split_size=split_size,
        num_splits=num_splits,
        seed=seed,
        notes=_notes(found, reference, extractor),
    )


def _why_missing(part: str, samples: FeatureStatistics, reference: FeatureStatistics | None) -> str | None:
    if reference is None:
        return "there is no reference"
    return samples.missing.get(part) or reference.missing.get(part)


def _notes(samples: FeatureStatistics, reference: FeatureStatistics | None, extractor: FeatureExtractor) -> list[str]:
    notes = []
    if not extractor.is_adm_inception:
        notes.append(f"Published scores use Inception v3, these use {extractor.title}: they are not comparable.")
    if samples.num_images < PUBLISHED_NUM_SAMPLES:
        notes.append(
            f"Published scores use {PUBLISHED_NUM_SAMPLES:,} samples, these use {samples.num_images:,}: fewer samples"
            " give larger Fréchet distances."
        )
    if reference is not None:
        sizes = samples.image_size, reference.image_size
        if None not in sizes and sizes[0] != sizes[1]:
            notes.append(
                f"Samples have {show_size(*sizes[0][::-1])} pixels, the reference has {show_size(*sizes[1][::-1])}:"
                " the difference in sharpness alone adds to the distance."
            )
    return notes

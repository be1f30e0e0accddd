from ..data.image_sources import DatasetImages, FolderImages, ImageSource, ImageSourceError, ListImages, NpzImages
from .evaluate_images import EvaluationResult, Score, evaluate_images
from .metrics.feature_statistics import FeatureStatistics, Gaussian, collect_statistics
from .metrics.nearest_neighbors import MemorizationReport, memorization_report, nearest_neighbors
from .metrics.precision_recall import PrecisionRecall, precision_recall
from .metrics.statistics_file import ReferenceFileError, read_reference_file, write_reference_file
from .networks.efficientnet_lite0 import EfficientNetLite0
from .networks.extractor import FeatureExtractor, Features, load_feature_extractor, register_feature_extractor
from .networks.inception_v3 import InceptionV3
from .networks.transformers_model import TransformersFeatures
from .samples.record import read_sample_set
from .samples.sample_set import missing_samples, write_sample_archive, write_sample_set
from .samples.settings import SampleSettings, sample_classes


__all__ = [
    "EvaluationResult",
    "Score",
    "evaluate_images",
    "FeatureExtractor",
    "Features",
    "load_feature_extractor",
    "register_feature_extractor",
    "EfficientNetLite0",
    "InceptionV3",
    "TransformersFeatures",
    "ImageSource",
    "ImageSourceError",
    "FolderImages",
    "NpzImages",
    "DatasetImages",
    "ListImages",
    "FeatureStatistics",
    "Gaussian",
    "collect_statistics",
    "ReferenceFileError",
    "read_reference_file",
    "write_reference_file",
    "PrecisionRecall",
    "precision_recall",
    "SampleSettings",
    "missing_samples",
    "read_sample_set",
    "sample_classes",
    "write_sample_archive",
    "write_sample_set",
    "MemorizationReport",
    "memorization_report",
    "nearest_neighbors",
]

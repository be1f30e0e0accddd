from ..data.image_sources import DatasetImages, FolderImages, ImageSource, ImageSourceError, ListImages, NpzImages
from .efficientnet_lite0 import EfficientNetLite0
from .evaluation import EvaluationResult, Score, evaluate_images
from .feature_statistics import FeatureStatistics, Gaussian, collect_statistics
from .features import FeatureExtractor, Features, load_feature_extractor, register_feature_extractor
from .inception_v3 import InceptionV3
from .nearest_neighbors import MemorizationReport, memorization_report, nearest_neighbors
from .precision_recall import PrecisionRecall, precision_recall
from .reference_file import ReferenceFileError, read_reference_file, write_reference_file
from .sample_archive import write_sample_archive
from .sample_classes import sample_classes
from .sample_record import read_sample_set
from .sample_set import missing_samples, write_sample_set
from .sample_settings import SampleSettings
from .transformers_features import TransformersFeatures


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

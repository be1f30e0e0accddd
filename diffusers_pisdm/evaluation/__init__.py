from .nearest_neighbors import MemorizationReport, memorization_report, nearest_neighbors


__all__ = ["MemorizationReport", "memorization_report", "nearest_neighbors"]

import torch

from benchmarks.measuring.class_centroids import class_centroids, nearest_class


def test_centroids_are_the_means_of_the_classes_there_are():
    features = torch.tensor([[0.0, 2.0], [4.0, 0.0], [2.0, 0.0], [10.0, 10.0]])
    classes, centroids = class_centroids(features, torch.tensor([7, 2, 7, 5]))
    assert classes.tolist() == [2, 5, 7]
    assert centroids.tolist() == [[4.0, 0.0], [10.0, 10.0], [1.0, 1.0]]
    assert nearest_class(torch.tensor([[9.0, 8.0], [0.0, 0.0]]), classes, centroids).tolist() == [5, 7]

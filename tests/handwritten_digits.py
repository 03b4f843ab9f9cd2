"""A regression on scikit-learn's digits: real confidences, good and bad."""

import functools

import sklearn.datasets
import sklearn.linear_model
import threadpoolctl


@functools.cache
def logits_and_labels(known=10):
    """Of the last 797 digits, by a regression on those of the first 1000 below `known`.

    On one thread: several for so small a matrix wait for each other.
    """
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    images, train = images / 16, labels[:1000] < known
    model = sklearn.linear_model.LogisticRegression(C=1, tol=1e-10, max_iter=10_000)
    with threadpoolctl.threadpool_limits(1):
        model.fit(images[:1000][train], labels[:1000][train])
        return model.decision_function(images[1000:]), labels[1000:]

"""Larochelle's Binary MNIST, read from the `binarized_mnist.npz` beside this file.

Larochelle and Murray, The neural autoregressive distribution estimator, AISTATS 2011; first drawn
by Salakhutdinov and Murray, On the quantitative analysis of deep belief networks, ICML 2008.
"""

import functools

import numpy as np
import torch

from datasets import mnist
from datasets.mnist import Loader

FILE = mnist.FILE.with_name("binarized_mnist.npz")
SIZES = [50_000, 10_000, 10_000]


class BinaryLoader(Loader):
    """A Loader that yields the images alone: floats `[batch, 1, 28, 28]` in {0, 1}."""

    def batch(self, rows):
        images, _ = super().batch(rows)
        return images.view(-1, 1, 28, 28)


class DynamicLoader(BinaryLoader):
    """A BinaryLoader of grey images: each pixel that it yields is a draw from Bernoulli(grey/255).

    So every epoch has other images.
    """

    def batch(self, rows):
        return torch.bernoulli(super().batch(rows) / 255)


def bmnist(root="./data/", batch_size=128, download=True, *, binarization="static", device="cpu"):
    """Returns the training, validation and test loader, of 50,000, 10,000 and 10,000 images.

    Args:
        root, download: the template's, without effect, because the data come with the repository.
        binarization: "static": the images of Larochelle's three files, in their order. "dynamic":
            the training images drawn anew whenever they are used, from the grey images that
            Larochelle's were drawn from (Burda et al., 2016, arXiv:1509.00519); the others static.

    The loaders' `labels` are those of the grey images. Raises DataError for a missing or damaged
    file.
    """
    grey, labels = mnist.load()
    images, rows = load()
    train, val, test = images.to(device).split(SIZES)
    train_labels, val_labels, test_labels = labels[rows].to(device).split(SIZES)
    kind = {"static": BinaryLoader, "dynamic": DynamicLoader}[binarization]
    if binarization == "dynamic":
        train = grey[rows[:50_000]].to(device)
    return (
        kind(train, train_labels, batch_size, shuffle=True),
        BinaryLoader(val, val_labels, batch_size),
        BinaryLoader(test, test_labels, batch_size),
    )


@functools.cache
def load():
    """Returns Larochelle's training, validation and test images, uint8 `[70000, 784]` in {0, 1}.

    Also returns, for each, the row of its grey image in `mnist.load`, int64 `[70000]`. Raises
    DataError if the file is missing or damaged.
    """
    arrays = mnist.read(FILE)
    images = np.unpackbits(arrays["bits"], axis=1)
    return torch.from_numpy(images), torch.from_numpy(arrays["rows"]).long()

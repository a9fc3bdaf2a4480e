"""Binary MNIST, made in the three ways that the literature knows.

static: Salakhutdinov and Murray, On the quantitative analysis of deep belief networks, ICML 2008.
dynamic: Burda, Grosse and Salakhutdinov, Importance weighted autoencoders, ICLR 2016.
larochelle: Larochelle and Murray, The neural autoregressive distribution estimator, AISTATS 2011.
"""

import hashlib

import numpy as np
import torch

from datasets.mnist import FILE, DataError, Loader, load, take

SIZES = [50_000, 10_000, 10_000]
STATIC_SEED = 2008
STATIC_SHA256 = "14c1c617e95bd1d622d533d754821be8379beffc33ec5da76bd64e2cf30dbfaa"
LAROCHELLE = {  # file: number of lines
    "binarized_mnist_train.amat": 50_000,
    "binarized_mnist_valid.amat": 10_000,
    "binarized_mnist_test.amat": 10_000,
}


class BinaryLoader(Loader):
    """A Loader that yields the images alone: float32 `[batch, 1, 28, 28]` in {0, 1}.

    With `dynamic=True` its `images` are grey, and every pixel that it yields is drawn from
    Bernoulli(grey / 255).
    """

    def __init__(self, *args, dynamic=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.dynamic = dynamic

    def batch(self, rows):
        images = take(self.images, rows)
        if self.dynamic:
            # Of the 255 bytes 0..254, exactly `grey` many are below `grey`. Drawing bytes
            # is exact, and faster than torch.rand or torch.bernoulli.
            images = torch.empty_like(images).random_(0, 255) < images
        return images.view(-1, 1, 28, 28).float()


def bmnist(root="./data/", batch_size=128, download=True, *, binarization="static", device="cpu"):
    """Return the training, validation and test BinaryLoader, of 50,000, 10,000 and 10,000 images.

    These are the first 50,000 and the last 10,000 images of the training file, and the test file.

    Args:
        root, download: the template's, without effect, because the data come with the repository.
        binarization: "static": each pixel drawn once from Bernoulli(grey / 255), always the same
            way. "dynamic": the training images drawn anew whenever they are used, the others
            static. "larochelle": a published draw, in files that you put beside this one, without
            labels.

    Raises DataError for a missing or damaged file, another `binarization` or a bad `batch_size`.
    """
    if binarization not in ("static", "dynamic", "larochelle"):
        raise DataError(f"binarization {binarization!r} is not static, dynamic or larochelle")
    dynamic = binarization == "dynamic"
    if binarization == "larochelle":
        images = [read_amat(FILE.with_name(name), n).to(device) for name, n in LAROCHELLE.items()]
        labels = [None, None, None]
    else:
        grey, labels = load()
        images = list(binarize(grey).to(device).split(SIZES))
        labels = labels.to(device).split(SIZES)
        if dynamic:
            images[0] = grey[: SIZES[0]].to(device)
    return (
        BinaryLoader(images[0], labels[0], batch_size, shuffle=True, dynamic=dynamic),
        BinaryLoader(images[1], labels[1], batch_size),
        BinaryLoader(images[2], labels[2], batch_size),
    )


def binarize(grey):
    """Return one draw from Bernoulli(grey / 255): uint8 `[70000, 784]` in {0, 1}.

    A 32-bit word is below grey * (2^32 - 1) / 255 with that probability, to within 2^-32. The
    words are the raw stream of a bit generator, since that is the part of numpy.random which stays
    the same in all versions (NEP 19). Raises DataError if the bits do not have STATIC_SHA256.
    """
    stream = np.random.PCG64(STATIC_SEED)
    binary = torch.empty_like(grey)
    for pixels, bits in zip(grey.split(1000), binary.split(1000), strict=True):
        words = stream.random_raw(pixels.numel() // 2).astype("<u8", copy=False).view("<u4")
        threshold = pixels.numpy().ravel() * np.uint32((2**32 - 1) // 255)
        bits[:] = torch.from_numpy(words < threshold).view_as(bits)
    if hashlib.sha256(np.packbits(binary.numpy()).tobytes()).hexdigest() != STATIC_SHA256:
        raise DataError(f"NumPy {np.__version__} draws other static bits; install another version")
    return binary


def read_amat(path, n_images):
    """Return the images of a text file, 784 zeros and ones a line: uint8 `[n_images, 784]`.

    Raises DataError for a file that cannot be read, and for one with other lines or other values.
    """
    images = bytearray()
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                images += parse_line(line, f"{path}, line {number}")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; see datasets/README.md") from error
    if len(images) != n_images * 784:
        raise DataError(f"{path}: {len(images) // 784} lines, not {n_images}")
    return torch.frombuffer(images, dtype=torch.uint8).view(-1, 784) - ord("0")


def parse_line(line, where):
    """Return the 784 bytes "0" and "1" of a line. Raises DataError, naming `where`, for others."""
    values = line.split()
    if len(values) != 784:
        raise DataError(f"{where}: {len(values)} values, not 784")
    digits = b"".join(values)
    if len(digits) != 784 or digits.translate(None, b"01"):
        wrong = next(value for value in values if value not in (b"0", b"1"))
        raise DataError(f"{where}: {wrong[:20].decode(errors='replace')!r} is not 0 or 1")
    return digits

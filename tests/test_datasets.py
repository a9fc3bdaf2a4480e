"""Tests of datasets/: the splits, the loaders, the binarizations and every DataError."""

import hashlib
import re
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets import bmnist as bmnist_module
from datasets import mnist as mnist_module
from datasets.bmnist import bmnist
from datasets.mnist import DataError, Loader, load, mnist

NPZ = Path(mnist_module.__file__).with_name("mnist.npz")


@pytest.fixture(scope="module")
def arrays():
    with np.load(NPZ) as archive:
        return {name: archive[name] for name in archive.files}


@pytest.fixture
def npz_copy(tmp_path, monkeypatch):
    """Let the module read, and replace, a copy of mnist.npz."""
    copy = tmp_path / "mnist.npz"
    copy.write_bytes(NPZ.read_bytes())
    monkeypatch.setattr(mnist_module, "FILE", copy)
    mnist_module._read.cache_clear()
    yield copy
    mnist_module._read.cache_clear()


def error_of(function, *args, **kwargs):
    """Return the message of the DataError that the call must raise, which must be one line."""
    with pytest.raises(DataError) as info:
        function(*args, **kwargs)
    message = str(info.value)
    assert message
    assert "\n" not in message
    return message


def epoch(loader):
    """Return the batches of one epoch, joined."""
    batches = list(loader)
    if isinstance(batches[0], tuple):
        return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    return torch.cat(batches)


def keyed(loader):
    """Return the rows of the images of an epoch, and the images."""
    loader.labels = torch.arange(len(loader.images))
    images, rows = epoch(loader)
    return rows, images


# The file


@pytest.mark.parametrize(
    ("name", "magic", "md5"),
    [
        ("train_images", 2051, "6bbc9ace898e44ae57da46a324031adb"),
        ("train_labels", 2049, "a25bea736e30d166cdddb491f175f624"),
        ("test_images", 2051, "2646ac647ad5339dbf082846283269ea"),
        ("test_labels", 2049, "27ae3e4e09519cfbb04c329615203637"),
    ],
)
def test_arrays_make_the_published_idx_files(arrays, name, magic, md5):
    array = arrays[name]
    idx = struct.pack(f">{1 + array.ndim}i", magic, *array.shape) + array.tobytes()
    assert hashlib.md5(idx).hexdigest() == md5
    assert hashlib.sha256(array.tobytes()).hexdigest() == mnist_module.SHA256[name]


def test_file_is_found_from_any_folder_and_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, labels = load("no such folder")
    assert images.shape == (70_000, 784)
    assert images.dtype == torch.uint8
    assert labels.shape == (70_000,)
    assert labels.dtype == torch.int64
    assert load()[0].data_ptr() == images.data_ptr()


def save_without_labels(path, arrays):
    np.savez(path, **{name: a for name, a in arrays.items() if name != "test_labels"})


def save_other_type(path, arrays):
    np.savez(path, **arrays | {"train_labels": arrays["train_labels"].astype(np.int64)})


def save_other_shape(path, arrays):
    np.savez(path, **arrays | {"test_images": arrays["test_images"].reshape(-1, 784)})


def save_other_pixel(path, arrays):
    images = arrays["test_images"].copy()
    images[123, 14, 14] ^= 1
    np.savez(path, **arrays | {"test_images": images})


def truncate(path, arrays):
    path.write_bytes(NPZ.read_bytes()[:1_000_000])


def flip_byte(path, arrays):
    content = bytearray(NPZ.read_bytes())
    content[5_000_000] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda path, arrays: path.unlink(), "No such file"),
        (lambda path, arrays: path.write_bytes(b""), ""),
        (lambda path, arrays: path.write_text("version https://git-lfs.github.com/spec/v1"), ""),
        (lambda path, arrays: np.save(path.open("wb"), arrays["test_labels"]), ""),
        (truncate, ""),
        (flip_byte, ""),
        (save_without_labels, "test_labels"),
        (save_other_type, r"train_labels is int64 \(60000,\), not uint8"),
        (save_other_shape, r"test_images is uint8 \(10000, 784\), not uint8 \(10000, 28, 28\)"),
        (save_other_pixel, "test_images has the wrong SHA-256"),
    ],
)
def test_damaged_file(npz_copy, arrays, damage, what):
    damage(npz_copy, arrays)
    message = error_of(mnist)
    assert message.startswith(f"{npz_copy}: ")
    assert re.search(what, message)
    assert "`git checkout -- datasets/mnist.npz`" in message
    assert "`python -m datasets.mnist`" in message


def test_file_in_root_comes_first(tmp_path, arrays):
    save_other_pixel(tmp_path / "mnist.npz", arrays)
    message = error_of(bmnist, tmp_path)
    assert message.startswith(f"{tmp_path / 'mnist.npz'}: ")
    assert "remove it" in message
    (tmp_path / "mnist.npz").write_bytes(NPZ.read_bytes())
    assert torch.equal(load(tmp_path)[0], load()[0])


# Rebuilding the file


def fake_torchvision(monkeypatch, dataset):
    module = types.ModuleType("torchvision.datasets")
    module.MNIST = dataset
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)


def dataset_of(arrays):
    def dataset(root, train, download):
        assert download
        assert Path(root).is_dir()
        name = "train" if train else "test"
        data = torch.from_numpy(arrays[f"{name}_images"])
        targets = torch.from_numpy(arrays[f"{name}_labels"]).long()
        return types.SimpleNamespace(data=data, targets=targets)

    return dataset


def test_rebuild(npz_copy, arrays, monkeypatch):
    fake_torchvision(monkeypatch, dataset_of(arrays))
    npz_copy.write_bytes(b"damaged")
    mnist_module.main()
    assert load()[0].shape == (70_000, 784)
    assert list(npz_copy.parent.iterdir()) == [npz_copy]


def fails_without_network(root, train, download):
    raise RuntimeError("Error downloading:\nTried a mirror, got:\n<urlopen error>\n")


def test_failed_rebuild_changes_nothing(npz_copy, arrays, monkeypatch, capsys):
    other = arrays | {"train_labels": arrays["train_labels"][::-1].copy()}
    for dataset, reason in [
        (fails_without_network, "Error downloading: Tried a mirror, got: <urlopen error>"),
        (dataset_of(other), "train_labels has the wrong SHA-256"),
    ]:
        fake_torchvision(monkeypatch, dataset)
        with pytest.raises(SystemExit) as info:
            mnist_module.main()
        out, err = capsys.readouterr()
        assert info.value.code == 2
        assert out == ""
        assert err.startswith("error: ")
        assert err.endswith(f"{reason}\n")
        assert err.count("\n") == 1
        assert npz_copy.read_bytes() == NPZ.read_bytes()
        assert list(npz_copy.parent.iterdir()) == [npz_copy]


def test_rebuild_without_room(npz_copy, arrays, monkeypatch, capsys):
    def full_disk(file, **arrays):
        file.write(b"half of the file")
        raise OSError("No space left on device")

    fake_torchvision(monkeypatch, dataset_of(arrays))
    monkeypatch.setattr(np, "savez_compressed", full_disk)
    with pytest.raises(SystemExit):
        mnist_module.main()
    assert capsys.readouterr().err.endswith("No space left on device\n")
    assert npz_copy.read_bytes() == NPZ.read_bytes()
    assert list(npz_copy.parent.iterdir()) == [npz_copy]


# Grey MNIST


@pytest.mark.parametrize("options", [{}, {"n_train": 50_000, "shift": False}])
def test_mnist_splits(arrays, options):
    n = options.get("n_train", 40_000)
    train, val, test = mnist(**options)
    flat = {name: torch.from_numpy(array) for name, array in arrays.items()}
    images, labels = flat["train_images"].flatten(1), flat["train_labels"].long()
    assert torch.equal(train.images, images[:n])
    assert torch.equal(train.labels, labels[:n])
    for loader, x, y in [
        (val, images[n : n + 10_000], labels[n : n + 10_000]),
        (test, flat["test_images"].flatten(1), flat["test_labels"].long()),
    ]:
        assert torch.equal(loader.images, x)
        seen, seen_labels = epoch(loader)  # in order, neither shifted nor scaled
        assert torch.equal(seen, x.float())
        assert torch.equal(seen_labels, y)


@pytest.mark.parametrize("shift", [True, False])
def test_mnist_batches(shift):
    train, _, _ = mnist(batch_size=300, shift=shift)
    batches = list(train)
    assert len(batches) == len(train) == 134
    assert train.batch_size == 300
    assert [len(images) for images, _ in batches] == [300] * 133 + [100]
    for images, labels in batches:
        assert images.shape == (len(labels), 784)
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
    pixels = torch.cat([images for images, _ in batches])
    assert pixels.min() == 0
    assert pixels.max() == 255
    assert torch.equal(pixels, pixels.round())


@pytest.mark.parametrize("shift", [True, False])
def test_drop_last(shift):
    train, val, _ = mnist(batch_size=300, shift=shift, drop_last=True)
    assert len(train) == len(list(train)) == 133
    assert all(len(labels) == 300 for _, labels in train)
    assert len(val) == 34
    assert sum(len(labels) for _, labels in val) == 10_000


def test_unshifted_epoch_is_a_permutation():
    train, _, _ = mnist(n_train=5_000, shift=False)
    rows, images = keyed(train)
    assert torch.equal(rows.sort().values, torch.arange(5_000))
    assert not torch.equal(rows, torch.arange(5_000))
    assert torch.equal(images, train.images[rows].float())


def test_shifts():
    """Every image is its original, moved by -1, 0 or 1 pixels an axis, with the right frequency."""
    n = 9_000
    images = torch.randint(0, 256, (n, 784), dtype=torch.uint8)  # no symmetry, and no plain edge
    train = mnist_module.ShiftedLoader(images, torch.arange(n), 128, shuffle=True)
    seen, rows = epoch(train)
    assert torch.equal(rows.sort().values, torch.arange(n))
    assert not torch.equal(rows, train.labels)
    padded = np.pad(images[rows].view(n, 28, 28).numpy(), ((0, 0), (1, 1), (1, 1)), mode="edge")
    seen = seen.view(n, 28, 28).numpy()
    matches = np.array(
        [
            [(padded[:, y : y + 28, x : x + 28] == seen).all((1, 2)) for x in range(3)]
            for y in range(3)
        ]
    )
    assert (matches.sum((0, 1)) == 1).all()
    one_axis = np.array([0.9, 1.0, 0.9]) / 2.8
    expected = np.outer(one_axis, one_axis)
    deviation = np.sqrt(expected * (1 - expected) / n)
    assert (abs(matches.mean(2) - expected) < 5 * deviation).all()
    unmoved = (matches[1].sum() + matches[:, 1].sum()) / (2 * n)  # of both axes
    assert abs(unmoved - 1 / 2.8) < 4 * np.sqrt(1 / 2.8 * 1.8 / 2.8 / (2 * n))


def test_shifts_of_mnist_are_drawn_anew():
    train, _, _ = mnist(n_train=1_000)
    first, second = ({int(k): v for k, v in zip(*keyed(train), strict=True)} for _ in range(2))
    assert first.keys() == second.keys()
    same = sum(torch.equal(first[k], second[k]) for k in first)
    assert 0 < same < 500  # both shifts agree for 11% of the images


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: mnist(seed=seed)[0],
        lambda seed: mnist(seed=seed, shift=False)[0],
        lambda seed: bmnist(seed=seed)[0],
        lambda seed: bmnist(seed=seed, binarization="dynamic")[0],
    ],
    ids=["shifted", "plain", "static", "dynamic"],
)
def test_seed_and_generator_state(make):
    def first_of(loader):
        batch = next(iter(loader))
        return batch[0] if isinstance(batch, tuple) else batch

    loader = make(3)
    first, state = first_of(loader), loader.generator.get_state()
    second = first_of(loader)
    assert torch.equal(first, first_of(make(3)))
    assert not torch.equal(first, first_of(make(4)))
    assert not torch.equal(first, second)
    resumed = make(0)
    resumed.generator.set_state(state)
    assert torch.equal(second, first_of(resumed))


@pytest.mark.parametrize("options", [{"n_train": 0}, {"n_train": 50_001}])
def test_bad_n_train(options):
    assert str(options["n_train"]) in error_of(mnist, **options)


@pytest.mark.parametrize("make", [mnist, bmnist])
@pytest.mark.parametrize("batch_size", [0, -1])
def test_bad_batch_size(make, batch_size):
    assert f"batch size {batch_size} " in error_of(make, batch_size=batch_size)


def test_batch_larger_than_split():
    images, labels = torch.zeros(5, 784, dtype=torch.uint8), torch.zeros(5, dtype=torch.int64)
    assert [len(x) for x, _ in Loader(images, labels, 6)] == [5]
    assert "batch size 6" in error_of(Loader, images, labels, 6, drop_last=True)


# Binary MNIST


@pytest.fixture(scope="module")
def static():
    return bmnist()


@pytest.fixture(scope="module")
def dynamic():
    return bmnist(binarization="dynamic")


def assert_drawn_from(binary, grey):
    """Check the number of ones for every grey value against its binomial distribution."""
    counts = np.bincount(grey.flatten(), minlength=256)
    ones = np.bincount(grey.flatten(), weights=binary.flatten(), minlength=256)
    p = np.arange(256) / 255
    assert ones[0] == 0
    assert ones[255] == counts[255] > 0
    z = (ones - counts * p)[1:255] / np.sqrt(counts * p * (1 - p))[1:255]
    assert abs(z).max() < 5
    assert 0.6 < (z**2).mean() < 1.5


def test_static_images(static, arrays):
    train_images = arrays["train_images"].reshape(-1, 784)
    train_labels = torch.from_numpy(arrays["train_labels"]).long()
    test_labels = torch.from_numpy(arrays["test_labels"]).long()
    grey = [train_images[:50_000], train_images[50_000:], arrays["test_images"].reshape(-1, 784)]
    labels = [train_labels[:50_000], train_labels[50_000:], test_labels]
    for loader, pixels, y in zip(static, grey, labels, strict=True):
        assert loader.images.shape == (len(y), 784)
        assert loader.images.dtype == torch.uint8
        assert_drawn_from(loader.images.numpy(), pixels)
        assert torch.equal(loader.labels, y)
    packed = np.packbits(torch.cat([loader.images for loader in static]).numpy())
    assert hashlib.sha256(packed).hexdigest() == bmnist_module.STATIC_SHA256


def test_static_pixels_are_independent(static, arrays):
    """Neighbouring draws, which share a 64-bit word, must not be correlated."""
    grey = arrays["test_images"].reshape(-1, 784) / 255
    noise = static[2].images.numpy() - grey
    variance = (grey * (1 - grey))[:, ::2] * (grey * (1 - grey))[:, 1::2]
    assert abs((noise[:, ::2] * noise[:, 1::2]).sum()) < 5 * np.sqrt(variance.sum())


def test_static_batches(static):
    train, val, test = static
    batches = list(train)
    assert len(batches) == len(train) == 391
    assert len(batches[-1]) == 80
    assert batches[0].shape == (128, 1, 28, 28)
    assert batches[0].dtype == torch.float32
    ones = torch.cat(batches).sum(0).flatten()
    assert torch.equal(ones, train.images.sum(0).float())
    assert not torch.equal(batches[0].flatten(1), train.images[:128].float())
    for loader in (val, test):
        assert torch.equal(epoch(loader).flatten(1), loader.images.float())


def test_static_ignores_the_seed(static):
    assert torch.equal(bmnist(seed=5)[0].images, static[0].images)


def test_other_static_bits(monkeypatch):
    monkeypatch.setattr(bmnist_module, "STATIC_SEED", 2009)
    assert np.__version__ in error_of(bmnist)


def test_dynamic(dynamic, static, arrays):
    train, val, test = dynamic
    grey = torch.from_numpy(arrays["train_images"][:50_000]).flatten(1)
    assert torch.equal(train.images, grey)
    rows = slice(0, 10_000)
    first, second = train.batch(rows), train.batch(rows)
    assert first.shape == (10_000, 1, 28, 28)
    assert first.dtype == torch.float32
    assert not torch.equal(first, second)
    for binary in (first, second):
        assert_drawn_from(binary.numpy(), grey[rows].numpy())
    for loader, fixed in [(val, static[1]), (test, static[2])]:
        assert torch.equal(epoch(loader), epoch(fixed))
        assert torch.equal(epoch(loader), epoch(fixed))


def test_unknown_binarization():
    message = error_of(bmnist, binarization="grey")
    assert all(word in message for word in ("'grey'", "static", "dynamic", "larochelle"))


# Larochelle's files


@pytest.fixture
def amat(tmp_path, monkeypatch):
    """Write small files of Larochelle's form; return their folder and images."""
    sizes = {"train": 7, "valid": 3, "test": 2}
    names = {f"binarized_mnist_{split}.amat": n for split, n in sizes.items()}
    assert names.keys() == bmnist_module.LAROCHELLE.keys()
    monkeypatch.setattr(bmnist_module, "LAROCHELLE", names)
    images = [np.random.default_rng(n).integers(0, 2, (n, 784)) for n in names.values()]
    for name, image in zip(names, images, strict=True):
        np.savetxt(tmp_path / name, image, fmt="%d")
    return tmp_path, images


def test_larochelle(amat, monkeypatch):
    root, images = amat
    monkeypatch.setattr(bmnist_module, "load", None)  # mnist.npz is not needed
    loaders = bmnist(root, batch_size=2, binarization="larochelle")
    assert [len(loader) for loader in loaders] == [4, 2, 1]
    for loader, image in zip(loaders, images, strict=True):
        assert loader.labels is None
        assert loader.images.dtype == torch.uint8
        assert np.array_equal(loader.images.numpy(), image)
        assert next(iter(loader)).shape == (2, 1, 28, 28)
    assert np.array_equal(epoch(loaders[1]).flatten(1).numpy(), images[1])


def change_line_2(change):
    def edit(path):
        lines = path.read_text().splitlines()
        lines[1] = change(lines[1])
        path.write_text("\n".join(lines) + "\n")

    return edit


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (lambda path: path.unlink(), ": No such file"),
        (lambda path: path.write_text(""), ": 0 lines, not 3"),
        (lambda path: path.write_text(path.read_text() * 2), ": 6 lines, not 3"),
        (change_line_2(lambda line: ""), ", line 2: 0 values, not 784"),
        (change_line_2(lambda line: line[:-2]), ", line 2: 783 values, not 784"),
        (change_line_2(lambda line: line + " 1"), ", line 2: 785 values, not 784"),
        (change_line_2(lambda line: "2" + line[1:]), ", line 2: '2' is not 0 or 1"),
        (change_line_2(lambda line: line[:-1] + "0.5"), ", line 2: '0.5' is not 0 or 1"),
        (change_line_2(lambda line: line[:-1] + "01"), ", line 2: '01' is not 0 or 1"),
    ],
)
def test_bad_larochelle_file(amat, edit, what):
    path = amat[0] / "binarized_mnist_valid.amat"
    edit(path)
    message = error_of(bmnist, amat[0], binarization="larochelle")
    assert message.startswith(f"{path}{what}")

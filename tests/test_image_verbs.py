"""`genscale sample` and `genscale evaluate` of runs on images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from genscale.checkpoint.checkpoints import Checkpoint
from genscale.data.images.data import ImageData, ImageDataSettings
from genscale.errors import UserError
from genscale.evaluation.classifier import RECIPE
from genscale.evaluation.image_generation import as_uint8, decoded, latents
from genscale.evaluation.image_scores import _opened as opened_images
from genscale.evaluation.sample_files import picture_of_run, write_pictures
from genscale.evaluation.trained_run import TrainedRun
from genscale.families import FAMILIES, family
from genscale.models.feature_network import RandomFeatures
from genscale.models.image_grid import grid
from genscale.objectives.sample_quality import frechet_distance, kernel_distance
from genscale.parallel.processes import Processes
from genscale.rng import permutation
from genscale.settings.parser import load_config
from genscale.verbs.trained import load_weights

COMMON = {
    "data": {"size": 8, "channels": 1, "validation_images": 100},
    "train": {"steps": 4, "global_batch_size": 8, "precision": "fp32", "ema_half_life": 8, "clip": 0},
    "optimizer": {"lr": 5e-3, "betas": [0.5, 0.99]},
    "schedule": {"name": "constant"},
    "tracking": {"wandb": "disabled"},
}
GAN = {"model": {"family": "dcgan", "latent": 6, "width": 8, "classes": 10}, "data": {"labels": True}}
VAE = {"model": {"family": "vae", "architecture": "mlp", "latents": 5}}


def train(genscale, folder: Path, sections: dict) -> Path:
    data = {} if sections["model"]["family"] == "points" else {**COMMON["data"], **sections.get("data", {})}
    settings = {**COMMON, **sections, "data": data,
                "run": {"name": sections["model"]["family"], "dir": str(folder)}}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    done = genscale("train", "--config", folder / "run.yaml")
    assert done.code == 0, done.err
    return folder / sections["model"]["family"]


@pytest.fixture(scope="module")
def gan(genscale, tmp_path_factory) -> Path:
    return train(genscale, tmp_path_factory.mktemp("gan"), GAN)


@pytest.fixture(scope="module")
def vae(genscale, tmp_path_factory) -> Path:
    return train(genscale, tmp_path_factory.mktemp("vae"), VAE)


def opened(run: Path, averaged: bool = True):
    (checkpoint,) = (Checkpoint(path) for path in (run / "checkpoints").iterdir())
    config = load_config(FAMILIES, checkpoint.path / "config.yaml")
    objective = family(config.model.family).restore(config, run)
    load_weights(objective, checkpoint, averaged)
    return objective


@torch.no_grad()
def images_of(objective, seed: int, count: int, labels: torch.Tensor | None = None) -> torch.Tensor:
    drawn = latents(objective, seed, torch.arange(count))
    return as_uint8(objective.generate(objective.networks, drawn, labels))


@pytest.fixture
def drawn(genscale, tmp_path):
    """The picture that `genscale sample RUN ...` writes."""

    def draw(run: Path, *arguments: object) -> np.ndarray:
        file = tmp_path / "new" / "folder" / "picture.png"
        outcome = genscale("sample", run, "--out", file, *arguments)
        assert outcome.code == 0, outcome.err
        assert str(file) in outcome.out
        return np.asarray(Image.open(file))

    return draw


def validation() -> torch.Tensor:
    settings = ImageDataSettings(size=8, channels=1, validation_images=100)
    return torch.from_numpy(np.stack([sample["image"] for sample in ImageData(settings, 0).validation()]))


def report(outcome) -> dict:
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def test_samples_have_a_column_for_each_class(gan, drawn):
    labels = torch.arange(24) % 10
    images = images_of(opened(gan), 1, 24, labels)
    expected = grid(images, 10, [str(i) for i in range(10)] + [""] * 14)
    assert np.array_equal(drawn(gan, "--count", 24, "--seed", 1), expected)
    assert not np.array_equal(drawn(gan, "--count", 24, "--seed", 2), expected)
    assert np.abs(drawn(gan, "--count", 24, "--seed", 1, "--batch_size", 5).astype(int) - expected).max() <= 1
    only = drawn(gan, "--count", 9, "--seed", 1, "--label", "3", "--columns", 3)
    assert np.array_equal(only, grid(images_of(opened(gan), 1, 9, torch.full((9,), 3)), 3, ["3"] + [""] * 8))


def test_averaged_weights_unless_live_ones_are_asked_for(gan, drawn):
    labels = torch.arange(4) % 10
    for averaged, flags in ((True, ()), (False, ("--live",))):
        expected = grid(images_of(opened(gan, averaged), 0, 4, labels), 2, list("0123"))
        assert np.array_equal(drawn(gan, "--count", 4, "--columns", 2, *flags), expected)
    assert not torch.equal(images_of(opened(gan), 0, 4, labels), images_of(opened(gan, False), 0, 4, labels))


@pytest.mark.parametrize("begin", [lambda run: opened(run), lambda run: Processes()], ids=["a trained run", "training"])
def test_fp32_convolutions_are_not_rounded_on_a_gpu(gan, begin):
    torch.backends.cudnn.allow_tf32 = True  # PyTorch's default
    begin(gan)
    assert not torch.backends.cudnn.allow_tf32


def test_the_picture_lies_in_the_run_folder_by_default(gan, genscale):
    outcome = genscale("sample", gan, "--count", 4, "--seed", 5)
    file = gan / "samples" / "sample-seed5.png"
    width, height = Image.open(file).size
    assert outcome.out.strip() == f"{file} ({width} x {height} pixels)" and width == 4 * 34 + 2


def test_a_row_of_a_walk_goes_from_one_latent_to_another(gan, vae, drawn):
    objective = opened(vae)
    sheet = drawn(vae, "--interpolate", "--count", 20, "--columns", 5, "--seed", 3)
    ends = images_of(objective, 3, 8)
    shares = grid(torch.zeros(20, 1, 8, 8), 5, ["0.00", "0.25", "0.50", "0.75", "1.00", *[""] * 15])
    size, step, caption = 32, 34, shares.shape[0] - 4 * 34 - 2
    assert sheet.shape == shares.shape and np.array_equal(sheet[:caption], shares[:caption])
    for row in range(4):
        for column, image in ((0, ends[2 * row]), (4, ends[2 * row + 1])):
            top = 2 + caption + row * step
            tile = sheet[top : top + size, 2 + column * step : 2 + column * step + size]
            assert np.abs(tile[::4, ::4, 0].astype(int) - image[0].numpy()).max() <= 1
    named = grid(torch.zeros(6, 1, 8, 8), 3, rows=["0", "1"])
    walk = drawn(gan, "--interpolate", "--count", 6, "--columns", 3)
    assert np.array_equal(walk[caption + 2 :, :9], named[2:, :9])  # the class of each row


def test_reconstructions_stand_below_their_inputs(vae, drawn):
    objective, inputs = opened(vae), validation()
    sheet = drawn(vae, "--reconstruct", "--count", 8, "--columns", 4, "--seed", 2)
    left = sheet.shape[1] - (4 * 34 + 2)
    names = grid(torch.zeros(8, 1, 8, 8), 4, rows=["input", "output"])
    assert sheet.shape == names.shape and np.array_equal(sheet[:, :left], names[:, :left])
    above, below = (sheet[top : top + 32 : 4, 2 + left : 2 + left + 4 * 34, 0] for top in (2, 36))
    for column in range(4):
        shown = torch.from_numpy(above[:, column * 34 : column * 34 + 32 : 4].copy())
        (number,) = (inputs[:, 0] == shown).all((1, 2)).nonzero().flatten().tolist()[:1]
        mean, _ = objective.encode(objective.networks, inputs[number : number + 1])
        expected = as_uint8(objective.generate(objective.networks, mean))[0, 0].numpy().astype(int)
        assert np.abs(expected - below[:, column * 34 : column * 34 + 32 : 4]).max() <= 1


def test_a_row_of_a_traversal_moves_one_dimension_the_most_active_first(vae, drawn):
    objective, inputs = opened(vae), validation()
    means = objective.encode(objective.networks, inputs)[0]
    order = means.var(0).argsort(descending=True).tolist()
    points = means[permutation(100, 4, "reconstruct")[:1]].repeat(3 * 8, 1)
    for row in range(3):
        points[8 * row + 1 : 8 * row + 8, order[row]] = torch.linspace(-3, 3, 7)
    texts = ["not moved", "-3.0", "-2.0", "-1.0", "0.0", "+1.0", "+2.0", "+3.0"] + [""] * 16
    images = as_uint8(objective.generate(objective.networks, points))
    expected = grid(images, 8, texts, rows=[f"z{dimension}" for dimension in order[:3]])
    for columns in (7, 8):
        sheet = drawn(vae, "--traverse", "--count", 3 * columns, "--columns", columns, "--seed", 4)
        assert sheet.shape == expected.shape and np.abs(sheet.astype(int) - expected).max() <= 1
    few = drawn(vae, "--traverse", "--count", 700, "--columns", 7)
    assert few.shape[1] == sheet.shape[1] and few.shape[0] < 2 * sheet.shape[0]  # as many rows as there are dimensions


def test_a_scale_enlarges_each_pixel(vae, drawn):
    images = images_of(opened(vae), 0, 4)
    assert np.array_equal(drawn(vae, "--count", 4, "--scale", 10), grid(images, 2, scale=10))
    assert drawn(vae, "--count", 4, "--scale", 1).shape == (22, 22, 3)


def test_samples_as_files_and_arrays_are_those_of_the_picture(gan, genscale, tmp_path, drawn):
    labels = torch.arange(24) % 10
    images = images_of(opened(gan), 1, 24, labels)
    arrays, folder = tmp_path / "new" / "samples.npz", tmp_path / "files"
    settings = ("--count", 24, "--seed", 1, "--batch_size", 7)
    outcome = genscale("sample", gan, *settings, "--out", arrays, "--files", folder)
    assert outcome.code == 0 and f"{folder} (24 images)" in outcome.out and f"{arrays} (24 images)" in outcome.out
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [f"{i:05}-{i % 10}.png" for i in range(24)]
    single = np.stack([np.asarray(Image.open(file)) for file in files])
    assert np.abs(single.astype(int) - images[:, 0].numpy()).max() <= 1
    with np.load(arrays) as found:  # no pickles
        assert set(found.files) == {"images", "labels", "arr_0", "arr_1"}
        assert np.array_equal(found["images"], single[..., None]) and np.array_equal(found["arr_0"], found["images"])
        assert found["images"].dtype == np.uint8 and found["labels"].tolist() == [str(i % 10) for i in range(24)]
        assert found["arr_1"].tolist() == [i % 10 for i in range(24)]
    again = ImageData(ImageDataSettings(source=str(arrays), size=8, channels=1, labels=True, validation_fraction=0.4), 0)
    known = {image.tobytes(): i % 10 for i, image in enumerate(single)}
    samples = again.validation()
    assert again.classes == list("0123456789") and len(samples) > 4
    assert all(known[sample["image"].tobytes()] == int(sample["label"]) for sample in samples)
    assert [file.name for file in arrays.parent.iterdir()] == [arrays.name]  # no draft is left


@pytest.fixture(scope="module")
def points(genscale, tmp_path_factory) -> Path:
    return train(genscale, tmp_path_factory.mktemp("points"), {"model": {"family": "points"}})


def test_points_as_a_picture_and_as_numbers(points, genscale, tmp_path):
    picture, table, arrays = (tmp_path / "new" / name for name in ("points.png", "points.csv", "points.npz"))
    for file, flags in ((picture, ()), (table, ()), (arrays, ("--batch_size", 7))):
        outcome = genscale("sample", points, "--count", 50, "--seed", 3, "--out", file, *flags)
        assert outcome.code == 0 and outcome.out.strip() == f"{file} (50 points)", outcome.err
    objective = opened(points)
    with torch.no_grad():
        expected = objective.generate(objective.networks, latents(objective, 3, torch.arange(50))).numpy()
    assert table.read_text().startswith("x,y\n")
    assert np.allclose(np.loadtxt(table, delimiter=",", skiprows=1), expected, atol=1e-6)
    found = np.load(arrays)
    assert np.allclose(found["points"], expected, atol=1e-6) and found["arr_0"].dtype == np.float32
    assert Image.open(picture).size == (400, 400)
    assert "points.png" in genscale("sample", points, "--out", "points.what").message_of_run()


def test_a_class_in_the_name_of_a_file_is_a_plain_name(tmp_path):
    names = ["a/b", "..", "\u732b", "\u0939\u093f", "x" * 300, "tab\t"]
    write_pictures(tmp_path, [torch.zeros(6, 3, 4, 4, dtype=torch.uint8)], 6, names)
    found = sorted(path.name for path in tmp_path.iterdir())
    assert [name[:5] for name in found] == [f"{i:05}" for i in range(6)]
    assert found[0] == "00000-a%2Fb.png" and found[2:4] == ["00002-\u732b.png", "00003-\u0939\u093f.png"]


def test_images_that_are_no_numbers_are_no_black_ones(gan):
    objective = opened(gan)
    with torch.no_grad():
        next(objective.networks["generator"].parameters()).fill_(torch.nan)
    run = TrainedRun(objective, None, gan, torch.device("cpu"))
    with pytest.raises(UserError, match="diverged"):
        next(decoded(run, torch.zeros(2, 6), torch.zeros(2, dtype=torch.int64), 2))


@pytest.mark.parametrize(("which", "arguments", "words"), [
    ("gan", ["--reconstruct"], ["--reconstruct", "dcgan", "no encoder"]),
    ("gan", ["--label", "seven"], ["--label", "'seven' is no class", "0, 1, 2"]),
    ("vae", ["--label", "7"], ["--label", "not conditional"]),
    ("vae", ["--reconstruct", "--traverse"], ["--reconstruct", "--traverse", "leave one out"]),
    ("vae", ["--count", 0], ["count", "at least 1"]),
    ("vae", ["--scale", 0], ["scale", "at least 1"]),
    ("vae", ["--scale", 3000], ["--count", "64 images of 24000 x 24000", "nearest allowed: --scale 209, or"]),
    ("vae", ["--count", 5_000_000], ["--count", "nearest allowed: --count 174762, or", "--files"]),
    ("vae", ["--files", "."], ["--files", "not empty"]),
    ("vae", ["--files", "picture"], ["--files", "picture", "File exists", "give another"]),
    ("vae", ["--files", "new", "--traverse"], ["--traverse", "--files new", "leave one"]),
    ("vae", ["--files", "new", "--columns", 3], ["--columns", "--files new"]),
    ("vae", ["--interpolate", "--columns", 1], ["--columns: 1 ", "at least 2"]),
    ("vae", ["--out", "x.npz", "--scale", 3], ["--scale", "--out x.npz"]),
    ("vae", ["--out", "picture/x.npz"], ["--out", "picture/x.npz", "cannot be written"]),
    ("vae", ["--prompt", "x"], ["--prompt", "unknown setting"]),
    ("vae", ["--out", "picture.xyz"], ["picture.xyz", "picture.png"]),
    ("vae", ["--reconstruct", "--data.source", "nowhere.npz"], ["data.source", "nowhere.npz"]),
    ("gan", ["--data.size", "16"], ["step-00000004", "network", "leave out", "data.size"]),
    ("gan", ["--data.channels", "3"], ["step-00000004", "network", "leave out", "data.channels"]),
])  # fmt: skip
def test_sample_refuses(which, arguments, words, request, genscale, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "picture").touch()
    message = genscale("sample", request.getfixturevalue(which), *arguments)
    text = message.message_of_run() if "checkpoints" in message.err else message.message()
    assert all(word in text for word in words), text


@pytest.mark.parametrize("link", ["samples", "samples/sample-seed7.png"])
def test_a_link_in_a_run_folder_is_not_written_through(link, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"--out: .*{link} is a link, and nothing is written through one; remove it, or give"):
        picture_of_run(tmp_path, "sample-seed7")


def test_scores_in_the_features_of_the_random_network(vae, genscale):
    result = report(genscale("evaluate", vae, "--features", "random", "--count", 90, "--seed", 3, "--batch-size", 7))
    objective, network = opened(vae), RandomFeatures()
    real, fake = network(validation() / 255), network(images_of(objective, 3, 90) / 255)
    assert result["fd"] == pytest.approx(frechet_distance(real, fake), rel=1e-4)
    assert result["kid"] == pytest.approx(kernel_distance(real, fake)[0], rel=1e-4)
    protocol = result["protocol"]
    assert protocol["features_sha256"] == network.identity() and protocol["weights"] == "averaged"
    assert (protocol["real_images"], protocol["generated_images"], protocol["seed"], protocol["size"]) == (100, 90, 3, 8)
    assert result["anchors"]["real_halves"]["precision"] > 0.8 > 0.2 > result["anchors"]["noise"]["recall"]
    assert result["anchors"]["real_halves"]["fd"] is None  # 50 images are too few for 64 features
    assert result["anchors"]["noise"]["fd"] > 0
    assert result["validation"]["samples"] == 100 and result["validation"]["loss"] > 0
    asked = report(genscale("evaluate", vae, "--features", "random", "--count", 90, "--seed", 3, "--train.ema_half_life", 0))
    assert asked["fd"] == pytest.approx(result["fd"])
    assert asked["protocol"]["weights"] == "averaged", "what was loaded, not what is configured"
    live = report(genscale("evaluate", vae, "--features", "random", "--count", 90, "--seed", 3, "--live"))
    assert live["fd"] != result["fd"] and live["protocol"]["weights"] == "live"


def test_scores_in_the_features_of_a_classifier(gan, genscale, monkeypatch):
    monkeypatch.setitem(RECIPE, "steps", 12)
    result = report(genscale("evaluate", gan))
    assert result["protocol"]["features"] == "classifier" and result["protocol"]["classifier_accuracy"] > 0.2
    assert sum(result["class_histogram"].values()) == sum(result["real_class_histogram"].values()) == 100
    empty = {name for name, count in result["class_histogram"].items() if count == 0}
    assert set(result["missing_classes"]) == empty
    assert len(list((gan.parent / "classifiers").iterdir())) == 1
    for name in ("fd", "kid", "kid_standard_error", "precision", "recall", "density", "coverage", "memorisation_rate"):
        assert isinstance(result[name], float), name
    assert result["anchors"]["noise"]["kid"] > result["anchors"]["real_halves"]["kid"]


def test_likelihood_by_importance_samples(vae, genscale):
    few, many = (report(genscale("evaluate", vae, "--features", "random", "--importance-samples", k)) for k in (1, 40))
    assert many["importance_samples"] == 40
    # The bound grows with the samples (Burda et al. 2016); one sample is the validation loss with other draws.
    assert many["log_likelihood"] > few["log_likelihood"]
    assert few["log_likelihood"] == pytest.approx(-few["validation"]["loss"], abs=8 * few["log_likelihood_standard_error"])


def test_an_autoencoder_is_judged_by_few_images_too(vae, genscale):
    done = genscale("evaluate", vae, "--data.validation_images", 20, "--importance-samples", 2)
    result = report(done)
    assert result["validation"]["samples"] == 20 and result["log_likelihood"] < 0 and "fd" not in result
    assert "warning: data.validation_images: 20 images are too few for the 64 features of classifier" in done.err


@pytest.mark.parametrize(("which", "arguments", "words"), [
    ("gan", ["--count", 64], ["--count", "64 images are too few", "64 features of", "65"]),
    ("gan", ["--data.validation_images", 20], ["data.validation_images", "20 images are too few", "as --on SOURCE gives"]),
    ("gan", ["--features", "inception"], ["--features", "inception", "--inception FILE"]),
    ("gan", ["--features", "random", "--inception", "x.pth"], ["--features", "random", "x.pth"]),
    ("gan", ["--inception", "x.pth"], ["data.validation_images", "2048 features of inception", "2049"]),
    ("gan", ["--importance_samples", 5], ["--importance_samples", "dcgan", "no likelihood"]),
    ("vae", ["--data.size", "16"], ["step-00000004", "network", "leave out", "data.size"]),
    ("gan", ["--tasks", "hellaswag"], ["--tasks", "dcgan", "no text"]),
    ("vae", ["--model.latents", 7], ["model.latents: 7 is not that of", ", 5; leave it out"]),
    ("gan", ["--features", "other"], ["features", "one of", "other"]),
])  # fmt: skip
def test_evaluate_refuses(which, arguments, words, request, genscale, monkeypatch):
    monkeypatch.setitem(RECIPE, "steps", 12)
    message = genscale("evaluate", request.getfixturevalue(which), *arguments).message()
    assert all(word in message for word in words), message


def test_the_class_that_differs_is_shown_among_many(tmp_path):
    names = [f"class {number:02}" for number in range(40)]
    there = [*names[:30], "other", *names[31:]]
    images = np.random.default_rng(0).integers(0, 256, (200, 8, 8), np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.array(there * 5))
    settings = ImageDataSettings(str(tmp_path / "x.npz"), size=8, channels=1, labels=True, validation_fraction=0.5,
                                 class_names=there)
    with pytest.raises(UserError) as refused:
        opened_images(settings, names)
    message = str(refused.value)
    assert "class 29, other, ..., and the run" in message and "class 29, class 30, ...; give" in message and len(message) < 500

"""Images of a hub dataset, through the small hub that the text tests use."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

NAME = "someone/pictures"
SCRIPT = """
import json, sys
from genscale.data.images import sources as image_sources
from genscale.data.images.data import ImageData, ImageDataSettings
from genscale.errors import UserError

def read(changes):
    data = ImageData(ImageDataSettings(**changes), seed=1)
    trained = []
    for lane in range(data.lane_count):
        for sample, cursor in data.open_lane(lane):
            if cursor["epoch"]:
                break
            trained.append([int(sample["image"][0, 0, 0]), int(sample["label"])])
    held = [[int(sample["image"][0, 0, 0]), int(sample["label"])] for sample in data.validation()]
    return {"classes": data.classes, "trained": trained, "held": held, "order": data.plan()["order"]}

for changes in json.loads(sys.argv[1]):
    try:
        print(json.dumps(read(changes)))
    except UserError as error:
        print(json.dumps({"error": str(error)}))
"""


def parquet(numbers: range) -> bytes:
    """Pictures of 4x4 pixels that are all their number, of class number % 2."""
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=["even", "odd"])})
    cells, file = [], io.BytesIO()
    for number in numbers:
        image = io.BytesIO()
        Image.new("L", (4, 4), number).save(image, "PNG")
        cells.append({"bytes": image.getvalue(), "path": None})
    table = pa.table({"img": pa.array(cells), "kind": pa.array([number % 2 for number in numbers])})
    pq.write_table(table.cast(features.arrow_schema), file)
    return file.getvalue()


FILES = {"train-0.parquet": parquet(range(30)), "train-1.parquet": parquet(range(30, 60)),
         "test-0.parquet": parquet(range(60, 90))}
CASES: dict[str, dict[str, Any]] = {"splits": {}, "column": {"image_column": "image"}, "name": {"source": "someone/nothing"},
                                    "split": {"split": "trian"}}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, serve_hub: Callable[..., str],
          python_process: Callable[..., str]) -> dict[str, dict[str, Any]]:
    """What one process reads with the settings of each case: the hub's address is fixed when its client is imported."""
    home = tmp_path_factory.mktemp("home")
    common = {"source": NAME, "size": 4, "channels": 1, "labels": True, "lanes": 4, "image_column": "img",
              "label_column": "kind"}
    said = python_process(SCRIPT, json.dumps([{**common, **case} for case in CASES.values()]), HF_HUB_OFFLINE="0",
                          HF_ENDPOINT=serve_hub(NAME, FILES), HF_HOME=str(home), timeout=240, cwd=home)
    return dict(zip(CASES, map(json.loads, said.splitlines()), strict=True))


def test_splits_and_classes_are_the_datasets_own(found: dict[str, dict[str, Any]]) -> None:
    read = found["splits"]
    assert read["classes"] == ["even", "odd"] and read["order"] == "stream"
    assert sorted(read["trained"]) == [[number, number % 2] for number in range(60)] != read["trained"]
    assert read["held"] and all(pair in [[number, number % 2] for number in range(60, 90)] for pair in read["held"])


@pytest.mark.parametrize(("case", "words"), [
    ("column", ["data.image_column=image: ", "has the columns img, kind", "the images"]),
    ("name", ["data.source=someone/nothing: ", "no such dataset on the Hugging Face hub"]),
    ("split", ["data.split=trian: ", "train", "test"]),
])
def test_mistakes_are_one_line(found: dict[str, dict[str, Any]], case: str, words: list[str]) -> None:
    assert all(word in found[case]["error"] for word in words), found[case]

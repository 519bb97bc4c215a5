"""Images at many shapes against the lanes read one by one, from memory and from streams: nothing lost, nothing repeated."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from genscale.data.images import sources as image_sources
from genscale.data.images.data import ImageData, ImageDataSettings
from genscale.data.images.sets import content_hash
from genscale.data.loader import StepLoader
from genscale.data.order import DIGEST_MODULUS, merge_states
from genscale.errors import UserError

COUNT, SIZE, GLOBAL, SEED = 90, 6, 12, 5
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, SIZE, SIZE, 3), dtype=np.uint8)
NUMBER = {pixels.transpose(2, 0, 1).tobytes(): i for i, pixels in enumerate(PIXELS)}


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same images, of class i % 3, in every kind of source."""
    root = tmp_path_factory.mktemp("images")
    for name in ("folder/a", "folder/b", "folder/c", "parquet", "tar"):
        (root / name).mkdir(parents=True)
    files = [png(pixels) for pixels in PIXELS]
    for i, file in enumerate(files):
        (root / "folder" / "abc"[i % 3] / f"{i}.png").write_bytes(file)
    np.savez(root / "pixels.npz", images=PIXELS, labels=np.arange(COUNT, dtype=np.uint8) % 3)
    for part in range(2):
        chosen = range(part, COUNT, 2)
        table = pa.table({"image": [{"bytes": files[i], "path": None} for i in chosen], "label": [i % 3 for i in chosen]})
        pq.write_table(table, root / "parquet" / f"{part}.parquet", row_group_size=7)
        with tarfile.open(root / "tar" / f"{part}.tar", "w") as archive:
            for i in chosen:
                for name, content in ((f"{i}.cls", str(i % 3).encode()), (f"{i}.png", files[i])):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return {"digits": Path("digits"), "npz": root / "pixels.npz", "folder": root / "folder", "parquet": root / "parquet",
            "tar": root / "tar"}


@pytest.fixture(params=["npz", "folder", "parquet", "tar", "streamed parquet", "streamed tar"])
def settings(request: pytest.FixtureRequest, sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> ImageDataSettings:
    streamed, _, kind = request.param.rpartition("streamed ")
    if streamed:
        monkeypatch.setattr(image_sources, "MEMORY_LIMIT", 0)
    return ImageDataSettings(source=str(sources[kind]), size=SIZE, labels=True, lanes=10, window=4, validation_fraction=0.2,
                             class_names=["a", "b", "c"] if streamed else None)


def number(sample: dict[str, Any]) -> int:
    """Which image a sample is; its label must be that image's."""
    found = NUMBER[np.asarray(sample["image"]).tobytes()]
    assert int(sample["label"]) == found % 3
    return found


def truth(data: ImageData, count: int) -> list[bytes]:
    """The first global samples, from the definition: sample g is number g // lanes of lane g % lanes."""
    lanes = [data.open_lane(lane) for lane in range(data.lane_count)]
    return [next(lanes[g % data.lane_count])[0]["image"].tobytes() for g in range(count)]


def train(data: ImageData, batches: int, world: int, workers: int, micro: int,
          state: dict[str, Any] | None = None) -> tuple[list[bytes], list[int], dict[str, Any]]:
    """All ranks of a run, one after the other: (samples by number, ledger, merged state)."""
    samples: dict[int, bytes] = {}
    ledger, states = [0] * batches, []
    for rank in range(world):
        loader = StepLoader(data, global_batch_size=GLOBAL, micro_batch_size=micro, rank=rank, world_size=world,
                            workers=workers, prefetch_steps=2, state=json.loads(json.dumps(state)))
        for k in range(batches):
            for batch in loader.next_batch():
                assert batch["image"].shape == (micro, data.channels, data.size, data.size)
                assert batch["image"].dtype == torch.uint8
                images = [image.numpy().tobytes() for image in batch["image"]]
                samples |= dict(zip(batch["sample"].tolist(), images, strict=True))
                if data.classes:
                    assert batch["label"].shape == (micro,) and batch["label"].dtype == torch.int64
            ledger[k] = (ledger[k] + loader.digest()) % DIGEST_MODULUS
        states.append(json.loads(json.dumps(loader.state())))
        loader.close()
    first = GLOBAL * (state["batches"] if state else 0)
    assert sorted(samples) == list(range(first, first + GLOBAL * batches))
    return [samples[g] for g in sorted(samples)], ledger, merge_states(states, data.lane_count)


def test_each_image_once_an_epoch_and_never_one_that_is_held_out(settings: ImageDataSettings) -> None:
    data = ImageData(settings, SEED)
    held = [number(sample) for sample in data.validation()]
    assert len(set(held)) == len(held) > 3
    epochs: list[list[int]] = [[], []]
    if data.plan()["order"] == "images":
        numbers = list(map(NUMBER.get, truth(data, 2 * (COUNT - len(held)))))
        epochs = [numbers[: COUNT - len(held)], numbers[COUNT - len(held) :]]
    else:
        for lane in range(10):
            stream = data.open_lane(lane)
            while (found := next(stream))[1]["epoch"] < 2:
                epochs[found[1]["epoch"]].append(number(found[0]))
    for epoch in epochs:
        assert sorted(epoch) == sorted(set(range(COUNT)) - set(held)) != epoch
    assert epochs[0] != epochs[1]


def test_the_same_samples_at_any_shape_and_across_changes_of_shape(settings: ImageDataSettings) -> None:
    data = ImageData(settings, SEED)
    expected = truth(data, 12 * GLOBAL)  # two epochs: the shape changes in both
    samples, ledger, _ = train(data, 12, world=1, workers=0, micro=12)
    assert samples == expected and len(set(ledger)) == 12
    state, done = None, 0
    for world, micro, count in [(2, 3, 3), (3, 2, 4), (6, 2, 1), (4, 1, 4)]:
        samples, entries, state = train(data, count, world, 0, micro, state)
        assert samples == expected[done * GLOBAL : (done + count) * GLOBAL]
        assert entries == ledger[done : done + count]
        done += count


@pytest.mark.parametrize("augmented", [False, True])
def test_a_cursor_continues_where_it_was_taken(settings: ImageDataSettings, augmented: bool) -> None:
    settings = replace(settings, crop="random" if augmented else "center", flip=augmented)
    data = ImageData(settings, SEED)
    whole = list(islice(data.open_lane(3), 25))
    again = ImageData(settings, SEED)
    for at in range(0, 24, 4):
        rest = list(islice(again.open_lane(3, json.loads(json.dumps(whole[at][1]))), 24 - at))
        for (sample, cursor), (other, expected) in zip(rest, whole[at + 1 :], strict=True):
            assert np.array_equal(sample["image"], other["image"]) and sample["label"] == other["label"] and cursor == expected


def test_worker_processes_give_the_same_and_another_seed_does_not(sources: dict[str, Path]) -> None:
    settings = ImageDataSettings(source=str(sources["folder"]), size=8, crop="random", flip=True, labels=True, lanes=10)
    samples, ledger, state = train(ImageData(settings, SEED), 3, 1, 0, 12)
    _, first, between = train(ImageData(settings, SEED), 1, 1, 2, 6)
    later, rest, end = train(ImageData(settings, SEED), 2, 2, 0, 6, between)
    assert first + rest == ledger and later == samples[GLOBAL:] and end == state
    assert train(ImageData(settings, SEED + 1), 1, 1, 0, 12)[1] != ledger[:1]


def test_streams_travel_to_worker_processes(sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_sources, "MEMORY_LIMIT", 0)
    data = ImageData(ImageDataSettings(source=str(sources["tar"]), size=SIZE, lanes=4, window=8), SEED)
    assert truth(pickle.loads(pickle.dumps(data)), 40) == truth(data, 40)


def test_images_are_mirrored_half_of_the_time_and_anew_each_epoch(sources: dict[str, Path]) -> None:
    settings = ImageDataSettings(source=str(sources["npz"]), size=SIZE, flip=True, lanes=1, validation_fraction=0.2)
    data = ImageData(settings, SEED)
    count = data.order.count
    mirrored = [{}, {}]
    for g, (sample, _) in enumerate(islice(data.open_lane(0), 2 * count)):
        plain = NUMBER.get(sample["image"].tobytes())
        back = NUMBER.get(np.ascontiguousarray(sample["image"][:, :, ::-1]).tobytes())
        mirrored[g // count][plain if back is None else back] = plain is None
    assert mirrored[0].keys() == mirrored[1].keys() and mirrored[0] != mirrored[1]
    assert all(0.3 < sum(epoch.values()) / count < 0.7 for epoch in mirrored)
    assert all(NUMBER[sample["image"].tobytes()] is not None for sample in data.validation())


def test_held_out_by_content_whatever_the_seed(sources: dict[str, Path]) -> None:
    settings = ImageDataSettings(source=str(sources["npz"]), size=SIZE, labels=True, validation_fraction=0.2)
    expected = [i for i in range(COUNT) if content_hash(PIXELS[i]) < int(0.2 * 2**64)]
    for seed in (1, 2):
        assert [number(sample) for sample in ImageData(settings, seed).validation()] == expected
    settings = replace(settings, validation_images=7)
    chosen = [number(sample) for sample in ImageData(settings, 1).validation()]
    assert len(chosen) == 7 and set(chosen) < set(expected) and chosen != expected[:7]


def test_less_than_a_global_batch_is_refused(settings: ImageDataSettings) -> None:
    data = ImageData(settings, SEED)
    count = COUNT - len(data.validation())
    data.check(count)
    with pytest.raises(UserError, match=f"train.global_batch_size={count + 1}: .*only {count} images.*at most"):
        data.check(count + 1)


def test_images_of_other_ranks_are_not_decoded(sources: dict[str, Path]) -> None:
    data = ImageData(ImageDataSettings(source=str(sources["folder"]), size=SIZE, lanes=10), SEED)
    expected = truth(ImageData(data.settings, SEED), 4 * GLOBAL)
    loader = StepLoader(data, global_batch_size=GLOBAL, micro_batch_size=4, rank=1, world_size=3, workers=0, prefetch_steps=1)
    found = [image.numpy().tobytes() for _ in range(4) for batch in loader.next_batch() for image in batch["image"]]
    loader.close()
    assert found == expected[1::3] and data.order.reader.read <= 6 * GLOBAL // 3  # two batches are loaded ahead

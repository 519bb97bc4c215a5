"""Inputs from public bug reports (tests/cases), each read as what its files say, or refused in one line that says why."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genscale.data.text.data import TextData, TextDataSettings

CASES = Path(__file__).parent / "cases"
TEXT, IMAGES = CASES / "text", CASES / "images"
INSPECT_TEXT = ("data", "inspect", "--data.lanes", 1, "--data.sequence_length", 60, "--blocks", 1)
INSPECT_IMAGES = ("data", "inspect", "--model.family", "vae", "--data.size", 32)


def chat(name: str, tokenizer: str) -> tuple[object, ...]:
    return (*INSPECT_TEXT, "--data.source", TEXT / f"{name}.jsonl", "--data.messages_column", "messages",
            "--data.tokenizer", TEXT / tokenizer)


def text(name: str, *more: object) -> tuple[object, ...]:
    return (*INSPECT_TEXT, "--data.source", TEXT / name, *more)


def images(name: str, *more: object) -> tuple[object, ...]:
    return (*INSPECT_IMAGES, "--data.source", IMAGES / name, *more)


READ = [
    (chat("chat-mixed-roles", "chatml"), ["90 of 100", "model"]),
    ((*chat("chat-parts-mixed", "chatml"), "--data.validation_source", TEXT / "chat-nonewline.jsonl"), ["hello"]),
    (text("dates.jsonl", "--data.prompt_column", "prompt", "--data.answer_column", "answer"), ["2021-03-"]),
    (text("pretty.jsonl"), ["speaks of apples"]),
    (text("dict.parquet"), ["documents"]),
    (images("chars.tar", "--data.labels", "true", "--data.validation_images", 1, "--data.validation_fraction", 0.001),
     [*(f"{name} +(9|10) " for name in "2345678ABC")]),
    (images("split_extra", "--data.labels", "true"),
     ["40 images to train on, 40 to validate on", "test held out", r"\ba +", r"\bb +"]),
    (images("hidden", "--data.labels", "true"), ["2 classes", r"\ba +", r"\bb +"]),
    (images("floattif"), ["to train on"]),
]
REFUSED = [
    (text("nonobject.jsonl"), ["nonobject.jsonl", "row 8"]),
    (("train", "--config", TEXT / "cfg-dupkey.yaml", "--print_config"), ["train", "twice"]),
    (images("images_and_tar"), ["originals.tar", "images_and_tar"]),
    (chat("chat-parts-mixed", "chatml"), ["its 8 conversation(s), all alike, do not divide"]),
]


@pytest.mark.parametrize(("command", "words"), READ, ids=lambda value: None)
def test_it_is_read_as_what_it_says(command, words, genscale: Callable, caplog: pytest.LogCaptureFixture) -> None:
    done = genscale(*command)
    assert done.code == 0, done.err
    said = done.out + done.err + caplog.text
    assert all(re.search(word, said) for word in words), said


@pytest.mark.parametrize(("command", "words"), REFUSED, ids=lambda value: None)
def test_it_is_refused_in_a_line(command, words, genscale: Callable) -> None:
    message = genscale(*command).message()
    assert all(word in message for word in words), message


@pytest.mark.parametrize(("name", "tokenizer"), [("chat-newline", "chatml"), ("chat-nonewline", "chatml"),
                                                 ("chat-tools", "toolml")])
def test_the_whole_turn_of_the_assistant_is_learnt_and_nothing_else(name, tokenizer) -> None:
    data = TextData(TextDataSettings(source=str(TEXT / f"{name}.jsonl"), messages_column="messages", lanes=1,
                                     tokenizer=str(TEXT / tokenizer), sequence_length=2000, validation_fraction=0.1), 1)
    sample = next(data.open_lane(0))[0]
    tokens = sample["tokens"].tolist()
    pieces = [data.tokenizer.decode([token]) for token in tokens]
    # Which tokens the turn is, by the marks of the template alone: from behind its header to the mark of its end.
    start, end = (data.tokenizer.encode_chats([word])[0][0][0] for word in ("<|im_start|>", "<|im_end|>"))
    inside = learnt = False
    expected, header = [], ""
    for token, piece in zip(tokens, pieces, strict=True):
        if token == start:
            inside, learnt, header = True, False, ""
        expected.append(int(learnt or token == data.tokenizer.end_of_text))
        if token == end:
            inside = learnt = False
        elif inside and token != start:
            header += piece
            learnt = learnt or header == "assistant\n"
    assert sum(expected) > 100
    # The first block begins at a document's start, so that the marks are all there.
    assert sample["mask"].tolist() == expected
    if tokenizer == "toolml":
        assert "null" not in data.tokenizer.decode(tokens)


def test_words_that_become_dates_after_a_mebibyte_stay_what_they_are(tmp_path, genscale: Callable) -> None:
    rows = [{"text": f"words {i} " + "x" * 100} for i in range(11_000)] + [{"text": "2099-03-20"}] * 2_000
    (tmp_path / "late.jsonl").write_text("\n".join(map(json.dumps, rows)))
    from genscale.data.readers import find_shards
    from genscale.data.spec import Spec

    found = [row.document for shard in find_shards(Spec("data.source", str(tmp_path / "late.jsonl")), 1)
             for row in shard.rows()]
    assert found == [row["text"] for row in rows]


def test_objects_over_several_lines_are_read_at_any_size(tmp_path) -> None:
    from genscale.data.readers import find_shards
    from genscale.data.spec import Spec

    rows = [{"text": f"words {i} " + "x" * 100} for i in range(20_000)]
    (tmp_path / "pretty.jsonl").write_text("\n".join(json.dumps(row, indent=2) for row in rows))
    found = [row.document for shard in find_shards(Spec("data.source", str(tmp_path / "pretty.jsonl")), 1)
             for row in shard.rows()]
    assert found == [row["text"] for row in rows]


def test_a_validation_of_one_token_is_said_before_the_first_step(refuse) -> None:
    assert "validation" in refuse("--data.validation_source", TEXT / "onechar.txt", "--train.evaluate_every", 2)


def test_a_conversation_that_its_template_refuses_is_left_out_and_counted(tmp_path, genscale: Callable,
                                                                               caplog: pytest.LogCaptureFixture) -> None:
    rows = [[{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "answer"}] for i in range(3000)]
    rows[1700] = [{"role": "system", "content": "be brief"}, *rows[1700]]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    done = genscale(*INSPECT_TEXT, "--data.source", tmp_path / "chats.jsonl", "--data.messages_column", "messages",
                    "--data.tokenizer", TEXT / "llama2ml")
    assert done.code == 0, done.err
    words = ("1 of 3000 conversations", "row 1700", "System role not supported")
    assert all(word in caplog.text for word in words), caplog.text


def test_pictures_of_floats_are_seen_as_they_are(tmp_path) -> None:
    from genscale.data.images.data import ImageData, ImageDataSettings

    data = ImageData(ImageDataSettings(source=str(IMAGES / "floattif"), size=32), 1)
    pictures = np.stack([sample["image"] for sample in data.validation()])
    assert pictures.std() > 0.05 * (pictures.max() - pictures.min()) > 0
    raw = np.asarray(Image.open(next((IMAGES / "floattif").glob("*.tif"))))
    assert raw.max() <= 1.0  # which is why they turned black


def test_images_that_a_table_without_bytes_names_by_path_are_read(tmp_path, genscale: Callable) -> None:
    shutil.copy(IMAGES / "pq" / "path.parquet", tmp_path)
    (tmp_path / "img").mkdir()
    for i in range(100):
        Image.new("L", (8, 8), i).save(tmp_path / "img" / f"{i}.png")
    done = genscale(*INSPECT_IMAGES, "--data.source", tmp_path / "path.parquet")
    assert done.code == 0 and "0 of them damaged" in done.out, done.out + done.err


def test_dots_in_the_names_of_a_tars_members_lose_no_image(genscale: Callable) -> None:
    done = genscale(*images("mixdots.tar"))
    counts = [int(n) for n in re.findall(r"([0-9]+) (?:images )?to (?:train|validate) on", done.out)]
    assert sum(counts) == 100 or re.search(r"50 .*(left|dots|sample)", done.out + done.err), done.out + done.err


def test_a_circle_of_links_a_pipe_and_foreign_names_in_a_folder(tmp_path, genscale: Callable) -> None:
    import os

    shutil.copytree(IMAGES / "hidden", tmp_path / "pictures")
    os.symlink("..", tmp_path / "pictures" / "a" / "back")
    os.mkfifo(tmp_path / "pictures" / "p.png")
    latin = os.fsencode(tmp_path / "pictures" / "b") + b"/caf\xe9.png"
    shutil.copy(next((tmp_path / "pictures" / "b").glob("*.png")), latin)
    done = genscale(*INSPECT_IMAGES, "--data.source", tmp_path / "pictures")
    assert done.code == 0, done.err
    counts = [int(n) for n in re.findall(r"([0-9]+) (?:images )?to (?:train|validate) on", done.out)]
    assert sum(counts) == 41, done.out


def test_no_source_at_all_is_refused(refuse) -> None:
    assert "data.source" in refuse("--data.source", "")

"""The adapter to lm-evaluation-harness against the harness's own model class of transformers, and by hand from logits.

Runs where the extra is installed: pip install 'genscale[eval]'; pytest tests/evaluation/test_harness.py
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra: pip install 'genscale[eval]'")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from genscale.checkpoint.checkpoints import Checkpoint
from genscale.data.text.tokenizers import ByteTokenizer, load_tokenizer, train_bpe
from genscale.errors import UserError
from genscale.families import FAMILIES, family
from genscale.families.gpt import task_files
from genscale.families.gpt.decoding import generate
from genscale.families.gpt.harness import GenscaleLM, cut_windows
from genscale.families.gpt.network import GPT, GPTSettings
from genscale.interop.huggingface import open_huggingface
from genscale.parallel.materialise import fill
from genscale.reading import Unreadable
from genscale.settings.parser import load_config
from genscale.verbs.trained import load_weights

POSITIONS = 48
TEXTS = ["The sea is grey, and the sky above it is grey too.", "A", "Naïve café. 東京",
         "Three of the four hens have left the yard; one is still here. " * 7,
         "one two three four five six seven eight nine ten eleven twelve"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One Llama with large weights and one tokenizer, in transformers' classes and in ours."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer_file = train_bpe(TEXTS * 3, 320, folder)
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        max_position_embeddings=POSITIONS, initializer_range=0.3, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
        pad_token_id=0)).eval()
    network.save_pretrained(folder)
    words = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    # Its cache (lm-eval 0.4.13) confuses two requests that cut one text at different places.
    theirs = HFLM(pretrained=network, tokenizer=words, max_length=POSITIONS, batch_size=3, device="cpu", logits_cache=False)
    fields, read = open_huggingface(str(folder))
    own = GPT(GPTSettings(**fields), fields["vocab_size"])
    fill(own, read)
    return SimpleNamespace(theirs=theirs, ours=GenscaleLM(own.eval(), load_tokenizer(str(tokenizer_file)), batch_size=3))


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=words, idx=0) for words in arguments]


def test_log_likelihoods_equal_the_harness_own_transformers_class(models: SimpleNamespace) -> None:
    pairs = [(text[:cut], text[cut:cut + 30]) for text in TEXTS for cut in (0, 5, 11, 200) if text[cut:]]
    pairs += [("The sea is", word) for word in (" grey", " green", " four", ",")] + [("ends in spaces  ", "so")]
    asked = requests("loglikelihood", pairs)
    expected = models.theirs.loglikelihood(asked, disable_tqdm=True)
    results = models.ours.loglikelihood(asked, disable_tqdm=True)
    assert [value for value, _ in results] == pytest.approx([value for value, _ in expected], rel=1e-5)
    assert [greedy for _, greedy in results] == [greedy for _, greedy in expected]
    assert min(len(models.ours.tok_encode(first + second)) for first, second in pairs) < POSITIONS < max(
        len(models.ours.tok_encode(first + second)) for first, second in pairs)


def test_what_greedy_decoding_writes_is_called_greedy(models: SimpleNamespace) -> None:
    context = models.ours.tok_encode("one two")
    ids = generate(models.ours.network, torch.tensor([context]), 6, positions=POSITIONS, generators=[], temperature=0)
    likeliest = ids[0, len(context):].tolist()
    asked = [likeliest, [*likeliest[:-1], (likeliest[-1] + 1) % 320]]
    results = models.ours._loglikelihood_tokens([(("one two", ""), context, targets) for targets in asked], True)
    assert [greedy for _, greedy in results] == [True, False]


def test_rolling_log_likelihoods_equal_the_harness_own_transformers_class(models: SimpleNamespace) -> None:
    asked = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    assert max(len(models.ours.tok_encode(text)) for text in TEXTS) > 2 * POSITIONS
    expected = models.theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert models.ours.loglikelihood_rolling(asked, disable_tqdm=True) == pytest.approx(expected, rel=1e-5)


def test_texts_equal_the_harness_own_transformers_class(models: SimpleNamespace) -> None:
    """Contexts of very different lengths side by side; stop sequences; two kinds of request in one call."""
    short = {"until": ["e", "\n\n"], "max_gen_toks": 12, "do_sample": False}
    asked = [(text, kwargs) for kwargs in (short, {"until": ["zebra"], "max_gen_toks": 20}) for text in TEXTS]
    expected = models.theirs.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert models.ours.generate_until(requests("generate_until", asked), disable_tqdm=True) == expected
    assert len(set(expected)) > 5 and all("e" not in text for text in expected[:len(TEXTS)])


def test_sampling_is_done_when_asked_for(models: SimpleNamespace) -> None:
    def write(**settings) -> str:
        asked = [("The", {"until": [], "max_gen_toks": 20, **settings})]
        return models.ours.generate_until(requests("generate_until", asked), True)[0]

    assert write(do_sample=True, temperature=2.0) != write() == write(do_sample=True, temperature=2.0, top_k=1)
    with pytest.raises(UserError, match=r"generation_kwargs.num_beams"):
        write(num_beams=4)


def test_every_token_is_predicted_once_from_as_many_before_it_as_fit() -> None:
    context, continuation = [0, 1], list(range(2, 25))
    windows = list(cut_windows(context, continuation, 10))
    assert [token for _, targets in windows for token in targets] == continuation
    for read, targets in windows:
        assert read[-len(targets):] == [token - 1 for token in targets] and len(read) == min(10, targets[-1])


# --- genscale evaluate RUN --tasks -----------------------------------------------------------------------------------------

QUESTIONS = [{"question": f"{a} and {b} make", "choices": [" one", " two", f" {a + b}"], "answer": (a * b) % 3}
             for a in range(4) for b in range(5)]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of three tasks of our own: choose, write, and the likelihood of whole texts."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test",
              "doc_to_text": "{{question}}", "metadata": {"version": 1.0}}
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, settings in {
        "our_choice": {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer",
                       "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]},
        "our_writing": {"output_type": "generate_until", "doc_to_target": "{{choices[2]}}",
                        "generation_kwargs": {"until": [" "], "max_gen_toks": 4},
                        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]},
        "our_text": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
                     "metric_list": [{"metric": "bits_per_byte"}]},
    }.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **settings}))
    return folder


@torch.no_grad()
def test_tasks_of_ones_own(genscale, trained: Path, tasks: Path) -> None:
    outcome = genscale("evaluate", trained, "--tasks", "our_choice,our_writing,our_text", "--include_path", tasks)
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["step"] == 6 and report["limit"] is None
    assert "our_choice" in outcome.err and "|acc" in outcome.err.replace(" ", "")

    checkpoint = Checkpoint(trained / "checkpoints" / "step-00000006")
    objective = family("gpt").restore(load_config(FAMILIES, checkpoint.path / "config.yaml"), trained)
    load_weights(objective, checkpoint)

    def nats(before: list[int], after: list[int]) -> float:
        logits = objective.networks["gpt"](torch.tensor([(before + after)[:-1]]))[0, -len(after):]
        return -logits.log_softmax(-1)[range(len(after)), after].sum().item()

    encode, end = ByteTokenizer().encode, ByteTokenizer.end_of_text
    best = [min(range(3), key=lambda i, q=q: nats(encode(q["question"]), encode(q["choices"][i]))) for q in QUESTIONS]
    right = sum(choice == question["answer"] for choice, question in zip(best, QUESTIONS, strict=True))
    assert 0 < right < len(QUESTIONS) and report["results"]["our_choice"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    bits = sum(nats([end], encode(question["question"])) for question in QUESTIONS) / torch.tensor(2.0).log().item()
    expected = bits / sum(len(question["question"]) for question in QUESTIONS)
    assert report["results"]["our_text"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)
    assert "exact_match,none" in report["results"]["our_writing"]
    assert report["n-samples"]["our_choice"] == {"original": 20, "effective": 20}


def test_limit(genscale, trained: Path, tasks: Path) -> None:
    outcome = genscale("evaluate", trained, "--tasks", "our_choice", "--include_path", tasks, "--limit", 3)
    assert json.loads(outcome.out)["n-samples"]["our_choice"]["effective"] == 3


WITHIN = "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"


@pytest.mark.parametrize(("line", "words"), [
    ("process_docs: !function planted.change", ["line 1", "'!function'", "lm-eval"]),
    ("%TAG !x! !func\n---\nprocess_docs: !x!tion planted.change", ["'!function'"]),
    ("include: below/common", ["below/common", "'!function'"]),
    ("include: [below/common, 5]", ["below/common", "'!function'"]),
    ("include: 5", ["include: 5 is not the name of a file"]),
    (WITHIN.replace("acc", "BESIDE/planted.py"), ["metric", "planted.py", "acc_norm"]),
    (WITHIN.replace("acc,", "acc, hf_evaluate: true,"), ["metric acc"]),
    ("doc_to_text: \"{{ ''.__class__.__mro__[1].__subclasses__() }}\"", ["template", "__class__"]),
])  # fmt: skip
def test_a_task_file_runs_no_code(line: str, words: list[str], genscale, trained: Path, tasks: Path) -> None:
    mark = tasks.parent / "executed"
    (tasks / "planted.py").write_text(f"import os\nos.mkdir({str(mark)!r})\ndef change(docs):\n    return docs\n")
    (tasks / "below").mkdir()
    (tasks / "below" / "common").write_text("process_docs: !function ../planted.change\n")
    key = line.rpartition("---\n")[2].partition(":")[0]
    settings = yaml.safe_load((tasks / "our_choice.yaml").read_text())
    settings.pop(key, None)
    head, mark_of_start, rest = line.replace("BESIDE", str(tasks)).rpartition("---\n")
    (tasks / "our_choice.yaml").write_text(f"{head}{mark_of_start}{rest}\n{yaml.safe_dump(settings)}")
    message = genscale("evaluate", trained, "--tasks", "our_choice", "--include_path", tasks).message_of_run()
    assert all(word in message for word in words), message
    assert not mark.exists()


@pytest.mark.parametrize(("key", "value", "words"), [
    ("include", "../secret", ["include: ../secret leads out of", "set --include_path to a folder that holds both"]),
    ("include", "/etc/passwd", ["include: /etc/passwd leads out of"]),
    ("doc_to_text", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", ["within 0.5 s"]),
    ("doc_to_text", "{{ range(10 ** 9) | list }}", ["a template of the task is wrong", "Range too big"]),
    ("doc_to_text", "{{ 'a' * 10 ** 10 }}", ["more than 10,000,000 characters"]),
    ("doc_to_text", "{{ 9 ** (9 ** 9) }}", ["more than 10,000,000 characters"]),
    ("doc_to_text", "{{ question", ["a template of the task is wrong", "end of template"]),
])
def test_a_task_file_holds_nobody_up_and_leads_nowhere_else(genscale, trained, tasks, monkeypatch, key, value, words) -> None:
    monkeypatch.setattr(task_files, "TEMPLATE_SECONDS", 0.5)
    (tasks.parent / "secret").write_text("task: [a secret of the user's own\n")
    settings = yaml.safe_load((tasks / "our_choice.yaml").read_text())
    (tasks / "our_choice.yaml").write_text(yaml.safe_dump({**settings, key: value}))
    message = genscale("evaluate", trained, "--tasks", "our_choice", "--include_path", tasks).message_of_run()
    assert all(word in message for word in words) and "secret of" not in message, message


@pytest.mark.parametrize("text", ["a: &a [*a]\n", "[" * 20_000, "&a0 [x]: 1\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(12)), None])
def test_task_files_that_are_towers_or_pipes_are_looked_at_in_time(tmp_path, text) -> None:
    """An alias within itself, brackets without end, aliases that stand for 9 ** 12 texts, and a pipe."""
    file = tmp_path / "task.yaml"
    if text is None:
        os.mkfifo(file)
    else:
        file.write_text(text)
    started = time.monotonic()
    with contextlib.suppress(UserError, Unreadable):
        task_files.refuse_code(tmp_path)
    assert time.monotonic() - started < 5


@pytest.mark.slow  # the harness reads all of its own tasks first
def test_a_task_that_is_not_known_names_the_nearest(genscale, trained: Path, tasks: Path) -> None:
    message = genscale("evaluate", trained, "--tasks", "our_chioce", "--include_path", tasks).message_of_run()
    assert "--tasks" in message and "'our_chioce'" in message and "our_choice" in message

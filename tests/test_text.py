"""LoRA of a transformer and few-shot intents, on a tiny one made on the spot."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_text import write

from mcdi_fast import GeneratedWeights, McdiError
from mcdi_fast.config import PrepareConfig
from mcdi_fast.store import load_tensors
from mcdi_fast.study.text import one_part, record_of, tabulated
from mcdi_fast.tasks import Setup, check_family, find_family
from mcdi_fast.tasks.lora import LoraOptions, TextClassifier, glue
from mcdi_fast.tasks.text import IntentOptions, Texts, intents, load_texts, load_transformer, sentence_features
from mcdi_fast.train import main

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("tiny"))


def options(folder, **more):
    given = {"support": 8, "queries": 10, "train_rows": 16, "rows": 60, "rank": 2, "start_steps": 20} | more
    sets = tuple(str(folder / f"{name}.json") for name in ("warm", "size"))
    return LoraOptions(**({"model": str(folder / "model"), "sets": sets} | given))


@pytest.fixture(scope="module")
def family(folder):
    return glue(options(folder), Setup(cache_dir=folder / "cache"))


def test_the_family_keeps_the_door_s_promises(family):
    check_family(family)
    assert family.layout.num_tokens == 2 * 2 + 2


@pytest.mark.parametrize("modules", [("query", "value"), ("query", "key", "value", "dense")])
@pytest.mark.parametrize("name", ["size", "pairs"])
def test_logits_and_gradients_are_peft_s(folder, tmp_path, name, modules):
    """The whole transformer under peft, in float64 tolerance of float32: the same logits and autograd's gradient."""
    sets = tuple(str(folder / f"{one}.json") for one in ("warm", name))
    family = glue(options(folder, modules=modules, sets=sets), Setup(cache_dir=folder / "cache"))
    assert family.layout.num_tokens == 2 * len(modules) + 2
    tasks = family.tasks("test", 1, 1, 0)
    theta = family.start(1, PrepareConfig(start_std=0.3), torch.Generator().manual_seed(0))
    weights = GeneratedWeights(family.layout, theta + tasks.query["base"])
    weights.load_into(family.model, 0)
    tokenizer, net = load_transformer(str(folder / "model"))
    # the texts of the rows, found by their place: test rows of both sets
    texts = {}
    start = 0
    for one in sets:
        data = load_texts(one)
        for source, begin, count in (("train", 0, 53), ("train", 53, 27), ("test", 0, 30)):
            order = torch.randperm(80, generator=torch.Generator().manual_seed(0)).tolist()
            for i in order[begin : begin + count]:
                part = data[source]
                texts[start] = part.text[i], part.second and part.second[i]
                start += 1
    assert start == len(family._length)
    text, second = zip(*(texts[row] for row in tasks.query["row"][0].tolist()), strict=True)
    pairs = None if second[0] is None else list(second)
    inputs = tokenizer(list(text), pairs, padding=True, return_tensors="pt")
    inputs["apart"] = sentence_features(tokenizer, net, Texts(list(text), pairs, []), 64, tmp_path)
    logits = family.model(**inputs)
    assert torch.allclose(logits, family.logits(theta, tasks.query)[0], atol=1e-4)
    torch.nn.functional.cross_entropy(logits, tasks.query["label"][0]).backward()
    slope = family.layout.unpack(family.gradient(theta, tasks.query)[0])
    named = dict(family.model.named_parameters())
    for name, found in slope.items():
        assert torch.allclose(named[name].grad, found, atol=1e-5), name


def test_generated_weights_as_peft_files(folder, family, tmp_path):
    tasks = family.tasks("test", 0, 2, 0)
    theta = family.start(2, PrepareConfig(start_std=0.3), torch.Generator().manual_seed(0))
    weights = GeneratedWeights(family.layout, theta + tasks.query["base"])
    weights.save_peft(tmp_path / "one", 1, family.peft_config)
    weights.load_into(family.model, 1)
    tokenizer, net = load_transformer(str(folder / "model"))
    again = peft.PeftModel.from_pretrained(TextClassifier(net), str(tmp_path / "one")).eval()
    texts = Texts(["sun sun word3", "ice"], None, [0, 1])
    inputs = tokenizer(texts.text, padding=True, return_tensors="pt")
    inputs["apart"] = sentence_features(tokenizer, net, texts, 64, tmp_path)
    assert torch.equal(again(**inputs), family.model(**inputs))


def test_lora_learns_what_the_frozen_transformer_does_not_show(family):
    tasks = family.tasks("test", 0, 4, 0)
    recipe = PrepareConfig(steps=60, learning_rate=0.02, rho=0.0, weight_decay=0.0, start_std=0.0)
    theta = family.trajectories(tasks.train, recipe, 1, torch.Generator())[:, -1]
    frozen = family.scores(family.baselines()["ridge"](tasks), tasks.query)
    assert family.scores(theta, tasks.query).mean() >= frozen.mean()


def test_the_common_matrices_make_better_heads(folder, family):
    """On new examples, than the frozen model's features do; learnt once, and part of what a bank is known by."""
    taught = glue(options(folder, start_steps=100), Setup(cache_dir=folder / "cache"))
    tasks, methods = taught.tasks("test", 0, 40, 0), taught.baselines()
    common, frozen = (taught.scores(methods[name](tasks), tasks.query).mean() for name in ("base", "ridge"))
    assert common > frozen + 0.05
    again = glue(options(folder), Setup(cache_dir=folder / "cache"))
    assert torch.equal(again.common, family.common)
    assert again.fingerprint == family.fingerprint
    assert again.fingerprint != taught.fingerprint
    bare = glue(options(folder, start_steps=0), Setup(cache_dir=folder / "cache"))
    assert torch.equal(bare.common, bare.frozen)
    assert bare.fingerprint != family.fingerprint


def test_the_order_of_the_classes_changes_heads_alone(family):
    """Matrices are told and trained the same; a class keeps its own head, wherever it is."""
    support = family.draw("test", 0, 1, 0)[0]
    rows = torch.cat([support, support.flip(1)])
    base, condition = family.base(rows)
    for found in (base, condition):
        assert torch.allclose(found[0, :-2], found[1, :-2], atol=1e-5)
        assert torch.allclose(found[0, -2:], found[1, -2:].flip(0), atol=1e-4)
    assert not condition[0, :-2, family.axes.shape[1] :].any()
    assert not torch.allclose(condition[0, -2], condition[0, -1], atol=1e-2)
    data = {"row": rows.mT.flatten(1), "label": torch.arange(2).repeat(2, rows.shape[2]), "base": base}
    recipe = PrepareConfig(steps=6, learning_rate=0.003, rho=0.0, weight_decay=0.0, start_std=0.0)
    one, other = family.trajectories(data, recipe, 1, torch.Generator())[:, -1]
    assert torch.allclose(one[:-2], other[:-2], atol=1e-3)
    assert torch.allclose(one[-2:], other[-2:].flip(0), atol=1e-3)


def test_what_a_user_of_a_generator_needs_is_saved(family, tmp_path):
    family.save(tmp_path)
    found = load_tensors(tmp_path / "text-start.safetensors", "text-start")[0]
    assert torch.equal(found["common"], family.common)
    assert found["axes"].shape == (32, family.axes.shape[1])


def test_the_comparison_on_tiny_sets(folder, tmp_path):
    """Every method on the same tasks; gradients from peft's own beginning; the record pairs them with Mc-Di."""
    config = find_family("glue").config()
    config = replace(
        config,
        task=options(folder),
        prepare=replace(config.prepare, tasks=8, steps=6),
        meta=replace(config.meta, steps=4, meta_batch=4),
        evaluate=replace(config.evaluate, tasks=6, validation_tasks=4),
    )
    setup = Setup(cache_dir=folder / "cache")
    parts = [
        one_part(config, 0, objective, tmp_path / "bank", setup, {}) for objective in ("local-consistency", "vanilla")
    ]
    assert {"Mc-Di", "base", "bank-mean", "LoRA by gradient", "ridge, sentence features"} <= set(parts[0]["rows"])
    rows = record_of(parts)
    assert rows["Mc-Di"]["mc_di_minus_this"] == 0
    gap = torch.tensor(parts[0]["rows"]["Mc-Di"]["scores"]) - torch.tensor(parts[1]["rows"]["Mv-Di"]["scores"])
    assert rows["Mv-Di"]["mc_di_minus_this"] == pytest.approx(100 * float(gap.mean()), abs=0.01)
    assert len(tabulated(rows)) == len(rows) + 3


def test_a_left_out_set_is_in_the_test_tasks_alone(folder):
    left = str(folder / "size.json")
    family = glue(options(folder, left_out=left), Setup(cache_dir=folder / "cache"))
    assert family.names("test") == (left,)
    assert left not in family.names("train") + family.names("val")


def test_new_classes(folder, tmp_path):
    """Tasks of classes that training has not seen; a class keeps its head, wherever it is; too few rows are one clear line."""
    word = {
        "text": [f"word{i % 24} sun" + " ice" * (i // 24) for i in range(24 * 12)],
        "label": [i % 24 for i in range(24 * 12)],
    }
    path = tmp_path / "words.json"
    path.write_text(json.dumps({"train": word, "test": word}))
    given = {"sets": (str(path),), "ways": 3, "new_classes": True, "support": 6, "queries": 9, "train_rows": 15}
    setup = Setup(cache_dir=tmp_path)
    family = glue(options(folder, **given), setup)
    check_family(family)
    assert family.layout.num_tokens == 2 * 2 + 3
    rows = {
        split: {int(row) for one in family.classes[str(path), split] for row in one}
        for split in ("train", "val", "test")
    }
    assert [len(family.classes[str(path), split]) for split in rows] == [16, 3, 5]
    assert sum(map(len, rows.values())) == len(set().union(*rows.values())) == 24 * 12
    tasks = family.tasks("test", 0, 4, 0)
    for task in range(4):
        support, query, train = (set(data["row"][task].tolist()) for data in (tasks.support, tasks.query, tasks.train))
        assert support | query | train <= rows["test"]
        assert not (support | train) & query
    support = family.draw("test", 0, 1, 0)[0]
    base, condition = family.base(torch.cat([support, support.roll(1, 1)]))
    for found in (base, condition):
        assert torch.allclose(found[0, :-3], found[1, :-3], atol=1e-5)
        assert torch.allclose(found[0, -3:], found[1, -3:].roll(-1, 0), atol=1e-4)
    other = glue(options(folder, **given, left_out=str(folder / "intents.json")), setup)
    assert len(other.classes[str(folder / "intents.json"), "test"]) == 16
    with pytest.raises(McdiError, match="an example of each class"):
        glue(options(folder, **given | {"support": 2}), setup)


def test_intents(folder):
    given = {"source": str(folder / "intents.json"), "encoder": str(folder / "model"), "ways": 2, "components": 16}
    family = intents(IntentOptions(queries=5, **given), Setup(cache_dir=folder / "cache"))
    check_family(family)
    target = str(folder / "size.json")
    both = intents(IntentOptions(queries=5, target=target, **given), Setup(cache_dir=folder / "cache"))
    own, other = (len(both.splits[name].counts) for name in (given["source"], "test"))
    assert (own, other) == (len(family.splits["test"].counts), 2)


def test_example_customer_intents(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    import customer_intents

    small = ["--prepare.tasks", "40", "--meta.steps", "10", "--evaluate.tasks", "4", "--evaluate.validation-tasks", "4"]
    given = ["--task.source", str(folder / "intents.json"), "--task.encoder", str(folder / "model"), "--task.ways", "2"]
    where = ["--run-dir", str(folder / "run"), "--cache-dir", str(folder / "cache"), "--task.components", "16"]
    assert main(["--dataset", "intents", *where, *given, *small]) == 0
    found = customer_intents.main(
        [
            "--generator",
            str(folder / "run/generator"),
            "--model",
            str(folder / "model"),
            "--cache-dir",
            str(folder / "cache"),
        ]
    )
    assert set(found) <= set(customer_intents.INTENTS)


def test_one_clear_line(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("MCDI_DATA_DIR", raising=False)
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "float.json").write_text(json.dumps({s: {"text": ["a"], "label": [0.5]} for s in ("train", "test")}))
    for call, words in (
        (lambda: load_texts("mrpc"), "MCDI_DATA_DIR"),
        (lambda: load_texts("rte", tmp_path), "cannot read rte"),
        (lambda: load_texts(str(tmp_path / "bad.json")), "bad.json"),
        (lambda: load_texts(str(tmp_path / "float.json")), "integer labels"),
        (lambda: load_transformer("nowhere"), "nowhere"),
        (lambda: load_transformer(str(tmp_path)), "not a transformer"),
        (lambda: glue(options(folder, support=400), Setup(cache_dir=tmp_path)), "--task.support"),
    ):
        with pytest.raises(McdiError) as caught:
            call()
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(McdiError, match=r"mcdi_fast\[text\]"):
        load_transformer(str(folder / "model"))


_LARGE = """
import resource, sys, peft, torch
from torch import nn
from mcdi_fast import Sampler, TrajectoryBank, WeightLayout
from mcdi_fast.config import MetaConfig
from mcdi_fast.meta import MetaTrainer

torch.set_num_threads(1)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.value = nn.Linear(768, 768), nn.Linear(768, 768)


model = peft.get_peft_model(nn.ModuleList(Layer() for _ in range(12)), peft.LoraConfig(r=8, target_modules=["query", "value"]))
layout = WeightLayout.lora(model)
assert (layout.num_tokens, layout.width) == (192, 1536)
bank = TrajectoryBank.create(sys.argv[1], layout, 3, 768, None)
random = torch.Generator().manual_seed(0)
bank.append(0.01 * torch.randn(16, 3, 192, 1536, generator=random), torch.randn(16, 1, 768, generator=random))
trainer = MetaTrainer(bank, MetaConfig(steps=1))
assert trainer.outer_step().isfinite()
weights = Sampler(trainer.generator()).sample(torch.randn(2, 1, 768, generator=random), range(2))
assert weights.tokens.shape == (2, 192, 1536)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
def test_rank_8_of_all_layers_of_a_wide_model_fits(tmp_path):
    """192 tokens of width 1,536: layout, bank, a meta-step of the default size and a sample, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _LARGE, str(tmp_path / "bank")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 8

"""LoRA: a token a rank component, and adapters that peft reads and writes."""

import json

import pytest
import torch
from helpers import error_of
from torch import nn

from mcdi_fast import GeneratedWeights, WeightLayout
from mcdi_fast.peft_files import adapter_name, adapter_state_dict, save_adapter

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*save_embedding_layers", "ignore:.*invalid shape", "ignore:.*torch.vmap cannot"
)


class Mixed(nn.Module):
    """An embedding, a convolution and two linear layers of different widths."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv = nn.Embedding(11, 6), nn.Conv1d(6, 5, 3, padding=1)
        self.hidden, self.head = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x):
        return self.head(torch.relu(self.hidden(self.conv(self.embed(x).mT).mean(-1))))


def mlp():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


CASES = {
    "plain": (mlp, {"target_modules": ["0"]}),
    "modules to save": (mlp, {"target_modules": ["0"], "modules_to_save": ["2"]}),
    "ranks and scales": (
        Mixed,
        {"target_modules": ["hidden", "head"], "rank_pattern": {"head": 2}, "alpha_pattern": {"head": 3}, "use_rslora": True},
    ),
    "embedding and convolution": (Mixed, {"target_modules": ["embed", "conv", "head"], "modules_to_save": ["hidden"]}),
    "dora": (mlp, {"target_modules": ["0", "2"], "use_dora": True}),
    "bias": (mlp, {"target_modules": ["0"], "lora_bias": True}),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(0)
    make, options = CASES[request.param]
    base = make()
    copy = make()
    copy.load_state_dict(base.state_dict())
    x = torch.randint(11, (4, 9)) if make is Mixed else torch.randn(4, 8)
    return base, peft.get_peft_model(copy, peft.LoraConfig(r=4, **options)).eval(), x


def generated(model, tasks=2):
    layout = WeightLayout.lora(model)
    return GeneratedWeights(layout, torch.randn(tasks, layout.num_tokens, layout.width))


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_what_is_generated_is_what_peft_trains(case):
    _, model, _ = case
    assert set(WeightLayout.lora(model).names) == trainable(model)


def test_saved_adapters_load_with_equal_logits(case, tmp_path):
    base, model, x = case
    weights = generated(model)
    for i in range(2):
        weights.load_into(model, i)
        expected = model(x)
        weights.save_peft(tmp_path / "a" / str(i), i, model.peft_config["default"])
        again = type(base)(*base) if isinstance(base, nn.Sequential) else Mixed()
        again.load_state_dict(base.state_dict())
        loaded = peft.PeftModel.from_pretrained(again, tmp_path / "a" / str(i)).eval()
        assert torch.equal(loaded(x), expected)
        # as peft writes it itself
        model.save_pretrained(tmp_path / "theirs")
        assert safetensors_of(tmp_path / "a" / str(i)).keys() == safetensors_of(tmp_path / "theirs").keys()


def safetensors_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_a_folder_of_adapter_files_is_packed(case, tmp_path):
    _, model, _ = case
    weights = generated(model)
    for i in range(2):
        weights.load_into(model, i)
        model.save_pretrained(tmp_path / str(i))
    files = [safetensors_of(tmp_path / str(i)) for i in range(2)]
    mask = weights.layout.mask
    assert torch.equal(weights.layout.pack_batch(files)[:, mask], weights.tokens[:, mask])
    assert torch.equal(weights.layout.pack(model)[mask], weights.tokens[1, mask])


def test_generated_weights_go_into_a_live_adapter(case):
    _, model, x = case
    weights = generated(model)
    weights.load_into(model, 0)
    expected = model(x)
    weights.load_into(model, 1)
    assert not torch.equal(model(x), expected)
    peft.set_peft_model_state_dict(model, adapter_state_dict(weights.state_dict(0)))
    assert torch.equal(model(x), expected)
    model, x = model.double(), x if x.dtype == torch.int64 else x.double()
    found = GeneratedWeights(weights.layout, weights.tokens.double()).functional_call(model, torch.stack([x, x]))
    torch.testing.assert_close(found[0], model(x))


def test_a_token_is_a_row_of_a_beside_a_column_of_b():
    for width in (64, 768):
        net = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        model = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["0", "2"]))
        layout = WeightLayout.lora(model)
        assert (layout.num_tokens, layout.width) == (8, 2 * width)
        assert layout.mask.all()
        padded = WeightLayout.from_module(model, select=lambda name: "lora_" in name)
        assert padded.num_tokens * padded.width > 4 * width * 30
    a, b = (model.get_parameter(f"base_model.model.2.lora_{m}.default.weight") for m in "AB")
    nn.init.normal_(b)
    tokens = layout.pack(model)
    assert torch.equal(tokens[5, :width], a[1])
    assert torch.equal(tokens[5, width:], b[:, 1])
    assert not layout.exchangeable
    assert WeightLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


def test_narrower_pairs_are_padded_and_masked():
    model = peft.get_peft_model(
        Mixed(), peft.LoraConfig(r=2, target_modules=["hidden", "head"], rank_pattern={"head": 3})
    )
    layout = WeightLayout.lora(model)
    assert [entry.rows for entry in layout.entries] == [2, 3]
    assert [entry.width for entry in layout.entries] == [5 + 7, 7 + 3]
    assert layout.mask.sum() == 2 * 12 + 3 * 10
    tokens = torch.full((1, 5, 12), float("nan"))
    tokens[:, layout.mask] = 1.0
    GeneratedWeights(layout, tokens).load_into(model, 0)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not layout.pack(model)[~layout.mask].any()


def test_select_takes_one_of_several_adapters():
    model = peft.get_peft_model(mlp(), peft.LoraConfig(r=4, target_modules=["0"]), adapter_name="one")
    model.add_adapter("two", peft.LoraConfig(r=2, target_modules=["0", "2"]))
    layout = WeightLayout.lora(model, select=lambda name: ".two." in name)
    assert layout.num_tokens == 4
    assert all(".two." in name for name in layout.names)
    assert WeightLayout.lora(model).num_tokens == 8
    # a generated adapter moves to another name by way of the file's names
    file = adapter_state_dict(GeneratedWeights(layout, torch.ones(1, 4, 16))[0])
    assert all("two" not in name for name in file)


def test_modules_without_peft():
    class Plain(nn.Module):
        """LoRA as loralib writes it."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(5, 6))
            self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(5, 2))

    class Layers(nn.Module):
        def __init__(self, rank=2):
            super().__init__()
            self.lora_A, self.lora_B = nn.Linear(6, 2, bias=False), nn.Linear(rank, 5, bias=False)

    for module in (Plain(), Layers(), nn.Sequential(Plain(), Layers())):
        layout = WeightLayout.lora(module)
        assert layout.width == 11
        assert all("lora_" in name for name in layout.names)
    assert "has no 'lora_B.weight' of shape [out, 2]" in error_of(WeightLayout.lora, Layers(rank=3))
    assert "has no 'lora_B'" in error_of(WeightLayout.lora, Plain(), ["lora_A"])
    assert "no lora_A among" in error_of(WeightLayout.lora, Plain(), ["weight"])
    assert "no parameter selected" in error_of(WeightLayout.lora, mlp())
    assert "expected a torch.nn.Module" in error_of(WeightLayout.lora, {})


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("base_model.model.a.0.lora_A.default.weight", "base_model.model.a.0.lora_A.weight"),
        ("base_model.model.a.lora_B.my_name.bias", "base_model.model.a.lora_B.bias"),
        ("base_model.model.a.lora_embedding_A.default", "base_model.model.a.lora_embedding_A"),
        ("base_model.model.a.lora_magnitude_vector.default.weight", "base_model.model.a.lora_magnitude_vector"),
        ("base_model.model.head.modules_to_save.default.out.weight", "base_model.model.head.out.weight"),
        ("layer.lora_A.default.weight", "base_model.model.layer.lora_A.weight"),  # transformers' add_adapter
        ("layer.lora_A.weight", "base_model.model.layer.lora_A.weight"),
        ("layer.lora_A", "base_model.model.layer.lora_A"),
        ("layer.lora_Ab.default.weight", "base_model.model.layer.lora_Ab.default.weight"),
    ],
)
def test_names_in_files(name, found):
    assert adapter_name(name) == found


def test_configs(tmp_path):
    model = peft.get_peft_model(mlp(), peft.LoraConfig(r=4, target_modules=["0"], task_type="FEATURE_EXTRACTION"))
    weights, config = generated(model), model.peft_config["default"]
    weights.save_peft(tmp_path / "one", 0, config)
    content = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    weights.save_peft(tmp_path / "two", 0, content)
    assert json.loads((tmp_path / "two" / "adapter_config.json").read_text()) == content
    assert peft.PeftConfig.from_pretrained(tmp_path / "two").to_dict() == peft.PeftConfig.from_pretrained(tmp_path / "one").to_dict()  # fmt: skip
    model.save_pretrained(tmp_path / "theirs")
    theirs = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert content == {name: value for name, value in theirs.items() if name != "auto_mapping"} | {"auto_mapping": None}
    for wrong in (None, model, {}, {"peft_type": "IA3"}, peft.IA3Config(target_modules=["0"])):
        assert "expected a peft.LoraConfig" in error_of(save_adapter, tmp_path, {}, wrong)
    (tmp_path / "file").write_text("")
    assert "file" in error_of(weights.save_peft, tmp_path / "file", 0, config)
    assert "out of range" in error_of(weights.save_peft, tmp_path / "x", 2, config)
    assert not (tmp_path / "x").exists()


def test_a_transformer_with_a_classifier(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(**small, vocab_size=30, num_labels=3, max_position_embeddings=20)
    base = transformers.BertForSequenceClassification(config).eval()
    state = {name: value.clone() for name, value in base.state_dict().items()}
    lora = peft.LoraConfig(r=3, task_type="SEQ_CLS", target_modules=["query", "value"])
    model = peft.get_peft_model(base, lora).eval()
    layout = WeightLayout.lora(model)
    assert layout.num_tokens == 2 * 2 * 3 + 3  # and the classifier's classes
    weights = GeneratedWeights(layout, torch.randn(3, layout.num_tokens, layout.width))
    ids, mask = torch.randint(30, (3, 5, 8)), torch.ones(3, 5, 8, dtype=torch.long)
    mask[:, 2:, 5:] = 0
    together = weights.functional_call(model, {"input_ids": ids, "attention_mask": mask})
    assert type(together).__name__ == "SequenceClassifierOutput"
    for i in range(3):
        weights.save_peft(tmp_path / str(i), i, model.peft_config["default"])
        fresh = transformers.BertForSequenceClassification(config)
        fresh.load_state_dict(state)
        loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / str(i)).eval()
        weights.load_into(model, i)
        expected = model(input_ids=ids[i], attention_mask=mask[i]).logits
        assert torch.equal(loaded(input_ids=ids[i], attention_mask=mask[i]).logits, expected)
        torch.testing.assert_close(together.logits[i], expected)

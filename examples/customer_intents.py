"""Adapt a classifier of sentences to the intents of a new customer, by a generator that a run has left.

    python -m mcdi_fast.train --dataset intents --run-dir runs/intents
    python examples/customer_intents.py --generator runs/intents/generator

The customer gives one sentence an intent. No gradient is taken: the head comes out of the generator in milliseconds.
"""

import argparse
import time
from pathlib import Path

import torch

from mcdi_fast.tasks.photos import HeadWriter
from mcdi_fast.tasks.text import MINILM, Texts, load_transformer, read

INTENTS = {
    "refund": ["i want my money back"],
    "track order": ["where is my parcel"],
    "opening hours": ["when does the shop open"],
    "change address": ["please send it to my new home"],
    "talk to a person": ["let me speak with somebody"],
}
QUESTIONS = ["can you return what i paid", "has my package been shipped", "are you open on sunday"]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generator", type=Path, default=Path("runs/intents/generator"))
    parser.add_argument("--model", default=MINILM)
    parser.add_argument("--cache-dir", type=Path, default=Path("runs/cache"))
    options = parser.parse_args(arguments)
    tokenizer, net = load_transformer(options.model)

    def embed(sentences):
        return read(tokenizer, net, Texts(sentences, None, [0] * len(sentences)), 64, options.cache_dir, False).pooled

    support = torch.stack([embed(sentences) for sentences in INTENTS.values()])[None]  # [1, intents, shots, H]
    writer = HeadWriter.load(options.generator)
    started = time.perf_counter()
    head = writer(support)[0]
    print(f"head for {len(INTENTS)} intents in {1000 * (time.perf_counter() - started):.1f} ms")
    names = list(INTENTS)
    found = [names[i] for i in writer.labels(head, embed(QUESTIONS))]
    for question, name in zip(QUESTIONS, found, strict=True):
        print(f"{question!r}: {name}")
    return found


if __name__ == "__main__":
    main()

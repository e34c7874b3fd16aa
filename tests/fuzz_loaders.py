"""Fuzz what reads files from strangers: bank, generator, JSON and the Omniglot zips. Under atheris (coverage-guided).

    python tests/fuzz_loaders.py bank -max_total_time=60 [libFuzzer options]

Whatever comes, the loader works or raises McdiError; anything else ends the run and leaves the input in a file (libFuzzer's `crash-…`).
`test_fuzz.py` runs it for a fixed budget.
"""

import io
import sys
import tempfile
import zipfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mcdi_fast", "zipfile"]):
    import torch

    import mcdi_fast.bank
    import mcdi_fast.generator
    from mcdi_fast import store
    from mcdi_fast.config import DiffusionConfig
    from mcdi_fast.denoiser import init_parameters
    from mcdi_fast.errors import McdiError
    from mcdi_fast.normalizer import Normalizer
    from mcdi_fast.tasks import omniglot
    from mcdi_fast.weights import WeightLayout

FOLDER = Path(tempfile.mkdtemp())
LAYOUT = WeightLayout.from_module(torch.nn.Linear(1, 1))


def make_bank():
    bank = mcdi_fast.bank.TrajectoryBank.create(FOLDER / "bank", LAYOUT, 1, 1)
    bank.append(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1))


def make_generator():
    one = Normalizer(torch.zeros(1, 2), torch.ones(1, 2)), Normalizer(torch.zeros(1, 1), torch.ones(1, 1))
    phi = init_parameters(2, 1 + LAYOUT.position_width, 2, 1, 1, 0)
    mcdi_fast.generator.WeightGenerator(phi, LAYOUT, *one, DiffusionConfig(2, 1)).save_pretrained(FOLDER / "generator")


def make_zip():
    from PIL import Image

    picture = io.BytesIO()
    image = Image.new("1", (105, 105), 1)
    image.paste(0, (20, 20, 60, 30))
    image.save(picture, "PNG")
    with zipfile.ZipFile(FOLDER / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for drawer in range(1, 21):
            archive.writestr(f"images_background/A/character01/0001_{drawer:02d}.png", picture.getvalue())


def read_bank():
    bank = mcdi_fast.bank.TrajectoryBank.open(FOLDER / "bank")
    bank.check_finite()


def read_generator():
    mcdi_fast.generator.WeightGenerator.from_pretrained(FOLDER / "generator")


def two(first, second):
    """The input is which of two files, then its content."""
    good = {path: None for path in (first, second)}

    def write(data):
        for path in good:
            good[path] = good[path] or path.read_bytes()
            path.write_bytes(good[path])
        if data:
            (second if data[0] % 2 else first).write_bytes(data[1:])

    return write


TARGETS = {
    "json": (lambda: None, (FOLDER / "file.json").write_bytes, lambda: store.read_json(FOLDER / "file.json")),
    "bank": (make_bank, two(FOLDER / "bank" / "bank.json", FOLDER / "bank" / "shard-000000.safetensors"), read_bank),
    "generator": (
        make_generator,
        two(FOLDER / "generator" / "config.json", FOLDER / "generator" / "model.safetensors"),
        read_generator,
    ),
    "zip": (
        make_zip,
        (FOLDER / "images.zip").write_bytes,
        lambda: omniglot._read(FOLDER, [FOLDER / "images.zip"], ["A/character01"]),
    ),
}


def seeds(name, corpus):
    """The good files as the first inputs."""
    corpus.mkdir(exist_ok=True)
    if name == "json":
        (corpus / "json").write_bytes(b'{"a": [1, 2.5e3, null, true, "\\u00e9"], "b": {}}')
    elif name == "zip":
        (corpus / "zip").write_bytes((FOLDER / "images.zip").read_bytes())
    else:
        for number, path in enumerate(sorted((FOLDER / name).iterdir())):
            (corpus / path.name).write_bytes(bytes([number]) + path.read_bytes())


def main():
    name, *options = sys.argv[1:]
    make, write, read = TARGETS[name]
    make()
    seeds(name, FOLDER / "corpus")

    def one(data):
        write(data)
        try:
            read()
        except McdiError as error:
            if "\n" in str(error):
                raise

    atheris.Setup([sys.argv[0], *options, "-max_len=8192", "-rss_limit_mb=4096", str(FOLDER / "corpus")], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

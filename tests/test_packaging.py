"""What an import costs and what it may shadow, each in a process of its own."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# of the main job's reports, downloads and command line: whoever embeds the sampler has no use for them
HEAVY = ["matplotlib", "tyro", "pooch", "tqdm", "PIL", "scipy", "hypothesis", "pytest", "psutil", "numba", "llvmlite"]


def run(code, *options, cwd, path=(), **environment):
    """stdout of a fresh interpreter, parsed from JSON."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "TRITON"))}
    clean |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    result = subprocess.run(
        [sys.executable, *options, "-c", "import json, sys\n" + code],
        cwd=cwd,
        env=clean,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def loaded_after(statement, cwd):
    """Modules that are loaded after `statement`, by their top-level name."""
    return set(run(f"{statement}\nprint(json.dumps(sorted({{n.split('.')[0] for n in sys.modules}})))", "-P", cwd=cwd))


def test_importing_the_package_costs_nothing(tmp_path):
    loaded = loaded_after("import mcdi_fast", tmp_path)
    assert not loaded & {*HEAVY, "torch", "numpy", "triton"}


def test_the_sampler_loads_its_five_dependencies_and_no_other(tmp_path):
    # torch itself may load some of these (tqdm, for its hub); what counts is what we add
    needed = loaded_after("import einops, numpy, safetensors.torch, torch, triton", tmp_path)
    loaded = loaded_after("from mcdi_fast import Sampler, WeightGenerator", tmp_path)
    assert not (loaded - needed) & set(HEAVY)
    third_party = {
        name
        for name in loaded - needed - set(sys.stdlib_module_names)
        if not name.startswith("_") and name != "mcdi_fast"
    }
    assert third_party == set()


def closure(names):
    """Distributions that these need on this machine, extras aside."""
    found, todo = {}, list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # for another platform, or a GPU's
            continue
        if name not in found:
            found[name] = distribution
            wanted = [line for line in distribution.requires or [] if "extra ==" not in line]
            todo += [re.match(r"[\w.-]+", line).group() for line in wanted]
    return found


def test_it_works_in_a_bare_environment(tmp_path):
    """A site folder that holds torch, triton, numpy, einops and safetensors with what they themselves need, and no other package."""
    place = tmp_path / "site"
    place.mkdir()
    for distribution in closure(["torch", "triton", "numpy", "einops", "safetensors"]).values():
        for file in distribution.files or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (place / top).exists():
                source = Path(distribution.locate_file(top))
                if source.exists():
                    (place / top).symlink_to(source)
    (place / "mcdi_fast").symlink_to(ROOT / "mcdi_fast")
    installed = {path.name for path in place.iterdir()}
    assert not installed & {*HEAVY, "huggingface_hub", "diffusers", "lightning", "requests", "yaml"}
    code = """
import torch
from torch import nn
from mcdi_fast import DenoiserConfig, DiffusionConfig, MetaConfig, Sampler, TrajectoryBank, WeightGenerator, WeightLayout, fit
net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.LazyLinear(3))
net(torch.zeros(1, 1, 5, 5))
layout = WeightLayout.from_module(net)
bank = TrajectoryBank.create("bank", layout, 2, 4)
bank.append(torch.randn(8, 2, layout.num_tokens, layout.width) * layout.mask, torch.randn(8, layout.num_tokens, 4))
fit(bank, MetaConfig(steps=3, meta_batch=4), DiffusionConfig(6, 2), DenoiserConfig(8, 1)).save_pretrained("generator")
gen = WeightGenerator.from_pretrained("generator")
weights = Sampler(gen).sample(torch.zeros(2, 4), seeds=[0, 1])
weights.load_into(net, 1)
print(json.dumps([list(weights.functional_call(net.eval(), torch.zeros(2, 1, 1, 5, 5)).shape), sorted(weights.state_dict(0))]))
"""
    shape, names = run(code, "-P", "-S", cwd=tmp_path, path=[place])
    assert shape == [2, 1, 3]
    assert names == ["0.bias", "0.weight", "1.bias", "1.weight", "3.bias", "3.weight"]


NO_TRITON = """
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Missing())
"""


def test_without_triton_everything_but_its_kernels_works(tmp_path):
    """As on macOS, for which there are no wheels of it."""
    code = f"""{NO_TRITON}
import torch
from mcdi_fast import *
from mcdi_fast.config import PrepareConfig
from mcdi_fast.prepare import prepare_bank
from mcdi_fast.tasks.heads import ClassRows, HeadFamily, HeadOptions
import mcdi_fast.train
family = HeadFamily({{"train": ClassRows.of_grid(torch.randn(12, 8, 4))}}, HeadOptions(3, 1, 2))
bank = prepare_bank("bank", family, PrepareConfig(tasks=20, steps=6), 3, seed=0)
settings = bank, MetaConfig(steps=3, meta_batch=4), DiffusionConfig(6), DenoiserConfig(8, 1)
fit(*settings).save_pretrained("generator")
shapes = [list(Sampler("generator").sample(torch.zeros(tasks, 5), range(tasks)).tokens.shape) for tasks in (1, 40)]
messages = []
for call in (lambda: Sampler("generator", impl="triton"), lambda: fit(*settings, impl="triton")):
    try:
        call()
    except McdiError as error:
        messages.append(str(error))
print(json.dumps([shapes, messages, "triton" in sys.modules]))
"""
    shapes, messages, loaded = run(code, "-P", cwd=tmp_path, path=[ROOT])
    assert shapes == [[1, 3, 5], [40, 3, 5]]
    assert not loaded
    assert len(messages) == 2
    for message in messages:
        assert "impl = 'triton' cannot run: triton is not installed" in message
        assert "\n" not in message


def test_the_command_without_triton_says_so(tmp_path):
    code = f"""{NO_TRITON}
import contextlib, io
from mcdi_fast.train import main
said = io.StringIO()
with contextlib.redirect_stderr(said):
    status = main(["--impl", "triton", "--run-dir", "run"])
print(json.dumps([status, said.getvalue()]))
"""
    status, said = run(code, "-P", cwd=tmp_path, path=[ROOT])
    assert status == 2
    assert said.startswith("error: impl = 'triton' cannot run: triton is not installed")
    assert said.count("\n") == 1


def test_the_import_takes_under_half_a_second_beyond_torch(tmp_path):
    """Processor time, least of three, so that a busy machine does not count."""
    code = """
import time, torch
start = time.process_time()
from mcdi_fast import Sampler, WeightGenerator, WeightLayout, fit
print(json.dumps(time.process_time() - start))
"""
    assert min(run(code, "-P", cwd=tmp_path) for _ in range(3)) < 0.5


def test_every_public_name_is_there(tmp_path):
    code = """
import mcdi_fast
missing = [name for name in mcdi_fast.__all__ if getattr(mcdi_fast, name, None) is None]
print(json.dumps([sorted(mcdi_fast.__all__), missing]))
"""
    names, missing = run(code, "-P", cwd=tmp_path)
    assert "Sampler" in names
    assert not missing
    code = "import mcdi_fast\ntry: mcdi_fast.nothing\nexcept AttributeError as e: print(json.dumps(str(e)))"
    assert "nothing" in run(code, "-P", cwd=tmp_path)


def test_kernels_are_ours_inside_the_package(tmp_path):
    code = """
import importlib, pkgutil
import mcdi_fast.kernels as kernels
names = [module.name for module in pkgutil.iter_modules(kernels.__path__)]
print(json.dumps([kernels.__name__, names, "kernels" in sys.modules]))
"""
    name, modules, top_level = run(code, "-P", cwd=tmp_path)
    assert name == "mcdi_fast.kernels"
    assert modules
    assert not top_level


# --- `kernels` at the top level belongs to the package Hugging Face publishes ---

WHERE = """
import importlib.util
spec = importlib.util.find_spec("kernels")
print(json.dumps([] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]))
"""


@pytest.mark.parametrize("options", [(), ("-P",)])
def test_no_top_level_kernels_from_elsewhere(tmp_path, options):
    found = run(WHERE, *options, cwd=tmp_path)
    assert not [place for place in found if place and Path(place).is_relative_to(ROOT / "kernels")]


def test_no_top_level_kernels_from_the_root_without_its_path():
    found = run(WHERE, "-P", cwd=ROOT)
    assert not [place for place in found if place and Path(place).is_relative_to(ROOT / "kernels")]


def test_the_folder_is_no_regular_package():
    """Without `__init__.py` it is at most a namespace package, and those give way to a real one anywhere on the path."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.fixture
def published(tmp_path):
    """A stand-in for the published package, installed behind the working directory on the path."""
    place = tmp_path / "site"
    (place / "kernels").mkdir(parents=True)
    (place / "kernels" / "__init__.py").write_text("from kernels.layer import get_kernel\n__version__ = '0.99'\n")
    (place / "kernels" / "layer.py").write_text("def get_kernel(name): return name\n")
    (place / "kernels-0.99.dist-info").mkdir()
    (place / "kernels-0.99.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.99\n")
    return place


@pytest.mark.parametrize("options", [(), ("-P",)])
def test_the_published_package_wins_from_the_root(published, options):
    code = """
import kernels
from kernels import get_kernel
import mcdi_fast.kernels
print(json.dumps([kernels.__file__, kernels.__version__, mcdi_fast.kernels.__name__]))
"""
    assert run(code, *options, cwd=ROOT, path=[published]) == [
        str(published / "kernels" / "__init__.py"),
        "0.99",
        "mcdi_fast.kernels",
    ]


def test_probing_for_it_from_the_root_is_harmless():
    """As transformers does: find the spec, ask for a version, else import and look at `__file__`."""
    code = """
import importlib, importlib.metadata, importlib.util
exists = importlib.util.find_spec("kernels") is not None
if exists:
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        module = importlib.import_module("kernels")
        exists = getattr(module, "__version__", None) is not None or getattr(module, "__file__", None) is not None
        exists = exists and "SHADOWED"
print(json.dumps(exists))
"""
    assert run(code, cwd=ROOT) in (False, True)


def test_transformers_can_be_imported_from_the_root():
    pytest.importorskip("transformers")
    assert run("import transformers\nprint(json.dumps(True))", cwd=ROOT)


# --- the wheel ---


def test_the_wheel_holds_the_kernels_once_and_nothing_at_the_top_level(tmp_path):
    """Built from a copy, without a network."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for folder in ("mcdi_fast", "kernels", "tests", "bench"):
        for file in (ROOT / folder).rglob("*.py"):
            if (ROOT / "mcdi_fast" / "kernels") in file.parents:
                continue  # the link, made again below
            target = source / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    (source / "mcdi_fast" / "py.typed").touch()
    (source / "mcdi_fast" / "kernels").symlink_to("../kernels")
    code = "from setuptools import build_meta\nprint(json.dumps(build_meta.build_wheel('dist')))"
    wheel = source / "dist" / run(code, cwd=source)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mcdi_fast"}
    expected = {f"mcdi_fast/kernels/{file.name}" for file in (ROOT / "kernels").glob("*.py")}
    assert expected <= set(names)
    assert "mcdi_fast/py.typed" in names
    assert len(names) == len(set(names))
    (tmp_path / "installed").mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    code = "import mcdi_fast, mcdi_fast.kernels\nprint(json.dumps([*mcdi_fast.__path__, *mcdi_fast.kernels.__path__]))"
    # -S: without the development install of this very package; its dependencies are not needed to find it
    found = run(code, "-P", "-S", cwd=tmp_path, path=[tmp_path / "installed"])
    assert found == [str(tmp_path / "installed" / "mcdi_fast"), str(tmp_path / "installed" / "mcdi_fast" / "kernels")]

"""Write docs/api.md from the docstrings: python docs/make_api.py. A test sees that it is up to date."""

import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import mcdi_fast

# beyond the names of the package itself
MORE = {
    "mcdi_fast.weights": ["LayoutEntry"],
    "mcdi_fast.normalizer": ["Normalizer"],
    "mcdi_fast.diffusion": (
        "Schedule Objective make_objective residual_tables noising consistency_loss sampling_steps sampler_coefficients "
        "make_inner_batch InnerBatch"
    ).split(),
    "mcdi_fast.inner": ["inner_loop"],
    "mcdi_fast.align": ["align"],
    "mcdi_fast.optim": ["trajectory"],
    "mcdi_fast.tasks": ["TaskFamily", "TaskBatch", "Metric", "Setup", "register", "find_family", "check_family"],
    "mcdi_fast.tasks.heads": ["HeadFamily", "HeadOptions", "ClassRows"],
    "mcdi_fast.tasks.modules": ["ModuleFamily"],
    "mcdi_fast.tasks.drawings": ["preprocess"],
    "mcdi_fast.tasks.images": ["load", "LabelledRows"],
    "mcdi_fast.tasks.encoders": ["load_encoder", "encode", "Encoder", "ScaledImages", "Projection"],
    "mcdi_fast.tasks.prior": ["ClassPrior", "informed_head", "ridge_head"],
    "mcdi_fast.tasks.photos": ["HeadWriter"],
    "mcdi_fast.train": ["train"],
    "mcdi_fast.prepare": ["prepare_bank"],
    "mcdi_fast.backbone": ["load_backbone", "extract_features"],
    "mcdi_fast.heads": ["support_condition", "prototype_head", "head_accuracy"],
    "mcdi_fast.meta": ["MetaTrainer"],
    "mcdi_fast.ranks": ["Ranks", "join"],
    "mcdi_fast.noise": ["philox_normal", "draw_generator"],
    "mcdi_fast.store": ["save_tensors", "load_tensors", "write_json", "read_json", "atomic_write"],
    "mcdi_fast.hub": ["HubGenerator"],
    "mcdi_fast.generator": ["fetch"],
    "mcdi_fast.diffusers_scheduler": ["McdiScheduler"],
    "mcdi_fast.peft_files": ["adapter_state_dict"],
}


def signature(thing: object) -> str:
    try:
        text = str(inspect.signature(thing))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ""
    text = re.sub(r"<function ([^>]*?(?:<\w+>)?) at 0x\w+>", r"\1", text)
    return re.sub(r"<factory>|<[\w.]+ object at 0x\w+>", "…", text.replace("'", ""))


def block(thing: object) -> list[str]:
    return ["", "```text", inspect.cleandoc(thing.__doc__ or ""), "```"]


def entry(name: str, thing: object) -> list[str]:
    lines = ["", f"## {name}", "", f"`{thing.__module__}.{name}{signature(thing)}`", *block(thing)]  # type: ignore[attr-defined]
    if not inspect.isclass(thing) or issubclass(thing, Exception):
        return lines
    for attribute, value in vars(thing).items():
        plain = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        if attribute.startswith("_") and attribute not in ("__call__", "__len__", "__getitem__"):
            continue
        if isinstance(plain, property):
            lines += ["", f"**`.{attribute}`** {inspect.cleandoc(plain.__doc__ or '')}"]
        elif (
            inspect.isfunction(plain)
            and plain.__doc__
            and not (dataclasses.is_dataclass(thing) and attribute == "__init__")
        ):
            lines += ["", f"**`.{attribute}{signature(plain)}`**", *block(plain)]
    if thing.__init__.__doc__ and not dataclasses.is_dataclass(thing) and thing.__init__ is not object.__init__:
        lines += ["", "**Constructor**", *block(thing.__init__)]
    return lines


def main() -> str:
    """The whole page."""
    lines = [
        "# API reference",
        "",
        "From the docstrings, by `docs/make_api.py`. B tasks, N tokens, D token width, C condition width, T steps,",
    ]
    lines += ["k segments. Everything raises `McdiError`, one line, for what the caller can mend."]
    for name in mcdi_fast.__all__:
        lines += entry(name, getattr(mcdi_fast, name))
    for module, names in MORE.items():
        for name in names:
            lines += entry(name, getattr(importlib.import_module(module), name))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "api.md").write_text(main())

"""A weight generator on the Hugging Face Hub. Needs the extra: pip install 'mcdi_fast[hub]'.

>>> from mcdi_fast.hub import HubGenerator  # doctest: +SKIP
>>> HubGenerator(generator).save_pretrained("my-generator")  # model.safetensors, config.json, model card  # doctest: +SKIP
>>> HubGenerator(generator).push_to_hub("name/my-generator")  # doctest: +SKIP
>>> generator = WeightGenerator.from_pretrained("name/my-generator")  # doctest: +SKIP
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from mcdi_fast.errors import needs
from mcdi_fast.generated import GeneratedWeights
from mcdi_fast.generator import WeightGenerator, fetch
from mcdi_fast.noise import Seeds
from mcdi_fast.sampler import Sampler

with needs("the hub", "huggingface_hub", "'mcdi_fast[hub]'"):
    from huggingface_hub import PyTorchModelHubMixin

_CARD = """---
{{ card_data }}
---

# A weight generator

Generates the weights of a neural network for a new task by local consistency diffusion
([Mc-Di](https://arxiv.org/abs/2502.01117)), without a gradient. Made by [mcdi_fast]({{ repo_url }}).

- what it generates: {{ tokens }} tokens of width {{ width }}: {{ names }}
- what it is told: a condition of width {{ condition_width }}, `[tasks, {{ tokens }}, {{ condition_width }}]` or `[tasks, {{ condition_width }}]`
- how: {{ objective }}, T = {{ steps }}, k = {{ segments }}

```python
from mcdi_fast import Sampler, WeightGenerator

generator = WeightGenerator.from_pretrained("{{ place }}")
weights = Sampler(generator).sample(condition, seeds=range(len(condition)))
weights.load_into(module, 0)
```
"""


class HubGenerator(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="mcdi_fast",
    license="mit",
    tags=["weight-generation", "diffusion", "mcdi"],
    paper_url="https://arxiv.org/abs/2502.01117",
    model_card_template=_CARD,
):
    """A `WeightGenerator` with the hub's methods: `save_pretrained`, `from_pretrained`, `push_to_hub`, a model card.

    The files are the generator's own, read with all of its checks; the mixin's way of reading a pickle is never taken.
    """

    _hub_mixin_config: dict[str, Any] = {}  # config.json is the generator's # noqa: RUF012

    def __init__(self, generator: WeightGenerator):
        """Wrap; the parameters stay the generator's own."""
        super().__init__()
        self.generator = generator

    def forward(self, condition: Tensor | np.ndarray | Sequence, seeds: Seeds) -> GeneratedWeights:
        """`Sampler(generator).sample(condition, seeds)`, where the condition is."""
        device = condition.device if isinstance(condition, Tensor) else "cpu"
        return Sampler(self.generator, device).sample(condition, seeds)

    def _save_pretrained(self, save_directory: Path) -> None:
        self.generator.save_pretrained(save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> HubGenerator:  # type: ignore[override]
        options = {name: value for name, value in options.items() if name in _OPTIONS}
        return cls(WeightGenerator.from_pretrained(model_id if os.path.isdir(model_id) else fetch(model_id, **options)))

    def generate_model_card(self, *args: Any, **kwargs: Any) -> Any:
        """The card, from the generator's own numbers."""
        g = self.generator
        names = ", ".join(f"`{name}` {list(shape)}" for name, shape in list(g.layout.shapes.items())[:12])
        facts = {
            "tokens": g.layout.num_tokens,
            "width": g.layout.width,
            "names": names + (", …" if len(g.layout.names) > 12 else ""),
            "condition_width": g.condition_width,
            "objective": g.diffusion.objective,
            "steps": g.diffusion.steps,
            "segments": g.diffusion.segments,
            "place": "path/or/hub-id",
        }
        return super().generate_model_card(*args, **facts | kwargs)


_OPTIONS = ("revision", "cache_dir", "force_download", "local_files_only", "token")

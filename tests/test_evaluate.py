"""What validation tasks choose."""

from types import SimpleNamespace

import pytest
import torch

from mcdi_fast import evaluate
from mcdi_fast.config import DiffusionConfig
from mcdi_fast.diffusion import diffusion_tables
from mcdi_fast.tasks import Metric


@pytest.mark.parametrize("higher", [True, False])
@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ({3: 0.5, 4: 0.9, 5: 0.9, 7: 0.95}, 7),  # differences beyond one standard error: the best
        ({3: 0.5, 4: 0.9499, 5: 0.9, 7: 0.95}, 4),  # fewest that are level with it
        ({3: 0.95, 4: 0.95, 5: 0.95, 7: 0.95}, 3),
        ({3: float("nan"), 4: 0.9, 5: 0.8, 7: 0.7}, 4),  # a chain that diverged is never level
    ],
)
def test_fewest_steps_level_with_the_best(monkeypatch, means, expected, higher):
    """Paired scatter of 0.01 over 100 tasks: a standard error of 0.0014 between two numbers of steps."""
    noise = {count: 0.01 * torch.randn(100, generator=torch.Generator().manual_seed(count)) for count in means}
    sign = 1 if higher else -1
    scores = {count: sign * (mean + noise[count] - noise[count].mean()) for count, mean in means.items()}
    _, objective = diffusion_tables(DiffusionConfig(steps=7))
    sampler = SimpleNamespace(
        generator=SimpleNamespace(objective=objective, diffusion=SimpleNamespace(steps=7), num_steps=None)
    )
    family = SimpleNamespace(metric=Metric(higher_is_better=higher), scores=lambda theta, query: scores[theta])
    monkeypatch.setattr(evaluate, "generate", lambda *_, num_steps, **__: num_steps)
    assert evaluate.choose_steps(family, sampler, SimpleNamespace(query={}), 0, 0.0) == expected

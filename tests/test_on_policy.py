"""One round of on-policy training raises the mean reward of fresh answers on the demo world, whatever the seed."""

import importlib
import math
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def on_policy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/on_policy.py, which a reader runs for the recorded figures."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    return importlib.import_module("on_policy")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mean_reward_rises_with_an_interval_that_excludes_zero(
    seed: int, on_policy: ModuleType, demo_walked: tuple[Path, str], tmp_path: Path
) -> None:
    demo, _ = demo_walked
    found = on_policy.gained(demo, tmp_path, seed)
    assert 0 < found.low < found.gain < found.high, found
    assert found.gain == pytest.approx(found.after - found.before)
    assert 0 <= found.before < found.after <= 10
    assert math.isfinite(found.kl)
    assert 0 < found.kl_low < found.kl_high < 10, found
    assert found.win_rate > 0.5

"""Two processes on a CPU: each has its share of every weight, and losses, gradients and updates are those of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import llama_config, random_model

from prefkit.encode import Sides
from prefkit.errors import InputError
from prefkit.logps import CompletionLogps, Layout
from prefkit.sharding import share_of, unused_parameters, wants_shards, whole

SCRIPT = Path(__file__).parent / "sharing.py"
LAYOUT = Layout("packed", "packed")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "gemma2", "adapter"])
def test_shares_and_whole_copies_train_as_one_process_does(kind: str, tmp_path: Path) -> None:
    """`sharing.py` asserts in each process; the numbers of one process are computed beside them."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    told = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)}
    ended = subprocess.run(
        [*run, kind, str(tmp_path)], env=told, capture_output=True, text=True, check=False, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done-0", "done-1"]


def test_alone_a_weight_is_whole_and_its_own_share() -> None:
    model = random_model(llama_config())
    weight = model.lm_head.weight
    assert whole(weight) is weight
    assert torch.equal(share_of(weight.detach(), weight), weight)


def test_weights_that_no_log_prob_depends_on_are_found() -> None:
    model = random_model(llama_config())
    model.register_parameter("of_pictures", torch.nn.Parameter(torch.zeros(3)))
    scorer = CompletionLogps(model, "float32", LAYOUT)
    assert unused_parameters(scorer) == ["model.of_pictures"]
    model.of_pictures.requires_grad = False
    assert unused_parameters(scorer) == []
    assert all(parameter.grad is None for parameter in model.parameters())
    assert scorer(scorer.batch([Sides([0, 1], [0], [1])])).chosen_logps.shape == (1,)


def test_deepspeed_is_refused_and_fsdp_means_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not wants_shards()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert wants_shards()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError) as caught:
        wants_shards()
    assert str(caught.value) == (
        "accelerate config: training does not run under DeepSpeed\n  next: accelerate launch --multi_gpu; "
        "train.shard_weights=true shares weights, gradients and optimiser"
    )

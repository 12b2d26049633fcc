"""Run by torchrun in test_sharding.py: one process of two. Every assertion is about this process.

python -m torch.distributed.run --standalone --nproc_per_node 2 tests/sharing.py llama FOLDER
"""

import math
import sys
from pathlib import Path
from typing import Any

import polars as pl
import torch
from tiny import gemma2_config, gpt2_config, llama_config, random_model
from torch.distributed.tensor import DTensor

from prefkit.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from prefkit.logps import CompletionLogps, Layout
from prefkit.losses import Objective
from prefkit.processes import Team, join_team
from prefkit.schedule import Limits, dealt
from prefkit.sharding import shared_out, whole, whole_in_each
from prefkit.updates import Trainee, evaluate, update

CONFIGS: dict[str, Any] = {
    "llama": llama_config,
    "tied": lambda: llama_config(tie_word_embeddings=True),
    "gpt2": gpt2_config,
    "gemma2": gemma2_config,
    "adapter": llama_config,
}
LENGTHS = [(5, 9, 4), (3, 12, 7), (8, 2, 2), (4, 6, 5), (7, 3, 11)]


def rows() -> pl.DataFrame:
    """Five pairs of random tokens, with a reference that is not the model's."""
    draw = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(0, 300, (count,), generator=draw).tolist()

    table = []
    for number, (prompt, chosen, rejected) in enumerate(LENGTHS):
        row: dict[str, Any] = {"weight": 1.0 + number % 2, "prompt_ids": ids(prompt)}
        for side, count in (("chosen", chosen), ("rejected", rejected)):
            logps = (-5 - torch.rand(count, generator=draw)).tolist()
            row |= {f"{side}_ids": ids(count), f"num_{side}_tokens": count, f"ref_{side}_token_logps": logps}
            row[f"ref_{side}_logps"] = sum(logps)
        table.append(row | {"num_prompt_tokens": prompt})
    lists = {name: pl.List(pl.Float32) for name in ("ref_chosen_token_logps", "ref_rejected_token_logps")}
    return pl.DataFrame(table, schema_overrides=lists)


def trainee(kind: str, team: Team, *, shares: bool, alone: bool = False) -> Trainee:
    model = random_model(CONFIGS[kind]())
    if kind == "adapter":  # frozen weights beside trained ones, in one layer
        for name, parameter in model.named_parameters():
            parameter.requires_grad = "q_proj" in name or "down_proj" in name
    scorer = CompletionLogps(model, "float32", Layout("packed", "packed"))
    policy: Any = scorer if alone else shared_out(scorer, team.size) if shares else whole_in_each(scorer)
    # with so large an eps a gradient that is nothing but rounding moves nothing
    optimizer = torch.optim.AdamW([p for p in scorer.parameters() if p.requires_grad], lr=1e-2, eps=1e-3)
    return Trainee(scorer, policy, optimizer, Objective(), 1.0, Team(0, 1) if alone else team, shares)


def weights(made: Trainee) -> dict[str, torch.Tensor]:
    return {name: whole(value.detach()).clone() for name, value in made.scorer.model.named_parameters()}


def trained(made: Trainee, table: pl.DataFrame, steps: range) -> list[tuple[float, float]]:
    """Loss and gradient norm of some updates, the last of them of a single pair: one process has nothing to do."""
    found = []
    for step in steps:
        some = table[:1] if step == 3 else table
        sizes = [sum(lengths) for lengths in LENGTHS][: some.height]
        shares = dealt(range(some.height), sizes, Limits(2, None), made.team.size)
        result = update(made, some, shares, step, 1e-2, 0.1)
        found.append((float(result.metrics.losses.sum()), result.grad_norm))
    return found


def has_shares(module: torch.nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def close(one: Any, other: Any, limit: float) -> None:
    apart = (torch.as_tensor(one, dtype=torch.float64) - torch.as_tensor(other, dtype=torch.float64)).abs().max()
    assert float(apart) <= limit, float(apart)


def main(kind: str, folder: Path) -> None:
    table = rows()
    with join_team() as team:
        alone = trainee(kind, team, shares=False, alone=True)
        expected = trained(alone, table, range(4))
        final = weights(alone)
        for shares in (False, True):
            made = trainee(kind, team, shares=shares)
            assert has_shares(made.scorer) == shares
            close(trained(made, table, range(2)), expected[:2], 2e-4)
            if shares:
                for name, parameter in made.scorer.named_parameters():
                    assert isinstance(parameter, DTensor), name
                    assert parameter.to_local().shape[0] <= -(-parameter.shape[0] // 2), name
                states = [value for state in made.optimizer.state.values() for value in state.values() if value.ndim]
                assert states
                assert all(isinstance(value, DTensor) for value in states)
            limits = Limits(2, None)
            assert all(map(math.isfinite, evaluate(made, table, 0.1, limits).values()))
            assert has_shares(made.scorer) == shares  # whatever the last pass was
            run = folder.parent / f"{folder.name}-{shares}"
            save_checkpoint(run, 2, made.scorer.model, made.optimizer, team)
            (place,) = list_checkpoints(run)
            # the other way of holding weights goes on with it
            other = trainee(kind, team, shares=not shares)
            assert load_checkpoint(place, other.scorer.model, other.optimizer) == 2
            for going_on in (made, other):
                close(trained(going_on, table, range(2, 4)), expected[2:], 1e-3)
                for name, value in weights(going_on).items():
                    close(value, final[name], 1e-4)
        del made, other, going_on
    (folder / f"done-{team.rank}").touch()


main(sys.argv[1], Path(sys.argv[2]))

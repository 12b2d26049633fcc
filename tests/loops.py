"""Run by torchrun in test_pytorch.py: a loop of one's own in one of two processes, by DDP or accelerate.

python -m torch.distributed.run --standalone --nproc_per_node 2 tests/loops.py ddp DEMO OUT
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import prefkit


def loss_of(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    ids = batch["input_ids"]
    logits = model(ids, attention_mask=batch["attention_mask"]).logits[:, :-1].float()
    logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    chosen, rejected = (logps * batch["completion_mask"][:, 1:]).sum(-1).chunk(2)
    margins = (chosen - batch["ref_chosen_logps"]) - (rejected - batch["ref_rejected_logps"])
    return -torch.nn.functional.logsigmoid(0.1 * margins).mean()


def main(kind: str, demo: Path, out: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(demo / "model")
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-3)
    collate = prefkit.PairCollator()
    loader: Any
    if kind == "ddp":
        torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
        model = torch.nn.parallel.DistributedDataParallel(model)
        stream = prefkit.torch_stream(demo / "dataset", window_rows=9)
        loader = DataLoader(stream, batch_size=4, collate_fn=collate, num_workers=1)
    else:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        rank = accelerator.process_index
        pairs = prefkit.torch_dataset(demo / "dataset")
        loader = DataLoader(pairs, batch_size=4, shuffle=True, collate_fn=collate)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    read, losses = [], []
    for batch in loader:
        read.append(batch["pair_id"])
        loss = loss_of(model, batch)
        losses.append(loss.item())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    weight = float(next(model.parameters()).detach().sum())
    (out / f"{rank}.json").write_text(json.dumps({"read": read, "losses": losses, "weight": weight}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    gc.collect()  # DDP holds itself in cycles, and where it outlives gloo's threads it may wait for them without an end
    torch.distributed.destroy_process_group()

"""Run by torchrun, one process of several: python trl_processes.py DATASET MODEL OUT table|stream BATCH WORKERS.

Each process writes OUT.RANK.json: the pairs that it was trained on, in order, and the losses of the updates.
"""

import gc
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")
os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def main(dataset: str, model: str, out: str, form: str, batch: str, workers: str) -> None:
    import torch
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from prefkit.errors import DatasetError
    from prefkit.integrations.trl import PrecomputedDPOTrainer, load_reference

    torch.set_num_threads(1)
    rank = os.environ.get("RANK", "0")
    seen = Path(f"{out}.{rank}.seen")

    class Noting(DataCollatorForPreference):
        """Writes down the pairs of each batch, in whatever process it is made."""

        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            with seen.open("a") as file:
                file.writelines(f"{example['pair_id']}\n" for example in examples)
            return super().torch_call(examples)

    args: Any = DPOConfig(
        out,
        bf16=False,
        use_cpu=True,
        max_length=None,
        max_steps=10,
        per_device_train_batch_size=int(batch),
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=int(workers),
        train_sampling_strategy="sequential",
    )
    trainer = PrecomputedDPOTrainer(
        model,
        args=args,
        train_dataset=load_reference(dataset, streaming=form == "stream"),
        data_collator=Noting(pad_token_id=0),
    )
    seen.write_text("")  # what was scored is no training
    trainer.train()
    trained = seen.read_text().split()
    refused = ""
    try:
        trainer.evaluate(load_reference(dataset, streaming=True))
    except DatasetError as error:
        refused = str(error)
    told = {
        "refused": refused,
        "seen": trained,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "processes": trainer.accelerator.num_processes,
        "agreement": trainer.agreement["train"],
        "eval": trainer.evaluate(load_reference(dataset))["eval_loss"],
    }
    Path(f"{out}.{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    kept, sys.stdout = sys.stdout, sys.stderr
    main(*sys.argv[1:])
    import torch

    gc.collect()  # as in loops.py
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

"""Run by an old TRL's own Python, without prefkit: python old_trl.py FOLDER VARIANT..., one JSON object to stdout.

FOLDER holds model/, export.jsonl (prompt, chosen, rejected, ref_chosen_logps, ref_rejected_logps), and tokens.json (the
names of the special tokens, and the chat template). The loop of docs/trl.md is here, and each way to leave it.
"""

import importlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
warnings.simplefilter("ignore")


def trained(folder: Path, variant: str) -> dict[str, Any]:
    """Losses of six updates, the ids that were trained on, and how often a reference model was asked."""
    import datasets
    import torch

    trl: Any = importlib.import_module("trl")  # one that no stub is of
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "model" / "tokenizer.json"), **json.loads((folder / "tokens.json").read_text())
    )
    pairs = datasets.Dataset.from_list([json.loads(line) for line in (folder / "export.jsonl").open()])
    if variant == "own reference":
        pairs = pairs.remove_columns(["ref_chosen_logps", "ref_rejected_logps"])
    changing: dict[str, dict[str, Any]] = {
        "no second model": {"precompute_ref_log_probs": True},
        "flag alone": {"precompute_ref_log_probs": True},
        "cut prompts": {"max_prompt_length": 4},
        "ipo": {"loss_type": "ipo"},
    }
    settings: dict[str, Any] = {
        "max_length": None,
        "max_prompt_length": None,
        "max_completion_length": None,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    args = trl.DPOConfig(str(folder / "out"), **(settings | changing.get(variant, {})))
    trainer = trl.DPOTrainer(model, args=args, train_dataset=pairs, processing_class=tokenizer)
    asked: list[int] = []
    losses: list[float] = []
    compute = trainer.compute_loss

    def recorded(*given: Any, **named: Any) -> Any:  # the log rounds to four digits
        loss = compute(*given, **named)
        losses.append(loss.item())
        return loss

    trainer.compute_loss = recorded
    if trainer.ref_model is not None:
        trainer.ref_model.register_forward_hook(lambda *_: asked.append(1))
    if variant == "no second model":
        trainer._precomputed_train_ref_log_probs = trainer._precomputed_eval_ref_log_probs = True
    try:
        trainer.train()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "versions": [trl.__version__, torch.__version__],
        "losses": losses,
        "asked": len(asked),
        "second_model": trainer.ref_model is not None,
        "ids": [
            [row[f"{side}_input_ids"] for side in ("prompt", "chosen", "rejected")] for row in trainer.train_dataset
        ],
    }


if __name__ == "__main__":
    kept, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps({variant: trained(Path(sys.argv[1]), variant) for variant in sys.argv[2:]}), file=kept)

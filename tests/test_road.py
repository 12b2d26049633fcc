"""The whole road on real data, command by command, as a user types it: build, audit, precompute, train, query."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parent.parent
CASES = {  # pipeline: pairs it must build, and the learning rate at which so small a model learns in 30 updates
    "hh": (1791, 1e-4),
    "mlqe_pe_text": (3615, 5e-5),
}


def run(folder: Path, *words: str) -> dict[str, Any]:
    """A command in a process of its own; its last line of stdout as JSON."""
    told = {**os.environ, "PYTHONWARNINGS": "default"}
    command = [sys.executable, "-m", "prefkit", *words]
    done = subprocess.run(command, cwd=folder, env=told, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def small_llama(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with the gpt2 tokenizer that has read some text: enough to have an opinion, little enough to be quick."""
    import torch
    from transformers import GPT2Tokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("small_llama")
    tokenizer = GPT2Tokenizer.from_pretrained(test_data / "tokenizers" / "gpt2")
    ids = torch.tensor(tokenizer((test_data / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8"))["input_ids"])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(40):
        rows = torch.stack([ids[256 * i : 256 * i + 257] for i in range(4 * step, 4 * step + 4)])
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_whole_road_on_real_data(name: str, small_llama: Path, test_data: Path, tmp_path: Path) -> None:
    pairs, rate = CASES[name]
    (tmp_path / "data").mkdir()
    for entry in test_data.iterdir():
        (tmp_path / "data" / entry.name).symlink_to(entry)
    pipeline = str(REPOSITORY / "pipelines" / "real" / f"{name}.yaml")
    model = ("--model", str(small_llama), "--json")

    built = run(tmp_path, "build", pipeline, "--json")
    assert built["counts"]["pairs"] == pairs
    assert run(tmp_path, "audit", pipeline, "--json")["verdict"] in ("pass", "note", "warn")
    scored = run(tmp_path, "precompute", pipeline, *model)
    assert scored["pairs"] + scored["dropped"] == pairs
    trained = run(tmp_path, "train", pipeline, *model, "--set", f"train.learning_rate={rate}")
    assert trained["steps"] == 30
    assert 0 <= trained["eval"]["rewards/accuracies"] <= 1

    dataset = f"built/{name}"
    sql = "select avg(loss) filter (step < 10) as early, avg(loss) filter (step >= 20) as late from steps"
    losses = run(tmp_path, "query", dataset, sql, "--format", "json")
    assert losses["late"] < losses["early"], losses
    first = run(tmp_path, "query", dataset, "select loss from steps where step = 0", "--format", "json")
    assert abs(first["loss"] - 0.6931471805599453) <= 2e-5

"""trl 0.13 to 0.28 read reference columns beside text: trl 0.28, in an environment of its own, trains on ours.

They tokenise the text again, so the sums are right only where their ids are ours: which settings that asks for, and
what the first loss is where it fails. `make .venv-old-trl/.ready` makes the environment, and make test-all does
so by itself.
"""

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from tiny import CHAT_TEMPLATE, built, chat_rows, llama_config, random_model, save_model, text_rows, tiny_tokenizer

from prefkit.export import export_dataset
from prefkit.reference import precompute_reference
from prefkit.reference_table import open_reference, scored_blocks

pytestmark = pytest.mark.slow
PYTHON = Path(os.environ.get("PREFKIT_OLD_TRL", Path(__file__).parent.parent / ".venv-old-trl")) / "bin" / "python"
SCRIPT = Path(__file__).parent / "old_trl.py"
LN2 = math.log(2)


@pytest.fixture(scope="module")
def python() -> str:
    if not PYTHON.exists():
        why = f"no environment of an old TRL at {PYTHON.parent.parent}: make .venv-old-trl/.ready"
        assert os.environ.get("CI", "").lower() != "true", why
        pytest.skip(why)
    return str(PYTHON)


def ready(folder: Path, kind: str, *, bos: bool = False) -> Path:
    """A model, its dataset with a reference, and both as an old TRL takes them; with or without BOS before a text."""
    tokenizer = tiny_tokenizer()
    if not bos:
        tokenizer.backend_tokenizer.post_processor = None
    model = save_model(folder / "model", random_model(llama_config(len(tokenizer))), tokenizer)
    dataset = folder / "dataset"
    precompute_reference(built(folder, chat_rows(24) if kind == "chat" else text_rows(24), model, kind))
    export_dataset(dataset, "trl", folder / "export.jsonl", split="train", with_reference=True)
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokens.json").write_text(json.dumps(tokens))
    return folder


def trained(python: str, folder: Path, *variants: str) -> dict[str, Any]:
    command = [python, str(SCRIPT), str(folder), *variants]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def ids_of(folder: Path) -> list[list[list[int]]]:
    """Of the reference, in the order of the export, which is that of the dataset."""
    parts = sorted((folder / "dataset" / "pairs").glob("part-*.parquet"))
    pairs = pl.concat([pl.read_parquet(part, columns=["pair_id"]) for part in parts])
    scored = pl.concat(scored_blocks(open_reference(folder / "dataset"), "train"))
    table = pairs.join(scored, on="pair_id", maintain_order="left")
    return [list(row) for row in table.select("prompt_ids", "chosen_ids", "rejected_ids").rows()]


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_it_trains_on_the_columns_as_with_a_reference_of_its_own(python: str, kind: str, tmp_path: Path) -> None:
    folder = ready(tmp_path, kind)
    found = trained(python, folder, "columns", "own reference", "no second model", "flag alone")
    mine, theirs, alone = (found[name] for name in ("columns", "own reference", "no second model"))
    assert mine["versions"][0] == "0.28.0"
    assert mine["ids"] == theirs["ids"] == ids_of(folder)
    assert mine["losses"][0] == pytest.approx(LN2, abs=1e-5)
    assert mine["losses"] == pytest.approx(theirs["losses"], abs=1e-5)
    assert max(mine["losses"]) - min(mine["losses"]) > 0.02
    assert (mine["asked"], mine["second_model"]) == (0, True)  # it is built all the same
    assert theirs["asked"] == 6
    assert not alone["second_model"]
    assert alone["losses"] == mine["losses"]
    assert "duplicated columns" in found["flag alone"]["error"]  # after a whole reference pass


def test_where_its_ids_or_its_sums_are_others_the_first_loss_shows_it(python: str, tmp_path: Path) -> None:
    without = ready(tmp_path / "without", "text")
    found = trained(python, without, "cut prompts", "ipo")
    assert max(len(prompt) for prompt, *_ in found["cut prompts"]["ids"]) == 4
    assert abs(found["cut prompts"]["losses"][0] - LN2) > 1e-2
    # (0 - 1 / (2 beta))^2 with beta .1: it averages the policy's log-probs over tokens, and not the columns
    assert abs(found["ipo"]["losses"][0] - 25) > 1
    folder = ready(tmp_path / "bos", "text", bos=True)  # it puts no BOS before a text, whatever the tokenizer does
    mine = trained(python, folder, "columns")["columns"]
    assert [prompt for prompt, *_ in mine["ids"]] == [prompt[1:] for prompt, *_ in ids_of(folder)]
    assert abs(mine["losses"][0] - LN2) > 1e-2

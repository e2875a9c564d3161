"""What curation writes, trl trains on as it is: rows by its SFTTrainer, pairs by its RewardTrainer."""

import datasets
import pytest
from curation import small_recipe, write_recipe
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Qwen3Config
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

import sft.curate
from sft.init import build_tokenizer

SETTINGS = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True}


@pytest.fixture
def curated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["sft.curate", str(write_recipe(tmp_path, small_recipe(tmp_path)))])
    assert sft.curate.main() == 0
    return tmp_path / "outputs/curation/curated"


@pytest.mark.slow
def test_trl_trains_on_rows_and_on_pairs_as_they_are(curated, tmp_path):
    tokenizer = build_tokenizer("characters")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen3Config(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_labels=1, **sizes)
    load = {"cache_dir": str(tmp_path / "cache"), "split": "train"}

    rows = datasets.load_dataset(str(curated), **load)
    for data in (rows, datasets.load_dataset("json", data_files=str(curated / "train.jsonl"), **load)):
        settings = SFTConfig(output_dir=str(tmp_path / "sft"), assistant_only_loss=True, **SETTINGS)
        trainer = SFTTrainer(AutoModelForCausalLM.from_config(config), args=settings, train_dataset=data, processing_class=tokenizer)
        assert len(trainer.train_dataset) == len(rows) > 1
        assert trainer.train().training_loss > 0

    pairs = datasets.load_dataset("parquet", data_files=str(curated / "pairs.parquet"), **load)
    settings = RewardConfig(output_dir=str(tmp_path / "reward"), **SETTINGS)
    judge = AutoModelForSequenceClassification.from_config(config)
    trainer = RewardTrainer(judge, args=settings, train_dataset=pairs, processing_class=tokenizer)
    assert len(trainer.train_dataset) == len(pairs) > 1
    first, pair = trainer.train_dataset[0], pairs[0]
    for name in ("chosen", "rejected"):
        assert tokenizer.decode(first[f"{name}_ids"]).startswith(f"{pair['prompt']}{pair[name]}")
    assert trainer.train().training_loss > 0

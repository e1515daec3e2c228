"""What ``harness export`` writes of a run that knows its model: ``from_pretrained`` reads it, with the same bits."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import harness
from harness.checkpoint.catalog import Catalog
from harness.cli import cli
from harness.errors import Corrupt, Mismatch
from harness.interchange import export_model, import_run, load_into, read_foreign
from harness.storage.store import open_store
from tests.support.integrations import LIBRARIES, require

pytestmark = pytest.mark.filterwarnings("default")
IDS = torch.arange(12).reshape(2, 6) * 4 % 50


@pytest.fixture(autouse=True)
def _installed(monkeypatch, tmp_path):
    require("transformers", "accelerate", "peft")
    if LIBRARIES:
        monkeypatch.syspath_prepend(LIBRARIES)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def small():
    from transformers import GPT2Config, GPT2LMHeadModel, set_seed

    set_seed(3)
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1)
    model = GPT2LMHeadModel(config)
    model.generation_config.max_new_tokens = 7
    return model


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "two": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>")


def trained(model, url="run"):
    """After some steps of a ``Trainer``; every parameter that is trained has moved. Returns the model in ``eval`` mode."""
    from transformers import Trainer, TrainingArguments

    from harness.integrations.transformers import resilient

    samples = [{"input_ids": (torch.arange(6) * n) % 50, "labels": (torch.arange(6) * n) % 50} for n in range(1, 25)]
    args = TrainingArguments("output", max_steps=5, learning_rate=0.05, save_strategy="no", report_to="none", use_cpu=True)
    trainer = Trainer(model, args, train_dataset=samples, processing_class=tokenizer())
    resilient(trainer, url, every_steps=2).train()
    return trainer.model.eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def exported(*arguments):
    done = CliRunner().invoke(cli, ["export", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_whole_model(tmp_path, caplog):
    """Its configuration, that of its generation, and the tokenizer, with the same logits; an import goes back."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    live = trained(small())
    exported("run", "out/")
    assert "config.json" not in caplog.text, "nothing is missing"
    found = AutoModelForCausalLM.from_pretrained("out")
    assert type(found) is type(live)
    assert torch.equal(logits(found), logits(live))
    assert found.generation_config.max_new_tokens == 7
    assert AutoTokenizer.from_pretrained("out")("two one")["input_ids"] == [2, 1]
    import_run("out", open_store("imported"))
    again = small()
    load_into(again, None, read_foreign("imported"))
    assert torch.equal(logits(again), logits(live))


@pytest.mark.parametrize("shard_bytes", [5 << 30, 2000])
def test_an_adapter(shard_bytes):
    """Its weights and those of its base are two models, as PEFT has them; an import puts them together."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    options = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["ln_f"]}
    live = trained(get_peft_model(small(), LoraConfig(**options)))
    with live.disable_adapter():
        bare = logits(live)
    assert not torch.equal(bare, logits(live)), "the adapter does something"
    catalog = Catalog(open_store("run"))
    catalog.reading(
        lambda entry: export_model(catalog.store, entry.directory, entry.manifest, "out/", shard_bytes=shard_bytes), None
    )
    base = AutoModelForCausalLM.from_pretrained("out/base")
    assert torch.equal(logits(base), bare)
    assert torch.equal(logits(PeftModel.from_pretrained(base, "out")), logits(live))
    import_run("out", open_store("imported"))
    again = harness.load("imported")["model"]
    assert again.keys() == live.state_dict().keys()
    assert all(torch.equal(value, again[name]) for name, value in live.state_dict().items())
    exported("run", "out/", "--overwrite")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("out/base"), "out")
    assert torch.equal(logits(again), logits(live))


def test_an_adapter_whose_base_is_elsewhere():
    """Then the base is not written again."""
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    small().save_pretrained("base")
    made = get_peft_model(
        AutoModelForCausalLM.from_pretrained("base"),
        LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"),
    )
    live = trained(made)
    files = exported("run", "out/")
    assert "base/" not in files
    assert "adapter_model.safetensors" in files
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained("out")), logits(live))
    with pytest.raises(Mismatch, match="an adapter alone; expected its base model, too"):
        read_foreign("out")


def test_a_loop_of_ones_own():
    """The part that says it is one of the state."""
    from transformers import AutoModelForCausalLM

    from harness.integrations.pretrained import Pretrained

    model = small()
    state = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1), "pretrained": Pretrained(model)}
    run = harness.Run("run", state, every_steps=5)
    for _ in run.steps(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        state["optimizer"].step()
        run.step()
    run.close()
    exported("run", "out/")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("out")), logits(model))
    assert json.loads(Path("out/config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]


@pytest.mark.parametrize("name", ["../evil.py", "a//b", "/evil.py"])
@pytest.mark.parametrize("within", ["", "base/"])
def test_a_name_that_leads_out_of_the_folder(tmp_path, name, within):
    """Whoever can write a checkpoint must not write elsewhere."""
    folders = {within: {"weights": "model", "names": None, "files": {name: torch.zeros(3, dtype=torch.uint8)}}}

    class Hostile:
        def state_dict(self):
            return {"pretrained": folders}

        def load_state_dict(self, state):
            """Nothing."""

    run = harness.Run("run", {"model": torch.nn.Linear(1, 1), "pretrained": Hostile()}, every_steps=1)
    for _ in run.steps(1):
        run.step()
    run.close()
    catalog = Catalog(open_store("run"))
    with pytest.raises(Corrupt, match="not a name of a file"):
        catalog.reading(lambda entry: export_model(catalog.store, entry.directory, entry.manifest, "deep/out/"), None)
    assert not (tmp_path / "deep").exists()

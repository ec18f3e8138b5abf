"""Models, their tokenizers and datasets of one revision on the hub, and of nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest

from tests.trapo_train.step.test_optimizer_step import make_model
from tests.trapo_train.test_train import build_config
from trapo_train import cli, train
from trapo_train.checkpoints.export import export_adapter
from trapo_train.data.dataset import DataConfig
from trapo_train.data.sources import load_rows
from trapo_train.evaluation.held_out import model_label
from trapo_train.models.loading import check_places, name_model_in_hub_errors
from trapo_train.models.lora import LoraConfig, add_lora
from trapo_train.models.model import ModelConfig
from trapo_train.schema import UserError
from trapo_train.tasks import build_tokenizer

SHOW = """
import json, sys
from trapo_train.models.model import ModelConfig, load_model_and_tokenizer
def show(**settings):
    model, tokenizer = load_model_and_tokenizer(ModelConfig(name_or_path="owner/name", **settings))
    shell, _ = load_model_and_tokenizer(ModelConfig(name_or_path="owner/name", **settings), weights=False)  # of another rank
    assert shell.generation_config.top_k == model.generation_config.top_k
    return model.get_input_embeddings().weight[0, 0].item(), tokenizer.eos_token, shell.generation_config.top_k
print(json.dumps([show(), show(revision="old"), show(revision="1" * 40), show(revision="old", tokenizer="owner/name"),
                  show(revision="old", tokenizer="owner/other")]))
"""


def _cached(hub, name, revisions):
    """A repository as the hub's cache holds it: by revision what the first weight is, and the token that ends a text; the top_k of
    the n-th is 10 + n."""
    folder = hub / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    for number, (revision, (weight, end)) in enumerate(revisions.items()):
        snapshot = folder / "snapshots" / (str(number) * 40)
        (folder / "refs" / revision).write_text(str(number) * 40)
        model, tokenizer = make_model(), build_tokenizer()
        model.get_input_embeddings().weight.data[0, 0] = weight
        tokenizer.eos_token = end
        model.generation_config.top_k, model.generation_config.do_sample = 10 + number, True
        model.save_pretrained(snapshot)
        tokenizer.save_pretrained(snapshot)


@pytest.mark.slow
def test_model_and_tokenizer_are_of_the_revision(tmp_path):
    first, second, third = build_tokenizer().convert_ids_to_tokens([3, 4, 5])
    _cached(tmp_path / "hub", "owner/name", {"main": (2.0, first), "old": (3.0, second)})
    _cached(tmp_path / "hub", "owner/other", {"main": (4.0, third)})
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", SHOW], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    old = [3.0, second, 11]
    assert found == [[2.0, first, 10], old, old, old, [3.0, third, 11]]


def test_a_dataset_is_of_the_revision(monkeypatch):
    asked = []
    rows = datasets.Dataset.from_list([{"prompt": "ab|"}])

    def load_dataset(path, name, **options):
        asked.append((path, name, options))
        if options["revision"] == "gone":
            raise FileNotFoundError("no such revision")
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for revision in ("v1.0", None):
        load_rows(DataConfig(path="owner/set", name="main", revision=revision))
    assert asked == [("owner/set", "main", {"split": "train", "revision": revision}) for revision in ("v1.0", None)]
    with pytest.raises(UserError, match=r"data: reading the dataset 'owner/set', revision 'gone', split 'train', failed"):
        load_rows(DataConfig(path="owner/set", revision="gone"))


@pytest.mark.parametrize("place", ["rows.jsonl", "folder", "*.jsonl"])
def test_data_that_is_not_on_the_hub_has_no_revision(place, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "ab|"}\n')
    with pytest.raises(UserError, match=r"revision must be null but for a dataset on the hub, got 'v1' with .*Remove it"):
        load_rows(DataConfig(path=str(tmp_path / place), revision="v1"))
    with pytest.raises(UserError, match=r"got 'v1' with a task"):
        DataConfig(task="pointer_chasing", revision="v1")


def test_a_model_that_is_not_on_the_hub_has_no_revision(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    for config in (
        ModelConfig(name_or_path=str(tmp_path / "model"), revision="v1"),
        build_config(tmp_path, "run", "model.revision=v1").model,
    ):
        given = "model.scratch" if config.name_or_path is None else "the directory"
        with pytest.raises(UserError, match=rf"model\.revision must be null but .*, got 'v1' with {given}.*model.revision=null"):
            check_places(config)
    config = ModelConfig(name_or_path="owner/name", revision="v1")
    check_places(config)
    with pytest.raises(OSError, match=r"got 'owner/name' at model\.revision=v1.*gone"), name_model_in_hub_errors(config):
        raise OSError("gone")


def test_what_a_run_trained_has_no_revision_and_responses_are_named_after_that_of_a_model(tmp_path):
    (tmp_path / "model").mkdir()
    config = build_config(tmp_path, "run", "model={name_or_path: owner/name, revision: v1}")
    (tmp_path / "config.yaml").write_text(train.to_yaml(config))
    read = cli._read_config(SimpleNamespace(config=str(tmp_path), overrides=[]), finished_run=True).model
    assert (read.name_or_path, read.revision) == (str(tmp_path / "model"), None)
    assert model_label("owner/name", "refs/pr/1") == "owner--name--refs--pr--1"


def test_an_adapter_alone_names_the_revision_that_it_belongs_to(tmp_path):
    pytest.importorskip("peft", reason="PEFT is not installed (extra [peft])")
    model = make_model()
    add_lora(model, LoraConfig(rank=2))
    export_adapter(model, build_tokenizer(), tmp_path / "adapter", revision="v1")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["revision"] == "v1"

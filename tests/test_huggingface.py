"""`fuse_loss`: a model of transformers has the loss, gradients and training of its own forward, and says no where it cannot."""

import copy
import inspect
import math
import os
import re
import textwrap
import types

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import trapo_kernels
from tests import ranks
from tests.hf_models import MODELS, small_model
from trapo_kernels import fuse_loss, objectives

INPUT_IDS = torch.randint(3, 50, (3, 9), generator=torch.Generator().manual_seed(0))
LABELS = torch.where(torch.arange(9) < torch.tensor([[2], [5], [3]]), -100, INPUT_IDS)


def _result(model, **given):
    model.zero_grad()
    loss = model(INPUT_IDS, **{"labels": LABELS} | given).loss
    loss.backward()
    return loss.detach(), [weight.grad for weight in model.parameters()]


@pytest.mark.parametrize("name", MODELS)
def test_sft_is_the_model_s_own_loss_with_its_gradients(name):
    model = small_model(name)
    own = _result(model)
    fuse_loss(model, objectives.sft())
    torch.testing.assert_close(_result(model), own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "given",
    [
        {"num_items_in_batch": 40},
        {"num_items_in_batch": torch.tensor(40)},
        {"attention_mask": (torch.arange(9) >= torch.tensor([[0], [2], [1]])).long()},
        {"labels": INPUT_IDS, "shift_labels": LABELS.roll(-1, 1)},
    ],
    ids=", ".join,
)
def test_what_trainers_pass_beside_labels_acts_as_in_the_model_s_own_loss(given):
    model = small_model("Qwen2")
    own = _result(model, **given)
    fuse_loss(model, objectives.sft())
    torch.testing.assert_close(_result(model, **given), own, rtol=1e-4, atol=1e-5)


def test_another_objective_is_what_the_docstring_says_with_its_metrics():
    model, objective = small_model("Gemma2"), objectives.trsft(alpha=0.1)
    snippet = textwrap.dedent(re.search(r"the loss is that of\n\n((?: {4}.*\n)+)", inspect.getdoc(fuse_loss))[1])
    names = vars(trapo_kernels) | {"torch": torch, "num_items_in_batch": 40, "objective": objective}
    names |= {"model": model, "input_ids": INPUT_IDS, "labels": LABELS}
    exec(snippet, names)
    fuse_loss(model, objective)
    torch.testing.assert_close(_result(model, num_items_in_batch=40)[0], names["loss"].detach())
    assert model.loss_metrics["expert/count"] == (LABELS[:, 1:] != -100).sum()
    assert 0 < model.loss_metrics["expert/trsft_weight"] < 1


def test_without_labels_the_model_is_what_it_was_and_a_copy_is_a_model_of_its_own():
    model = small_model("Qwen2")
    logits, tokens = model(INPUT_IDS).logits, model.generate(INPUT_IDS, max_new_tokens=3, do_sample=False)
    fuse_loss(model, objectives.sft())
    assert torch.equal(model(INPUT_IDS).logits, logits)
    assert torch.equal(model.generate(INPUT_IDS, max_new_tokens=3, do_sample=False), tokens)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert float(other(INPUT_IDS, labels=LABELS).loss.detach()) == pytest.approx(math.log(50))
    assert not other(INPUT_IDS).logits.any() and torch.equal(model(INPUT_IDS).logits, logits)
    assert model(INPUT_IDS, labels=LABELS, return_dict=False) == (model(INPUT_IDS, labels=LABELS).loss,)
    del model.forward
    assert model(INPUT_IDS, labels=LABELS).logits is not None


def test_another_call_replaces_the_objective_and_a_refused_one_does_not():
    model = small_model("Qwen2")
    fuse_loss(model, objectives.trsft(alpha=0.1))
    loss = model(INPUT_IDS, labels=LABELS).loss
    with pytest.raises(ValueError, match="pools over sequences"):
        fuse_loss(model, objectives.iw_sft())
    assert model(INPUT_IDS, labels=LABELS).loss == loss
    fuse_loss(model, objectives.sft())
    found = model(INPUT_IDS, labels=LABELS).loss
    del model.forward
    torch.testing.assert_close(found, model(INPUT_IDS, labels=LABELS).loss)


def test_a_batch_without_labels_of_its_own_has_a_loss_of_zero_and_gradients():
    model = small_model("Qwen2")
    fuse_loss(model, objectives.sft())
    loss, gradients = _result(model, labels=torch.full_like(LABELS, -100))
    assert loss == 0 and not any(grad.any() for grad in gradients)


def _with_lora(model):
    """PEFT's model of one, with LoRA on its head as well."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed (extra [peft])")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False))


def _trained(objective, tmp_path, peft=False, **more):
    """The weights after two optimizer steps of four micro-batches by Hugging Face's Trainer, and what it logged last."""
    torch.manual_seed(0)
    model = small_model("Qwen2")
    model = _with_lora(model) if peft else model
    if objective:
        fuse_loss(model, objective)
    rows = [{"input_ids": INPUT_IDS[i % 3], "labels": LABELS[i % 3]} for i in range(8)]
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 2, "learning_rate": 0.1}
    settings |= {
        "optim": "sgd",
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    args = transformers.TrainingArguments(output_dir=str(tmp_path), logging_steps=1, disable_tqdm=True, **settings | more)
    trainer = transformers.Trainer(model, args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    logged = [{key: value for key, value in row.items() if "loss" in key} for row in trainer.state.log_history]
    return {name: weight.detach() for name, weight in model.named_parameters()}, logged


@pytest.mark.parametrize("peft", [False, True], ids=["whole", "LoRA, on the head as well"])
def test_hugging_face_s_trainer_ends_with_the_same_weights_and_losses(peft, tmp_path):
    (ours, our_log), (own, own_log) = (_trained(objective, tmp_path, peft) for objective in (objectives.sft(), None))
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)
    for found, expected in zip(our_log, own_log, strict=True):
        assert found == pytest.approx(expected, abs=2e-4)  # the trainer rounds to four digits


def _sharded(model):
    return fully_shard(model)


def _sharded_as_accelerate_does_under_peft(model):
    """The head in a unit of its own, whose module is not called."""
    fully_shard(model.get_output_embeddings())
    return fully_shard(model)


def _sharded_with_what_is_trained_apart(model):
    """Each factor of LoRA in a unit of its own, and the head's weight and bias in one: of those on the head none is called."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight.requires_grad:
            fully_shard(module)
    return _sharded_as_accelerate_does_under_peft(model)


WRAPPERS = {
    "DDP": DistributedDataParallel,
    "FSDP2": _sharded,
    "FSDP2, head apart": _sharded_as_accelerate_does_under_peft,
    "FSDP2, head and LoRA apart": _sharded_with_what_is_trained_apart,
}


def _rank(rank, wrapper):
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = small_model("Phi")
    model = _with_lora(model) if "LoRA" in wrapper else model
    exact = [grad for grad in _result(model)[1] if grad is not None]
    model.zero_grad()
    fuse_loss(model, objectives.sft())
    wrapped = WRAPPERS[wrapper](model)
    mine = slice(0, 1) if rank == 0 else slice(1, 3)
    items = (LABELS[:, 1:] != -100).sum()
    (wrapped(INPUT_IDS[mine], labels=LABELS[mine], num_items_in_batch=items).loss * 2).backward()
    trained = [weight.grad for weight in model.parameters() if weight.requires_grad]
    found = [grad.full_tensor() if "FSDP2" in wrapper else grad for grad in trained]
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
    dist.destroy_process_group()
    os._exit(0)  # while the wrapped model still lives: to free it here can wait forever for gloo's threads (torch 2.13)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_ranks_have_the_gradient_of_one(wrapper):
    ranks.start(_rank, 2, wrapper)


@pytest.mark.slow
def test_a_compiled_model_has_the_same_loss():
    model = small_model("Qwen2")
    fuse_loss(model, objectives.sft())
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for count in (None, *range(40, 46)):  # as a Trainer counts labels: what differs is a number, for which nothing is compiled anew
        found, exact = (m(INPUT_IDS, labels=LABELS, num_items_in_batch=count).loss for m in (compiled, model))
        torch.testing.assert_close(found, exact)
    assert counter.frame_count <= 3  # without a count, of the first, of any


class _Doubled(transformers.Qwen2ForCausalLM):
    def forward(self, *args, labels=None, **given):
        out = super().forward(*args, **given)
        out.logits = 2 * out.logits
        out.loss = None if labels is None else self.loss_function(out.logits, labels, vocab_size=50)
        return out


def test_a_model_that_does_more_to_its_logits_is_refused_and_stays_as_it_was():
    model = _Doubled(small_model("Qwen2").config).train()
    torch.nn.init.normal_(model.lm_head.weight, std=1.0)
    model.model.layers[0].eval()
    with pytest.raises(ValueError, match=r"^fuse_loss: the loss of 8 tokens must be .* _Doubled does something to its logits .*"):
        fuse_loss(model, objectives.sft())
    assert "forward" not in vars(model) and not hasattr(model, "loss_metrics")
    assert model.training and model.lm_head.training and not model.model.layers[0].training


def test_a_model_whose_labels_are_shifted_already_is_refused():
    shape = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "vocab_size": 50}
    model = transformers.BartForCausalLM(transformers.BartConfig(**shape, pad_token_id=0, is_encoder_decoder=False)).eval()
    with pytest.raises(ValueError, match=r"must be the cross-entropy of next tokens, .* of BartForCausalLM\. Call"):
        fuse_loss(model, objectives.sft())


def test_positional_arguments_are_those_of_the_model_s_forward():
    model = small_model("Qwen2")
    own = _result(model)
    fuse_loss(model, objectives.sft())
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    given = [INPUT_IDS, *[None] * (names.index("labels") - 1), LABELS]
    torch.testing.assert_close(model(*given).loss.detach(), own[0])
    with pytest.raises(TypeError, match="multiple values"):
        model(INPUT_IDS, input_ids=INPUT_IDS, labels=LABELS)


@pytest.mark.parametrize(
    ("objective", "error", "message"),
    [
        (objectives.sft, TypeError, r"objective must be an Objective, got function\. Pass what it returns, sft\(\)"),
        (objectives.trapo(), ValueError, r"got 'trapo', one that reads advantage.*Pass objectives\.sft\(\)"),
        (objectives.psft(), ValueError, r"got 'psft', one that reads old_logprob"),
        (objectives.iw_sft(), ValueError, r"got 'iw_sft', one that pools over sequences"),
    ],
)
def test_an_objective_that_needs_more_than_labels_is_refused(objective, error, message):
    with pytest.raises(error, match=message):
        fuse_loss(small_model("Qwen2"), objective)


def test_models_that_cannot_be_used_so_are_refused():
    shape = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
    with pytest.raises(TypeError, match=r"model must be a causal LM of transformers, got T5ForConditionalGeneration\. Call linear"):
        fuse_loss(transformers.T5ForConditionalGeneration(transformers.T5Config(**shape)), objectives.sft())
    model = small_model("Qwen2")
    with pytest.raises(TypeError, match=r"no output head in DataParallel\. Unwrap the model"):
        fuse_loss(torch.nn.DataParallel(model), objectives.sft())
    with pytest.raises(
        TypeError, match=r"must not be compiled yet, got what torch\.compile returns\. Compile it after this call\."
    ):
        fuse_loss(torch.compile(model), objectives.sft())
    model._original_forward = model.forward  # as Accelerate leaves it
    with pytest.raises(ValueError, match=r"must not be prepared by Accelerate, .* Call this before accelerator\.prepare"):
        fuse_loss(model, objectives.sft())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"logits_to_keep": 4},
            ValueError,
            r"^Qwen2ForCausalLM: logits_to_keep must be absent beside labels, got 4\. Set the other",
        ),
        ({"output_router_logits": True}, ValueError, r"output_router_logits must be off under fuse_loss"),
        ({"fused_lm_head": True}, TypeError, r"fused_lm_head is TRL's"),
    ],
)
def test_a_call_that_the_fused_loss_cannot_answer_is_refused(given, error, message):
    model = small_model("Qwen2")
    fuse_loss(model, objectives.sft())
    with pytest.raises(error, match=message):
        model(INPUT_IDS, labels=LABELS, **given)


def test_a_head_that_is_elsewhere_is_refused():
    model = small_model("Qwen2")
    fuse_loss(model, objectives.sft())
    model.lm_head.weight = torch.nn.Parameter(torch.empty(0))  # as ZeRO-3 leaves it between the calls of its own module
    model.lm_head.weight.ds_id = 0
    with pytest.raises(ValueError, match=r"got a weight that DeepSpeed ZeRO-3 has partitioned\. Use FSDP2 or ZeRO-2\."):
        model(INPUT_IDS, labels=LABELS)
    model.lm_head.weight = torch.nn.Parameter(torch.empty(50, 16, device="meta"))
    with pytest.raises(ValueError, match=r"got a weight that Accelerate has offloaded\. Keep lm_head on a device in device_map\."):
        model(INPUT_IDS, labels=LABELS)


def test_a_loss_that_a_trainer_computes_itself_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"got num_items_in_batch alone, as from a Trainer with label_smoothing_factor or"):
        _trained(objectives.trsft(alpha=0.1), tmp_path, label_smoothing_factor=0.1)


def test_a_replica_of_data_parallel_is_refused():
    model = small_model("Qwen2")
    fuse_loss(model, objectives.sft())
    with pytest.raises(ValueError, match=r"must have a process per GPU, got torch\.nn\.DataParallel.*Launch it with torchrun"):
        model._replicate_for_data_parallel()  # which DataParallel asks of every module
    del model.forward
    assert type(model._replicate_for_data_parallel()) is type(model)


def test_what_accelerate_unwraps_is_still_fused():
    from accelerate.utils import convert_outputs_to_fp32, extract_model_from_parallel

    model = small_model("Qwen2")
    fuse_loss(model, objectives.trsft(alpha=0.1))
    model._original_forward = model.forward  # as Accelerate prepares a model for mixed precision
    model.forward = types.MethodType(convert_outputs_to_fp32(model.forward.__func__), model)
    unwrapped = extract_model_from_parallel(model, keep_fp32_wrapper=False)
    assert unwrapped(INPUT_IDS, labels=LABELS).logits is None


def test_a_model_without_finite_logits_is_refused():
    model = small_model("Qwen2")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"must have finite logits, got a loss of nan for 8 tokens\. Look at its weights"):
        fuse_loss(model, objectives.sft())


def test_a_model_on_meta_tensors_is_fused_without_being_run():
    config = small_model("Qwen2").config
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(config)
    fuse_loss(model, objectives.sft())
    model.to_empty(device="cpu")
    assert model(INPUT_IDS, labels=LABELS).logits is None

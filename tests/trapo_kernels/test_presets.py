"""The presets as a list: documented, registered, and in step with the page's table; sums of objectives."""

import dataclasses
import doctest
import inspect
import math
import re
from pathlib import Path

import pytest
import torch

from trapo_kernels import KL, Objective, Term, aggregate, gates, objectives

README = Path(__file__).parents[2] / "README.md"
PAGE = README.parent / "trapo_kernels" / "README.md"


@pytest.mark.parametrize("name", objectives.PRESETS)
def test_a_preset_names_its_system_and_its_source(name):
    preset = objectives.PRESETS[name]
    text = inspect.cleandoc(preset.__doc__)
    assert re.match(r"\S.{1,30}?: \S", text) and text.count("Source:") == 1
    assert getattr(objectives, name) is preset and name in objectives.__all__
    assert isinstance(preset(), Objective) and preset().name == name


def _refusal(preset, name):
    """The sentence in which a preset says what a parameter may be."""
    for value in (-2.0, "?"):
        try:
            preset(**{name: value})
        except ValueError as refused:
            return str(refused)
    pytest.fail(f"{preset.__name__} takes any {name}")


@pytest.mark.parametrize("name", objectives.PRESETS)
def test_a_preset_names_its_parameters_with_their_ranges(name):
    preset = objectives.PRESETS[name]
    doc = " ".join(preset.__doc__.split())
    for parameter in inspect.signature(preset).parameters:
        assert f"`{parameter}`" in doc
        refusal = _refusal(preset, parameter)
        assert f": {parameter} must " in refusal  # the name that the caller knows
        if interval := re.search(r"must lie in ([(\[].*?[)\]])", refusal):
            found = "[1 + epsilon_high, inf]" if parameter == "delta" else interval[1]  # of the default here
            assert f"`{parameter}` in {found}" in doc
        elif "finite" in refusal:
            assert f"`{parameter}` finite" in doc


@pytest.mark.parametrize(
    "gate", [gates.One(), gates.Ratio(), gates.Band(0.5, 2.0), gates.Shape(), gates.Power(), gates.Phi()], ids=str
)
def test_a_gate_prints_the_value_that_it_computes(gate):
    d = torch.linspace(-3.0, 2.0, 101, dtype=torch.float64)
    python = str(gate).replace("log r", "log(r)").replace("²", "**2").replace("^", "**")
    printed = eval(python, {"r": d.exp(), "log": torch.log, "clamp": torch.clamp})
    torch.testing.assert_close(gate.value(d, torch.ones_like(d)), printed)


def test_the_presets_are_those_of_the_field():
    wanted = """trapo sft dft iw_sft_token psft ppo grpo dr_grpo dapo cispo sapo rloo reinforce_pp gspo luffy exgrpo prefix_rft
        chord_mu chord_phi srft uft relift hpt reft gmpo iw_sft trsft"""
    assert set(objectives.PRESETS) == set(wanted.split())


@pytest.mark.parametrize("name", objectives.PUBLISHED)
def test_what_a_method_has_besides_its_loss_is_said_in_one_place(name):
    aggregation = objectives.PUBLISHED[name].aggregation
    doc = objectives.PRESETS[name].__doc__
    assert "aggregate(" not in doc and "`PUBLISHED`" in doc
    if aggregation is not None:
        aggregate(torch.zeros(2, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), mode=aggregation, max_tokens=4)


def test_the_table_has_a_row_per_preset_and_says_how_many_passes():
    head, _, *rows = objectives.table().splitlines()
    assert head == "| system | preset | passes | source |" and len(rows) == len(objectives.PRESETS)
    passes = {row.split("|")[2].strip(" `"): row.split("|")[3].strip() for row in rows}
    assert passes["trapo"] == "1" and passes["gspo"] == "2, but 1 without `old_logprob`" and passes["srft"] == "2"
    assert all(row.count("|") == 5 and "  " not in row for row in rows)


def test_the_page_has_the_table_of_the_presets():
    (block,) = re.findall(r"<!-- objectives -->\n(.*?)<!-- /objectives -->", PAGE.read_text(), re.S)
    assert block.strip() == objectives.table().strip(), "paste objectives.table() between the marks"


def test_grpo_takes_the_defaults_of_trls_configuration():
    assert objectives.grpo(0.1, None, delta=None) == objectives.grpo(0.1, 0.1, delta=math.inf) == objectives.ppo(0.1, 0.1)


def test_any_preset_takes_a_kl_as_the_documentation_says():
    names = {"dataclasses": dataclasses, "KL": KL, "objectives": objectives}
    (example,) = doctest.DocTestFinder(recurse=False).find(objectives, globs=names)
    assert doctest.DocTestRunner().run(example) == (0, 1)
    (code,) = re.findall(r"`(dataclasses\.replace\(.*?\))`", README.read_text())
    assert eval(code, names) == Objective(rollout=objectives.gspo().rollout, kl=KL(0.1))
    takes_beta = {name for name, preset in objectives.PRESETS.items() if "beta" in inspect.signature(preset).parameters}
    assert takes_beta == {"grpo", "reinforce_pp", "uft"}  # which both name


@pytest.mark.parametrize("options", [{"kl": "k2", "kl_clamp": 2.0}, {"kl": "k3", "kl_cap": 9.0}, {"kl": "k3_corrected"}], ids=str)
def test_a_beta_that_is_scheduled_to_zero_leaves_no_kl_whatever_its_other_options(options):
    assert objectives.grpo(beta=0.0, **options) == objectives.grpo()
    assert objectives.reinforce_pp(beta=0.0, kl=options["kl"]) == objectives.reinforce_pp()
    assert objectives.grpo(beta=0.1, **options).kl is not None and objectives.uft(beta=0.0).kl is None


def test_a_sum_says_why_it_takes_two_passes_and_lists_the_terms_of_all_its_layers():
    expert, rollout, kl = Term(gates.One()), Term(gates.Ratio(), anchor="old", signal="advantage"), KL(0.1)
    apart = Objective(expert=expert, plus=Objective(rollout=rollout, kl=kl, entropy_coef=0.1))
    assert (apart.expert_terms, apart.rollout_terms) == ([expert], [rollout]) and apart.has_kl and apart.has_entropy_bonus
    assert apart.why_two_passes(on_policy=True).startswith("it adds an objective as `plus`")
    twice = Objective(expert=expert, plus=Objective(expert=expert))
    assert twice.why_two_passes(on_policy=True).startswith("a role has two terms") and not twice.has_kl
    assert Objective(expert=expert, rollout=rollout, kl=kl).why_two_passes(on_policy=True) is None

"""The linter of DeepSpeed configs against DeepSpeed itself: its keys, its refusals, and what it takes without a word."""

import copy
import dataclasses
import importlib
import inspect
import json
import os
import random
import re
import subprocess
import sys
from enum import Enum

import pytest

from strategies import effective
from tests.yardstick import deepspeed_config_mutants as mutants
from yardstick import deepspeed_annotate, deepspeed_config, deepspeed_explain, deepspeed_map, deepspeed_rules
from yardstick.deepspeed_config import KEYS, MAP, lint
from yardstick.deepspeed_source import Package
from yardstick.settings import SettingsError

Z = "zero_optimization."


@pytest.fixture(scope="module")
def ask(server, tmp_path_factory):
    """ask(function, *arguments): what the function returns in a fresh process that has DeepSpeed imported."""
    def call(function, *arguments, seconds=300):
        folder = tmp_path_factory.mktemp("asked")
        process = server.Process(target=_answer, args=(folder, function, arguments))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        log = (folder / "log").read_text(errors="replace") if (folder / "log").exists() else ""
        assert (folder / "answer").exists(), f"no answer; the end of what it printed:\n{log[-3000:]}"
        return json.loads((folder / "answer").read_text())
    return call


def _answer(folder, function, arguments):
    log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(DS_ACCELERATOR="cpu")
    text = json.dumps(function(*arguments))
    (folder / "part").write_text(text)
    (folder / "part").rename(folder / "answer")


def only(config, **options):
    """{key: "level: message"} of the findings."""
    return {finding.key: f"{finding.level}: {finding.message}" for finding in lint(config, **options)}


def changed(changes, base=mutants.BASE):
    """A clean config with dotted keys set, or deleted where the value is ...; what is named first stands first."""
    config = copy.deepcopy(base)
    for key, value in changes.items():
        section, name = mutants.at(config, key)
        section.pop(name, None)
        if value is not ...:
            section[name] = value
    return config


# The map of keys is DeepSpeed's

def plain(value):
    """A default as JSON holds it."""
    value = value.value if isinstance(value, Enum) else value
    return json.loads(json.dumps(value, default=str))


def described():
    """{section: {key: (default, limits)}} of DeepSpeed's pydantic models, as the map names them, found from a config."""
    from pydantic import BaseModel

    from deepspeed.runtime.config import DeepSpeedConfig
    sections = {key: {} for key in KEYS if "." not in key and KEYS[key].get("strict")}
    sections["zero_optimization"] = {"offload_param": {}, "offload_optimizer": {}, "zenflow": {}}
    config = DeepSpeedConfig({"train_batch_size": 1, "weight_quantization": {}, **sections})
    found, todo = {}, [value for value in vars(config).values() if isinstance(value, BaseModel)]
    todo += [config.comms_config.comms_logger]
    while todo:
        model = todo.pop()
        todo += [value for value in vars(model).values() if isinstance(value, BaseModel)]
        name = f"{type(model).__module__.removeprefix('deepspeed.').replace('.', '/')}.py:{type(model).__name__}"
        found[name] = {}
        for field, about in type(model).model_fields.items():
            limits = {old: getattr(m, old) for m in about.metadata for old in ("ge", "gt", "le", "lt") if hasattr(m, old)}
            default = about.get_default(call_default_factory=True)
            found[name][about.alias or field] = (
                {} if isinstance(default, BaseModel) else plain(default), limits, field,
                bool((about.json_schema_extra or {}).get("deprecated")) if isinstance(about.json_schema_extra, dict) else False)
    found.pop("monitor/config.py:DeepSpeedMonitorConfig")             # its fields are top-level keys
    return found


def test_every_field_of_the_models_is_in_the_map_and_no_other(ask):
    models = ask(described)
    ours = {spec["read"]: key for key, spec in KEYS.items() if spec.get("strict")}
    assert set(models) == set(ours)
    for name, fields in models.items():
        section = ours[name]
        names = {key.rpartition(".")[2]: KEYS[key] for key in KEYS if key.rpartition(".")[0] == section}
        assert set(names) == set(fields), section
        for key, (default, limits, field, deprecated) in fields.items():
            spec = names[key]
            assert spec["default"] == default, f"{section}.{key}: the map has {spec['default']}, DeepSpeed {default}"
            assert spec.get("field", key) == field, f"{section}.{key}"
            assert not deprecated or "deprecated" in spec, f"{section}.{key} is deprecated"
            low, high = spec.get("min", spec.get("above")), spec.get("max", spec.get("below"))
            assert low is not None and low >= limits.get("ge", limits.get("gt")) if {"ge", "gt"} & set(limits) else True, key
            assert high is not None and high <= limits.get("le", limits.get("lt")) if {"le", "lt"} & set(limits) else True, key


class Recorder(dict):
    """A config that remembers by which names it was asked."""

    asked = set()

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def keys(self):
        return self


def asked_for():
    """(names that DeepSpeedConfig asks a config for, its removed keys, what it makes of an empty config)."""
    from deepspeed.runtime import config as module
    made = module.DeepSpeedConfig(Recorder(train_batch_size=1))
    seen = {"aio": made.aio_config, "flops_profiler": vars(made.flops_profiler_config), "pipeline": made.pipeline,
            "activation_checkpointing": vars(made.activation_checkpointing_config),
            "autotuning": {k: v for k, v in vars(made.autotuning_config).items() if k not in ("start_step", "end_step")},
            "data_efficiency": {**made.data_efficiency_config, "seed": module.get_data_efficiency_config({})["seed"]},
            "checkpoint": made.checkpoint_config, "expert_parallel": dataclasses.asdict(module.get_expert_parallel_config({})),
            "": {name: getattr(made, name) for name, spec in KEYS.items() if spec["type"] != "section" and hasattr(made, name)}}
    return plain([sorted(Recorder.asked), seen,
                  [*module._REMOVED_TOP_LEVEL_CONFIG_KEYS, *(Z + key for key in module._REMOVED_ZERO_CONFIG_KEYS)]])


def test_every_name_that_deepspeed_asks_for_is_in_the_map(ask):
    names, seen, removed = ask(asked_for)
    assert len(names) > 50 and "zero_optimization" in names
    assert {name for name in names if name not in KEYS and name not in deepspeed_config.FIELDS} <= set(MAP["removed"])
    assert set(removed) <= set(MAP["removed"])
    given = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")     # not defaults here
    by_class = ("torch_dtype", "load_balance_coeff", "expert_w3")        # objects without a form in JSON
    compared = 0

    def compare(section, values):
        nonlocal compared
        for name, value in values.items():
            key = f"{section}.{name}".lstrip(".")
            if name.startswith("_") or key in given or name in by_class or "torch." in str(value):
                continue
            assert key in KEYS, f"{key} is not in the map"
            if isinstance(value, dict) and not KEYS[key].get("free"):
                compare(key, value)
            else:
                assert KEYS[key]["default"] == value, f"{key}: the map has {KEYS[key]['default']}, DeepSpeed {value}"
                compared += 1
    for section, values in seen.items():
        compare(section, values)
    assert compared > 90


def signatures():
    """{name in the map: {parameter: default}} of DeepSpeed's and torch's optimizers and schedules."""
    import torch

    from deepspeed.ops import adagrad, adam, lamb, lion
    from deepspeed.runtime import lr_schedules
    from deepspeed.runtime.engine import DeepSpeedEngine
    optimizers = {name: getattr(module, name) for module, names in (
        (adam, ["FusedAdam", "DeepSpeedCPUAdam"]), (lamb, ["FusedLamb"]), (lion, ["FusedLion", "DeepSpeedCPULion"]),
        (adagrad, ["DeepSpeedCPUAdagrad"])) for name in names}
    optimizers |= {f"torch.optim.{name}": one for name, one in vars(torch.optim).items()
                   if inspect.isclass(one) and issubclass(one, torch.optim.Optimizer) and name not in ("Optimizer", "Muon")}
    schedules = {name: getattr(lr_schedules, name) for name in lr_schedules.VALID_LR_SCHEDULES}
    schedules |= {name: one for name, one in vars(torch.optim.lr_scheduler).items() if name not in schedules
                  and inspect.isclass(one) and issubclass(one, torch.optim.lr_scheduler.LRScheduler)
                      and not name.endswith("LRScheduler")}

    def parameters(one):
        found = list(inspect.signature(one.__init__).parameters.values())[2:]
        return {p.name: "required" if p.default is p.empty else plain(p.default) for p in found}
    muon = {*DeepSpeedEngine._MUON_HALF_KEYS, *DeepSpeedEngine._ADAM_HALF_KEYS, "muon_lr", "adam_lr"}
    return [{name: parameters(one) for name, one in optimizers.items()} | {"MuonWithAuxAdam": dict.fromkeys(sorted(muon))},
            {name: parameters(one) for name, one in schedules.items()}]


def test_parameters_of_optimizers_and_schedules_are_those_of_their_classes(ask):
    optimizers, schedules = ask(signatures)
    assert set(MAP["optimizers"]) == set(optimizers)
    for name, known in optimizers.items():
        for gone in ("adamw_mode", "max_grad_norm"):             # the engine gives the first, and refuses the second
            known.pop(gone, None)
        assert MAP["optimizers"][name]["parameters"] == known, name
    no_text = {"LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler"}              # they take objects
    assert set(MAP["schedulers"]) == set(schedules) - no_text
    for name, spec in MAP["schedulers"].items():
        known = {key: value for key, value in schedules[name].items() if key != "scale_fn"}
        assert spec["required"] == [key for key, value in known.items() if value == "required"], name
        assert spec["parameters"] == {key: None if value == "required" else value for key, value in known.items()}, name


def readers():
    """The symbols of the map that the installed DeepSpeed does not have."""
    missing = []
    for key in [*KEYS, *(f"{part}.params.{name}" for part in ("optimizer", "scheduler") for name in ("lr",
        "warmup_num_steps"))]:
        spec = deepspeed_config.entry(key, {"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}})
        if spec is None:
            continue
        path, _, symbol = spec["read"].partition(":")
        found = importlib.import_module(f"deepspeed.{path[:-3].replace('/', '.')}".replace(".__init__", ""))
        for name in symbol.split(".") if symbol else []:
            fields = getattr(found, "model_fields", {})
            found = fields.get(name) or getattr(found, name, None)
        if found is None:
            missing.append(f"{key}: {spec['read']}")
    return missing


def test_the_symbols_exist(ask):
    assert ask(readers) == []


def test_the_map_is_complete():
    for key, spec in KEYS.items():
        assert {"type", "default", "says"} <= set(spec) and spec["says"].endswith("."), key
        assert deepspeed_config.entry(key)["read"] if not key.startswith(("optimizer.params.", "scheduler.params.")) else True
        assert deepspeed_config.fits(spec["default"], spec) or spec["default"] in (None, {}) or spec.get("program"), key
        assert "deprecated" not in spec or all(word in KEYS for word in re.findall(r"[\w.]+_[\w.]+", spec["deprecated"])), key


# Mutants

@pytest.fixture(scope="module")
def made():
    return mutants.mutants()


def test_deepspeed_refuses_nothing_that_the_linter_takes(ask, tmp_path, made):
    said = ask(mutants.constructed, [m.text for m in made], str(tmp_path), seconds=120)
    judged = mutants.judgements(made, tmp_path)
    missed = [(m.kind, m.key, refusal) for m, (errors, _), refusal in zip(made, judged, said) if refusal and not errors]
    assert not missed
    for mutant, (errors, _) in zip(made, judged):
        for text in errors:
            assert "\n" not in text and text.endswith((".", "?")) and len(text) < 400, text
            assert re.match(r"error: [^ ].*: .+|.*the key \".*\" stands", text), text
    silent = sum(bool(errors) and not refusal for (errors, _), refusal in zip(judged, said))
    assert len(made) == 500 and silent > 50 and sum(not errors for errors, _ in judged) > 100     # both sides are tried
    kinds = {m.kind for m, (errors, _) in zip(made, judged) if errors}
    assert kinds == set(mutants.KINDS), "a mutation that the linter never refuses"


# What DeepSpeed's constructor takes, the linter warns of, and initialisation then refuses.
KNOWN = ["requires an optimizer", "untested ZeRO Optimizer", "is not an Optimizer", "missing 1 required positional argument",
         "must be a mapping, not NoneType", "Type fp16 is not supported", "compute_grad_norm=false",
             "not yet supported with ZeRO",
         "managed_gradient_accumulation=False", "unsupported mix", "conflicts with the enabled precision",
             "No module named 'wandb'",
         "No module named 'comet_ml'", "install DataStates", "ZeRO Stage 1 is not supported", "Master weights feature",
         "Mesh should not be bigger", "Hybrid Optimizer", "not been implemented on CPU", "'torch_adam'", "SuperOffload only"]


@pytest.fixture(scope="module")
def drawn(made, tmp_path_factory):
    """[(mutant, warnings)] of those that the linter takes and that need no compiled op, drawn by seed."""
    judged = mutants.judgements(made, tmp_path_factory.mktemp("drawn"))
    taken = [(m, warnings) for m, (errors, warnings) in zip(made, judged)
             if not errors and not mutants.compiles(json.loads(m.text))]
    return random.Random(mutants.SEED).sample(taken, mutants.DRAWN)


@pytest.fixture(scope="module")
def initialized(ask, drawn, tmp_path_factory):
    """{text of a config: what deepspeed.initialize says}, of the drawn mutants and of FAILS: one import for all of them."""
    texts = [m.text for m, _ in drawn] + [json.dumps(changed(row[0])) for row in FAILS]
    return dict(zip(texts, ask(mutants.initialized, texts, str(tmp_path_factory.mktemp("initialized")), 60, seconds=500)))


def test_what_the_linter_takes_initializes(drawn, initialized):
    for mutant, warnings in drawn:
        if refusal := initialized[mutant.text]:
            where = f"{mutant.kind} {mutant.key}: {refusal}\n{mutant.text}"
            assert warnings and any(reason in refusal for reason in KNOWN), where
    assert sum(not initialized[mutant.text] for mutant, _ in drawn) >= mutants.DRAWN // 2


# Rules, one by one: (changes to a clean config, key, words of the message), with what initialisation says where it fails

NVME = {Z + "stage": 3, Z + "reduce_bucket_size": 1000000, Z + "stage3_param_persistence_threshold": 0,
        Z + "offload_param.device": "nvme", Z + "offload_param.nvme_path": "swap", "bf16.enabled": True,
        Z + "offload_param.max_in_cpu": 0, Z + "stage3_prefetch_bucket_size": 0}
ZERO2 = {Z + "stage": 2, Z + "reduce_bucket_size": 1000000}
ZERO3 = {Z + "stage": 3, Z + "reduce_bucket_size": 1000000}
ZENFLOW = {**ZERO2, "optimizer.params.torch_adam": ..., Z + "offload_optimizer.device": "cpu", Z + "zenflow.update_interval": 4}
OO, OP, ZF = Z + "offload_optimizer.", Z + "offload_param.", Z + "zenflow."
LTD, CURRICULUM = "data_efficiency.data_sampling.dynamic_batching.", "data_efficiency.data_sampling.curriculum_learning."
ERRORS = [
    ({"zero_optimisation.stage": 2}, "zero_optimisation", ["unknown key", "without a word", "zero_optimization"]),
    ({Z + "overlap_com": True}, Z + "overlap_com", ["unknown key", "refuses", "overlap_comm"]),
    ({OO + "devise": "cpu"}, OO + "devise", ["unknown key", "device"]),
    ({"optimizer.params.learning_rate": 1}, "optimizer.params.learning_rate", ["torch.optim.AdamW", "no such parameter"]),
    ({"optimizer.params.torch_adam": ..., "optimizer.params.foreach": True}, "optimizer.params.foreach", ["FusedAdam"]),
    ({"optimizer.type": "SGD", "optimizer.params": {"betas": [0.9, 0.9]}}, "optimizer.params.betas", ["torch.optim.SGD"]),
    ({"scheduler.type": "WarmupLR", "scheduler.params.total_num_steps": 5}, "scheduler.params.total_num_steps", ["WarmupLR"]),
    ({"optimizer.type": ...}, "optimizer.params", ["ignores", "optimizer.type"]),
    ({"optimizer.type": "AdmW"}, "optimizer.type", ["AdmW", "AdamW"]),
    ({"optimizer.type": "OneBitAdam"}, "optimizer.type", ["removed OneBitAdam", "AdamW"]),
    ({"scheduler.type": "WarmupLRs", "scheduler.params": {}}, "scheduler.type", ["WarmupLR"]),
    ({"lr": 1e-3}, "lr", ["Its place is", "optimizer.params.lr"]),
    ({"overlap_comm": True}, "overlap_comm", [Z + "overlap_comm"]),
    ({"_comment": "x"}, "_comment", ["// text"]),
    ({"amp.enabled": True}, "amp", ["removed", "bf16"]),
    ({Z + "mics_shard_size": 2}, Z + "mics_shard_size", ["removed", "zero_hpz_partition_size"]),
    ({"optimizer.params.max_grad_norm": 1.0}, "optimizer.params.max_grad_norm", ["gradient_clipping"]),
    ({"gradient_clipping": "auto"}, "gradient_clipping", ["auto", "transformers", "1.0"]),
    ({"gradient_clipping": -1}, "gradient_clipping", ["-1", "at least 0"]),
    ({Z + "stage": 4}, Z + "stage", ["4", "0, 1, 2, 3"]),
    ({Z + "stage": "2"}, Z + "stage", ['"2"']),
    ({Z + "overlap_comm": "true"}, Z + "overlap_comm", ["true or false"]),
    ({"optimizer.params.betas": [0.9]}, "optimizer.params.betas", ["of length 2"]),
    ({ZF + "topk_ratio": 1.0}, ZF + "topk_ratio", ["less than 1"]),
    ({"compile.passes": ["z1", "z2"]}, "compile.passes", ["z1, z3"]),
    ({"aio.queue_depth": 1.0}, "aio.queue_depth", ["whole number"]),
    ({"tensor_parallel.dtype": "fp16"}, "tensor_parallel.dtype", ["left out"]),
    ({**ZERO2, Z + "stage3_max_live_parameters": 0}, Z + "stage3_max_live_parameters", ["stage 3", "at stage 2"]),
    ({**ZERO2, Z + "prefetch_bucket_size": 0}, Z + "prefetch_bucket_size", ["stage 3"]),
    ({**ZERO2, OP + "device": "cpu"}, OP + "device", ["stage 3 only"]),
    ({**ZERO2, Z + "cpu_offload_param": True}, OP + "device", ["stage 3 only"]),
    ({**ZERO2, OO + "device": "nvme", OO + "nvme_path": "x"}, OO + "device", ["needs stage 3"]),
    ({"bf16.enabled": True, "fp16.enabled": True}, "bf16.enabled", ["both"]),
    ({**ZERO3, "gradient_allreduce_op": "Sum"}, "gradient_allreduce_op", ["refused"]),
    ({"fp16.fp16_master_weights_and_grads": True}, "fp16.fp16_master_weights_and_grads", ["stage 1, 2 or 3"]),
    ({"bf16.bf16_master_weights_and_grads": True}, "bf16.bf16_master_weights_and_grads", ["stage 1, 2 or 3"]),
    ({**ZERO2, "bf16.bf16_optimizer_states": True}, "bf16.bf16_optimizer_states", ["bf16_master_weights_and_grads"]),
    ({**ZERO3, Z + "compute_grad_norm": False}, Z + "compute_grad_norm", ["stages 1 and 2"]),
    ({**ZERO2, OO + "ratio": 0.5}, OO + "ratio", ["stage 3"]),
    ({**ZERO2, Z + "cpu_offload": True, OO + "device": "cpu"}, Z + "cpu_offload", ["beside"]),
    ({**ZERO3, Z + "cpu_offload_param": True, OP + "device": "cpu"}, Z + "cpu_offload_param", ["beside"]),
    ({**ZERO3, Z + "stage3_gather_fp16_weights_on_model_save": True, Z + "stage3_gather_16bit_weights_on_model_save": True},
     Z + "stage3_gather_fp16_weights_on_model_save", ["beside"]),
    ({**ZERO3, Z + "max_live_parameters": 1, Z + "stage3_max_live_parameters": 1}, Z + "stage3_max_live_parameters", ["twice"]),
    ({"aio.use_gds": True}, "aio.use_gds", ["CUDA"]),
    ({CURRICULUM + "enabled": True}, CURRICULUM + "enabled", ["curriculum_metrics"]),
    ({LTD + "enabled": True}, LTD + "enabled", ["max_tokens"]),
    ({"train_micro_batch_size_per_gpu": ...}, "train_batch_size", ["neither", "train_micro_batch_size_per_gpu"]),
    ({"train_batch_size": 7}, "train_batch_size", ["7", "micro-batch 2"]),
    ({"train_batch_size": 8, "gradient_accumulation_steps": 3}, "train_batch_size", ["multiple of"]),
    ({"train_batch_size": 8, "gradient_accumulation_steps": 2}, "train_batch_size", ["= 4", "Leave one"]),
]
FAILS = [                                        # warnings of what initialisation refuses, and its words
    ({**ZERO2, "optimizer": ...}, "optimizer.type", ["not given"], "requires an optimizer"),
    ({**ZERO3, OO + "device": "nvme"}, OO + "nvme_path", ["not given"], "NoneType"),
    ({**NVME, OP + "nvme_path": ...}, OP + "nvme_path", ["not given"], "nvme_path"),
    ({**ZERO3, OO + "device": "cpu", OO + "super_offload": True}, OO + "super_offload", ["NVIDIA"], "only supports NVIDIA"),
    ({**ZERO2, Z + "legacy_stage1": True}, Z + "legacy_stage1", ["gone"], "Stage 1 is not supported"),
    ({**ZENFLOW, "optimizer.params.torch_adam": True}, "optimizer.params.torch_adam", ["zenflow"], "torch_adam"),
    ({**ZENFLOW, "optimizer.params.torch_adam": True, ZF + "select_interval": 4}, ZF + "select_interval",
     ["select_strategy"], "Warning"),
    ({**ZENFLOW, "optimizer.params.torch_adam": True, ZF + "select_strategy": "step"}, ZF + "select_interval",
     ["Give a number"], "must be a number"),
    ({**ZENFLOW, "optimizer.params.torch_adam": True, ZF + "select_strategy": "step", ZF + "select_interval": 2},
     ZF + "select_interval",
     ["less than"], "Select interval must be greater"),
    ({**ZERO2, "optimizer": {"type": "SGD"}}, "optimizer.type", ["zero_allow_untested_optimizer"], "untested ZeRO"),
    ({**ZERO2, "optimizer": {"type": "Lion"}}, "optimizer.type", ["no code for a CPU"], "not been implemented on CPU"),
    ({**ZERO3, "optimizer.type": "Muon", "optimizer.params": {"lr": 0.01, "momentum": 0.9, "torch_adam": True}},
     "optimizer.type",
     ["reduce_scatter"], "Muon and reduce scatter"),
    ({"optimizer": {"type": "Lamb"}, "fp16.loss_scale": 8}, "optimizer.type", ["loss_scale"], "dynamic loss scaling"),
    ({"optimizer": {"type": "MuAdam"}}, "optimizer.type", ["mup"], "MuAdam"),
    ({"scheduler.type": "WarmupLR"}, "scheduler.params", ["not given"], "must be a mapping"),
    ({"scheduler.type": "WarmupDecayLR", "scheduler.params": {}}, "scheduler.params.total_num_steps", ["not given"],
     "total_num_steps"),
    ({**ZERO2, "scheduler.type": "StepLR", "scheduler.params.step_size": 3}, "scheduler.type",
     ["is not an Optimizer"], "is not an Optimizer"),
    ({**ZERO3, "prescale_gradients": True}, "prescale_gradients", ["reduce_scatter"], "pre-scale gradients"),
    ({**ZERO2, "gradient_predivide_factor": 2}, "gradient_predivide_factor", ["reduce_scatter"], "gradient_predivide_factor"),
    ({**ZERO2, Z + "compute_grad_norm": False}, Z + "compute_grad_norm", ["clipping"], "requires gradient_clipping=0"),
    ({**ZERO2, "fp16.fp16_master_weights_and_grads": True}, "fp16.fp16_master_weights_and_grads", ["offload"],
     "Master weights"),
    ({**ZERO2, "bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
     "bf16.bf16_master_weights_and_grads", ["offload"], "Master weights"),
    ({"data_types.param_dtype": "bf16"}, "data_types.param_dtype", ["differs"], "conflicts"),
    ({"data_types.grad_accum_dtype": "bf16"}, "data_types.grad_accum_dtype", ["stage 0"], "unsupported mix"),
    ({Z + "stage": 1, Z + "overlap_comm": True, "managed_gradient_accumulation": False},
     "managed_gradient_accumulation", ["overlap_comm"],
     "supports ZeRO overlap_comm only"),
    ({**ZERO3, OO + "device": "cpu", OO + "ratio": 0.5}, OO + "ratio", ["own Adam"], "Hybrid Optimizer"),
    ({**ZERO3, Z + "zero_quantized_weights": True}, Z + "zero_quantized_weights", ["no code for a CPU"],
     "not been implemented on CPU"),
    ({"data_parallel_size": 2, "sequence_parallel_size": 1}, "data_parallel_size", ["number of ranks"], "Mesh"),
    ({"wandb.enabled": True}, "wandb.enabled", ["wandb"], "wandb"),
    ({"comet.enabled": True}, "comet.enabled", ["comet_ml"], "comet"),
    ({"datastates_ckpt": {}}, "datastates_ckpt", ["DataStates"], "DataStates"),
]
WARNINGS = [
    ({"gradient_clipping": ...}, "gradient_clipping", ["not given", "1.0"]),
    ({OO + "device": "cpu"}, OO + "device", ["stage 0"]),
    ({**ZERO2, OO + "pin_memory": False}, OO + "device", ["not given"]),
    ({**ZERO3, OP + "pin_memory": False}, OP + "device", ["not given"]),
    ({**NVME, "bf16": ...}, OP + "device", ["16 bits"]),
    ({**NVME, Z + "stage3_prefetch_bucket_size": 1}, OP + "max_in_cpu", ["prefetching", "stage3_prefetch_bucket_size"]),
    ({**NVME, OP + "max_in_cpu": ...}, OP + "max_in_cpu", ["stay in memory"]),
    ({**NVME, OP + "buffer_size": 100000}, OP + "buffer_size", ["524,288", "More elements than buffer size"]),
    ({**NVME, "aio.block_size": 8 * 2**20}, "aio.block_size", ["stay in memory", "1048576"]),
    ({"aio.block_size": 2**20}, "aio", ["no effect"]),
    ({**ZERO3, OP + "device": "cpu"}, Z + "stage3_param_persistence_threshold", ["100,000"]),
    ({Z + "stage": 2}, Z + "reduce_bucket_size", ["not given", "2 GB"]),
    ({Z + "stage": 3, Z + "reduce_bucket_size": 5e8}, Z + "reduce_bucket_size", ["from the start"]),
    ({**ZERO2, OO + "device": "cpu", OO + "super_offload": True}, OO + "super_offload", ["nothing at stage 2"]),
    ({**ZERO3, OO + "device": "cpu", OO + "cpuadam_cores_perc": 0.5}, OO + "cpuadam_cores_perc", ["super_offload"]),
    (ZENFLOW, Z + "zenflow", ["transposed", "first loss"]),
    ({**ZENFLOW, Z + "stage": 0}, Z + "zenflow", ["stage 0"]),
    ({**ZENFLOW, Z + "stage": 3}, Z + "zenflow", ["cuda"]),
    ({**ZENFLOW, OO + "device": "none"}, Z + "zenflow", ["on the CPU"]),
    ({**ZENFLOW, ZF + "update_interval": "auto"}, ZF + "update_interval", ["NaN"]),
    ({**ZENFLOW, "gradient_accumulation_steps": 2}, "gradient_accumulation_steps", ["update_interval"]),
    ({"scheduler.type": "WarmupDecayLR", "scheduler.params": {"total_num_steps": 5, "warmup_num_steps": 10}},
     "scheduler.params.total_num_steps",
     ["never ends"]),
    ({"scheduler.type": "ReduceLROnPlateau", "scheduler.params": {}}, "scheduler.type", ["metric"]),
    ({"fp16.enabled": True}, "fp16.enabled", ["CPU"]),
    ({**ZERO2, "pipeline.seed_layers": True}, "pipeline", ["stages 2 and 3"]),
    ({**ZERO3, "expert_parallel.enabled": True, Z + "zero_hpz_partition_size": 2}, "expert_parallel.enabled", ["ZeRO++"]),
    ({**ZERO2, "expert_parallel.enabled": True, Z + "contiguous_gradients": False}, "expert_parallel.enabled",
     ["contiguous_gradients"]),
    ({"tensor_parallel.autotp_size": 2}, "tensor_parallel.autotp_size", ["divide"]),
    ({"sequence_parallel_size": 2}, "sequence_parallel_size", ["divide"]),
    ({**ZERO3, OO + "device": "nvme", OO + "nvme_path": "x", "checkpoint.tag_validation": "fail"}, "checkpoint",
     ["resumes wrong"]),
    ({"checkpoint.load_universal": True}, "checkpoint.load_universal", ["stage 0"]),
    ({**ZERO3, OO + "device": "nvme", OO + "nvme_path": "x", "checkpoint.load_universal": True},
     "checkpoint.load_universal", ["NVMe"]),
    ({"activation_checkpointing.profile": True}, "activation_checkpointing", ["configure"]),
    ({"activation_checkpointing.cpu_checkpointing": True}, "activation_checkpointing.cpu_checkpointing", ["empties"]),
    ({"activation_checkpointing.contiguous_memory_optimization": True},
     "activation_checkpointing.contiguous_memory_optimization",
     ["number_checkpoints"]),
    ({"compile.deepcompile": True}, "compile.deepcompile", ["CUDA"]),
    ({**ZERO2, Z + "sub_group_size": 5}, Z + "sub_group_size", ["nothing at stage 2", "only at 3"]),
    ({**ZERO3, OP + "device": "cpu", OP + "buffer_count": 6}, OP + "buffer_count", ["nvme"]),
    ({**ZERO2, Z + "cpu_offload": True}, Z + "cpu_offload", ["outdated", "offload_optimizer"]),
    ({**ZERO3, Z + "stage3_gather_fp16_weights_on_model_save": True}, Z + "stage3_gather_fp16_weights_on_model_save",
     ["16bit"]),
    ({"bfloat16.enabled": True}, "bfloat16", ["\"bf16\""]),
    ({**ZERO3, Z + "max_live_parameters": 5}, Z + "max_live_parameters", ["stage3_max_live_parameters"]),
    ({"zero_optimization": True, "allgather_size": 5}, "allgather_size", ["allgather_bucket_size"]),
    ({**ZENFLOW, ZF + "steps_per_epoch": 5}, ZF + "steps_per_epoch", ["itself"]),
]


def name(row):
    return f"{row[1]} {row[2][0]}".replace(" ", "-")


def found(row, level):
    changes, key, words = row[:3]
    return [finding for finding in lint(changed(changes), ranks=1, accelerator="cpu")
            if finding.key == key and finding.level == level and all(word in finding.message for word in words)]


@pytest.mark.parametrize("row", ERRORS, ids=name)
def test_error(row):
    assert len(found(row, "error")) == 1, lint(changed(row[0]), ranks=1, accelerator="cpu")


@pytest.mark.parametrize("row", WARNINGS + FAILS, ids=name)
def test_warning(row):
    assert len(found(row, "warning")) == 1, lint(changed(row[0]), ranks=1, accelerator="cpu")
    assert not any(finding.level == "error" for finding in lint(changed(row[0]), ranks=1, accelerator="cpu"))


def test_every_rule_is_tried():
    tried = {finding.message for row in [*ERRORS, *WARNINGS, *FAILS]
             for finding in lint(changed(row[0]), ranks=1, accelerator="cpu")}
    assert [key for key, _, message in deepspeed_rules.ERRORS + deepspeed_rules.WARNINGS if message not in tried] == []


def test_what_is_said_to_fail_fails(ask, initialized, tmp_path):
    """Each config of FAILS is built by DeepSpeedConfig, and then refused by deepspeed.initialize in these words."""
    assert ask(mutants.constructed, [json.dumps(changed(row[0])) for row in FAILS], str(tmp_path)) == [""] * len(FAILS)
    for row in FAILS:
        said = initialized[json.dumps(changed(row[0]))]
        assert row[3] in said, f"{row[1]}: {said or 'it initializes'}"


# Good configs

@pytest.mark.parametrize("strategy", effective.STAGES)
def test_the_six_strategies_are_clean(strategy):
    config = effective.read(strategy)
    assert lint(config, ranks=2, accelerator="cpu") == []
    settings = {key: None for key in ("gradient_clipping", "learning_rate", "reduce_bucket_size", "max_live",
        "max_reuse_distance",
                                      "sub_group_size", "persistence_threshold")} | {"strategy": strategy, "cpp_ops": False}
    for cpp_ops in (False, True):
        ready = effective.effective({**settings,
            "cpp_ops": cpp_ops}, config, micro=2, accumulation=3, nvme_path="swap", largest_share=10**6,
                                    precision="bf16" if strategy == "infinity" else "fp32")
        assert lint(ready, ranks=2, accelerator="cpu") == []


def test_documented_configs():
    said = {title: only(config) for title, config in mutants.DOCUMENTED.items()}
    assert said["zero2 cpu offload"] == said["around training"] == said["fp16"] == {}
    assert set(said["zero3 nvme"]) == set() and set(said["zenflow"]) == {Z + "zenflow"}
    assert all(text.startswith("warning") for texts in said.values() for text in texts.values())


def test_nothing_is_said_twice_and_in_the_order_of_the_file():
    config = changed({Z + "stage": 2, Z + "overlap_com": True, "gradient_clipping": -1, "optimizer.params.lr": "x"})
    assert [finding.key for finding in lint(config)] == ["optimizer.params.lr", Z + "overlap_com",
        "gradient_clipping", Z + "reduce_bucket_size"]


def test_auto():
    config = changed({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "optimizer.params.lr": "auto",
                      Z + "stage": 3, Z + "reduce_bucket_size": "auto", Z + "sub_group_size": "auto"})
    assert set(only(config)) == {"train_batch_size", "train_micro_batch_size_per_gpu", "optimizer.params.lr",
        Z + "reduce_bucket_size",
                                 Z + "sub_group_size"}
    assert only(config, transformers=True) == {Z + "sub_group_size": only(config, transformers=True)[Z + "sub_group_size"]}
    assert "does not fill" in only(config, transformers=True)[Z + "sub_group_size"]


def test_ranks():
    config = changed({"train_batch_size": 8, "gradient_accumulation_steps": 2})
    assert only(config) == only(config, ranks=2) == {}
    assert "3 ranks" in only(config, ranks=3)["train_batch_size"]
    assert only({**config, "sequence_parallel_size": 2}, ranks=4) == {}
    assert "4 ranks" in only(changed({"train_batch_size": 6,
        "train_micro_batch_size_per_gpu": ...}), ranks=4)["train_batch_size"]


# Files and the command

def command(*arguments):
    return subprocess.run([sys.executable, "-m", "yardstick.deepspeed_config", *map(str, arguments)], cwd=mutants.ROOT,
                          capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": "120"})


def test_the_command(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('// why\n{\n  "train_micro_batch_size_per_gpu": 2,  # "lr": 3\n  "gradient_clipping": 1.0,\n'
                    '  /* "zero_optimisation":\n  */ "optimizer": {"type": "AdamW"},\n  "zero_optimisation": {"stage": 2},\n'
                    '  "lr": 1e-3,\n}\n')
    done = command("lint", file)
    assert done.returncode == 1 and done.stderr == ""
    assert done.stdout.splitlines() == [
        f"{file}:7: error: zero_optimisation: unknown key, DeepSpeed ignores it without a word. "
        'Did you mean "zero_optimization"?',
        f'{file}:8: error: lr: unknown key, DeepSpeed ignores it without a word. Its place is "optimizer.params.lr".']
    file.write_text('{"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW"}}')
    done = command("lint", file)
    assert done.returncode == 0 and done.stdout.startswith(f"{file}: warning: gradient_clipping: not given")
    file.write_text('{"train_batch_size": 6, "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": 1, '
                    '"optimizer": {"type": "AdamW"}}')
    assert command("lint", file, "--transformers").returncode == 0 and command("lint", file).returncode == 1
    file.write_text('{"train_batch_size": 6, "gradient_clipping": 1, "optimizer": {"type": "AdamW"}}')
    assert command("lint", file, "--ranks", 3).returncode == 0 and command("lint", file, "--ranks", 4).returncode == 1


FILES = [
    (None, ["there is no config file"]),
    ("folder", ["cannot be read", "JSON file"]),
    ('{"optimizer": {"type": ', ["not JSON", "line"]),
    ("[1]", ["JSON object"]),
    ("{\"a\": True}\n\xff", ["JSON"]),
    ('{"train_batch_size": 1, "zero_optimization": {"stage": 2, "stage": 3}}', ['"stage"', "2 times"]),
]


@pytest.mark.parametrize("text, words", FILES, ids=[words[-1] for _, words in FILES])
def test_files_that_are_no_config(tmp_path, text, words):
    file = tmp_path / "ds.json"
    if text == "folder":
        file.mkdir()
    elif text is not None:
        file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError) as caught:
        deepspeed_config.read(file)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_one_line_for_a_missing_file(tmp_path):
    done = command("lint", tmp_path / "none.json")
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1 and "none.json" in done.stderr


# explain and annotate

def explained(text):
    """{dotted key: lines below it} of what `explain` prints, by its indentation."""
    found, path = {}, []
    for line in text.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        if line and depth <= len(path) and (not found or before == ""):
            path = [*path[:depth], line.strip().split(" = ")[0]]
            found[".".join(path)] = []
        elif line:
            found[".".join(path)].append(line.strip())
        before = line
    return found


def test_explain_prints_every_key_with_its_facts_and_its_places_in_this_installation():
    file = "strategies/6_zero_infinity/config.json"
    done = command("explain", file, "--parameters", "7e9", "--ranks", 8)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and done.stderr == "" and max(map(len, lines[:-1])) <= 100 and "0 findings" in lines
    said, config = explained(done.stdout.partition("\n0 findings")[0]), deepspeed_config.read(mutants.ROOT / file)
    assert list(said) == list(deepspeed_config._walk(config))
    package = Package.at()
    for key, texts in said.items():
        text = " ".join(texts)
        assert re.search(r"(unit \S.*; )?default \S+.*; range \S", text), key
        place = re.search(r"read: ([\w/]+\.py):(\d+), ds:([\w.]+)", text)
        if not place:
            assert "read: torch.optim.AdamW" in text, key
            continue
        anchor = deepspeed_map.ANCHORS[place[3]]
        first, last = package.lines(place[1], anchor["symbol"])
        assert anchor["file"] == place[1] and first <= int(place[2]) <= last, key
        for used, line, name in re.findall(r"used: ([\w/]+\.py):(\d+), ds:([\w.]+)", text):
            anchor = deepspeed_map.ANCHORS[name]
            expressions = deepspeed_config.entry(key, config)["used"]
            assert int(line) in package.landmarks(used, anchor["symbol"], expressions[f"ds:{name}"]), key
    assert "buffer_count x buffer_size x 2 bytes = 11.0 MB" in " ".join(said[OP + "buffer_size"])
    assert "2P/N bytes = 1.8 GB" in " ".join(said[OP + "device"])
    assert "2P/N bytes," in " ".join(explained(command("explain", file).stdout)[OP + "device"])      # without sizes a formula


def test_explain_puts_what_the_linter_finds_beside_the_key(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"train_batch_size": 6, "zero_optimisation": {"stage": 2}, "a.b": 1, "bfloat16": {"enabled": "yes"},
                                "zero_optimization": {"stage": 2, "stage3_max_live_parameters": 0, "overlap_com": True}}))
    said = explained(command("explain", file, "--ranks", 4).stdout.partition("not in the file:")[0])
    for key, words in (("train_batch_size", "6 cannot be divided by 4 ranks"), ("zero_optimisation", 'Did you mean "zero_optimization"?'),
                       ("a.b", "unknown key"), ("bfloat16", 'Write that name'), ("bfloat16.enabled", '"yes" must be true or false'),
                       (Z + "stage3_max_live_parameters", "does nothing at stage 2"), (Z + "overlap_com", 'Did you mean "overlap_comm"?')):
        assert re.search(rf"! (error|warning): .*{re.escape(words)}", " ".join(said[key])), (key, said[key])
    text = command("explain", file, "--ranks", 4).stdout
    assert re.search(r"not in the file:\n +! warning: gradient_clipping: not given", text)
    assert len(re.findall(r"^ *! ", text, re.MULTILINE)) == int(re.search(r"^(\d+) findings", text, re.MULTILINE)[1])


def test_explain_without_deepspeed_names_symbols():
    text = deepspeed_explain.explain(effective.read("zero2"))
    assert "read: runtime/zero/config.py: DeepSpeedZeroConfig" in text and not re.search(r"\.py:\d", text)


def test_whatever_can_be_read_is_explained_and_annotated_and_stays_what_it_is(made, tmp_path):
    file, tried = tmp_path / "ds.json", 0
    for mutant in [*made[::5], *(json.dumps(config) for config in mutants.DOCUMENTED.values())]:
        file.write_text(getattr(mutant, "text", mutant))
        try:
            config = deepspeed_config.read(file)
        except ValueError:
            continue
        text = deepspeed_explain.explain(config, {"P": 7e9, "N": 8}, ranks=8)
        assert max(map(len, text.splitlines())) <= 100
        assert all(finding.message.split()[0] in text for finding in lint(config, ranks=8))
        annotated = deepspeed_annotate.annotate(file)
        file.write_text(annotated)
        assert deepspeed_config.read(file) == config and deepspeed_annotate.annotate(file) == annotated
        tried += 1
    assert tried > 80


def test_annotate_keeps_the_authors_notes_and_numbers(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('// why\n// more\n{"gradient_clipping": 1.0,  // here: a\n  //   long one\n  // gone\n "train_batch_size": 2,\n'
                    ' "optimizer": {"type": "AdamW", "params": {"lr": 2e-5}}}  // upstream: "//"; b\n')
    text = command("annotate", file).stdout
    assert text.startswith("// why\n// more\n{\n") and '"gradient_clipping": 1.0,' in text and '"lr": 2e-5' in text
    assert "// here: a long one\n" in text and '// upstream: "//"; b\n' in text and "gone" not in text
    before = file.read_text()
    done = command("annotate", file, "--write")
    assert done.returncode == 1 and done.stderr.startswith("yardstick.deepspeed_config: ") and len(done.stderr.splitlines()) == 1
    assert f'{file}:5: this comment would go: "// gone"' in done.stderr and "Begin it with here:" in done.stderr and file.read_text() == before
    file.write_text(before.replace("  // gone\n", ""))
    assert command("annotate", file, "--write").returncode == 0 and file.read_text() == text


@pytest.mark.parametrize("text, line, comment", [
    ('{ // mine\n "train_batch_size": 8}', 1, "// mine"), ('{"train_batch_size": 8 # here: mine\n}', 1, "# here: mine"),
    ('{"train_batch_size": 8}\n// mine\n', 2, "// mine"), ('{// here: mine\n "train_batch_size": 8}', 1, "// here: mine"),
    ('/* mine\n too */ {"train_batch_size": 8}', 1, "/* mine too */"), ('{"train_batch_size": 8, // cost: mine\n}', 1, "// cost: mine"),
    ('{"train_batch_size": 8 // here: a\n // mine\n}', 2, "// mine"), ('{"a": "//", "b": [1, // mine\n 2]}', 1, "// mine")])
def test_annotate_refuses_to_delete_a_comment(tmp_path, text, line, comment):
    file = tmp_path / "ds.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f'{file}:{line}: this comment would go: "{comment}"')):
        deepspeed_annotate.write(file)
    assert file.read_text() == text


@pytest.mark.parametrize("after", ["Sequences", "unit sequences", "cost: ", "read: ", "upstream: "])
def test_annotate_refuses_to_delete_a_comment_among_its_notes(tmp_path, after):
    file, text = tmp_path / "ds.json", (mutants.ROOT / "annotated_configs/zero2_zenflow_annotated.json").read_text()
    note = re.search(rf"^.*// {after}.*\n( +//   .*\n)*", text, re.MULTILINE)
    file.write_text(text[:note.end()] + f"{'':{deepspeed_annotate.COLUMN}}// mine\n" + text[note.end():])
    with pytest.raises(ValueError, match='would go: "// mine"'):
        deepspeed_annotate.write(file)


def test_annotate_writes_over_its_own_notes_after_a_change(tmp_path):
    file, text = tmp_path / "ds.json", (mutants.ROOT / "annotated_configs/zero3_nvme_offload_annotated.json").read_text()
    file.write_text(re.sub(r"(// cost: host memory of a rank).*", r"\1 as it was", text).replace("// Sequences", "// Texts"))
    assert file.read_text() != text
    deepspeed_annotate.write(file)
    assert file.read_text() == text


@pytest.mark.parametrize("text", [
    '{"a.b": 5, "a": {"b": 7}}', '{"a": {"b": 7}, "a.b": 5.5}', '{"a.b": {"c": 1e3}, "a": {"b.c": 2, "b": {"c": -3.0}}}', "{a: b // c\n}",
    '{"a": 1E+2, "b": -0.0, "c": -0,\n"d": 1.\n"e": 01\n"f": +1\n}'])
def test_annotate_never_changes_a_value(tmp_path, text):
    file = tmp_path / "ds.json"
    file.write_text(text)
    config = deepspeed_config.read(file)
    file.write_text(deepspeed_annotate.annotate(file))
    assert deepspeed_config.read(file) == config


def test_annotate_refuses_a_text_that_would_read_otherwise(tmp_path, monkeypatch):
    file = tmp_path / "ds.json"
    file.write_text('{"train_batch_size": 8}')
    monkeypatch.setattr(deepspeed_annotate, "_beside", lambda code, notes: [code.replace("8", "9")])
    with pytest.raises(ValueError, match="ds.json cannot be annotated"):
        deepspeed_annotate.write(file)
    assert file.read_text() == '{"train_batch_size": 8}'


def test_annotate_writes_through_a_link_and_keeps_the_mode(tmp_path):
    file, link = tmp_path / "ds.json", tmp_path / "link.json"
    file.write_text('{"train_batch_size": 8}')
    file.chmod(0o640)
    link.symlink_to(file)
    assert command("annotate", link, "--write").returncode == 0
    assert link.is_symlink() and "// Sequences" in file.read_text() and file.stat().st_mode & 0o777 == 0o640
    file.write_text('{"train_batch_size": 8}')
    file.chmod(0o440)
    done = command("annotate", link, "--write")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "is read-only" in done.stderr
    assert file.read_text() == '{"train_batch_size": 8}' and file.stat().st_mode & 0o777 == 0o440


@pytest.mark.parametrize("what", ["lint", "explain", "annotate"])
def test_half_a_character_is_one_message(tmp_path, what):
    file = tmp_path / "ds.json"
    file.write_text(r'{"train_batch_size": 8, "\ud800": 1}')
    done = command(what, file)
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert f"{file} holds \\ud800, which is half a character" in done.stderr


@pytest.mark.parametrize("arguments, words", [
    (["explain", "none.json"], "no config file"), (["annotate", "none.json"], "no config file"),
    (["explain", "strategies/3_zero_stage2/config.json", "--parameters", "0"], "--parameters 0.0 is no number"),
    (["explain", "strategies/3_zero_stage2/config.json", "--parameters", "inf"], "is no number"),
    (["lint", "strategies/3_zero_stage2/config.json", "--parameters", "7"], "belongs to explain"),
    (["explain", "strategies/3_zero_stage2/config.json", "--write"], "belongs to annotate"),
    (["explain", "strategies/3_zero_stage2/config.json", "--ranks", "0"], "--ranks 0 is no number"),
])
def test_bad_arguments_are_one_message(arguments, words):
    done = command(*arguments)
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1 and words in done.stderr


def test_every_number_has_a_unit():
    for part in ("keys", "optimizer_parameters", "scheduler_parameters"):
        for key, spec in MAP[part].items():
            kinds = spec["type"] if isinstance(spec["type"], list) else [spec["type"]]
            assert "unit" in spec or not {"int", "number", "numbers"} & set(kinds) or spec.get("choices"), key


def test_a_wrong_key_in_a_users_config_ends_the_run_before_it_starts(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({**effective.read("zero2"), "zero_optimisation": {"stage": 2}, "lr": 1}))
    with pytest.raises(SettingsError, match='"zero_optimisation": unknown key.*zero_optimization.* 1 more'):
        effective.read("zero2", file)
    file.write_text(json.dumps({**effective.read("zero2"), "train_batch_size": None}))
    assert effective.read("zero2", file) == effective.read("zero2")
    file.write_text(json.dumps({**effective.read("zero2"), "zero_optimization": True}))
    with pytest.raises(SettingsError, match="old form"):
        effective.read("zero2", file)

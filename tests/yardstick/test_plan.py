"""The plan: models read as transformers reads them, what fits, the config that runs, the line that runs it, without torch."""

import json
import shlex
import subprocess
import sys

import pytest

from strategies import effective
from tests.strategies import cases
from yardstick import deepspeed_memory, deepspeed_peak, formulas, plan, plan_job, plan_text, shapes
from yardstick.settings import SettingsError, override

WORDS = ["model=gpt2-xl", "device_memory=24"]


def job(*words):
    return plan_job.job_of(override(plan.CONFIG, list(words)))


def strategies(options):
    return [option.strategy for option in options]


# What is planned

@pytest.mark.parametrize("word,message", [
    ("devies=3", "Did you mean devices"), ("devices=two", "not a whole number"), ("device=A1000", "Did you mean device=A100"),
    ("model=gpt2xl", "Did you mean model=gpt2-xl"), ("devices=0", "devices=0 must be more than 0"), ("seq=2048", "1024 positions"),
    ("global_batch=3", "cannot be shared out"), ("micro_batch=3", "no multiple of micro_batch=3"), ("reserve=1", "between 0 and 1"),
    ("devices_per_node=3", "do not fill nodes"), ("layers=2", "needs hidden, heads, vocab"), ("precision=fp8", "none of auto")])
def test_what_cannot_be_is_said_in_one_message(word, message):
    with pytest.raises(SettingsError, match=message):
        job("devices=2", word)
    with pytest.raises(SettingsError, match="a CPU has none"):
        job("device=cpu", "precision=fp16")


def test_defaults_follow_the_device():
    assert (job("device=T4").precision, job("device=A100").precision, job("device=cpu").precision) == ("fp16", "bf16", "fp32")
    two = job("device=H100", "devices=16")
    assert two.machine.nodes == 2 and two.machine.peak == 989.4e12 and two.memory["device"] == 80e9 and two.seq == 1024
    assert job("device=cpu", "devices=4", "host_memory=16").memory == {"device": 4e9, "host": 0, "nvme": 0}
    own = job("device=mine", "device_memory=10", "peak=1e14", "link=1e10", "pcie=1e10")
    assert own.machine.peak == 1e14 and own.machine.link == own.machine.pcie == 1e10


def folder(tmp_path, **fields):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return f"model={tmp_path}"


CONFIGS = {
    "gpt2": {"n_layer": 2, "n_embd": 48, "n_head": 4, "vocab_size": 101, "n_positions": 32},
    "llama": {"num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 6, "vocab_size": 101, "intermediate_size": 80,
              "max_position_embeddings": 64}}
CONFIGS["mistral"] = CONFIGS["qwen2"] = {**CONFIGS["llama"], "num_key_value_heads": 3}


@pytest.mark.parametrize("kind,fields", [
    ("gpt2", {}), ("gpt2", {"n_inner": 70}), ("gpt2", {"tie_word_embeddings": False}), ("llama", {}),
    ("llama", {"num_key_value_heads": 2}), ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    ("mistral", {}), ("qwen2", {}), ("qwen2", {"tie_word_embeddings": True})])
def test_a_model_folder_has_the_tensors_that_transformers_makes_of_it(tmp_path, kind, fields):
    from transformers import AutoConfig

    from strategies.models import tensors_of
    word = folder(tmp_path, model_type=kind, **CONFIGS[kind], **fields)
    theirs = tensors_of(AutoConfig.from_pretrained(tmp_path))
    assert deepspeed_memory.of_shape(job(word).shape) == theirs


@pytest.mark.parametrize("kind,fields,message", [
    ("llama", {"attention_bias": True}, "attention_bias=True"), ("llama", {"head_dim": 10}, "head_dim=10"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention"), ("mixtral", {}, "model_type=mixtral is not understood"),
    ("llama", {"hidden_size": None}, "hidden_size is missing")])
def test_a_model_that_is_not_understood_is_refused(tmp_path, kind, fields, message):
    with pytest.raises(SettingsError, match=message) as error:
        job(folder(tmp_path, model_type=kind, **{**CONFIGS.get(kind, {}), **fields}))
    assert str(tmp_path / "config.json") in str(error.value)


def test_every_named_model_is_one_of_transformers():
    from strategies.models import configuration, tensors_of
    for name, shape in shapes.MODELS.items():
        config, same = configuration({"model": name, "pretrained": False}, gpu=False)
        assert same == shape and tensors_of(config) == deepspeed_memory.of_shape(shape), name
        assert shapes.from_config_json(config.to_dict())[0] == shape, name


# What fits

def test_ranking_on_machines_that_people_have():
    large = plan.rank(job("model=gpt2", "device=H200", "devices=1"))
    assert large[0].strategy == "dp" and all(option.fits for option in large if option.strategy != "infinity")
    pair = {option.strategy: option for option in plan.rank(job(*WORDS, "devices=2"))}
    assert {name for name, option in pair.items() if option.fits} == {"zero1", "zero2", "zero3", "offload"}
    assert "device" in pair["dp"].short and set(pair["infinity"].short) == {"nvme"}
    alone = plan.rank(job("model=llama-3-8b", "device=RTX 4090", "devices=1", "nvme=2000"))
    assert alone[0].strategy == "infinity" and strategies(o for o in alone if o.fits) == ["infinity"]


def test_fast_options_come_first_and_what_fits_before_what_does_not():
    options = plan.rank(job(*WORDS, "devices=8"))
    fitting = [option.seconds["total"] for option in options if option.fits]
    assert [option.fits for option in options] == sorted((option.fits for option in options), reverse=True)
    assert fitting[0] <= plan.NEAR * min(fitting)
    later = [seconds for seconds in fitting if seconds > plan.NEAR * min(fitting)]
    assert later == sorted(later)


def test_the_micro_batch_is_the_largest_power_of_two_that_fits():
    here = job(*WORDS, "devices=2", "global_batch=32")
    chosen = plan.best_of(here, "zero2")
    assert chosen.fits and chosen.micro_batch * chosen.accumulation * 2 == 32
    assert not plan.option_of(here, "zero2", 2 * chosen.micro_batch).fits


def test_buckets_make_stage_3_larger_than_stage_2_on_a_small_model_alone():
    """Its bucket is kept all the time; tests of deepspeed_peak measure the same."""
    small = "layers=2 hidden=96 heads=4 vocab=4096 seq=16 device=cpu"
    for words, larger in ((small, "zero3"), ("model=gpt2-xl seq=16", "zero2")):
        here = job(*words.split(), "devices=2", "global_batch=2")
        needed = {name: plan.option_of(here, name, 1, "kept").needed["device"] for name in ("zero2", "zero3")}
        assert max(needed, key=needed.get) == larger


def test_columns_sum_up_to_the_peak_and_needs_are_those_of_the_effective_config():
    here = job(*WORDS, "devices=2")
    for option in plan.rank(here):
        assert sum(plan_text.columns(here, option).values()) == option.needed["device"]
        again = deepspeed_peak.peaks(here.shape, option.config, ranks=2, micro_batch=option.micro_batch, seq=here.seq,
                                     accumulation=option.accumulation)
        assert deepspeed_peak.largest(again, "device").bytes_on("device") <= option.needed["device"]


# What is written

@pytest.mark.parametrize("strategy", plan_job.STRATEGIES)
def test_the_config_is_what_a_run_makes_effective(tmp_path, strategy):
    from real_model_example import CONFIG
    here = job(f"strategy={strategy}", f"output={tmp_path}", "nvme=500", *WORDS)
    option = plan.best_of(here, strategy)
    path, line = plan.write(here, option)
    words = [word for word in shlex.split(line) if "=" in word and word.split("=")[0] in CONFIG]
    settings = override(CONFIG, words)
    config = effective.read(strategy, settings["config"])
    total, micro, times, _ = effective.batch_triple(settings, config, 2)
    assert (total, micro, times) == (here.global_batch, option.micro_batch, option.accumulation)
    precision = effective.precision_of(settings, gpu=True)
    tensors = deepspeed_memory.of_shape(here.shape)
    ran = effective.effective(settings, config, micro=micro, accumulation=times, precision=precision, nvme_path="runs/nvme",
                              largest_share=deepspeed_memory.ceil_div(max(tensors.numels), 2))
    assert ran == option.config and config == option.config
    assert str(path) == settings["config"]


def test_stages_and_folders_are_those_of_the_strategies():
    assert plan_job.STRATEGIES == effective.STAGES


def test_several_nodes_are_started_by_torchrun(tmp_path):
    here = job("model=gpt2", "devices=16", f"output={tmp_path}")
    _, line = plan.write(here, plan.best_of(here, "zero1"))
    assert line.startswith("torchrun --nnodes=2 --nproc_per_node=8 ")
    assert "deepspeed --hostfile" in plan_text.choice(here, plan.best_of(here, "zero1"), "path", line)


# The command

BLOCKED = ("import sys\nfor name in ('torch', 'numpy', 'deepspeed', 'transformers', 'hjson'): sys.modules[name] = None\n"
           "from yardstick import plan\nsys.exit(plan.main(sys.argv[1:]))")


def command(*words):
    return subprocess.run([sys.executable, "-c", BLOCKED, *words], cwd=cases.ROOT, capture_output=True, text=True, timeout=120)


def test_it_works_without_any_package(tmp_path):
    done = command(*WORDS, "devices=2", f"output={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in plan_job.STRATEGIES) and "Choice: " in done.stdout
    assert (tmp_path / "config.json").is_file()


def test_nothing_fits(tmp_path):
    done = command("model=gpt2-xl", "devices=1", "device_memory=8", "host_memory=24", f"output={tmp_path}")
    assert done.returncode == 1 and "No strategy fits. Least is missing with" in done.stdout
    assert "With " in done.stdout and " fits (micro_batch=" in done.stdout and not list(tmp_path.iterdir())


def test_remedies_do_fit():
    here = job("model=gpt2-xl", "devices=1", "device_memory=16", "host_memory=24")
    assert not plan.rank(here)[0].fits
    found = plan.remedies(here)
    assert found and all(option.fits for _, option in found)
    for words, option in found:
        assert option.strategy in strategies(o for o in plan.rank(job(
            "model=gpt2-xl", "devices=1", "device_memory=16", "host_memory=24", *words.split())) if o.fits)


def test_one_strategy_in_full(tmp_path):
    done = command("model=tiny", "strategy=zero3", f"output={tmp_path}")
    assert done.returncode == 0 and "bucket of gradients to reduce" in done.stdout and "reduce_scatter" in done.stdout
    assert all(f"\n{moment}: " in done.stdout for moment in ("start", "forward", "backward", "step"))


def test_help_prints_the_settings_with_their_comments():
    done = command("--help")
    assert done.returncode == 0
    for key in plan.CONFIG:
        assert f'"{key}": ' in done.stdout
    assert all("# " in line for line in done.stdout.splitlines() if line.startswith('    "'))


@pytest.mark.slow
@pytest.mark.parametrize("words", [["model=tiny", "strategy=zero3"], ["layers=2", "hidden=64", "heads=4", "vocab=4096", "gated=True",
                                                                      "kv_heads=2", "strategy=zero2"]])
def test_the_launch_line_runs(tmp_path, words):
    here = job(*words, "device=cpu", "devices=2", "host_memory=8", "seq=32", "global_batch=8", f"output={tmp_path / 'plan'}")
    option = plan.best_of(here, here.settings["strategy"])
    _, line = plan.write(here, option)
    environment, rest = {}, shlex.split(line)
    while "=" in rest[0]:
        name, _, environment[name] = rest.pop(0).partition("=")
    done = cases.command([*rest, f"output={tmp_path / 'run'}", "steps=2", "eval_batches=0", "sample_tokens=0"], **environment)
    written = cases.record(done, tmp_path / "run")
    assert written["details"]["config"] == option.config
    assert written["predicted"]["optimizer_bytes"] == sum(i.nbytes for i in option.items if i.kind == "optimizer")
    assert formulas.param_count(here.shape) == written["details"]["parameters"]

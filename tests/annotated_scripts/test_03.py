"""03: SuperOffload's losses are ZeRO-Offload's, in both of its ways to step; what its rollback loses; nothing outlives a killed rank."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from yardstick import results

SCRIPT = "annotated_scripts/03_superoffload_zero3_annotated.py"
TINY = ["layers=1", "hidden=32", "seq=32"]
LAUNCHED = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}


def start(*settings, **environment):
    return subprocess.Popen([sys.executable, SCRIPT, *settings], cwd=results.ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, "DS_ACCELERATOR": "cpu", "RANKS": "2", **environment})


def modes(record):
    return record["details"]["modes"]["zero_offload"], record["details"]["modes"]["superoffload"]


@pytest.mark.slow
def test_stepped_during_backward_the_losses_are_the_same(proved):
    _, (record, _) = proved("03")
    late, early = modes(record)
    assert early["measured"]["stepped_in_backward_count"] == early["measured"]["tiles_count"] >= 3
    assert record["measured"]["compared_steps"] == 3 and record["measured"]["loss_difference_nats_max"] == 0
    assert early["losses"][:3] == late["losses"][:3] and len(set(late["losses"][:3])) == 3


@pytest.mark.slow
def test_after_an_overflow_the_rollback_has_lost_weights_that_zero_offload_keeps(proved):
    _, (record, _) = proved("03")
    late, early = modes(record)
    for mode in late, early:
        assert mode["losses"][3] is None and mode["measured"]["skipped_steps"] == 1
    assert late["measured"]["zeroed_count"] == 0
    assert early["measured"]["zeroed_count"] > 0.1 * early["measured"]["model_parameters"] / record["machine"]["ranks"]


@pytest.mark.slow
def test_the_worker_alone_takes_a_step_back_but_for_what_is_no_number(proved):
    for record in proved("03")[1]:
        assert record["measured"]["rollback_zeroed_count"] == 1
        assert 0 < record["measured"]["rollback_difference_ratio"] < 1e-6


@pytest.mark.slow
def test_clipped_the_losses_are_the_same_and_an_overflow_costs_nothing(proved):
    _, (_, record) = proved("03")
    late, early = modes(record)
    assert record["settings"]["precision"] == "bf16" and record["settings"]["gradient_clipping"] > 0
    assert early["measured"]["stepped_in_backward_count"] == 0
    assert record["measured"]["compared_steps"] == 3 and record["measured"]["loss_difference_nats_max"] == 0
    assert late["losses"] == early["losses"] and [loss is None for loss in late["losses"]] == [False, True, False, False]
    for mode in late, early:
        assert mode["measured"]["skipped_steps"] == 1 and mode["measured"]["zeroed_count"] == 0


@pytest.mark.slow
def test_a_checkpoint_of_superoffload_lacks_the_moments(proved):
    """fp32 weights alone, 4 bytes for each element of a rank's share, and not 12."""
    _, (_, record) = proved("03")
    late, early = (mode["measured"] for mode in modes(record))
    share = late["model_parameters"] / record["machine"]["ranks"]
    assert late["saved_optimizer_bytes"] == pytest.approx(12 * share, rel=0.01)
    assert early["saved_optimizer_bytes"] == pytest.approx(4 * share, rel=0.01)


@pytest.mark.slow
def test_parameters_and_speed_are_recorded(proved):
    for record in proved("03")[1]:
        assert record["measured"]["model_parameters"] == record["predicted"]["model_parameters"]
    late, early = modes(record)
    for measured in late["measured"], early["measured"]:
        assert 0 < measured["in_engine_step_seconds_median"] < measured["step_seconds_median"]
        tokens = 64 * 2 * 2 * record["machine"]["ranks"]
        assert measured["tokens_per_second"] * measured["step_seconds_median"] == pytest.approx(tokens)
        assert measured["tflops_per_second"] > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_rank_leaves_no_process(tmp_path):
    """DeepSpeed's worker waits for tiles for ever; it has to notice by itself that its rank is gone."""
    program = start("mode=superoffload", "steps=100000", *TINY, f"output={tmp_path}")
    try:
        for line in program.stderr:                                  # the bar of rank 0: training runs, so do the workers
            if "| 2" in line or "| 1" in line:
                break
        processes = psutil.Process(program.pid).children(recursive=True)
        ranks = [process for process in processes if process.ppid() == program.pid and process.children()]
        workers = [child for rank in ranks for child in rank.children() if "spawn_main" in " ".join(child.cmdline())]
        assert len(ranks) == 2 and len(workers) == 2
        ranks[1].send_signal(signal.SIGKILL)
        psutil.wait_procs(workers, timeout=30, callback=None)
        _, text = program.communicate(timeout=120)
        assert program.returncode == 128 + signal.SIGKILL and "was ended by SIGKILL" in text
        time.sleep(2)
        assert not [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    finally:
        program.kill()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_worker_ends_the_run_at_once(tmp_path):
    """DeepSpeed alone would wait for it for a minute."""
    program = start("mode=superoffload", "steps=100000", *TINY, f"output={tmp_path}")
    try:
        for line in program.stderr:
            if "| 2" in line or "| 1" in line:
                break
        worker = next(child for child in psutil.Process(program.pid).children(recursive=True) if "spawn_main" in " ".join(child.cmdline()))
        worker.send_signal(signal.SIGKILL)
        _, text = program.communicate(timeout=30)
        assert program.returncode == 1 and f"its worker process {worker.pid} ended" in text
    finally:
        program.kill()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_folder_of_a_model_trains_on_a_text(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    from yardstick import data
    config = LlamaConfig(vocab_size=data.VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                         max_position_embeddings=64, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_file=str(data.TOKENIZER)).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text((results.ROOT / SCRIPT).read_text())
    program = start("mode=zero_offload", f"model={tmp_path}/model", f"data={tmp_path}/text.txt", "steps=30", f"output={tmp_path}/run")
    _, text = program.communicate(timeout=300)
    assert program.returncode == 0, text[-3000:]
    measured = json.loads((tmp_path / "run" / "record.json").read_text())["measured"]
    assert measured["loss_nats_last"] < measured["loss_nats_first"] - 0.5 and measured["tflops_per_second"] > 0


REFUSED = [
    (["stepz=2"], {}, "Did you mean steps"),
    (["leaf=MixtralSparseMoeBlock"], {}, "leaf=MixtralSparseMoeBlock is none of the model's"),
    ([], {"RANKS": "0"}, "RANKS=0 is not a number of ranks"),
    ([], LAUNCHED, "give mode=zero_offload or mode=superoffload"),
]
REFUSED_TOO = [                                                      # each takes seconds to import what it does not use
    (["hidden=30", "heads=4"], {}, "heads=4 does not divide hidden=30"),
    (["untimed_steps=4", "steps=4"], {}, "leaves none of steps=4"),
    (["overflow_step=9", "steps=4"], {}, "overflow_step=9 is none of the steps 1 to 4"),
    (["attention=flash_attention_2"], {}, "needs a GPU and flash_attn; give attention=auto"),
    (["ratio=0.5"], {}, "be 1 without a GPU"),
    (["cores=0"], {}, "cores=0.0 must be above 0"),
    (["model=tests"], {}, "model=tests is a folder without *.safetensors"),
    (["data=nowhere.txt"], {}, "nowhere.txt"),
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("settings, environment, says", [
    *REFUSED, *(pytest.param(*case, marks=pytest.mark.slow) for case in REFUSED_TOO)])
def test_what_is_refused(settings, environment, says):
    program = start(*settings, **environment)
    out, text = program.communicate(timeout=200)
    assert program.returncode not in (0, None) and says in text and "Traceback" not in out + text
    assert text.startswith(f"{SCRIPT}: ") and len(text.strip().splitlines()) == 1

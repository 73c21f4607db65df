"""Why data parallelism in bf16 is not the others: DeepSpeed's wrapper takes one step of Adam before the first batch."""

import pytest

from tests.strategies import cases


def counters(changes):
    """Ranks that return Adam's step counter as it stands before the first update, None where Adam has no state yet."""
    plan = cases.plan(**changes)

    def rank():
        from real_model_example import train
        seen = []

        def look(engine, step):
            inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
            states = [state["step"] for state in inner.state.values()]
            seen.append(float(states[0]) if states else None)
        train(plan, look, finish=False)
        return seen
    return rank


@pytest.mark.parametrize("strategy,precision,before", [("dp", "bf16", 1.0), ("dp", "fp32", None), ("zero2", "bf16", None)])
def test_steps_of_adam_before_the_first_update(launch, models, strategy, precision, before):
    changes = {"model": models["small"], "strategy": strategy, "precision": precision, "steps": 2, "seq": 16, "count": False,
               "micro_batch": 1}
    for first, second in launch(counters, changes).good():
        assert first == before
        assert second == (before or 0.0) + 1.0

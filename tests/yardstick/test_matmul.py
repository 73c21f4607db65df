"""The library of fp32 products is chosen once, alike on all ranks, and computes in fp32."""

from pathlib import Path

from yardstick import matmul, op_cache, ranks


def chosen(folder):
    def rank():
        import torch
        op_cache.do_without("deepspeed_shm_comm")
        joined = ranks.join(gpu=False, seconds=60)
        probed = matmul._probed
        matmul._probed = lambda: probed(Path(folder))
        first, again = matmul.choose(joined), matmul.choose(joined)
        a = torch.randn(512, 512, generator=torch.Generator().manual_seed(1))
        error = ((a @ a).double() - a.double() @ a.double()).abs().max().item()
        return first, again, torch.get_float32_matmul_precision(), error
    return rank


def test_the_path_of_matrix_products_is_chosen_once_for_all_ranks(launch, tmp_path):
    results = launch(chosen, tmp_path).good()
    (word, again, setting, _), = {result[:3] + (None,) for result in results}
    assert word == again == setting and word in ("highest", "medium")
    assert [file.read_text() for file in tmp_path.iterdir() if file.is_file()] == [word]
    assert max(error for *_, error in results) < 1e-3           # sums of 512 products of about 1; in bf16 1e-1
    other = {"highest": "medium", "medium": "highest"}[word]
    for file in tmp_path.iterdir():
        if file.is_file():
            file.write_text(other)
    assert {result[0] for result in launch(chosen, tmp_path).good()} == {other}      # kept: not probed again

"""What travels between ranks and teachers."""

import torch

from raydistill.methods.method import Query
from raydistill.models.denoiser import Cond
from raydistill.runtime.wire import pack_query, unpack_query


def test_noise_levels_and_class_labels_stay_exact_where_samples_travel_in_bf16() -> None:
    cond = Cond({"label": torch.tensor([257.0, 999.0]), "text": torch.full((2, 3, 4), 1 / 3)})
    query = Query(
        network="teacher",
        want="x0",
        x_t=torch.full((2, 1, 2, 2), 1 / 3),
        t=torch.tensor([0.123456, 79.9]),
        cond=cond,
    )
    found = unpack_query(pack_query(query, "bf16"), "cpu", differentiable=False)
    assert torch.equal(found.cond.tensors["label"], cond.tensors["label"])
    assert torch.equal(found.t, query.t)
    for rounded, exact in ((found.x_t, query.x_t), (found.cond.tensors["text"], cond.tensors["text"])):
        assert torch.equal(rounded, exact.bfloat16().float())

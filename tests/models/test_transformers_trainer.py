"""transformers' own `Trainer` trains, evaluates, predicts with, saves and loads an SAE."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoModel, EarlyStoppingCallback, Trainer, TrainingArguments

from .reference import D, dense_forward, make_sae


class States(Dataset):
    """Hidden states, each under the name of the forward's argument."""

    def __init__(self, rows: torch.Tensor):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {"hidden_states": self.rows[number]}


def trainer(sae, folder, rows, callbacks=(), **fields) -> Trainer:
    arguments = {"learning_rate": 0.02, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 25}
    arguments |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 4, "max_steps": 16}
    arguments |= {"eval_strategy": "steps", "eval_steps": 8, "save_steps": 8, "load_best_model_at_end": True}
    return Trainer(
        sae,
        TrainingArguments(str(folder), **arguments | fields),
        train_dataset=States(rows),
        eval_dataset=States(rows[:60]),
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("variant", ["relu", "gated", "matryoshka-batch_topk"])
def test_trainer_evaluates_keeps_the_best_and_predicts(tmp_path, variant):
    sae, rows = make_sae(variant, torch.float32), torch.randn(200, D)
    loop = trainer(sae, tmp_path, rows)
    first = loop.evaluate()["eval_loss"]
    loop.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in loop.state.log_history if "eval_loss" in entry}
    assert losses.keys() == {8, 16} and losses[16] < first
    best = min(losses, key=losses.get)
    assert loop.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    # Independently: the dense float64 reference on the weights that were loaded back.
    exact = make_sae(variant)
    exact.load_state_dict(sae.state_dict())
    _, prefixes, _ = dense_forward(exact, rows[:60].double())
    predicted = loop.predict(States(rows[:60]))
    torch.testing.assert_close(torch.from_numpy(predicted.predictions), prefixes[-1].float(), rtol=1e-3, atol=1e-4)
    assert predicted.metrics["test_loss"] == pytest.approx(losses[best], rel=1e-5)
    loop.save_model(tmp_path / "saved")
    loaded = AutoModel.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(tensor, sae.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_the_losses_of_batches_are_averaged_over_tokens(tmp_path):
    sae, rows = make_sae("matryoshka-topk", torch.float32), torch.randn(60, D)
    exact = make_sae("matryoshka-topk")
    exact.load_state_dict(sae.state_dict())
    expected = dense_forward(exact, rows.double())[2].item()
    loop = trainer(sae, tmp_path, rows, per_device_eval_batch_size=20)
    assert loop.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_training_stops_early_where_the_loss_no_longer_falls(tmp_path):
    sae, rows = make_sae("relu", torch.float32), torch.randn(64, D)
    loop = trainer(
        sae, tmp_path, rows, [EarlyStoppingCallback(1)], learning_rate=0.0, metric_for_best_model="eval_loss"
    )
    loop.train()
    assert loop.state.global_step == 16  # the second evaluation is no better than the first


def test_a_forward_without_loss_has_the_same_reconstruction():
    sae, x = make_sae("matryoshka-topk"), torch.randn(5, D, dtype=torch.float64)
    whole, without = sae(x, width=7), sae(x, width=7, return_loss=False)
    assert without.loss is without.losses is None
    torch.testing.assert_close(without.reconstruction, whole.reconstruction, rtol=0, atol=1e-14)  # x less the residual
    with torch.no_grad():  # prefix by prefix, or in one sum: which order rounds how is the machine's
        torch.testing.assert_close(without.reconstruction, sae(x, width=7).reconstruction, rtol=0, atol=1e-14)
    assert torch.equal(without.latents.to_dense(), whole.latents.to_dense())

"""What the settings beside the method do in a whole run: who trains, what is kept, what is combined, when it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsplit.core.config import NOT_GIVEN
from fedsplit.core.errors import ConfigError
from fedsplit.core.records import Summary
from fedsplit.federation.server.run import Run
from fedsplit.model import module
from fedsplit.model.split import whole_model
from fedsplit.site.state import SiteState
from fedsplit.training import data
from fedsplit.training.closed_form import collect, ridge, scaled_alpha
from fedsplit.training.site_settings import SiteSettings
from tests.federation.conftest import prepared, settings, simulated
from tests.kept import open_site

Module = dict[str, np.ndarray]
SMALL: dict[str, Any] = {"max_samples": 120, "rounds": 2, "cut": "1,5"}


def trained(tmp: Path, sites: int = 2, **flat: Any) -> tuple[Summary, Module, Run]:
    config = settings(tmp, **(SMALL | flat))
    with prepared(config, simulated(sites)) as (run, _):
        summary = run.go()
    assert run._strategy is not None
    return summary, run._strategy.module, run


def close(a: Module, b: Module, tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=tolerance, rtol=0, err_msg=name)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_at_the_encoder_equals_training_on_the_device(
    tmp_path: Path, optimizer: str
) -> None:
    """Placement never changes the function: hosted blocks learn what the device would have."""
    rate = 0.002 if optimizer == "adamw" else 0.2
    same = {"optimizer": optimizer, "learning_rate": rate, "lora_learning_rate": rate}
    _, split, _ = trained(
        tmp_path / "a", cut="1,5", encoder_training="hosted", device_training="head+tail", **same
    )
    _, whole, _ = trained(tmp_path / "b", cut="6,6", **same)
    # Block 3 is the encoder's, and it learnt.
    assert all(np.abs(whole[n]).max() > 1e-4 for n in whole if "layers.3" in n and "lora_B" in n)
    # Adam divides by the gradient's size, so that a last bit of a tiny gradient can show.
    close(split, whole, 1e-5 if optimizer == "sgd" else 2e-3)


@pytest.mark.parametrize("partition", ["iid", "dirichlet:0.3", "pathological:3"])
def test_a_closed_form_classifier_is_the_centralised_one(tmp_path: Path, partition: str) -> None:
    _, tensors, run = trained(
        tmp_path, sites=3, method="closed-form", rounds=0, partition=partition, max_samples=300, calibrate=False
    )  # fmt: skip
    backbone, classes = run.backbone, tuple("0123456789")
    sites = [SiteSettings.from_node(node, node_id=1) for node in simulated(3)]
    own = [open_site(run.config, site, backbone, classes) for site in sites]
    everyone = np.concatenate([site.train for site in own])
    spec = module.ModuleSpec.of(run.config.module, classes)
    model = whole_model(backbone, spec, module.initial(backbone, spec, seed=0))
    batches = data.batches(own[0].examples, everyone, own[0].transform, batch_size=64)
    total = collect(model, batches)
    central = ridge(total, scaled_alpha(total, run.config.module.ridge_lambda))
    np.testing.assert_allclose(tensors["classifier.weight"], central.weight, atol=1e-3)
    np.testing.assert_allclose(tensors["classifier.bias"], central.bias, atol=1e-3)


def test_a_ridge_start_is_better_than_no_start_and_calibrated(tmp_path: Path) -> None:
    from_zero, _, _ = trained(tmp_path / "a", module="classifier", rounds=1, learning_rate=1e-4)
    ridge, _, _ = trained(
        tmp_path / "b", module="classifier", rounds=1, learning_rate=1e-4, classifier_init="ridge"
    )
    assert ridge.accuracy_global_start > from_zero.accuracy_global_start + 0.3


def test_who_trains_alone_starts_from_its_own_sums(tmp_path: Path) -> None:
    """From everybody's sums it would not be alone: sites of two classes each would know all."""
    same = {"partition": "pathological:2", "sites": 5, "max_samples": 300, "learning_rate": 1e-6}
    same |= {"lora_learning_rate": 1e-6, "rounds": 1, "compare_local_only": True}
    summary, _, _ = trained(tmp_path, classifier_init="ridge", **same)
    assert summary.accuracy_global_start > 0.6
    assert summary.accuracy_local_only < 0.35
    # Not from nothing either: at home its own sums tell its two classes apart.
    own = [site.accuracy_local_only_personal for site in summary.sites]
    assert sum(own) / len(own) > 0.8


def test_a_fixed_classifier_stays_and_lora_moves(tmp_path: Path) -> None:
    _, before, _ = trained(tmp_path / "a", method="closed-form", rounds=0)
    _, after, _run = trained(
        tmp_path / "b", classifier_init="ridge", classifier_training="fixed", cut="0,4"
    )
    np.testing.assert_array_equal(before["classifier.weight"], after["classifier.weight"])
    tail_b = [n for n in after if "layers.5" in n and "lora_B" in n]
    assert tail_b
    assert all(np.abs(after[n]).max() > 0 for n in tail_b)


def test_a_share_of_the_sites_trains_each_round_and_all_are_tested(tmp_path: Path) -> None:
    summary, _, run = trained(tmp_path, sites=4, participation=0.5, rounds=3, max_samples=160)
    by_round = [{m.site for m in run.ledger.metrics if m.round == r} for r in range(1, 5)]
    assert [len(sites) for sites in by_round] == [2, 2, 2, 4]
    assert len(set.union(*by_round[:3])) > 2
    assert summary.outcome == "complete"


def test_between_two_averages_nothing_is_sent_and_nothing_is_lost(tmp_path: Path) -> None:
    """Two rounds averaged once, by SGD at a constant rate, are one round of two epochs."""
    same = {"optimizer": "sgd", "lr_schedule": "constant", "batch_size": 256, "learning_rate": 0.05}
    _, apart, run = trained(tmp_path / "a", rounds=2, sync_every=2, **same)
    _, once, _ = trained(tmp_path / "b", rounds=1, local_epochs=2, **same)
    close(apart, once, 1e-6)
    sent = {m.round: m.bytes_module_up for m in run.ledger.metrics if m.loss is not None}
    assert sent[1] == 0 < sent[2]


def test_a_site_local_classifier_never_leaves_its_site(tmp_path: Path) -> None:
    summary, after, run = trained(
        tmp_path, site_local="classifier", rounds=3, cut="0,5", partition="pathological:2", sites=2
    )
    assert np.abs(after["classifier.weight"]).max() == 0
    assert summary.accuracy_personal > summary.accuracy_global + 0.2
    assert run.ledger.config.train.site_local == "classifier"


@pytest.mark.parametrize("method", ["ditto", "fed-rod"])
def test_personal_models_go_on_from_round_to_round(tmp_path: Path, method: str) -> None:
    summary, _, run = trained(
        tmp_path, method=method, rounds=3, partition="pathological:2", sites=3, max_samples=240
    )
    kept = sorted((run.dir.path / "sites").glob("*.safetensors"))
    assert len(kept) == 3
    assert summary.accuracy_personal >= summary.accuracy_global


@pytest.mark.parametrize("encoder", ["frozen", "hosted"])
def test_beside_a_fixed_classifier_a_personal_one_costs_the_common_model_nothing(
    tmp_path: Path, encoder: str
) -> None:
    """Fed-RoD's balanced softmax guards a generic classifier that learns; a fixed one needs no guard."""
    same = {"classifier_init": "ridge", "classifier_training": "fixed", "encoder_training": encoder}
    same |= {"cut": "0,4", "partition": "pathological:2"}
    alone, common, _ = trained(tmp_path / "a", method="fedv", **same)
    beside, generic, _ = trained(tmp_path / "b", method="fed-rod", **same)
    close(common, generic, 0)
    assert any(np.abs(generic[n]).max() > 0 for n in generic if "lora_B" in n)
    assert beside.accuracy_personal >= alone.accuracy_personal


def test_momentum_at_the_server_survives_a_resume(tmp_path: Path) -> None:
    same = {"server_optimizer": "momentum", "server_learning_rate": 0.5, "rounds": 3}
    _, straight, _ = trained(tmp_path / "a", **same)
    from fedsplit.core.errors import FederationError
    from fedsplit.federation.server.run import settle

    runs = tmp_path / "b"
    config = settings(runs, **(SMALL | same))
    object.__setattr__(config.server, "deadline_s", 1.0)
    away = prepared(config, simulated(2), silent=lambda _, m: m.metadata.group_id == "3")
    with away as (run, _), pytest.raises(FederationError):
        run.go()
    again = settle(settings(runs, run_name="", resume="run"))
    with prepared(again, simulated(2)) as (run, _):
        run.go()
    close(straight, run._strategy.module, 0)


def test_a_robust_rule_stands_a_hostile_site(tmp_path: Path) -> None:
    from fedsplit.core.orders import DELTA
    from fedsplit.federation import messages

    def tamper(node: int, message: Any, reply: Any) -> Any:
        if node == 2 and DELTA in reply.content.array_records:
            record = reply.content.array_records[DELTA]
            delta = {name: array.numpy() for name, array in record.items()}
            wild = {n: np.full_like(d, 50.0) for n, d in delta.items()}
            reply.content[DELTA] = messages.to_arrays(wild)
        return reply

    reached = {}
    for rule in ("mean", "median"):
        config = settings(
            tmp_path / rule,
            **(SMALL | {"robust_rule": rule, "byzantine_sites": 1, "max_samples": 300}),
            # Without the bound on updates, which refuses this one before a rule sees it.
            max_update_ratio=0,
        )
        with prepared(config, simulated(4), tamper=tamper) as (run, _):
            reached[rule] = run.go().accuracy_global
    assert reached["median"] > reached["mean"] + 0.2


def test_too_few_sites_for_a_robust_rule_are_told_before_the_first_round(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs 5 sites"):
        trained(tmp_path, robust_rule="krum", byzantine_sites=1)


def test_a_run_that_learns_no_more_ends_early_with_its_best_module(tmp_path: Path) -> None:
    summary, _, _run = trained(
        tmp_path, rounds=30, early_stop_rounds=1, learning_rate=1e-9, lora_learning_rate=1e-9,
        classifier_init="ridge",
    )  # fmt: skip
    assert summary.rounds_done == 2
    assert summary.accuracy_global == summary.accuracy_by_round[0]


@pytest.mark.parametrize("rule", ["ffa", "rolora", "flexlora", "flora", "lora-fair", "hetlora"])
def test_every_lora_rule_trains_with_mixed_ranks_and_cuts(tmp_path: Path, rule: str) -> None:
    summary, tensors, run = trained(
        tmp_path, sites=3, lora_aggregation=rule, lora_ranks="2;4;8", cut="0,4;6,6", max_samples=180
    )
    assert summary.outcome == "complete", summary.reason
    assert summary.accuracy_global > 0.5
    assert any(n.endswith("lora_merged.weight") for n in tensors) == (rule == "flora")
    assert (run.dir.path / "module" / "adapter_model.safetensors").is_file()


def test_kept_activations_save_traffic_and_change_nothing(tmp_path: Path) -> None:
    same = {"cut": "0,5", "local_epochs": 2, "rounds": 2}
    plain, a, _ = trained(tmp_path / "a", **same)
    kept, b, _ = trained(tmp_path / "b", cache_activations=True, run_name="kept", **same)
    close(a, b, 1e-5)
    assert kept.bytes_activation < 0.3 * plain.bytes_activation
    assert kept.flops_device < plain.flops_device


def test_zeroth_order_at_the_device_sends_scalars_and_is_replayed_exactly(tmp_path: Path) -> None:
    summary, tensors, run = trained(
        tmp_path, method="fedvz-device", cut="0,5", zo_queries=2, lora_learning_rate=1e-3, learning_rate=1e-3,
        rounds=1,
    )  # fmt: skip
    up = [m.bytes_module_up for m in run.ledger.metrics if m.loss is not None]
    # Two scalars a step, and a header: two steps of 48 samples.
    assert max(up) < 400
    assert np.abs(tensors["classifier.weight"]).max() > 0
    assert summary.outcome == "complete"


def test_a_late_site_catches_up_by_replay_and_a_round_is_kilobytes(tmp_path: Path) -> None:
    """Zeroth order at the device: after the first round no module travels, and a missed round is replayed."""
    same = {
        "method": "fedvz-device", "cut": "0,5", "rounds": 4, "learning_rate": 1e-3, "lora_learning_rate": 1e-3,
        "min_sites": 1,
    }  # fmt: skip

    grids: list[Any] = []

    def away(place: int, message: Any) -> bool:
        """Not connected in round 2, and back in round 3."""
        grids[-1].nodes[102] = simulated(2)[1]
        return place == 2 and message.metadata.group_id == "2"

    config = settings(tmp_path, **(SMALL | same))
    with prepared(config, simulated(2), leaves=away) as (run, net):
        grids.append(net)
        summary = run.go()
    assert {s.name: s.rounds_missed for s in summary.sites} == {"site-0": 0, "site-1": 1}
    rows = {(m.round, m.site): m for m in run.ledger.metrics}
    module_bytes = rows[1, "site-1"].bytes_module_down
    # Two rounds of history for the one that was away, none of a module.
    assert rows[3, "site-1"].bytes_module_down < 2_000 < module_bytes / 5
    assert rows[4, "site-0"].bytes_module_down < 2_000
    assert summary.accuracy_global is not None

    # The same run where every site is sent the whole module each time: bit-equal.
    from fedsplit.federation.server.books.replay_log import ReplayLog

    whole = settings(tmp_path, **(SMALL | same | {"run_name": "whole"}))
    with (
        pytest.MonkeyPatch.context() as patch,
        prepared(whole, simulated(2), leaves=away) as (other, net),
    ):
        grids.append(net)
        patch.setattr(ReplayLog, "since", lambda *_: None)
        other.go()
    close(run._strategy.module, other._strategy.module, 0)


def test_a_site_that_lost_its_state_is_sent_the_module_again(tmp_path: Path) -> None:
    config = settings(
        tmp_path, **SMALL | {"method": "fedvz-device", "cut": "0,5", "rounds": 4, "min_sites": 1}
    )

    def forget(node: int, message: Any, reply: Any) -> Any:
        if node == 2 and message.metadata.group_id == "1":
            state = SiteState(tmp_path / "run" / "sites", run="run", site="site-1")
            state._path.write_bytes(b"damaged")
        return reply

    with prepared(config, simulated(2), tamper=forget) as (run, _):
        summary = run.go()
    assert {s.name: s.rounds_missed for s in summary.sites} == {"site-0": 0, "site-1": 1}
    assert summary.rounds_done == 4
    assert any("sent from now on" in out.reason for out in summary.left_out)


def test_the_same_seed_gives_the_same_bits_again(tmp_path: Path) -> None:
    same = {
        "cut": "0,5;6,6",
        "classifier_init": "ridge",
        "augmentation": "crop+flip",
        "clip_norm": 1.0,
    }
    same |= {"label_smoothing": 0.1, "warmup_rounds": 1, "accumulate": 2, "weight_decay": 0.01}
    _, first, _ = trained(tmp_path / "a", **same)
    _, second, _ = trained(tmp_path / "b", **same)
    _, other, _ = trained(tmp_path / "c", **same, seed=1)
    close(first, second, 0)
    assert any((first[n] != other[n]).any() for n in first)


@pytest.mark.parametrize("method", ["fedv", "fedvz"])
def test_the_encoder_alone_may_train(tmp_path: Path, method: str) -> None:
    """A fixed classifier and a cut that ends at the last block leave the device nothing to train."""
    fixed = {"classifier_init": "ridge", "classifier_training": "fixed", "optimizer": "sgd"}
    hosted = {"encoder_training": "hosted"} if method == "fedv" else {}
    summary, split, run = trained(
        tmp_path / "a", cut="0,6", method=method, lora_learning_rate=0.1, **hosted, **fixed
    )
    assert summary.outcome == "complete"
    assert not [m for m in run.ledger.metrics if m.round and m.bytes_module_up]
    assert all(np.abs(split[n]).max() > 1e-6 for n in split if "layers.3" in n and "lora_B" in n)
    if method == "fedv":
        _, whole, _ = trained(tmp_path / "b", cut="6,6", lora_learning_rate=0.1, **fixed)
        close(split, whole, 1e-5)


def test_a_recipe_is_settled_at_roll_call_and_kept(tmp_path: Path) -> None:
    from fedsplit.federation.server.run import settle
    from tests.federation.conftest import prepared, settings

    flat = {
        "recipe": "shared",
        "cut": NOT_GIVEN,  # in place of the cut of `settings`
        "rounds": 2,
        "max_samples": 60,
        "classifier_init": "ridge",
    }
    with prepared(settings(tmp_path, **flat), simulated(3)) as (run, _):
        summary = run.go()
    saved = run.dir.read_config()["config"]
    assert summary.outcome == "complete"
    assert [site.cut for site in summary.sites] == ["0,6"] * 3
    assert saved["recipe"] == "shared"
    assert saved["lora-learning-rate"] == 0.0045
    assert (saved["rounds"], summary.rounds) == (2, 2)
    # As it was settled it goes on, whoever answers then.
    again = settle(settings(tmp_path, run_name="", resume="run"))
    assert again.train.lora_learning_rate == 0.0045
    assert again.placement.cut == "0,6"

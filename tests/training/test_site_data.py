"""What a site says of itself, and which samples it trains and tests on: always the same ones."""

from __future__ import annotations

import csv
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsplit.core.bounded import Bounded
from fedsplit.core.config import RunConfig
from fedsplit.core.cut import Cut
from fedsplit.core.errors import ConfigError, DataError
from fedsplit.model.backbone import Backbone
from fedsplit.training.site_data import SiteData, SiteSources
from fedsplit.training.site_settings import NODE_KEYS, SiteSettings
from tests.kept import KEPT, open_site

SITES = 3


@pytest.fixture(autouse=True)
def forget() -> None:
    """Every test reads its data anew."""
    KEPT.sources.forget()


def settings(**node: Any) -> SiteSettings:
    given = {key.replace("_", "-"): value for key, value in node.items()}
    return SiteSettings.from_node(given, node_id=77)


def dealt(number: int, of: int = SITES) -> SiteSettings:
    return settings(partition_id=number, num_partitions=of)


def config(**other: Any) -> RunConfig:
    flat = {"max-samples": 120, "partition": "iid"}
    return RunConfig.from_flat(flat | {k.replace("_", "-"): v for k, v in other.items()})


def keys(own: SiteData, indices: np.ndarray) -> set[int]:
    return {int(k) for k in own.examples.keys[indices]}


@pytest.fixture
def orders(tmp_path: Path) -> Path:
    path = tmp_path / "orders.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        rows.writerows([f"pump {i}", "leak" if i % 2 else "tear"] for i in range(10))
    return path


# What a site says of itself.


def test_a_bare_node_is_called_by_its_number() -> None:
    assert settings() == SiteSettings(
        name="node-77", data=None, cut=None, partition=None, encoder_tls_ca="", threads=0
    )


def test_a_simulated_node() -> None:
    site = dealt(2)
    assert (site.name, site.partition) == ("site-2", (2, 3))


def test_everything_a_site_may_say() -> None:
    site = settings(
        site="press-3",
        data="folder:/parts",
        cut="1,5",
        encoder_tls_ca="ca.pem",
        threads=2,
        lora_rank=4,
    )
    assert site == SiteSettings(
        name="press-3",
        data="folder:/parts",
        cut=Cut(1, 5),
        partition=None,
        encoder_tls_ca="ca.pem",
        threads=2,
        lora_rank=4,
    )


def test_all_faults_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        SiteSettings.from_node(
            {"sites": "x", "threads": -1, "partition-id": 3, "num-partitions": 3, "cut": "5,1"},
            node_id=1,
        )
    text = str(caught.value)
    assert "unknown node-config key 'sites'; known: " in text
    assert all(key in text for key in NODE_KEYS)
    assert "threads=-1 is not a number of threads" in text
    assert "partition-id=3 is not in 0..2" in text
    assert "cut 5,1 is not a cut" in text
    assert len(text.splitlines()) == 5


@pytest.mark.parametrize("bad", [-1, "two", 1.5])
def test_threads_are_a_number(bad: object) -> None:
    with pytest.raises(ConfigError, match="threads="):
        settings(threads=bad)


@pytest.mark.parametrize("bad", [-1, "8", 1025])
def test_a_rank_is_a_number_that_a_run_may_have(bad: object) -> None:
    with pytest.raises(ConfigError, match=r"lora-rank=.* is not a rank in 0\.\.1024"):
        settings(lora_rank=bad)


@pytest.mark.parametrize(
    "node",
    [
        {"partition-id": 0},
        {"num-partitions": 2},
        {"partition-id": "0", "num-partitions": "2"},
        {"partition-id": 0.0, "num-partitions": 2},
    ],
)
def test_half_a_share_is_not_taken_for_all_the_data(node: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"partition-id and num-partitions are whole numbers"):
        SiteSettings.from_node(node, node_id=1)


@pytest.mark.parametrize("number", [-1, 2, 99])
def test_a_share_lies_within_the_number_of_sites(number: int) -> None:
    with pytest.raises(ConfigError, match=rf"partition-id={number} is not in 0\.\.1"):
        dealt(number, 2)


@pytest.mark.parametrize("name", ["", "x" * 129, "a\nb"])
def test_a_name_that_the_encoder_or_the_log_would_not_take(name: str) -> None:
    with pytest.raises(ConfigError, match="site="):
        settings(site=name)


def test_a_name_may_be_any_other_text() -> None:
    assert settings(site="Presse 3 (Süd)").name == "Presse 3 (Süd)"
    assert settings(site=7).name == "7"


# Which samples it has.


def test_the_shares_are_disjoint_and_together_all(vit: Backbone) -> None:
    owned = [open_site(config(), dealt(i), vit, None) for i in range(SITES)]
    train = [keys(own, own.train) for own in owned]
    test = [keys(own, own.test) for own in owned]
    everything = set(map(int, owned[0].examples.keys))
    assert len(everything) == 120
    assert sum(map(len, train + test)) == 120
    assert set().union(*train, *test) == everything


def test_everywhere_is_all_sites_test_samples(vit: Backbone) -> None:
    owned = [open_site(config(), dealt(i), vit, None) for i in range(SITES)]
    union = set().union(*(keys(own, own.test) for own in owned))
    for own in owned:
        assert keys(own, own.test_everywhere) == union
        assert len(own.test_everywhere) == len(union)
        assert list(own.test_everywhere) == sorted(own.test_everywhere)
        assert not union & keys(own, own.train)


def test_a_site_with_data_of_its_own_is_not_dealt_a_share(
    orders: Path, tiny: dict[str, Path]
) -> None:
    site = settings(partition_id=0, num_partitions=SITES, data=f"csv:{orders}")
    own = open_text(site, tiny)
    assert len(own.train) + len(own.test) == 10
    assert np.array_equal(own.test_everywhere, own.test)


def test_without_a_share_the_runs_data_are_the_sites(vit: Backbone) -> None:
    own = open_site(config(), settings(site="press-3"), vit, None)
    assert len(own.train) + len(own.test) == 120
    assert len(own.test) == 24


def test_the_same_samples_in_every_round_and_process(vit: Backbone) -> None:
    first = open_site(config(), dealt(1), vit, None)
    assert open_site(config(), dealt(1), vit, None) is first
    KEPT.sources.forget()
    again = open_site(config(), dealt(1), vit, None)
    assert again is not first
    for name in ("train", "test", "test_everywhere"):
        assert np.array_equal(getattr(again, name), getattr(first, name))


def test_the_same_samples_whatever_else_the_run_sets(vit: Backbone) -> None:
    first = open_site(config(), dealt(1), vit, None)
    other = config(rounds=9, cut="0,4", learning_rate=0.1, batch_size=7, codec="fp16")
    again = open_site(other, dealt(1), vit, None)
    assert keys(again, again.train) == keys(first, first.train)


def test_real_samples_keep_their_sides_whatever_seed_and_name(vit: Backbone) -> None:
    splits = [
        keys(own, own.test)
        for own in (
            open_site(config(seed=seed), settings(site=name, data="digits"), vit, None)
            for seed, name in [(0, "a"), (1, "a"), (0, "b")]
        )
    ]
    assert splits[0] == splits[1] == splits[2]


def test_in_simulation_each_seed_splits_otherwise(vit: Backbone) -> None:
    """As real sites do by seed 0."""
    alone = [
        keys(own, own.test)
        for own in (open_site(config(seed=s), dealt(0, 1), vit, None) for s in (0, 1))
    ]
    own = open_site(config(), settings(data="digits"), vit, None)
    assert alone[0] == keys(own, own.test)
    assert 0 < len(alone[0] & alone[1]) < len(alone[0]) / 2


def test_what_was_opened_is_kept(vit: Backbone) -> None:
    owned = [
        open_site(config(), settings(site="a", data=data), vit, None) for data in ("digits",) * 2
    ]
    assert owned[0] is owned[1]
    shares = [open_site(config(), dealt(i), vit, None) for i in range(2)]
    assert shares[0].transform is shares[1].transform


def centralised() -> RunConfig:
    """The same settings, whether or not the run's own door knows the method by now."""
    return config().changed(method="centralised")


def test_a_centralised_node_has_what_all_sites_have(vit: Backbone) -> None:
    owned = [open_site(config(), dealt(i), vit, None) for i in range(SITES)]
    one = open_site(centralised(), dealt(0), vit, None)
    assert keys(one, one.train) == set().union(*(keys(own, own.train) for own in owned))
    assert len(one.train) == sum(len(own.train) for own in owned)
    assert np.array_equal(one.test, owned[0].test_everywhere)
    assert np.array_equal(one.test_everywhere, owned[0].test_everywhere)


def test_a_centralised_node_with_data_of_its_own(orders: Path, tiny: dict[str, Path]) -> None:
    own = open_text(settings(data=f"csv:{orders}"), tiny, run=centralised())
    assert len(own.train) + len(own.test) == 10


@pytest.fixture
def boards(tmp_path: Path) -> Path:
    """120 crops of 40 boards, two classes."""
    rng = np.random.default_rng(0)
    path = tmp_path / "boards.npz"
    x = rng.integers(0, 256, (120, 4, 4), dtype=np.uint8)
    np.savez(path, x=x, y=rng.integers(0, 2, 120), groups=np.repeat(np.arange(40), 3))
    return path


@pytest.mark.parametrize("deal", ["iid", "dirichlet:0.5", "pathological:1", "quantity:1"])
def test_a_board_is_at_one_site_and_on_one_side(deal: str, boards: Path, vit: Backbone) -> None:
    run = config(data=f"npz:{boards}", partition=deal, max_samples=0)
    owned = [open_site(run, dealt(i), vit, None) for i in range(SITES)]
    groups = owned[0].examples.groups
    assert groups is not None
    sides = [set(groups[side].tolist()) for own in owned for side in (own.train, own.test)]
    assert min(map(len, sides)) >= 1
    assert sum(map(len, sides)) == len(set().union(*sides))


def test_a_site_of_its_own_splits_by_board_too(boards: Path, vit: Backbone) -> None:
    own = open_site(config(max_samples=0), settings(data=f"npz:{boards}"), vit, None)
    assert own.examples.groups is not None
    train, test = (set(own.examples.groups[side].tolist()) for side in (own.train, own.test))
    assert not train & test
    assert len(own.test) == pytest.approx(24, abs=3)


def test_a_thousand_sites_cost_one_deal(vit: Backbone, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "many.npz"
    pixels = rng.integers(0, 256, (18_000, 4, 4), dtype=np.uint8)
    np.savez(path, x=pixels, y=rng.integers(0, 10, 18_000))
    import flwr_datasets.partitioner  # noqa: F401  # seconds, once a process, whatever is dealt

    run = config(data=f"npz:{path}", partition="pathological:2", max_samples=0)
    started = time.process_time()
    for _ in range(2):
        owned = [open_site(run, dealt(i, 1000), vit, None) for i in range(1000)]
    # A deal for each site takes minutes.
    assert time.process_time() - started < 20
    assert KEPT.sources.dealt.misses == 1
    assert KEPT.sources.loaded.misses == 1
    assert len({id(own.transform) for own in owned}) == 1
    assert len({id(own.test_everywhere) for own in owned}) == 1
    assert len({id(own.examples.items) for own in owned}) == 1
    assert {own.examples.site for own in owned} == {f"site-{i}" for i in range(1000)}


def test_sites_that_open_at_once_load_once(vit: Backbone) -> None:
    with ThreadPoolExecutor(8) as pool:
        owned = list(pool.map(lambda i: open_site(config(), dealt(i, 8), vit, None), range(8)))
    assert len({id(own.examples.items) for own in owned}) == 1


def test_runs_that_differ_elsewhere_share_what_was_loaded(vit: Backbone) -> None:
    first = open_site(config(), dealt(0), vit, None)
    again = open_site(config(learning_rate=0.1, rounds=9), dealt(0), vit, None)
    assert again.examples.items is first.examples.items
    assert again.transform is first.transform
    assert open_site(config(image_size=32), dealt(0), vit, None).transform is not first.transform


def test_what_is_kept_is_bounded(vit: Backbone) -> None:
    for seed in range(40):
        open_site(config(seed=seed, image_size=16 + seed % 3 * 4), dealt(0), vit, None)
    bounds: list[tuple[Bounded[Any], int]] = [
        (KEPT.sources.opened, 32),
        (KEPT.sources.loaded, 4),
        (KEPT.sources.dealt, 4),
        (KEPT.sources.transforms, 2),
    ]
    for cached, most in bounds:
        assert len(cached) <= most


def test_a_test_fraction_is_kept(vit: Backbone) -> None:
    own = open_site(config(test_fraction=0.5), settings(site="a"), vit, None)
    assert (len(own.train), len(own.test)) == (60, 60)


# What cannot be used.


def open_text(
    site: SiteSettings,
    tiny: dict[str, Path],
    classes: tuple[str, ...] | None = None,
    run: RunConfig | None = None,
) -> SiteData:
    """Open a text source without a tokenizer, which the tiny backbones do not have."""
    bert = Backbone.find(str(tiny["bert"]))
    sources = SiteSources()
    sources.transforms = lambda *_: None  # type: ignore[assignment]
    return sources.open(run or config(), site, bert, classes)


def test_texts_for_an_image_backbone(orders: Path, vit: Backbone) -> None:
    site = settings(site="press-3", data=f"csv:{orders}")
    pattern = r"site 'press-3': csv:.*orders\.csv holds texts, backbone .* reads images; change"
    with pytest.raises(DataError, match=pattern):
        open_site(config(), site, vit, None)


def test_images_for_a_text_backbone(tiny: dict[str, Path]) -> None:
    bert = Backbone.find(str(tiny["bert"]))
    with pytest.raises(DataError, match=r"site 'site-0': digits holds images, .* reads texts"):
        open_site(config(), dealt(0), bert, None)


def test_labels_that_the_task_does_not_declare(orders: Path, vit: Backbone) -> None:
    site = settings(site="press-3", data=f"csv:{orders}")
    with pytest.raises(DataError, match=r"'press-3'.*orders\.csv.*'tear'"):
        open_site(config(), site, vit, ("leak", "dent"))


def test_declared_classes_number_the_labels(orders: Path, tiny: dict[str, Path]) -> None:
    classes = ("tear", "dent", "leak")
    own = open_text(settings(data=f"csv:{orders}"), tiny, classes)
    assert own.examples.classes == classes
    assert set(own.examples.labels.tolist()) == {0, 2}
    assert open_text(settings(data=f"csv:{orders}"), tiny).examples.classes == ("leak", "tear")


@pytest.mark.parametrize("spec", ["csv:/nowhere.csv", "nonsense", "folder:"])
def test_a_source_that_is_not_there_names_the_site(spec: str, vit: Backbone) -> None:
    with pytest.raises((DataError, ConfigError), match="press-3"):
        open_site(config(), settings(site="press-3", data=spec), vit, None)


def test_too_many_sites_for_the_samples(vit: Backbone) -> None:
    with pytest.raises(ConfigError, match="use fewer sites or more samples"):
        open_site(config(max_samples=10), dealt(0, 5), vit, None)


def test_a_fault_in_dealt_data_is_told_by_the_site_that_met_it(vit: Backbone) -> None:
    with pytest.raises(DataError, match=r"^site 'site-1': .*nowhere\.npz: does not exist"):
        open_site(config(data="npz:nowhere.npz"), dealt(1), vit, None)
    with pytest.raises(DataError, match=r"^site 'site-2': .*label '.' is not one of"):
        open_site(config(), dealt(2), vit, ("one", "two"))


def test_a_failure_is_not_remembered(tmp_path: Path, tiny: dict[str, Path]) -> None:
    path = tmp_path / "late.csv"
    site = settings(site="press-3", data=f"csv:{path}")
    with pytest.raises(DataError, match="does not exist"):
        open_text(site, tiny)
    path.write_text("text,label\na,x\nb,y\nc,x\nd,y\n")
    assert len(open_text(site, tiny).examples) == 4


# What a run may have of a site's own data.


def asked(site: SiteSettings, **run: Any) -> SiteSettings | None:
    return site.for_task(config(**run))


def test_a_deployed_site_reads_nothing_that_only_a_run_names(orders: Path) -> None:
    for run in ({"data": f"csv:{orders}"}, {"data": "hf:someone/set"}, {}):
        with pytest.raises(ConfigError, match=r"'press-3'.*names no data.*put data=folder:/PATH"):
            asked(settings(site="press-3"), **run)
    tasks = f"a=csv:{orders};b=csv:{orders}"
    for node in ({}, {"tasks": "a"}):
        with pytest.raises(ConfigError, match=r"names no data for task 'a'.*put tasks=a=folder"):
            settings(**node).for_task(config(tasks=tasks).of_task("a"))
    # A simulated one has its share of the run's, one with data of its own has that.
    assert asked(dealt(0)) == dealt(0)
    own = settings(data=f"csv:{orders}")
    assert asked(own, data="folder:/etc") == own


def test_a_run_does_not_choose_the_columns_of_a_site(orders: Path) -> None:
    own = settings(site="press-3", data=f"csv:{orders}")
    with pytest.raises(ConfigError) as caught:
        asked(own, label_column="note", text_column="name")
    text = str(caught.value)
    assert (
        "the run reads label-column='note', this site's node config says label-column='label'"
        in text
    )
    assert "start the run with text-column=text, or change the node config" in text
    noted = settings(data=f"csv:{orders}", label_column="fault")
    assert asked(noted, label_column="fault") == noted
    with pytest.raises(ConfigError, match="label-column='fault'; start the run"):
        asked(noted)


def test_a_run_does_not_choose_the_classes_of_a_site(orders: Path, tiny: dict[str, Path]) -> None:
    own = settings(data=f"csv:{orders}", classes="leak, tear,dent")
    with pytest.raises(
        ConfigError, match=r"classes=leak,note, .*classes=leak,tear,dent; give both"
    ):
        asked(own, classes="leak,note")
    assert asked(own, classes="dent,tear,leak") == own
    assert open_text(own, tiny).examples.classes == ("leak", "tear", "dent")
    together = ("dent", "leak", "scratch", "tear")
    opened = open_text(own, tiny, together).examples
    assert opened.classes == together
    assert {opened.classes[label] for label in opened.labels} == {"leak", "tear"}
    fewer = settings(site="press-3", data=f"csv:{orders}", classes="leak,dent")
    with pytest.raises(DataError, match=r"'press-3'.*label 'tear' is not one of"):
        open_text(fewer, tiny, together)


@pytest.mark.parametrize("kind", ["many", "long"])
def test_free_text_is_no_class(kind: str, tmp_path: Path, tiny: dict[str, Path]) -> None:
    path = tmp_path / "notes.csv"
    note = "called in by the night shift, " * (1 if kind == "many" else 40)
    rows = [f"pump {i},{note if i % 2 else 'fine'}{i // 2}" for i in range(9000)]
    path.write_text("text,label\n" + "\n".join(rows).replace("shift, ", "shift; "))
    with pytest.raises(
        DataError, match=r"'a'.*notes\.csv: the labels are 9000 different texts of"
    ) as caught:
        open_text(settings(site="a", data=f"csv:{path}"), tiny)
    assert "night shift" not in str(caught.value)
    assert "label-column" in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "odd"), [((8, 8), False), ((32, 32), False), ((32, 32, 3), True), ((40, 40), True)]
)
def test_images_that_the_bundled_backbone_does_not_know_are_told(
    shape: tuple[int, ...], odd: bool, tmp_path: Path, vit: Backbone
) -> None:
    draw = np.random.default_rng(0)
    images = draw.integers(0, 255, (40, *shape), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x=images, y=np.arange(40) % 2)
    run = config(data=f"npz:{tmp_path / 'x.npz'}")
    bundled = open_site(run, dealt(0), Backbone.find("vit-glyphs"), ("0", "1"))
    assert any("knows small grey signs" in note for note in bundled.notes) == odd
    other = open_site(run, dealt(0), vit, ("0", "1"))
    assert not any("grey signs" in note for note in other.notes)


def test_what_is_guessed_of_the_backbone_is_a_note(tiny: dict[str, Path]) -> None:
    own = open_site(config(), dealt(0), Backbone.find(str(tiny["dinov2"])), None)
    assert any("has no preprocessor_config.json" in note for note in own.notes)
    assert open_site(config(), dealt(1), Backbone.find("vit-glyphs"), None).notes == ()

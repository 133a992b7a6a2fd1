"""A grid multiplied out: whose setting wins, what runs are called, what shares a run, and all faults at once."""

from __future__ import annotations

from pathlib import Path

from fedsplit.experiment.cells import Faults, expand
from fedsplit.experiment.check import check_cells, dealt, fits
from fedsplit.experiment.tuning import choose, first_candidates, trials
from tests.experiment.conftest import Parse, cells_of


def test_later_tables_win(parse: Parse, tmp_path: Path) -> None:
    grid = parse(
        """
        [[problems]]
        name = "p q"
        batch-size = 8
        rounds = 2
        [axes]
        rounds = [3, 4]
        partition = ["iid", "dirichlet:1"]
        [[methods]]
        name = "a"
        rounds = 5
        [[methods]]
        name = "b"
        drop = ["max-samples"]
        """,
        seeds="[7, 8]",
    )
    cells = cells_of(grid, tmp_path)
    assert len(cells) == 2 * 2 * 2 * 2
    first = cells[0]
    assert (first.config.train.rounds, first.config.train.batch_size, first.config.run.seed) == (
        5,
        8,
        7,
    )
    assert first.config.task.name == "p-q"
    assert first.config.server.deadline_s >= 1e6
    assert cells[1].config.train.rounds == 3
    assert (first.config.task.max_samples, cells[1].config.task.max_samples) == (80, 0)
    assert Path(first.config.run.runs_dir) == tmp_path / "runs"
    # a's rounds are 5 wherever the axis stands: one run is enough for both places.
    assert len({c.run for c in cells if c.method == "a"}) == 4
    assert len({c.run for c in cells if c.method == "b"}) == 8
    assert {c.key for c in cells if c.run == first.run} == {first.key}
    assert all(c.seed == 7 for c in cells[:8])


def test_names_of_runs_are_names_of_folders(parse: Parse, tmp_path: Path) -> None:
    long = "x" * 60
    grid = parse(
        f"""
        [axes]
        partition = ["iid", "dirichlet:0.1"]
        [[methods]]
        name = "Fed/V (ours)"
        [[methods]]
        name = "Fed V ours"
        rounds = 2
        [[methods]]
        name = "{long}"
        rounds = 3
        [[methods]]
        name = "…"
        rounds = 4
        """
    )
    cells = cells_of(grid, tmp_path)
    names = [c.run for c in cells]
    assert len(set(names)) == 8
    assert names[0] == "Fed-V-ours-iid-seed0"
    assert names[1].startswith("Fed-V-ours-iid-seed0-")
    assert all(c.config.run.run_name == c.run for c in cells)


def test_the_key_is_what_decides_the_result(parse: Parse, tmp_path: Path) -> None:
    cells = [
        cells_of(parse(defaults=more), tmp_path / folder)[0]
        for more, folder in (
            ("", "x"),
            ("", "y"),
            ("deadline-s = 5.0", "x"),
            ("weight-decay = 0.1", "x"),
        )
    ]
    assert cells[0].key == cells[1].key == cells[2].key
    assert cells[0].key != cells[3].key


def test_all_faults_of_a_grid_at_once(parse: Parse, tiny: dict[str, Path], tmp_path: Path) -> None:
    grid = parse(
        f"""
        [axes]
        partition = ["iid", "pathological:11"]
        participation = [1.0, 0.1]
        [[methods]]
        name = "typo"
        method = "fedvv"
        lern-rate = 3
        [[methods]]
        name = "own"
        seed = 3
        run-name = "x"
        [[methods]]
        name = "rank"
        lora-rank = 25
        cut = "2,5"
        [[methods]]
        name = "yolo"
        method = "fedyolo"
        cut = "1,2"
        [[methods]]
        name = "file"
        data = "npz:nowhere.npz"
        [[methods]]
        name = "prompted"
        module = "prompt"
        backbone = "{tiny["distilbert"]}"
        [[methods]]
        name = "nobody"
        backbone = "not-here"
        """
    )
    faults = Faults()
    check_cells(expand(grid, tmp_path, faults), faults)
    text = "\n".join(faults.lines())
    for method, part in (
        ("typo", "method 'fedvv' is not known"),
        ("typo", "unknown key 'lern-rate'; did you mean 'learning-rate'?"),
        ("own", "seed is set by the experiment itself"),
        ("own", "run-name is set by the experiment itself"),
        ("rank", "lora-rank=25 is above the width"),
        ("rank", "cut 2,5 does not fit"),
        ("yolo", "cut=1,2: method=fedyolo runs the whole model on the device"),
        ("file", "nowhere.npz"),
        ("prompted", "holds images"),
        ("nobody", "backbone 'not-here'"),
        ("rank", "selects nobody"),
        ("rank", "pathological:11 wants 11 classes a site"),
    ):
        lines = [line for line in text.splitlines() if part in line]
        assert any(f"'{method}'" in line or " more" in line for line in lines), (method, part, text)
    # Each is said once, however many cells have it.
    assert text.count("is above the width") == 1
    assert text.count("pathological:11 wants") == 1
    assert len(text.splitlines()) < 20


def test_what_cannot_be_dealt(parse: Parse, tmp_path: Path) -> None:
    cell = cells_of(parse(), tmp_path)[0]
    assert fits(cell.config) == []
    assert "set sites" in fits(cell.config.changed(sites=0))[0]
    assert "too few" in fits(cell.config.changed(sites=60))[0]
    assert "compares methods by their accuracy" in fits(cell.config.changed(target="number"))[0]
    counts = dealt(cell.config).counts
    assert len(counts) == 2
    assert sum(map(sum, counts)) == 80


def test_trials_and_what_they_choose(parse: Parse, tmp_path: Path) -> None:
    grid = parse(
        """
        [axes]
        partition = ["iid", "dirichlet:0.5"]
        [tuning]
        seed = 99
        settings = { partition = "dirichlet:1", rounds = 2 }
        tune = { learning-rate = [0.1, 0.01] }
        [[methods]]
        name = "a"
        [[methods]]
        name = "b"
        tune = { lora-rank = [1, 2], learning-rate = [0.5] }
        [[methods]]
        name = "c"
        tune = {}
        """
    )
    faults = Faults()
    found = trials(grid, tmp_path, faults)
    assert not faults
    assert [(t.method, dict(t.candidate)) for t in found] == [
        ("a", {"learning-rate": 0.1}), ("a", {"learning-rate": 0.01}),
        ("b", {"lora-rank": 1, "learning-rate": 0.5}), ("b", {"lora-rank": 2, "learning-rate": 0.5}),
    ]  # fmt: skip
    assert {
        (t.cell.config.task.partition, t.cell.config.train.rounds, t.cell.config.run.seed)
        for t in found
    } == {("dirichlet:1", 2, 99)}
    assert len({t.cell.run for t in found}) == 4
    assert first_candidates(grid)["a", ""] == {"learning-rate": 0.1}

    from fedsplit.experiment.results import Row

    def row(place: int, reached: float | None, outcome: str = "complete") -> Row:
        cell = found[place].cell
        return Row(
            run=cell.run, method="", problem="", axes=(), seed=0, outcome=outcome, accuracy_global=reached
        )  # fmt: skip

    rows = [row(0, 0.9, "failed"), row(1, 0.2), row(2, 0.5), row(3, 0.5)]
    chosen = choose(found, rows)
    assert chosen == {
        ("a", ""): {"learning-rate": 0.01},
        ("b", ""): {"lora-rank": 1, "learning-rate": 0.5},
    }
    cells = cells_of(grid, tmp_path, tuned=chosen)
    assert {c.config.train.learning_rate for c in cells if c.method == "a"} == {0.01}
    assert {c.config.train.rounds for c in cells} == {1}


def test_names_of_any_script(parse: Parse, tmp_path: Path) -> None:
    grid = parse(
        f"""
        [[problems]]
        name = "ひび割れ"
        [[methods]]
        name = "検査"
        [[methods]]
        name = "{"検" * 60}"
        rounds = 2
        """
    )
    first, second = cells_of(grid, tmp_path)
    assert first.run.startswith("検査-ひび割れ-")
    assert first.config.task.name == "ひび割れ"
    assert len(second.run.encode()) < 240

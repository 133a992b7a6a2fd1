"""A whole run of one task on the ServerApp's side: wait for sites, call the roll, train, keep what was reached."""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from flwr.common.logger import LOGGER_NAME
from flwr.serverapp import Grid
from pydantic import ValidationError

from fedsplit.core.aggregation import capped
from fedsplit.core.config import RESUME_KEYS, RunConfig
from fedsplit.core.errors import ConfigError, FedsplitError, RunDirError
from fedsplit.core.foreign import MAX_CLASSES, printable
from fedsplit.core.notes import fit
from fedsplit.core.orders import LocalOnly
from fedsplit.core.records import SUMMARY_MARK, Outcome, Status, Summary
from fedsplit.core.scores import SCORINGS, Scale, agreed
from fedsplit.core.versions import installed
from fedsplit.federation import messages
from fedsplit.federation.server import known_nodes
from fedsplit.federation.server.attendance import Attendance
from fedsplit.federation.server.between_sites import differences_between
from fedsplit.federation.server.books.kept_module import keep_module
from fedsplit.federation.server.books.ledger import Ledger
from fedsplit.federation.server.books.run_dir import RunDir
from fedsplit.federation.server.books.tracker import Tracker
from fedsplit.federation.server.endpoint import Endpoint
from fedsplit.federation.server.newcomers import Newcomers
from fedsplit.federation.server.orders import Site
from fedsplit.federation.server.question import Question
from fedsplit.federation.server.roll_call import RollCaller
from fedsplit.federation.server.start_module import StartModule
from fedsplit.federation.server.strategy import SplitStrategy
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.inputs import Inputs
from fedsplit.model.module import ModuleSpec
from fedsplit.model.probe import check_backbone
from fedsplit.registry.of_run import PARENT
from fedsplit.training.closed_form_start import check_start

# Flower forwards what its own logger says to `flwr log`, and nothing else.
_log = logging.getLogger(LOGGER_NAME)


def settle(config: RunConfig) -> RunConfig:
    """The settings to run by: a resumed run keeps those it was started with."""
    if not config.run.resume:
        return config
    saved = RunDir.reopen(Path(config.run.runs_dir), config.run.resume).read_config()["config"]
    known, new = set(RunConfig.keys()), config.flat()
    went = {key: value for key, value in saved.items() if key in known}
    return RunConfig.resolved(went | {key: new[key] for key in ("resume", *RESUME_KEYS)})


class Run:
    """One run from roll call to summary."""

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        endpoint: Endpoint,
        *,
        simulated: bool,
        run_dir: RunDir | None = None,
    ) -> None:
        """`run_dir`: the folder to write in where it is there already; else one under `runs-dir`."""
        self.grid = grid
        self.config = config
        self.endpoint = endpoint
        self.simulated = simulated
        self.backbone = Backbone.find(config.placement.backbone)
        config = self.config = config.fitted(self.backbone.blocks)
        config.check_blocks(self.backbone.blocks)
        check_backbone(self.backbone, image_size=config.task.image_size)
        check_start(config, self.backbone)
        runs = Path(config.run.runs_dir)
        if run_dir is not None:
            self.dir = run_dir
        elif config.run.resume:
            self.dir = RunDir.reopen(runs, config.run.resume)
        else:
            self.dir = RunDir.create(runs, config.run.run_name, task=config.task.name)
        scoring = SCORINGS[config.task.target]
        self.ledger = Ledger(config, self.backbone, self.dir.label, scoring=scoring)
        self.summary: Summary | None = None
        """How it ended, once it has."""
        self._tracker = Tracker(config, self.dir, scoring)
        self._strategy: SplitStrategy | None = None
        self._parent = ""  # the digest of the module that it starts from
        self._module_saved = False
        self._ranges: set[float] = set()  # what is white at the sites

    def go(self) -> Summary:
        """Train and leave everything in the run directory. Raises FedsplitError after keeping what was reached."""
        for _ in self.turns():
            pass
        assert self.summary is not None
        return self.summary

    @property
    def finished(self) -> list[Path]:
        """Folders of what ended well."""
        ended = self.summary is not None and self.summary.outcome != "failed"
        return [self.dir.path] if ended else []

    def turns(self) -> Iterator[None]:
        """What `go` does, with a stop after the roll call and after each round, so that runs may take turns."""
        _log.info("run directory: %s", self.dir.path)
        # Other runs may have had their turns since this one was made.
        self.ledger.started = time.monotonic()
        try:
            if not self.config.run.resume:
                # At once, so that a run that ends before its first round can be gone on with too.
                self._write_config((), [])
            for _ in self._train():
                self._tracker.follow(self.ledger.metrics)
                with self.ledger.standing_by():
                    yield
            self._finish("complete", "")
        except FedsplitError as err:
            self._fail(str(err))
            raise
        except Exception as err:
            # The outermost handler of a run: what nobody foresaw leaves an account of it too.
            self._fail(
                f"an error that fedsplit does not know: {type(err).__name__}: {printable(err)}; the ServerApp's log "
                f"has its traceback"
            )
            raise

    def _fail(self, reason: str) -> None:
        try:
            self._finish("failed", reason)
        except RunDirError as full:
            # What went wrong first is what the user has to know.
            _log.error("the summary could not be kept: %s", full)

    def _train(self) -> Iterator[None]:
        goes_on = bool(self.config.run.resume) and self.dir.has_checkpoint
        # Before anybody is asked: what does not fit is known at once.
        start = None if goes_on else StartModule.read(self.config, self.backbone)
        self._parent = start.digest if start is not None else self._saved_parent()
        question = Question(
            run=self.dir.label,
            config=self.config,
            backbone=self.backbone,
            simulated=self.simulated,
            classes=self._saved_classes() if goes_on else None,
        )
        attendance, caller = self._roll_call(question)
        sites = attendance.sites
        classes = self._saved_classes() if goes_on else None
        self._fit(sites)
        classes = classes or self._classes(sites, start)
        self._ranges = {site.call.pixel_max for site in sites}
        self._note_caps(sites)
        scale = self._scale(sites, start, goes_on=goes_on)
        spec = ModuleSpec.of(self.config.module, classes, numbers=scale)
        self.ledger.classes = classes if scale is None else ()
        self._write_config(classes, sites, scale)
        if not self.simulated:
            attendance.newcomers = Newcomers(
                config=self.config,
                classes=classes,
                sites=sites,
                place=caller.placed,
                joined=lambda site: self._joined(caller.note(site), classes, sites, scale),
            )
        strategy = self._strategy = SplitStrategy(
            config=self.config,
            backbone=self.backbone,
            spec=spec,
            attendance=attendance,
            endpoint=self.endpoint,
            run_dir=self.dir,
            ledger=self.ledger,
            simulated=self.simulated,
            on_update=_log.info,
        )
        yield
        first, tensors = 1, module.initial(self.backbone, spec, seed=self.config.run.seed)
        if start is not None:
            tensors = start.onto(tensors, spec)
        if goes_on:
            first, tensors = self._restore(strategy)
        elif self.config.run.resume:
            # What an unfinished first round left behind would be counted twice.
            self.dir.forget_after(-1)
        arrays = messages.to_arrays(tensors)
        if self.config.server.compare_local_only and first == 1:
            # From the module as it is before the sites' sums are in it: who is alone has none but its own.
            strategy.compare_local_only(self.grid, arrays)
        if first == 1 and self._solves(start, classes):
            arrays = strategy.closed_form_start(self.grid, arrays)
            # Without rounds solving the classifier is all the training there is.
            if start is not None and self.config.train.rounds:
                arrays = messages.to_arrays(start.onto(strategy.module, spec))
        if not self.config.run.method_description.alone:
            yield from strategy.turns(
                self.grid, arrays, self.config.train.rounds, first_round=first
            )
            self._save_module(strategy)

    def _joined(
        self, site: Site, classes: tuple[str, ...], sites: Sequence[Site], scale: Scale | None
    ) -> None:
        """A site that came while the run lasts takes part from now on: the books say so."""
        self._ranges.add(site.call.pixel_max)
        done = self._strategy.rounds_done if self._strategy else 0
        told = [
            f"{site.name} joined in round {done + 1}, at cut {site.cut}: the scores from there on are over its samples too"
        ]
        told += [text for who, text in differences_between(self.ledger.calls) if site.name in who]
        for note in told:
            self.ledger.note(note)
            _log.info("%s", note)
        self._write_config(classes, sites, scale)
        runs = Path(self.config.run.runs_dir)
        known_nodes.write(runs, {s.name: s.node_id for s in sites})

    def _roll_call(self, question: Question) -> tuple[Attendance, RollCaller]:
        runs = Path(self.config.run.runs_dir)
        caller = RollCaller(
            question=question,
            grid=self.grid,
            ledger=self.ledger,
            on_waiting=self._say_waiting,
            known={} if self.simulated else known_nodes.read(runs),
        )
        sites = caller.sites()
        if not self.simulated:
            known_nodes.write(runs, {site.name: site.node_id for site in sites})
        attendance = Attendance(
            sites,
            asked=caller.asked,
            claims=caller.claims,
            grid=self.grid,
            question=question,
            ledger=self.ledger,
            on_update=_log.info,
        )
        return attendance, caller

    def _fit(self, sites: Sequence[Site]) -> None:
        """Settle and tell what a recipe leaves to the number of sites and their samples."""
        blocks, samples = self.backbone.blocks, sum(site.call.samples for site in sites)
        self.config = self.config.fitted(blocks, sites=len(sites), samples=samples)
        self.ledger.config = self.config
        for line in self.config.recipe_told(blocks, sites=len(sites), samples=samples):
            _log.info("recipe %s: %s", self.config.run.recipe, line)

    def _solves(self, start: StartModule | None, classes: tuple[str, ...]) -> bool:
        """Is there a row of the classifier to find in closed form? A start-module's own rows are kept."""
        if self.config.module.classifier_start == "zero":
            return False
        return start is None or not self.config.train.rounds or bool(start.added(classes))

    def _saved_classes(self) -> tuple[str, ...] | None:
        """The classes that the run had before it was resumed: what came or went at the sites does not change them."""
        saved = self.dir.read_config().get("classes")
        good = isinstance(saved, list) and all(isinstance(name, str) for name in saved)
        return tuple(saved) if good and saved else None

    def _saved_parent(self) -> str:
        """The module that a resumed run was started from."""
        saved = self.dir.read_config().get(PARENT)
        return saved if isinstance(saved, str) else ""

    def _say_waiting(self, text: str) -> None:
        status = Status(
            phase="waiting",
            round=0,
            rounds=self.config.train.rounds,
            sites=(),
            replied=(),
            message=text,
        )
        self.dir.set_status(status)

    def _classes(self, sites: Sequence[Site], start: StartModule | None) -> tuple[str, ...]:
        """The run's classes, and into its notes what that makes of a start-module's."""
        held = {name for site in sites for name in site.call.classes}
        classes = self.config.task.class_names or (
            start.classes(held) if start is not None else tuple(sorted(held))
        )
        if start is not None:
            notes = start.notes(classes, {s.name: s.call.classes for s in sites})
            self.ledger.notes = fit([*self.ledger.notes, *notes])
            for note in notes:
                _log.info("%s", note)
        if len(classes) < 2 and self.config.task.target == "class":
            raise ConfigError(
                f"the task has {len(classes)} class ({classes}); two or more are wanted"
            )
        if len(classes) > MAX_CLASSES:
            told = sorted(((len(s.call.classes), s.name) for s in sites), reverse=True)
            most = ", ".join(f"{name} {count}" for count, name in told[:3])
            raise ConfigError(
                f"the sites' classes are {len(classes)} together (most: {most}), at most {MAX_CLASSES} are "
                f"wanted; name the task's own in classes"
            )
        return classes

    def _scale(
        self, sites: Sequence[Site], start: StartModule | None, *, goes_on: bool
    ) -> Scale | None:
        """What numbers are scaled by: as the run was begun, or as the start-module has it; else what the sites say together.

        Raises ConfigError where their training numbers are all equal.
        """
        if self.config.task.target == "class":
            return None
        if goes_on:
            try:
                return Scale.model_validate(self.dir.read_config().get("scale"))
            except ValidationError as err:
                raise RunDirError(
                    f"{self.dir.path}/config.json has no scale of the numbers; start a new run"
                ) from err
        if start is not None:
            return start.spec.numbers
        weights = capped({s.name: s.call.samples for s in sites}, self.config.server.max_site_share)
        scale = agreed((s.call.spread, weights[s.name]) for s in sites if s.call.spread)
        _log.info("the sites' numbers: mean %g, deviation %g", scale.mean, scale.deviation)
        return scale

    def _note_caps(self, sites: Sequence[Site]) -> None:
        """Say whose samples count for less than the site says, and whose tests are most of all tests."""
        share = self.config.server.max_site_share
        samples = {site.name: site.call.samples for site in sites}
        tests = {site.name: site.call.test_samples for site in sites}
        notes = [
            f"{name} says {samples[name]} samples and counts for {weight}: max-site-share={share:g}, or three times "
            f"the median's"
            for name, weight in capped(samples, share).items()
            if weight < samples[name]
        ]
        # No weight of an average: a test is a sum, and nobody but the site can count it.
        notes += [
            f"{name} says {tests[name]} test samples, more than all other sites together: the scores of all sites are "
            f"mostly its own"
            for name, most in capped(tests, share).items()
            if most < tests[name]
        ]
        for note in notes:
            self.ledger.note(note)
            _log.warning("%s", note)

    def _write_config(
        self, classes: tuple[str, ...], sites: Sequence[Site], scale: Scale | None = None
    ) -> None:
        packages = ("flwr", "grpcio", "pydantic", "numpy")
        self.dir.write_json(
            "config.json",
            {
                "key": self.dir.key,
                "config": self.config.flat(),
                "classes": list(classes),
                **({"scale": scale.model_dump()} if scale else {}),
                "sites": {s.name: str(s.cut) for s in sites},
                "backbone_sha256": self.backbone.sha256,
                **({PARENT: self._parent} if self._parent else {}),
                "versions": {"python": platform.python_version()}
                | installed()
                | {name: version(name) for name in packages},
            },
        )

    def _restore(self, strategy: SplitStrategy) -> tuple[int, module.ModuleTensors]:
        """(first round to run, module) from the last checkpoint, the ledger filled as it was."""
        saved = self.dir.last_checkpoint(module.shapes(self.backbone, strategy.spec))
        strategy.restore(saved)
        self.dir.forget_after(saved.round)
        self.ledger.metrics = self.dir.read_metrics()
        before = [(int(r), str(s), str(w)) for r, s, w in saved.state["absences"]]
        # Who is missing at this roll call is missing from now on.
        self.ledger.absences = before + [a for a in self.ledger.absences if a not in before]
        self.ledger.local_only = {
            name: LocalOnly.model_validate(value)
            for name, value in saved.state["local_only"].items()
        }
        self.ledger.notes = fit([*map(str, saved.state.get("notes", [])), *self.ledger.notes])
        self.ledger.wall_before_s = float(saved.state["wall_s"])
        _log.info("going on after round %d of %d", saved.round, self.config.train.rounds)
        return saved.round + 1, saved.module

    def _save_module(self, strategy: SplitStrategy) -> None:
        self.dir.save_module(
            lambda folder: module.export(
                folder,
                self.backbone,
                strategy.spec,
                strategy.module,
                inputs=Inputs.of(self.config, self._ranges),
            )
        )
        self._module_saved = True

    def _finish(self, outcome: Outcome, reason: str) -> None:
        done = self._strategy.rounds_done if self._strategy else 0
        self._tracker.follow(self.ledger.metrics, last=True)
        if self._tracker.fault:
            self.ledger.note(self._tracker.fault)
        summary = self.summary = self.ledger.summary(
            rounds_done=done, outcome=outcome, reason=reason
        )
        if outcome == "failed" and self._strategy is not None and done:
            self._save_module(self._strategy)
        if self._module_saved:
            self.summary = summary = self._kept(summary)
        if self._strategy is not None or not self.config.run.resume:
            # A resumed run that fails before it has its account must not overwrite the earlier one.
            self.dir.finish(summary)
        self._tracker.finish(summary)
        self.dir.set_status(
            Status(
                phase="failed" if outcome == "failed" else "done",
                round=done,
                rounds=self.config.train.rounds,
                sites=tuple(s.name for s in summary.sites),
                replied=(),
                message=summary.reason,
            )
        )
        # The one line by which a CLI on another machine gets the numbers out of Flower's log.
        print_line = json.dumps(json.loads(summary.model_dump_json()), separators=(",", ":"))
        _log.info("%s %s", SUMMARY_MARK, print_line)

    def _kept(self, summary: Summary) -> Summary:
        """The summary, once the module is a version in the registry; with notes where it is none."""
        notes = keep_module(
            self.config, self.dir.path / summary.module, summary, parent=self._parent
        )
        for note in notes:
            _log.warning("%s", note)
        return summary.model_copy(update={"notes": fit([*summary.notes, *notes])})


def simulated(grid: Grid) -> bool:
    """Does this grid belong to Flower's simulation engine?"""
    return type(grid).__name__ == "InMemoryGrid"

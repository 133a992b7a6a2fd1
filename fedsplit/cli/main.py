"""The `fedsplit` command. Errors become one screen on stderr and an exit code here, and only here.

Exit codes: 0 complete, 1 failed, 2 wrong usage, settings or data, 3 partial (a site was left out),
4 the site is no member of its federation any more, 130 interrupted, 141 the reader of stdout has gone, 143 terminated. Commands load what they need when they run: `--help` stays quick.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from types import FrameType
from typing import NoReturn

import click
import typer

from fedsplit import __version__
from fedsplit.cli import (
    data,
    demo,
    doctor,
    evaluate,
    experiment,
    federation,
    module,
    predict,
    report,
    run,
    serve,
    serve_encoder,
    server,
    show_config,
    site,
    status,
    wheelhouse,
)
from fedsplit.cli.console import print_error, write_anything
from fedsplit.cli.endings import Interrupted, RunFailedError, Terminated
from fedsplit.core.errors import (
    BackboneError,
    ConfigError,
    DataError,
    FedsplitError,
    NotMemberError,
)

# What is wrong with what was given to the command. Within a run the same is a RunFailedError.
_GIVEN = (ConfigError, BackboneError, DataError)

app = typer.Typer(
    name="fedsplit",
    help="Fine-tune one frozen pre-trained transformer across sites that cannot share their data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("demo")(demo.demo)
app.command("run")(run.run)
app.command("data")(data.data)
app.command("predict")(predict.predict)
app.command("evaluate")(evaluate.evaluate)
app.command("doctor")(doctor.doctor)
app.command("status")(status.status)
app.command("serve")(serve.serve)
app.command("experiment")(experiment.experiment)
app.command("report")(report.report)
app.add_typer(serve_encoder.app, name="encoder")
app.add_typer(server.app, name="server")
app.add_typer(show_config.app, name="config")
app.add_typer(federation.app, name="federation")
app.add_typer(site.app, name="site")
app.add_typer(module.app, name="module")
app.command("wheelhouse")(wheelhouse.wheelhouse)


@app.callback(invoke_without_command=True)
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if version:
        print(f"fedsplit {__version__}")
        raise typer.Exit


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    sys.exit(call(sys.argv[1:]))


def call(args: list[str]) -> int:
    """Run one command and return its exit code."""
    as_json = "--json" in args
    write_anything()
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _terminate)
    try:
        # Not app(): typer turns KeyboardInterrupt into an exit code and drops what it says.
        command = typer.main.get_command(app)
        with command.make_context("fedsplit", list(args)) as context:
            command.invoke(context)
    except click.exceptions.Exit as err:
        return err.exit_code
    except click.exceptions.NoArgsIsHelpError as err:
        print(err.format_message())
        return 2
    except click.UsageError as err:
        print_error("UsageError", _usage(err, args), as_json=as_json)
        return 2
    except click.ClickException as err:
        print_error("Error", err.format_message(), as_json=as_json)
        return 1
    except KeyboardInterrupt as err:
        return _interrupted(err, as_json=as_json)
    except RunFailedError as err:
        print_error(err.kind, str(err), as_json=as_json)
        return 1
    except FedsplitError as err:
        print_error(type(err).__name__, str(err), as_json=as_json)
        # Of its own, so that a service manager does not start again what can only be refused.
        return 4 if isinstance(err, NotMemberError) else 2 if isinstance(err, _GIVEN) else 1
    except BrokenPipeError:
        # Who read our output has enough, e.g. `head`. What Python would still flush at its end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as err:  # noqa: BLE001 - the outermost handler: a bug still keeps the --json promise
        traceback.print_exc()
        print_error("InternalError", f"{type(err).__name__}: {err}", as_json=as_json)
        return 1
    return 0


def _usage(err: click.UsageError, args: list[str]) -> str:
    """Click's words, each sentence once, and what was meant where that can be seen."""
    # Click and typer both add the same guess.
    head, *guesses = err.format_message().split(" Did you mean ")
    message = " Did you mean ".join([head, *dict.fromkeys(guesses)])
    settings = [a for a in args[1:] if "=" in a and not a.startswith("-")]
    if "unexpected extra argument" in message and settings:
        return f"{message}; settings go behind --set, e.g. fedsplit {args[0]} --set {settings[0]}"
    if isinstance(err, click.NoSuchOption) and "run" in args[:1]:
        from fedsplit.core.config import RunConfig

        key = err.option_name.lstrip("-").replace("_", "-")
        if key in set(RunConfig.keys()):
            return f"{message} It is a setting: --set {key}=VALUE"
    return message


def _interrupted(cause: BaseException, *, as_json: bool) -> int:
    terminated = (
        cause.terminated if isinstance(cause, Interrupted) else isinstance(cause, Terminated)
    )
    print_error(
        "Terminated" if terminated else "Interrupted", str(cause) or "stopped", as_json=as_json
    )
    return 143 if terminated else 130


def _terminate(number: int, _frame: FrameType | None) -> NoReturn:
    raise Terminated(f"stopped by signal {signal.Signals(number).name}")


if __name__ == "__main__":
    main()
